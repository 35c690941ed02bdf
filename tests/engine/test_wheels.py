"""Wheels for the platforms that people have, all built here: tags, files, oldest systems, and the same bits on each.

They need Zig, which the build fetches, and lief to look into libraries. Debian's libc6-arm64-cross with qemu-user and
wine run the libraries of other platforms.
"""
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from timm_el.engine import abi

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'build_tools'))
from el_compile import TARGETS, base_flags  # noqa: E402

SYSTEM_DLLS = re.compile(r'KERNEL32\.dll|msvcrt\.dll|ntdll\.dll|api-ms-win-.*\.dll|ucrtbase\.dll', re.IGNORECASE)
RUNNERS = {
    'linux-x86_64': [], 'linux-aarch64': ['qemu-aarch64', '-L', '/usr/aarch64-linux-gnu'], 'windows-amd64': ['wine']}


@pytest.fixture(scope='module', params=TARGETS)
def wheel(request, tmp_path_factory):
    """A platform, its wheel, and the library out of it."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / 'source'
    ignored = shutil.ignore_patterns(
        '.git', 'build', '*.egg-info', '_native.*', 'runtime.wasm', '__pycache__', '.*cache')
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run(
        [sys.executable, str(source / 'build_tools' / 'wheels.py'), '--output', str(folder), request.param], check=True)
    path = next(folder.glob('*.whl'))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / 'site')
    library = folder / 'site' / 'timm_el' / 'engine' / f'_native{TARGETS[request.param].suffix}'
    return request.param, path, library


def test_the_tag_names_the_platform_and_the_library_is_its_own(wheel):
    target, path, library = wheel
    assert path.name.endswith(f'-py3-none-{TARGETS[target].tag}.whl') and library.is_file()
    facts = next(path.parent.glob('site/*.dist-info/WHEEL')).read_text()
    tags = {f'Tag: py3-none-{tag}' for tag in TARGETS[target].tag.split('.')}
    assert set(re.findall('^Tag: .*', facts, re.M)) == tags
    assert len(list(library.parent.glob('_native*'))) == 1


def test_the_wheel_holds_the_runtime_of_web_pages(wheel):
    _, _, library = wheel
    web = library.parent / 'web'
    assert abi.source_hash().encode() in (web / 'runtime.wasm').read_bytes() and (web / 'index.html').is_file()


def test_the_library_runs_on_the_oldest_systems_that_the_tag_names(wheel):
    import lief
    target, _, library = wheel
    binary = lief.parse(str(library))
    if target.startswith('linux'):
        needed = {aux.name for need in binary.symbols_version_requirement for aux in need.get_auxiliary_symbols()}
        versions = {tuple(map(int, name[6:].split('.'))) for name in needed if name.startswith('GLIBC_')}
        assert versions and max(versions) <= (2, 17)
        assert all(re.fullmatch(r'lib(c|m|dl|pthread)\.so\.\d|ld-linux-.*', name) for name in binary.libraries)
    elif target.startswith('macos'):
        assert tuple(binary.build_version.minos)[:2] == (11, 0)
        assert [command.name for command in binary.libraries if not command.name.endswith(library.name)] == [
            '/usr/lib/libSystem.B.dylib']
        assert binary.has_code_signature or not target.endswith('arm64')  # Apple's processors run nothing without
    else:
        assert binary.header.machine == lief.PE.Header.MACHINE_TYPES.AMD64
        assert all(SYSTEM_DLLS.fullmatch(module.name) for module in binary.imports)


def test_the_library_gives_the_bits_of_this_machine(wheel, tmp_path):
    target, _, library = wheel
    if target not in RUNNERS:
        return  # nothing here runs a Mac's programs
    runner = RUNNERS[target]
    assert not runner or shutil.which(runner[0]), f'install {runner[0]} to prove {target}'
    here = probe(tmp_path / 'here', 'linux-x86_64', [], ROOT / 'timm_el' / 'engine' / abi.LIBRARY)
    there = probe(tmp_path / 'there', target, runner, library)
    assert there[0] == here[0] == abi.source_hash()
    bits = {line.split()[1] for line in [*here[1:], *there[1:]]}
    assert len(bits) == 1 and len(there) > 1


def probe(folder: Path, target: str, runner: list, library: Path) -> list:
    """Lines that probe.c prints: the hash, then each instruction set and a checksum of what it computed."""
    folder.mkdir()
    program = folder / 'probe.exe'
    links = ['-ldl'] if target.startswith('linux') else []
    subprocess.run(
        [sys.executable, '-m', 'ziglang', 'cc', '-target', TARGETS[target].triple, '-mcpu=baseline', *base_flags(),
         '-Wno-unused-command-line-argument', '-I', str(abi.KERNELS), str(Path(__file__).with_name('probe.c')), '-o',
         str(program), *links], check=True)
    shutil.copy(library, folder)
    result = subprocess.run([*runner, str(program), str(folder / library.name)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()
