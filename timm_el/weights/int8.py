"""int8 weights: symmetric, with a scale per output channel. Files hold them so, and the engine computes with them.

A weight w of channel o is q * scale[o], q in -127 .. 127. A scale has 16 significant bits, so that these products are
exact in float32 and quantizing them again gives the same q and scale.
"""
import torch

__all__ = ['dequantize', 'quantize']

LARGEST = 127
DROPPED = 1 << 8  # steps of the last of 24 significant bits that one of 16 is worth


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (O, ...) as int8 of the same shape and scales (O,) float32.

    A channel of zeros has scale 0; one with a value that is not finite has scale NaN, and zeros.
    """
    rows = weight.detach().float().reshape(len(weight), -1)
    largest = rows.abs().amax(1)
    scale = largest / LARGEST
    bits = scale.view(torch.int32)
    scale = ((bits + (DROPPED - 1)) // DROPPED * DROPPED).view(torch.float32)  # up, so that no weight is beyond 127
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    safe = torch.where((scale > 0)[:, None], rows / scale[:, None], 0.)
    return safe.nan_to_num(0.).round().clamp(-LARGEST, LARGEST).to(torch.int8).reshape(weight.shape), scale


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight (O, ...) float32 of int8 values and scales (O,)."""
    return q.float() * scale.reshape(-1, *[1] * (q.dim() - 1))
