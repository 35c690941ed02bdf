"""Sign, its gradient estimators, and the few other quantizers of the literature: pure tensor functions.

A quantizer of activations maps a float tensor to one of the same shape and dtype that holds exactly -1 and +1 (or -1,
0, +1), and carries a surrogate gradient. Each exists twice, equal in forward and gradient by test:

* the *definition*, plain tensor arithmetic, which TorchScript and torch.fx can read;
* the *lean* form (`Estimator`), for a `torch.autograd.Function` that keeps as little as it can for backward, used
  everywhere else.

Quantizers that weights alone have (TWN, TTQ, ABC-Net) are the last section; their scale is part of them.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.fx

__all__ = [
    'sign', 'ste_sign', 'approx_sign', 'ternary', 'ternary_sign', 'tanh', 'real', 'twn', 'ttq', 'ttq_levels',
    'abc_offsets', 'abc_weight_bases', 'abc_weight', 'abc_input', 'QUANTIZERS', 'WEIGHT_QUANTIZERS', 'BITS',
    'ESTIMATORS', 'Estimator', 'get_quantizer',
]


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


def ternary(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """+1 where x >= threshold, -1 where x <= -threshold, else 0 (also for NaN, and where both hold). No gradient.

    Args:
        x: Float tensor of any shape.
        threshold: Not negative; a shape that broadcasts to that of x.

    Returns:
        Tensor of -1, 0 and +1, shape and dtype of x.
    """
    return (x >= threshold).to(x.dtype) - (x <= -threshold).to(x.dtype)


def tbn_threshold(x: torch.Tensor) -> torch.Tensor:
    """TBN's threshold of each image: 0.4 * mean(abs(x)), over all axes but the first, which are kept with size 1."""
    axes: list[int] = [axis for axis in range(1, x.dim())]  # TorchScript has no list(range())
    return x.detach().abs().mean(axes, keepdim=True) * 0.4


torch.fx.wrap('tbn_threshold')  # a tracer does not know the number of axes


def ternary_sign_definition(x: torch.Tensor) -> torch.Tensor:
    """`ternary_sign` spelled out in tensor arithmetic."""
    hard = ternary(x, tbn_threshold(x))
    soft = torch.where(x.abs() <= 1, x, hard)
    # Where hard is not 0 it has soft's sign, so that the sum is exact, as in `ste_sign_definition`.
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


def _tanh_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return grad * (1 - torch.tanh(x).square())


_TANH = Estimator(torch.tanh, _tanh_gradient, lambda x: x, lambda x, dtype: torch.tanh(x).to(dtype), _tanh_gradient)
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


def ternary_sign(x: torch.Tensor) -> torch.Tensor:
    """Ternary activations of TBN (Wan et al., ECCV 2018, section 3.1).

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
        return ternary_sign_definition(x) if is_symbolic(x) else lean(x, 'ternary')


def tanh(x: torch.Tensor) -> torch.Tensor:
    """Hyperbolic tangent, the soft sign of Real-to-Binary's first step (its section 4.2). A real value."""
    return torch.tanh(x)


def lean(x: torch.Tensor, name: str | None) -> torch.Tensor:
    """A quantizer by name in its lean form; without gradient mode, just its values."""
    return _Quantize.apply(x, name) if torch.is_grad_enabled() else ESTIMATORS[name].quantize(x)


def real(x: torch.Tensor) -> torch.Tensor:
    """No quantization: the real value itself."""
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Weights alone

def wide_float(x: torch.Tensor) -> torch.dtype:
    """float64, but float32 on MPS, which has no float64."""
    if torch.jit.is_scripting():
        return torch.float64
    else:
        return torch.float32 if isinstance(x, torch.Tensor) and x.device.type == 'mps' else torch.float64


