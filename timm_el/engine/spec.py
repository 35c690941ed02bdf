"""Specification of a convolution: geometry and epilogue as plain numbers, for operator, reference and kernel."""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

__all__ = [
    'ACTS', 'LINKS', 'MOST_CHANNELS', 'POOLS', 'ROWS', 'SAME', 'ConvSpec', 'Window', 'has_empty_window', 'table_stride']

MOST_CHANNELS, MOST_TAPS, MOST_REACH = 1 << 20, 1024, 1 << 15
SAME = (-1, -1)  # padding that depends on the image, as TensorFlow's
ACTS = ('none', 'clip', 'prelu')
LINKS = ('none', 'identity', 'squeeze', 'expand')
POOLS = ('none', 'max', 'avg')
# Rows of the table of constants per output channel: the first two always, the others where a spec asks for them.
ROWS = ('scale', 'shift', 'slope', 'scale2', 'shift2', 'post_in', 'post_slope', 'post_out')


def table_stride(channels: int) -> int:
    """Return the floats of a table's row: the kernels read 16 at a time, from any channel on."""
    return (channels + 30) // 16 * 16


@dataclass(frozen=True)
class Window:
    """Kernel, stride, padding (before the first row and column) and dilation, rows first."""
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def ints(self) -> tuple[int, ...]:
        """Return the window as eight integers."""
        return (*self.kernel, *self.stride, *self.padding, *self.dilation)

    @classmethod
    def of(cls, ints: Sequence[int]) -> 'Window':
        """Return the window of eight integers."""
        return cls(*(tuple(ints[i:i + 2]) for i in range(0, 8, 2)))


def has_empty_window(window: Window, size: Sequence[int], output: Sequence[int]) -> bool:
    """Return whether some window of a pool has no pixel of the image."""
    for i in (0, 1):
        step, first, dilation = window.stride[i], -window.padding[i], window.dilation[i]
        for start in range(first, first + step * output[i], step):
            at = start if start >= 0 else start % dilation
            if at >= size[i] or at > start + (window.kernel[i] - 1) * dilation:
                return True
    return False


