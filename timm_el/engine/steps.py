"""The steps of a program: what kinds there are, what each reads, and the sizes of what it gives."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from .layout import stored_shape
from .spec import ConvSpec, Window, has_empty_window, table_stride

__all__ = [
    'MOST_INT8_INPUTS', 'Binary', 'Form', 'Kind', 'Pool', 'Size', 'Step', 'Unary', 'check_sizes', 'conv_spec',
    'input_scale_spec', 'is_pixelwise', 'output_size', 'pool_step']

Size = tuple[int, int, int, int]  # n, h, w, c of a value

MOST_POOLED = 64  # pixels of a window
MOST_INT8_INPUTS = 1 << 16  # of an output pixel: their sum fits into 32 bits


class Kind(IntEnum):
    """Kinds of steps; docs/program.md has the arithmetic of each."""
    CONV = 0
    POOL = 1
    MEAN = 2
    BINARY = 3
    UNARY = 4
    AFFINE = 5
    PRELU = 6
    NORM = 7
    CONCAT = 8
    CHANNELS = 9
    CONST = 10
    INPUT_SCALE = 11
    FLATTEN = 12
    PAD = 13


class Binary(IntEnum):
    """Operation of a BINARY step on a and b; b may be one value per image, pixel, channel or group of channels."""
    ADD = 0
    SUB = 1
    MUL = 2
    DIV = 3
    SUB_FROM = 4
    DIV_INTO = 5


class Unary(IntEnum):
    """Operation of a UNARY step."""
    CLIP = 0
    LEAKY = 1
    ABS = 2
    SIGMOID = 3
    SILU = 4
    HARDSIGMOID = 5
    HARDSWISH = 6
    GELU = 7
    GELU_TANH = 8
    TANH = 9
    ELU = 10
    MISH = 11
    EXP = 12
    SQRT = 13
    SQUARE = 14


class Pool(IntEnum):
    """Mode of a POOL step."""
    MAX = 1
    MEAN = 2


class Form(IntEnum):
    """Forms in which an output shows the NHWC memory of its value."""
    IMAGE = 0   # (N, C, H, W)
    ROWS = 1    # (N, C)
    NHWC = 2    # (N, H, W, C)
    TOKENS = 3  # (N, H * W, C)


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a program.

    Args:
        kind: What it computes.
        sources: Values that it reads; None where one is absent.
        tensors: Its constants on the CPU, as the kind lists them; None where one is absent.
        ints, constants: Integers and float32 numbers, as the kind lists them.
        path: Module that it comes from, for errors.
    """
    kind: Kind
    sources: tuple[int | None, ...]
    tensors: tuple[torch.Tensor | None, ...] = ()
    ints: tuple[int, ...] = ()
    constants: tuple[float, ...] = ()
    path: str = ''

    def equals(self, other: 'Step') -> bool:
        """Return whether two steps compute the same of the same values; constants must be one tensor, or equal."""
        facts = ('kind', 'sources', 'ints', 'constants')
        return all(getattr(self, name) == getattr(other, name) for name in facts) and all(
            a is b or a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)
            for a, b in zip(self.tensors, other.tensors))

    @property
    def name(self) -> str:
        """Kind in words, with the operation of those that have several."""
        if self.kind in (Kind.BINARY, Kind.UNARY):
            return (Binary if self.kind == Kind.BINARY else Unary)(self.ints[0]).name.lower()
        if self.kind == Kind.CONV:
            return {torch.uint8: 'binary conv', torch.int8: 'int8 conv'}.get(self.tensors[0].dtype, 'real conv')
        return self.kind.name.lower().replace('_', ' ')

    @property
    def is_binary_conv(self) -> bool:
        """True for a convolution of signs."""
        return self.kind == Kind.CONV and self.tensors[0].dtype == torch.uint8


def conv_spec(step: Step) -> ConvSpec:
    """Return the spec of a CONV step."""
    return ConvSpec.of(step.ints)


