"""Leases: stages share their time, and what a stage made is handed over whole, whenever the end comes."""
import csv
import itertools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import pytest
import torch
import yaml

from timm_el.__main__ import main
from timm_el.experiments import fit as fitting
from timm_el.experiments import lease as leases
from timm_el.experiments.config import FitConfig
from timm_el.experiments.fit import epochs_in_time, fit, fit_stages
from timm_el.experiments.lease import Lease, LeaseEnded, epochs_within, hand_over
from timm_el.experiments.nets import Net
from timm_el.weights.files import save_packed

pytestmark = pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = dict(
    model='el_resnet18', model_kwargs=dict(layers=[1, 1, 1, 1], channels=[8, 8, 16, 16]), num_classes=3, batch_size=8,
    epochs=4, lr=0.01, images='memory', model_ema=True, model_ema_decay=0.9)
STAGES = {**TINY, 'stages': [{'name': 'first'}, {'name': 'second', 'recipe': 'bireal', 'share': 3.0}]}


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def ticking(seconds):
    """A lease whose clock goes on by a second with every look at it, which a run takes once a step."""
    return Lease(seconds, itertools.count().__next__)


def summary(folder):
    return {row['name']: row for row in csv.DictReader((folder / 'summary.csv').read_text().splitlines())}


def test_a_lease_is_over_when_its_seconds_are_or_a_signal_comes():
    clock = Clock()
    lease = Lease(10, clock)
    clock.now = 9.5
    assert lease.left() == 0.5
    lease.check()
    clock.now = 10
    with pytest.raises(LeaseEnded):
        lease.check()
    before = signal.getsignal(signal.SIGTERM)
    with Lease().ended_by() as lease:
        lease.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert lease.left() == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize('seconds, expected', [
    (1e9, 100),  # no more than asked for
    (200, 15),   # 190 s without what is spared: 15 x 10 s and 4 validations of 10 s; a 16th would end at 200 s
    (199, 14),
    (10, 1), (0, 1), (-50, 1)])
def test_as_many_epochs_as_there_is_time_for(seconds, expected):
    assert epochs_within(seconds, 100, 10., 10., val_interval=4) == expected


def test_epochs_come_of_the_measured_pace_and_stay_when_a_run_has_begun(colours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fitting, 'PACE_SECONDS', 0.02)
    config = FitConfig.from_dict({**TINY, 'epochs': 50})
    run, cache = tmp_path / 'run', str(tmp_path / 'cache')
    assert epochs_in_time(config, 1.0, Lease(1e6), str(run), str(colours), cache) == 50
    assert epochs_in_time(config, 0.0, Lease(1e6), str(run), str(colours), cache) == 1
    assert re.search(r'run: \d+ images/s, .* for 1 of 50 epochs', capsys.readouterr().out)
    assert not run.exists()  # nothing is left of measuring
    fit(FitConfig.from_dict({**TINY, 'epochs': 3}), str(run), str(colours), cache, stop_after=1)
    assert epochs_in_time(config, 1.0, Lease(1e6), str(run), str(colours), cache) == 3
    with pytest.raises(LeaseEnded):
        epochs_in_time(config, 1.0, Lease(0), str(tmp_path / 'other'), str(colours), cache)


@pytest.fixture
def no_measuring(monkeypatch):
    """Measuring that gives the number of epochs asked for, and writes down the shares."""
    shares = []
    monkeypatch.setattr(
        fitting, 'epochs_in_time', lambda config, share, *args, **places: shares.append(share) or config.epochs)
    return shares


def test_stages_share_what_is_left(colours, tmp_path, no_measuring):
    fit_stages(STAGES, str(tmp_path), str(colours), Lease())
    assert no_measuring == [0.25, 1.0]


