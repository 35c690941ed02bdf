"""The operators: every instruction set gives the bits of the reference, and nothing that is passed crashes."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import with_slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_el import engine
from timm_el.engine import native, reference, reference_steps
from timm_el.engine.layout import restore, store
from timm_el.engine.program import Output, Program
from timm_el.engine.spec import ACTS, SAME, ConvSpec, Window, table_stride
from timm_el.engine.steps import Kind, Pool, Step, pool_step

BODIES = engine.info()['available']
PLANTED = [0., -0., float('nan'), float('inf'), -float('inf'), 1e-42]


@pytest.fixture(autouse=True)
def _restore():
    threads, large = torch.get_num_threads(), native.library() and native.library().el_large_image(0)
    if large is not None:
        native.library().el_large_image(large)
    yield
    torch.set_num_threads(threads)
    engine.use_isa(None)
    if large is not None:
        native.library().el_large_image(large)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, but for the sign of zero and the payload of NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def plant(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A few of the values that go wrong first."""
    flat = x.view(-1)
    for value in PLANTED if x.numel() else ():
        flat[torch.randint(flat.numel(), (1 + flat.numel() // 60,), generator=generator)] = value
    return x


def binary_conv2d(x, weight, table, threshold, flip, link, ints, constants):
    """Call the operator."""
    return torch.ops.timm_el.binary_conv2d(*as_lists(x, weight, table, threshold, flip, link, ints, constants))


def real_conv2d(x, weight, table, link, ints, constants):
    """Call the operator."""
    return torch.ops.timm_el.real_conv2d(*as_lists(x, weight, table, None, None, link, ints, constants))


def as_lists(x, weight, table, threshold, flip, link, ints, constants):
    """What an operator takes: inputs, constants, integers, numbers."""
    tensors = [torch.empty(0) if t is None else t for t in (weight, table, threshold, flip)]
    return [x] if link is None else [x, link], tensors, ints, constants


def pool2d(x, *arguments):
    """Call the operator."""
    return torch.ops.timm_el.pool2d([x], [], pool_step(*arguments).ints, [])


@st.composite
def cases(draw):
    """A convolution with epilogue, and the seed of its tensors."""
    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    dtype = draw(st.sampled_from([torch.uint8, torch.uint8, torch.float32, torch.int8]))
    real = dtype != torch.uint8
    kind = draw(st.sampled_from(['full', 'full', 'depthwise', 'grouped']))
    if dtype == torch.int8:
        kind = 'full'
    if kind == 'full' or (kind == 'grouped' and real):
        groups, c_in, c_out = 1, draw(st.integers(1, 130)), draw(st.integers(1, 130))
    elif kind == 'depthwise':
        groups = c_in = c_out = draw(st.integers(2, 130))
    else:
        groups = draw(st.integers(2, 5))
        c_in, c_out = groups * draw(st.integers(1, 26)), groups * draw(st.integers(1, 26))
    window = Window(draw(st.sampled_from([(1, 1), pair(1, 7)])), pair(1, 3), pair(0, 3), pair(1, 2))
    spec = ConvSpec(
        c_in, c_out, window, pair(0, 3), groups, 0 if real else draw(st.integers(-1, 1)),
        has_k=not real and groups == 1 and draw(st.booleans()), act=draw(st.sampled_from(ACTS)),
        has_affine=draw(st.booleans()), has_post=draw(st.booleans()))
    n, (h, w) = draw(st.integers(0, 3)), pair(1, 11)
    try:
        oh, ow = spec.output_size(h, w)
    except ValueError:
        h, w = h + 16, w + 16
        oh, ow = spec.output_size(h, w)
    link = None
    if draw(st.booleans()):
        channels = draw(st.sampled_from([c_in, c_out, draw(st.integers(1, 130))]))
        how = 'identity' if channels == c_out else 'squeeze' if channels > c_out else 'expand'
        spec, link = replace(spec, link=how, link_c=channels), (n, channels, oh, ow)
        if draw(st.booleans()):
            kernel, stride = pair(1, 3), pair(1, 3)
            padding = draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2))
            spec = replace(spec, link_pool=draw(st.sampled_from(['max', 'avg'])), pool=Window(kernel, stride, padding))
            link = (n, channels, *((size - 1) * s + 1 + draw(st.integers(0, 2)) for size, s in zip((oh, ow), stride)))
    return dtype, spec, (n, c_in, h, w), link, draw(st.integers(0, 2 ** 31)), draw(st.sampled_from(range(3)))


def random_weight(spec: ConvSpec, dtype: torch.dtype, g: torch.Generator | None = None) -> torch.Tensor:
    """A weight (O, I, kH, kW): floats, or int8."""
    weight = torch.randn(spec.c_out, spec.c_in // spec.groups, *spec.conv.kernel, generator=g)
    return (weight * 50).clamp(-127, 127).to(torch.int8) if dtype == torch.int8 else weight


def tensors_of(case):
    """Everything that the operators take, and a function that calls the right one."""
    dtype, spec, shape, link_shape, seed, layout = case
    g = torch.Generator().manual_seed(seed)
    x = plant(torch.randn(shape, generator=g), g)
    if layout == 1:
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == 2:
        x = torch.stack([x, x], -1)[..., 0]  # strides of its own
    link = None if link_shape is None else plant(torch.randn(link_shape, generator=g), g)
    weight = store(random_weight(spec, dtype, g), spec, dtype)
    table = torch.randn(len(spec.rows), table_stride(spec.c_out), generator=g)
    constants = [-.5, 1.5, .3]
    if dtype != torch.uint8:
        return real_conv2d, reference.real_conv2d, (x, weight, table, link), spec, constants
    threshold = torch.randn(spec.c_in, generator=g) if seed % 2 else None
    flip = torch.randint(0, 2, (spec.c_in,), generator=g).to(torch.int32) * -2 ** 31 if seed % 3 == 0 else None
    return (
        binary_conv2d, reference.binary_conv2d, (x, weight, table, threshold, flip, link), spec,
        constants)


def check_all_bodies(case) -> None:
    operator, expect, arguments, spec, constants = tensors_of(case)
    expected = expect(*arguments, spec, constants)
    for body in BODIES:
        engine.use_isa(body)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = operator(*arguments, spec.ints(), constants)
            assert same(found, expected), (body, threads, spec)
            assert found.is_contiguous(memory_format=torch.channels_last)


_SETTINGS = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@settings(max_examples=250, **_SETTINGS)
@given(cases())
def test_all_bodies_give_the_bits_of_the_reference(case):
    check_all_bodies(case)


@pytest.mark.slow
@settings(max_examples=5000, **_SETTINGS)
@given(cases())
def test_all_bodies_give_the_bits_of_the_reference_at_length(case):
    check_all_bodies(case)


def test_the_native_library_is_there_where_a_compiler_is():
    """Without this, all of the above would compare the reference with nothing."""
    assert engine.info()['native'] == bool(BODIES)
    assert BODIES, engine.info()['reason']


# ---------------------------------------------------------------------------------------------------------------------
# The reference against torch

def test_the_reference_counts_as_a_float_convolution_of_signs_does():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 70, 9, 8), torch.randn(33, 70, 3, 3)
    x.view(-1)[:3] = torch.tensor([0., -0., float('nan')])
    for value in (-1, 0, 1):
        spec = ConvSpec(70, 33, Window((3, 3), (2, 1), (1, 1)), (1, 1), 1, value)
        table = torch.zeros(2, table_stride(33))
        table[0] = .5
        table[1] = .25
        signs = F.pad(torch.where(x >= 0, 1., -1.), (1, 1, 1, 1), value=value)
        expected = F.conv2d(signs, torch.where(weight >= 0, .5, -.5), stride=(2, 1)) + .25
        stored = store(weight, spec, torch.uint8)
        found = reference.binary_conv2d(x, stored, table, None, None, None, spec, [0., 0., 1.])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_fma_rounds_once():
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(20000, generator=g) * 10. ** torch.randint(-20, 18, (20000,), generator=g) for _ in range(3))
    c[::2] = -(a[::2].double() * b[::2].double()).float()  # cancellation shows a second rounding
    from fractions import Fraction
    found = reference.fma(a, b, c)
    for i in range(0, 20000, 37):
        if not found[i].isfinite():
            continue
        exact = Fraction(a[i].item()) * Fraction(b[i].item()) + Fraction(c[i].item())
        below, above = (torch.nextafter(found[i], torch.tensor(s * float('inf'))) for s in (-1, 1))
        error = abs(Fraction(found[i].item()) - exact)
        for other in (below, above):
            if other.isfinite():
                assert error <= abs(Fraction(other.item()) - exact)