def pool_step(
        window: Window, mode: Pool, pad_end: tuple[int, int], ceil: bool, source: int = 0, path: str = '') -> Step:
    """Return a POOL step.

    Args:
        window: Its window, with the padding before the first row and column.
        mode: Largest, or mean, of the pixels inside the image.
        pad_end: Padding after the last row and column, pixels.
        ceil: A last window that reaches beyond the image counts, as torch's `ceil_mode`.
        source: The value that it reads.
        path: Module that it comes from.
    """
    return Step(Kind.POOL, (source,), (), (*window.ints(), *pad_end, int(mode), int(ceil)), (), path)


def is_pixelwise(step: Step) -> bool:
    """Return whether each pixel of the output depends on the same pixel of the sources alone."""
    if step.kind == Kind.CONV:
        spec = conv_spec(step)
        return spec.conv == Window() and spec.pad_end == (0, 0) and spec.link_pool == 'none'
    if step.kind == Kind.NORM:
        return not step.ints[1]
    if step.kind == Kind.INPUT_SCALE:
        return Window.of(step.ints[:8]) == Window() and tuple(step.ints[8:10]) == (0, 0)
    return step.kind in (Kind.UNARY, Kind.AFFINE, Kind.PRELU, Kind.CHANNELS)


def output_size(step: Step, sizes: Sequence[Size]) -> Size:
    """Return the size (n, h, w, c) of what a step gives. Sizes may be symbols of a tracer.

    Args:
        step: The step.
        sizes: Those of its present sources, in order.

    Raises:
        ValueError: The image is too small; the text names what was found and expected.
    """
    return _SIZES[step.kind](step, sizes)


def check_sizes(step: Step, sizes: Sequence[Size]) -> None:
    """Raise ValueError unless the sources of a step fit it, and each other; the kernels check again.

    Args:
        step: The step.
        sizes: Those of its present sources, in order.
    """
    problem = _PROBLEMS[step.kind](step, sizes) if step.kind in _PROBLEMS else None
    if problem is not None:
        raise ValueError(problem)


def _conv_size(step: Step, sizes: Sequence[Size]) -> Size:
    n, h, w, c = sizes[0]
    spec = conv_spec(step).at((n, c, h, w))
    return n, *spec.output_size(h, w), spec.c_out


def _conv_problem(step: Step, sizes: Sequence[Size]) -> str | None:
    n, h, w, c = sizes[0]
    spec = conv_spec(step).at((n, c, h, w))
    names = [name for name, source in zip(('x', 'link', 'added'), step.sources) if source is not None]
    found = dict(zip(names, sizes))
    link = found.get('link')
    problem = spec.problem((n, c, h, w), None if link is None else (link[0], link[3], *link[1:3]))
    if problem is None:
        problem = _problem_of_tensors(step, spec)
    size = output_size(step, sizes) if problem is None else None
    if problem is None and found.get('added', size) != size:
        problem = f'added: found size {found["added"]}, expected {size}'
    return problem


def _problem_of_tensors(step: Step, spec: ConvSpec) -> str | None:
    """Return what is wrong with a convolution's constants, or None."""
    weight, table, threshold, flip = step.tensors
    real, int8 = weight.dtype != torch.uint8, weight.dtype == torch.int8
    if int8 and (spec.groups > 1 or spec.taps * spec.c_in > MOST_INT8_INPUTS):
        return f'spec: found {spec}, an int8 convolution is full, of at most {MOST_INT8_INPUTS} inputs a pixel'
    if real and (spec.has_k or 1 < spec.groups and not spec.is_depthwise):
        return f'spec: found {spec}, a real convolution has no K and is full or depthwise'
    for name, tensor, shape, dtype in (
            ('weight', weight, stored_shape(spec, weight.dtype), weight.dtype if int8 or not real else torch.float32),
            ('table', table, (len(spec.rows), table_stride(spec.c_out)), torch.float32),
            ('threshold', threshold, (spec.c_in,), torch.float32), ('flip', flip, (spec.c_in,), torch.int32)):
        if tensor is not None and (
                tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous()):
            return f'{name}: found {tensor.dtype} {tuple(tensor.shape)}, expected a contiguous {dtype} tensor {shape}'
    if len(step.constants) != 3:
        return f'constants: found {len(step.constants)} numbers, expected lo, hi and 1 / gamma'
    return None