@dataclass(frozen=True)
class ConvSpec:
    """One convolution and its epilogue.

    With T = taps times channels of a group, n the number of taps whose sign differs from the weight's, and Z what
    padding changes, the epilogue computes for each output channel c, one float32 operation after the other,

        v = float(T - 2 n + Z) * scale[c]          (a real convolution: its dot product; int8: float(sum) * scale[c])
        v = v * K                                  if has_k, K = mean of abs(x) over channels and taps; in int8 always,
                                                   K = the scale of the inputs
        v = v + shift[c]
        v = min(max(v, lo), hi)                    if act = 'clip', or v >= 0 ? v : v * slope[c] if 'prelu'
        v = v * scale2[c] + shift2[c]              if has_affine
        v = v + link[c] * inverse_gamma            if link is not 'none'
        v = v + post_in[c]; v = v >= 0 ? v : v * post_slope[c]; v = v + post_out[c]     if has_post

    Args:
        c_in, c_out, groups: Channels.
        conv: Kernel and so on; `pad_end` is the padding after the last row and column. If its padding is `SAME`, there
            is as much as gives ceil(size / stride) pixels, the odd one after the last.
        pad_value: What a padded tap holds: -1, 0 or +1.
        has_k, act, has_affine, has_post: Which steps there are.
        link: How the channels of the link's source become c_out, `link_c` of them.
        link_pool, pool: Pooling of the link's source; a mean counts the pixels inside the image only.
    """
    SIZE: ClassVar[int] = 29  # integers

    c_in: int
    c_out: int
    conv: Window = Window()
    pad_end: tuple[int, int] = (0, 0)
    groups: int = 1
    pad_value: int = 0
    has_k: bool = False
    act: str = 'none'
    has_affine: bool = False
    has_post: bool = False
    link: str = 'none'
    link_c: int = 0
    link_pool: str = 'none'
    pool: Window = Window()

    def ints(self) -> tuple[int, ...]:
        """Return the spec as integers, which the operator takes."""
        return (
            self.c_in, self.c_out, *self.conv.ints(), *self.pad_end, self.groups, self.pad_value, int(self.has_k),
            ACTS.index(self.act), int(self.has_affine), int(self.has_post), LINKS.index(self.link), self.link_c,
            POOLS.index(self.link_pool), *self.pool.ints())

    @classmethod
    def of(cls, ints: Sequence[int]) -> 'ConvSpec':
        """Return the spec of integers.

        Raises:
            ValueError: The integers are not those of a spec.
        """
        if len(ints) != cls.SIZE:
            raise ValueError(f'spec: found {len(ints)} integers, expected {cls.SIZE}, those of ConvSpec.ints()')
        names = (ACTS, LINKS, POOLS)
        for value, known in zip((ints[15], ints[18], ints[20]), names):
            if not 0 <= value < len(known):
                raise ValueError(f'spec: found {value}, expected an index into {known}')
        return cls(
            ints[0], ints[1], Window.of(ints[2:10]), tuple(ints[10:12]), ints[12], ints[13], bool(ints[14]),
            ACTS[ints[15]], bool(ints[16]), bool(ints[17]), LINKS[ints[18]], ints[19], POOLS[ints[20]],
            Window.of(ints[21:29]))

    def padded(self, left: int, right: int, top: int, bottom: int) -> 'ConvSpec':
        """Return the spec with other padding."""
        return replace(self, conv=replace(self.conv, padding=(top, left)), pad_end=(bottom, right))

    def at(self, shape: Sequence[int]) -> 'ConvSpec':
        """Return the same with the padding for images of this shape (N, C, H, W); others are for `problem` to name."""
        if self.conv.padding != SAME or len(shape) != 4:
            return self
        height, width = shape[2:]
        pads = []
        for i, size in ((1, width), (0, height)):
            reach = (self.output_size(height, width)[i] - 1) * self.conv.stride[i] + 1
            total = max(reach + (self.conv.kernel[i] - 1) * self.conv.dilation[i] - size, 0)
            pads += [total // 2, total - total // 2]
        return self.padded(*pads)

    @property
    def rows(self) -> list[str]:
        """Names of the table's rows, in order."""
        wanted = {'slope': self.act == 'prelu', 'scale2': self.has_affine, 'shift2': self.has_affine}
        return [name for name in ROWS if wanted.get(name, self.has_post or not name.startswith('post'))]

    @property
    def taps(self) -> int:
        """Kernel height times width."""
        return self.conv.kernel[0] * self.conv.kernel[1]

    @property
    def is_depthwise(self) -> bool:
        """Each channel has a kernel of its own, and there is one."""
        return 1 < self.groups == self.c_in == self.c_out

    def output_size(self, height: int, width: int) -> list[int]:
        """Return the rows and columns of the output.

        Raises:
            ValueError: The image is smaller than the kernel.
        """
        if self.conv.padding == SAME:
            return [(size + step - 1) // step for size, step in zip((height, width), self.conv.stride)]
        sizes = []
        for i, size in enumerate((height, width)):
            room = size + self.conv.padding[i] + self.pad_end[i] - self.conv.dilation[i] * (self.conv.kernel[i] - 1) - 1
            if room < 0:
                raise ValueError(
                    f'x: found {height} x {width} pixels, fewer than the kernel of {self.conv.kernel} with dilation '
                    f'{self.conv.dilation} and this padding covers; expected a larger image')
            sizes.append(room // self.conv.stride[i] + 1)
        return sizes

    def beyond(self) -> str | None:
        """Return which of the engine's limits the layer exceeds, or None; torch knows no such limits."""
        reaches = [
            n for w in (self.conv, self.pool)
            for n in (*w.stride, *w.padding, *(d * k for d, k in zip(w.dilation, w.kernel)))]
        if max(*reaches, *self.pad_end) > MOST_REACH:
            return f'spec: found {self}, expected strides, padding and kernels times dilation of at most {MOST_REACH}'
        if self.taps > MOST_TAPS or self.pool.kernel[0] * self.pool.kernel[1] > 64:
            return (
                f'spec: found {self.taps} taps, expected at most {MOST_TAPS}, and 64 in the pool of a link; keep the '
                f'layer real (keep=[...])')
        if max(self.c_in, self.c_out) > MOST_CHANNELS:
            return f'spec: found {self.c_in} and {self.c_out} channels, expected at most {MOST_CHANNELS}'
        return None

    def problem(self, x_shape: Sequence[int], link_shape: Sequence[int] | None) -> str | None:
        """Return what is inconsistent in the spec or the shapes, or None; kernels run only what passes here."""
        windows = (self.conv, self.pool)
        sizes = [n for w in windows for n in (*w.kernel, *w.stride, *w.dilation)]
        if min(self.c_in, self.c_out, self.groups, *sizes) < 1:
            return f'spec: found {self}, expected positive channels, groups, kernels, strides and dilations'
        padding = () if self.conv.padding == SAME else self.conv.padding
        if min(*padding, *self.pad_end, *self.pool.padding) < 0 or self.pad_value not in (-1, 0, 1):
            return f'spec: found {self}, expected padding >= 0 and pad_value -1, 0 or 1'
        beyond = self.beyond()
        if beyond is not None:
            return beyond
        if self.c_in % self.groups or self.c_out % self.groups:
            return f'spec: found groups={self.groups}, expected a divisor of {self.c_in} and {self.c_out} channels'
        if self.has_k and self.groups != 1:
            return f'spec: found has_k with groups={self.groups}, expected groups=1'
        if len(x_shape) != 4 or x_shape[1] != self.c_in or min(x_shape[2:]) < 1:
            return f'x: found shape {tuple(x_shape)}, expected (N, {self.c_in}, H, W) with at least one pixel'
        if (self.link != 'none') != (link_shape is not None):
            return f'link: found {"a" if link_shape is not None else "no"} tensor, the spec has link={self.link!r}'
        if link_shape is None:
            return None
        if len(link_shape) != 4 or link_shape[0] != x_shape[0] or link_shape[1] != self.link_c:
            return f'link: found shape {tuple(link_shape)}, expected ({x_shape[0]}, {self.link_c}, H, W)'
        fits = {'identity': self.link_c == self.c_out, 'squeeze': self.link_c >= self.c_out, 'expand': self.link_c > 0}
        if not fits[self.link]:
            return f'link: {self.link} cannot make {self.c_out} channels of {self.link_c}'
        out = self.output_size(*x_shape[2:])
        size = list(link_shape[2:])
        fine = size == out if self.link_pool == 'none' else min(size) > 0 and not has_empty_window(self.pool, size, out)
        if fine:
            return None
        return f'link: found shape {tuple(link_shape)}, which does not give {out[0]} x {out[1]} pixels'
