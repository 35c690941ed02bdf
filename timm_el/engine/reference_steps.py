"""The arithmetic of a program's steps in plain torch: the oracle of the kernels, and what runs without the library."""
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from . import reference
from .spec import Window
from .steps import Binary, Kind, Pool, Step, Unary, conv_spec, input_scale_spec, output_size

__all__ = ['run']

NORM_LANES = 8


def run(step: Step, inputs: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Return what a step gives.

    Args:
        step: The step.
        inputs: Its sources, float32 images (N, C, H, W); None where one is absent.
    """
    return _RUN[step.kind](step, *inputs)


def _conv(
        step: Step, x: torch.Tensor, link: torch.Tensor | None = None, added: torch.Tensor | None = None,
) -> torch.Tensor:
    spec = conv_spec(step).at(x.shape)
    if step.is_binary_conv:
        y = reference.binary_conv2d(x, *step.tensors, link, spec, step.constants)
    else:
        y = reference.real_conv2d(x, *step.tensors[:2], link, spec, step.constants)
    return y if added is None else y + added


def _pool(step: Step, x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    size = output_size(step, [(n, h, w, c)])[1:3]
    return reference.pool2d(x, Window.of(step.ints[:8]), 'max' if step.ints[10] == Pool.MAX else 'avg', size)


def _mean(step: Step, x: torch.Tensor) -> torch.Tensor:
    pixels = x.double().flatten(2)
    total = torch.zeros_like(pixels[..., 0])
    for pixel in pixels.unbind(2):
        total = total + pixel
    return (total / pixels.shape[2]).float()[..., None, None]


def _binary(step: Step, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    b = b.repeat_interleave(a.shape[1] // b.shape[1], 1)
    return {
        Binary.ADD: lambda: a + b, Binary.SUB: lambda: a - b, Binary.MUL: lambda: a * b, Binary.DIV: lambda: a / b,
        Binary.SUB_FROM: lambda: b - a, Binary.DIV_INTO: lambda: b / a}[Binary(step.ints[0])]()


def _affine(step: Step, x: torch.Tensor) -> torch.Tensor:
    scale, shift = (None if t is None else t.reshape(-1, 1, 1) for t in step.tensors)
    x = x if scale is None else x * scale
    return x if shift is None else x + shift


def _prelu(step: Step, x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, x, x * step.tensors[0].reshape(-1, 1, 1))


def _norm(step: Step, x: torch.Tensor) -> torch.Tensor:
    (groups, over_pixels), (n, c, h, w) = step.ints, x.shape
    values = x.double().reshape(n, groups, c // groups, h * w)
    if not over_pixels:
        values = values.permute(0, 3, 1, 2).reshape(n * h * w, groups, c // groups, 1)
    mean = _lane_mean(values)
    centred = values - mean
    y = centred / (_lane_mean(centred * centred) + _as_float32(step.constants[0])).sqrt()
    if not over_pixels:
        y = y.reshape(n, h * w, groups, c // groups).permute(0, 2, 3, 1)
    y = y.reshape(n, c, h, w)
    scale, shift = (None if t is None else t.double().reshape(-1, 1, 1) for t in step.tensors)
    y = y if scale is None else y * scale
    return (y if shift is None else y + shift).float()


def _lane_mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean (M, G, 1, 1) of values (M, G, channels, pixels) float64, summed in lanes of channels."""
    count = values.shape[2] * values.shape[3]
    values = F.pad(values, [0, 0, 0, -values.shape[2] % NORM_LANES])
    values = values.unflatten(2, (-1, NORM_LANES))
    lanes = torch.zeros_like(values[:, :, 0, :, 0])
    for pixel in values.unbind(4):
        for chunk in pixel.unbind(2):
            lanes = lanes + chunk
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., None] / count


def _input_scale(step: Step, x: torch.Tensor) -> torch.Tensor:
    spec = input_scale_spec(step, x.shape[1]).at(x.shape)
    groups = step.ints[10]
    parts = x.chunk(groups, 1)
    spec = replace(spec, c_in=x.shape[1] // groups, c_out=1, groups=1)
    return torch.cat([reference.input_scale(part, spec) for part in parts], 1)


def _flatten(step: Step, x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], -1, 1, 1)


def _const(step: Step) -> torch.Tensor:
    return step.tensors[0].reshape(step.ints).permute(0, 3, 1, 2)


