"""The shell verbs."""
import json
import subprocess
import sys

import pytest

from timm_el.__main__ import main
from timm_el.cli import VERBS


def test_no_verb_prints_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert 'usage: python -m timm_el VERB' in out and all(verb in out for verb in VERBS)
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
    assert stop.value.code == 0 and f'timm_el {verb}' in capsys.readouterr().out


def test_module_runs_as_a_program():
    run = subprocess.run([sys.executable, '-m', 'timm_el'], capture_output=True, text=True, check=True)
    assert 'demo' in run.stdout and run.stderr == ''


def test_summary_prints_json(capsys):
    main(['summary', 'resnet18', '--recipe', 'bireal', '--input-size', '3', '64', '64', '--json'])
    data = json.loads(capsys.readouterr().out)
    assert data['input_size'] == [3, 64, 64] and data['total']['bit_params'] == 10_985_472


def test_demo_trains_and_compares(capsys):
    """One short epoch on a basic-block net; accuracy is the business of the full demo."""
    main(['demo', '--model', 'el_resnet18', '--epochs', '1', '--compare', 'bireal'])
    out = capsys.readouterr().out
    assert 'held-out images:' in out and 'truly' in out and 'M OPs' in out
    assert 'el_resnet18 (el):' in out and 'el_resnet18 (bireal):' in out
