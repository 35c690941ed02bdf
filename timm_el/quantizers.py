"""Sign, its gradient estimators, and nothing else: pure tensor functions.

Every quantizer maps a float tensor to a tensor of the same shape and dtype that holds exactly -1 and +1, and carries
a surrogate gradient. Each exists twice, equal in forward and gradient by test:

* the *definition*, plain tensor arithmetic, which TorchScript and torch.fx can read;
* the *lean* form (`Estimator`), for a `torch.autograd.Function` that keeps as little as it can for backward, used
  everywhere else.
"""
from typing import Callable, Dict, NamedTuple, Optional

import torch

__all__ = ['sign', 'ste_sign', 'approx_sign', 'real', 'QUANTIZERS', 'ESTIMATORS', 'Estimator', 'get_quantizer']


def sign(x: torch.Tensor) -> torch.Tensor:
    """Sign with Sign(0) = +1 (paper, eq. 1), the one place where the sign of zero is decided.

    Sign(x) = +1 if x >= 0 else -1. Hence -0.0 gives +1 and NaN gives -1. No gradient.

    Args:
        x: Float tensor of any shape.

    Returns:
        Tensor of -1 and +1, same shape and dtype.
    """
    # Comparing in place stays in floats: on CPU it is several times faster than a detour over bool and where().
    return x.clone().ge_(0).mul_(2).sub_(1)


def _sign_definition(x: torch.Tensor) -> torch.Tensor:
    """`sign` out of place, as graph formats want it: ONNX has no comparison in place."""
    return (x >= 0).to(x.dtype) * 2 - 1


def ste_sign_definition(x: torch.Tensor) -> torch.Tensor:
    """`ste_sign` spelled out in tensor arithmetic."""
    hard = _sign_definition(x)
    soft = torch.where(x.abs() <= 1, x, hard)
    # soft has hard's sign and abs(soft) <= 1, so the sum below is exactly -1 or +1 in every float format.
    return soft + (hard - soft).detach()


def approx_sign_definition(x: torch.Tensor) -> torch.Tensor:
    """`approx_sign` spelled out in tensor arithmetic."""
    hard = _sign_definition(x)
    inside = x.abs() <= 1
    # The curve sees only values inside its support: an inf or NaN there would turn a zero gradient into NaN.
    clipped = torch.where(inside, x, torch.zeros_like(x))
    soft = torch.where(inside, clipped * (2 - clipped.abs()), hard)
    return soft + (hard - soft).detach()


class Estimator(NamedTuple):
    """The lean form of a quantizer: what is computed forward, what is kept for backward, and the gradient from it.

    Args:
        quantize: x -> quantized x.
        gradient: (x, upstream gradient) -> gradient.
        encode: x -> what is kept for backward in place of x.
        decode: (code, dtype) -> quantized x.
        gradient_of_code: (code, upstream gradient) -> gradient.
    """
    quantize: Callable[[torch.Tensor], torch.Tensor]
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    gradient_of_code: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _inside(x: torch.Tensor) -> torch.Tensor:
    """1 where -1 <= x <= 1, else 0, in the dtype of x; 0 for NaN."""
    return x.abs().le_(1)


