"""What pip installs: the native library by every way in, with and without a compiler, or the reason for none."""
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import with_slow

import timm_el
from timm_el.engine import abi, native

ROOT = Path(__file__).parent.parent
NO_COMPILER = {'CC': 'no-such-compiler'}
README = (ROOT / 'README.md').read_text()


def run(*command: str, cwd: Path = None, **environment: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})
    assert result.returncode == 0, f'{command}\n{result.stdout}\n{result.stderr}'
    return result.stdout


def files_of_git() -> list:
    """What a commit of the checkout would hold."""
    listed = run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', cwd=ROOT)
    return [name for name in listed.split('\0') if name and (ROOT / name).exists()]


def checkout(folder: Path) -> Path:
    """A fresh checkout: the files of git, and nothing that a build has left."""
    for name in files_of_git():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def environment(folder: Path) -> dict:
    """A fresh virtual environment that shares what is installed here, but for timm_el; variables that activate it."""
    run(sys.executable, '-m', 'venv', str(folder))
    printed = run(str(folder / 'bin' / 'python'), '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))')
    (Path(printed.strip()) / 'shared.pth').write_text(sysconfig.get_path('purelib') + '\n')
    variables = {'PATH': f'{folder / "bin"}{os.pathsep}{os.environ["PATH"]}', 'PIP_NO_DEPS': '1', 'TIMM_EL_ISA': ''}
    return {**variables, 'PYTHONPATH': ''}


def body_in(printed: str) -> str:
    return re.search(r'engine (\w+),', printed).group(1)


def commands_of_readme() -> list:
    """The lines of README that install the package and run something."""
    return [line for line in README.splitlines() if re.match(r'pip install .*&& ', line)]


def test_readme_installs_and_runs_the_demo():
    assert 'pip install ".[demo]" && timm-el demo' in commands_of_readme()


FORMS = [('.[demo]', False), ('-e .[test]', True)]


@pytest.mark.parametrize('form, without_compiler', with_slow(FORMS, [(f, not w) for f, w in FORMS]))
def test_every_install_runs_the_kernels_from_every_folder(tmp_path, form, without_compiler):
    source, variables = checkout(tmp_path / 'source'), environment(tmp_path / 'venv')
    variables |= NO_COMPILER if without_compiler else {}
    run('pip', 'install', '-q', *form.split(), cwd=source, **variables)
    for command in (['timm-el'], ['python', '-m', 'timm_el']):
        for folder in (source, tmp_path):
            printed = run(*command, 'demo', '--epochs', '0', cwd=folder, **variables)
            assert body_in(printed) == timm_el.engine.info()['available'][0]


@pytest.mark.slow
def test_the_readme_command_works_in_an_empty_environment(tmp_path):
    """Nothing is shared: pip brings torch and the rest."""
    source = checkout(tmp_path / 'source')
    variables = environment(tmp_path / 'venv') | {'PIP_NO_DEPS': '0'}
    next((tmp_path / 'venv').rglob('shared.pth')).unlink()
    command = next(c for c in commands_of_readme() if c.endswith('demo'))
    printed = run('sh', '-c', f'{command} --epochs 0', cwd=source, **variables)
    assert body_in(printed) == timm_el.engine.info()['available'][0]


# ---------------------------------------------------------------------------------------------------------------------
# Wheels


def wheel(tmp_path: Path, source: Path, **variables: str) -> zipfile.ZipFile:
    out = tmp_path / 'out'
    run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', str(out), str(source), **variables)
    return zipfile.ZipFile(next(out.glob('*.whl')))


def expected_files() -> set:
    """Files of a wheel by what git has: the package, and hub/ as a part of it."""
    files = files_of_git()
    hub = [name for name in files if name == 'hub/manifest.json' or re.fullmatch(r'hub/[^/]+/.+', name)]
    return {name for name in files if name.startswith('timm_el/')} | {f'timm_el/_{name}' for name in hub}


def test_a_wheel_holds_the_files_of_git_and_the_library(tmp_path):
    """The build folder of an earlier state of the sources leaves nothing in it."""
    source = checkout(tmp_path / 'source')
    for folder in (source / 'build').glob('lib*'), [source / 'build' / 'lib']:
        for stale in folder:
            (stale / 'timm_el').mkdir(parents=True)
            (stale / 'timm_el' / 'old_name.py').write_text('')
    with wheel(tmp_path, source) as archive:
        assert '-py3-none-' in archive.filename and not archive.filename.endswith('-any.whl')
        names = {n for n in archive.namelist() if not n.startswith('timm_el-')}
    names.discard('timm_el/engine/web/runtime.wasm')  # there if pip has fetched Zig, for want of a C compiler
    assert names == expected_files() | {f'timm_el/engine/{name}' for name in (abi.LIBRARY, abi.RUNNER)}


def test_a_wheel_without_the_library_says_why(tmp_path):
    with wheel(tmp_path, checkout(tmp_path / 'source'), TIMM_EL_NATIVE='0') as archive:
        assert archive.filename.endswith('-py3-none-any.whl')
        assert not any(abi.LIBRARY in name for name in archive.namelist())
        archive.extractall(tmp_path / 'site')
    info = run(sys.executable, '-c', 'import timm_el; print(timm_el.__file__, timm_el.engine.info())', cwd=tmp_path,
               PYTHONPATH=str(tmp_path / 'site'), TIMM_EL_ISA='')
    assert str(tmp_path) in info and "'body': 'reference'" in info and 'TIMM_EL_NATIVE=0 was set' in info


