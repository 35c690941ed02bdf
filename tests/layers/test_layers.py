"""Binary layers and links against torch's own layers and against loops written from the paper's text."""
import copy
import inspect
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_el
from timm_el.layers import (
    BinaryConv2d,
    BinaryLinear,
    BinaryUnit,
    ElasticLink,
    RPReLU,
    RSign,
    Shift,
    StandardizedBinaryConv2d,
    ZeroShortcut,
    weight_scale,
)


def signed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, 1., -1.).to(x.dtype)


# ------------------------------------------------------------------------------------------------------ BinaryConv2d

@pytest.mark.parametrize('cls, base', [(BinaryConv2d, nn.Conv2d), (BinaryLinear, nn.Linear)])
def test_signature_is_torchs_plus_a_named_few(cls, base):
    ours = inspect.signature(cls).parameters
    theirs = inspect.signature(base).parameters
    assert list(ours)[:len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)
    extra = [p for name, p in ours.items() if name not in theirs]
    assert extra and all(p.kind == p.KEYWORD_ONLY for p in extra)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('pad_value', [0, -1, 1])
@pytest.mark.parametrize('kernel, stride, padding, dilation, groups', [
    (1, 1, 0, 1, 1), (1, 2, 0, 1, 1), (3, 1, 1, 1, 1), (3, 2, 1, 1, 2), (3, 1, 2, 2, 4),
    ((3, 5), (2, 1), (1, 2), 1, 12), (2, 2, 0, 1, 1), (5, 3, 4, 1, 3),
])
def test_equals_conv2d_of_signed_tensors(kernel, stride, padding, dilation, groups, pad_value, bias):
    torch.manual_seed(0)
    conv = BinaryConv2d(
        12, 24, kernel, stride, padding, dilation, groups, bias, scale_weight=False, pad_value=pad_value)
    x = torch.randn(2, 12, 11, 13)
    x[0, 0, :3, :3] = 0
    kh, kw = nn.modules.utils._pair(padding)
    padded = F.pad(signed(x), (kw, kw, kh, kh), value=float(pad_value))
    expected = F.conv2d(padded, signed(conv.weight), conv.bias, stride, 0, dilation, groups)
    assert torch.equal(conv(x), expected)


