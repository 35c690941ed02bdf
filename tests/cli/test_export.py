"""`timm-el export`: files that give the network's bits without torch, and errors that name what to do."""
import importlib.util
import re
import shutil
import subprocess
import sys
import types
import venv
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import randomise
from PIL import Image
from timm.data import create_transform

import timm_el
from timm_el.__main__ import main
from timm_el.engine import abi, native
from timm_el.engine.standalone import write_python

SIZE = ['--size', '64', '64']


@pytest.fixture(scope='module')
def net():
    return randomise(timm.create_model('el_resnet18', num_classes=10)).eval()


@pytest.fixture(scope='module')
def packed(net, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'net.safetensors'
    timm_el.save_packed(net, path)
    return str(path)


@pytest.fixture(scope='module')
def folder(packed, tmp_path_factory):
    """What --python writes."""
    path = tmp_path_factory.mktemp('net') / 'in' / 'folders'
    assert main(['export', f'el_resnet18@{packed}', *SIZE, '--python', str(path)]) == 0
    return path


@pytest.fixture
def module(folder):
    return imported(folder)


def imported(folder):
    spec = importlib.util.spec_from_file_location('exported_net', folder / 'net.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(n: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn((n, 3, size, size), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------------------------
# A program file


@torch.no_grad()
def test_a_program_gives_the_bits_of_the_deployed_network(net, packed, tmp_path, capsys):
    path = tmp_path / 'net.program'
    assert main(['export', f'el_resnet18@{packed}', *SIZE, '-o', str(path)]) == 0
    program = timm_el.load_program(path)
    assert torch.equal(program(images()), timm_el.deploy(net)(images()))
    assert capsys.readouterr().out == (
        f'{path}: {path.stat().st_size:,} bytes, {len(program.program.steps)} steps, no islands\n')


@pytest.mark.parametrize('named', ['--checkpoint', '@'])
def test_weights_are_named_as_elsewhere(packed, tmp_path, named):
    words = ['el_resnet18', '--checkpoint', packed] if named != '@' else [f'el_resnet18@{packed}']
    assert main(['export', *words, *SIZE, '-o', str(tmp_path / 'a')]) == 0
    assert timm_el.load_program(tmp_path / 'a')(images()).shape == (2, 10)


def test_pretrained_weights_bring_their_labels_and_size(tmp_path):
    assert main(['export', 'el_resnet26.imagenette', '--pretrained', '-o', str(tmp_path / 'a')]) == 0
    program = timm_el.load_program(tmp_path / 'a')
    assert program.labels[3] == 'chain saw' and program.metadata['preprocess']['size'] == [160, 160]


@pytest.mark.parametrize('words, message', [
    ([], 'found no place to write to, expected -o FILE, --python DIR or --web DIR'),
    (['--to', 'onnx', '--python', 'x'], '--to onnx: found no file, expected -o FILE'),
    (['-o', 'no/where'], '-o no/where: found no folder no, expected one that is there'),
    (['-o', 'a', '--pretrained', '--checkpoint', 'b'], 'found both --pretrained and --checkpoint'),
    (['-o', 'a', '--checkpoint', 'nowhere'], "found no file 'nowhere'")])
def test_errors_say_what_was_expected(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['export', 'el_resnet18', *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count('\n') == 1 and not list(tmp_path.iterdir())


def test_a_page_is_written_by_its_own_module(tmp_path, monkeypatch, capsys):
    def write_web_page(model, folder, size):
        raise FileNotFoundError('runtime.wasm is not there')

    monkeypatch.setitem(sys.modules, 'timm_el.engine.web', types.SimpleNamespace(write_web_page=lambda *args: 1234))
    assert main(['export', 'el_resnet18', *SIZE, '--web', str(tmp_path)]) == 0
    assert capsys.readouterr().out == f'{tmp_path}: 1,234 bytes\n'
    sys.modules['timm_el.engine.web'].write_web_page = write_web_page
    assert main(['export', 'el_resnet18', '--web', str(tmp_path)]) == 2
    assert capsys.readouterr().err == 'timm_el export: runtime.wasm is not there\n'


def test_without_the_library_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native, '_lib', None)
    for words in (['-o', str(tmp_path / 'a')], ['--python', str(tmp_path / 'b')]):
        assert main(['export', 'el_resnet18', *SIZE, *words]) == 2
        assert 'needs the native library' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The C runner


@pytest.mark.parametrize('name', ['el_resnet18', 'el_mobilenet_v1'])
def test_the_runner_gives_the_bits_of_the_program(name, tmp_path):
    timm_el.export(randomise(timm.create_model(name, num_classes=10)).eval(), tmp_path / 'net.program', size=(64, 64))
    np.save(tmp_path / 'x.npy', images().numpy())
    printed = subprocess.run(
        [timm_el.engine.runner(), tmp_path / 'net.program', tmp_path / 'x.npy'], capture_output=True, text=True,
        check=True)
    found = np.array(printed.stdout.split(), np.float32).reshape(2, 10)
    assert np.array_equal(found, timm_el.load_program(tmp_path / 'net.program')(images().numpy()))


def test_the_c_program_of_the_documentation_runs(packed, tmp_path):
    compiler = shutil.which('cc')
    if compiler is None:
        pytest.skip('no C compiler')
    page = (Path(__file__).parents[2] / 'docs' / 'export.md').read_text()
    (tmp_path / 'main.c').write_text(re.search(r'```c\n(.*?)```', page, re.DOTALL)[1])
    library = native.library_path()
    subprocess.run(
        [compiler, '-Wall', '-Werror', '-I', abi.KERNELS, 'main.c', library, f'-Wl,-rpath,{library.parent}', '-o',
         'main'], cwd=tmp_path, check=True)
    run = [tmp_path / 'main']
    failed = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1 and 'cannot be read' in failed.stdout
    assert main(['export', f'el_resnet18@{packed}', *SIZE, '-o', str(tmp_path / 'net.program')]) == 0
    printed = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    logits = timm_el.load_program(tmp_path / 'net.program')(torch.zeros(1, 3, 64, 64))
    assert float(printed) == pytest.approx(logits[0, 0].item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Python without torch


def test_the_folder_has_a_module_that_gives_the_bits_of_the_program(folder, module):
    program = timm_el.load_program(folder / 'net.program')
    assert sorted(path.name for path in folder.iterdir()) == sorted([abi.LIBRARY, 'net.program', 'net.py'])
    for x in (images(), images(1, 32), images(3)[:, :, ::2]):
        assert np.array_equal(module.run(x.numpy()), program(x).numpy())
    assert module.run(images(0).numpy()).shape == (0, 10)


@pytest.mark.parametrize('channels, message', [
    (1, None), (4, 'mean and std of its 4 channels are not known; prepare images yourself')])
def test_pictures_of_other_than_three_channels_are_prepared_with_mean_and_std_of_their_own(channels, message, tmp_path):
    model = randomise(timm.create_model('el_resnet20', num_classes=3, in_chans=channels)).eval()
    assert write_python(model, tmp_path / 'folder') > 0
    module = imported(tmp_path / 'folder')
    picture = np.full((40, 40, channels), 128, np.uint8)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            module.classify(picture)
        return
    assert len(module.classify(picture[:, :, 0])) == 3
    mean, std = (np.mean(model.pretrained_cfg[name]) for name in ('mean', 'std'))
    assert module.preprocess(picture).flatten() == pytest.approx((128 / 255 - mean) / std, abs=1e-6)


def test_a_network_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError):
        write_python(timm.create_model('el_resnet20').train(), tmp_path / 'a' / 'b')
    assert not (tmp_path / 'a').exists()


def test_classify_gives_labels_and_probabilities(folder, module):
    picture = np.random.RandomState(0).randint(0, 256, (70, 90, 3), dtype=np.uint8)
    logits = torch.from_numpy(module.run(module.preprocess(picture)))
    expected = logits.softmax(1)[0].topk(5)
    assert [i for i, _ in module.classify(picture)] == expected.indices.tolist() and module.labels is None
    assert [p for _, p in module.classify(picture)] == pytest.approx(expected.values.tolist())
    module.labels = [f'class {i}' for i in range(10)]
    assert module.classify(picture, 1)[0][0] == f'class {expected.indices[0]}'


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('mode, size, shape', [
    ('center', (32, 32), (40, 50)), ('center', (32, 32), (80, 64)), ('center', (40, 64), (60, 97)),
    ('squash', (32, 48), (64, 97)), ('center', (32, 32), (20, 31))])
def test_pictures_are_prepared_as_timm_does(module, interpolation, mode, size, shape):
    how = {'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.3, 0.25), 'crop_pct': 0.8, 'crop_mode': mode,
           'interpolation': interpolation}
    module.metadata['preprocess'] = {**how, 'size': size}
    picture = np.random.RandomState(0).randint(0, 256, (*shape, 3), dtype=np.uint8)
    expected = create_transform(input_size=(3, *size), **how)(Image.fromarray(picture))
    assert np.array_equal(module.preprocess(picture), expected.numpy()[None])


@pytest.mark.parametrize('call, kind, message', [
    (lambda net: net.run(np.zeros((1, 3, 64, 64))), TypeError, 'an array of float64, expected a NumPy array of fl'),
    (lambda net: net.run([1.]), TypeError, 'found list, expected a NumPy array of float32'),
    (lambda net: net.run(np.zeros((3, 64, 64), np.float32)), ValueError, r'\(3, 64, 64\), expected \(N, 3, H, W\)'),
    (lambda net: net.run(np.zeros((1, 1, 64, 64), np.float32)), ValueError, r'expected \(N, 3, H, W\)'),
    (lambda net: net.run(np.zeros((1, 3, 0, 64), np.float32)), ValueError, 'net.program: .*found'),
    (lambda net: net.classify(np.zeros((9, 9, 3))), TypeError, 'found an array of float64, expected .* of uint8'),
    (lambda net: net.classify(np.zeros((9, 9), np.uint8)), ValueError, r'shape \(9, 9, 1\), expected \(H, W, 3\)')])
def test_what_does_not_fit_is_named(module, call, kind, message):
    with pytest.raises(kind, match=message) as error:
        call(module)
    assert 'net.program' in str(error.value)


def test_a_crop_that_is_not_known_is_named(module):
    module.metadata['preprocess'].update(crop_mode='border')
    with pytest.raises(ValueError, match="found crop_mode 'border', expected center or squash"):
        module.preprocess(np.zeros((9, 9, 3), np.uint8))


@pytest.mark.parametrize('name', ['net.program', abi.LIBRARY])
def test_a_folder_that_is_damaged_names_the_file(folder, tmp_path, name):
    for path in folder.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match=f'{name}: found no such file, expected what `timm-el export --python`'):
        imported(tmp_path)
    (tmp_path / name).write_bytes(b'damaged')
    with pytest.raises((ValueError, OSError), match=f'{name}.*found a file of 7 bytes|{name} does not load'):
        imported(tmp_path)


@pytest.mark.slow
def test_the_folder_needs_numpy_alone(folder, tmp_path):
    """In a fresh environment that has nothing but the files of NumPy."""
    venv.create(tmp_path / 'venv', with_pip=False)
    python = tmp_path / 'venv' / ('Scripts/python.exe' if sys.platform == 'win32' else 'bin/python')
    site = subprocess.run(
        [python, '-c', 'import sysconfig; print(sysconfig.get_path("platlib"))'], capture_output=True, text=True,
        check=True).stdout.strip()
    for package in ('numpy', 'numpy.libs'):
        source = Path(np.__file__).parent.parent / package
        if source.is_dir():
            (Path(site) / package).symlink_to(source)
    np.save(tmp_path / 'x.npy', images().numpy())
    code = '''
import sys
import numpy as np
import net
np.save(sys.argv[2], net.run(np.load(sys.argv[1])))
print(len(net.classify(np.zeros((50, 60, 3), np.uint8))))
print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'timm', 'timm_el', 'PIL'}))
'''
    printed = subprocess.run(
        [python, '-c', code, tmp_path / 'x.npy', tmp_path / 'y.npy'], cwd=folder, env={'PATH': ''}, capture_output=True,
        text=True)
    assert printed.stdout.split() == ['5', '[]'], printed.stderr
    assert np.array_equal(np.load(tmp_path / 'y.npy'), timm_el.load_program(folder / 'net.program')(images().numpy()))
