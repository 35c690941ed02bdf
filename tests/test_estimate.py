"""Hours and cost of a training, from the time of a step."""
import json
import pathlib

import pytest

from timm_el.__main__ import main
from timm_el.cli.estimate import estimate

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / 'train_cfgs'
CONFIG = {'model': 'net', 'epochs': 10, 'batch_size': 100, 'input_size': [3, 64, 64]}


def run(capsys, *argv) -> list:
    assert main(['estimate', *map(str, argv), '--json']) == 0
    return json.loads(capsys.readouterr().out)


def test_hours_are_steps_times_the_time_of_one():
    found = estimate(CONFIG, step_ms=360., images=100_050)
    assert found['steps'] == 10_000 and found['hours'] == pytest.approx(1) and found['cost'] is None
    shared = estimate(CONFIG, step_ms=360., gpus=4, images=100_050, price=2.)
    assert shared['batch_size'] == 25 and shared['hours'] == pytest.approx(1)
    assert shared['gpu_hours'] == pytest.approx(4) and shared['cost'] == pytest.approx(8)
    larger = estimate(CONFIG, step_ms=360., batch_size=100, gpus=4, images=100_000)
    assert larger['hours'] == pytest.approx(0.25) and larger['gpu_hours'] == pytest.approx(1)


def test_the_papers_training_on_eight_gpus(capsys):
    file = CONFIGS / 'el_resnet50_in1k.yaml'
    row, = run(capsys, file, '--step-ms', 100, '--gpus', 8, '--price', 3)
    assert row['model'] == 'el_resnet50' and row['steps'] == 100 * 5004
    assert row['hours'] == pytest.approx(500_400 * 0.1 / 3600) and row['cost'] == pytest.approx(row['hours'] * 24)
    main(['estimate', str(file), str(file), '--step-ms', '100'])
    out = capsys.readouterr().out
    assert 'all: 27.8 hours, 27.8 GPU hours' in out and 'not counted' in out


def test_a_bench_of_the_same_training_gives_the_time_of_a_step(tmp_path, capsys):
    file, config = tmp_path / 'bench.json', CONFIGS / 'el_resnet50_in1k.yaml'
    facts = {'model': 'el_resnet50', 'batch': 256, 'size': 224, 'model_ms': 80.}
    file.write_text(json.dumps(facts))
    assert run(capsys, config, '--bench', file)[0]['step_ms'] == 80
    file.write_text(json.dumps({**facts, 'size': 64}))
    assert main(['estimate', str(config), '--bench', str(file)]) == 2
    assert 'bench: found size 64' in capsys.readouterr().err
    file.write_text(json.dumps({**facts, 'batch': 32}))
    assert run(capsys, config, '--bench', file, '--gpus', 8)[0]['batch_size'] == 32


@pytest.mark.parametrize('argv, message', [
    (['nowhere.yaml', '--step-ms', '1'], "configs: found no file 'nowhere.yaml'"),
    ([CONFIGS / 'el_resnet50_in1k.yaml', '--step-ms', '-1'], 'step-ms: found -1.0, expected a positive number'),
    ([CONFIGS / 'el_resnet50_in1k.yaml', '--step-ms', '1', '--gpus', '7'], 'gpus: found 7, which do not share a batch'),
    ([CONFIGS / 'README.md', '--step-ms', '1'], 'README.md is no YAML with model, epochs'),
    ([CONFIGS / 'el_resnet50_in1k.yaml', '--bench', 'nowhere.json'], "bench: found no file 'nowhere.json'"),
])
def test_what_makes_no_sense_is_named(argv, message, capsys):
    assert main(['estimate', *map(str, argv)]) == 2
    assert message in capsys.readouterr().err
