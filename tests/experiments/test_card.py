"""What a model card says of a run and its twins."""
import json

import pytest
import yaml

from timm_el.__main__ import main
from timm_el.experiments.card import training_log

ARGS = {'model': 'el_resnet18', 'model_kwargs': {}, 'epochs': 2, 'batch_size': 8, 'input_size': [3, 48, 48],
        'opt': 'adam', 'lr': 0.002, 'amp': True, 'model_ema': True, 'model_ema_decay': 0.99}
HEAD = 'epoch,train_loss,eval_loss,eval_top1\n'


def write(folder, rows, evaluated=None, **args):
    folder.mkdir()
    (folder / 'args.yaml').write_text(yaml.safe_dump({**ARGS, **args}))
    (folder / 'summary.csv').write_text(HEAD + rows)
    if evaluated:
        forms = {form: {'top1': top1, 'top5': top5} for form, (top1, top5) in evaluated.items()}
        (folder / 'eval.json').write_text(json.dumps({'size': [160, 160], 'forms': forms}))
    return folder


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / 'run', '0,2.5,2.25,12\n1,2.0,1.75,34\n', {'latent': (34.5, 80), 'deployed': (34.25, 81)})


def test_a_card_has_the_results_the_curve_and_the_twins_by_epoch(run, tmp_path):
    late = write(tmp_path / 'late', '1,1.0,0.5,56.125\n', {'latent': (57, 90)}, model_kwargs={'recipe': 'host'})
    early = write(tmp_path / 'early', '0,1.0,0.5,7\n')
    assert training_log(run, {'float': late, 'bireal': early}, 'By hand.\n') == '''\
## Results

| form | image | top-1 | top-5 |
|---|---|---|---|
| latent | 160x160 px | 34.50 | 80.00 |
| deployed | 160x160 px | 34.25 | 81.00 |
| float twin | 160x160 px | 57.00 | 90.00 |

## Training

By hand.

timm's `train.py`: model el_resnet18, input_size [3, 48, 48], epochs 2, batch_size 8, opt adam, lr 0.002, amp True, \
weights averaged with decay 0.99.

| epoch | training loss | loss | top-1 | float twin, top-1 | bireal twin, top-1 |
| --- | --- | --- | --- | --- | --- |
| 0 | 2.500 | 2.250 | 12.00 |  | 7.00 |
| 1 | 2.000 | 1.750 | 34.00 | 56.12 |  |'''


def test_a_run_that_was_not_evaluated_has_no_results(tmp_path):
    log = training_log(write(tmp_path / 'run', '0,2.5,2.25,12\n', model_ema=False))
    assert log.startswith('## Training') and 'averaged' not in log


@pytest.mark.parametrize('name, value', [
    ('epochs', 3), ('batch_size', 16), ('input_size', [3, 32, 32]), ('opt', 'sgd'), ('lr', 0.1)])
def test_a_twin_of_another_budget_is_refused_by_name(run, tmp_path, name, value):
    twin = write(tmp_path / 'twin', '0,1,1,1\n', **{name: value})
    with pytest.raises(ValueError, match=f'twin float: found {name} .* in .*twin, expected .* as in .*run; a twin is'):
        training_log(run, {'float': twin})


@pytest.mark.parametrize('argv, message', [
    (['--twin', 'runs/float'], "found 'runs/float', expected NAME=RUN"),
    (['--twin', 'float='], "found 'float=', expected NAME=RUN"),
    (['--twin', 'float=x'], "twin: found 'el_resnet18' as --model, expected the folder of a run"),
])
def test_a_twin_needs_a_name_and_a_run_to_stand_beside(argv, message, capsys):
    with pytest.raises(SystemExit):
        main(['push', 'me/net', '--model', 'el_resnet18', '--dry-run', *argv])
    assert message in capsys.readouterr().err
