"""The C sources by themselves: warnings are errors, their own driver finds nothing wrong, sanitizers neither."""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import timm_el
from timm_el.engine import native

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / 'timm_el' / 'engine' / 'kernels'
FLAGS = [flag for line in (KERNELS / 'flags.txt').read_text().splitlines() for flag in line.split()]
CC = os.environ.get('CC') or shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')


def build(folder: Path, compiler: str, *extra: str) -> str:
    program = str(folder / 'driver')
    sources = [str(path) for path in sorted(KERNELS.glob('*.c'))]
    subprocess.run(
        [compiler, *FLAGS, '-Wall', '-Wextra', '-Werror', *extra, '-o', program, *sources, '-lm'], check=True)
    return program


def run(*command: str, **environment: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_compiler_is_there_if_the_library_is():
    assert CC or not timm_el.engine.info()['native']


@pytest.mark.skipif(not CC, reason='no C compiler: the engine runs its reference')
def test_the_driver_finds_every_body_right(tmp_path):
    out = run(build(tmp_path, CC), '300', '7')
    assert ': 0 wrong' in out and ' '.join(timm_el.engine.info()['available']) in out


@pytest.mark.skipif(not CC, reason='no C compiler: the engine runs its reference')
def test_the_driver_sees_a_wrong_kernel(tmp_path):
    wrong = tmp_path / 'kernels'
    shutil.copytree(KERNELS, wrong)
    body = (wrong / 'body.h').read_text()
    assert '(n + n)' in body
    (wrong / 'body.h').write_text(body.replace('(n + n)', '(n + n + 1)'))
    program = str(tmp_path / 'wrong')
    subprocess.run([CC, *FLAGS, '-o', program, *map(str, wrong.glob('*.c')), '-lm'], check=True)
    result = subprocess.run([program, '40'], capture_output=True, text=True)
    assert result.returncode == 1 and 'differs' in result.stdout


CPU_BITS = {  # EL_CPU_... of engine.h: flags of /proc/cpuinfo that each asks for
    1: 'avx avx2 fma popcnt', 2: 'avx512f avx512bw avx512vl avx512dq', 4: 'avx512_vpopcntdq', 8: 'avx512_vnni',
    16: 'asimd', 32: 'asimddp'}


@pytest.mark.skipif(not (CC and Path('/proc/cpuinfo').exists()), reason='compares with what Linux tells')
def test_the_features_of_the_processor_are_those_that_linux_tells():
    flags = set(re.search(r'^(?:flags|Features)\s*: (.*)', Path('/proc/cpuinfo').read_text(), re.M)[1].split())
    expected = sum(bit for bit, names in CPU_BITS.items() if flags.issuperset(names.split()))
    assert native.library().el_cpu() == expected


SANITIZERS = {
    'address,undefined': {}, 'thread': {'TSAN_OPTIONS': 'halt_on_error=1'}}


@pytest.mark.slow
@pytest.mark.skipif(not CC, reason='no C compiler: the engine runs its reference')
@pytest.mark.parametrize('kind', SANITIZERS)
def test_sanitizers_find_nothing(tmp_path, kind):
    program = build(
        tmp_path, CC, '-g', '-O1', '-fno-omit-frame-pointer', f'-fsanitize={kind}', '-fno-sanitize-recover=all')
    fork = ['nofork'] if kind == 'thread' else []  # ThreadSanitizer does not follow a fork of several threads
    assert ': 0 wrong' in run(program, '400' if kind != 'thread' else '60', '11', *fork, **SANITIZERS[kind])


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which('aarch64-linux-gnu-gcc') and shutil.which('qemu-aarch64')),
    reason='needs Debian\'s gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user')
def test_the_neon_body_is_right_under_an_emulator(tmp_path):
    program = build(tmp_path, 'aarch64-linux-gnu-gcc', '-static')
    out = run('qemu-aarch64', program, '400', '3', 'nofork')
    assert 'bodies neon portable: 0 wrong' in out
