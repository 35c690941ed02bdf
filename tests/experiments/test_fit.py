"""The trainer: resumed equals uninterrupted, stages follow each other, tables resume, statistics are what they say."""
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.utils import unwrap_model

import timm_el
from timm_el.__main__ import main
from timm_el.experiments import ablation as ablate
from timm_el.experiments import fit as trainer
from timm_el.experiments.config import FitConfig, load_config, plan_stages
from timm_el.experiments.fit import create_network, create_task, evaluate, fit, fit_stages
from timm_el.experiments.images import TensorImages, crop_and_flip, decode
from timm_el.experiments.runs import write_args
from timm_el.recipes import RECIPES
from timm_el.training.distillation import DistillationTask
from timm_el.training.telemetry import JsonLines
from timm_el.weights.files import read_packed

# timm's dataset leaves the files of images for the interpreter to close.
pytestmark = pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / 'train_cfgs' / 'fit').glob('*.yaml'))
RESULTS = sorted((ROOT / 'train_cfgs' / 'results').glob('*.jsonl'))
TINY = dict(
    model='el_resnet18', model_kwargs=dict(layers=[1, 1, 1, 1], channels=[8, 8, 16, 16]), num_classes=3, batch_size=8,
    epochs=3, lr=0.01)


@pytest.fixture
def folder(colours):
    return colours


def weights(run, key='state_dict'):
    return torch.load(run / 'last.pth.tar', weights_only=False)[key]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def test_a_run_whose_numbers_float16_cannot_hold_ends_with_bfloat16(folder, tmp_path, monkeypatch):
    def evaluated(task):
        model = unwrap_model(task.get_eval_model(ema=False)).eval()
        model.layer1[0].bn1.running_var.fill_(7e4) if hasattr(model.layer1[0].bn1, 'running_var') else (
            model.layer1[0].conv1.norm.running_var.fill_(7e4))
        return model

    monkeypatch.setattr(trainer, 'eval_model', evaluated)
    fit(FitConfig(**{**TINY, 'epochs': 1}), str(tmp_path), str(folder))
    tensors = read_packed(tmp_path / 'packed.safetensors')
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize('changes', [
    dict(pad_crop=4, model_ema=True, model_ema_decay=0.9, telemetry_interval=3, warmup_epochs=1),
    dict(images='memory', memory_size=40, scale=[0.35, 1.0], hflip=0.3, val_interval=1),
    dict(scale=[0.6, 1.0], opt='sgd', sched='multistep', decay_milestones=[1, 2], clip_latent=0.05,
         model_kwargs=dict(TINY['model_kwargs'], drop_path_rate=0.2)),
], ids=['pad_crop', 'memory', 'loader'])
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, changes):
    config = FitConfig.from_dict({**TINY, **changes})
    whole = fit(config, str(tmp_path / 'whole'), str(folder), workers=0)
    for stop in (1, 2, None, None):  # the last one finds nothing to do
        torch.manual_seed(123)
        parts = fit(config, str(tmp_path / 'parts'), str(folder), workers=0, stop_after=stop)
    assert {**whole, 'seconds': 0} == {**parts, 'seconds': 0}
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'parts'))
    if config.model_ema:
        averaged = weights(tmp_path / 'whole', 'state_dict_ema')
        assert same(averaged, weights(tmp_path / 'parts', 'state_dict_ema'))
        assert not same(averaged, weights(tmp_path / 'whole'))
    for file in ('log.jsonl', 'telemetry.jsonl'):
        records = [JsonLines.read(tmp_path / run / file) for run in ('whole', 'parts')]
        for lines in records:
            for line in lines:
                line.pop('seconds', None)
        assert records[0] == records[1] and len(records[0]) >= 3
    optimizers = [weights(tmp_path / run, 'optimizer')['state'] for run in ('whole', 'parts')]
    assert all(same(a, optimizers[1][i]) for i, a in optimizers[0].items() if 'step' in a or config.opt == 'sgd')


