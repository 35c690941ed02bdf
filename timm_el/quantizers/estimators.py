"""Gradient estimators of Sign, each as its definition and in its lean form, and the registry of all quantizers."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.fx

from .signs import sign, sign_definition, ternary
from .weights import twn

Function = Callable[[torch.Tensor], torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Definitions


def _spelled_out(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Return the values of `hard` with the gradient of `soft`.

    The sum is exact in every float format, because abs(soft) <= 1, and soft has the sign of hard where hard is not 0.
    """
    return soft + (hard - soft).detach()


def ste_sign_definition(x: torch.Tensor) -> torch.Tensor:
    """Return `ste_sign` of x, spelled out in tensor arithmetic."""
    hard = sign_definition(x)
    return _spelled_out(hard, torch.where(x.abs() <= 1, x, hard))


def approx_sign_definition(x: torch.Tensor) -> torch.Tensor:
    """Return `approx_sign` of x, spelled out in tensor arithmetic."""
    hard = sign_definition(x)
    inside = x.abs() <= 1
    # The curve sees only values inside its support: an inf or NaN there would turn a zero gradient into NaN.
    clipped = torch.where(inside, x, torch.zeros_like(x))
    return _spelled_out(hard, torch.where(inside, clipped * (2 - clipped.abs()), hard))


def tbn_threshold(x: torch.Tensor) -> torch.Tensor:
    """Return TBN's threshold of each image, 0.4 * mean(abs(x)): (N, ...) -> (N, 1, ...), as many axes as x."""
    axes: list[int] = [axis for axis in range(1, x.dim())]  # TorchScript has no list(range())
    return x.detach().abs().mean(axes, keepdim=True) * 0.4


torch.fx.wrap('tbn_threshold')  # a tracer does not know the number of axes


def ternary_sign_definition(x: torch.Tensor) -> torch.Tensor:
    """Return `ternary_sign` of x, spelled out in tensor arithmetic."""
    hard = ternary(x, tbn_threshold(x))
    return _spelled_out(hard, torch.where(x.abs() <= 1, x, hard))


# ---------------------------------------------------------------------------------------------------------------------
# Lean forms


class Estimator(NamedTuple):
    """Lean form of a quantizer: its values, the code kept for backward, and the gradient from that code.

    Args:
        quantize: x -> quantized x.
        gradient: (x, upstream gradient) -> gradient.
        encode: x -> the code that is kept for backward in place of x.
        decode: (code, dtype) -> quantized x.
        gradient_of_code: (code, upstream gradient) -> gradient.
    """
    quantize: Function
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    encode: Function
    decode: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    gradient_of_code: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    @classmethod
    def keeping_x(cls, quantize: Function, gradient: Callable) -> 'Estimator':
        """Return an estimator whose code is x itself, because its slope varies with x."""
        return cls(quantize, gradient, lambda x: x, lambda x, dtype: quantize(x).to(dtype), gradient)


def _inside(x: torch.Tensor) -> torch.Tensor:
    """Return 1 where -1 <= x <= 1, else 0, in the dtype of x; 0 for NaN."""
    return x.abs().le_(1)