def test_without_isolation_the_build_uses_what_is_there(tmp_path):
    """Neither a compiler nor Zig: the package installs, and says what to install for the kernels."""
    source = checkout(tmp_path / 'source')
    code = ("import runpy, sys; sys.path.insert(0, 'build_tools'); import el_compile; "
            "el_compile.zig_compiler = lambda target: None; "
            "sys.argv = ['setup.py', '-q', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')")
    run(sys.executable, '-c', code, cwd=source, **NO_COMPILER)
    assert not (source / 'timm_el' / 'engine' / abi.LIBRARY).exists()
    assert 'ziglang' in (source / 'timm_el' / 'engine' / abi.REASON).read_text()


def test_a_compiler_that_fails_on_the_kernels_is_an_error(tmp_path):
    source = checkout(tmp_path / 'source')
    (source / 'timm_el' / 'engine' / 'kernels' / 'plan.c').write_text('#error "broken"\n')
    result = subprocess.run(
        [sys.executable, 'setup.py', '-q', 'build_ext'], cwd=source, capture_output=True, text=True)
    assert result.returncode != 0 and 'broken' in result.stderr
    assert not (source / 'timm_el' / 'engine' / abi.LIBRARY).exists()


# ---------------------------------------------------------------------------------------------------------------------
# The loader

INFO = '''
import json, warnings, timm, timm_el
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    for _ in range(2):
        timm_el.deploy(timm.create_model('el_resnet20', num_classes=10).eval())
slow = [str(w.message) for w in caught if issubclass(w.category, timm_el.engine.SlowEngineWarning)]
print(json.dumps({**timm_el.engine.info(), 'slow': slow, 'file': timm_el.__file__}))
'''


def info_of(package_in: Path, **variables: str) -> dict:
    printed = run(sys.executable, '-c', INFO, cwd=package_in, **{
        'PYTHONPATH': str(package_in), 'TIMM_EL_ISA': '', **variables})
    found = json.loads(printed.splitlines()[-1])
    assert found['file'].startswith(str(package_in))
    return found


@pytest.fixture
def sources(tmp_path) -> Path:
    """A folder with the package, without its library."""
    shutil.copytree(ROOT / 'timm_el', tmp_path / 'timm_el', ignore=shutil.ignore_patterns('_native*', '__pycache__'))
    return tmp_path


def installed(folder: Path) -> Path:
    """A folder that looks like an installed timm-el, of which there is the library."""
    (folder / 'timm_el' / 'engine').mkdir(parents=True)
    shutil.copy2(ROOT / 'timm_el' / 'engine' / abi.LIBRARY, folder / 'timm_el' / 'engine')
    (folder / 'timm_el-9.dist-info').mkdir()
    (folder / 'timm_el-9.dist-info' / 'METADATA').write_text('Metadata-Version: 2.1\nName: timm-el\nVersion: 9\n')
    return folder


def test_sources_find_the_library_of_an_installed_distribution(sources, tmp_path):
    """The checkout's own egg-info comes first on the path and has none."""
    (sources / 'timm_el.egg-info').mkdir()
    (sources / 'timm_el.egg-info' / 'PKG-INFO').write_text('Metadata-Version: 2.1\nName: timm-el\nVersion: 9\n')
    site = installed(tmp_path / 'site')
    found = info_of(sources, PYTHONPATH=f'{sources}{os.pathsep}{site}')
    assert found['native'] and found['slow'] == []


def test_a_library_of_other_sources_is_refused_with_the_remedy(sources, tmp_path):
    with open(sources / 'timm_el' / 'engine' / 'kernels' / 'plan.c', 'a') as f:
        f.write('/* changed */\n')
    site = installed(tmp_path / 'site')
    found = info_of(sources, PYTHONPATH=f'{sources}{os.pathsep}{site}')
    assert found['body'] == 'reference'
    assert 'was built from other sources' in found['reason'] and 'install timm_el again' in found['reason']
    assert len(found['slow']) == 1 and found['reason'] in found['slow'][0]


def test_a_source_folder_that_was_never_installed_says_so(sources):
    # The environment's own timm-el may be one with a library: its distribution is hidden.
    code = "import importlib.metadata as m; m.distributions = lambda **k: []\n"
    (sources / 'sitecustomize.py').write_text(code)
    found = info_of(sources)
    assert found['body'] == 'reference' and 'pip install -e .' in found['reason'] and len(found['slow']) == 1


@pytest.mark.parametrize('isa, warns', [('portable', 0), ('reference', 0), ('', 0)])
def test_what_was_asked_for_is_not_warned_about(isa, warns):
    found = info_of(ROOT, TIMM_EL_ISA=isa)
    assert len(found['slow']) == warns and found['body'] == (isa or timm_el.engine.info()['available'][0])


def test_the_portable_body_is_warned_about_where_it_is_the_best(monkeypatch):
    monkeypatch.setattr(native, '_warned', False)
    monkeypatch.setattr(native, '_asked', False)
    monkeypatch.setattr(native, 'info', lambda: {'body': 'portable', 'reason': ''})
    with pytest.warns(timm_el.engine.SlowEngineWarning, match='no kernels for this processor'):
        native.warn_if_slow()
