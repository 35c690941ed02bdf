"""Handlers of torch's operators: the step, or the view, that each is. HANDLERS has them by name, without underscore.

A handler takes the pass (`lower.Lowering`) and the operator, and returns a `Ref`, or a list of one for each output.
"""
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .epilogue import fold
from .layout import store
from .spec import ConvSpec, Window
from .steps import MOST_POOLED, Binary, Kind, Pool, Unary, pool_step
from .views import AXES, IMAGE, NoStep, Ref, axes_of, is_flat, regrouped, with_channels

__all__ = ['FACTORIES', 'HANDLERS', 'UNREAD']

INF = math.inf
FACTORIES = {  # what they give does not depend on the values of what they are given
    'new_zeros', 'new_ones', 'new_full', 'new_empty', 'zeros_like', 'ones_like', 'full_like', 'empty_like',
    'new_empty_strided'}


def _arguments(op: Any) -> list[Any]:
    """Return all arguments in the order of the operator's schema, defaults filled in."""
    names = [argument.name for argument in op.func._schema.arguments]
    given = {**dict(zip(names, op.args)), **op.kwargs}
    return [given.get(a.name, a.default_value) for a in op.func._schema.arguments]


# ---------------------------------------------------------------------------------------------------------------------
# Views

def _same(low: Any, op: Any) -> Ref:
    out = op.out[0] if isinstance(op.out, (tuple, list)) else op.out
    ref = low.ref(op.args[0])
    if out.dtype != torch.float32 or out.shape != op.args[0].shape:
        raise NoStep('another dtype or shape')
    return ref


def _restrided(low: Any, op: Any) -> Ref:
    ref = low.ref(op.args[0])
    n, h, w, c = low.size(ref)
    if op.out.shape != op.args[0].shape or (h, w) != (1, 1):
        raise NoStep('strides of its own')
    return ref


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
    x, dim, start, end, step = _arguments(op)
    size = x.shape[dim]
    wanted = range(size)[slice(start, end, step)]
    if len(wanted) == size:
        return low.ref(x)
    return _channels(low, _channel_axis(low, x, dim), wanted)


def _split(low: Any, op: Any) -> list[Ref]:
    x, _, dim = _arguments(op)
    ref, at, parts = _channel_axis(low, x, dim), 0, []
    for out in op.out:
        parts.append(_channels(low, ref, range(at, at + out.shape[dim])))
        at += out.shape[dim]
    return parts


def _index_select(low: Any, op: Any) -> Ref:
    x, dim, index = op.args
    return _channels(low, _channel_axis(low, x, dim), index.tolist())


def _cat(low: Any, op: Any) -> Ref:
    tensors, dim = _arguments(op)
    refs = [_channel_axis(low, x, dim) for x in tensors]
    if any(ref.groups != refs[0].groups for ref in refs):
        raise NoStep('parts of different forms')
    return Ref(low.step(Kind.CONCAT, [ref.value for ref in refs]), refs[0].groups)


# ---------------------------------------------------------------------------------------------------------------------
# Elementwise

def _unary(operation: Unary, *constants: float) -> Callable[[Any, Any], Ref]:
    def handler(low: Any, op: Any) -> Ref:
        return _apply_unary(low, op, operation, *constants)

    return handler


def _apply_unary(low: Any, op: Any, operation: Unary, *constants: float) -> Ref:
    ref = low.ref(op.args[0])
    if op.out.dtype != torch.float32:
        raise NoStep('another dtype')
    return Ref(low.step(Kind.UNARY, [ref.value], (), [int(operation)], constants), ref.groups)


def _clamp(low: Any, op: Any) -> Ref:
    name, (_, *bounds) = op.func._schema.name, _arguments(op)
    if any(isinstance(b, torch.Tensor) for b in bounds):
        raise NoStep('bounds that are tensors')
    low_bound = None if name.startswith('aten::clamp_max') else bounds[0]
    high = bounds[0] if name.startswith('aten::clamp_max') else bounds[1] if len(bounds) > 1 else None
    return _apply_unary(
        low, op, Unary.CLIP, -INF if low_bound is None else low_bound, INF if high is None else high)


def _leaky(low: Any, op: Any) -> Ref:
    return _apply_unary(low, op, Unary.LEAKY, float(_arguments(op)[1]))


def _elu(low: Any, op: Any) -> Ref:
    _, alpha, scale, input_scale = _arguments(op)
    if (scale, input_scale) != (1, 1):
        raise NoStep('a scaled elu')
    return _apply_unary(low, op, Unary.ELU, float(alpha))


def _gelu(low: Any, op: Any) -> Ref:
    return _apply_unary(low, op, Unary.GELU if _arguments(op)[1] == 'none' else Unary.GELU_TANH)


def _pow(low: Any, op: Any) -> Ref:
    if op.args[1] != 2:
        raise NoStep('a power')
    return _apply_unary(low, op, Unary.SQUARE)


