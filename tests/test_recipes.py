"""Recipes are data: validated, immutable, equal to their JSON, and different from each other in what they compute."""
import dataclasses
import itertools
import json

import pytest
import timm
import torch

from timm_el import RECIPES, Recipe
from timm_el.recipes import get_recipe, role_of_shape

# Names for the same network: Table 2 calls Table 1's last row its baseline, Table 4 starts from it, and EL is EL_6.
EQUAL = [{'baseline', 's_resnet_k_s', 'first_binary'}, {'el', 'el_6'}]


@pytest.mark.parametrize('name', RECIPES)
def test_json_round_trip(name):
    recipe = RECIPES[name]
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert get_recipe(recipe.to_dict()) == recipe and get_recipe(recipe) is recipe and get_recipe(name) is recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = 'other'


def fingerprint(name: str):
    """Output, input gradient and parameter gradients by name, of a tiny bottleneck net with given weights."""
    torch.manual_seed(0)
    model = timm.create_model('el_resnet26', recipe=name, num_classes=3, layers=[1, 1, 1, 1], channels=[8, 16, 16, 16])
    g = torch.Generator().manual_seed(1)
    for key, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        if tensor.is_floating_point() and 'gamma' not in key:
            tensor.data.copy_(torch.rand(tensor.shape, generator=g) + (-0.5 if tensor.dim() > 1 else 0.5))
    x = torch.randn(2, 3, 64, 64, generator=g).requires_grad_()
    y = model.eval()(x)
    y.square().sum().backward()
    return y.detach(), x.grad, {k for k, p in model.named_parameters() if p.grad is not None}


def test_any_two_named_recipes_differ_or_are_named_as_equal():
    prints = {name: fingerprint(name) for name in RECIPES if name != 'el_mobilenet'}
    for a, b in itertools.combinations(prints, 2):
        same = all([
            torch.equal(prints[a][0], prints[b][0]), torch.equal(prints[a][1], prints[b][1]),
            prints[a][2] == prints[b][2]])
        assert same == any({a, b} <= group for group in EQUAL), (a, b)


def test_gamma_count_and_learnability_of_table_2():
    for name, links, learnable in [
            ('baseline', 0, False), ('el_1', 8, False), ('el_2', 16, False), ('el_3', 16, False), ('el_4', 16, False),
            ('el_5', 16, True), ('el_6', 16, True)]:
        model = timm.create_model('el_resnet26', recipe=name, device='meta')
        assert sum(k.endswith('gamma') for k in model.state_dict()) == links
        assert sum(k.endswith('gamma') for k, _ in model.named_parameters()) == links * learnable


def test_recipes_without_el4_keep_the_residual():
    el_3, el_4 = (timm.create_model('el_resnet26', recipe=r, device='meta') for r in ('el_3', 'el_4'))
    assert any('downsample' in k for k in el_3.state_dict()) and not any('downsample' in k for k in el_4.state_dict())


def test_stage_one_has_the_same_keys_and_real_weights():
    stage_two = timm.create_model('el_resnet26', device='meta')
    stage_one = timm.create_model('el_resnet26', real_weights=True, device='meta')
    assert list(stage_one.state_dict()) == list(stage_two.state_dict())
    assert stage_one.binarize_report.recipe == RECIPES['el'].with_real_weights()
    convs = [m for m in stage_one.modules() if hasattr(m, 'weight_quantizer')]
    assert convs and all(m.weight_quantizer is None and m.input_quantizer == 'ste' for m in convs)


@pytest.mark.parametrize('shape, role', [
    ((64, 16, (1, 1), (1, 1), 1), 'reduce'), ((16, 64, (1, 1), (2, 2), 1), 'expand'),
    ((8, 8, (1, 1), (1, 1), 1), 'mix'),
    ((8, 8, (3, 3), (2, 2), 1), 'spatial'), ((8, 8, (3, 3), (1, 1), 8), 'spatial'),
    ((8, 8, (3, 3), (2, 2), 8), 'downsample'), ((8, 16, (1, 7), (1, 1), 1), 'spatial'),
])
def test_role_of_a_shape(shape, role):
    assert role_of_shape(*shape) == role


@pytest.mark.parametrize('kwargs, message', [
    (dict(link=('foo',)), r"link: unknown role 'foo', expected some of \('reduce'"),
    (dict(scale_input='reduce'), r"scale_input: found 'reduce', expected a sequence of roles"),
    (dict(input_quantizer='relu'), "input_quantizer: unknown quantizer 'relu'"),
    (dict(gamma='no'), "gamma: found 'no', expected one of"),
    (dict(act='relu'), "act: found 'relu', expected one of"),
    (dict(omit=('reduce',)), r"omit: \['reduce'\] would leave nothing"),
    (dict(version=2), 'version: found 2, expected 1'),
    (dict(version=True), 'version: found True, expected an integer'),
    (dict(residual='no'), "residual: found 'no', expected True or False"),
    (dict(link=5), 'link: found 5, expected a sequence of roles'),
    (dict(input_quantizer=['ste']), r"input_quantizer: found \['ste'\]"),
    (dict(pre='batch'), r"pre: found 'batch', expected one of \(None, 'norm', 'shift'\)"),
    (dict(scale_output='K'), "scale_output: found 'K', expected one of"),
    (dict(link_pool='median'), "link_pool: found 'median', expected one of"),
    (dict(bases=(1,)), r'bases: found \(1,\), expected two positive integers'),
    (dict(bases=(0, 2)), r'bases: found \(0, 2\), expected two positive integers'),
    (dict(bases=5), r'bases: found 5, expected \(M, N\)'),
    (dict(bases=(1, 1), input_quantizer='approx'), "bases: the bases of an input are signs, found .*'approx'"),
    (dict(weight_quantizer='ternary'), "weight_quantizer: unknown quantizer 'ternary', expected .*'twn'"),
    (dict(weight_quantizer='twn'), "weight_quantizer: 'twn' is for real inputs, .*pass input_quantizer=None"),
])
def test_bad_recipe_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Recipe('mine', **kwargs)


def test_bad_recipe_argument_is_refused():
    with pytest.raises(ValueError, match="recipe: unknown name 'foo', expected one of host, s_resnet"):
        get_recipe('foo')
    with pytest.raises(ValueError, match="recipe: unknown field 'links'"):
        get_recipe({'name': 'x', 'links': []})
    with pytest.raises(ValueError, match="the field 'name' is missing"):
        get_recipe({})
    for data in (None, []):
        with pytest.raises(ValueError, match='recipe: found a'):
            Recipe.from_dict(data)
    with pytest.raises(TypeError, match='recipe: found a int'):
        get_recipe(3)
