"""binarize() by data flow: pairing, activations, links and shortcuts of nets that no table describes."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_el
from timm_el.cli.sweep import build, positive_shares, randomise_norms, sweep_one
from timm_el.layers import BinaryUnit

FEW = ['regnety_002', 'densenet121', 'mobilenetv2_100', 'vgg11', 'res2net50_26w_4s', 'repvgg_a0', 'ghostnet_100',
       'tv:shufflenet_v2_x1_0']
MANY = [
    'resnetv2_50', 'efficientnet_b0', 'mobilenetv3_small_100', 'rexnet_100', 'cspresnet50', 'hrnet_w18_small', 'dla34',
    'vgg19_bn', 'ese_vovnet19b_dw', 'inception_v3', 'inception_v4', 'xception41', 'legacy_xception', 'mobileone_s0',
    'lcnet_050', 'mnasnet_050', 'mixnet_s', 'selecsls42', 'skresnet18', 'resnest14d', 'tresnet_m', 'dpn48b',
    'convnext_atto', 'hardcorenas_a', 'mobilenetv4_conv_small', 'fbnetc_100', 'spnasnet_100', 'legacy_seresnet18',
    'gernet_s', 'darknet17', 'cspdarknet53', 'inception_resnet_v2', 'tv:googlenet', 'tv:mnasnet0_5', 'tv:mobilenet_v2',
    'tv:squeezenet1_0', 'tv:efficientnet_b0', 'tv:regnet_y_400mf', 'tv:alexnet', 'tv:densenet121']


@pytest.mark.filterwarnings('ignore:The default weight initialization')
@pytest.mark.parametrize('name', [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MANY)])
def test_net(name):
    result = sweep_one(lambda: build(name))
    assert result['host_error'] < 1e-4 and result['binarized'] > 0
    assert result['dead'] == {'eval': 0, 'train': 0}
    model = result['model'].train()
    output = model(torch.randn(2, 3, 96, 96))
    outputs = [output] if isinstance(output, torch.Tensor) else [o for o in output if o is not None]
    assert all(torch.isfinite(o).all() and o.abs().max() < 1e3 for o in outputs)
    sum(o.square().mean() for o in outputs).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []


class Tangled(nn.Module):
    """Names that say nothing, registered in reverse, one activation shared, one functional."""

    def __init__(self):
        super().__init__()
        self.z = nn.Linear(16, 5)
        self.y = nn.BatchNorm2d(16)
        self.conv_that_is_a_relu = nn.ReLU()
        self.bn1 = nn.Conv2d(16, 16, 3, padding=1)
        self.b = nn.BatchNorm2d(16)
        self.bn2 = nn.Conv2d(16, 16, 1)
        self.a = nn.BatchNorm2d(16)
        self.bn3 = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x):
        x = self.conv_that_is_a_relu(self.a(self.bn3(x)))
        y = self.conv_that_is_a_relu(self.b(self.bn2(x)))
        y = F.relu(self.y(self.bn1(y)) + x)
        return self.z(y.mean((2, 3)))


def test_pairing_rests_on_data_flow():
    model = Tangled().eval()
    randomise_norms(model)
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    norms = {'bn1': model.y, 'bn2': model.b}
    timm_el.binarize(model, 'host')
    torch.testing.assert_close(model(x), expected)
    assert all(model.get_submodule(p).norm is norm for p, norm in norms.items())
    assert {row.path: row.norm for row in model.binarize_report.rows} == {
        'bn1': 'y', 'bn2': 'b', 'bn3': None, 'z': None} | {'bn3': 'a'}


def test_a_shared_activation_goes_and_the_hosts_shortcut_is_not_repeated():
    model = timm_el.binarize(Tangled())
    assert isinstance(model.conv_that_is_a_relu, nn.Identity)
    assert model.bn2.link is not None and model.bn1.link is None  # x reaches the addition once, by the host's shortcut
    rows = {row.path: row for row in model.binarize_report.rows}
    assert rows['bn1'].reason == 'no link: the shortcut of the host carries the same'
    assert rows['bn3'].reason == 'first convolution'


def test_an_activation_that_cannot_move_gets_a_norm_before_the_sign():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.b(F.relu(self.a(x))).mean((2, 3)))

    torch.manual_seed(0)
    model = timm_el.binarize(Functional())
    assert isinstance(model.b, BinaryUnit) and isinstance(model.b.pre, nn.BatchNorm2d)
    for mode in (True, False):
        assert 0.1 < positive_shares(model.train(mode), torch.randn(4, 3, 32, 32))[0] < 0.9


def test_a_net_that_wants_another_input_is_converted_and_says_so():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 12 * 12, 2)

        def forward(self, x):
            return self.fc(self.b(F.silu(self.a(x))).flatten(1))

    model = timm_el.binarize(Small())
    assert any('pass example_input' in note for note in model.binarize_report.notes)
    model = timm_el.binarize(Small(), example_input=torch.randn(2, 3, 16, 16))
    assert not any('example_input' in note for note in model.binarize_report.notes)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 2)