@pytest.mark.parametrize('padding_mode', ['reflect', 'replicate', 'circular'])
def test_other_padding_modes_pad_the_signs(padding_mode):
    conv = BinaryConv2d(4, 8, 3, padding=1, padding_mode=padding_mode, scale_weight=False)
    x = torch.randn(2, 4, 6, 7)
    expected = F.conv2d(F.pad(signed(x), (1, 1, 1, 1), padding_mode), signed(conv.weight), conv.bias)
    assert torch.equal(conv(x), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize('kernel', [1, 2, 3, 4])
@pytest.mark.parametrize('padding', ['same', 'valid'])
@pytest.mark.parametrize('scale_input', [False, True])
def test_string_padding_equals_torchs(kernel, padding, scale_input):
    conv = BinaryConv2d(4, 8, kernel, padding=padding, bias=False, scale_weight=False, scale_input=scale_input)
    x = torch.randn(2, 4, 6, 7)
    expected = F.conv2d(signed(x), signed(conv.weight), padding=padding)
    if scale_input:
        expected = expected * F.conv2d(
            x.abs().mean(1, keepdim=True), torch.full((1, 1, kernel, kernel), 1 / kernel ** 2), padding=padding)
    torch.testing.assert_close(conv(x), expected)


def test_alpha_is_the_mean_magnitude_of_each_output_channel():
    conv = BinaryConv2d(3, 5, 3, bias=False)
    x = torch.randn(1, 3, 6, 6)
    alpha = torch.stack([conv.weight[o].abs().mean() for o in range(5)])
    torch.testing.assert_close(weight_scale(conv.weight), alpha)
    expected = F.conv2d(signed(x), signed(conv.weight)) * alpha[:, None, None]
    torch.testing.assert_close(conv(x), expected)


def test_alpha_of_a_scaled_sign_is_the_scale_itself():
    """A float32 mean fails this, and a packed file would then change each time it is written."""
    torch.manual_seed(0)
    alpha = torch.rand(64) * 0.1
    weight = signed(torch.randn(64, 333, 3, 3)) * alpha[:, None, None, None]
    assert torch.equal(weight_scale(weight), alpha)


def literal_k(x, kernel, stride, padding, dilation, groups, out_channels):
    """K by loops: each output pixel is the mean of A over its kernel's taps, A the channel mean of abs(x)."""
    n, c, h, w = x.shape
    per_group = c // groups
    oh = (h + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    ow = (w + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    k = torch.zeros(n, out_channels, oh, ow)
    for b in range(n):
        for o in range(out_channels):
            g = o // (out_channels // groups)
            a = x[b, g * per_group:(g + 1) * per_group].abs().mean(0)
            for i in range(oh):
                for j in range(ow):
                    total = 0.
                    for u in range(kernel):
                        for v in range(kernel):
                            y, z = i * stride - padding + u * dilation, j * stride - padding + v * dilation
                            if 0 <= y < h and 0 <= z < w:
                                total += float(a[y, z])
                    k[b, o, i, j] = total / kernel ** 2
    return k


@pytest.mark.parametrize('kernel, stride, padding, dilation, groups', [
    (1, 1, 0, 1, 1), (1, 2, 0, 1, 1), (3, 1, 1, 1, 1), (3, 2, 1, 1, 1), (3, 1, 2, 2, 1), (3, 1, 1, 1, 2)])
def test_k_is_a_box_filter_of_the_real_input(kernel, stride, padding, dilation, groups):
    torch.manual_seed(0)
    conv = BinaryConv2d(4, 6, kernel, stride, padding, dilation, groups, scale_input=True)
    plain = BinaryConv2d.from_conv(conv)
    plain.bias = None
    x = torch.randn(2, 4, 5, 6)
    k = literal_k(x, kernel, stride, padding, dilation, groups, 6)
    torch.testing.assert_close(conv.scale_of_input(x).expand(2, 6, *k.shape[2:]), k)
    torch.testing.assert_close(conv(x), plain(x) * k + conv.bias[:, None, None])


@pytest.mark.parametrize('flag', [False, True])
def test_no_gradient_through_k_unless_asked(flag):
    conv = BinaryConv2d(2, 2, 1, bias=False, scale_input=True, input_scale_grad=flag)
    x = torch.full((1, 2, 3, 3), 5., requires_grad=True)  # outside the estimator's support
    conv(x).sum().backward()
    assert bool(x.grad.abs().sum() > 0) is flag


def test_gradients_follow_the_estimator_and_stop_at_alpha():
    torch.manual_seed(0)
    conv = BinaryConv2d(3, 4, 3, padding=1, bias=False)
    conv.weight.data.mul_(4)  # some beyond 1
    x = (torch.randn(2, 3, 5, 5) * 1.2).requires_grad_()
    alpha = weight_scale(conv.weight)[:, None, None, None]
    xs, ws = signed(x.detach()).requires_grad_(), (signed(conv.weight.detach()) * alpha).requires_grad_()
    upstream = torch.randn(2, 4, 5, 5)
    conv(x).backward(upstream)
    F.conv2d(xs, ws, padding=1).backward(upstream)
    torch.testing.assert_close(x.grad, xs.grad * (x.abs() <= 1))
    torch.testing.assert_close(conv.weight.grad, ws.grad * alpha * (conv.weight.abs() <= 1))


def test_real_weights_and_real_inputs():
    x = torch.randn(2, 3, 6, 6)
    stage_one = BinaryConv2d(3, 4, 3, weight_quantizer=None)
    assert not stage_one.is_binary
    torch.testing.assert_close(stage_one(x), F.conv2d(signed(x), stage_one.weight, stage_one.bias))
    weight_only = BinaryConv2d(3, 4, 3, input_quantizer=None, scale_weight=False)
    torch.testing.assert_close(weight_only(x), F.conv2d(x, signed(weight_only.weight), weight_only.bias))
    assert list(stage_one.state_dict()) == list(weight_only.state_dict())


def test_from_conv_shares_the_parameters():
    host = nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1, bias=True).eval()
    binary = BinaryConv2d.from_conv(host, scale_input=True)
    assert binary.weight is host.weight and binary.bias is host.bias and not binary.training
    assert binary.stride == host.stride and binary.scale_input


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(pad_value=2), ValueError, r'pad_value: found 2, expected one of \(-1, 0, 1\)'),
    (dict(pad_value=1, padding_mode='reflect'), ValueError, "pad_value: 1 needs padding_mode='zeros'"),
    (dict(input_quantizer='foo'), ValueError, 'input_quantizer: unknown quantizer'),
    (dict(in_channels=0), ValueError, 'in_channels: found 0, expected a positive integer'),
    (dict(out_channels=-3), ValueError, 'out_channels: found -3'),
])
def test_bad_arguments_of_a_convolution(kwargs, error, message):
    with pytest.raises(error, match=message):
        BinaryConv2d(**{'in_channels': 4, 'out_channels': 4, 'kernel_size': 3, **kwargs})