def _where_inside(inside: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """grad where `inside` is 1, else 0 (also where grad is not finite): where(), at the speed of a product."""
    return torch.ops.aten.threshold_backward(grad, inside.to(grad.dtype), 0.5)


def _encode_ste(x: torch.Tensor) -> torch.Tensor:
    """One byte a value: bit 0 says abs(x) <= 1, bit 1 says x >= 0."""
    return _inside(x).add_(x.clone().ge_(0), alpha=2).to(torch.int8)


_STE = Estimator(
    quantize=sign,
    gradient=lambda x, grad: _where_inside(_inside(x), grad),
    encode=_encode_ste,
    decode=lambda code, dtype: code.to(dtype).ge_(2).mul_(2).sub_(1),
    gradient_of_code=lambda code, grad: _where_inside(code & 1, grad),
)


def _approx_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return _where_inside(_inside(x), grad * (2 - 2 * x.abs()))


# The slope of ApproxSign varies with x, so x itself is kept.
_APPROX = Estimator(sign, _approx_gradient, lambda x: x, lambda x, dtype: sign(x).to(dtype), _approx_gradient)
_REAL = Estimator(
    lambda x: x, lambda x, grad: grad, lambda x: x, lambda x, dtype: x.to(dtype), lambda x, grad: grad)


class _Quantize(torch.autograd.Function):
    """A quantizer in its lean form."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, name: str) -> torch.Tensor:
        return ESTIMATORS[name].quantize(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.name = inputs
        ctx.save_for_backward(ESTIMATORS[ctx.name].encode(x))

    @staticmethod
    def backward(ctx, grad):
        code, = ctx.saved_tensors
        return ESTIMATORS[ctx.name].gradient_of_code(code, grad), None


def is_symbolic(x: torch.Tensor) -> bool:
    """True where a tracer records Python: fx, jit.trace, export look through an autograd.Function, or choke on it."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting()


def ste_sign(x: torch.Tensor) -> torch.Tensor:
    """Sign with the clipped straight-through estimator (paper, eq. 1 and 2).

    Forward: Sign(x), see `sign`.
    Gradient: dSign/dx = 1 if -1 <= x <= 1 else 0. The edge is inclusive: weights that were loaded from a packed file
    are exactly +-1 times a scale and must be able to train. NaN has gradient 0.

    Args:
        x: Float tensor of any shape.

    Returns:
        Tensor of -1 and +1, same shape and dtype.
    """
    if torch.jit.is_scripting():
        return ste_sign_definition(x) if torch.is_grad_enabled() else _sign_definition(x.detach())
    else:
        return ste_sign_definition(x) if is_symbolic(x) else lean(x, 'ste')


def approx_sign(x: torch.Tensor) -> torch.Tensor:
    """Sign with the piecewise quadratic ApproxSign estimator (Bi-Real Net, section 3.3).

    Forward: Sign(x), see `sign`.
    Gradient: that of F(x) = x * (2 - abs(x)) on [-1, 1]: dF/dx = 2 - 2 * abs(x) if abs(x) <= 1 else 0.

    Args:
        x: Float tensor of any shape.

    Returns:
        Tensor of -1 and +1, same shape and dtype.
    """
    if torch.jit.is_scripting():
        return approx_sign_definition(x) if torch.is_grad_enabled() else _sign_definition(x.detach())
    else:
        return approx_sign_definition(x) if is_symbolic(x) else lean(x, 'approx')


def lean(x: torch.Tensor, name: Optional[str]) -> torch.Tensor:
    """A quantizer by name in its lean form; without gradient mode, just its values."""
    return _Quantize.apply(x, name) if torch.is_grad_enabled() else ESTIMATORS[name].quantize(x)


def real(x: torch.Tensor) -> torch.Tensor:
    """No quantization: the real value itself."""
    return x


ESTIMATORS: Dict[Optional[str], Estimator] = {'ste': _STE, 'approx': _APPROX, None: _REAL}
QUANTIZERS: Dict[Optional[str], Callable[[torch.Tensor], torch.Tensor]] = {
    'ste': ste_sign,
    'approx': approx_sign,
    None: real,
}


def get_quantizer(name: Optional[str], argument: str = 'quantizer') -> Callable[[torch.Tensor], torch.Tensor]:
    """Look a quantizer up by name.

    Args:
        name: A key of `QUANTIZERS`; None is no quantization.
        argument: Name of the caller's argument, for the error.

    Raises:
        ValueError: The name is not known.
    """
    if name not in QUANTIZERS:
        known = ', '.join(repr(k) for k in QUANTIZERS)
        raise ValueError(f'{argument}: unknown quantizer {name!r}, expected one of {known}')
    return QUANTIZERS[name]
