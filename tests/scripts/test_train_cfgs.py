"""The YAMLs of train_cfgs/ are read by timm's train.py: every key is one of its options, every value parses."""
import importlib.util
import os
import pathlib

import pytest
import timm
import yaml
from conftest import MODELS

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / 'train_cfgs').glob('*.yaml'))
# Options of the train.py of timm's sources, which no wheel of timm has: `sorted(action.dest for action in
# train_parser()._actions)` without 'help', a name a line. Where TIMM_SCRIPTS names those sources, the test compares.
OPTIONS = (pathlib.Path(__file__).parent / 'train_options.txt').read_text().split()
SCRIPTS = os.environ.get('TIMM_SCRIPTS')


def load(file: pathlib.Path) -> dict:
    return yaml.safe_load(file.read_text())


def train_parser():
    spec = importlib.util.spec_from_file_location('timm_train_script', os.path.join(SCRIPTS, 'train.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parser


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_every_key_is_an_option_of_train_py(file):
    cfg = load(file)
    assert set(cfg) <= set(OPTIONS)
    assert cfg['device_modules'] == ['timm_el'] and cfg['model'] in MODELS
    if SCRIPTS:
        parser = train_parser()
        assert {action.dest for action in parser._actions} - {'help'} == set(OPTIONS)
        parser.set_defaults(**cfg)
        args = vars(parser.parse_args(['--data-dir', 'somewhere']))
        actions = {action.dest: action for action in parser._actions}
        for key, value in cfg.items():
            assert args[key] == value and type(args[key]) is type(value)
            wanted = actions[key].type
            if wanted in (int, float) and not isinstance(value, list):
                assert isinstance(value, (int, float)), key


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_the_model_can_be_created_as_train_py_does(file):
    cfg = load(file)
    model = timm.create_model(
        cfg['model'], num_classes=cfg.get('num_classes'), in_chans=3, drop_rate=0., device='meta',
        **cfg.get('model_kwargs', {}))
    assert model.num_classes == cfg.get('num_classes', 1000)
    if 'kd_model_name' in cfg:
        name = cfg['kd_model_name']
        assert timm.is_model_pretrained(name.split('.')[0]) and name in timm.list_pretrained(name.split('.')[0] + '*')


@pytest.mark.parametrize('name', [name for name in MODELS if timm.get_pretrained_cfg(name).num_classes == 1000])
def test_the_papers_recipe_of_each_model(name):
    """A snapshot: the paper's schedule stands in a file for each model, and is the same in all."""
    cfg = load(ROOT / 'train_cfgs' / f'{name}_in1k.yaml')
    expected = dict(
        model=name, opt='adam', lr=0.001, epochs=100, batch_size=256, weight_decay=0.0, warmup_epochs=0, smoothing=0.0,
        sched='multistep', decay_rate=0.1)
    assert {key: cfg[key] for key in expected} == expected


def test_milestones_act_after_epochs_50_and_80():
    """timm's multistep acts at index m - 1: the 51st and the 81st epoch are the first with a smaller rate."""
    import torch
    from timm.scheduler import create_scheduler_v2
    cfg = load(ROOT / 'train_cfgs' / 'el_resnet26_in1k.yaml')
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=cfg['lr'])
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched=cfg['sched'], num_epochs=cfg['epochs'], decay_milestones=cfg['decay_milestones'],
        decay_rate=cfg['decay_rate'], warmup_epochs=cfg['warmup_epochs'])
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    assert len(rates) == 100
    assert rates[:50] == [1e-3] * 50 and rates[50:80] == pytest.approx([1e-4] * 30)
    assert rates[80:] == pytest.approx([1e-5] * 20)
