"""Programs in C, each of a file of tests/kernels and the engine's kernels, which are compiled once for all of them."""
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1] / 'timm_el' / 'engine' / 'kernels'
MAINS = Path(__file__).parent / 'kernels'
FLAGS = (KERNELS / 'flags.txt').read_text().split()
STRICT = ['-Wall', '-Wextra', '-Werror']
CC = os.environ.get('CC') or shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')
SANITIZERS = ['-g', '-O1', '-fno-omit-frame-pointer', '-fno-sanitize-recover=all']

needs_compiler = pytest.mark.skipif(not CC, reason='no C compiler: the engine runs its reference')
_folders = []  # of objects, kept until the process ends


@functools.cache
def _objects(compiler: tuple[str, ...], kernels: Path) -> list[str]:
    _folders.append(tempfile.TemporaryDirectory())
    folder = _folders[-1].name
    sources = [str(path) for path in sorted(kernels.rglob('*.c'))]
    subprocess.run([*compiler, *FLAGS, *STRICT, f'-I{kernels}', '-c', *sources], cwd=folder, check=True)
    objects = [str(path) for path in sorted(Path(folder).iterdir())]
    assert len(objects) == len(sources)
    return objects


def build(
        folder: Path, main: str, *extra: str, helpers: Sequence[str] = (), compiler: Sequence[str] = (),
        kernels: Path = KERNELS) -> str:
    """Compile a main of tests/kernels with its helpers there, link it with the kernels, and return its path."""
    compiler = (*(compiler or [CC]), *extra)
    program = str(folder / f'{main}.exe')  # a name that Windows needs and nobody else minds
    mine = [str(MAINS / f'{name}.c') for name in (main, *helpers)]
    libraries = ['-lm', '-ldl'] if sys.platform == 'linux' and '-windows-' not in ' '.join(compiler) else ['-lm']
    subprocess.run(
        [*compiler, *FLAGS, *STRICT, f'-I{kernels}', '-o', program, *mine, *_objects(compiler, kernels), *libraries],
        check=True)
    return program


def run(*command: str, **environment: str) -> str:
    """Run a command to its end and return what it printed."""
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
