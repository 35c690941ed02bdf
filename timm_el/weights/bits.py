"""Signs as bits: THE bit order, used by the packed file and by the engine.

Bit 1 means +1, bit 0 means -1. Bits are packed along the last axis, eight to a byte, least significant bit first. Where
the axis is no multiple of eight, the tail bits of its last byte are 0. A convolution weight is stored O-kH-kW-I, so
that the bits of one tap run along the input channels, as they do in a packed NHWC activation.
"""
import torch


def packed_size(n: int) -> int:
    """Return the number of bytes that hold n bits."""
    return (n + 7) // 8


def _weights_of_bits(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def pack_signs(x: torch.Tensor) -> torch.Tensor:
    """Pack the signs of the last axis into bytes; bit = 1 where x >= 0 (`quantizers.sign`).

    Args:
        x: Real tensor (..., n).

    Returns:
        uint8 tensor (..., ceil(n / 8)).

    Raises:
        ValueError: The tensor has no axis to pack.
    """
    if x.dim() == 0:
        raise ValueError('x: a 0-D tensor has no axis to pack, expected (..., n)')
    n = x.shape[-1]
    bits = torch.nn.functional.pad((x >= 0).to(torch.uint8), (0, packed_size(n) * 8 - n))
    bits = bits.unflatten(-1, (packed_size(n), 8)) * _weights_of_bits(x.device)
    return bits.sum(-1, dtype=torch.uint8)


def unpack_signs(packed: torch.Tensor, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Unpack signs, the inverse of `pack_signs`.

    Args:
        packed: uint8 tensor (..., ceil(n / 8)).
        n: Number of signs in the last axis.
        dtype: Dtype of the result; torch.int8 costs least.

    Returns:
        Tensor (..., n) of -1 and +1.

    Raises:
        ValueError: dtype or size of `packed` do not fit n.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f'packed: found dtype {packed.dtype}, expected torch.uint8')
    if packed.dim() == 0 or packed.shape[-1] != packed_size(n):
        raise ValueError(f'packed: found shape {tuple(packed.shape)}, expected (..., {packed_size(n)}) for n={n}')
    # All eight signs of a byte at once, from a table of 256 rows.
    bytes_ = torch.arange(256, dtype=torch.uint8, device=packed.device)
    table = bytes_.unsqueeze(1).bitwise_and(_weights_of_bits(packed.device)).ne(0).to(torch.int8).mul_(2).sub_(1)
    signs = table.index_select(0, packed.flatten().to(torch.int32)).reshape(*packed.shape[:-1], packed.shape[-1] * 8)
    return signs[..., :n].to(dtype)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Pack the signs of a weight (O, I, kH, kW) into bytes (O, kH, kW, ceil(I / 8)); raise ValueError if not 4-D."""
    if weight.dim() != 4:
        raise ValueError(f'weight: found shape {tuple(weight.shape)}, expected 4-D (O, I, kH, kW)')
    return pack_signs(weight.permute(0, 2, 3, 1))


def unpack_weight(packed: torch.Tensor, in_channels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Unpack bytes (O, kH, kW, ceil(I / 8)) to a contiguous (O, I, kH, kW) tensor of -1 and +1."""
    signs = unpack_signs(packed, in_channels, torch.int8).permute(0, 3, 1, 2)
    return signs.to(dtype, memory_format=torch.contiguous_format)
