"""Build of the engine's kernels with the package. Everything else about it is in pyproject.toml.

The result is a plain shared library, loaded with ctypes, so that one wheel of a platform serves every Python and torch,
and a program that runs exported networks without Python.

    TIMM_EL_NATIVE=0    build without the library
    TIMM_EL_TARGET=...  build for another platform, with Zig (a key of TARGETS in build_tools/el_compile.py)
"""
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / 'build_tools'))
import el_compile

ENGINE = Path('timm_el', 'engine')
TARGET = os.environ.get('TIMM_EL_TARGET')


class CleanBuild(build):
    """Empty the build folder first: a wheel must not hold files of an earlier state of the sources."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildKernels(build_ext):
    """Build library and runner into the package and, unless they are for another platform, beside its sources too.

    `python -m timm_el` in a checkout imports the sources, so the library has to be there as well. Where nothing can be
    built, a text file says why. Where Zig is installed, as for every wheel of build_tools/wheels.py, the web page's
    runtime is built too.
    """

    def get_ext_filename(self, fullname):
        abi = el_compile.load_abi()
        return str(ENGINE / (f'_native{el_compile.TARGETS[TARGET].suffix}' if TARGET else abi.LIBRARY))

    def build_extension(self, ext):
        abi, engine = el_compile.load_abi(), Path(self.build_lib) / ENGINE
        library = Path(self.build_lib, self.get_ext_filename(ext.name))
        runner = engine / (el_compile.TARGETS[TARGET].runner if TARGET else abi.RUNNER)
        reason = engine / abi.REASON
        web = engine / abi.WEB_RUNTIME.relative_to(abi.WEB_RUNTIME.parents[1])
        for path in (library, runner, reason, web):
            path.unlink(missing_ok=True)
        try:
            compiler = el_compile.find_compiler(TARGET)
        except el_compile.NoCompiler as e:
            print(f'timm_el: the kernels are not built: {e}')
            engine.mkdir(parents=True, exist_ok=True)
            reason.write_text(f'{e}\n')
        else:
            print(f'timm_el: the kernels are built by {" ".join(compiler.command)}')
            el_compile.compile_all(compiler, library, runner, Path(self.build_temp))
            self._build_web_runtime(web)
        if not TARGET:
            self._copy_beside_sources(library, runner, reason, web)

    def _build_web_runtime(self, path):
        try:
            el_compile.compile_web_runtime(path, Path(self.build_temp, 'web'))
        except el_compile.NoCompiler as e:
            print(f'timm_el: the runtime of web pages is not built: {e}')

    def _copy_beside_sources(self, *products):
        for path in products:
            beside = el_compile.ROOT / path.relative_to(self.build_lib)
            if path.resolve() == beside:
                continue
            beside.unlink(missing_ok=True)
            if path.exists():
                shutil.copy2(path, beside.with_suffix('.part'))
                os.replace(beside.with_suffix('.part'), beside)  # a process may run the old one

    def copy_extensions_to_source(self):
        """Do nothing: `build_extension` has put the library beside the sources, on every way of installing."""


class PlatformWheel(bdist_wheel):
    """Tag a wheel py3-none-PLATFORM if the library is in it, py3-none-any if not."""

    def get_tag(self):
        built = any(path.suffix != '.txt' for path in Path(self.bdist_dir).rglob('_native.*'))
        if not built:
            return 'py3', 'none', 'any'
        return 'py3', 'none', el_compile.TARGETS[TARGET].tag if TARGET else super().get_tag()[2]


setup(
    packages=[*find_packages(include=['timm_el', 'timm_el.*']), 'timm_el._hub'],
    ext_modules=[Extension('timm_el.engine._native', [])],
    cmdclass={'build': CleanBuild, 'build_ext': BuildKernels, 'bdist_wheel': PlatformWheel},
)
