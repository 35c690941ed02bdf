"""Networks that are deployed with float_dtype=torch.int8: what is int8, how exact, bad inputs, every body."""
import math

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomise
from timm.layers import ClassifierHead

import timm_el
from timm_el import engine
from timm_el.engine import program_of
from timm_el.layers import BinaryConv2d, BinaryUnit
from timm_el.weights.int8 import dequantize, quantize

BODIES = engine.info()['available']
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _restore():
    yield
    engine.use_isa()


class Host(nn.Module):
    """A stem, a binary unit, downsampling, a classifier, and perhaps a depthwise and a grouped convolution."""

    def __init__(self, stem: int = 7, grouped: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, stem, 2, stem // 2, bias=False)
        self.bn = nn.BatchNorm2d(24)
        self.act = nn.ReLU()
        self.unit = BinaryUnit(BinaryConv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24))
        self.down = nn.Conv2d(24, 40, 1, 2)
        self.depthwise = nn.Conv2d(40, 40, 3, padding=1, groups=40) if grouped else nn.Identity()
        self.grouped = nn.Conv2d(40, 40, 1, groups=2) if grouped else nn.Identity()
        self.head = ClassifierHead(40, 10)
        self.num_features = self.head_hidden_size = 40
        self.num_classes = 10
        self.default_cfg = {'input_size': (3, 32, 32)}

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.unit(self.act(self.bn(self.stem(x))))
        return self.head(self.grouped(self.depthwise(self.down(x))))


def host(seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Host(**kwargs)).eval()


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a, 12345.), torch.nan_to_num(b, 12345.)) and a.isnan().equal(b.isnan())


