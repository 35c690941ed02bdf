"""Operators that are layers: convolutions, products, means, pools, norms and padding."""
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..epilogue import fold
from ..layout import store
from ..spec import ConvSpec, Window
from ..steps import MOST_POOLED, Kind, Pool, pool_step
from ..views import AXES, IMAGE, UNREAD, NoStep, Ref, axes_of, is_flat, with_channels
from .arguments import arguments_of

__all__ = ['HANDLERS']

INF = math.inf


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return (value[0], value[0]) if len(value) == 1 else tuple(value)


def _real_conv(low: Any, value: int, weight: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec) -> int:
    if low.ref(weight) is not None or low.ref(bias) is not None:
        raise NoStep('weights that are computed')

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        epilogue, _ = fold(spec.c_out, None, bias, [])
        return store(weight.detach().float().contiguous(), spec, torch.float32), epilogue.table(spec.rows)

    stored, table = low.constant(make, 'conv', weight, bias, spec)
    return low.step(Kind.CONV, [value, None, None], [stored, table, None, None], spec.ints(), [-INF, INF, 1.])


def _convolution(low: Any, op: Any) -> Ref:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = arguments_of(op)
    depthwise = groups == x.shape[1] == weight.shape[0]
    if transposed or weight.dim() != 4 or x.dtype != torch.float32 or not (groups == 1 or depthwise):
        raise NoStep('a convolution that is neither full nor depthwise')
    pad = _pair(padding)
    window = Window(tuple(weight.shape[2:]), _pair(stride), pad, _pair(dilation))
    spec = ConvSpec(x.shape[1], weight.shape[0], window, pad, groups)
    if spec.beyond() is not None:
        raise NoStep('a convolution beyond the limits of the engine')
    return Ref(_real_conv(low, low.image(x), weight, bias, spec), IMAGE)


def _linear(low: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Ref:
    """Lower x (..., C) times weight (O, C), plus bias (O,)."""
    ref = low.ref(x)
    if ref is None or x.dtype != torch.float32:
        raise NoStep('a product with a computed weight')
    size, flat = low.size(ref), axes_of(ref, low.size(ref))[-1]
    if len(flat) > 1 and x.dim() == 2 and is_flat(ref, size):
        ref = Ref(low.step(Kind.FLATTEN, [ref.value]), ('n', 'c'))
        if low.size(ref)[3] != x.shape[-1]:
            raise NoStep('features that are flattened in part')
    elif not (flat in ('', 'c') and size[3] == x.shape[-1]):
        raise NoStep('features that are not channels')
    else:
        ref = low.pixels(x, -1)
    spec = ConvSpec(x.shape[-1], weight.shape[0])
    kernel = low.constant(lambda: weight.detach()[:, :, None, None], 'kernel', weight)
    return Ref(_real_conv(low, ref.value, kernel, bias, spec), with_channels(ref.groups, len(ref.groups) - 1))


def _addmm(low: Any, op: Any) -> Ref:
    bias, x, weight = op.args
    if op.kwargs or bias.dim() != 1:
        raise NoStep('with factors')
    return _linear(low, x, low.constant(lambda: weight.t(), 't', weight), bias)


def _mm(low: Any, op: Any) -> Ref:
    x, weight = op.args
    return _linear(low, x, low.constant(lambda: weight.t(), 't', weight), None)


def _mean(low: Any, op: Any) -> Ref:
    x, dims, *_ = arguments_of(op)
    if op.out.dtype != torch.float32:
        raise NoStep('another dtype')
    ref = low.ref(x)
    axes = axes_of(ref, low.size(ref))
    dims = sorted(d % x.dim() for d in (dims or range(x.dim())))
    pixels = ''.join(axes[d] for d in dims)
    if set(pixels) != {a for a, n in zip(AXES, low.size(ref)) if a in 'hw' and n != 1} or any(
            set(ref.groups[d]) & {'n', 'c'} for d in dims):
        raise NoStep('a mean that is not over all pixels')
    value = low.step(Kind.MEAN, [ref.value])
    kept = [('' if i in dims else group) for i, group in enumerate(ref.groups)]
    if op.out.dim() < x.dim():
        kept = [group for i, group in enumerate(kept) if i not in dims]
    return Ref(value, tuple(kept))


def _adaptive_mean(low: Any, op: Any) -> Ref:
    if tuple(op.out.shape[2:]) != (1, 1):
        raise NoStep('a mean that is not over all pixels')
    return Ref(low.step(Kind.MEAN, [low.image(op.args[0])]), ('n', 'c', '', ''))


def _max_pool(low: Any, op: Any) -> list[Ref]:
    x, kernel, stride, padding, dilation, ceil = arguments_of(op)
    window = Window(_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation))
    return [_pool(low, x, window, Pool.MAX, ceil), UNREAD]


