"""Compilation of the kernels to the library, the command-line runner and WebAssembly: compilers, command lines.

Needs the standard library only, because the build backend asks here whether Zig has to be installed.
"""
import concurrent.futures
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
ZIG = 'ziglang>=0.13'


@dataclass(frozen=True)
class Target:
    """A platform that Zig builds the library for.

    Args:
        triple: Zig's name of it, with the oldest system that the library shall run on.
        tag: Platform tag of a wheel.
        suffix: Of the library's file name.
    """
    triple: str
    tag: str
    suffix: str

    @property
    def runner(self) -> str:
        """File name of the command-line runner."""
        return 'timm-el-run.exe' if self.suffix == '.dll' else 'timm-el-run'


TARGETS = {
    'linux-x86_64': Target('x86_64-linux-gnu.2.17', 'manylinux_2_17_x86_64.manylinux2014_x86_64', '.so'),
    'linux-aarch64': Target('aarch64-linux-gnu.2.17', 'manylinux_2_17_aarch64.manylinux2014_aarch64', '.so'),
    'macos-arm64': Target('aarch64-macos.11.0', 'macosx_11_0_arm64', '.dylib'),
    'macos-x86_64': Target('x86_64-macos.11.0', 'macosx_11_0_x86_64', '.dylib'),
    'windows-amd64': Target('x86_64-windows-gnu', 'win_amd64', '.dll'),
}

LINKS = ('-ldl', '-lm') if sys.platform == 'linux' else ('-lm',)

WEB_EXPORTS = (  # what web/program.js calls
    'el_aligned_alloc', 'el_aligned_free', 'el_open_memory', 'el_close', 'el_metadata', 'el_inputs', 'el_input',
    'el_outputs', 'el_shapes', 'el_make_ready', 'el_run_ready', 'el_hash')
WEB_STACK = 1 << 20  # bytes

TRIAL = '''
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
float trial(float x) { return fmaf(x, x, x) + (float)sizeof(pthread_mutex_t); }
'''


class NoCompiler(Exception):
    """There is nothing to compile with; the message is a reason that a user can act on."""


@dataclass(frozen=True)
class Compiler:
    """A C compiler: the words that begin its command line, and the name of the target it was told, if any."""
    command: tuple[str, ...]
    flags: tuple[str, ...] = ()
    links: tuple[str, ...] = LINKS

    @property
    def is_for_mac(self) -> bool:
        """True where it links for macOS, whose linker has options of its own."""
        target = self.command[-2] if '-target' in self.command else sys.platform
        return 'macos' in target or target == 'darwin'

    def run(self, *arguments: str, cache: Path) -> None:
        """Run it.

        Raises:
            subprocess.CalledProcessError: It found something wrong; it has printed what.
        """
        zig = {'ZIG_LOCAL_CACHE_DIR': str(cache), 'ZIG_GLOBAL_CACHE_DIR': str(cache)}
        subprocess.run([*self.command, *arguments], check=True, env={**os.environ, **zig})


def load_abi() -> ModuleType:
    """Load timm_el/engine/abi.py without the package around it."""
    spec = importlib.util.spec_from_file_location('timm_el_abi', ROOT / 'timm_el' / 'engine' / 'abi.py')
    abi = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(abi)
    return abi


def base_flags() -> list[str]:
    """Return the flags that every build of the kernels has, the test driver's too."""
    return (load_abi().KERNELS / 'flags.txt').read_text().split()


def host_target() -> str | None:
    """Return the key of `TARGETS` for this machine, or None."""
    system = {'Darwin': 'macos'}.get(platform.system(), platform.system().lower())
    machine = platform.machine().lower()
    machine = {'windows': {'x86_64': 'amd64'}, 'macos': {'aarch64': 'arm64'}}.get(system, {}).get(machine, machine)
    key = f'{system}-{machine}'
    return key if key in TARGETS else None


def system_compiler() -> Compiler | None:
    """Return a compiler that compiles and links one small file with our flags, or None.

    It is $CC if that is set, else cc, gcc or clang.
    """
    named = os.environ.get('CC')
    for command in [shlex.split(named)] if named else [['cc'], ['gcc'], ['clang']]:
        if not shutil.which(command[0]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, 'trial.c'), Path(folder, 'trial.out')
            source.write_text(TRIAL)
            tried = subprocess.run(
                [*command, *base_flags(), '-shared', str(source), '-o', str(library), *LINKS], capture_output=True)
            if tried.returncode == 0 and library.exists():
                return Compiler(tuple(command))
    return None


def zig_compiler(target: str) -> Compiler | None:
    """Return Zig's C compiler for a key of `TARGETS`, or None if Zig is not installed.

    Without a target and -mcpu=baseline Zig builds for the processor and the C library of the machine it runs on.
    """
    if importlib.util.find_spec('ziglang') is None:
        return None
    command = (sys.executable, '-m', 'ziglang', 'cc', '-target', TARGETS[target].triple, '-mcpu=baseline')
    links = ('-s', '-ldl', '-lm') if target.startswith('linux') else ('-s',)
    return Compiler(command, ('-Wno-unused-command-line-argument',), links)