def test_a_lease_that_ends_in_the_middle_costs_the_running_stage_alone(colours, tmp_path, no_measuring):
    """Four steps an epoch, 16 a stage: the second stage is cut in its third epoch, and goes on from its second."""
    run, out = tmp_path / 'runs', tmp_path / 'out'
    with pytest.raises(LeaseEnded):
        fit_stages(STAGES, str(run), str(colours), ticking(30), str(out))
    assert sorted(path.name for path in out.iterdir()) == ['first.tar.gz', 'second.tar.gz', 'summary.csv']
    rows = summary(out)
    assert rows['first']['state'] == 'finished' and rows['second']['state'] == 'unfinished'
    assert rows['first']['epochs'] == '4' and 0 < int(rows['second']['epochs']) < 4
    for name, state in (('first', 'finished'), ('second', 'unfinished')):
        with tarfile.open(out / f'{name}.tar.gz') as archive:
            assert sorted(archive.getnames()) == sorted(f'{name}/{file}' for file in (
                'args.yaml', 'log.jsonl', 'telemetry.jsonl', 'packed.safetensors', state))
            archive.extractall(tmp_path / 'unpacked', filter='data')
    for name, done in (('first', True), ('second', False)):  # which was cut behind its checkpoint
        assert Net.parse(str(tmp_path / 'unpacked' / name)).build().num_classes == 3
        save_packed(Net.parse(str(run / name)).build(), tmp_path / 'checkpoint', torch.float16)
        handed = (tmp_path / 'unpacked' / name / 'packed.safetensors').read_bytes()
        assert (handed == (tmp_path / 'checkpoint').read_bytes()) == done
    result = fit_stages(STAGES, str(run), str(colours), Lease(), str(out))
    assert {row['state'] for row in summary(out).values()} == {'finished'} and result['epoch'] == 3
    assert not list(out.glob('*.part'))
    uninterrupted = fit_stages(STAGES, str(tmp_path / 'whole'), str(colours))
    assert {**result, 'seconds': 0} == {**uninterrupted, 'seconds': 0}


def test_a_float_network_is_handed_over_without_packed_weights(colours, tmp_path):
    config = FitConfig.from_dict({**TINY, 'recipe': 'host', 'epochs': 1})
    fit(config, str(tmp_path / 'twin'), str(colours))
    with tarfile.open(hand_over(str(tmp_path / 'twin'), str(tmp_path / 'out'))) as archive:
        assert 'twin/packed.safetensors' not in archive.getnames() and 'twin/log.jsonl' in archive.getnames()


def test_an_archive_that_cannot_be_written_leaves_the_older_one(colours, tmp_path, monkeypatch):
    fit(FitConfig.from_dict({**TINY, 'epochs': 1}), str(tmp_path / 'run'), str(colours))
    path = hand_over(str(tmp_path / 'run'), str(tmp_path / 'out'))
    before = path.read_bytes(), (tmp_path / 'out' / 'summary.csv').read_bytes()

    def full(*args, **kwargs):
        raise OSError('no space left')

    monkeypatch.setattr(leases.tarfile.TarFile, 'addfile', full)
    with pytest.raises(OSError, match='no space left'):
        hand_over(str(tmp_path / 'run'), str(tmp_path / 'out'))
    assert (path.read_bytes(), (tmp_path / 'out' / 'summary.csv').read_bytes()) == before
    assert len(list((tmp_path / 'out').iterdir())) == 2


def test_the_verb_ends_in_time_and_says_so(colours, tmp_path, capsys, no_measuring, monkeypatch):
    (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump(STAGES))
    argv = ['fit', str(tmp_path / 'tiny.yaml'), '--data-dir', str(colours), '--output', str(tmp_path / 'runs'),
            '--hand-over', str(tmp_path / 'out')]
    monkeypatch.setattr('timm_el.cli.fit.Lease', ticking)
    assert main([*argv, '--budget', '30']) == 0
    assert 'the time is over; the same command goes on where it stopped' in capsys.readouterr().out
    monkeypatch.undo()
    assert main([*argv, '--set', 'lr=0.01', '--set', 'hflip=0.5']) == 0
    assert {row['state'] for row in summary(tmp_path / 'out').values()} == {'finished'}


