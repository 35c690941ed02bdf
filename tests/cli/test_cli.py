"""The shell verbs."""
import json
import subprocess
import sys

import pytest
import timm
from PIL import Image

import timm_el
from timm_el.__main__ import main
from timm_el.cli import VERBS, demo
from timm_el.experiments.config import FitConfig
from timm_el.experiments.digits import HELD_OUT, digits_config, write_digits
from timm_el.experiments.photos import classify, find, label_names, prepare, read
from timm_el.models._pretrained import SHIPPED


def test_no_verb_prints_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert 'usage: timm-el VERB' in out and all(verb in out for verb in VERBS)
    assert main(['foo']) == 2
    assert "unknown verb 'foo'" in capsys.readouterr().err


@pytest.mark.parametrize('argv, message', [
    (['summary', 'no_such_model'], 'Unknown model (no_such_model)'),
    (['summary', 'resnet18', '--recipe', 'foo'], "recipe: unknown name 'foo'"),
    (['demo', '--compare', 'foo'], "recipe: unknown name 'foo'"),
])
def test_errors_are_one_line(argv, message, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count('\n') == 1 and captured.out == ''


@pytest.mark.parametrize('verb', VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, '--help'])
    assert stop.value.code == 0 and f'timm-el {verb}' in capsys.readouterr().out


def test_module_runs_as_a_program():
    run = subprocess.run([sys.executable, '-m', 'timm_el'], capture_output=True, text=True, check=True)
    assert 'demo' in run.stdout and run.stderr == ''


def test_summary_prints_json(capsys):
    main(['summary', 'resnet18', '--recipe', 'bireal', '--input-size', '3', '64', '64', '--json'])
    data = json.loads(capsys.readouterr().out)
    assert data['input_size'] == [3, 64, 64] and data['total']['bit_params'] == 10_985_472


def test_demo_classifies_photographs_by_name_and_compares_costs(tmp_path, capsys):
    """The user's images, alone and in folders, with the shipped weights."""
    (tmp_path / 'deep' / 'er').mkdir(parents=True)
    for name in ('one.png', 'deep/er/two.JPG'):
        Image.new('RGB', (50, 40), (90, 120, 250)).save(tmp_path / name)
    (tmp_path / 'deep' / 'notes.txt').write_text('no image')
    assert main(['demo', str(tmp_path / 'one.png'), str(tmp_path / 'deep'), '--epochs', '0']) == 0
    out = capsys.readouterr().out
    model = timm.create_model('el_resnet26', pretrained=True).eval()
    image = prepare(model, read(str(tmp_path / 'one.png')))
    (name, probability), *rest = classify(model, image)
    assert len(rest) == 2 and name in label_names(model) and sum(p for _, p in [(name, probability), *rest]) <= 1
    assert 'one.png: ' + name in out and f'two.JPG: {name}' in out and 'notes' not in out
    assert 'tench, English springer, cassette player, chain saw, church, French horn' in out
    rows = [line.split() for line in out.splitlines() if line.endswith(' MB')]
    assert [row[0] for row in rows] == ['float', 'latent', 'packed'] and rows[2][-2] == '4.52'


@pytest.mark.parametrize('path, message', [
    ('nowhere.jpg', 'nowhere.jpg: found no such file'), ('notes.txt', 'notes.txt: Pillow cannot read this'),
    ('half.png', 'half.png: Pillow cannot read this'),
    ('empty', 'empty: found no image in this folder')])
def test_what_is_no_image_is_named(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'notes.txt').write_text('no image')
    Image.new('RGB', (40, 40)).save(tmp_path / 'half.png')
    (tmp_path / 'half.png').write_bytes((tmp_path / 'half.png').read_bytes()[:60])
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'page.pdf').touch()  # Pillow writes such files, and reads none
    with pytest.raises(ValueError, match=message):
        [read(name) for name in find([path])]


def test_a_photograph_stands_upright(tmp_path):
    image, exif = Image.new('RGB', (20, 10)), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / 'a.jpg', exif=exif)
    assert read(str(tmp_path / 'a.jpg')).size == (10, 20)


def test_classes_have_names():
    assert label_names(timm.create_model('el_resnet26'))[207] == 'golden retriever'
    assert label_names(timm.create_model('el_resnet26', num_classes=3)) == ['class 0', 'class 1', 'class 2']
    shipped = timm.create_model('el_resnet26', pretrained=True)
    assert label_names(shipped) == label_names(timm_el.from_hub(SHIPPED / 'el_resnet26.imagenette'))
    assert label_names(shipped)[0] == 'tench' and len(find([])) == 2


# timm's dataset leaves the files of images for the interpreter to close.
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
def test_demo_trains_and_compares(capsys, monkeypatch):
    """Two steps on a basic-block net; accuracy is the business of the full demo."""
    monkeypatch.setattr(demo, 'ROUNDS', 1)
    assert main(['demo', '--model', 'el_resnet18', '--epochs', '1', '--compare', 'bireal', '--digits', '160']) == 0
    out = capsys.readouterr().out
    assert 'china.jpg: ' in out and 'flower.jpg: ' in out
    assert 'held-out digits after 1 epochs, seed 0' in out
    rows = [line.split() for line in out.splitlines() if line.startswith('el_resnet18 (')]
    assert [row[1] for row in rows] == ['(el)', '(bireal)'] and all(row[3] == '%' for row in rows)


def test_digits_are_each_in_one_split(tmp_path):
    write_digits(tmp_path, seed=3)
    names = {split: {path.name for path in (tmp_path / split).rglob('*.png')} for split in ('train', 'validation')}
    assert len(names['train']) == 1_797 - HELD_OUT and len(names['validation']) == HELD_OUT
    assert not names['train'] & names['validation']
    assert read(str(next((tmp_path / 'train' / '0').iterdir()))).size == (8, 8)
    few = FitConfig.from_dict(digits_config('el_resnet18', 'el', 1, 32, 0, limit=40))
    assert few.batch_size == 32  # as many as there are in train


def test_convert_prints_the_report_and_the_summary(capsys):
    options = ['--recipe', 'bireal', '--keep', 'layer4', '--input-size', '3', '64', '64']
    assert main(['convert', 'tv:resnet18', *options]) == 0
    out = capsys.readouterr().out
    assert 'recipe bireal' in out and "keep='layer4'" in out and '3x64x64 input' in out
    main(['convert', 'resnet18', '--json'])
    data = json.loads(capsys.readouterr().out)
    assert data['report']['total']['binarized'] == 16 and data['summary']['input_size'] == [3, 224, 224]