def _where_inside(inside: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return grad where `inside` is 1, else 0 (also where grad is not finite): where(), at the speed of a product."""
    return torch.ops.aten.threshold_backward(grad, inside.to(grad.dtype), 0.5)


_STE = Estimator(
    quantize=sign,
    gradient=lambda x, grad: _where_inside(_inside(x), grad),
    # One byte a value: bit 0 says abs(x) <= 1, bit 1 says x >= 0.
    encode=lambda x: _inside(x).add_(x.clone().ge_(0), alpha=2).to(torch.int8),
    decode=lambda code, dtype: code.to(dtype).ge_(2).mul_(2).sub_(1),
    gradient_of_code=lambda code, grad: _where_inside(code & 1, grad),
)


def _quantize_ternary(x: torch.Tensor) -> torch.Tensor:
    return ternary(x, tbn_threshold(x))


_TERNARY = Estimator(
    quantize=_quantize_ternary,
    gradient=_STE.gradient,
    # One byte a value: bit 0 says abs(x) <= 1, the others hold the ternary value + 1.
    encode=lambda x: _inside(x).add_(_quantize_ternary(x).add_(1), alpha=2).to(torch.int8),
    decode=lambda code, dtype: (code >> 1).to(dtype).sub_(1),
    gradient_of_code=_STE.gradient_of_code,
)
_APPROX = Estimator.keeping_x(sign, lambda x, grad: _where_inside(_inside(x), grad * (2 - 2 * x.abs())))
_TANH = Estimator.keeping_x(torch.tanh, lambda x, grad: grad * (1 - torch.tanh(x).square()))
_REAL = Estimator.keeping_x(lambda x: x, lambda x, grad: grad)


class _Quantize(torch.autograd.Function):
    """A quantizer in its lean form."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, name: str) -> torch.Tensor:
        return REGISTRY[name].lean.quantize(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.name = inputs
        ctx.save_for_backward(REGISTRY[ctx.name].lean.encode(x))

    @staticmethod
    def backward(ctx, grad):
        code, = ctx.saved_tensors
        return REGISTRY[ctx.name].lean.gradient_of_code(code, grad), None


def lean(x: torch.Tensor, name: str | None) -> torch.Tensor:
    """Apply a quantizer by name in its lean form; without gradient mode, return its values alone."""
    return _Quantize.apply(x, name) if torch.is_grad_enabled() else REGISTRY[name].lean.quantize(x)


def is_symbolic(x: torch.Tensor) -> bool:
    """Return True where a tracer records Python: fx, jit.trace and export look through an autograd.Function."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting()


def _quantize(x: torch.Tensor, name: str) -> torch.Tensor:
    """Apply a quantizer by its definition where a tracer looks on, else in its lean form."""
    return REGISTRY[name].definition(x) if is_symbolic(x) else lean(x, name)


# ---------------------------------------------------------------------------------------------------------------------
# Quantizers of activations


def ste_sign(x: torch.Tensor) -> torch.Tensor:
    """Apply Sign with the clipped straight-through estimator (paper, eq. 1 and 2).

    Forward: Sign(x), see `sign`.
    Gradient: dSign/dx = 1 if -1 <= x <= 1 else 0. The edge is inclusive: weights that were loaded from a packed file
    are exactly +-1 times a scale and must be able to train. NaN has gradient 0.

    Args:
        x: Float tensor of any shape.

    Returns:
        Tensor of -1 and +1, same shape and dtype.
    """
    if torch.jit.is_scripting():
        return ste_sign_definition(x) if torch.is_grad_enabled() else sign_definition(x.detach())
    else:
        return _quantize(x, 'ste')


def approx_sign(x: torch.Tensor) -> torch.Tensor:
    """Apply Sign with the piecewise quadratic ApproxSign estimator (Bi-Real Net, section 3.3).

    Forward: Sign(x), see `sign`.
    Gradient: that of F(x) = x * (2 - abs(x)) on [-1, 1]: dF/dx = 2 - 2 * abs(x) if abs(x) <= 1 else 0.

    Args:
        x: Float tensor of any shape.

    Returns:
        Tensor of -1 and +1, same shape and dtype.
    """
    if torch.jit.is_scripting():
        return approx_sign_definition(x) if torch.is_grad_enabled() else sign_definition(x.detach())
    else:
        return _quantize(x, 'approx')


def ternary_sign(x: torch.Tensor) -> torch.Tensor:
    """Apply TBN's ternary activation (Wan et al., ECCV 2018, section 3.1).

    Forward: `ternary` with the threshold 0.4 * mean(abs(x)) of each image. The paper's mean is over the input of a
    layer for one image, so a result does not depend on the rest of the batch, and there is nothing to track.
    Gradient: 1 if -1 <= x <= 1 else 0; none through the threshold.

    Args:
        x: Float tensor (N, ...).

    Returns:
        Tensor of -1, 0 and +1, same shape and dtype.
    """
    if torch.jit.is_scripting():
        return ternary_sign_definition(x) if torch.is_grad_enabled() else ternary(x, tbn_threshold(x))
    else:
        return _quantize(x, 'ternary')


def tanh(x: torch.Tensor) -> torch.Tensor:
    """Return the hyperbolic tangent, the soft sign of Real-to-Binary's first step (its section 4.2). A real value."""
    return torch.tanh(x)


def real(x: torch.Tensor) -> torch.Tensor:
    """Return x itself: no quantization."""
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Registry


@dataclass(frozen=True)
class Quantizer:
    """One quantizer: its name, and all that depends on the name.

    Args:
        name: As layers and recipes take it; None is no quantization.
        bits: Bits of a quantized value, 0 for a real one. An operand of n bits is a combination of n tensors of +-1.
        function: x -> quantized x; it picks the definition or the lean form. None if it needs more than x.
        definition: The same in tensor arithmetic, for tracers.
        lean: The same for an autograd.Function, None if there is none.
        of_inputs, of_weights: An input, or a weight, may have it.
    """
    name: str | None
    bits: int
    function: Function | None = None
    definition: Function | None = None
    lean: Estimator | None = None
    of_inputs: bool = True
    of_weights: bool = True


REGISTRY: dict[str | None, Quantizer] = {row.name: row for row in (
    Quantizer('ste', 1, ste_sign, ste_sign_definition, _STE),
    Quantizer('approx', 1, approx_sign, approx_sign_definition, _APPROX),
    Quantizer('ternary', 2, ternary_sign, ternary_sign_definition, _TERNARY, of_weights=False),
    Quantizer('tanh', 0, tanh, tanh, _TANH, of_weights=False),
    Quantizer('twn', 2, twn, of_inputs=False),
    Quantizer('ttq', 2, of_inputs=False, of_weights=False),  # `TrainedTernaryConv2d` has its levels
    Quantizer(None, 0, real, real, _REAL),
)}
QUANTIZERS = {name: row.function for name, row in REGISTRY.items() if row.of_inputs}
WEIGHT_QUANTIZERS = {name: row.function for name, row in REGISTRY.items() if row.of_weights}


def get_quantizer(
        name: str | None, argument: str = 'quantizer', known: dict[str | None, Function] = QUANTIZERS) -> Function:
    """Return a quantizer by name.

    Args:
        name: A key of `known`; None is no quantization.
        argument: Name of the caller's argument, for the error.
        known: `QUANTIZERS` or `WEIGHT_QUANTIZERS`.

    Raises:
        ValueError: The name is not known.
    """
    if name not in known:
        expected = ', '.join(repr(k) for k in known)
        raise ValueError(f'{argument}: unknown quantizer {name!r}, expected one of {expected}')
    return known[name]