def test_what_was_handed_over_as_finished_stays_so_whatever_comes_after(colours, tmp_path, no_measuring):
    run, out = str(tmp_path / 'runs'), tmp_path / 'out'
    fit_stages(STAGES, run, str(colours), Lease(), str(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match='lr: found'):
        fit_stages({**STAGES, 'lr': 0.5}, run, str(colours), Lease(), str(out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(LeaseEnded):
        fit_stages(STAGES, run, str(colours), Lease(0), str(out))
    assert {row['state'] for row in summary(out).values()} == {'finished'}


def test_a_run_is_not_handed_over_into_its_own_folder(colours, tmp_path):
    config = {**TINY, 'epochs': 1}
    with pytest.raises(ValueError, match='hand-over: found .*, the folder of a run, expected another one'):
        fit_stages(config, str(tmp_path / 'run'), str(colours), None, str(tmp_path / 'run') + '/')
    assert not (tmp_path / 'run').exists()


def test_a_warm_up_is_a_part_of_the_epochs_that_there_is_time_for(colours, tmp_path, monkeypatch):
    config = {**TINY, 'epochs': 100, 'warmup_epochs': 5}
    for epochs, expected in ((1, 0), (4, 1), (100, 5)):
        run = []
        monkeypatch.setattr(fitting, 'epochs_in_time', lambda *args, n=epochs, **places: n)
        monkeypatch.setattr(fitting, 'fit', lambda config, *args, run=run, **places: run.append(config) or {})
        fit_stages(config, str(tmp_path / 'run'), str(colours), Lease())
        assert (run[0].epochs, run[0].warmup_epochs) == (epochs, expected)


def test_fewer_images_than_a_batch_are_named(colours, tmp_path):
    with pytest.raises(ValueError, match='batch_size: found 37, more than there are images in train'):
        fit(FitConfig.from_dict({**TINY, 'batch_size': 37}), str(tmp_path), str(colours))


@pytest.mark.slow
def test_the_script_of_a_lease_ends_by_a_signal_and_goes_on(colours, tmp_path):
    """The command of the GPU, on a CPU with three classes: ended in a stage, run again, and ended by its budget."""
    tar, out = tmp_path / 'images.tar.gz', tmp_path / 'out'
    subprocess.run([sys.executable, ROOT / 'train_cfgs/pack_images.py', colours, tar, '--size', '32'], check=True)
    env = {**os.environ, 'DEVICE': 'cpu', 'WORK': str(tmp_path / 'work'), 'BENCH': 'el_resnet18',
           'BENCH_ARGS': '--batch 2 --size 32 --pairs 1 --warmup 0',
           'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'}
    command = ['bash', ROOT / 'train_cfgs/lease.sh', tar, out, '240', '--set', 'num_classes=3', 'batch_size=8',
               'input_size=[3, 32, 32]', 'epochs=2000', 'val_interval=1', 'warmup_epochs=0']
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "'epoch': 1" in line:
            process.send_signal(signal.SIGTERM)
            break
    assert 'the time is over' in process.stdout.read() and process.wait(60) == 0
    assert summary(out)['el_resnet26']['state'] == 'unfinished' and not list(out.glob('*.part'))
    shutil.rmtree(tmp_path / 'work' / 'runs')
    command[4] = '60'
    subprocess.run([*command, 'epochs=1'], env=env, check=True, timeout=300)
    assert summary(out)['el_resnet26']['state'] == 'finished'


def test_the_script_of_a_lease_refuses_early_a_device_that_is_not_there(tmp_path):
    env = {**os.environ, 'DEVICE': 'cuda:99', 'WORK': str(tmp_path / 'work'),
           'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'}
    run = subprocess.run(['bash', ROOT / 'train_cfgs/lease.sh', 'none.tar.gz', tmp_path / 'out', '10'], env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 1 and "lease: DEVICE: found 'cuda:99'" in run.stdout
