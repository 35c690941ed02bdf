"""Operators on each element: functions of one value, and arithmetic of two."""
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..steps import Binary, Kind, Unary
from ..views import AXES, NoStep, Ref, axes_of
from .arguments import arguments_of

__all__ = ['HANDLERS']

INF = math.inf


def _unary(operation: Unary, *constants: float) -> Callable[[Any, Any], Ref]:
    def handler(low: Any, op: Any) -> Ref:
        return _apply_unary(low, op, operation, *constants)

    return handler


def _apply_unary(low: Any, op: Any, operation: Unary, *constants: float) -> Ref:
    ref = low.ref(op.args[0])
    if ref is None or op.out.dtype != torch.float32:
        raise NoStep('a constant, or another dtype')
    return Ref(low.step(Kind.UNARY, [ref.value], (), [int(operation)], constants), ref.groups)


def _clamp(low: Any, op: Any) -> Ref:
    name, (_, *bounds) = op.func._schema.name, arguments_of(op)
    if any(isinstance(b, torch.Tensor) for b in bounds):
        raise NoStep('bounds that are tensors')
    low_bound = None if name.startswith('aten::clamp_max') else bounds[0]
    high = bounds[0] if name.startswith('aten::clamp_max') else bounds[1] if len(bounds) > 1 else None
    return _apply_unary(
        low, op, Unary.CLIP, -INF if low_bound is None else low_bound, INF if high is None else high)


def _leaky(low: Any, op: Any) -> Ref:
    return _apply_unary(low, op, Unary.LEAKY, float(arguments_of(op)[1]))


def _elu(low: Any, op: Any) -> Ref:
    _, alpha, scale, input_scale = arguments_of(op)
    if (scale, input_scale) != (1, 1):
        raise NoStep('a scaled elu')
    return _apply_unary(low, op, Unary.ELU, float(alpha))


def _gelu(low: Any, op: Any) -> Ref:
    return _apply_unary(low, op, Unary.GELU if arguments_of(op)[1] == 'none' else Unary.GELU_TANH)


def _pow(low: Any, op: Any) -> Ref:
    if isinstance(op.args[1], torch.Tensor) or op.args[1] != 2:
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


HANDLERS: dict[str, Callable[[Any, Any], Any]] = {
    'relu': _unary(Unary.CLIP, 0., INF), 'relu6': _unary(Unary.CLIP, 0., 6.), 'abs': _unary(Unary.ABS),
    'sigmoid': _unary(Unary.SIGMOID), 'silu': _unary(Unary.SILU), 'hardsigmoid': _unary(Unary.HARDSIGMOID),
    'hardswish': _unary(Unary.HARDSWISH), 'tanh': _unary(Unary.TANH), 'mish': _unary(Unary.MISH),
    'exp': _unary(Unary.EXP), 'sqrt': _unary(Unary.SQRT),
    'hardtanh': _clamp, 'clamp': _clamp, 'clamp_min': _clamp, 'clamp_max': _clamp, 'leaky_relu': _leaky, 'elu': _elu,
    'gelu': _gelu, 'pow': _pow, '_prelu_kernel': _prelu, 'prelu': _prelu,
    'add': _binary(Binary.ADD), 'sub': _binary(Binary.SUB), 'mul': _binary(Binary.MUL), 'div': _binary(Binary.DIV),
    'rsub': _binary(Binary.SUB_FROM), 'reciprocal': _reciprocal,
}
