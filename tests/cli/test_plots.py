"""The pictures: what they show, and what they refuse."""
import argparse
import math
import pathlib

import pytest
import timm
import torch
from conftest import randomise
from PIL import Image

import timm_el
from timm_el.__main__ import main
from timm_el.cli.plots import estimators, features, gamma, telemetry, tradeoff, training
from timm_el.experiments.config import FitConfig
from timm_el.experiments.fit import fit
from timm_el.experiments.nets import Net
from timm_el.experiments.photos import prepare, read
from timm_el.quantizers import QUANTIZERS
from timm_el.training.telemetry import JsonLines

# timm's dataset leaves the files of images for the interpreter to close.
pytestmark = pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
HEAD = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'


def draw(picture, *argv):
    """The figure that a command line gives, before it is saved."""
    parser = argparse.ArgumentParser()
    picture.add_arguments(parser)
    return picture.draw(parser.parse_args([str(a) for a in argv]))


def marks(axis) -> dict:
    """Data of each line by its label."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> pathlib.Path:
    """A Hub folder of a net with ten classes whose gammas have moved, and a card."""
    torch.manual_seed(0)
    model = randomise(timm.create_model('el_resnet26', num_classes=10, layers=[1, 1, 1, 1]))
    folder = tmp_path_factory.mktemp('nets') / 'trained'
    return timm_el.save_for_hub(
        model, folder, metrics={'top1': 62.5}, model_args={'layers': [1, 1, 1, 1]},
        pretrained_cfg={'input_size': (3, 32, 32)})


def test_a_picture_is_written_as_png_and_named(tmp_path, capsys):
    file = tmp_path / 'e.png'
    assert main(['plot', 'estimators', '--output', str(file), '--dpi', '50']) == 0
    assert capsys.readouterr().out.strip() == str(file)
    with Image.open(file) as image:
        assert image.format == 'PNG' and image.size == (400, 150)
    assert main(['plot', 'estimators', '--output', str(tmp_path / 'nowhere' / 'e.png')]) == 2
    assert 'output: found no folder' in capsys.readouterr().err
    again = tmp_path / 'again.png'
    main(['plot', 'estimators', '--output', str(again), '--dpi', '50'])
    assert again.read_bytes() == file.read_bytes()


def test_estimators_are_drawn_as_the_quantizers_compute_them():
    curves, slopes = (marks(axis) for axis in draw(estimators).axes)
    x, y = slopes['approx']
    assert set(slopes) == {name for name in QUANTIZERS if name} == set(curves) - {'Sign'}
    assert y[1000] == 2 and y[1250] == pytest.approx(1) and y[100] == 0  # at 0, 0.5, -1.8
    assert slopes['ste'][1][500] == slopes['ste'][1][1500] == 1 and slopes['ste'][1][1501] == 0  # -1, 1, beyond
    for name in ('ste', 'approx'):
        x, y = curves[name]
        assert y[0] == pytest.approx(-1, abs=2e-3) and y[-1] == pytest.approx(1, abs=2e-3)


def test_gammas_of_every_link_stand_side_by_side(trained):
    figure = draw(gamma, 'el_resnet26', 'el_resnet26@pretrained')
    before, after = (y for _, y in marks(figure.axes[0]).values())
    assert len(before) == len(after) == 16 and set(before) == {1.0, 2.0, 4.0}
    assert all(a != b for a, b in zip(before, after))
    model = timm_el.from_hub(trained)
    (_, found), = marks(draw(gamma, trained).axes[0]).values()
    assert found == [value.item() for name, value in model.named_parameters() if name.endswith('gamma')]
    with pytest.raises(ValueError, match='its links are not those of el_resnet26'):
        draw(gamma, 'el_resnet26', trained)
    with pytest.raises(ValueError, match='resnet18: found no link with a gamma'):
        draw(gamma, 'resnet18')


def test_feature_maps_are_those_of_the_layer_for_every_net(trained):
    argv = ['--layer', 'layer2', '--channels', 3, 0, '--img-size', 64]
    figure = draw(features, 'resnet26', trained, '--image', 'flower.jpg', *argv)
    assert len(figure.axes) == 6
    shown = figure.axes[4].images[0].get_array()
    model = timm_el.from_hub(trained).eval()
    x = prepare(model, read('flower.jpg'), 64)
    with torch.no_grad():
        expected = model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x[None]))))))[0, 3]
    assert shown.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="layer: ResNet has no module 'stage9', expected a path such as conv1"):
        draw(features, 'resnet26', '--layer', 'stage9')
    with pytest.raises(ValueError, match='expected 0 to 511 at layer2'):
        draw(features, 'resnet26', '--layer', 'layer2', '--channels', 512, '--img-size', 32)
    with pytest.raises(ValueError, match='nowhere.jpg: found no such file'):
        draw(features, 'resnet26', '--image', 'nowhere.jpg')


def test_training_curves_survive_a_resumed_job(tmp_path):
    file = tmp_path / 'some_run' / 'summary.csv'
    file.parent.mkdir()
    before, after = '0,2.0,2.1,10,50,0.1\n1,1.5,1.6,20,60,0.1\n', '1,1.4,1.5,30,60,0.1\n2,1,1.2,25,70,0\n'
    file.write_text(HEAD + before + HEAD + after)
    losses, top1 = (marks(axis) for axis in draw(training, file).axes)
    assert losses['some_run, training'] == ([0, 1, 2], [2.0, 1.4, 1.0])
    assert losses['some_run, validation'] == ([0, 1, 2], [2.1, 1.5, 1.2])
    assert top1 == {'some_run, best 30.00 %': ([0, 1, 2], [10, 30, 25])}
    for text, message in ((HEAD, 'at least one epoch'), ('a,b\n1,2\n', 'expected the columns epoch')):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            draw(training, file)
    with pytest.raises(ValueError, match='found no summary.csv or log.jsonl, expected the folder'):
        draw(training, tmp_path / 'nowhere.csv')


@pytest.fixture(scope='module')
def runs(tmp_path_factory, colours):
    """Folders of `fit`: a float net, Bi-Real and EL, two epochs each."""
    root = tmp_path_factory.mktemp('runs')
    net = dict(model='el_resnet26', model_kwargs={'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16]}, num_classes=3)
    for name, recipe in (('float', 'host'), ('bireal', 'bireal'), ('el', None)):
        config = FitConfig(**net, recipe=recipe, pad_crop=4, batch_size=8, epochs=2)
        fit(config, str(root / name), str(colours), cache=str(root / 'cache'))
    return [root / name for name in ('float', 'bireal', 'el')]


def test_telemetry_is_drawn_over_the_depth_with_a_line_for_each_record(runs):
    figure = draw(telemetry, *runs[1:])
    titles = [axis.get_title() for axis in figure.axes[::3]]
    assert titles == ['bireal: inputs whose sign is +1', 'el: inputs whose sign is +1']
    records = JsonLines.read(runs[2] / 'telemetry.jsonl')
    shares, flips, gammas = (marks(axis) for axis in figure.axes[3:])
    layers = [record['layers'] for record in records]
    assert len(records) == 2 and len(layers[0]) == 12
    for i in range(2):
        name = f'epoch {i}'
        assert shares[name] == (list(range(12)), [row['input_positive'] for row in layers[i].values()])
        assert flips[name] == (list(range(12)), [row['flip_ratio'] for row in layers[i].values()])
        assert gammas[name] == (list(range(8)), list(records[i]['gamma'].values()))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['epoch 0', 'epoch 1']
    with pytest.raises(ValueError, match='found no telemetry.jsonl with records, expected the folder of a run'):
        draw(telemetry, runs[0].parent)


def test_folders_of_fit_give_every_picture_of_trained_nets(runs):
    figure = draw(features, *runs, '--channels', 2, 1, '--img-size', 64)
    assert [figure.axes[i].get_ylabel() for i in (0, 3, 6)] == ['float', 'bireal', 'el']
    assert [axis.get_title() for axis in figure.axes[:4]] == ['', 'channel 2', 'channel 1', '']
    x = prepare(Net.parse(str(runs[2])).build(), read('china.jpg'), 64)
    expected = features.feature_maps(Net.parse(str(runs[2])).build(), 'layer1', x[None])[0, 2]
    assert figure.axes[7].images[0].get_array().tolist() == expected.tolist()
    logs = [JsonLines.read(run / 'log.jsonl') for run in runs]
    losses, top1 = (marks(axis) for axis in draw(training, *runs[:2], runs[2] / 'log.jsonl').axes)
    for name, log in zip(('float', 'bireal', 'el'), logs):
        assert losses[f'{name}, training'] == ([0, 1], [line['train_loss'] for line in log])
        assert losses[f'{name}, validation'][1] == [line['loss'] for line in log]
    assert [y for _, y in top1.values()] == [[line['top1'] for line in log] for log in logs]
    sizes, times = (marks(axis) for axis in draw(tradeoff, *runs, '--rounds', 1).axes)
    assert [label.partition(':')[0] for label in sizes] == ['float', 'bireal (deployed)', 'el (deployed)']
    assert [y for _, y in sizes.values()] == [[log[-1]['top1']] for log in logs]
    (before,), (after,) = (marks(draw(gamma, run).axes[0]).values() for run in (runs[2], runs[2]))
    assert before == after and len(before[1]) == 8


def test_curves_are_named_from_where_their_paths_part_and_may_diverge(tmp_path):
    for row in ('el', 'bireal'):
        (tmp_path / row / 'seed_0').mkdir(parents=True)
        (tmp_path / row / 'seed_0' / 'log.jsonl').write_text(
            '{"epoch": 0, "train_loss": null, "loss": 2.0, "top1": 10.0}\n')
    files = sorted(tmp_path.glob('*/seed_0/log.jsonl'))
    losses, _ = (marks(axis) for axis in draw(training, *files).axes)
    assert list(losses) == [f'{row}/seed_0, {what}' for row in ('bireal', 'el') for what in ('training', 'validation')]
    assert math.isnan(losses['el/seed_0, training'][1][0])
    (tmp_path / 'el' / 'seed_0' / 'log.jsonl').write_text('')
    with pytest.raises(ValueError, match='expected the columns epoch, train_loss, loss, top1 and at least one epoch'):
        draw(training, *files)


def test_tradeoff_shows_packed_size_and_the_cards_top1(trained):
    figure = draw(tradeoff, trained, '--rounds', 1)
    sizes, times = (marks(axis) for axis in figure.axes)
    (label, (size, top1)), = sizes.items()
    assert label.startswith('trained (deployed)') and top1 == [62.5]
    assert size[0] == pytest.approx((trained / 'model.safetensors').stat().st_size / 1e6, rel=0.01)
    (time, _), = times.values()
    assert f'{time[0]:.2f} ms' in label
    host = timm.create_model('resnet18')
    assert tradeoff.size_mb(host) == pytest.approx(4 * 11.7, rel=0.01)
    with pytest.raises(ValueError, match='resnet18: no top-1 is recorded beside its weights; add --data-dir'):
        draw(tradeoff, 'resnet18', '--rounds', 1)
