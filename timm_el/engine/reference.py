"""The arithmetic of the engine in plain torch: the oracle of the kernels, and what runs where there is no library."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .layout import restore
from .spec import ConvSpec, Window

__all__ = ['binary_conv2d', 'real_conv2d', 'input_scale', 'fma', 'pool2d']

LANES = 16


def binary_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        threshold: torch.Tensor | None,
        flip: torch.Tensor | None,
        link: torch.Tensor | None,
        spec: ConvSpec,
        constants: Sequence[float],
) -> torch.Tensor:
    """Return a binary convolution (`ConvSpec`) of x (N, C, H, W), weight as in `layout`, table (rows, stride)."""
    value = x if flip is None else torch.where(flip.reshape(-1, 1, 1) < 0, -x, x)
    plus = value >= (0. if threshold is None else threshold.reshape(-1, 1, 1))
    # Integers, so that any order of summation is exact.
    signs = _pad(plus.to(torch.float64) * 2 - 1, spec, float(spec.pad_value))
    kernel = restore(weight, spec, torch.float64)
    dot = F.conv2d(signs, kernel, None, spec.conv.stride, 0, spec.conv.dilation, spec.groups)
    rows = _rows(table, spec)
    v = dot.to(torch.float32) * rows['scale']
    if spec.has_k:
        v = v * input_scale(x, spec)
    return _finish(v, rows, link, spec, constants)


def real_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        link: torch.Tensor | None,
        spec: ConvSpec,
        constants: Sequence[float],
) -> torch.Tensor:
    """Return a convolution of real values: a chain of fused multiply-adds over taps, then channels. int8: exact."""
    if weight.dtype == torch.int8:
        return _int8_conv2d(x, weight, table, link, spec, constants)
    weight = restore(weight, spec, torch.float32)
    padded = _pad(x, spec, 0.)
    height, width = spec.output_size(*x.shape[2:])
    v = x.new_zeros((x.shape[0], spec.c_out, height, width))
    channels = spec.c_in // spec.groups
    for ky in range(spec.conv.kernel[0]):
        for kx in range(spec.conv.kernel[1]):
            at = (slice(None), slice(None), *(
                slice(k * d, k * d + (n - 1) * s + 1, s)
                for k, d, n, s in zip((ky, kx), spec.conv.dilation, (height, width), spec.conv.stride)))
            tap = padded[at]
            if spec.is_depthwise:
                v = fma(tap, weight[:, 0, ky, kx].reshape(-1, 1, 1), v)
                continue
            for i in range(channels):
                v = fma(tap[:, i:i + 1], weight[:, i, ky, kx].reshape(-1, 1, 1), v)
    return _finish(v, _rows(table, spec), link, spec, constants)


def _int8_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        link: torch.Tensor | None,
        spec: ConvSpec,
        constants: Sequence[float],
) -> torch.Tensor:
    """Return a convolution of int8 weights, and int8 inputs with a scale for each pixel, or row, of the output."""
    (kernel, _), (stride, _), (dilation, _) = spec.conv.kernel, spec.conv.stride, spec.conv.dilation
    size = spec.output_size(*x.shape[2:])
    padded = _pad(x, spec, 0.)
    if spec.taps == 1:
        largest = padded[:, :, ::stride, ::spec.conv.stride[1]].abs().amax(1, keepdim=True)
    else:
        of_rows = padded.abs().amax((1, 3))
        largest = torch.stack([
            of_rows[:, y * stride:y * stride + (kernel - 1) * dilation + 1:dilation].amax(1)
            for y in range(size[0])], 1)[:, None, :, None].expand(-1, 1, *size)
    inverse = _float(127., x) / largest
    finite, fits = largest.isfinite(), inverse.isfinite()
    strings = F.unfold(padded, spec.conv.kernel, spec.conv.dilation, 0, spec.conv.stride).unflatten(2, size)
    q = torch.where(finite & fits, strings * inverse, 0.).round()
    k = torch.where(finite, torch.where(fits, largest / _float(127., x), 0.), torch.nan)
    sums = (restore(weight, spec, torch.float64).flatten(1) @ q.double().flatten(2)).unflatten(2, size)
    rows = _rows(table, spec)
    v = sums.float() * rows['scale'] * k
    return _finish(v, rows, link, spec, constants)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return a * b + c in float32 with one rounding: float64 rounded to odd, then to nearest."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(torch.int64)
    odd = bits + torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & error.isfinite() & (bits & 1 == 0)
    return torch.where(inexact, odd, bits).view(torch.float64).float()


def input_scale(x: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Return K (N, 1, H', W'): 16 lanes of sums over channels, their halves added; then the taps in order."""
    absolute = F.pad(x.abs().movedim(1, -1), [0, -spec.c_in % LANES])
    lanes = torch.zeros_like(absolute[..., :LANES])
    for chunk in absolute.split(LANES, -1):
        lanes = lanes + chunk
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    plane = _pad(lanes.movedim(-1, 1) / _float(spec.c_in, x), spec, 0.)
    height, width = spec.output_size(*x.shape[2:])
    total = x.new_zeros((x.shape[0], 1, height, width))
    for ky in range(spec.conv.kernel[0]):
        for kx in range(spec.conv.kernel[1]):
            total = total + plane[:, :, ky * spec.conv.dilation[0]:, kx * spec.conv.dilation[1]:][
                :, :, :(height - 1) * spec.conv.stride[0] + 1:spec.conv.stride[0],
                :(width - 1) * spec.conv.stride[1] + 1:spec.conv.stride[1]]
    return total / _float(spec.taps, x)


