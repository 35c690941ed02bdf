"""Parameters, bits and operations against published and calculated figures."""
import json

import pytest
import timm
import torch
import torchvision
from conftest import EACH_MODEL

import timm_el


@pytest.mark.parametrize('name, recipe, params, mega_ops, mbit', [
    ('el_resnet18', 'bireal', 11_689_512, 163.98, 33.51),
    ('el_resnet34', 'bireal', 21_797_672, 192.89, 43.85),
    ('el_resnet26', 'el', 15_995_176 + 16, 505.2, 166.6),
    ('el_resnet50', 'el', 25_557_032 + 32, 532.5, 176.85),
    ('reactnet_a', None, 29_343_592, 87.13, None),
    ('reactnet_c', None, None, 213.57, None),
    ('el_reactnet_c', None, None, 213.57, None),
])
def test_check_values(name, recipe, params, mega_ops, mbit):
    model = timm.create_model(name, **({'recipe': recipe} if recipe else {}), device='meta')
    summary = timm_el.summarize(model)
    if params is not None:
        assert summary.params == params
    assert summary.ops / 1e6 == pytest.approx(mega_ops, rel=1e-3)
    if mbit is not None:
        assert summary.mbit == pytest.approx(mbit, rel=1e-3)


def test_macs_of_resnets():
    """Binary and float MACs of ResNet26/50 with the stride on the first 1x1."""
    for name, binary, real in (('el_resnet26', 1631e6, 479.7e6), ('el_resnet50', 3378e6, 479.7e6)):
        summary = timm_el.summarize(timm.create_model(name, device='meta'))
        assert summary.binary_macs == pytest.approx(binary, rel=1e-3)
        assert summary.real_macs == pytest.approx(real, rel=1e-3)


def test_link_ops_of_el_resnet50_are_the_papers_eight_million():
    summary = timm_el.summarize(timm.create_model('el_resnet50', device='meta'))
    assert summary.link_ops == 8_279_040
    one_by_one = sum(row.link_ops for row in summary.layers if '.conv2.' not in row.path)
    assert one_by_one == pytest.approx(6.90e6, rel=1e-3)


@pytest.mark.parametrize('name', EACH_MODEL)
def test_totals_add_up_and_match_the_model(name):
    model = timm.create_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    summary = timm_el.summarize(model)
    assert summary.params == sum(p.numel() for p in model.parameters())
    assert summary.bit_params == sum(
        m.weight.numel() for m in model.modules() if isinstance(m, timm_el.layers.BinaryConv2d))
    data = json.loads(json.dumps(summary.to_dict()))
    for key in ('bit_params', 'real_params', 'binary_macs', 'real_macs', 'link_ops'):
        assert data['total'][key] == sum(row[key] for row in data['layers'])
    text = str(summary)
    assert all(row.path in text for row in summary.layers) and f'{summary.ops / 1e6:.1f} M OPs' in text
    after = model.state_dict()
    assert model.training and all(torch.equal(before[k], after[k]) for k in before)
    assert not any(m._forward_hooks for m in model.modules())


def test_float_nets_are_counted_too():
    summary = timm_el.summarize(torchvision.models.resnet18(), (3, 224, 224))
    assert summary.params == 11_689_512 and summary.bit_params == summary.binary_macs == summary.link_ops == 0
    assert summary.real_macs == pytest.approx(1.814e9, rel=1e-3)  # torchvision's own figure for this model


def test_stage_one_and_weight_only_nets_have_no_binary_macs():
    stage_one = timm_el.summarize(timm.create_model('el_resnet18', real_weights=True, device='meta'))
    assert stage_one.binary_macs == stage_one.bit_params == 0
    weight_only = timm_el.RECIPES['el'].replace(name='weight_only', input_quantizer=None)
    summary = timm_el.summarize(timm.create_model('el_resnet18', recipe=weight_only, device='meta'))
    assert summary.binary_macs == 0 and summary.bit_params > 0


def test_input_size_defaults_to_the_models_own_and_is_checked():
    model = timm.create_model('el_resnet18', in_chans=1, device='meta')
    assert timm_el.summarize(model).input_size == (1, 224, 224)
    for bad in ((3, 224), (3, 224, -1), (3, 224, 22.5), 224, (3, True, 224)):
        with pytest.raises(ValueError, match='input_size: found'):
            timm_el.summarize(model, bad)
