"""A small program in which each kind of step, and each operation of it, occurs; not a test."""
from collections.abc import Sequence
from dataclasses import replace

import torch

from timm_el.engine.layout import store
from timm_el.engine.program import Output, Program
from timm_el.engine.spec import SAME, ConvSpec, Window, table_stride
from timm_el.engine.steps import Binary, Form, Kind, Pool, Step, Unary, pool_step

CHANNELS, SIZE = 8, 9  # of its input
CONVS = {
    'plain': (ConvSpec(8, 8, Window((3, 3), (1, 1), (1, 1)), (1, 1)), torch.uint8),
    'threshold and flip, K, clip': (
        ConvSpec(8, 8, Window((3, 3), (1, 1), SAME), has_k=True, act='clip', has_affine=True), torch.uint8),
    'padded with +1, squeezed link, post': (
        ConvSpec(8, 6, Window((3, 3), (2, 2), (1, 1)), (1, 1), pad_value=1, act='prelu', has_post=True, link='squeeze',
                 link_c=8, link_pool='max', pool=Window((3, 3), (2, 2), (1, 1))), torch.uint8),
    'padded with -1, expanded link': (
        ConvSpec(8, 20, Window((2, 3), (2, 1), (0, 1), (1, 1)), (1, 1), pad_value=-1, link='expand', link_c=8,
                 link_pool='avg', pool=Window((2, 1), (2, 1))), torch.uint8),
    'groups': (ConvSpec(8, 16, groups=2), torch.uint8),
    'depthwise': (ConvSpec(8, 8, Window((3, 3), (1, 1), (2, 2), (2, 2)), (2, 2), groups=8), torch.uint8),
    'real, identity link': (
        ConvSpec(8, 8, Window((3, 3), (1, 1), (1, 1)), (1, 1), has_affine=True, link='identity', link_c=8),
        torch.float32),
    'int8, squeezed link': (
        ConvSpec(8, 6, Window((3, 2), (2, 1), (1, 1)), (1, 0), act='clip', link='squeeze', link_c=8, link_pool='max',
                 pool=Window((3, 2), (2, 1), (1, 1))), torch.int8),
    'int8': (ConvSpec(8, 9), torch.int8),
    'real depthwise, SAME': (ConvSpec(8, 8, Window((3, 3), (2, 2), SAME), groups=8), torch.float32),
}


class _Steps:
    """Steps that are put one after the other, by the values that they give."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.generator = torch.Generator().manual_seed(5)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def add(self, kind: Kind, sources: Sequence[int | None], tensors=(), ints=(), constants=(), path='') -> int:
        self.steps.append(Step(kind, tuple(sources), tuple(tensors), tuple(ints), tuple(constants), path))
        return len(self.steps)

    def conv(self, name: str, source: int, link: int | None = None, added: int | None = None) -> int:
        spec, dtype = CONVS[name]
        weight = self.random(spec.c_out, spec.c_in // spec.groups, *spec.conv.kernel)
        weight = store((weight * 50).clamp(-127, 127).to(dtype) if dtype == torch.int8 else weight, spec, dtype)
        table = torch.zeros(len(spec.rows), table_stride(spec.c_out))
        table[:, :spec.c_out] = self.random(len(spec.rows), spec.c_out)
        threshold = flip = None
        if name.startswith('threshold'):
            threshold = self.random(spec.c_in)
            flip = torch.where(self.random(spec.c_in) < 0, -1 << 31, 0).to(torch.int32)
            threshold[3] = 0.
        return self.add(
            Kind.CONV, (source, link, added), (weight, table, threshold, flip), spec.ints(), (-0.7, 0.9, 0.5), name)


def every_step(int8: bool = True) -> Program:
    """Return the program: one image (N, 8, H, W) of 9 x 9 pixels -> an image, and rows of features."""
    s = _Steps()
    x = 0
    values = [
        s.conv(name, x, x if spec.link != 'none' else None) for name, (spec, dtype) in CONVS.items()
        if int8 or dtype != torch.int8]
    values.append(s.conv('plain', x, None, values[0]))
    for mode in Pool:
        for ceil in (False, True):
            s.steps.append(pool_step(Window((3, 2), (2, 2), (1, 0)), mode, (0, 1), ceil, x, f'{mode.name} {ceil}'))
            values.append(len(s.steps))
    mean = s.add(Kind.MEAN, (x,))
    scalar = s.add(Kind.INPUT_SCALE, (x,), ints=(*Window().ints(), 0, 0, 1))
    values += [s.add(Kind.BINARY, (x, b), ints=(op,), path=op.name) for op in Binary for b in (values[0], mean, scalar)]
    positive = s.add(Kind.UNARY, (x,), ints=(Unary.ABS,), constants=(0., 0.))
    constants = {Unary.CLIP: (-0.3, 0.8), Unary.LEAKY: (0.1, 0.), Unary.ELU: (1.5, 0.)}
    values += [
        s.add(Kind.UNARY, (positive if op == Unary.SQRT else x,), ints=(op,), constants=constants.get(op, (0., 0.)),
              path=op.name) for op in Unary]
    values.append(s.add(Kind.AFFINE, (x,), (s.random(8), s.random(8))))
    values.append(s.add(Kind.AFFINE, (x,), (None, s.random(8))))
    values.append(s.add(Kind.PRELU, (x,), (s.random(8),)))
    for groups, over_pixels in ((1, 0), (2, 1), (8, 1)):
        values.append(s.add(Kind.NORM, (x,), (s.random(8), s.random(8)), (groups, over_pixels), (1e-5,)))
    values.append(s.add(Kind.NORM, (x,), (None, None), (1, 0), (1e-6,)))
    values.append(s.add(Kind.CHANNELS, (x,), (torch.tensor([7, 0, 0, 3], dtype=torch.int32),)))
    values.append(s.add(Kind.INPUT_SCALE, (x,), ints=(*Window((3, 3), (2, 2), SAME).ints(), 0, 0, 2)))
    values.append(s.add(Kind.PAD, (x,), ints=(1, 2, 0, 3), constants=(0.5,)))
    constant = s.add(Kind.CONST, (), (s.random(1, 1, 1, 8),), (1, 1, 1, 8))
    values.append(s.add(Kind.BINARY, (x, constant), ints=(Binary.ADD,)))
    means = [s.add(Kind.MEAN, (value,)) for value in values]
    rows = s.add(Kind.CONCAT, means)
    flat = s.add(Kind.FLATTEN, (values[0],))
    both = s.add(Kind.CONCAT, (rows, flat))
    return Program(s.steps, [Output(values[2]), Output(both, Form.ROWS)], [CHANNELS], None, 'every step')


def image(n: int = 2, seed: int = 0) -> torch.Tensor:
    """Return images (n, 8, 9, 9) in which zeros of both signs are planted."""
    x = torch.randn((n, CHANNELS, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    x[:, 1, 2:5, 2:5], x[:, 3, 1] = 0., -0.
    return x


def with_spec(step: Step, **changes) -> Step:
    """Return a convolution with some fields of its spec changed."""
    return replace(step, ints=replace(ConvSpec.of(step.ints), **changes).ints())
