"""Float checkpoints as latent initialisation; state dicts that do not fit are refused before anything is copied."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomise

import timm_el


def snapshot(model: nn.Module) -> dict:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize('name, host, kwargs', [
    ('el_resnet26', 'resnet26', {}), ('el_resnet18', 'resnet18', {}), ('el_resnet50', 'resnet50', dict(avg_down=True)),
    ('el_mobilenet_v1', 'mobilenetv1_100', {})])
def test_float_checkpoint_becomes_the_latent_initialisation(name, host, kwargs, tmp_path):
    torch.manual_seed(0)
    float_net = randomise(timm.create_model(host, **kwargs))
    model = timm_el.load_float(timm.create_model(name), float_net.state_dict())
    weights = {m.weight.numel(): m.weight for m in float_net.modules() if isinstance(m, nn.Conv2d)}
    ours = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    theirs = [m.weight for m in float_net.modules() if isinstance(m, nn.Conv2d)]
    assert weights and len(ours) == len(theirs)
    key = [(tuple(w.shape), w.sum().item()) for w in ours]
    assert sorted(key) == sorted((tuple(w.shape), w.sum().item()) for w in theirs)
    # The same through timm's own door.
    file = tmp_path / 'host.pth'
    torch.save(float_net.state_dict(), file)
    again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    assert all(torch.equal(a, b) for a, b in zip(
        [p for _, p in model.named_parameters()], [p for _, p in again.named_parameters()]))


def test_float_weights_land_where_binarize_puts_them():
    """Loading a host's checkpoint equals converting the loaded host."""
    host = randomise(timm.create_model('resnet26', avg_down=True)).eval()
    ours = timm_el.load_float(timm.create_model('el_resnet26', stride_first=False), host.state_dict()).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), timm_el.binarize(host)(x))


@pytest.mark.parametrize('recipe', ['el_4', 'first_el_minus', 'bireal'])
def test_float_checkpoint_for_recipes_that_leave_something_out(recipe):
    timm_el.load_float(timm.create_model('el_resnet26', recipe=recipe), timm.create_model('resnet26').state_dict())


def change(model: nn.Module, **changes) -> dict:
    state = dict(model.state_dict())
    state.update(changes)
    return {k: v for k, v in state.items() if v is not None}


@pytest.mark.parametrize('make, message', [
    (lambda: timm.create_model('resnet26').state_dict(),
     r'layer1.0.conv1.weight: .* float host, expected layer1.0.conv1.conv.weight; timm_el.load_float'),
    (lambda: timm.create_model('el_resnet26', recipe='bireal').state_dict(),
     r"layer1.0.conv1.link.gamma: .* another recipe than 'el' \(missing .*gamma and 15 more\); create .*recipe="),
    (lambda: timm.create_model('el_resnet26', recipe='el_4').state_dict(), 'another recipe'),
    (lambda: timm.create_model('el_resnet26', num_classes=7).state_dict(),
     r'fc.weight: found shape \(7, 2048\), expected \(1000, 2048\); .*num_classes='),
    (lambda: timm.create_model('el_resnet26', in_chans=1).state_dict(), r'conv1.weight: found shape .* in_chans='),
    (lambda: timm.create_model('reactnet_a').state_dict(), 'another model'),
    (lambda: change(timm.create_model('el_resnet26'), extra=torch.zeros(1)), 'extra: .*unknown extra'),
    (lambda: change(timm.create_model('el_resnet26'), **{'bn1.bias': None}), 'bn1.bias: .*missing bn1.bias'),
])
def test_unfit_checkpoints_are_refused_by_key_and_nothing_is_loaded(make, message):
    model = timm.create_model('el_resnet26')
    before = snapshot(model)
    with pytest.raises(timm_el.CheckpointError, match=message) as caught:
        model.load_state_dict(make())
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, RuntimeError)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name', ['el_resnet26', 'reactnet_a'])
def test_own_checkpoints_load_strictly_and_the_model_can_be_copied(name):
    source, target = randomise(timm.create_model(name)), timm.create_model(name)
    copy.deepcopy(target).load_state_dict(source.state_dict(), strict=True)
    wrapped = nn.ModuleDict({'module': target})
    wrapped.load_state_dict({f'module.{k}': v for k, v in source.state_dict().items()}, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters()))
    state = source.state_dict()
    state.pop('fc.weight')
    assert target.load_state_dict(state, strict=False).missing_keys == ['fc.weight']


def test_stage_one_loads_into_stage_two():
    one = randomise(timm.create_model('el_resnet26', real_weights=True))
    two = timm.create_model('el_resnet26')
    two.load_state_dict(one.state_dict(), strict=True)