def test_what_an_unfinished_epoch_wrote_is_forgotten(folder, tmp_path):
    config = FitConfig.from_dict({**TINY, 'pad_crop': 4, 'epochs': 2})
    fit(config, str(tmp_path), str(folder), stop_after=1)
    for file in ('log.jsonl', 'telemetry.jsonl'):
        with open(tmp_path / file, 'a') as f:
            f.write(json.dumps(dict(epoch=1, seconds=1e9)) + '\n')
    assert fit(config, str(tmp_path), str(folder))['seconds'] < 1e9
    assert [line['epoch'] for line in JsonLines.read(tmp_path / 'telemetry.jsonl')] == [0, 1]


def test_a_run_learns_and_its_checkpoint_is_timms(folder, tmp_path):
    import timm
    config = FitConfig.from_dict({**TINY, 'pad_crop': 4, 'epochs': 8})
    result = fit(config, str(tmp_path), str(folder))
    assert result['top1'] > 80 and result['epoch'] == 7 and result['lr'] < 1e-9
    net = timm.create_model(
        'el_resnet18', num_classes=3, checkpoint_path=str(tmp_path / 'last.pth.tar'), **TINY['model_kwargs'])
    task = create_task(config, torch.device('cpu'))
    task.trainable_module = net
    images, labels = decode(str(folder), 'validation', 32, str(tmp_path), classes=3)
    val = TensorImages(images, labels, 8, config.mean, config.std)
    assert evaluate(task, val, torch.device('cpu'))['top1'] == pytest.approx(result['top1'])


def test_a_run_under_autocast_computes_in_bfloat16_and_keeps_float32_weights(folder, tmp_path):
    config = FitConfig.from_dict({**TINY, 'pad_crop': 4, 'epochs': 8})
    plain = fit(dataclasses.replace(config, epochs=1), str(tmp_path / 'plain'), str(folder))
    short = fit(dataclasses.replace(config, epochs=1, amp=True), str(tmp_path / 'short'), str(folder))
    assert short['train_loss'] != plain['train_loss']
    assert short['train_loss'] == pytest.approx(plain['train_loss'], rel=0.2)
    assert all(v.dtype != torch.bfloat16 for v in weights(tmp_path / 'short').values())
    assert fit(dataclasses.replace(config, amp=True), str(tmp_path / 'long'), str(folder))['top1'] > 80


def test_a_compiled_run_is_the_same_run(folder, tmp_path):
    config = FitConfig.from_dict({**TINY, 'pad_crop': 4, 'epochs': 2, 'model_ema': True, 'model_ema_decay': 0.5})
    compiled = dataclasses.replace(config, torchcompile='eager')  # captures graphs, and runs them op by op
    torch._dynamo.utils.counters.clear()
    plain = fit(config, str(tmp_path / 'plain'), str(folder))
    assert not torch._dynamo.utils.counters['stats']
    fit(compiled, str(tmp_path / 'compiled'), str(folder), stop_after=1)
    resumed = fit(compiled, str(tmp_path / 'compiled'), str(folder))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0
    assert {**plain, 'seconds': 0} == {**resumed, 'seconds': 0}
    for key in ('state_dict', 'state_dict_ema'):
        assert same(weights(tmp_path / 'plain', key), weights(tmp_path / 'compiled', key))


def test_rows_of_a_seed_start_equal_and_see_the_same_images(folder, tmp_path):
    nets = [create_network(FitConfig.from_dict({**TINY, 'recipe': recipe, 'model': 'el_resnet26', 'seed': 3}))
            for recipe in ('baseline', 'el_3', 'el_4', 'el_6', 'first_el_minus')]
    first = nets[0].state_dict()
    for net in nets[1:]:
        shared = [k for k in net.state_dict() if k in first and k.endswith('weight')]
        assert len(shared) > 10 and all(torch.equal(net.state_dict()[k], first[k]) for k in shared)
    other = create_network(FitConfig.from_dict({**TINY, 'model': 'el_resnet26', 'seed': 4}))
    assert not torch.equal(other.conv1.weight, nets[0].conv1.weight)
    images, labels = decode(str(folder), 'train', 32, str(tmp_path), classes=3)
    config = FitConfig.from_dict(TINY)

    def make(seed):
        return TensorImages(images, labels, 8, config.mean, config.std, seed, partial(crop_and_flip, pad=4))

    batches = list(make(0).epoch(1))
    torch.rand(5)
    assert all(torch.equal(a, b) for p, q in zip(batches, make(0).epoch(1)) for a, b in zip(p, q))
    for epoch, seed in ((2, 0), (1, 1)):
        assert not torch.equal(batches[0][0], next(make(seed).epoch(epoch))[0])