def on_every_body(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The outputs, which are the same everywhere; those of the stem also without the library."""
    outputs, stems = {}, []
    for body in (*BODIES, 'reference'):
        engine.use_isa(body)
        with torch.no_grad():
            deployed = timm_el.deploy(model, float_dtype=torch.int8)
            stems.append(deployed.stem(x))
            if body in BODIES:
                outputs[body] = deployed(x)
    assert all(same(stems[0], y) for y in stems)
    first = next(iter(outputs.values()))
    assert all(same(first, y) for y in outputs.values()), outputs
    return first


def test_full_convolutions_and_the_classifier_are_int8_the_others_stay():
    deployed = timm_el.deploy(host(grouped=True), float_dtype=torch.int8)
    found = {name: m.weight.dtype for name, m in deployed.named_modules() if getattr(m, 'weight', None) is not None}
    assert {name for name, dtype in found.items() if dtype == torch.int8} == {'stem', 'down', 'head.fc'}
    assert found['depthwise'] == found['grouped'] == torch.float32
    runner = program_of(timm_el.deploy(host(), float_dtype=torch.int8))
    steps = [step.name for step in runner.program.steps]
    assert steps.count('int8 conv') == 3 and steps.count('binary conv') == 1 and 'real conv' not in steps


@pytest.mark.parametrize('stem', [1, 3, 7])
def test_every_body_gives_the_bits_of_the_reference(stem):
    y = on_every_body(host(stem=stem), images())
    assert y.isfinite().all()


def test_neither_batch_nor_threads_nor_rows_at_a_time_change_a_bit():
    deployed, x = timm_el.deploy(host(), float_dtype=torch.int8), images(3)
    whole = deployed(x)
    assert torch.equal(torch.cat([deployed(image) for image in x.split(1)]), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(deployed(x), whole)
    finally:
        torch.set_num_threads(threads)
    big = torch.nn.functional.interpolate(x, (97, 120))
    module_by_module = timm_el.deploy(host(), float_dtype=torch.int8, fuse_blocks=False)
    assert torch.equal(deployed(big), module_by_module(big))


@pytest.mark.parametrize('layer, shape', [('stem', (1, 3, 33, 30)), ('down', (2, 24, 9, 8)), ('head.fc', (5, 40))])
def test_a_layer_is_within_half_a_step_of_each_input_and_weight(layer, shape):
    """Against float32 with the same int8 weights: half a step for each input, times the weight."""
    model = host()
    own, x = model.get_submodule(layer), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    deployed = timm_el.deploy(model, float_dtype=torch.int8).get_submodule(layer)
    weight = dequantize(*quantize(own.weight))
    bound = weight.abs().flatten(1).sum(1) * x.abs().max() / 254
    with torch.no_grad():
        if layer == 'head.fc':
            expected = nn.functional.linear(x, weight, own.bias)
        else:
            expected = nn.functional.conv2d(x, weight, own.bias, own.stride, own.padding)
            bound = bound.reshape(-1, 1, 1)
        if layer == 'stem':  # the norm is in it
            expected = model.act(model.bn(expected))
            bound = bound * (model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()).abs().reshape(-1, 1, 1)
        error = (deployed(x) - expected).abs()
    assert (error <= bound * 1.001 + 1e-6).all() and error.max() > 0


def test_deploying_int8_computes_with_the_scale_of_each_channel():
    model = host()
    with torch.no_grad():
        model.down.weight.mul_(torch.logspace(-6, 6, 40).reshape(-1, 1, 1, 1))
        model.down.bias.zero_()
    x = torch.randn(1, 24, 8, 8)
    found = timm_el.deploy(model, float_dtype=torch.int8).down(x)
    expected = model.down(x).detach()
    error = (found - expected)[0].flatten(1).norm(dim=1) / expected[0].flatten(1).norm(dim=1)
    assert (error < 0.03).all()


# ---------------------------------------------------------------------------------------------------------------------
# Bad inputs


@torch.no_grad()
def test_an_image_of_zeros_gives_what_biases_give():
    model = host()
    y = on_every_body(model, torch.zeros(1, 3, 32, 32))
    assert y.isfinite().all()
    stem = timm_el.deploy(model, float_dtype=torch.int8).stem(torch.zeros(1, 3, 8, 8))
    assert torch.allclose(stem, model.act(model.bn(torch.zeros(1, 24, 4, 4))), atol=1e-6)


@pytest.mark.parametrize('value', [NAN, INF, -INF])
def test_what_is_not_finite_makes_the_outputs_that_share_its_scale_nan(value):
    model, x = host(), images(1)
    x[0, 1, 16, 5] = value
    on_every_body(model, x)
    stem = timm_el.deploy(model, float_dtype=torch.int8).stem(x)
    rows = stem.isnan().all(3).all(1)[0]
    reached = torch.tensor([2 * y - 3 <= 16 <= 2 * y + 3 for y in range(16)])
    assert torch.equal(rows, reached) and not stem[:, :, ~reached].isnan().any()
    z = torch.randn(1, 24, 8, 8)
    z[0, 3, 2, 4] = value
    down = timm_el.deploy(model, float_dtype=torch.int8).down(z)
    assert torch.equal(down.isnan().all(1)[0].nonzero(), torch.tensor([[1, 2]])) and down.isnan().sum() == 40


def test_denormals_are_zeros_and_small_numbers_are_not():
    model = host()
    with torch.no_grad():
        model.down.bias.zero_()
    down = timm_el.deploy(model, float_dtype=torch.int8).down
    x = torch.randn(1, 24, 8, 8)
    assert (down(x * 1e-40) == 0).all()
    assert torch.allclose(down(x * 1e-30) * 1e30, down(x), rtol=1e-3, atol=1e-4)
    on_every_body(model, images(1) * 1e-39)


@torch.no_grad()
def test_weights_that_are_equal_zero_or_not_finite():
    model, x = host(), torch.randn(2, 24, 8, 8)
    model.down.weight[0], model.down.weight[1] = 0.25, 0.
    model.down.weight[2, 5] = NAN
    model.down.weight[3, 7] = INF
    deployed = timm_el.deploy(model, float_dtype=torch.int8)
    y = deployed.down(x)
    assert torch.allclose(y[:, 0], 0.25 * x[:, :, ::2, ::2].sum(1) + model.down.bias[0], atol=0.1)
    assert torch.allclose(y[:, 1], model.down.bias[1].expand(2, 4, 4))
    assert y[:, 2:4].isnan().all() and y[:, 4:].isfinite().all()
    on_every_body(model, images(1))


def test_int8_networks_are_written_and_read_back(tmp_path):
    deployed, x = timm_el.deploy(host(), float_dtype=torch.int8), images()
    engine.export(deployed, tmp_path / 'net.program')
    assert torch.equal(timm_el.load_program(tmp_path / 'net.program')(x), deployed(x))
    state, other = deployed.state_dict(), timm_el.deploy(host(1), float_dtype=torch.int8)
    other.load_state_dict(state)
    assert torch.equal(other(x), deployed(x))


def test_a_registered_network_is_close_and_its_error_is_reported_by_layer():
    torch.manual_seed(0)
    model = randomise(timm.create_model('el_resnet26', num_classes=10)).eval()
    x = torch.randn(2, 3, 64, 64)
    plain, int8 = timm_el.deploy(model), timm_el.deploy(model, float_dtype=torch.int8)
    inputs = {}
    handles = [m.register_forward_hook(lambda m, args, y, n=n: inputs.update({n: (args[0], y)}))
               for n, m in plain.named_modules() if n in ('conv1', 'fc') or n.endswith('downsample.1')]
    plain(x)
    for handle in handles:
        handle.remove()
    assert len(inputs) == 6
    for name, (z, y) in inputs.items():
        error = ((int8.get_submodule(name)(z) - y).norm() / y.norm()).item()
        assert 0 < error < 0.02, (name, error)
