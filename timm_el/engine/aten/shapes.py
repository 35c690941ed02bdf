"""Operators that show other axes or channels of a value, and those that join values."""
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..steps import Kind
from ..views import NoStep, Ref, axes_of, regrouped
from .arguments import arguments_of

__all__ = ['HANDLERS']


def _same(low: Any, op: Any) -> Ref:
    out = op.out[0] if isinstance(op.out, (tuple, list)) else op.out
    ref = low.ref(op.args[0])
    if out.dtype != torch.float32 or out.shape != op.args[0].shape:
        raise NoStep('another dtype or shape')
    return ref


def _restrided(low: Any, op: Any) -> Ref:
    x, out = op.args[0], op.out
    places = [(t.storage_offset(), *(step for n, step in zip(t.shape, t.stride()) if n > 1)) for t in (x, out)]
    if out.shape != x.shape or places[0] != places[1]:
        raise NoStep('strides of its own')
    return low.ref(x)


def _view(low: Any, op: Any) -> Ref:
    ref = low.ref(op.args[0])
    return regrouped(ref, low.size(ref), op.out.shape)


def _permute(low: Any, op: Any) -> Ref:
    ref = low.ref(op.args[0])
    order = list(range(len(ref.groups)))
    name = op.func._schema.name.split('::')[1]
    if name == 'permute':
        order = [d % len(order) for d in op.args[1]]
    else:
        a, b = (0, 1) if name == 't' else op.args[1:3]
        order[a], order[b] = order[b], order[a]
    return Ref(ref.value, tuple(ref.groups[d] for d in order))


def _channel_axis(low: Any, tensor: torch.Tensor, dim: int) -> Ref:
    """Return a view whose axis `dim` is the channels, wherever the others are."""
    ref = low.ref(tensor)
    if ref is None or axes_of(ref, low.size(ref))[dim] != 'c' and (low.size(ref)[3] != 1 or ref.groups[dim] != 'c'):
        raise NoStep('along another axis than channels')
    return ref


def _channels(low: Any, ref: Ref, index: Sequence[int]) -> Ref:
    index = tuple(index)
    tensor = low.constant(lambda: torch.tensor(index, dtype=torch.int32, device='cpu'), 'channels', index)
    return Ref(low.step(Kind.CHANNELS, [ref.value], [tensor]), ref.groups)


def _slice(low: Any, op: Any) -> Ref:
    x, dim, start, end, step = arguments_of(op)
    size = x.shape[dim]
    wanted = range(size)[slice(start, end, step)]
    if len(wanted) == size:
        return low.ref(x)
    return _channels(low, _channel_axis(low, x, dim), wanted)


def _split(low: Any, op: Any) -> list[Ref]:
    x, _, dim = arguments_of(op)
    ref, at, parts = _channel_axis(low, x, dim), 0, []
    for out in op.out:
        parts.append(_channels(low, ref, range(at, at + out.shape[dim])))
        at += out.shape[dim]
    return parts


def _index_select(low: Any, op: Any) -> Ref:
    x, dim, index = op.args
    return _channels(low, _channel_axis(low, x, dim), index.tolist())


def _cat(low: Any, op: Any) -> Ref:
    tensors, dim = arguments_of(op)
    refs = [_channel_axis(low, x, dim) for x in tensors]
    if any(ref.groups != refs[0].groups for ref in refs):
        raise NoStep('parts of different forms')
    return Ref(low.step(Kind.CONCAT, [ref.value for ref in refs]), refs[0].groups)


HANDLERS: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(('clone', 'contiguous', 'detach', 'alias', '_to_copy', 'lift_fresh', 'expand', 'dropout'), _same),
    **dict.fromkeys(('view', '_unsafe_view', 'reshape', '_reshape_alias', 'squeeze', 'unsqueeze', 'flatten'), _view),
    **dict.fromkeys(('permute', 'transpose', 't'), _permute), 'as_strided': _restrided,
    'slice': _slice, 'split': _split, 'split_with_sizes': _split, 'index_select': _index_select, 'cat': _cat,
}