def _avg_pool(low: Any, op: Any) -> Ref:
    x, kernel, stride, padding, ceil, count_padding, divisor = arguments_of(op)
    if divisor is not None or count_padding and any(padding):
        raise NoStep('a mean that counts padding')
    return _pool(low, x, Window(_pair(kernel), _pair(stride or kernel), _pair(padding)), Pool.MEAN, ceil)


def _pool(low: Any, x: torch.Tensor, window: Window, mode: Pool, ceil: bool) -> Ref:
    if math.prod(window.kernel) > MOST_POOLED:
        raise NoStep('a large window')
    return Ref(low.add(pool_step(window, mode, window.padding, ceil, low.image(x))), IMAGE)


def _layer_norm(low: Any, op: Any) -> list[Ref]:
    x, shape, weight, bias, eps = arguments_of(op)
    if len(shape) != 1:
        raise NoStep('a norm over pixels')
    ref = low.pixels(x, -1)
    value = low.step(Kind.NORM, [ref.value], _rows(low, weight, bias), [1, 0], [eps])
    return [Ref(value, ref.groups), *[UNREAD] * 2]


def _group_norm(low: Any, op: Any) -> list[Ref]:
    x, weight, bias, _, _, _, groups, eps = arguments_of(op)
    value = low.step(Kind.NORM, [low.image(x)], _rows(low, weight, bias), [groups, 1], [eps])
    return [Ref(value, IMAGE), *[UNREAD] * 2]


def _batch_norm(low: Any, op: Any) -> list[Ref]:
    names = [argument.name for argument in op.func._schema.arguments]
    given = dict(zip(names, arguments_of(op)))
    x, mean, var = given['input'], given['running_mean'], given['running_var']
    if given.get('training') or mean is None:
        raise NoStep('statistics of the batch')
    ref = low.pixels(x, 1)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        scale = (var.double() + given['eps']).rsqrt()
        scale = scale if given['weight'] is None else scale * given['weight'].detach().double()
        shift = -mean.double() * scale
        shift = shift if given['bias'] is None else shift + given['bias'].detach().double()
        return scale.float(), shift.float()

    rows = low.constant(make, 'batch norm', mean, var, given['weight'], given['bias'], given['eps'])
    return [Ref(low.step(Kind.AFFINE, [ref.value], rows), ref.groups), *[UNREAD] * (len(op.out) - 1)]


def _rows(low: Any, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    if any(low.ref(t) is not None for t in tensors):
        raise NoStep('constants that are computed')
    return [
        None if t is None else low.constant(lambda t=t: t.detach().float().contiguous(), 'plain', t) for t in tensors]


def _pad(low: Any, op: Any) -> Ref:
    x, pads, value = arguments_of(op)
    if any(pads[4:]) or min(pads) < 0:
        raise NoStep('padding of channels, or less than none')
    sides = [*pads, 0, 0, 0, 0][:4]
    return Ref(low.step(Kind.PAD, [low.image(x)], (), sides, [float(value)]), IMAGE)


HANDLERS: dict[str, Callable[[Any, Any], Any]] = {
    'convolution': _convolution, 'addmm': _addmm, 'mm': _mm, 'mean': _mean, '_adaptive_avg_pool2d': _adaptive_mean,
    'max_pool2d_with_indices': _max_pool, 'avg_pool2d': _avg_pool, 'native_layer_norm': _layer_norm,
    'native_group_norm': _group_norm, 'native_batch_norm': _batch_norm,
    '_native_batch_norm_legit_no_training': _batch_norm, 'cudnn_batch_norm': _batch_norm, 'constant_pad_nd': _pad,
}