# ---------------------------------------------------------------------------------------------------------------------
# As torch operators

def example(real: bool = False, seed: int = 0):
    case = (torch.float32 if real else torch.uint8, ConvSpec(
        40, 24, Window((3, 3), (1, 1), (1, 1)), (1, 1), act='prelu', link='squeeze', link_c=40), (2, 40, 6, 5),
        (2, 40, 6, 5), seed, 1)
    operator, _, arguments, spec, constants = tensors_of(case)
    arguments = [t.nan_to_num(1., 1., 1.) if t is not None and t.is_floating_point() else t for t in arguments]
    return operator, (*arguments, list(spec.ints()), constants)


def conv_step(g, c_in, c_out, k=1, stride=1, real=False, sources=(0, None, None), link='none', constants=(0., 0., 1.)):
    """A convolution with random weights and constants as a step."""
    window = Window((k, k), (stride, stride), (k // 2, k // 2))
    spec = ConvSpec(c_in, c_out, window, (k // 2, k // 2), link=link, link_c=c_in if link != 'none' else 0)
    weight = store(torch.randn(c_out, c_in, k, k, generator=g), spec, torch.float32 if real else torch.uint8)
    table = torch.randn(2, table_stride(c_out), generator=g) / c_in
    return Step(Kind.CONV, sources, (weight, table, None, None), spec.ints(), constants, 'here')


def row_example():
    """Three convolutions in a row, to the last of which a second input is added."""
    g, steps = torch.Generator().manual_seed(1), []
    for i, (c_in, c_out, k) in enumerate(((20, 30, 1), (30, 30, 3), (30, 20, 1))):
        link = 'identity' if c_in == c_out else 'expand' if c_in < c_out else 'squeeze'
        source = i + 1 if i else 0
        steps.append(conv_step(
            g, c_in, c_out, k, sources=(source, source, 1 if i == 2 else None), link=link, constants=(0., 0., .5)))
    return [torch.randn(2, 20, 13, 7, generator=g) for _ in range(2)], steps


def step_by_step(inputs, steps):
    """What the steps give by the reference."""
    values = [*inputs]
    for step in steps:
        values.append(reference_steps.run(step, [None if v is None else values[v] for v in step.sources]))
    return values[-1]


def program_of(inputs, steps):
    """The steps as a program whose last value leaves."""
    return Program(steps, [Output(len(inputs) + len(steps) - 1)], [x.shape[1] for x in inputs])


@pytest.mark.parametrize('real', [False, True])
def test_opcheck_passes(real):
    operator, arguments = example(real)
    if real:
        x, weight, table, *rest = arguments
        arguments = x, weight, table, None, None, *rest
    name = torch.ops.timm_el.real_conv2d if real else torch.ops.timm_el.binary_conv2d
    torch.library.opcheck(name, as_lists(*arguments))


OTHERS = {
    'unary': ([], [4], []), 'affine': ([torch.randn(6), torch.randn(6)], [], []),
    'norm': ([torch.randn(6), torch.empty(0)], [2, 1], [1e-5]), 'mean': ([], [], []),
    'input_scale': ([], [3, 2, 1, 2, 1, 0, 1, 1, 1, 1, 3], []),
    'pool2d': ([], [2, 2, 2, 2, 0, 0, 1, 1, 1, 1, 1, 0], [])}


@pytest.mark.parametrize('name', OTHERS)
def test_opcheck_passes_for_the_other_operators(name):
    arguments = [torch.randn(2, 6, 9, 8)], *OTHERS[name]
    torch.library.opcheck(getattr(torch.ops.timm_el, name), arguments)


POOLS = {
    'stem': torch.nn.MaxPool2d(3, 2, 1), 'half': torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
    'odd': torch.nn.MaxPool2d((2, 3), (3, 1), (1, 1), (1, 2), ceil_mode=True), 'all': torch.nn.AvgPool2d((7, 5)),
}


@pytest.mark.parametrize('body', [*BODIES, 'reference'])
@pytest.mark.parametrize('kind', POOLS)
def test_pools_are_those_of_torch(kind, body):
    engine.use_isa(body)
    torch.set_num_threads(2)
    pool = POOLS[kind]
    deployed = engine.DeployedPool('pool', pool)
    for shape in ((2, 19, 7, 5), (1, 64, 9, 14), (0, 3, 8, 8)):
        x = torch.randn(shape)
        x.view(-1)[:1] = float('nan')
        found = deployed(x)
        torch.testing.assert_close(found, pool(x), rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.library.opcheck(torch.ops.timm_el.pool2d, ([torch.randn(2, 3, 7, 5)], [], deployed.ints, []))
    assert deployed(torch.randn(3, 7, 5)).dim() == 3  # torch's own pool takes an image without a batch


@pytest.mark.parametrize('body', [*BODIES, 'reference'])
def test_a_mean_over_images_of_any_size_is_torchs(body):
    engine.use_isa(body)
    deployed = engine.DeployedPool('pool', torch.nn.AdaptiveAvgPool2d(1))
    for shape in ((2, 19, 7, 5), (1, 64, 9, 14), (0, 3, 8, 8), (2, 3, 1, 1)):
        x = torch.randn(shape)
        torch.testing.assert_close(deployed(x), x.mean((2, 3), keepdim=True), rtol=1e-6, atol=1e-6)


def test_padding_that_depends_on_the_image_is_that_of_the_image():
    g = torch.Generator().manual_seed(0)
    for kernel, stride, dilation in (((3, 3), (2, 2), (1, 1)), ((5, 2), (3, 1), (2, 1)), ((1, 1), (2, 2), (1, 1))):
        spec = ConvSpec(9, 10, Window(kernel, stride, SAME, dilation), pad_value=-1)
        weight = store(torch.randn(10, 9, *kernel, generator=g), spec, False)
        table = torch.randn(2, table_stride(10), generator=g)
        for height, width in ((7, 8), (16, 5), (1, 1)):
            x = torch.randn(2, 9, height, width, generator=g)
            fixed = spec.at((1, spec.c_in, height, width))
            expected = binary_conv2d(x, weight, table, None, None, None, fixed.ints(), [0., 0., 1.])
            assert list(expected.shape[2:]) == [-(-height // stride[0]), -(-width // stride[1])]
            assert fixed.pad_end[0] - fixed.conv.padding[0] in (0, 1)
            arguments = (x, weight, table, None, None, None, list(spec.ints()), [0., 0., 1.])
            for body in (*BODIES, 'reference'):
                engine.use_isa(body)
                assert same(binary_conv2d(*arguments), expected)
            torch.library.opcheck(torch.ops.timm_el.binary_conv2d, as_lists(*arguments))
            for wrong in (x[0], x[:, :8]):
                with pytest.raises(ValueError, match='x: found shape'):
                    binary_conv2d(wrong, *arguments[1:])
            with pytest.raises(ValueError, match='padding'):
                pool2d(x, Window((2, 2), (2, 2), SAME), Pool.MAX, (0, 0), False)


def test_a_pool_that_makes_no_sense_is_refused():
    x, window = torch.randn(1, 3, 8, 8), Window((2, 2), (2, 2))
    for error, message, image, arguments in (
            (TypeError, 'dtype', x.double(), (window, Pool.MAX, (0, 0))),
            (ValueError, 'shape', x[0], (window, Pool.MAX, (0, 0))),
            (ValueError, 'too few', x, (Window((9, 2)), Pool.MAX, (0, 0))),
            (ValueError, 'at most 64', x, (Window((8, 9)), Pool.MAX, (0, 1))),
            (ValueError, 'too few', x, (Window((2, 2), (2, 2), (5, 5)), Pool.MAX, (5, 5))),
            (ValueError, 'too few', x[:, :, :3, :3], (Window((2, 2), (1, 1), (1, 1), (4, 4)), Pool.MAX, (1, 1))),
            (ValueError, 'positive', x, (Window((0, 0)), Pool.MAX, (0, 0))),
            (ValueError, 'mode', x, (window, 3, (0, 0)))):
        for body in (None, 'reference'):
            engine.use_isa(body)
            with pytest.raises(error, match=message):
                pool2d(image, *arguments, False)


# ---------------------------------------------------------------------------------------------------------------------
# Programs

def bottleneck_example():
    """A block that halves its image, with a pool and a real convolution as its shortcut, and one that adds its x."""
    g = torch.Generator().manual_seed(3)
    pool = pool_step(Window((2, 2), (2, 2)), Pool.MEAN, (1, 1), False)
    return [torch.randn(2, 12, 19, 11, generator=g)], [
        conv_step(g, 12, 8), conv_step(g, 8, 8, 3, 2, sources=(1, None, None)), pool,
        conv_step(g, 12, 30, real=True, sources=(3, None, None)), conv_step(g, 8, 30, sources=(2, None, 4)),
        conv_step(g, 30, 8, sources=(5, None, None)), conv_step(g, 8, 30, 3, sources=(6, None, 5))]


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('large', [0, 1 << 40])
@pytest.mark.parametrize('body', [*BODIES, 'reference'])
@pytest.mark.parametrize('make', [row_example, bottleneck_example])
def test_a_program_gives_the_bits_of_its_steps_one_by_one(make, body, large, threads):
    inputs, steps = make()
    engine.use_isa(body)
    if native.library() is not None:
        native.library().el_large_image(large)
    torch.set_num_threads(threads)
    assert same(program_of(inputs, steps).run(inputs)[0], step_by_step(inputs, steps))


def test_many_values_may_wait_at_once():
    g, n = torch.Generator().manual_seed(0), 40
    first = [conv_step(g, 8, 8, sources=(i, None, None)) for i in range(n)]  # all of them wait for the second half
    second = [conv_step(g, 8, 8, sources=(n + i, None, n - i)) for i in range(n)]
    x = [torch.randn(1, 8, 5, 5, generator=g)]
    assert same(program_of(x, first + second).run(x)[0], step_by_step(x, first + second))


@pytest.mark.parametrize('i, sources, message', [
    (0, (1, None, None), ''), (4, (2, None, 5), ''), (1, (-2, None, None), ''),
    (6, (6, None, 0), 'added: found size'), (6, (3, None, 5), 'x: found shape'),
    (5, (4, None, 1), 'added: found size')])
def test_steps_that_read_what_does_not_fit_are_refused(i, sources, message):
    inputs, steps = bottleneck_example()
    steps[i] = replace(steps[i], sources=sources)
    for body in (None, 'reference'):
        engine.use_isa(body)
        with pytest.raises((ValueError, IndexError), match=message or None):
            program_of(inputs, steps).run(inputs)


def test_sizes_beyond_any_image_are_refused():
    far = 1 << 30
    for window in (Window((2, 2), (1, 1), (far, far), (far, far)), Window((1, 1), (2 ** 32 + 1, 1)),
                   Window((1, 1), (1, 1), (2 ** 31, 0))):
        spec = ConvSpec(128, 8, window)
        weight = torch.zeros(1, window.kernel[0] * window.kernel[1] * 2, 64, dtype=torch.uint8)
        table = torch.zeros(2, table_stride(8))
        for body in (None, 'reference'):
            engine.use_isa(body)
            with pytest.raises(ValueError, match='at most 32768'):
                binary_conv2d(
                    torch.randn(1, 128, 1, 1), weight, table, None, None, None, list(spec.ints()), [0., 0., 1.])


def test_a_table_of_another_shape_is_refused_after_a_good_call_too():
    _, arguments = example()
    x, weight, table, *rest = arguments
    binary_conv2d(*arguments)
    for wrong in (table[:1], table.view(torch.int32)):
        with pytest.raises((ValueError, TypeError), match='table'):
            binary_conv2d(x, weight, wrong, *rest)


def test_the_operators_compile_and_export():
    operator, arguments = example()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, tensor in enumerate(arguments[1:3]):
                self.register_buffer(f'b{i}', tensor)

        def forward(self, x):
            return operator(x, self.b0, self.b1, *arguments[3:5], x, *arguments[6:]) * 2

    net = Net().eval()
    expected = net(arguments[0])
    assert same(torch.compile(net, fullgraph=True)(arguments[0]), expected)
    assert same(torch.export.export(net, (arguments[0],)).module()(arguments[0]), expected)


def test_weights_that_are_written_to_are_noticed():
    operator, arguments = example()
    before = operator(*arguments)
    spec = ConvSpec.of(arguments[6])
    arguments[1].copy_(store(-restore(arguments[1], spec, torch.float32), spec, torch.uint8))
    engine.use_isa('reference')
    expected = operator(*arguments)
    engine.use_isa(None)
    assert same(operator(*arguments), expected) and not same(expected, before)


# ---------------------------------------------------------------------------------------------------------------------
# Threads, processes, choice of the body

def test_four_python_threads_at_once_get_the_right_answers():
    torch.set_num_threads(2)
    calls = [example(seed=seed) for seed in range(4)]
    expected = [operator(*arguments) for operator, arguments in calls]
    wrong = []

    def work(i: int) -> None:
        operator, arguments = calls[i]
        for _ in range(100):
            if not same(operator(*arguments), expected[i]):
                wrong.append(i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not wrong


class _Runs(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        operator, arguments = example(seed=i)
        torch.set_num_threads(2)
        return operator(*arguments)


@pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')
def test_a_forked_worker_gets_the_right_answers():
    torch.set_num_threads(2)
    expected = [example(seed=i)[0](*example(seed=i)[1]) for i in range(4)]  # the parent has workers now
    loader = torch.utils.data.DataLoader(_Runs(), batch_size=None, num_workers=2, multiprocessing_context='fork')
    assert all(same(a, b) for a, b in zip(loader, expected))


def ask(code: str, **environment) -> str:
    return subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, **environment}, capture_output=True, text=True,
        check=True).stdout.strip()


@pytest.mark.parametrize('body', with_slow(['portable'], [*BODIES, 'reference']))
def test_the_environment_forces_a_body(body):
    assert ask('import timm_el; print(timm_el.engine.info()["body"])', TIMM_EL_ISA=body) == body


def test_an_unknown_body_is_named_and_the_reference_runs():
    code = 'import timm_el; i = timm_el.engine.info(); print(i["native"], i["reason"])'
    out = ask(code, TIMM_EL_ISA='mmx')
    assert out.startswith('False') and 'mmx' in out and 'reference' in out
    with pytest.raises(ValueError, match='mmx'):
        engine.use_isa('mmx')


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

def test_what_does_not_fit_is_refused_by_name():
    operator, arguments = example()
    x, weight, table, threshold, flip, link, ints, constants = arguments
    spec = ConvSpec.of(ints)
    ok = dict(zip(('x', 'weight', 'table', 'threshold', 'flip', 'link', 'spec', 'constants'), arguments))
    changed = [
        (TypeError, 'x: found dtype', dict(x=x.double())), (TypeError, 'x: found dtype', dict(x=x.to(torch.int8))),
        (ValueError, 'x: found shape', dict(x=x[:, :39])), (ValueError, 'x: found shape', dict(x=x[0])),
        (ValueError, 'x: found shape', dict(x=x[:, :, :0])),
        (ValueError, 'weight: found', dict(weight=weight[:, :-1])),
        (ValueError, 'weight: found', dict(weight=weight.int())),
        (ValueError, 'weight: found', dict(weight=weight.transpose(1, 2))),
        (ValueError, 'table: found', dict(table=table[:, :-1].contiguous())),
        (TypeError, 'table: found', dict(table=table.double())),
        (ValueError, 'threshold: found', dict(threshold=torch.zeros(3))),
        (ValueError, 'flip: found', dict(flip=torch.zeros(40))),
        (ValueError, 'link: found', dict(link=None)), (ValueError, 'link: found', dict(link=link[:1])),
        (ValueError, 'link: found', dict(link=link[:, :, :-1])),
        (ValueError, 'spec: found', dict(spec=ints[:-1])), (ValueError, 'spec: found', dict(spec=[0, *ints[1:]])),
        (ValueError, 'link: ', dict(spec=list(replace(spec, link='identity').ints()))),
        (ValueError, 'spec: found', dict(spec=[*ints[:13], 2, *ints[14:]])),
        (ValueError, 'spec: found', dict(spec=[*ints[:18], 9, *ints[19:]])),
        (ValueError, 'spec: found', dict(spec=[*ints[:12], 7, *ints[13:]])),
        (ValueError, 'constants: found', dict(constants=[1.])),
        (ValueError, 'expected a larger image', dict(
            x=x[:, :, :1], link=link[:, :, :1], spec=list(replace(spec, conv=Window((7, 7))).ints()))),
    ]
    for body in (None, 'reference'):
        engine.use_isa(body)
        for error, message, change in changed:
            with pytest.raises(error, match=message):
                operator(*{**ok, **change}.values())
        assert operator(*arguments).shape == (2, 24, 6, 5)


def test_an_empty_batch_gives_an_empty_output():
    operator, arguments = example()
    arguments = (arguments[0][:0], *arguments[1:5], arguments[5][:0], *arguments[6:])
    assert operator(*arguments).shape == (0, 24, 6, 5)


def test_rates_are_those_of_a_processor_and_need_the_library():
    """Binary multiply-accumulates a second: of one core under an emulator, or of the fastest there is."""
    assert all(1e7 < rate < 1e15 for rate in (engine.chip_rate(), engine.count_rate(4, 64, 12, 2)))
    engine.use_isa('reference')
    for rate in (engine.chip_rate, lambda: engine.count_rate(4, 64, 12, 2)):
        with pytest.raises(RuntimeError, match='reference'):
            rate()


@settings(max_examples=60, **_SETTINGS)
@given(cases())
def test_a_stored_weight_is_restored(case):
    dtype, spec, *_ = case
    weight = random_weight(spec, dtype)
    expected = torch.where(weight >= 0, 1., -1.) if dtype == torch.uint8 else weight.float()
    assert torch.equal(restore(store(weight, spec, dtype), spec, torch.float32), expected)


def test_a_link_whose_pool_misses_the_image_is_refused():
    spec = ConvSpec(16, 16, link='identity', link_c=16, link_pool='max', pool=Window((2, 2), (1, 1), (1, 1), (4, 4)))
    assert 'link' in spec.problem((1, 16, 3, 3), (1, 16, 3, 3))
    assert replace(spec, pool=Window((2, 2), (1, 1), (1, 1), (1, 1))).problem((1, 16, 3, 3), (1, 16, 3, 3)) is None


def test_a_weight_that_is_another_one_at_the_same_address_is_noticed():
    _, arguments = example()
    x, weight, *rest = arguments
    memory = torch.zeros(2, weight.numel(), dtype=torch.uint8)

    def call(values: torch.Tensor) -> torch.Tensor:
        memory[0] = values.flatten()
        there = memory[0].clone().set_(memory.untyped_storage(), 0, weight.shape, weight.stride())
        return binary_conv2d(x, there, *rest)

    for body in BODIES:
        engine.use_isa(body)
        for values in (weight, ~weight):
            assert same(call(values), binary_conv2d(x, values.clone(), *rest)), body


@settings(max_examples=30, **_SETTINGS)
@given(cases())
def test_a_stored_weight_is_no_image_for_torch(case):
    """`Module.to(memory_format=...)` rearranges tensors of four axes and refuses some of five."""
    dtype, spec, *_ = case
    stored = store(random_weight(spec, dtype), spec, dtype)
    assert stored.dim() in (2, 3) and stored.is_contiguous()