def _float(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def _pad(x: torch.Tensor, spec: ConvSpec, value: float) -> torch.Tensor:
    (top, left), (bottom, right) = spec.conv.padding, spec.pad_end
    return F.pad(x, [left, right, top, bottom], value=value)


def _rows(table: torch.Tensor, spec: ConvSpec) -> dict:
    return {name: table[i, :spec.c_out].reshape(-1, 1, 1) for i, name in enumerate(spec.rows)}


def _finish(
        v: torch.Tensor,
        rows: dict,
        link: torch.Tensor | None,
        spec: ConvSpec,
        constants: Sequence[float],
) -> torch.Tensor:
    lo, hi, inverse_gamma = (_float(c, v) for c in constants)
    v = v + rows['shift']
    if spec.act == 'clip':
        v = torch.where(v < lo, lo, v)
        v = torch.where(v > hi, hi, v)
    elif spec.act == 'prelu':
        v = torch.where(v >= 0, v, v * rows['slope'])
    if spec.has_affine:
        v = v * rows['scale2']
        v = v + rows['shift2']
    if link is not None:
        v = v + _link(link, spec, v.shape[2:]) * inverse_gamma
    if spec.has_post:
        v = v + rows['post_in']
        v = torch.where(v >= 0, v, v * rows['post_slope'])
        v = v + rows['post_out']
    return v.contiguous(memory_format=torch.channels_last)


def _link(x: torch.Tensor, spec: ConvSpec, size: Sequence[int]) -> torch.Tensor:
    if spec.link_pool != 'none':
        x = pool2d(x, spec.pool, spec.link_pool, size)
    if spec.link == 'squeeze':
        x = F.pad(x, [0, 0, 0, 0, 0, -spec.link_c % spec.c_out])
        total = x[:, :spec.c_out]
        for i in range(spec.c_out, x.shape[1], spec.c_out):
            total = total + x[:, i:i + spec.c_out]
        return total
    if spec.link == 'expand':
        return x.repeat(1, -(-spec.c_out // spec.link_c), 1, 1)[:, :spec.c_out]
    return x


def pool2d(x: torch.Tensor, window: Window, mode: str, size: Sequence[int]) -> torch.Tensor:
    """Return the largest, or mean, of each window's pixels inside the image, in order; a NaN wins."""
    pads: list[int] = []
    for i in (1, 0):
        last = (size[i] - 1) * window.stride[i] + (window.kernel[i] - 1) * window.dilation[i] + 1
        pads += [window.padding[i], max(0, last - window.padding[i] - x.shape[2 + i])]
    x, inside = F.pad(x, pads), F.pad(torch.ones_like(x[:, :1]), pads)
    best, count = None, 0.
    for ky in range(window.kernel[0]):
        for kx in range(window.kernel[1]):
            at = (slice(None), slice(None), *(
                slice(k * d, k * d + (n - 1) * s + 1, s)
                for k, d, n, s in zip((ky, kx), window.dilation, size, window.stride)))
            value, here = x[at], inside[at] > 0
            count = count + inside[at]
            if best is None:
                best, seen = torch.where(here, value, torch.zeros_like(value)), here
                continue
            if mode == 'max':
                merged = torch.where((value > best) | value.isnan(), value, best)
            else:
                merged = best + value
            best = torch.where(here, torch.where(seen, merged, value), best)
            seen = seen | here
    y = best if mode == 'max' else best / count
    return y.contiguous(memory_format=torch.channels_last)