@pytest.mark.parametrize('x, error, message', [
    (torch.zeros(4, 8, 8), ValueError, r'found shape \(4, 8, 8\), expected \(N, 4, H, W\).*unsqueeze'),
    (torch.zeros(1, 3, 8, 8), ValueError, r'expected \(N, 4, H, W\)'),
    (torch.zeros(1, 4, 8, 8, dtype=torch.int64), TypeError, r'found dtype torch.int64, expected a float tensor'),
])
def test_bad_input_of_a_convolution(x, error, message):
    with pytest.raises(error, match=message):
        BinaryConv2d(4, 4, 3)(x)
    with pytest.raises((error, torch.jit.Error)):
        torch.jit.script(BinaryConv2d(4, 4, 3))(x)


def test_empty_batch():
    assert BinaryConv2d(4, 6, 3, padding=1, scale_input=True)(torch.zeros(0, 4, 5, 5)).shape == (0, 6, 5, 5)


def test_binary_linear_equals_its_formula():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7)
    layer = BinaryLinear(7, 3, scale_input=True)
    product = signed(x) @ (signed(layer.weight) * layer.weight.abs().mean(1, keepdim=True)).T
    torch.testing.assert_close(layer(x), product * x.abs().mean(-1, keepdim=True) + layer.bias)
    plain = BinaryLinear.from_linear(nn.Linear(7, 3), scale_weight=False)
    torch.testing.assert_close(plain(x), signed(x) @ signed(plain.weight).T + plain.bias)
    with pytest.raises(ValueError, match='in_features: found 0'):
        BinaryLinear(0, 3)
    with pytest.raises(TypeError, match='BinaryLinear input'):
        layer(torch.zeros(1, 7, dtype=torch.int32))


# ------------------------------------------------------------------------------------------------------- ElasticLink

def literal_link(x, out_channels, gamma):
    """Squeeze, Expand and eq. 5 by loops, from the paper's text."""
    n, c, h, w = x.shape
    if c >= out_channels:
        groups = math.ceil(c / out_channels)
        y = torch.zeros(n, out_channels, h, w)
        for group in range(groups):
            for channel in range(out_channels):
                source = group * out_channels + channel
                if source < c:  # else zero padding
                    y[:, channel] += x[:, source]
        ratio = groups
    else:
        ratio = math.ceil(out_channels / c)
        y = torch.stack([x[:, channel % c] for channel in range(out_channels)], 1)
    return y / (ratio if gamma is None else gamma)


@pytest.mark.parametrize('c_in, c_out', [
    (64, 16), (64, 64), (16, 64), (10, 4), (4, 10), (7, 3), (3, 7), (5, 1), (1, 5), (65, 64), (64, 65)])
def test_link_equals_the_papers_text(c_in, c_out):
    x = torch.randn(2, c_in, 5, 3)
    link = ElasticLink(c_in, c_out)
    assert link.gamma.shape == () and link.gamma.item() == math.ceil(max(c_in, c_out) / min(c_in, c_out))
    torch.testing.assert_close(link(x), literal_link(x, c_out, None))
    link.gamma.data.fill_(-1.7)
    torch.testing.assert_close(link(x), literal_link(x, c_out, -1.7))
    torch.testing.assert_close(
        ElasticLink(c_in, c_out, gamma=None)(x), literal_link(x, c_out, 1.))


