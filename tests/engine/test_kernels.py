"""The C sources by themselves: warnings are errors, their own driver finds nothing wrong, sanitizers neither."""
import ctypes
import importlib.util
import itertools
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled import CC, KERNELS, SANITIZERS, build, needs_compiler, run
from test_engine import binary_conv2d, real_conv2d

import timm_el
from timm_el import engine
from timm_el.engine import native, reference
from timm_el.engine.layout import store
from timm_el.engine.spec import ConvSpec, Window, table_stride


@needs_compiler
def test_the_driver_finds_every_body_right(tmp_path):
    out = run(build(tmp_path, 'driver'), '300', '7')
    assert ': 0 wrong' in out and ' '.join(timm_el.engine.info()['available']) in out


def test_a_program_that_never_asks_runs_the_best_instruction_set(tmp_path):
    """As net.py and a C program do: a copy of the library, which nobody has told anything."""
    library = ctypes.CDLL(str(shutil.copy(native.library_path(), tmp_path / native.library_path().name)))
    library.el_active.restype = library.el_bodies.restype = ctypes.c_char_p
    assert library.el_active().decode() == library.el_bodies().decode().split()[0]


@needs_compiler
def test_the_driver_sees_a_wrong_kernel(tmp_path):
    wrong = tmp_path / 'kernels'
    shutil.copytree(KERNELS, wrong)
    epilogues = wrong / 'isa' / 'real.h'
    text = epilogues.read_text()
    assert '(n + n)' in text
    epilogues.write_text(text.replace('(n + n)', '(n + n + 1)'))
    result = subprocess.run([build(tmp_path, 'driver', kernels=wrong), '40'], capture_output=True, text=True)
    assert result.returncode == 1 and 'differs' in result.stdout


@needs_compiler
@pytest.mark.parametrize('kernel', [(1, 1), (3, 5), (4, 4), (1, 255), (16, 16), (32, 32)])
def test_depthwise_kernels_of_any_size_are_counted(kernel):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 70, kernel[0] + 1, kernel[1] + 2), torch.randn(70, 1, *kernel)
    weight[0], x[:, 0] = -1., 1.  # differ in all taps
    spec = ConvSpec(70, 70, Window(kernel), groups=70)
    table = torch.zeros(2, table_stride(70))
    table[0] = 1.
    expected = torch.nn.functional.conv2d(
        torch.where(x >= 0, 1., -1.), torch.where(weight >= 0, 1., -1.), groups=70)
    try:
        for body in engine.info()['available']:
            engine.use_isa(body)
            found = binary_conv2d(
                x, store(weight, spec, torch.uint8), table, None, None, None, spec.ints(), [0., 0., 1.])
            assert torch.equal(found, expected), body
    finally:
        engine.use_isa(None)


