"""Builds the engine's kernels where there is a C compiler. Everything else about the package is in pyproject.toml.

The result is a plain shared library, loaded with ctypes: one wheel a platform serves every Python and torch. Without a
compiler the wheel is pure Python, and the engine runs its reference.
"""
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path('timm_el/engine/kernels')
SOURCES = [str(KERNELS / f'{name}.c') for name in (
    'bodies', 'plan', 'rows', 'conv', 'chain', 'threads', 'portable', 'avx2', 'avx512', 'neon')]
SUFFIX = {'win32': '.dll', 'darwin': '.dylib'}.get(sys.platform, '.so')


class BuildKernels(build_ext):
    """Compiles with the flags of kernels/flags.txt, which the test driver uses too, and goes on without a compiler."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split('.'))) + SUFFIX

    def get_export_symbols(self, ext):
        return None

    def build_extension(self, ext):
        flags = [flag for line in (KERNELS / 'flags.txt').read_text().splitlines() for flag in line.split()]
        ext.extra_compile_args = [*flags, '-fvisibility=hidden']
        ext.extra_link_args = ['-pthread', '-lm']
        try:
            super().build_extension(ext)
        except Exception as e:  # no compiler, or one that does not know these flags
            print(f'timm_el: the kernels were not built ({e}); the engine will run its reference')

    def copy_extensions_to_source(self):
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.exists():
                self.copy_file(str(built), self.get_ext_filename(ext.name))


class PlatformWheel(bdist_wheel):
    """py3-none-PLATFORM with the library, py3-none-any without."""

    def get_tag(self):
        built = any(Path(self.bdist_dir).rglob('_native' + SUFFIX))
        return ('py3', 'none', super().get_tag()[2] if built else 'any')


setup(
    ext_modules=[Extension('timm_el.engine._native', SOURCES, depends=[str(p) for p in KERNELS.glob('*.h')])],
    cmdclass={'build_ext': BuildKernels, 'bdist_wheel': PlatformWheel},
)
