"""Layout of the engine's weights: the order in which its kernels read them.

Binary, full or grouped: (blocks, words, 64) bytes, the blocks of one group after the other's. In a block are 8 output
channels side by side, word by word; a word is 8 bytes, 64 input channels of one tap, taps in rows, bit order as in
`bits`. Binary, depthwise: (taps, bytes), channels along the bits. Real, full: (blocks, taps * channels, 64) floats, 64
output channels side by side. Real, depthwise: (taps, channels). int8, full: (output channels, taps * channels). What
is missing to a full word, block or vector is zero. Words are little-endian. None has four or five axes, because torch
takes those for images, whose memory format `model.to(memory_format=...)` changes.
"""

import torch
import torch.nn.functional as F

from ..weights.bits import pack_signs, unpack_signs
from .spec import ConvSpec

__all__ = ['store', 'restore', 'stored_shape']

BLOCK, REAL_BLOCK, WORD = 8, 64, 8  # channels, channels, bytes


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def stored_shape(spec: ConvSpec, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the shape of the stored weight of a convolution: uint8 for bits, float32 or int8."""
    channels, outputs, real = spec.c_in // spec.groups, spec.c_out // spec.groups, dtype != torch.uint8
    if dtype == torch.int8:
        return spec.c_out, spec.taps * channels
    if spec.is_depthwise:
        return (spec.taps, _up(spec.c_out, 16)) if real else (spec.taps, _up(spec.c_out, 64) // 8)
    if real:
        return _up(spec.c_out, REAL_BLOCK) // REAL_BLOCK, spec.taps * channels, REAL_BLOCK
    return spec.groups * (_up(outputs, BLOCK) // BLOCK), spec.taps * (_up(channels, 64) // 64), BLOCK * WORD


def store(weight: torch.Tensor, spec: ConvSpec, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight (O, I, kH, kW) as it is stored: uint8 keeps the signs, float32 and int8 the values."""
    weight, shape, real = weight.detach(), stored_shape(spec, dtype), dtype != torch.uint8
    if dtype == torch.int8:
        return weight.permute(0, 2, 3, 1).reshape(shape).contiguous()
    if spec.is_depthwise:
        rows = weight[:, 0].flatten(1).t()  # taps, channels
        if not real:
            rows = pack_signs(rows)
        return F.pad(rows, (0, shape[1] - rows.shape[1])).contiguous()
    rows = weight.permute(0, 2, 3, 1)  # channels last
    if real:
        rows = F.pad(rows.flatten(1), (0, 0, 0, shape[0] * REAL_BLOCK - spec.c_out))
        return rows.unflatten(0, (shape[0], REAL_BLOCK)).transpose(1, 2).contiguous()
    packed = pack_signs(rows)
    packed = F.pad(packed, (0, -packed.shape[-1] % WORD)).reshape(spec.groups, -1, shape[1], WORD)
    packed = F.pad(packed, (0, 0, 0, 0, 0, -packed.shape[1] % BLOCK))
    return packed.reshape(shape[0], BLOCK, shape[1], WORD).transpose(1, 2).reshape(shape)


def restore(stored: torch.Tensor, spec: ConvSpec, dtype: torch.dtype) -> torch.Tensor:
    """Return a stored weight as (O, I, kH, kW) of real values, of integers, or of -1 and +1."""
    real, channels = stored.is_floating_point(), spec.c_in // spec.groups
    if stored.dtype == torch.int8:
        return stored.to(dtype).reshape(spec.c_out, *spec.conv.kernel, channels).permute(0, 3, 1, 2).contiguous()
    if spec.is_depthwise:
        rows = stored[:, :spec.c_out].to(dtype) if real else unpack_signs(
            stored[:, :(spec.c_out + 7) // 8], spec.c_out, dtype)
        return rows.t().reshape(spec.c_out, 1, *spec.conv.kernel)
    if real:
        rows = stored.transpose(1, 2).flatten(0, 1)[:spec.c_out].to(dtype)
    else:
        rows = stored.unflatten(2, (BLOCK, WORD)).transpose(1, 2).reshape(spec.groups, -1, stored.shape[1], WORD)
        rows = rows[:, :spec.c_out // spec.groups]
        rows = rows.reshape(spec.c_out, spec.taps, -1)[..., :(channels + 7) // 8]
        rows = unpack_signs(rows, channels, dtype)
    return rows.reshape(spec.c_out, *spec.conv.kernel, channels).permute(0, 3, 1, 2).contiguous()