def sums_that_are_hard_to_round():
    """Make x and w, four values each, of chains of fused multiply-adds.

    Returns:
        x, w (4, n): a + b * c + d - d with a + b * c half-way between two floats, or off it by less than a float64 can
        tell, at all exponents, below the least normal number, beyond the largest, and with d that cancels a or leads
        beyond the largest number and not back.
    """
    step, rows = 2. ** -23, []
    exponents = (*range(-149, 128, 9), -127, -126, -125, 126, 127)
    thirds = (lambda a: 0., lambda a: -a, lambda a: a, lambda a: -3.4e38)
    for third_of, exponent in itertools.product(thirds, exponents):  # neighbours are of the same kind
        for mantissa, sign in itertools.product((1., 1. + step, 1. + 2 * step, 1.5, 2. - step), (1., -1.)):
            for i, j in ((0, 0), (1, -1), (1, 1), (-1, -1), (1, -2), (3, 5)):
                first, half = mantissa * 2. ** exponent, sign * 2. ** max(exponent - 24, -149)
                factors = 2. ** (exponent // 2) * (1. + i * step), half / 2. ** (exponent // 2) * (1. + j * step)
                rows.append((first, factors, third_of(first)))
    first, factors, third = zip(*rows)
    one = [1.] * len(rows)
    x = torch.tensor([first, [f[0] for f in factors], third, third], dtype=torch.float64).float()
    w = torch.tensor([one, [f[1] for f in factors], one, one], dtype=torch.float64).float()
    w[3] = -1.
    return x, w


def test_the_planted_sums_are_hard_to_round():
    x, w = sums_that_are_hard_to_round()
    twice = (x[0].double() + x[1].double() * w[1].double()).float()
    once = reference.fma(x[1], w[1], x[0])
    assert ((twice != once) & once.isfinite()).sum() > 300  # what two roundings get wrong
    tiny = torch.finfo(torch.float32).tiny
    assert ((once.abs() < tiny) & (once != 0)).sum() > 500 and once.isinf().sum() > 10


def convolve_by_every_body(image: torch.Tensor, weight: torch.Tensor, spec: ConvSpec):
    """Yield the name of each body and the float convolution (N, C_out, H', W') that it gives."""
    table = torch.zeros(2, table_stride(spec.c_out))
    arguments = (image, store(weight, spec, torch.float32), table, None)
    yield 'reference', reference.real_conv2d(*arguments, spec, [0., 0., 1.])
    try:
        for body in engine.info()['available']:
            engine.use_isa(body)
            yield body, real_conv2d(*arguments, spec.ints(), [0., 0., 1.])
    finally:
        engine.use_isa(None)


@needs_compiler
@pytest.mark.parametrize('kind', ['full', 'depthwise'])
def test_float_convolutions_round_each_product_and_sum_once(kind):
    x, w = sums_that_are_hard_to_round()
    if kind == 'depthwise':
        n = x.shape[1]
        spec = ConvSpec(n, n, Window((1, 4)), groups=n)
        image, weight = x.T.reshape(1, n, 1, 4), w.T.reshape(n, 1, 1, 4)
    else:  # every w meets every x
        w = w[:, ::5]
        spec = ConvSpec(4, w.shape[1])
        image, weight = x[:, ::2].reshape(1, 4, 1, -1), w.T.reshape(-1, 4, 1, 1)
    (_, expected), *results = convolve_by_every_body(image, weight, spec)
    for body, found in results:
        assert ((found == expected) | (found.isnan() & expected.isnan())).all(), body


@needs_compiler
@pytest.mark.parametrize('kind', ['full', 'depthwise'])
def test_a_sum_beyond_the_largest_float_does_not_come_back(kind):
    w = torch.tensor([[2. ** 100], [-2. ** 100]]).expand(2, 8)
    if kind == 'depthwise':
        spec, weight = ConvSpec(8, 8, Window((1, 2)), groups=8), w.T.reshape(8, 1, 1, 2)
        image = torch.full((1, 8, 1, 2), 2. ** 100)
    else:
        spec, weight, image = ConvSpec(2, 8), w.T.reshape(8, 2, 1, 1), torch.full((1, 2, 1, 8), 2. ** 100)
    for body, found in convolve_by_every_body(image, weight, spec):
        assert (found == float('inf')).all(), body


CPU_BITS = {  # EL_CPU_... of engine.h: flags of /proc/cpuinfo that each asks for
    1: 'avx avx2 fma popcnt', 2: 'avx512f avx512bw avx512vl avx512dq', 4: 'avx512_vpopcntdq', 8: 'avx512_vnni',
    16: 'asimd', 32: 'asimddp'}


@pytest.mark.skipif(not (CC and Path('/proc/cpuinfo').exists()), reason='asks Linux of the processor')
def test_the_features_of_the_processor_are_those_that_linux_tells():
    flags = set(re.search(r'^(?:flags|Features)\s*: (.*)', Path('/proc/cpuinfo').read_text(), re.M)[1].split())
    expected = sum(bit for bit, names in CPU_BITS.items() if flags.issuperset(names.split()))
    assert native.library().el_cpu() == expected


ENVIRONMENTS = {'address,undefined': {}, 'thread': {'TSAN_OPTIONS': 'halt_on_error=1'}}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize('kind', ENVIRONMENTS)
def test_sanitizers_find_nothing(tmp_path, kind):
    program = build(tmp_path, 'driver', *SANITIZERS, f'-fsanitize={kind}')
    fork = ['nofork'] if kind == 'thread' else []  # ThreadSanitizer does not follow a fork of several threads
    assert ': 0 wrong' in run(program, '400' if kind != 'thread' else '60', '11', *fork, **ENVIRONMENTS[kind])


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which('aarch64-linux-gnu-gcc') and shutil.which('qemu-aarch64')),
    reason='needs Debian\'s gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user')
def test_the_neon_bodies_are_right_under_an_emulator(tmp_path):
    program = build(tmp_path, 'driver', compiler=['aarch64-linux-gnu-gcc', '-static'])
    out = run('qemu-aarch64', '-cpu', 'max', program, '400', '3', 'nofork')
    assert 'bodies neondot neon portable: 0 wrong' in out
    out = run('qemu-aarch64', '-cpu', 'cortex-a53', program, '20', '3', 'nofork')  # without dot products
    assert 'bodies neon portable: 0 wrong' in out


TARGETS = {  # and what runs the driver there, if it is installed
    'x86_64-linux-gnu.2.17': [], 'aarch64-linux-gnu.2.17': ['qemu-aarch64', '-L', '/usr/aarch64-linux-gnu'],
    'x86_64-windows-gnu': ['wine'], 'x86_64-macos.11.0': None, 'aarch64-macos.11.0': None}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('ziglang'), reason='needs the package ziglang')
@pytest.mark.parametrize('target', TARGETS)
def test_the_sources_compile_without_a_warning_for_every_platform(tmp_path, target):
    runner = TARGETS[target]
    program = build(
        tmp_path, 'driver', compiler=[sys.executable, '-m', 'ziglang', 'cc', '-target', target, '-mcpu=baseline'])
    if runner is None or (runner and not shutil.which(runner[0])):
        return
    if not runner and (sys.platform != 'linux' or platform.machine() != 'x86_64'):
        return
    out = run(*runner, program, '100', '5', 'nofork')
    assert ': 0 wrong' in out
    if not runner:
        assert ' '.join(timm_el.engine.info()['available']) in out


@needs_compiler
@pytest.mark.parametrize('flags', [
    [], pytest.param([*SANITIZERS, '-fsanitize=address,undefined'], marks=pytest.mark.slow)])
def test_sums_of_int8_are_exact(tmp_path, flags):
    """Scales and sums of every instruction set, with NaN, infinities, zeros, denormals and ties among the inputs."""
    assert '200 cases: 0 wrong' in run(build(tmp_path, 'int8', *flags), '200')