def _prelu(low: Any, op: Any) -> Ref:
    x, weight = op.args
    if low.ref(weight) is not None:
        raise NoStep('slopes that are computed')
    ref = low.pixels(x, 1 if x.dim() > 1 else 0)
    channels = low.size(ref)[3]
    slope = low.constant(lambda: weight.detach().flatten().expand(channels).contiguous(), 'slope', weight, channels)
    return Ref(low.step(Kind.PRELU, [ref.value], [slope]), ref.groups)


_REVERSED = {
    Binary.ADD: Binary.ADD, Binary.MUL: Binary.MUL, Binary.SUB: Binary.SUB_FROM, Binary.DIV: Binary.DIV_INTO,
    Binary.SUB_FROM: Binary.SUB}


def _binary(operation: Binary) -> Callable[[Any, Any], Ref]:
    def handler(low: Any, op: Any) -> Ref:
        a, b, *rest = op.args
        if op.kwargs.get('alpha', 1) != 1 or op.kwargs.get('rounding_mode') or rest or op.out.dtype != torch.float32:
            raise NoStep('with a factor or rounding')
        first, second = low.ref(a), low.ref(b)
        reverse = first is None or tuple(a.shape) != tuple(op.out.shape)
        if reverse:
            a, b, first, second = b, a, second, first
        if first is None or tuple(a.shape) != tuple(op.out.shape):
            raise NoStep('operands that are spread over each other')
        chosen = _REVERSED[operation] if reverse else operation
        if second is None:
            return _with_constant(low, chosen, first, a, b)
        _check_spread(low, first, second)
        return Ref(low.step(Kind.BINARY, [first.value, second.value], (), [int(chosen)]), first.groups)

    return handler


def _reciprocal(low: Any, op: Any) -> Ref:
    return _with_constant(low, Binary.DIV_INTO, low.ref(op.args[0]), op.args[0], 1.)


def _check_spread(low: Any, first: Ref, second: Ref) -> None:
    """Raise NoStep unless each axis of the second operand, where it is longer than one, is that of the first."""
    a, b = axes_of(first, low.size(first)), axes_of(second, low.size(second))
    for x, y in zip(reversed(a), reversed(b)):
        if y and x != y:
            raise NoStep('operands of different forms')
    if any(b[:len(b) - len(a)] if len(b) > len(a) else ()):
        raise NoStep('operands of different forms')
    big, small = low.size(first), low.size(second)
    if any(y not in (1, x) for x, y in zip(big, small)):
        raise NoStep('operands of different sizes')


def _with_constant(low: Any, operation: Binary, ref: Ref, x: torch.Tensor, constant: Any) -> Ref:
    if isinstance(constant, torch.Tensor):
        if constant.is_complex():
            raise NoStep('complex numbers')
    else:
        constant = low.constant(lambda: torch.tensor(float(constant), dtype=torch.float32, device='cpu'), constant)
    zero = low.constant(lambda: not bool(constant.count_nonzero()), 'zero', constant)
    if zero and operation in (Binary.ADD, Binary.SUB):
        return ref
    size = low.size(ref)
    image = low.constant(lambda: _as_value(constant, ref, size), 'image', constant, ref.groups, size)
    if image.shape[1:3] == (1, 1) and operation in (Binary.ADD, Binary.SUB, Binary.MUL):
        row = low.constant(
            lambda: (-image if operation == Binary.SUB else image).expand(1, 1, 1, size[3]).flatten().contiguous(),
            'row', image, operation, size[3])
        tensors = [row, None] if operation == Binary.MUL else [None, row]
        return Ref(low.step(Kind.AFFINE, [ref.value], tensors), ref.groups)
    other = low.step(Kind.CONST, [], [image], image.shape)
    return Ref(low.step(Kind.BINARY, [ref.value, other], (), [int(operation)]), ref.groups)


def _as_value(constant: torch.Tensor, ref: Ref, size: Sequence[int]) -> torch.Tensor:
    """Return a constant that is spread over a tensor as NHWC memory, each axis full or of size one."""
    length = dict(zip(AXES, size))
    shape, order = [], []
    groups = ref.groups[len(ref.groups) - constant.dim():]
    if constant.dim() > len(ref.groups):
        raise NoStep('a constant of more axes')
    for n, group in zip(constant.shape, groups):
        full = math.prod(length[a] for a in group)
        if n not in (1, full):
            raise NoStep('a constant of another form')
        shape += [length[a] if n == full else 1 for a in group]
        order += list(group)
    missing = [a for a in AXES if a not in order]
    view = constant.detach().float().reshape([*shape, *[1] * len(missing)])
    order += missing
    return view.permute([order.index(a) for a in AXES]).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Layers

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
    x, weight, bias, stride, padding, dilation, transposed, _, groups = _arguments(op)
    depthwise = groups == x.shape[1] == weight.shape[0]
    if transposed or weight.dim() != 4 or x.dtype != torch.float32 or not (groups == 1 or depthwise):
        raise NoStep('a convolution that is neither full nor depthwise')
    pad = _pair(padding)
    window = Window(tuple(weight.shape[2:]), _pair(stride), pad, _pair(dilation))
    spec = ConvSpec(x.shape[1], weight.shape[0], window, pad, groups)
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
    x, dims, *_ = _arguments(op)
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
    x, kernel, stride, padding, dilation, ceil = _arguments(op)
    window = Window(_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation))
    return [_pool(low, x, window, Pool.MAX, ceil), UNREAD]


