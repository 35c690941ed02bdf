"""The job of the shipped weights, with a Python that only pretends: what it leaves behind when something goes wrong."""
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRETENDED = '''#!/bin/bash
case "$*" in
    *train.py*) mkdir -p out/el_resnet26; touch out/el_resnet26/last.pth.tar; {train} ;;
    *" eval "*) echo eval >> calls; {eval} ;;
    *) exec {python} "$@" ;;
esac
'''


def job(folder: Path, train: str = 'true', evaluation: str = 'false') -> int:
    """Run imagenette.sh for one network; `train` and `evaluation` stand for what train.py and `timm-el eval` do."""
    python = folder / 'bin' / 'python'
    python.parent.mkdir(exist_ok=True)
    python.write_text(PRETENDED.format(train=train, eval=evaluation, python='/bin/false'))
    python.chmod(0o755)
    env = {**os.environ, 'PATH': f'{python.parent}:{os.environ["PATH"]}', 'NETS': 'el_resnet26', 'SIZES': '128 160'}
    command = ['bash', ROOT / 'train_cfgs/imagenette.sh', 'data', 'out']
    return subprocess.run(command, cwd=folder, env=env, capture_output=True).returncode


def test_a_size_that_could_not_be_evaluated_ends_the_job_and_is_evaluated_again(tmp_path):
    for _ in range(2):
        assert job(tmp_path) != 0
        assert not list((tmp_path / 'out' / 'el_resnet26').glob('size_*.json'))
    assert (tmp_path / 'calls').read_text() == 'eval\n' * 2  # the first size, each time


@pytest.mark.parametrize('status', [0, 1])
def test_a_training_that_was_interrupted_is_not_finished(status, tmp_path):
    """By Ctrl-C, which the whole group of processes gets; train.py ends with 0 then."""
    assert job(tmp_path, train=f'kill -INT $PPID; exit {status}') != 0
    assert not (tmp_path / 'out' / 'el_resnet26' / 'finished').exists() and not (tmp_path / 'calls').exists()


def test_a_float_twin_of_a_lease_has_no_weights_to_evaluate(tmp_path):
    run = tmp_path / 'out' / 'el_resnet26'
    run.mkdir(parents=True)
    (run / 'finished').touch()
    assert job(tmp_path) == 0 and not (tmp_path / 'calls').exists()
