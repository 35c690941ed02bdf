"""Networks and units for the tests of the engine; not a test."""
import timm
import torch
import torch.nn as nn
from conftest import randomise

import timm_el
from timm_el.layers import BinaryConv2d, BinaryUnit, ElasticLink, RPReLU, Shift


def net(name: str, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(timm.create_model(name, **kwargs), seed).eval()


def unit(c_in=16, c_out=16, kernel=3, stride=1):
    return BinaryUnit(BinaryConv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2), nn.BatchNorm2d(c_out))


def unit_of(conv: nn.Module, **parts) -> BinaryUnit:
    return randomise(BinaryUnit(conv, **parts)).eval()


class Twice(nn.Identity):
    """An identity by its class alone."""

    def forward(self, x):
        return 2 * x - 1


UNITS = {
    'pad -1': lambda: unit_of(BinaryConv2d(20, 30, 3, padding=1, pad_value=-1)),
    'pad +1': lambda: unit_of(BinaryConv2d(20, 30, (3, 5), (2, 1), padding=(1, 2), pad_value=1, bias=False)),
    'reflect': lambda: unit_of(BinaryConv2d(20, 30, 3, padding=1, padding_mode='reflect', scale_input=True)),
    'circular': lambda: unit_of(BinaryConv2d(20, 20, 3, padding=2, padding_mode='circular'), act=nn.ReLU()),
    'same': lambda: unit_of(BinaryConv2d(20, 20, 3, 2, same_pad=True, scale_input=True), link=ElasticLink(20, 20, 2)),
    'uneven': lambda: unit_of(BinaryConv2d(20, 20, 4, padding='same')),
    'valid': lambda: unit_of(BinaryConv2d(20, 20, 3, padding='valid', dilation=2)),
    'grouped K': lambda: unit_of(
        BinaryConv2d(20, 30, 3, padding=1, groups=5, scale_input=True), norm=nn.BatchNorm2d(30)),
    'depthwise': lambda: unit_of(
        BinaryConv2d(20, 20, 5, padding=2, groups=20), norm=nn.BatchNorm2d(20), act=nn.PReLU(20)),
    'multiplier': lambda: unit_of(BinaryConv2d(20, 60, 3, padding=1, groups=20)),
    'shift': lambda: unit_of(BinaryConv2d(20, 20, 1), pre=Shift(20), post=RPReLU(20)),
    'shift, K': lambda: unit_of(BinaryConv2d(20, 20, 1, scale_input=True), pre=Shift(20)),
    'norm first': lambda: norm_first(unit_of(BinaryConv2d(20, 20, 3, padding=1), pre=nn.BatchNorm2d(20))),
    'group norm': lambda: unit_of(
        BinaryConv2d(20, 20, 3, padding=1), pre=nn.GroupNorm(1, 20), norm=nn.GroupNorm(4, 20)),
    'silu': lambda: unit_of(BinaryConv2d(20, 40, 1), norm=nn.BatchNorm2d(40), act=nn.SiLU(), link=ElasticLink(20, 40)),
    'act first': lambda: unit_of(
        BinaryConv2d(20, 20, 1), norm=nn.BatchNorm2d(20), act=nn.ReLU6(), act_first=True, link=ElasticLink(20, 20)),
    'tail': lambda: unit_of(
        BinaryConv2d(20, 20, 1), norm=nn.BatchNorm2d(20), act=nn.LeakyReLU(.3), tail=nn.AvgPool2d(2, 1, ceil_mode=True),
        link=nn.AvgPool2d(2, 1)),
    'pool': lambda: unit_of(BinaryConv2d(20, 9, 2, 2), link=ElasticLink(20, 9, pool=nn.MaxPool2d(2, 2))),
    'odd pool': lambda: unit_of(BinaryConv2d(20, 9, 3, 2, 1), link=ElasticLink(20, 9, pool=nn.AdaptiveMaxPool2d(5))),
    'module link': lambda: unit_of(BinaryConv2d(20, 30, 1), link=nn.Conv2d(20, 30, 1), post=RPReLU(30)),
    'real': lambda: unit_of(
        nn.Conv2d(20, 20, 3, 1, 1, groups=20), norm=nn.BatchNorm2d(20), act=nn.ReLU(), act_first=True,
        link=ElasticLink(20, 20)),
    'real grouped': lambda: unit_of(nn.Conv2d(20, 20, 3, 1, 1, groups=4), norm=nn.BatchNorm2d(20), act=nn.ReLU()),
    'identity link': lambda: unit_of(BinaryConv2d(20, 20, 1), norm=nn.BatchNorm2d(20), link=nn.Identity()),
    'own identities': lambda: unit_of(
        BinaryConv2d(20, 20, 1), norm=Twice(), act=Twice(), tail=Twice(), link=Twice(), pre=Twice(), post=Twice()),
    'own pool': lambda: unit_of(BinaryConv2d(20, 9, 1), link=ElasticLink(20, 9, pool=Twice())),
    'link only': lambda: unit_of(None, link=ElasticLink(20, 9)),
    'weights only': lambda: unit_of(BinaryConv2d(20, 30, 3, padding=1, input_quantizer=None), norm=nn.BatchNorm2d(30)),
    'weights only, same': lambda: unit_of(
        BinaryConv2d(20, 30, 3, 2, same_pad=True, input_quantizer=None), norm=nn.BatchNorm2d(30)),
    'standardized': lambda: unit_of(
        timm_el.layers.StandardizedBinaryConv2d(20, 30, 3, padding=1, scale=.3, has_gain=True, scale_input=True)),
}


@torch.no_grad()
def norm_first(unit: BinaryUnit) -> BinaryUnit:
    """Make half of the factors of a unit's first norm negative, and one 0."""
    unit.pre.weight[::2] *= -1
    unit.pre.weight[3] = 0
    return unit


def negative_norm(channels: int) -> nn.BatchNorm2d:
    """A norm half of whose factors are negative, and one 0."""
    return norm_first(BinaryUnit(nn.Identity(), pre=randomise(nn.BatchNorm2d(channels)))).pre