def _avg_pool(low: Any, op: Any) -> Ref:
    x, kernel, stride, padding, ceil, count_padding, divisor = _arguments(op)
    if divisor is not None or count_padding and any(padding):
        raise NoStep('a mean that counts padding')
    return _pool(low, x, Window(_pair(kernel), _pair(stride or kernel), _pair(padding)), Pool.MEAN, ceil)


def _pool(low: Any, x: torch.Tensor, window: Window, mode: Pool, ceil: bool) -> Ref:
    if math.prod(window.kernel) > MOST_POOLED:
        raise NoStep('a large window')
    return Ref(low.add(pool_step(window, mode, window.padding, ceil, low.image(x))), IMAGE)


def _layer_norm(low: Any, op: Any) -> list[Ref]:
    x, shape, weight, bias, eps = _arguments(op)
    if len(shape) != 1:
        raise NoStep('a norm over pixels')
    ref = low.pixels(x, -1)
    value = low.step(Kind.NORM, [ref.value], _rows(low, weight, bias), [1, 0], [eps])
    return [Ref(value, ref.groups), *[UNREAD] * 2]


def _group_norm(low: Any, op: Any) -> list[Ref]:
    x, weight, bias, _, _, _, groups, eps = _arguments(op)
    value = low.step(Kind.NORM, [low.image(x)], _rows(low, weight, bias), [groups, 1], [eps])
    return [Ref(value, IMAGE), *[UNREAD] * 2]


def _batch_norm(low: Any, op: Any) -> list[Ref]:
    names = [argument.name for argument in op.func._schema.arguments]
    given = dict(zip(names, _arguments(op)))
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
    x, pads, value = _arguments(op)
    if any(pads[4:]) or min(pads) < 0:
        raise NoStep('padding of channels, or less than none')
    sides = [*pads, 0, 0, 0, 0][:4]
    return Ref(low.step(Kind.PAD, [low.image(x)], (), sides, [float(value)]), IMAGE)


UNREAD = Ref(-1, ())  # an output that nobody may read

HANDLERS: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(('clone', 'contiguous', 'detach', 'alias', '_to_copy', 'lift_fresh', 'expand', 'dropout'), _same),
    **dict.fromkeys(('view', '_unsafe_view', 'reshape', '_reshape_alias', 'squeeze', 'unsqueeze', 'flatten'), _view),
    **dict.fromkeys(('permute', 'transpose', 't'), _permute), 'as_strided': _restrided,
    'slice': _slice, 'split': _split, 'split_with_sizes': _split, 'index_select': _index_select, 'cat': _cat,
    'relu': _unary(Unary.CLIP, 0., INF), 'relu6': _unary(Unary.CLIP, 0., 6.), 'abs': _unary(Unary.ABS),
    'sigmoid': _unary(Unary.SIGMOID), 'silu': _unary(Unary.SILU), 'hardsigmoid': _unary(Unary.HARDSIGMOID),
    'hardswish': _unary(Unary.HARDSWISH), 'tanh': _unary(Unary.TANH), 'mish': _unary(Unary.MISH),
    'exp': _unary(Unary.EXP), 'sqrt': _unary(Unary.SQRT),
    'hardtanh': _clamp, 'clamp': _clamp, 'clamp_min': _clamp, 'clamp_max': _clamp, 'leaky_relu': _leaky, 'elu': _elu,
    'gelu': _gelu, 'pow': _pow, '_prelu_kernel': _prelu, 'prelu': _prelu,
    'add': _binary(Binary.ADD), 'sub': _binary(Binary.SUB), 'mul': _binary(Binary.MUL), 'div': _binary(Binary.DIV),
    'rsub': _binary(Binary.SUB_FROM), 'reciprocal': _reciprocal,
    'convolution': _convolution, 'addmm': _addmm, 'mm': _mm, 'mean': _mean, '_adaptive_avg_pool2d': _adaptive_mean,
    'max_pool2d_with_indices': _max_pool, 'avg_pool2d': _avg_pool, 'native_layer_norm': _layer_norm,
    'native_group_norm': _group_norm, 'native_batch_norm': _batch_norm,
    '_native_batch_norm_legit_no_training': _batch_norm, 'cudnn_batch_norm': _batch_norm, 'constant_pad_nd': _pad,
}
