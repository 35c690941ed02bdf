"""Files that an earlier state of the package wrote load to the network that they were.

`tests/data/make_old_checkpoints.py` made them with the code of commit dd84043, and wrote down what that code computed.
"""
import json
import shutil

import pytest
import timm
import torch
from conftest import randomise
from data.make_old_checkpoints import NETS, OLD, RUN, UNPACKED, build, checksum, logits, write_colours
from timm.models import load_checkpoint

import timm_el
from timm_el import RECIPES, Recipe
from timm_el.experiments.config import FitConfig
from timm_el.experiments.fit import fit
from timm_el.training.telemetry import JsonLines

FACTS = json.loads((OLD / 'facts.json').read_text())
PACKED = [name for name in NETS if name not in UNPACKED]


def assert_is(model, recipe, state, expected) -> None:
    """Assert a model's recipe, the checksum of its state, and its outputs."""
    report = getattr(model, 'binarize_report', None)  # a ReActNet is not converted
    assert (report and report.recipe) == (recipe and Recipe.from_dict(recipe))
    assert checksum(model.state_dict()) == state
    torch.testing.assert_close(torch.tensor(logits(model)), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', RECIPES)
def test_recipes_and_their_codes_are_what_they_were(name):
    facts = FACTS['recipes'][name]
    assert Recipe.from_dict(facts['data']) == RECIPES[name] and RECIPES[name].code == facts['code']
    assert RECIPES[name].to_dict() == facts['data']


@pytest.mark.parametrize('name', NETS)
def test_a_checkpoint_of_timms_script(name):
    facts, path = FACTS['nets'][name], OLD / f'{name}.pth.tar'
    model = build(**NETS[name])
    load_checkpoint(model, str(path))
    assert_is(model, facts['recipe'], facts['state'], facts['logits'])
    if not NETS[name].get('convert'):
        model = timm.create_model(NETS[name]['model'], checkpoint_path=str(path), **NETS[name]['kwargs'])
        assert_is(model, facts['recipe'], facts['state'], facts['logits'])


@pytest.mark.parametrize('name', PACKED)
def test_a_packed_file(name, tmp_path):
    facts, path = FACTS['nets'][name], OLD / f'{name}.safetensors'
    model = timm_el.load_packed(randomise(build(**NETS[name])), path)
    assert_is(model, facts['recipe'], facts['packed_state'], facts['packed_logits'])
    timm_el.save_packed(model, tmp_path / 'again.safetensors')
    assert (tmp_path / 'again.safetensors').read_bytes() == path.read_bytes()


def test_a_hub_folder_of_a_converted_net():
    """Its architecture is the host's, so timm alone could not open it then, nor can it now."""
    facts = FACTS['hub']
    model = timm_el.from_hub(OLD / 'hub')
    assert_is(model, facts['recipe'], facts['state'], facts['logits'])


@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')  # timm's dataset leaves them open
def test_a_run_of_fit_goes_on(tmp_path):
    """One epoch of two was trained then, the second is now; rounding of another machine may move single signs."""
    run, images, facts = tmp_path / 'run', write_colours(tmp_path / 'images'), FACTS['run']
    shutil.copytree(OLD / 'run', run)
    assert checksum(torch.load(run / 'last.pth.tar', weights_only=False)['state_dict']) == facts['state']
    result = fit(FitConfig.from_dict(RUN), str(run), str(images), workers=0)
    assert [line['epoch'] for line in JsonLines.read(run / 'log.jsonl')] == [0, 1]
    for key, expected in facts['result'].items():
        assert key == 'seconds' or result[key] == pytest.approx(expected, rel=0.05), key