@pytest.mark.parametrize('changes, message', [
    (dict(lr=0.5), r'lr: found 0\.01 in .*args\.yaml.*expected 0\.5.*another --output'),
    (dict(recipe='bireal'), "recipe: found None in .*expected 'bireal'"),
    (dict(seed=1), 'seed: found 0 in'),
])
def test_a_run_with_other_arguments_is_not_resumed(folder, tmp_path, changes, message):
    fit(FitConfig.from_dict({**TINY, 'pad_crop': 4}), str(tmp_path), str(folder), stop_after=1)
    before = weights(tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(FitConfig.from_dict({**TINY, 'pad_crop': 4, **changes}), str(tmp_path), str(folder))
    assert same(before, weights(tmp_path))


@pytest.mark.parametrize('data, message', [
    (dict(lr='1e-3'), "lr: found '1e-3', expected a number; YAML takes 1e-3 for text"),
    (dict(learning_rate=0.1), 'learning_rate: no such field, expected some of model, recipe'),
    (dict(epochs=0), 'epochs: found 0, expected a positive integer'),
    (dict(epochs=True), 'epochs: found True'),
    (dict(input_size=[3, 'x', 3]), 'input_size'),
    (dict(amp=True, amp_dtype='float16'), "amp_dtype: found 'float16', expected 'bfloat16'"),
    (dict(torchcompile='inductr'), "torchcompile: found 'inductr', expected a backend of torch.compile: .*inductor"),
    (dict(sched='plateau'), "sched: found 'plateau'.*'constant'"),
    (dict(stages=[dict(name='a'), dict(name='a')]), "stages: found the name 'a'"),
    (dict(stages=[]), r'stages: found \[\], expected a list of mappings'),
    (dict(stages=[dict(name='a', initial_stage='b')]), "initial_stage: found 'b', expected an earlier stage"),
])
def test_a_config_that_makes_no_sense_is_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        plan_stages(data, 'out')


@pytest.mark.parametrize('changes, message', [
    (dict(attention_loss_weight=30.), 'teacher_model: found None'),
    (dict(teacher_kwargs=dict(layers=[1, 1, 1, 1])), 'teacher_kwargs: found .*expected teacher and teacher_checkpoint'),
])
def test_a_task_that_makes_no_sense_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        create_task(FitConfig.from_dict({**TINY, **changes}), torch.device('cpu'))


# ---------------------------------------------------------------------------------------------------------------------
# Stages

def test_three_steps_each_taught_by_the_one_before(folder, tmp_path):
    data = load_config(str(next(path for path in CONFIGS if path.stem == 'real_to_binary')))
    data = {**data, **TINY, 'epochs': 1}
    result = fit_stages(data, str(tmp_path), str(folder))
    assert result['epoch'] == 0 and [p.name for p in sorted(tmp_path.iterdir())] == [
        'activations', 'real', 'tanh', 'weights']
    configs = dict((pathlib.Path(run).name, config) for run, config in plan_stages(data, str(tmp_path)))
    for name, teacher in (('tanh', 'real'), ('activations', 'tanh'), ('weights', 'activations')):
        task = create_task(configs[name], torch.device('cpu'))
        assert isinstance(task, DistillationTask)
        assert same(task.teacher.model.state_dict(), weights(tmp_path / teacher))
        assert task.attention_loss_weight == (0 if name == 'weights' else 30)
        starts_as_teacher = same(task.trainable_module.state_dict(), task.teacher.model.state_dict())
        assert starts_as_teacher == (name == 'weights')  # same keys in both stages
    student, teacher = task.trainable_module, task.teacher.model
    assert student.layer1[0].conv1.conv.weight_quantizer == 'ste'
    assert teacher.layer1[0].conv1.conv.weight_quantizer is None


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_built(path):
    data = load_config(str(path))
    runs = [row for row in ablate.plan_rows(data).values()] if 'rows' in data else [
        {**config.to_dict(), 'initial_checkpoint': None} for _, config in plan_stages(data, 'out')]
    for fields in runs:
        fields = {k: v for k, v in fields.items() if k != 'paper'}
        kwargs = {**fields.get('model_kwargs', {}), 'device': 'meta'}
        create_network(FitConfig.from_dict({**fields, 'model_kwargs': kwargs}))


def test_the_tables_of_the_paper_are_whole():
    tables = {path.stem: load_config(str(path)) for path in CONFIGS if path.stem.startswith('paper_')}
    rows = {name: ablate.plan_rows(data) for name, data in tables.items()}
    assert set(rows) == {'paper_resnet26', 'paper_mobilenet_v1', 'paper_reactnet_c'}
    found = set(rows['paper_resnet26'])
    for name, row in rows['paper_resnet26'].items():  # of its own figures; a row of ours has none
        assert row['paper'] == (RECIPES[name].paper_top1 if name in RECIPES else None), name
    same = {'s_resnet_k_s': 'baseline', 'first_binary': 'baseline', 'el_6': 'el'}
    for a, b in same.items():  # rows of several tables that are one network
        assert RECIPES[a].replace(name=b, paper_top1=RECIPES[b].paper_top1) == RECIPES[b]
    of_tables = {name for name in RECIPES if name.startswith(('s_resnet', 'el_', 'first_'))} - set(same)
    assert found >= of_tables - {'el_mobilenet', 'el_r2b_rprelu'}
    systems = {'bireal', 'binarye', 'xnor', 'abc', 'tbn', 'xnor_pp', 'r2b', 'el_r2b', 'reactnet', 'host'}
    assert found >= systems | {'el'} and set(rows['paper_mobilenet_v1']) == systems | {'el_mobilenet'}
    for data in tables.values():  # what is named is run first
        named = [name for contrast in data['contrasts'] for name in contrast]
        names = [row if isinstance(row, str) else row['name'] for row in data['rows']]
        assert set(names[:len(set(named))]) == set(named)


# ---------------------------------------------------------------------------------------------------------------------
# Images

def test_crops_and_mirrors_are_those_of_the_padded_image():
    images = torch.arange(2 * 3 * 5 * 4, dtype=torch.uint8).reshape(2, 3, 5, 4).repeat(20, 1, 1, 1) + 1
    out = crop_and_flip(images, torch.Generator().manual_seed(0), 2)
    padded = torch.nn.functional.pad(images, [2] * 4)
    seen = set()
    for image, result in zip(padded, out):
        for top in range(5):
            for left in range(5):
                crop = image[:, top:top + 5, left:left + 4]
                for flip in (False, True):
                    if torch.equal(result, crop.flip(2) if flip else crop):
                        seen.add((top, left, flip))
                        break
    assert out.shape == images.shape and len(seen) > 15 and {s[2] for s in seen} == {False, True}
    assert all(any(torch.equal(result, p) for p in _views(image)) for image, result in zip(padded, out))


def _views(image):
    for top in range(5):
        for left in range(5):
            crop = image[:, top:top + 5, left:left + 4]
            yield from (crop, crop.flip(2))


def test_images_are_decoded_once_and_normalised(folder, tmp_path):
    images, labels = decode(str(folder), 'validation', 32, str(tmp_path), classes=3)
    assert images.dtype == torch.uint8 and images.shape == (15, 3, 32, 32) and labels.tolist() == sorted(labels)
    file = next(tmp_path.glob('*.pt'))
    torch.save((images, 2 - labels, []), file)
    assert torch.equal(decode(str(folder), 'validation', 32, str(tmp_path), classes=3)[1], 2 - labels)
    with pytest.raises(ValueError, match='found 3 classes'):
        decode(str(folder), 'validation', 32, str(tmp_path), classes=4)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    x, y = next(TensorImages(images, labels, 15, mean, std).epoch(0))
    expected = (images.float() / 255 - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
    assert torch.allclose(x, expected, atol=1e-6) and torch.equal(y, labels)
    assert decode(str(folder), 'validation', 16, str(tmp_path), classes=3)[0].shape == (15, 3, 16, 16)
    counts = [len(TensorImages(images, labels, 4, mean, std, augment=augment)) for augment in (None, crop_and_flip)]
    assert counts == [4, 3]  # training leaves the incomplete batch out


@pytest.mark.parametrize('changes, message', [
    (['--set', 'input_size=[3', '64'], "--set input_size: found '\\[3', expected YAML"),
    (['--set', 'stages=3'], 'stages: found 3, expected a list of mappings'),
    (['--set', 'input_size=[32, 32]'], 'input_size: found \\[32, 32\\], expected 3 numbers'),
    (['--set', 'warmup_epochs=2'], 'warmup_epochs: found 2, expected fewer than the 2 of epochs'),
])
def test_a_change_that_makes_no_sense_is_one_line_by_name(changes, message, folder, tmp_path, capsys):
    (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump({**TINY, 'epochs': 2}))
    argv = ['fit', str(tmp_path / 'tiny.yaml'), '--data-dir', str(folder), '--output', str(tmp_path / 'run')]
    assert main([*argv, *changes]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count('\n') == 1 and not (tmp_path / 'run').exists()


def test_a_start_that_was_refused_leaves_the_folder_free_for_the_right_arguments(folder, tmp_path):
    wrong = FitConfig.from_dict({**TINY, 'pad_crop': 4, 'epochs': 1, 'batch_size': 64})
    with pytest.raises(ValueError, match='batch_size: found 64'):
        fit(wrong, str(tmp_path), str(folder))
    assert not (tmp_path / 'args.yaml').exists()
    right = dataclasses.replace(wrong, batch_size=8)
    write_args(tmp_path, dataclasses.replace(right, epochs=2).to_dict())  # of a start before whose first epoch it ended
    assert fit(right, str(tmp_path), str(folder))['epoch'] == 0
    with pytest.raises(ValueError, match='epochs: found 1 in'):
        fit(dataclasses.replace(right, epochs=2), str(tmp_path), str(folder))


def test_arguments_that_were_lost_are_named(folder, tmp_path):
    config = FitConfig.from_dict({**TINY, 'pad_crop': 4, 'epochs': 1})
    fit(config, str(tmp_path), str(folder))
    (tmp_path / 'args.yaml').write_text('')
    with pytest.raises(ValueError, match='args.yaml: found a NoneType, expected the arguments of a run'):
        fit(config, str(tmp_path), str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Tables

TABLE = dict(TINY, pad_crop=4, epochs=1, rows=['el', dict(name='real', model='resnet18', recipe=None)],
             contrasts=[['el', 'real']])


def test_a_table_runs_resumes_and_prints(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump(TABLE))
    args = ['ablate', str(tmp_path / 'tiny.yaml'), '--data-dir', str(folder), '--output', str(tmp_path / 'out')]
    assert main([*args, '--seeds', '1']) == 0
    assert main([*args, '--seeds', '2']) == 0
    results = tmp_path / 'out' / 'results.jsonl'
    lines = JsonLines.read(results)
    assert [(line['seed'], line['row']) for line in lines] == [(0, 'el'), (0, 'real'), (1, 'el'), (1, 'real')]
    assert all(line['epochs'] == 1 and line['threads'] >= 1 and line['hardware'] for line in lines)
    assert str(tmp_path) not in results.read_text()  # no paths of this machine
    assert not list(tmp_path.glob('out/**/*.tar'))
    monkeypatch.setattr(ablate, 'fit', None)  # nothing is left to run
    assert main([*args, '--seeds', '2']) == 0
    (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump({**TABLE, 'epochs': 2}))
    assert main([*args, '--seeds', '2']) == 2
    assert 'epochs: found 1 in' in capsys.readouterr().err
    assert main(['ablate', str(tmp_path / 'tiny.yaml'), '--report', str(results)]) == 0
    printed = capsys.readouterr().out
    mean = statistics.fmean(line['top1'] for line in lines if line['row'] == 'el')
    assert f'| `el` | {mean:.2f} |' in printed and '| 64.0 |' in printed and '`el` - `real`' in printed


def test_a_table_takes_changes_and_records_them(folder, tmp_path, capsys):
    (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump(TABLE))
    args = ['ablate', str(tmp_path / 'tiny.yaml'), '--data-dir', str(folder), '--output', str(tmp_path / 'out'),
            '--seeds', '1', '--rows', 'el']
    assert main([*args, '--set', 'epochs=2', 'model_kwargs={layers: [1, 1, 1, 2]}']) == 0
    (line,) = JsonLines.read(tmp_path / 'out' / 'results.jsonl')
    assert line['epochs'] == 2
    assert line['command'].endswith("--rows el --seeds 1 --set epochs=2 'model_kwargs={layers: [1, 1, 1, 2]}'")
    run = yaml.safe_load((tmp_path / 'out' / 'el' / 'seed_0' / 'args.yaml').read_text())
    assert run['model_kwargs'] == dict(layers=[1, 1, 1, 2], channels=TINY['model_kwargs']['channels'])
    assert main([*args, '--set', 'model_kwargs={layers: [1, 1, 1, 2]}']) == 2
    assert 'epochs: found 2 in' in capsys.readouterr().err
    assert main([*args, '--set', 'epochs']) == 2
    assert "--set: found 'epochs', expected FIELD=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize('net', ['cifar10_resnet20', 'cifar10_resnet18'])
def test_the_tables_of_the_cifar_nets_take_their_steps(net, folder, tmp_path, capsys):
    changes = ['num_classes=3', 'batch_size=16', 'epochs=1', 'warmup_epochs=0', 'amp=false', 'torchcompile=null']
    if net == 'cifar10_resnet18':
        changes.append('model_kwargs={channels: [8, 16, 16, 16]}')
    assert main([
        'ablate', str(ROOT / f'train_cfgs/fit/{net}.yaml'), '--data-dir', str(folder), '--output', str(tmp_path),
        '--seeds', '1', '--set', *changes]) == 0
    lines = JsonLines.read(tmp_path / 'results.jsonl')
    assert [line['row'] for line in lines] == ['el', 'bireal', 'reactnet', 'el_r2b_rprelu', 'host']
    assert all(line['train_loss'] > 0 for line in lines) and '| AdaBin |' in capsys.readouterr().out


@pytest.mark.slow
def test_the_job_of_the_cifar_nets_trains_evaluates_and_writes_hub_folders(tmp_path):
    """Two recipes of el_resnet20 on noise of ten classes; run again, there is nothing left to do."""
    names = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    noise = np.random.RandomState(0)
    for split, name in itertools.product(('train', 'validation'), names):
        (tmp_path / 'data' / split / name).mkdir(parents=True)
        for i in range(4):
            image = Image.fromarray(noise.randint(0, 255, (32, 32, 3), dtype=np.uint8))
            image.save(tmp_path / 'data' / split / name / f'{i}.png')
    env = {**os.environ, 'NETS': 'resnet20', 'ROWS': 'el host',
           'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'}
    command = ['bash', ROOT / 'train_cfgs/cifar10_32px.sh', tmp_path / 'data', tmp_path / 'out', '--set', 'epochs=2',
               'batch_size=16', 'torchcompile=null', 'warmup_epochs=1', 'val_interval=2']
    for _ in range(2):
        subprocess.run(command, env=env, check=True)
        lines = JsonLines.read(tmp_path / 'out' / 'resnet20' / 'results.jsonl')
        assert [(line['row'], line['epochs']) for line in lines] == [('el', 2), ('host', 2)]
    found = json.loads((tmp_path / 'out' / 'resnet20' / 'el' / 'eval.json').read_text())
    assert list(found['forms']) == ['latent', 'packed', 'deployed', 'int8'] and found['images'] == 40
    model = timm_el.from_hub(tmp_path / 'out' / 'hub' / 'el_resnet20-el.cifar10')
    assert list(model.pretrained_cfg['label_names']) == names and model.pretrained_cfg['input_size'][-1] == 32
    assert not list(tmp_path.glob('out/hub/*host*')) and not list(tmp_path.glob('out/**/*.tar'))


def test_published_figures_stand_under_the_table_as_recalled():
    data = dict(rows=['el', dict(name='twin', recipe='host', paper=70.)], paper=None, published={'IE-Net': 88.5})
    text = ablate.report(data, [])
    assert '| `el` | not run | | 0 | |  |' in text and '| `twin` | not run | | 0 | | 70.0 |' in text
    assert text.endswith(
        '| published, as recalled, after trainings of their own | top-1 |\n|---|---|\n| IE-Net | 88.5 |')
    assert 'published' not in ablate.report(dict(rows=['el']), [])


@pytest.mark.parametrize('n, quantile', [(2, 12.7062), (3, 4.3027), (7, 2.4469), (20, 2.0930)])
def test_paired_statistics_are_those_of_students_t(n, quantile):
    """Quantiles of Student's t from a printed table, n - 1 degrees of freedom, two-sided 95 %."""
    differences = np.random.RandomState(n).randn(n) + 0.5
    mean, sd, t, interval = ablate.paired(differences.tolist())
    error = np.std(differences, ddof=1) / np.sqrt(n)
    assert mean == pytest.approx(differences.mean()) and sd == pytest.approx(np.std(differences, ddof=1))
    assert t == pytest.approx(mean / error)
    assert interval == pytest.approx((mean - quantile * error, mean + quantile * error), rel=1e-4, abs=1e-4)


def test_one_pair_has_no_interval_and_equal_ones_have_none_to_speak_of():
    with pytest.raises(ValueError, match='found 1, expected at least 2.*more seeds'):
        ablate.paired([1.])
    assert ablate.paired([2., 2.]) == (2., 0., float('inf'), (2., 2.))


def test_a_report_pairs_seeds_and_says_what_it_cannot():
    contrasts = [['el_3', 'baseline'], ['baseline', 'el_3'], ['el_3', 'el_4']]
    data = dict(rows=['el_3', 'baseline', 'el_4'], contrasts=contrasts)
    lines = [dict(row='el_3', seed=s, top1=50. + d, epochs=6) for s, d in enumerate((1., 2., 3.))]
    lines += [dict(row='baseline', seed=s, top1=40. + d, epochs=6) for s, d in ((2, 3.5), (0, 1.), (9, 90.))]
    text = ablate.report(data, lines)
    assert '| `el_3` | 52.00 | 1.00 | 3 | yes | 63.2 |' in text and '| `el_4` | not run | | 0 | | 59.2 |' in text
    assert '| `el_3` - `baseline` | +3.4 | +9.75 | 0.35 | +39.0 | +6.57 to +12.93 | 2 | agrees |' in text
    unsure = [dict(row='el_4', seed=s, top1=50. + d, epochs=6) for s, d in enumerate((0., 0., 4.))]
    assert '| +4.0 | +0.67 |' in ablate.report(data, lines + unsure)
    assert '| 3 | open |' in ablate.report(data, lines + unsure)
    assert '| 2 | disagrees |' in text and '| `el_3` - `el_4` | +4.0 |  | | | | 0 | open |' in text
    low = ablate.report(dict(rows=['el_3']), [dict(row='el_3', seed=0, top1=14., epochs=6)])
    assert 'does not converge' in low
    two = ablate.report(dict(rows=['el_3'], num_classes=2), [dict(row='el_3', seed=0, top1=74., epochs=6)])
    assert 'does not converge' not in two


@pytest.mark.parametrize('line, message', [
    (dict(row='el_4', seed=0, top1=50., epochs=6), "results: found row 'el_4', expected those of the table: el_3"),
    (dict(seed=0, top1=50., epochs=6), 'results: found row None'),
    (dict(row='el_3', seed=1, top1=50., epochs=12), 'results: found runs of 6 and 12 epochs, expected equal lengths')])
def test_lines_of_another_table_or_budget_are_not_reported(line, message):
    with pytest.raises(ValueError, match=message):
        ablate.report(dict(rows=['el_3']), [dict(row='el_3', seed=0, top1=50., epochs=6), line])


def test_a_result_replaces_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / 'results.jsonl'
    path.write_text('{"row": "el", "seed": 0}\n{"row": "el", "se')
    JsonLines.append(path, dict(row='bireal', seed=0))
    assert JsonLines.read(path) == [dict(row='el', seed=0), dict(row='bireal', seed=0)]
    path.write_text('{"row": "el"}\n{"row": {"row"\n')
    with pytest.raises(ValueError, match='results.jsonl, line 2: found .* expected a JSON object; delete the line'):
        JsonLines.read(path)
    JsonLines.append(tmp_path / 'new.jsonl', dict(row='el'))
    assert JsonLines.read(tmp_path / 'new.jsonl') == [dict(row='el')]


def test_a_finished_row_is_not_taken_over_into_a_table_of_another_length(folder, tmp_path, capsys):
    table = tmp_path / 'tiny.yaml'
    table.write_text(yaml.safe_dump({**TABLE, 'rows': ['el'], 'contrasts': []}))
    args = ['ablate', str(table), '--data-dir', str(folder), '--output', str(tmp_path / 'out'), '--seeds', '1']
    assert main(args) == 0
    shutil.rmtree(tmp_path / 'out' / 'el')  # with its arguments
    assert main([*args, '--set', 'epochs=2']) == 2
    assert "epochs: found a run of 1 of 'el' in" in capsys.readouterr().err
    assert main(['ablate', str(table), '--report', str(tmp_path / 'none.jsonl')]) == 2
    assert '--report: found no file' in capsys.readouterr().err


@pytest.mark.parametrize('results', RESULTS, ids=lambda path: path.stem)
def test_recorded_results_are_runs_of_their_table(results):
    table = load_config(str(ROOT / 'train_cfgs' / 'fit' / f'{results.stem}.yaml'))
    lines = JsonLines.read(results)
    report = ablate.report(table, lines)
    assert lines and not [line['row'] for line in lines if f"| `{line['row']}` | not run |" in report]
    assert len({(line['row'], line['seed']) for line in lines}) == len(lines)
    assert {line['row'] for line in lines} <= set(ablate.plan_rows(table))
    assert {line['epochs'] for line in lines} == {table['epochs']}


@pytest.mark.parametrize('changes, message', [
    (dict(rows=[]), "rows: found none.*'fit'"),
    (dict(rows=['el', 'el']), "rows: found the name 'el'"),
    (dict(rows=['el', 'birael']), "rows: found recipe 'birael' of 'birael', expected one of .*bireal"),
    (dict(contrasts=[['el', 'nothing']]), r"contrasts: found \['el', 'nothing'\], expected two names of .*: el, real"),
    (dict(contrasts=[['el', 'real', 'el']]), 'contrasts: found .* expected two names of rows'),
    (dict(contrasts=['el']), "contrasts: found 'el', expected two names of rows"),
    (dict(paper='64'), "el: found the figure '64', expected its top-1 in percent"),
    (dict(published={'IE-Net': 'high'}), "IE-Net: found the figure 'high', expected its top-1 in percent"),
])
def test_a_table_that_makes_no_sense_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        ablate.plan_rows({**TABLE, **changes})


def test_a_missing_folder_is_named(tmp_path, capsys):
    (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump(TABLE))
    assert main(['ablate', str(tmp_path / 'tiny.yaml')]) == 2
    assert '--data-dir: found none' in capsys.readouterr().err
