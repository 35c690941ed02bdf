"""The systems of the paper's Table 3 and of its related work, each against its equations spelled out in plain torch."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomise, with_slow

import timm_el
from timm_el import quantizers
from timm_el.layers import BinaryConv2d, BinaryLinear, BinaryUnit, input_sign_shares
from timm_el.layers.multi_base import MultiBaseConv2d
from timm_el.layers.output_scale import Gate, LearnedScale
from timm_el.layers.ternary import TrainedTernaryConv2d

HALF_BLOCKS = ['binarye', 'bireal', 'r2b', 'el_r2b', 'reactnet']  # one shortcut a convolution
WHOLE_BLOCKS = ['xnor', 'xnor_pp', 'xnor_pp_channel', 'abc', 'abc_5_5', 'tbn']  # the host's, one a block
WEIGHTS = ['binaryconnect', 'bwn', 'twn', 'ttq']
SYSTEMS = [*WHOLE_BLOCKS, *HALF_BLOCKS]
SMALL = dict(num_classes=5, layers=[1, 1, 1, 1], channels=[16, 32, 32, 32])


def signed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, 1., -1.).to(x.dtype)


def gradient(f, x: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, upstream)[0]


def small(host: str, recipe, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    sizes = SMALL if 'resnet' in host else dict(num_classes=5)
    model = timm.create_model(host, recipe=recipe, **{**sizes, **kwargs})
    for name, p in model.named_parameters():
        if name.endswith(('beta', 'shift', 'levels', 'channel', 'row', 'column')):
            p.data.add_(torch.rand_like(p) * 0.3)
        elif name.endswith('act.weight'):
            p.data.copy_(torch.rand_like(p))
    return randomise(model).eval()


# ---------------------------------------------------------------------------------------------------------- quantizers

PLANTED = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.0000001, -1.0000001, 2.0, -3.0, 0.1, -0.1]


def test_ternary_inputs_have_a_threshold_for_each_image():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6) * torch.tensor([0.1, 1., 3.]).reshape(-1, 1, 1, 1)
    x[1, 0].flatten()[:12] = torch.tensor(PLANTED)
    expected = torch.zeros_like(x)
    for n in range(3):
        delta = 0.4 * x[n].abs().sum() / x[n].numel()
        expected[n][x[n] >= delta], expected[n][x[n] <= -delta] = 1, -1
    upstream = torch.randn_like(x)
    scripted = torch.jit.script(quantizers.ternary_sign)
    traced = torch.fx.symbolic_trace(Applied(quantizers.ternary_sign))
    for f in (quantizers.ternary_sign, quantizers.ternary_sign_definition, scripted, traced):
        assert torch.equal(f(x), expected) and set(f(x).unique().tolist()) == {-1, 0, 1}
        assert torch.equal(gradient(f, x, upstream), upstream * (x.abs() <= 1))
        assert torch.equal(f(x[1:2]), expected[1:2])  # whatever else is in the batch
    assert quantizers.ternary_sign(torch.zeros(1, 2, 3, 3)).abs().sum() == 0
    last = x.to(memory_format=torch.channels_last)
    assert quantizers.ternary_sign(last).is_contiguous(memory_format=torch.channels_last)


class Applied(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def test_ternary_inputs_keep_one_byte_a_value_for_backward():
    conv = BinaryConv2d(8, 8, 3, padding=1, bias=False, input_quantizer='ternary')
    saved = []
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = conv(x)
    assert sum(t.numel() * t.element_size() for t in saved if t.data_ptr() != conv.weight.data_ptr()) == 576 + 32
    upstream = torch.randn_like(y)
    y.backward(upstream)
    lean = x.grad, conv.weight.grad
    x.grad = conv.weight.grad = None
    conv.convolve(x).backward(upstream)
    for a, b in zip(lean, (x.grad, conv.weight.grad)):
        torch.testing.assert_close(a, b)


def test_tanh_is_a_quantizer_with_its_own_derivative():
    x = torch.linspace(-2, 2, 41)
    conv = BinaryConv2d(41, 3, 1, bias=False, input_quantizer='tanh', weight_quantizer=None)
    assert not conv.is_binary and conv.binary_products == 0
    inputs, upstream = x.reshape(1, -1, 1, 1), torch.randn(1, 3, 1, 1)
    torch.testing.assert_close(conv(inputs), F.conv2d(inputs.tanh(), conv.weight))
    expected = F.conv_transpose2d(upstream, conv.weight).flatten() * (1 - x.tanh() ** 2)
    torch.testing.assert_close(gradient(conv, inputs, upstream).flatten(), expected)


def test_twn_has_one_threshold_and_one_scale_a_layer():
    torch.manual_seed(0)
    w = torch.randn(6, 4, 3, 3) * torch.linspace(0.1, 2, 6).reshape(-1, 1, 1, 1)
    delta = 0.7 * w.abs().mean()
    chosen = w.abs() >= delta
    alpha = w.abs()[chosen].mean()
    expected = torch.where(chosen, w.sign() * alpha, torch.zeros_like(w))
    torch.testing.assert_close(quantizers.twn(w), expected)
    upstream = torch.randn_like(w)
    torch.testing.assert_close(gradient(quantizers.twn, w, upstream), upstream * alpha * (w.abs() <= 1))
    again = quantizers.twn(expected)  # from its own values
    assert torch.equal(quantizers.twn(again), again)
    assert not quantizers.twn(torch.zeros(2, 3)).any()


def test_ttq_has_two_levels_that_learn():
    torch.manual_seed(0)
    w = torch.randn(6, 4, 3, 3) * 0.2
    levels = torch.tensor([0.7, 0.4])
    delta = 0.05 * w.abs().max()
    positive, negative = w >= delta, w <= -delta
    expected = 0.7 * positive - 0.4 * negative
    torch.testing.assert_close(quantizers.ttq(w, levels), expected)
    upstream = torch.randn_like(w)
    slope = torch.where(positive, 0.7, torch.where(negative, 0.4, 1.))
    torch.testing.assert_close(gradient(lambda v: quantizers.ttq(v, levels), w, upstream), upstream * slope)
    torch.testing.assert_close(
        gradient(lambda v: quantizers.ttq(w, v), levels, upstream),
        torch.stack([upstream[positive].sum(), -upstream[negative].sum()]))
    torch.testing.assert_close(quantizers.ttq_levels(w), torch.stack([w[positive].mean(), -w[negative].mean()]))
    assert quantizers.ttq_levels(torch.ones(2, 2)).tolist() == [1, 1]  # no negative weight: level 1


@pytest.mark.parametrize('count', [1, 2, 3, 5])
def test_abc_fits_its_weight_bases_by_least_squares(count):
    torch.manual_seed(0)
    w = torch.randn(6, 4, 3, 3) * 0.3 + 0.1
    offsets = [0.] if count == 1 else [-1 + 2 * m / (count - 1) for m in range(count)]
    bases = torch.stack([signed(w - w.mean() + u * w.std(unbiased=False)) for u in offsets])
    alpha = torch.linalg.lstsq(bases.flatten(1).T, w.reshape(-1, 1)).solution.flatten()
    found, scales = quantizers.abc_weight_bases(w, count)
    assert torch.equal(found, bases)
    torch.testing.assert_close(scales, alpha, rtol=1e-4, atol=1e-5)
    corners = torch.tensor([1., 1., -1., -1.])  # a deviation of exactly 1: that of the weights themselves
    assert torch.equal(quantizers.abc_weight_bases(corners, 2)[0][0], corners)
    expected = (alpha.reshape(-1, 1, 1, 1, 1) * bases).sum(0)
    torch.testing.assert_close(quantizers.abc_weight(w, count), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(w)
    torch.testing.assert_close(
        gradient(lambda v: quantizers.abc_weight(v, count), w, upstream), upstream * alpha.sum(), rtol=1e-4, atol=1e-5)


def test_abc_input_bases_are_shifted_signs_with_a_clipped_gradient():
    x = torch.cat([torch.tensor(PLANTED), torch.linspace(-2, 2, 81)])
    shift, beta = torch.tensor([0.5, -0.2, 1.3]), torch.tensor([0.6, 0.3, -0.4])
    expected = sum(b * (2. * ((x + v).clip(0, 1) >= 0.5) - 1) for v, b in zip(shift, beta))
    torch.testing.assert_close(quantizers.abc_input(x, shift, beta, 3), expected)
    upstream = torch.randn_like(x)
    inside = [((x + v >= 0) & (x + v <= 1)).float() for v in shift]
    torch.testing.assert_close(
        gradient(lambda t: quantizers.abc_input(t, shift, beta, 3), x, upstream),
        upstream * sum(b * i for b, i in zip(beta, inside)))
    torch.testing.assert_close(
        gradient(lambda t: quantizers.abc_input(x, t, beta, 3), shift, upstream),
        torch.stack([(upstream * b * i).sum() for b, i in zip(beta, inside)]))
    torch.testing.assert_close(
        gradient(lambda t: quantizers.abc_input(x, shift, t, 3), beta, upstream),
        torch.stack([(upstream * (2. * (x + v >= 0.5) - 1)).sum() for v in shift]))


@pytest.mark.parametrize('cls', [BinaryConv2d, BinaryLinear])
def test_gradient_through_alpha_is_that_of_xnor_net(cls):
    """dC/dW_i = 1/n Sign(W_i) sum_j g_j Sign(W_j) + alpha 1[|W_i| <= 1] g_i, g = dC/d(alpha Sign(W)), per filter."""
    torch.manual_seed(0)
    args = (3, 4, 3) if cls is BinaryConv2d else (3, 4)
    x = torch.randn(2, 3, 5, 5) if cls is BinaryConv2d else torch.randn(2, 3)
    layer = cls(*args, bias=False, weight_scale_grad=True)
    layer.weight.data.mul_(4)
    w = layer.weight.detach()
    axes = tuple(range(1, w.dim()))
    alpha = w.abs().mean(axes, keepdim=True)
    real = (alpha * signed(w)).requires_grad_()
    y = F.conv2d(signed(x), real) if cls is BinaryConv2d else F.linear(signed(x), real)
    upstream = torch.randn_like(y)
    g, = torch.autograd.grad(y, real, upstream)
    expected = signed(w) * (g * signed(w)).mean(axes, keepdim=True) + alpha * (w.abs() <= 1) * g
    outputs = [layer(x)]
    outputs += [layer.convolve(x)] if cls is BinaryConv2d else []
    for output in outputs:
        torch.testing.assert_close(torch.autograd.grad(output, layer.weight, upstream)[0], expected)


# -------------------------------------------------------------------------------------------------------------- layers

def test_abc_is_m_times_n_binary_convolutions():
    torch.manual_seed(0)
    conv = MultiBaseConv2d(8, 6, 3, 2, 1, bases=(3, 2))
    conv.beta.data.uniform_(-1, 1)
    conv.shift.data.uniform_(0, 1)
    x = torch.randn(2, 8, 7, 7)
    bases, alpha = quantizers.abc_weight_bases(conv.weight, 3)
    expected = conv.bias.reshape(-1, 1, 1) + sum(
        conv.beta[n] * alpha[m] * F.conv2d(signed(x + conv.shift[n] - 0.5), bases[m], None, 2, 1)
        for n in range(2) for m in range(3))
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)
    assert (conv.is_binary, conv.binary_products, conv.weight_bits) == (False, 6, 3)
    assert conv.shift.tolist() != MultiBaseConv2d(8, 6, 3, bases=(1, 2)).shift.tolist() == [-0.5, 1.5]
    torch.testing.assert_close(torch.jit.script(conv)(x), conv(x))


@pytest.mark.parametrize('kwargs, message', [
    (dict(bases=3), 'bases: found 3, expected'), (dict(bases=(0, 1)), r'bases\[0\]: found 0, expected a positive'),
    (dict(input_quantizer='approx'), "input_quantizer: found 'approx', the bases of an input are signs"),
])
def test_bad_bases_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MultiBaseConv2d(4, 4, 3, **kwargs)


def test_gate_reads_the_input_and_scales_the_output():
    torch.manual_seed(0)
    gate = Gate(16, 6)
    x, y = torch.randn(2, 16, 5, 5) * 3, torch.randn(2, 6, 3, 3)
    hidden = (x.sum((2, 3)) / 25 @ gate.fc1.weight.T).clip(0)
    factor = 1 / (1 + torch.exp(-hidden @ gate.fc2.weight.T))
    torch.testing.assert_close(gate(x, y), y * factor[:, :, None, None])
    assert gate.fc1.weight.shape == (2, 16) and not [k for k in gate.state_dict() if 'bias' in k]
    assert Gate(4, 6).fc1.weight.shape == (1, 4)


def test_learned_scale_has_rank_one_and_runs_at_any_size():
    scale = LearnedScale(3, (4, 6))
    assert all(p.dim() == 1 and (p == 1).all() for p in scale.parameters())
    for p in scale.parameters():
        p.data.uniform_(0.5, 2)
    y = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(
        scale(y, y), torch.einsum('nchw,c,h,w->nchw', y, scale.channel, scale.row, scale.column))
    y = torch.randn(2, 3, 9, 5)
    row, column = (torch.tensor(stretched(p.tolist(), n)) for p, n in ((scale.row, 9), (scale.column, 5)))
    torch.testing.assert_close(scale(y, y), torch.einsum('nchw,c,h,w->nchw', y, scale.channel, row, column))
    torch.testing.assert_close(LearnedScale(3)(y, y), y)
    for bad in (dict(channels=0), dict(channels=3, size=(0, 4))):
        with pytest.raises(ValueError, match='expected a positive integer'):
            LearnedScale(**bad)


def stretched(values: list, n: int) -> list:
    """Linear interpolation between pixel centres, by hand."""
    out = []
    for i in range(n):
        at = min(max((i + 0.5) * len(values) / n - 0.5, 0), len(values) - 1)
        low = min(int(at), len(values) - 2)
        out.append(values[low] * (1 - at + low) + values[low + 1] * (at - low))
    return out


# -------------------------------------------------------------------------------------------- blocks, from the papers

def branch(recipe: str, unit: BinaryUnit, x: torch.Tensor) -> torch.Tensor:
    """A unit's branch, from its tensors alone."""
    t = unit.state_dict()
    w, stride, groups = t['conv.weight'], unit.conv.stride, unit.conv.groups
    padding = w.shape[-1] // 2

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, *(t[f'{name}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')))

    def conv(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.conv2d(a, b, None, stride, padding, 1, groups)

    alpha = w.abs().mean((1, 2, 3), keepdim=True)
    if type(unit.conv) is nn.Conv2d:  # a strided depthwise convolution stays float
        y = norm('norm', conv(x, w))
        return F.prelu(y, t['act.weight']) if recipe in ('r2b', 'el_r2b') else y
    if recipe in WHOLE_BLOCKS or recipe in ('r2b', 'el_r2b'):
        x = norm('pre', x)
    if recipe == 'xnor':
        planes = x.abs().unflatten(1, (groups, -1)).mean(2)
        box = torch.full((groups, 1, *w.shape[2:]), 1 / (w.shape[2] * w.shape[3]))
        k = F.conv2d(planes, box, None, stride, padding, 1, groups).repeat_interleave(w.shape[0] // groups, 1)
        return conv(signed(x), alpha * signed(w)) * k
    if recipe.startswith('xnor_pp'):
        y = conv(signed(x), signed(w)) * t['scale.channel'].reshape(-1, 1, 1)
        return y if recipe.endswith('channel') else y * t['scale.row'].reshape(-1, 1) * t['scale.column']
    if recipe == 'abc':
        b = signed(w - w.mean())
        return conv(t['conv.beta'] * signed(x + t['conv.shift'] - 0.5), (w * b).mean() * b)
    if recipe == 'abc_5_5':
        bases, scales = quantizers.abc_weight_bases(w, 5)
        return sum(
            beta * a * conv(signed(x + v - 0.5), b)
            for v, beta in zip(t['conv.shift'], t['conv.beta']) for a, b in zip(scales, bases))
    if recipe == 'tbn':
        delta = 0.4 * x.abs().mean((1, 2, 3), keepdim=True)
        return conv((x >= delta).float() - (x <= -delta).float(), alpha * signed(w))
    if recipe == 'binarye':
        return norm('norm', conv(signed(x), signed(w)))
    if recipe == 'bireal':
        return norm('norm', conv(signed(x), alpha * signed(w)))
    if recipe == 'reactnet':
        return norm('norm', conv(signed(x + t['pre.bias'].reshape(-1, 1, 1)), alpha * signed(w)))
    gate = (F.relu(x.mean((2, 3)) @ t['scale.fc1.weight'].T) @ t['scale.fc2.weight'].T).sigmoid()
    return F.prelu(conv(signed(x), alpha * signed(w)) * gate[:, :, None, None], t['act.weight'])


def link(recipe: str, unit: BinaryUnit, x: torch.Tensor, shortcut: nn.Module = None) -> torch.Tensor:
    """What goes around a unit: 0 where there is nothing."""
    t = unit.state_dict()
    c_in, c_out, kernel, stride = unit.in_channels, unit.out_channels, unit.kernel_size[0], unit.stride[0]
    if shortcut is not None:
        return shortcut(x)
    if recipe not in HALF_BLOCKS or recipe in ('binarye', 'bireal') and kernel == 1:
        return torch.zeros(())
    if recipe in ('r2b', 'reactnet') and kernel == 1 and 'mix' != getattr(unit, 'role', 'mix'):
        return torch.zeros(())
    if c_in != c_out and recipe != 'el_r2b':
        return torch.zeros(())
    if stride > 1:
        x = F.max_pool2d(x, stride, stride, ceil_mode=True)
    if c_in > c_out:
        x = x.unflatten(1, (-1, c_out)).sum(1)
    if c_in < c_out:
        x = x.repeat(1, c_out // c_in, 1, 1)
    return x / t['link.gamma'] if kernel == 1 and recipe == 'el_r2b' else x


def unit_by_hand(recipe: str, unit: BinaryUnit, x: torch.Tensor, shortcut: nn.Module = None) -> torch.Tensor:
    y = branch(recipe, unit, x) + link(recipe, unit, x, shortcut)
    if recipe == 'reactnet':
        t = {k: v.reshape(-1, 1, 1) for k, v in unit.post.state_dict().items()}
        z = y + t['shift_in']
        y = torch.where(z > 0, z, z * t['slope']) + t['shift_out']
    return y


@pytest.mark.parametrize('recipe', SYSTEMS)
def test_basic_block_equals_its_equations(recipe):
    model = small('el_resnet18', recipe, layers=[2, 1, 1, 1])
    for block in (model.layer1[1], model.layer2[0]):
        x = torch.randn(2, 16, 56, 56)
        if recipe in HALF_BLOCKS:
            host = block.conv1.link if block is model.layer2[0] else None
            expected = unit_by_hand(recipe, block.conv2, unit_by_hand(recipe, block.conv1, x, host))
        else:
            expected = unit_by_hand(recipe, block.conv2, unit_by_hand(recipe, block.conv1, x))
            expected = expected + (x if block.downsample is None else block.downsample(x))
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
        if recipe in HALF_BLOCKS and block is model.layer2[0]:
            assert isinstance(host[0], nn.AvgPool2d) and isinstance(host[1], nn.Conv2d)


@pytest.mark.parametrize('recipe', SYSTEMS)
def test_bottleneck_equals_its_equations(recipe):
    model = small('el_resnet26', recipe)
    block = model.layer2[0]
    for unit, role in ((block.conv1, 'reduce'), (block.conv2, 'spatial'), (block.conv3, 'expand')):
        unit.role = role
    x = torch.randn(2, 64, 56, 56)
    y = x
    for unit in (block.conv1, block.conv2, block.conv3):
        y = unit_by_hand(recipe, unit, y)
    torch.testing.assert_close(block(x), y + block.downsample(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('recipe', SYSTEMS)
def test_mobilenet_blocks_equal_their_equations(recipe):
    model = small('el_mobilenet_v1', recipe)
    for block, channels, size in ((model.blocks[1][0], 64, 112), (model.blocks[1][1], 128, 56)):
        x = torch.randn(1, channels, size, size)
        expected = unit_by_hand(recipe, block.conv_pw, unit_by_hand(recipe, block.conv_dw, x))
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert type(model.blocks[1][0].conv_dw.conv) is nn.Conv2d and block.conv_dw.conv.groups == 128


def test_ends_of_binarye_keep_their_activations():
    model = small('el_resnet18', 'binarye')
    x = torch.randn(2, 3, 64, 64)
    norm = model.maxpool.new_norm
    y = F.max_pool2d(F.relu(model.bn1(model.conv1(x))), 3, 2, 1)
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    for layer in (model.layer1, model.layer2, model.layer3):
        for unit in (layer[0].conv1, layer[0].conv2):
            y = unit(y)
    y = F.relu(model.layer4[0].conv2(model.layer4[0].conv1(y)))
    torch.testing.assert_close(model(x), model.fc(y.mean((2, 3))))
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 2


def test_stem_of_r2b_ends_with_a_prelu():
    model = small('el_resnet18', 'r2b')
    x = torch.randn(1, 3, 64, 64)
    y = F.prelu(model.bn1.norm(model.conv1(x)), model.bn1.new_act.weight)
    expected = model.layer1(F.max_pool2d(y, 3, 2, 1))
    torch.testing.assert_close(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x))))), expected)
    assert model.bn1.new_act.weight.shape == (64,)


