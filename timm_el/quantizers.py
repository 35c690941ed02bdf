"""Sign, its gradient estimators, and nothing else: pure tensor functions.

Every quantizer maps a float tensor to a tensor of the same shape and dtype that holds exactly -1 and +1, and carries
a surrogate gradient. Each exists twice, equal in forward and gradient by test:

* the *definition*, plain tensor arithmetic, which TorchScript and torch.fx can read;
* the *lean* form, a `torch.autograd.Function` that keeps as little as it can for backward, used everywhere else.
"""
from typing import Callable, Dict, Optional

import torch

__all__ = ['sign', 'ste_sign', 'approx_sign', 'real', 'QUANTIZERS', 'get_quantizer']


def sign(x: torch.Tensor) -> torch.Tensor:
    """Sign with Sign(0) = +1 (paper, eq. 1), the one place where the sign of zero is decided.

    Sign(x) = +1 if x >= 0 else -1. Hence -0.0 gives +1 and NaN gives -1. No gradient.

    Args:
        x: Float tensor of any shape.

    Returns:
        Tensor of -1 and +1, same shape and dtype.
    """
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)


def ste_sign_definition(x: torch.Tensor) -> torch.Tensor:
    """`ste_sign` spelled out in tensor arithmetic."""
    hard = sign(x)
    soft = torch.where(x.abs() <= 1, x, hard)
    # soft has hard's sign and abs(soft) <= 1, so the sum below is exactly -1 or +1 in every float format.
    return soft + (hard - soft).detach()


def approx_sign_definition(x: torch.Tensor) -> torch.Tensor:
    """`approx_sign` spelled out in tensor arithmetic."""
    hard = sign(x)
    inside = x.abs() <= 1
    # The curve sees only values inside its support: an inf or NaN there would turn a zero gradient into NaN.
    clipped = torch.where(inside, x, torch.zeros_like(x))
    soft = torch.where(inside, clipped * (2 - clipped.abs()), hard)
    return soft + (hard - soft).detach()


class _STESign(torch.autograd.Function):
    """Lean `ste_sign`: keeps one byte a value."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return sign(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0].abs() <= 1)

    @staticmethod
    def backward(ctx, grad):
        inside, = ctx.saved_tensors
        return torch.where(inside, grad, 0)


class _ApproxSign(torch.autograd.Function):
    """Lean `approx_sign`: keeps the input, from which the slope is computed again."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return sign(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        distance = x.abs()
        return torch.where(distance <= 1, grad * (2 - 2 * distance), 0)


def _is_symbolic(x: torch.Tensor) -> bool:
    """True where a tracer records Python: fx and jit.trace would look through, or choke on, an autograd.Function."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()


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
        return ste_sign_definition(x)
    else:
        return ste_sign_definition(x) if _is_symbolic(x) else _STESign.apply(x)


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
        return approx_sign_definition(x)
    else:
        return approx_sign_definition(x) if _is_symbolic(x) else _ApproxSign.apply(x)


def real(x: torch.Tensor) -> torch.Tensor:
    """No quantization: the real value itself."""
    return x


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
