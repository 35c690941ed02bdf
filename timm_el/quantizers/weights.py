"""Quantizers whose scale is part of them: TWN and TTQ for weights, ABC-Net's bases for weights and inputs."""
import torch

from .signs import ternary


def wide_float(x: torch.Tensor) -> torch.dtype:
    """Return float64, or float32 for a tensor on MPS, which has no float64."""
    if torch.jit.is_scripting():
        return torch.float64
    else:
        return torch.float32 if isinstance(x, torch.Tensor) and x.device.type == 'mps' else torch.float64


def _with_slope(value: torch.Tensor, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return `value` with the gradient `slope` with respect to x: the term added is exactly 0 for finite x."""
    return value + (x - x.detach()) * slope.detach()


def twn(weight: torch.Tensor) -> torch.Tensor:
    """Return ternary weights with a scale (Ternary Weight Networks, Li et al. 2016, eq. 5 and 6).

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
    """Return trained ternary weights (Trained Ternary Quantization, Zhu et al. 2017, eq. 6 to 9).

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
    """Return the initial levels of TTQ (2,): the mean magnitude of the weights in either zone, 1 for an empty one."""
    chosen, wide = _ttq_ternary(weight), wide_float(weight)
    zones = torch.stack([chosen.flatten() > 0, chosen.flatten() < 0]).to(wide)
    count = zones.sum(1)
    mean = (zones * weight.detach().abs().flatten().to(wide)).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, mean, torch.ones_like(mean)).to(weight.dtype)


def abc_offsets(count: int) -> list[float]:
    """Return the offsets of ABC-Net's bases (its section 3.1.1): u_m = -1 + 2 (m - 1) / (M - 1); 0 for one base."""
    return [0.] if count == 1 else [-1. + 2. * m / (count - 1) for m in range(count)]


def abc_weight_bases(weight: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return binary bases of a weight and the scales that fit it best (ABC-Net, Lin et al. 2017, eq. 2 to 4).

    B_m = Sign(W - mean(W) + u_m * std(W)), alpha = argmin |w - sum_m alpha_m B_m|^2 = (B^T B)^-1 B^T w, mean and std
    over the whole layer, the least squares in closed form (of smallest norm, where bases coincide). No gradient.

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
    """Return ABC-Net's weight sum_m alpha_m B_m, see `abc_weight_bases`. Gradient: sum_m alpha_m (its eq. 6)."""
    bases, alpha = abc_weight_bases(weight, count)
    return _with_slope(torch.tensordot(alpha, bases, 1), weight, alpha.sum())


def abc_input(x: torch.Tensor, shift: torch.Tensor, beta: torch.Tensor, count: int) -> torch.Tensor:
    """Return ABC-Net's activations sum_n beta_n A_n (its eq. 7 to 10).

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
