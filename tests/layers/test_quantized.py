"""Contexts in which binary layers compute with other weights than their quantized ones."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_el.layers import BinaryConv2d, BinaryLinear, StandardizedBinaryConv2d, real_weights
from timm_el.layers.quantized import constant_weights
from timm_el.quantizers import sign

LAYERS = {
    'conv': (BinaryConv2d(8, 4, 3, padding=1), F.conv2d, dict(padding=1)),
    'conv with a bias': (BinaryConv2d(8, 4, 3, bias=True), F.conv2d, {}),
    'standardized': (StandardizedBinaryConv2d(8, 4, 1, bias=False), F.conv2d, {}),
    'linear': (BinaryLinear(8, 4), F.linear, {}),
}


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('grad', [True, False])
def test_real_weights_are_the_latent_ones(name, grad):
    layer, function, geometry = LAYERS[name]
    x = torch.randn(2, 8) if function is F.linear else torch.randn(2, 8, 5, 5)
    model = nn.Sequential(layer)
    with torch.set_grad_enabled(grad):
        before = model(x)
        with real_weights(model):
            found = model(x)
        torch.testing.assert_close(found, function(sign(x), layer.latent_weight(), layer.bias, **geometry))
        assert not torch.equal(found, before) and torch.equal(model(x), before)


@pytest.mark.parametrize('name', LAYERS)
def test_constant_weights_are_those_at_the_start(name):
    layer, function, _ = LAYERS[name]
    x = torch.randn(2, 8) if function is F.linear else torch.randn(2, 8, 5, 5)
    model = nn.Sequential(layer)
    before, weight = model(x).detach(), layer.weight.detach().clone()
    with constant_weights(model):
        layer.weight.data.neg_()
        assert torch.equal(model(x).detach(), before)
    assert not torch.equal(model(x), before)
    layer.weight.data.copy_(weight)
    assert torch.equal(model(x), before)


def test_weights_are_put_back_after_an_error():
    layer = BinaryConv2d(2, 2, 1)
    with pytest.raises(ZeroDivisionError), real_weights(layer):
        raise ZeroDivisionError
    assert 'quantized_weight' not in vars(layer) and layer.has_lean_form