def _pool_size(step: Step, sizes: Sequence[Size]) -> Size:
    n, h, w, c = sizes[0]
    window, pad_end, ceil = Window.of(step.ints[:8]), step.ints[8:10], step.ints[11]
    out = []
    for i, size in enumerate((h, w)):
        room = size + window.padding[i] + pad_end[i] - window.dilation[i] * (window.kernel[i] - 1) - 1
        count = -(-room // window.stride[i]) + 1 if ceil else room // window.stride[i] + 1
        if ceil and (count - 1) * window.stride[i] >= size + window.padding[i]:
            count = count - 1
        out.append(count)
    return n, *out, c


def _pool_problem(step: Step, sizes: Sequence[Size]) -> str | None:
    window = Window.of(step.ints[:8])
    if math.prod(window.kernel) > MOST_POOLED:
        return f'pool: found a window of {window.kernel}, expected at most {MOST_POOLED} pixels'
    if min(*window.kernel, *window.stride, *window.dilation) < 1 or min(*window.padding, *step.ints[8:10]) < 0:
        return f'pool: found {window}, expected positive kernel, stride and dilation, and padding >= 0'
    if step.ints[10] not in (Pool.MAX, Pool.MEAN):
        return f'pool: found mode {step.ints[10]}, expected 1 (largest) or 2 (mean)'
    size, out = sizes[0][1:3], output_size(step, sizes)[1:3]
    if min(out) < 1 or has_empty_window(window, size, out):
        return f'x: found {size[0]} x {size[1]} pixels, too few for windows of {window.kernel} with this padding'
    return None


def _binary_problem(step: Step, sizes: Sequence[Size]) -> str | None:
    a, b = sizes
    if any(y not in (1, x) for x, y in zip(a[:3], b[:3])) or a[3] % b[3]:
        return f'found sizes {a} and {b}, expected the second to be spread over the first'
    return None


def _concat_problem(step: Step, sizes: Sequence[Size]) -> str | None:
    if any(size[:3] != sizes[0][:3] for size in sizes):
        return f'found sizes {list(sizes)}, expected them to differ in their channels only'
    return None


def _input_scale_size(step: Step, sizes: Sequence[Size]) -> Size:
    n, h, w, c = sizes[0]
    groups = step.ints[10]
    return n, *input_scale_spec(step, c).at((n, c, h, w)).output_size(h, w), groups


def input_scale_spec(step: Step, channels: int) -> ConvSpec:
    """Return the geometry of an INPUT_SCALE step as a spec."""
    return ConvSpec(channels, step.ints[10], Window.of(step.ints[:8]), tuple(step.ints[8:10]), step.ints[10])


def _pad_size(step: Step, sizes: Sequence[Size]) -> Size:
    n, h, w, c = sizes[0]
    left, right, top, bottom = step.ints
    return n, h + top + bottom, w + left + right, c


_SIZES = {
    Kind.CONV: _conv_size,
    Kind.POOL: _pool_size,
    Kind.MEAN: lambda step, sizes: (sizes[0][0], 1, 1, sizes[0][3]),
    **dict.fromkeys((Kind.BINARY, Kind.UNARY, Kind.AFFINE, Kind.PRELU, Kind.NORM), lambda step, sizes: sizes[0]),
    Kind.CONCAT: lambda step, sizes: (*sizes[0][:3], sum(size[3] for size in sizes)),
    Kind.CHANNELS: lambda step, sizes: (*sizes[0][:3], step.tensors[0].numel()),
    Kind.CONST: lambda step, sizes: tuple(step.ints),
    Kind.INPUT_SCALE: _input_scale_size,
    Kind.FLATTEN: lambda step, sizes: (sizes[0][0], 1, 1, math.prod(sizes[0][1:])),
    Kind.PAD: _pad_size,
}
_PROBLEMS = {
    Kind.CONV: _conv_problem, Kind.POOL: _pool_problem, Kind.BINARY: _binary_problem, Kind.CONCAT: _concat_problem}