QUANTIZED = {
    'binaryconnect': lambda unit: signed(unit.conv.weight),
    'bwn': lambda unit: signed(unit.conv.weight) * unit.conv.weight.abs().mean((1, 2, 3), keepdim=True),
    'twn': lambda unit: quantizers.twn(unit.conv.weight),
    'ttq': lambda unit: quantizers.ttq(unit.conv.weight, unit.conv.levels),
}


@pytest.mark.parametrize('name, recipe', [
    ('resnet18', 'binaryconnect'), ('resnet18', 'ttq'), ('resnet26', 'bwn'), ('mobilenetv1_100', 'twn'),
    *(pytest.param(name, recipe, marks=pytest.mark.slow)
      for name in ('resnet26', 'mobilenetv1_100') for recipe in WEIGHTS)])
def test_weight_only_nets_are_their_hosts_with_other_weights(name, recipe):
    torch.manual_seed(0)
    host = randomise(timm.create_model(name, num_classes=5)).eval()
    model = timm_el.binarize(copy.deepcopy(host), recipe)
    units = {path: m for path, m in model.named_modules() if isinstance(m, BinaryUnit)}
    convs = [p for p, m in host.named_modules() if isinstance(m, nn.Conv2d) and 'downsample' not in p]
    assert list(units) == convs[1:]  # all but the first
    for path, unit in units.items():
        if recipe == 'ttq':
            unit.conv.levels.data.mul_(1.3)
        host.get_submodule(path).weight.data.copy_(QUANTIZED[recipe](unit))
        assert not unit.conv.is_binary and unit.conv.binary_products == 0
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = host(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        unit.conv.weight.data.neg_()
        assert (model(x) - expected).abs().max() > 1e-3 * expected.abs().max()
    kinds = {'binaryconnect': 'binary weights', 'bwn': 'binary weights'}
    assert {row.status for row in model.binarize_report.rows} == {'kept', kinds.get(recipe, 'ternary weights')}


# ----------------------------------------------------------------------------------------------------- as timm's models

HOSTS = ['el_resnet18', 'el_resnet26', 'el_mobilenet_v1']
EVERYWHERE = [(host, recipe) for host in HOSTS for recipe in [*SYSTEMS, *WEIGHTS]]


@pytest.mark.parametrize('host, recipe', with_slow(
    [*((HOSTS[0], recipe) for recipe in ('abc', 'tbn', 'reactnet', 'bwn')),
     *((HOSTS[1], recipe) for recipe in ('xnor', 'el_r2b', 'binarye', 'ttq')),
     *((HOSTS[2], recipe) for recipe in ('xnor_pp', 'r2b', 'twn'))], EVERYWHERE))
def test_every_system_trains_on_every_host_and_no_sign_is_dead(host, recipe, photos):
    torch.manual_seed(0)
    sizes = dict(num_classes=5, layers=[1, 1, 1, 1]) if 'resnet' in host else dict(num_classes=5)
    model = timm.create_model(host, recipe=recipe, **sizes)
    x = photos[:3, :, :96, :96]
    if recipe not in WEIGHTS:
        assert all(0.01 < share < 0.99 for share in input_sign_shares(model, x).values())
    model(x).square().mean().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@pytest.mark.parametrize('recipe', [*SYSTEMS, *WEIGHTS])
def test_every_system_scripts_traces_copies_and_changes_dtype(recipe):
    model = small('el_resnet26', recipe, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert model.to('meta')(x.to('meta')).shape == (2, 5)


@pytest.mark.parametrize('recipe', SYSTEMS)
def test_first_stage_has_the_same_keys_and_real_weights(recipe):
    two = timm.create_model('el_resnet26', recipe=recipe, device='meta')
    one = timm.create_model('el_resnet26', recipe=recipe, real_weights=True, device='meta')
    assert list(one.state_dict()) == list(two.state_dict())
    convs = [m for m in one.modules() if isinstance(m, BinaryConv2d)]
    assert convs and all(m.quantized_weight() is m.weight and m.binary_products == 0 for m in convs)


@pytest.mark.parametrize('recipe', [*SYSTEMS, *WEIGHTS])
def test_a_float_checkpoint_gives_what_converting_the_float_net_gives(recipe):
    torch.manual_seed(0)
    host = randomise(timm.create_model('resnet26', num_classes=5, avg_down=True))
    loaded = timm_el.load_float(
        timm.create_model('el_resnet26', recipe=recipe, num_classes=5, stride_first=False), host.state_dict())
    converted = timm_el.binarize(host, recipe)
    assert loaded.state_dict().keys() == converted.state_dict().keys()
    for key, value in converted.state_dict().items():
        if 'scale.fc' not in key and 'num_batches' not in key:  # gates are drawn
            torch.testing.assert_close(loaded.state_dict()[key], value, msg=key)


@pytest.mark.parametrize('recipe', with_slow(
    ['xnor_pp', 'abc', 'r2b', 'reactnet', 'ttq'], [*SYSTEMS, *WEIGHTS]))
def test_every_system_converts_foreign_nets(recipe):
    model = timm.create_model('regnety_002', num_classes=5)
    report = timm_el.binarize(model, recipe).binarize_report
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    assert not [row for row in report.rows if not row.possible]
    assert not any('could not be checked' in note for note in report.notes)
    frozen = timm.create_model('regnety_002', num_classes=5).requires_grad_(False)
    assert not any(p.requires_grad for p in timm_el.binarize(frozen, recipe).parameters())


def test_a_sign_that_nothing_helps_gives_back_the_hosts_layer_and_norm():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            for i, (c_in, c_out) in enumerate([(3, 8), (8, 8), (8, 8), (8, 8)]):
                setattr(self, f'conv{i}', nn.Conv2d(c_in, c_out, 3, padding=1))
                setattr(self, f'bn{i}', nn.BatchNorm2d(c_out))

        def forward(self, x):
            x = self.bn1(self.conv1(self.bn0(self.conv0(x))))
            return self.bn3(self.conv3(self.bn2(self.conv2(x * 0 + 1)))).mean((2, 3))

    model, host = Constant(), Constant()
    convolution, norm = model.conv2, model.bn2
    report = timm_el.binarize(model, 'r2b').binarize_report
    assert report.hopeless == ('conv2',)
    unit = model.conv2
    assert (unit.conv, unit.norm, unit.pre, unit.scale) == (convolution, norm, None, None)
    assert report.moved['bn2'] == 'conv2.norm' and report.moved['bn1'] == ''
    timm_el.load_float(model, host.state_dict())
    assert torch.equal(model.conv2.conv.weight, host.conv2.weight)


def test_torchvision_nets_share_their_activation_modules():
    import torchvision
    torch.manual_seed(0)
    for recipe in ('r2b', 'reactnet', 'binarye'):
        model = timm_el.binarize(torchvision.models.resnet18(num_classes=5), recipe)
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert any('layer4.1.relu: other layers' in note for note in model.binarize_report.notes)
    assert isinstance(model.relu, nn.ReLU) and isinstance(model.layer4[1].relu, nn.Identity)


# ------------------------------------------------------------------------------------------------- parameters and cost

@pytest.mark.parametrize('host, recipe, params, mega_ops, mbit', [
    # Real-to-Binary counts 11,995,624 in Keras, which has two numbers more for each of 4,352 norm channels.
    ('el_resnet18', 'r2b', 11_995_624 - 2 * 4352, 164.28, None),
    ('el_resnet18', 'binarye', 11_689_640, 163.98, 33.52),
    ('el_resnet34', 'binarye', 21_797_800, 192.89, 43.85),
    ('el_resnet18', 'reactnet', 11_704_424, 163.98, None),
    ('el_resnet18', 'xnor', 11_688_616, 163.98, 33.49),
    ('el_resnet18', 'abc', 11_688_616 + 2 * 16, 163.98, 33.49),
    ('el_resnet18', 'abc_5_5', 11_688_616 + 10 * 16, 137.794 + 25 * 1676.28 / 64, 33.49 + 4 * 10.985),
    ('el_resnet18', 'tbn', 11_688_616, 137.794 + 2 * 1676.28 / 64, 33.49),
    ('el_resnet50', 'r2b', None, 532.5 + 3.5, None),
    ('el_resnet50', 'binarye', 25_557_032 + 128, 532.5, 176.85),
    ('el_resnet18', 'bwn', 11_689_512, 1814.07, 33.51),
    ('el_resnet18', 'twn', 11_689_512, 1814.07, 33.51 + 10.985),
    ('el_resnet18', 'ttq', 11_689_512 + 2 * 16, 1814.07, 33.51 + 10.985),
])
def test_check_values(host, recipe, params, mega_ops, mbit):
    summary = timm_el.summarize(timm.create_model(host, recipe=recipe, device='meta'))
    assert params in (None, summary.params)
    assert summary.ops / 1e6 == pytest.approx(mega_ops, rel=1e-3)
    assert mbit is None or summary.mbit == pytest.approx(mbit, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------- bad input

def test_what_a_recipe_cannot_do_is_named_with_the_alternative():
    with pytest.raises(ValueError, match="real_weights: recipe 'twn' has real inputs, .* float host; .*load_float"):
        timm.create_model('el_resnet18', recipe='twn', real_weights=True)
    linear = timm_el.binarize(timm.create_model('test_convnext'), 'r2b').binarize_report
    reasons = {row.reason for row in linear.rows if row.kind == 'Linear' and not row.possible}
    assert reasons == {"recipe 'r2b' has no form of a Linear"}
    with pytest.raises(ValueError, match="Linear .* cannot be binarized .recipe 'r2b' has no form.*pass keep="):
        timm_el.binarize(timm.create_model('test_convnext'), 'r2b', strict=True)
    nfnet = timm_el.binarize(timm.create_model('test_nfnet'), 'abc').binarize_report
    assert any("recipe 'abc' has no form of a ScaledStdConv2d" in row.reason for row in nfnet.rows)


def test_scales_of_rows_and_columns_say_which_size_they_are_for():
    model = timm_el.binarize(timm.create_model('resnet18'), 'xnor_pp', example_input=torch.randn(1, 3, 96, 64))
    assert [p.numel() for p in (model.layer1[0].conv1.scale.row, model.layer4[0].conv1.scale.column)] == [24, 2]
    assert any('images of 3x96x64 and interpolated' in note and "'channel'" in note
               for note in model.binarize_report.notes)
    twin = timm_el.binarize(timm.create_model('resnet18'), like=model.binarize_report.plan())
    twin.load_state_dict(model.state_dict())
    model.eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)

    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
            self.register_buffer('offset', torch.zeros(1, 8, 10, 10))

        def forward(self, x):
            return self.conv3(self.conv2(self.conv1(x) + self.offset))

    with pytest.raises(ValueError, match="conv2: recipe 'xnor_pp' learns .* pass example_input, .*'xnor_pp_channel'"):
        timm_el.binarize(Strange(), 'xnor_pp')
    assert timm_el.binarize(Strange(), 'xnor_pp_channel').binarize_report.count('binarized') == 1
    assert timm_el.binarize(
        Strange(), 'xnor_pp', example_input=torch.randn(1, 3, 12, 12)).conv2.scale.row.numel() == 8


def test_trained_levels_have_a_layer_of_their_own():
    with pytest.raises(ValueError, match="weight_quantizer: unknown quantizer 'ttq', expected one of 'ste'"):
        BinaryConv2d(4, 4, 3, weight_quantizer='ttq')
    with pytest.raises(ValueError, match="weight_quantizer: unknown quantizer 'ternary'"):
        BinaryConv2d(4, 4, 3, weight_quantizer='ternary')
    conv = TrainedTernaryConv2d(4, 4, 3, input_quantizer=None)
    assert 'weight=ttq' in repr(conv) and conv.weight_bits == 2