def _with_slope(value: torch.Tensor, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """`value`, with the gradient `slope` with respect to x: what is added is exactly 0 for finite x."""
    return value + (x - x.detach()) * slope.detach()


def twn(weight: torch.Tensor) -> torch.Tensor:
    """Ternary weights with a scale (Ternary Weight Networks, Li et al. 2016, eq. 5 and 6).

    Forward: alpha * T, T = `ternary`(W, 0.7 * mean(abs(W))), alpha the mean of abs(W) where T is not 0; both means are
    over the whole layer.
    Gradient: alpha if -1 <= W <= 1 else 0, as for binary weights; none through alpha and the threshold.

    Args:
        weight: Latent weight of any shape.

    Returns:
        Tensor of -alpha, 0 and +alpha, same shape and dtype.
    """
    magnitude = weight.detach().abs()
    wide = wide_float(weight)
    chosen = ternary(weight.detach(), (0.7 * magnitude.mean(dtype=wide)).to(weight.dtype))
    # Sums in float64, so that the mean of equal values is that value.
    total = (magnitude * chosen.abs()).sum(dtype=wide)
    alpha = (total / chosen.abs().sum(dtype=wide).clamp(min=1)).to(weight.dtype)
    return _with_slope(alpha * chosen, weight, alpha * (magnitude <= 1))


def _ttq_ternary(weight: torch.Tensor) -> torch.Tensor:
    return ternary(weight.detach(), 0.05 * weight.detach().abs().amax())


def ttq(weight: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Trained ternary weights (Trained Ternary Quantization, Zhu et al. 2017, eq. 6 to 9).

    Forward: levels[0] where T is +1, -levels[1] where it is -1, else 0; T = `ternary`(W, 0.05 * max(abs(W))).
    Gradient: with respect to W, levels[0], levels[1] and 1 in these three zones; with respect to levels[0] the sum over
    its zone, to levels[1] minus the sum over its own (the derivative; the paper's eq. 7 leaves the minus out).

    Args:
        weight: Latent weight of any shape.
        levels: (2,), the positive and the negative level.

    Returns:
        Tensor of -levels[1], 0 and levels[0], shape and dtype of the weight.
    """
    chosen = _ttq_ternary(weight)
    positive, negative = (chosen > 0).to(weight.dtype), (chosen < 0).to(weight.dtype)
    slope = levels[0] * positive + levels[1] * negative + (chosen == 0).to(weight.dtype)
    return _with_slope(levels[0] * positive - levels[1] * negative, weight, slope)


def ttq_levels(weight: torch.Tensor) -> torch.Tensor:
    """The levels that TTQ starts from: the mean magnitude of the weights in either zone, 1 for an empty one. (2,)"""
    chosen, wide = _ttq_ternary(weight), wide_float(weight)
    zones = torch.stack([chosen.flatten() > 0, chosen.flatten() < 0]).to(wide)
    count = zones.sum(1)
    mean = (zones * weight.detach().abs().flatten().to(wide)).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, mean, torch.ones_like(mean)).to(weight.dtype)


def abc_offsets(count: int) -> list[float]:
    """Offsets of ABC-Net's bases (its section 3.1.1): u_m = -1 + 2 (m - 1) / (M - 1); 0 where there is one base."""
    return [0.] if count == 1 else [-1. + 2. * m / (count - 1) for m in range(count)]


def abc_weight_bases(weight: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary bases of a weight and the scales that fit it best (ABC-Net, Lin et al. 2017, eq. 2 to 4). No gradient.

    B_m = Sign(W - mean(W) + u_m * std(W)), alpha = argmin |w - sum_m alpha_m B_m|^2 = (B^T B)^-1 B^T w, mean and std
    over the whole layer, the least squares in closed form (of smallest norm, where bases coincide).

    Args:
        weight: Latent weight of any shape.
        count: M.

    Returns:
        The bases (M, ...), and alpha (M,), both in the dtype of the weight.
    """
    weight = weight.detach()
    wide = weight.to(wide_float(weight))
    mean, std = wide.mean(), wide.std(correction=0)
    signs = [(wide >= mean - offset * std).to(wide.dtype) * 2 - 1 for offset in abc_offsets(count)]
    flat = torch.stack(signs).flatten(1)
    alpha = torch.linalg.pinv(flat @ flat.t(), hermitian=True) @ (flat @ wide.flatten())
    return torch.stack(signs).to(weight.dtype), alpha.to(weight.dtype)


def abc_weight(weight: torch.Tensor, count: int) -> torch.Tensor:
    """ABC-Net's weight sum_m alpha_m B_m, see `abc_weight_bases`. Gradient: sum_m alpha_m (its eq. 6)."""
    bases, alpha = abc_weight_bases(weight, count)
    return _with_slope(torch.tensordot(alpha, bases, 1), weight, alpha.sum())


def abc_input(x: torch.Tensor, shift: torch.Tensor, beta: torch.Tensor, count: int) -> torch.Tensor:
    """ABC-Net's activations sum_n beta_n A_n (its eq. 7 to 10).

    Forward: A_n = +1 where clip(x + v_n, 0, 1) >= 0.5, else -1.
    Gradient: dA_n/dx = dA_n/dv_n = 1 where 0 <= x + v_n <= 1, else 0.

    Args:
        x: Float tensor of any shape.
        shift: v, (N,).
        beta: (N,).
        count: N, which a tracer cannot read off a tensor.

    Returns:
        Tensor of the shape of x.
    """
    total = torch.zeros_like(x)
    for n in range(count):
        moved = x + shift[n]
        hard = (moved >= 0.5).to(x.dtype) * 2 - 1
        inside = (moved >= 0) & (moved <= 1)
        total = total + beta[n] * (hard + torch.where(inside, moved - moved.detach(), torch.zeros_like(moved)))
    return total


ESTIMATORS: dict[str | None, Estimator] = {
    'ste': _STE, 'approx': _APPROX, 'ternary': _TERNARY, 'tanh': _TANH, None: _REAL}
QUANTIZERS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    'ste': ste_sign,
    'approx': approx_sign,
    'ternary': ternary_sign,
    'tanh': tanh,
    None: real,
}
WEIGHT_QUANTIZERS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    'ste': ste_sign,
    'approx': approx_sign,
    'twn': twn,
    None: real,
}
# Bits of a quantized value; others are real. An operand of n bits is a combination of n tensors of +-1.
BITS = {'ste': 1, 'approx': 1, 'ternary': 2, 'twn': 2, 'ttq': 2}


def get_quantizer(
        name: str | None,
        argument: str = 'quantizer',
        known: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = QUANTIZERS,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Look a quantizer up by name.

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