@pytest.mark.parametrize('size', [1, 2, 7, 8, 13])
@pytest.mark.parametrize('stride', [2, 3, (2, 1)])
def test_link_pools_to_the_size_of_the_convolution(size, stride):
    x = torch.randn(2, 8, size, size + 1)
    conv = nn.Conv2d(8, 4, 3, stride, padding=1)
    y = ElasticLink(8, 4, stride)(x)
    assert y.shape == conv(x).shape
    pooled = F.max_pool2d(x, stride, stride, ceil_mode=True)
    torch.testing.assert_close(y, (pooled[:, :4] + pooled[:, 4:]) / 2)


@pytest.mark.parametrize('kernel, stride, padding', [
    (3, 2, 0), (2, 2, 0), (3, 1, 0), (4, 2, 1), (7, 1, 2), ((1, 3), 1, (0, 1)), (3, 1, 'valid'), (3, 1, 'same'),
])
@pytest.mark.parametrize('size', [7, 8, 15])
def test_link_for_a_convolution_has_its_output_size(kernel, stride, padding, size):
    conv = nn.Conv2d(6, 6, kernel, stride, padding)
    x = torch.randn(1, 6, size, size)
    link, mean = ElasticLink.for_conv(conv), ElasticLink.for_conv(conv, pool='avg')
    assert link.gamma is None  # spatial identity
    assert link(x).shape == conv(x).shape == mean(x).shape
    if link.pool is None:
        assert torch.equal(mean(x), x) and torch.equal(link(x), x)
    else:
        window = (link.pool.kernel_size, link.pool.stride, link.pool.padding, link.pool.ceil_mode)
        assert torch.equal(link(x), F.max_pool2d(x, *window[:3], ceil_mode=window[3]))
        assert torch.equal(mean(x), F.avg_pool2d(x, *window, count_include_pad=False))


def test_link_for_a_convolution_knows_when_it_has_a_gamma():
    assert ElasticLink.for_conv(nn.Conv2d(6, 6, 1)).gamma is not None
    assert ElasticLink.for_conv(nn.Conv2d(6, 3, 3, padding=1)).gamma is not None
    assert ElasticLink.for_conv(nn.Conv2d(6, 6, 1, padding=1)) is None  # no pooling grows its input
    assert ElasticLink.for_conv(nn.Conv2d(6, 6, 3, dilation=2)).pool.dilation == (2, 2)
    assert ElasticLink.for_conv(nn.Conv2d(6, 6, 3, dilation=2), pool='avg') is None


def test_gamma_modes_and_gradient():
    x = torch.randn(1, 8, 4, 4)
    learnable, fixed, none = (ElasticLink(8, 4, gamma=g) for g in ('learnable', 'fixed', None))
    assert [n for n, _ in learnable.named_parameters()] == ['gamma']
    assert list(fixed.state_dict()) == list(learnable.state_dict()) == ['gamma'] and not list(fixed.parameters())
    assert not list(none.state_dict())
    learnable(x).sum().backward()
    expected = -(x[:, :4] + x[:, 4:]).sum() / 4  # d/dg of s / g at g = 2
    torch.testing.assert_close(learnable.gamma.grad, expected)


@pytest.mark.parametrize('c_in, c_out', [(16, 4), (4, 16), (8, 8), (6, 4)])
def test_link_keeps_channels_last(c_in, c_out):
    x = torch.randn(2, c_in, 6, 6).to(memory_format=torch.channels_last)
    y = ElasticLink(c_in, c_out, 2)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, ElasticLink(c_in, c_out, 2)(x.contiguous()))