_RUN: dict[Kind, Callable[..., torch.Tensor]] = {
    Kind.CONV: _conv,
    Kind.POOL: _pool,
    Kind.MEAN: _mean,
    Kind.BINARY: _binary,
    Kind.UNARY: lambda step, x: unary(Unary(step.ints[0]), x, *step.constants),
    Kind.AFFINE: _affine,
    Kind.PRELU: _prelu,
    Kind.NORM: _norm,
    Kind.CONCAT: lambda step, *parts: torch.cat(parts, 1),
    Kind.CHANNELS: lambda step, x: x[:, step.tensors[0].long()],
    Kind.CONST: _const,
    Kind.INPUT_SCALE: _input_scale,
    Kind.FLATTEN: _flatten,
    Kind.PAD: lambda step, x: F.pad(x, step.ints, value=step.constants[0]),
}


# ---------------------------------------------------------------------------------------------------------------------
# Unary functions: float64, one written operation after the other, rounded to float32 at the end

LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.6931471803691238, 1.9082149292705877e-10
EXP_TERMS = [1 / math.factorial(i) for i in range(11, -1, -1)]
ERFC_TERMS = (
    0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368)
ERFC_FIRST = -1.26551223
MOST_EXPONENT = 700.


def exp(x: torch.Tensor) -> torch.Tensor:
    """Return e^x of a float64 tensor, within 1e-12 of it, by Cody and Waite's reduction and a polynomial."""
    x = torch.where(x > MOST_EXPONENT, MOST_EXPONENT, x)
    x = torch.where(x < -MOST_EXPONENT, -MOST_EXPONENT, x)
    k = (x * LOG2_E).round()
    r = x - k * LN2_HIGH
    r = r - k * LN2_LOW
    p = torch.full_like(r, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        p = p * r
        p = p + term
    power = (torch.where(k.isnan(), 0., k).long() + 1023) << 52
    return p * power.view(torch.float64)


def _erfc(z: torch.Tensor) -> torch.Tensor:
    """Return the complementary error function of a float64 tensor, within 1.2e-7 of it relatively (Chebyshev fit)."""
    t = 1. / (1. + 0.5 * z.abs())
    p = torch.full_like(t, ERFC_TERMS[0])
    for term in ERFC_TERMS[1:]:
        p = p * t
        p = p + term
    p = p * t
    p = p + ERFC_FIRST
    v = t * exp(p - z * z)
    return torch.where(z >= 0, v, 2. - v)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1. / (1. + exp(-x))


def _tanh(x: torch.Tensor) -> torch.Tensor:
    return 1. - 2. / (exp(2. * x) + 1.)


def _hardsigmoid(x: torch.Tensor) -> torch.Tensor:
    y = x / 6. + 0.5
    y = torch.where(y < 0, 0., y)
    return torch.where(y > 1, 1., y)


def _mish(x: torch.Tensor) -> torch.Tensor:
    e = exp(x)
    top = e * e + 2. * e
    return torch.where(x > 20, x, x * (top / (top + 2.)))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    cubic = x * x * x * 0.044715
    return x * 0.5 * (1. + _tanh((x + cubic) * 0.7978845608028654))


def unary(op: Unary, x: torch.Tensor, a: float = 0., b: float = 0.) -> torch.Tensor:
    """Return a unary function of a float32 tensor of any shape.

    Args:
        op: Which one.
        x: The tensor.
        a, b: lo and hi of CLIP, slope of LEAKY, alpha of ELU; rounded to float32.
    """
    a, b = _as_float32(a), _as_float32(b)
    if op == Unary.CLIP:
        y = torch.where(x < a, a, x)
        return torch.where(y > b, b, y)
    if op == Unary.LEAKY:
        return torch.where(x >= 0, x, x * a)
    if op == Unary.ABS:
        return x.abs()
    if op == Unary.SQUARE:
        return x * x
    x = x.double()
    return {
        Unary.SIGMOID: lambda: _sigmoid(x),
        Unary.SILU: lambda: x / (1. + exp(-x)),
        Unary.HARDSIGMOID: lambda: _hardsigmoid(x),
        Unary.HARDSWISH: lambda: x * _hardsigmoid(x),
        Unary.GELU: lambda: x * 0.5 * _erfc(x * -0.70710678118654752),
        Unary.GELU_TANH: lambda: _gelu_tanh(x),
        Unary.TANH: lambda: _tanh(x),
        Unary.ELU: lambda: torch.where(x > 0, x, (exp(x) - 1.) * a),
        Unary.MISH: lambda: _mish(x),
        Unary.EXP: lambda: exp(x),
        Unary.SQRT: lambda: x.sqrt(),
    }[op]().float()


def _as_float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32, device='cpu').item()
