"""int8 weights: symmetric, with a scale per output channel. Files hold them so, and the engine computes with them.

A weight w of channel o is q * scale[o], q in -127 .. 127, scale = max(abs(w)) / 127. Quantizing these products again
gives the same q and scale: m / 127 * 127 / 127 is m / 127 for each of float32's 2^23 fractions m.
"""
import torch

__all__ = ['dequantize', 'quantize']

LARGEST = 127


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (O, ...) as int8 of the same shape and scales (O,) float32.

    A channel of zeros has scale 0; one with a value that is not finite has scale NaN, and zeros.
    """
    rows = weight.detach().float().reshape(len(weight), -1)
    largest = rows.abs().amax(1)
    scale = torch.where(largest.isfinite(), largest / LARGEST, torch.nan)
    safe = torch.where((scale > 0)[:, None], rows / scale[:, None], 0.)
    return safe.nan_to_num(0.).round().clamp(-LARGEST, LARGEST).to(torch.int8).reshape(weight.shape), scale


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight (O, ...) float32 of int8 values and scales (O,)."""
    return q.float() * scale.reshape(-1, *[1] * (q.dim() - 1))