@pytest.mark.parametrize('kwargs, message', [
    (dict(in_channels=0, out_channels=4), 'in_channels: found 0'),
    (dict(in_channels=4, out_channels=-1), 'out_channels: found -1'),
    (dict(in_channels=4, out_channels=4, gamma='no'), "gamma: found 'no', expected 'learnable', 'fixed' or None"),
])
def test_bad_arguments_of_a_link(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ElasticLink(**kwargs)


# ---------------------------------------------------------------------------------------------- ReActNet's activations

def test_rsign_and_rprelu_equal_their_formulas():
    x = torch.randn(2, 5, 4, 4)
    rsign, rprelu, shift = RSign(5), RPReLU(5), Shift(5)
    for p in [*rsign.parameters(), *rprelu.parameters(), *shift.parameters()]:
        assert p.shape == (5,)
        p.data.uniform_(-0.5, 0.5)
    c = (slice(None), None, None)
    assert torch.equal(rsign(x), signed(x + rsign.bias[c]))
    z = x + rprelu.shift_in[c]
    torch.testing.assert_close(rprelu(x), torch.where(z > 0, z, z * rprelu.slope[c]) + rprelu.shift_out[c])
    torch.testing.assert_close(shift(x), x + shift.bias[c])
    assert RPReLU(3).slope.tolist() == [0.25] * 3


# --------------------------------------------------------------------------------------------------------- BinaryUnit

@pytest.mark.parametrize('act_first', [False, True])
def test_unit_runs_its_parts_in_order(act_first):
    torch.manual_seed(0)
    parts = dict(
        pre=Shift(4), conv=BinaryConv2d(4, 8, 3, 2, padding=1), norm=nn.BatchNorm2d(8), act=nn.ReLU(),
        tail=nn.Hardtanh(), link=ElasticLink(4, 8, 2), post=RPReLU(8))
    for p in (*parts['pre'].parameters(), *parts['post'].parameters()):
        p.data.uniform_(-0.5, 0.5)
    unit = BinaryUnit(**parts, act_first=act_first)
    x = torch.randn(2, 4, 7, 7)
    y = parts['conv'](parts['pre'](x))
    y = parts['norm'](F.relu(y)) if act_first else F.relu(parts['norm'](y))
    expected = parts['post'](F.hardtanh(y) + parts['link'](x))
    torch.testing.assert_close(unit(x), expected)
    assert (unit.in_channels, unit.out_channels) == (4, 8)
    torch.testing.assert_close(torch.jit.script(unit.eval())(x), unit(x))


def test_unit_needs_a_convolution_or_a_link():
    with pytest.raises(ValueError, match='conv, link: both are None'):
        BinaryUnit(None)
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(BinaryUnit(None, link=ElasticLink(4, 2))(x), (x[:, :2] + x[:, 2:]) / 2)
    torch.testing.assert_close(ZeroShortcut()(x) + x, x)


def test_layers_can_be_copied_scripted_and_moved():
    unit = BinaryUnit(BinaryConv2d(4, 4, 1, scale_input=True), nn.BatchNorm2d(4), link=ElasticLink(4, 4)).eval()
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(copy.deepcopy(unit)(x), unit(x))
    assert unit.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert unit.to('meta')(x.bfloat16().to('meta')).shape == x.shape


# ------------------------------------------------------------------------------------- lean and spelled-out convolution

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('input_quantizer, weight_quantizer', [
    ('ste', 'ste'), ('approx', 'ste'), ('ste', None), (None, 'ste'), ('approx', 'approx')])
@pytest.mark.parametrize('stride, padding, dilation, groups', [(1, 1, 1, 1), (2, 1, 1, 2), (1, 2, 2, 4)])
def test_lean_convolution_equals_the_one_spelled_out(
        stride, padding, dilation, groups, input_quantizer, weight_quantizer, dtype):
    torch.manual_seed(0)
    conv = BinaryConv2d(
        4, 8, 3, stride, padding, dilation, groups, dtype=dtype,
        input_quantizer=input_quantizer, weight_quantizer=weight_quantizer)
    conv.weight.data.mul_(4)
    conv.weight.data[0, 0] = torch.tensor([[0., -0., 1.], [-1., 1.5, -1.5], [0.5, -0.5, 0.]])
    x = (torch.randn(2, 4, 9, 9) * 1.2).to(dtype)
    x[0, 0, 0, :7] = torch.tensor([0., -0., 1., -1., 1.5, -1.5, math.inf if input_quantizer else 2.])
    upstream = torch.randn(conv(x).shape).to(dtype)
    results = []
    for f in (conv.convolve, conv.convolve_lean):
        a = x.clone().requires_grad_()
        conv.weight.grad = conv.bias.grad = None
        y = f(a, conv.bias)
        y.backward(upstream)
        results.append((y.detach(), a.grad, conv.weight.grad.clone(), conv.bias.grad.clone()))
    for ours, spelled in zip(*results):
        torch.testing.assert_close(ours, spelled, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_lean_convolution_under_autocast():
    torch.manual_seed(0)
    conv = BinaryConv2d(8, 8, 3, padding=1, bias=False)
    x = torch.randn(2, 8, 6, 6)
    grads = []
    for f in (conv.convolve, conv.convolve_lean):
        a = x.clone().requires_grad_()
        conv.weight.grad = None
        with torch.autocast('cpu', torch.bfloat16):
            y = f(a)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert a.grad.dtype == conv.weight.grad.dtype == torch.float32
        grads.append((a.grad, conv.weight.grad.clone()))
    for ours, spelled in zip(*grads):
        torch.testing.assert_close(ours, spelled, rtol=2e-2, atol=2e-2 * spelled.abs().max().item())


def test_convolution_keeps_one_byte_of_each_input_value_for_backward():
    conv = BinaryConv2d(8, 8, 3, padding=1, bias=False)
    saved = []
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        conv(x)
    saved = [t for t in saved if t.data_ptr() != conv.weight.data_ptr()]
    assert sum(t.numel() * t.element_size() for t in saved) == x.numel() + 4 * 8  # codes and alpha


def test_frozen_weight_or_input_gets_no_gradient():
    conv = BinaryConv2d(4, 4, 1)
    conv.weight.requires_grad_(False)
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    conv(x).sum().backward()
    assert conv.weight.grad is None and x.grad is not None


def test_gradients_of_gradients_equal_those_spelled_out():
    torch.manual_seed(0)
    conv = BinaryConv2d(3, 4, 3, padding=1, bias=False)
    results = []
    for f in (conv.convolve, conv.convolve_lean):
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = f(x)
        gx, = torch.autograd.grad(y.sum() + (y ** 2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((gx ** 2).sum(), conv.weight)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3 * results[0].abs().max().item())


def test_exported_program_keeps_the_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), BinaryConv2d(4, 6, 3, padding=1, bias=False))
    x = torch.randn(1, 3, 6, 6)
    exported = torch.export.export(net, (x,)).module()
    exported(x).square().sum().backward()
    net(x).square().sum().backward()
    for (key, p), (_, q) in zip(net.named_parameters(), exported.named_parameters()):
        torch.testing.assert_close(q.grad, p.grad, msg=key)


@pytest.mark.parametrize('changes', [
    dict(padding=(2, 2), dilation=(2, 2)), dict(padding=2), dict(padding='same', dilation=(3, 3)),
    dict(padding='valid')])
def test_padding_and_dilation_that_are_set_later_count(changes):
    """Segmentation networks dilate a backbone that is there."""
    torch.manual_seed(0)
    binary, conv = BinaryConv2d(4, 4, 3, padding=1, scale_weight=False), nn.Conv2d(4, 4, 3, padding=1)
    for name, value in changes.items():
        setattr(binary, name, value)
        setattr(conv, name, value)
    conv.weight.data, conv.bias.data = signed(binary.weight.data), binary.bias.data
    x = torch.randn(2, 4, 9, 9)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(binary(x), conv(signed(x)))
    network = nn.Sequential(BinaryUnit(binary, nn.BatchNorm2d(4)), conv).eval()
    with torch.no_grad():
        torch.testing.assert_close(timm_el.deploy(network)(x), network(x))


def test_rsign_can_be_scripted():
    layer, x = RSign(4), torch.randn(2, 4, 3, 3)
    layer.bias.data.normal_()
    assert torch.equal(torch.jit.script(layer)(x), layer(x))


def test_autocast_gives_its_dtype_with_factors_and_a_bias_too():
    x = torch.randn(2, 4, 5, 5)
    with torch.autocast('cpu', torch.bfloat16):
        for layer in (BinaryConv2d(4, 4, 3, scale_input=True), StandardizedBinaryConv2d(4, 4, 3)):
            assert layer(x).dtype == nn.Conv2d(4, 4, 3)(x).dtype == torch.bfloat16


def test_a_link_has_no_window_that_lies_in_the_padding_as_a_whole():
    x = torch.randn(1, 2, 2, 2)
    for dilation in (1, 2, 3, 4):
        link = ElasticLink.for_conv(nn.Conv2d(2, 2, 2, 1, 1, dilation=dilation))
        assert link is None and dilation > 2 or link(x).isfinite().all()