def find_compiler(target: str | None = None) -> Compiler:
    """Return what to compile with: a compiler of this machine, else Zig.

    Args:
        target: Key of `TARGETS` to build for; None for this machine.

    Raises:
        NoCompiler: The user wants no library, or there is no compiler.
        ValueError: `target` is unknown.
    """
    if target is not None and target not in TARGETS:
        raise ValueError(f'TIMM_EL_TARGET: found {target!r}, expected one of {", ".join(TARGETS)}')
    if not is_wanted():
        raise NoCompiler('TIMM_EL_NATIVE=0 was set when timm_el was installed; install it again without that')
    found = system_compiler() if target is None else None
    zig_for = target or host_target()
    if found is None and zig_for is not None:
        found = zig_compiler(zig_for)
    if found is None:
        raise NoCompiler(
            'when timm_el was installed there was neither a C compiler that works (cc, gcc, clang or $CC) nor ziglang; '
            'install one of them (`pip install ziglang`) and timm_el again')
    return found


def is_wanted() -> bool:
    """Return whether the library shall be built: TIMM_EL_NATIVE=0 says no."""
    return os.environ.get('TIMM_EL_NATIVE', '1') != '0'


def zig_requirement() -> list[str]:
    """Return the requirement of Zig where a build on this machine needs it and there is a wheel of it, else nothing."""
    target = os.environ.get('TIMM_EL_TARGET')
    needed = is_wanted() and (target is not None or host_target() is not None and system_compiler() is None)
    return [ZIG] if needed else []


def compile_all(compiler: Compiler, library: Path, runner: Path, folder: Path) -> None:
    """Compile the kernels to the shared library `library` and to the program `runner`, which needs no library.

    Objects and caches go to `folder`.

    Raises:
        subprocess.CalledProcessError: The compiler found something wrong.
    """
    abi = load_abi()
    flags = [*base_flags(), *compiler.flags]
    for path in (library, runner):
        path.parent.mkdir(parents=True, exist_ok=True)
    objects = compile_objects(compiler, flags, abi.sources(), folder)
    runner_objects = compile_objects(compiler, flags, sorted((abi.KERNELS.parent / 'runner').glob('*.c')), folder)
    cache = folder / 'zig'
    compiler.run(*flags, '-shared', *objects, '-o', str(library), *compiler.links, cache=cache)
    unused = '-Wl,-dead_strip' if compiler.is_for_mac else '-Wl,--gc-sections'
    compiler.run(*flags, *objects, *runner_objects, '-o', str(runner), '-s', unused, *compiler.links, cache=cache)


def compile_web_runtime(output: Path, folder: Path) -> None:
    """Compile the kernels to WebAssembly, for the page that `timm_el.engine.web` writes.

    Objects and caches go to `folder`.

    Raises:
        NoCompiler: Zig is not installed.
        subprocess.CalledProcessError: The compiler found something wrong.
    """
    if importlib.util.find_spec('ziglang') is None:
        raise NoCompiler('there is no Zig; `pip install ziglang` and timm_el again')
    zig = Compiler((sys.executable, '-m', 'ziglang', 'cc', '-target', 'wasm32-wasi', '-mcpu=baseline+simd128'))
    flags = [flag for flag in base_flags() if flag not in ('-fPIC', '-pthread')]  # one module, one thread
    output.parent.mkdir(parents=True, exist_ok=True)
    objects = compile_objects(zig, flags, load_abi().sources(), folder)
    exports = [f'-Wl,--export={name}' for name in WEB_EXPORTS]
    zig.run(
        *flags, *objects, '-o', str(output), '-s', '-mexec-model=reactor', '-Wl,--gc-sections',
        f'-Wl,-z,stack-size={WEB_STACK}', *exports, cache=folder / 'zig')


def compile_objects(compiler: Compiler, flags: Sequence[str], sources: Sequence[Path], folder: Path) -> list[str]:
    """Compile C files, several at once, and return their objects in `folder`.

    Raises:
        subprocess.CalledProcessError: The compiler found something wrong.
    """
    abi = load_abi()
    folder.mkdir(parents=True, exist_ok=True)
    common = [
        *flags, '-fvisibility=hidden', '-ffunction-sections', '-fdata-sections', f'-I{abi.KERNELS}',
        f'-DEL_HASH="{abi.source_hash()}"']

    def compile_one(source: Path) -> str:
        made = str(folder / f'{source.parent.name}-{source.stem}.o')
        compiler.run(*common, '-c', str(source), '-o', made, cache=folder / 'zig')
        return made

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))
