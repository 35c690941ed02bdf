"""Whole blocks against their equations, spelled out with plain torch. Norm statistics, affine and gammas are random."""
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise

import timm_el


def sgn(x):
    return torch.where(x >= 0, 1., -1.)


def bn(sd, name, x):
    return F.batch_norm(
        x, sd[f'{name}.running_mean'], sd[f'{name}.running_var'], sd[f'{name}.weight'], sd[f'{name}.bias'])


def bconv(sd, name, x, stride=1, padding=0, groups=1, k=False):
    w = sd[f'{name}.weight']
    alpha = w.abs().mean((1, 2, 3), keepdim=True)
    y = F.conv2d(sgn(x), sgn(w) * alpha, stride=stride, padding=padding, groups=groups)
    if k:  # only used on 1x1 convolutions
        y = y * x.abs().mean(1, keepdim=True)[:, :, ::stride, ::stride]
    return y


def halve(x):
    return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)


def squeeze(x, c):
    return sum(x.split(c, 1))


def block_of(model, path):
    randomise(model).eval()
    block = model.get_submodule(path)
    return block, {k: v.detach() for k, v in block.state_dict().items()}


@pytest.mark.parametrize('size', [8, 7])
def test_bottleneck_with_downsampling(size):
    """y1 = BN(K . conv) + Squeeze(MaxPool(x)) / g; y2 = BN(conv) + y1; y3 = BN(conv) + Expand(y2) / g; out = y3 + r."""
    block, sd = block_of(timm.create_model('el_resnet26'), 'layer2.0')
    x = torch.randn(2, 256, size, size)
    y1 = bn(sd, 'conv1.norm', bconv(sd, 'conv1.conv', x, stride=2, k=True))
    y1 = y1 + squeeze(F.max_pool2d(x, 2, 2, ceil_mode=True), 128) / sd['conv1.link.gamma']
    y2 = bn(sd, 'conv2.norm', bconv(sd, 'conv2.conv', y1, padding=1)) + y1
    y3 = bn(sd, 'conv3.norm', bconv(sd, 'conv3.conv', y2)) + y2.repeat(1, 4, 1, 1) / sd['conv3.link.gamma']
    r = bn(sd, 'downsample.2', F.conv2d(halve(x), sd['downsample.1.weight']))
    torch.testing.assert_close(block(x), y3 + r, rtol=1e-4, atol=1e-4)


def test_bottleneck_without_downsampling():
    block, sd = block_of(timm.create_model('el_resnet26'), 'layer1.1')
    x = torch.randn(2, 256, 6, 5)
    y1 = bn(sd, 'conv1.norm', bconv(sd, 'conv1.conv', x, k=True)) + squeeze(x, 64) / sd['conv1.link.gamma']
    y2 = bn(sd, 'conv2.norm', bconv(sd, 'conv2.conv', y1, padding=1)) + y1
    y3 = bn(sd, 'conv3.norm', bconv(sd, 'conv3.conv', y2)) + y2.repeat(1, 4, 1, 1) / sd['conv3.link.gamma']
    torch.testing.assert_close(block(x), y3 + x, rtol=1e-4, atol=1e-4)


def test_bottleneck_with_the_stride_on_the_3x3():
    block, sd = block_of(timm.create_model('el_resnet26', stride_first=False), 'layer2.0')
    x = torch.randn(2, 256, 8, 8)
    y1 = bn(sd, 'conv1.norm', bconv(sd, 'conv1.conv', x, k=True)) + squeeze(x, 128) / sd['conv1.link.gamma']
    y2 = bn(sd, 'conv2.norm', bconv(sd, 'conv2.conv', y1, stride=2, padding=1)) + F.max_pool2d(y1, 2)
    y3 = bn(sd, 'conv3.norm', bconv(sd, 'conv3.conv', y2)) + y2.repeat(1, 4, 1, 1) / sd['conv3.link.gamma']
    r = bn(sd, 'downsample.2', F.conv2d(halve(x), sd['downsample.1.weight']))
    torch.testing.assert_close(block(x), y3 + r, rtol=1e-4, atol=1e-4)


def test_el_minus_has_a_link_in_place_of_the_first_convolution():
    block, sd = block_of(timm.create_model('el_resnet26', recipe='first_el_minus'), 'layer2.0')
    x = torch.randn(2, 256, 8, 8)
    y1 = squeeze(F.max_pool2d(x, 2), 128) / sd['conv1.link.gamma']
    y2 = bn(sd, 'conv2.norm', bconv(sd, 'conv2.conv', y1, padding=1)) + y1
    y3 = bn(sd, 'conv3.norm', bconv(sd, 'conv3.conv', y2))
    r = bn(sd, 'downsample.2', F.conv2d(halve(x), sd['downsample.1.weight']))
    torch.testing.assert_close(block(x), y3 + r, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('build', ['registered', 'timm', 'torchvision'])
def test_plain_basic_block_has_one_shortcut_per_convolution(build):
    if build == 'torchvision':
        import torchvision
        model = timm_el.binarize(torchvision.models.resnet18())
    else:
        name = 'el_resnet18' if build == 'registered' else 'resnet18'
        model = timm.create_model(name)
        model = model if build == 'registered' else timm_el.binarize(model)
    block, sd = block_of(model, 'layer1.1')
    x = torch.randn(2, 64, 6, 6)
    y1 = bn(sd, 'conv1.norm', bconv(sd, 'conv1.conv', x, padding=1)) + x
    y2 = bn(sd, 'conv2.norm', bconv(sd, 'conv2.conv', y1, padding=1)) + y1
    torch.testing.assert_close(block(x), y2, rtol=1e-4, atol=1e-4)


def test_downsampling_basic_block_takes_the_hosts_shortcut_around_its_first_convolution():
    block, sd = block_of(timm.create_model('el_resnet18'), 'layer2.0')
    x = torch.randn(2, 64, 9, 9)
    r = bn(sd, 'conv1.link.2', F.conv2d(halve(x), sd['conv1.link.1.weight']))
    y1 = bn(sd, 'conv1.norm', bconv(sd, 'conv1.conv', x, stride=2, padding=1)) + r
    y2 = bn(sd, 'conv2.norm', bconv(sd, 'conv2.conv', y1, padding=1)) + y1
    torch.testing.assert_close(block(x), y2, rtol=1e-4, atol=1e-4)


def test_basic_block_keeps_its_own_shortcut_where_the_recipe_has_no_spatial_link():
    block, sd = block_of(timm.create_model('el_resnet18', recipe='el_2'), 'layer1.0')
    x = torch.randn(2, 64, 6, 6)
    y1 = bn(sd, 'conv1.norm', bconv(sd, 'conv1.conv', x, padding=1))
    y2 = bn(sd, 'conv2.norm', bconv(sd, 'conv2.conv', y1, padding=1))
    torch.testing.assert_close(block(x), y2 + x, rtol=1e-4, atol=1e-4)


def test_drop_path_and_squeeze_excite_of_a_basic_block_stay_inside_the_branch():
    """Otherwise drop path would drop the shortcut too, and with it the whole signal."""
    model = timm.create_model('el_resnet18', block_args=dict(attn_layer='se'), drop_path_rate=0.5)
    block, sd = block_of(model, 'layer4.1')
    assert isinstance(block.drop_path, torch.nn.Identity)
    block.train()
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    x = torch.randn(64, 512, 3, 3)
    y1 = bn(sd, 'conv1.norm', bconv(sd, 'conv1.conv', x, padding=1)) + x
    alone = (block(x) - y1).abs().amax((1, 2, 3)) < 1e-3
    assert 10 < alone.sum() < 54  # dropped with probability one half: the shortcut alone is left


def test_mobilenet_block():
    """conv -> ReLU -> BN -> add, on the float strided depthwise convolution and on the binary pointwise one."""
    block, sd = block_of(timm.create_model('el_mobilenet_v1'), 'blocks.2.0')
    x = torch.randn(2, 128, 9, 9)
    y1 = F.conv2d(x, sd['conv_dw.conv.weight'], stride=2, padding=1, groups=128)
    y1 = bn(sd, 'conv_dw.norm', F.relu(y1)) + F.max_pool2d(x, 2, 2, ceil_mode=True)
    y2 = bn(sd, 'conv_pw.norm', F.relu(bconv(sd, 'conv_pw.conv', y1)))
    y2 = y2 + y1.repeat(1, 2, 1, 1) / sd['conv_pw.link.gamma']
    torch.testing.assert_close(block(x), y2, rtol=1e-4, atol=1e-4)
    block, sd = block_of(timm.create_model('el_mobilenet_v1'), 'blocks.3.2')
    x = torch.randn(2, 512, 5, 5)
    y1 = bn(sd, 'conv_dw.norm', F.relu(bconv(sd, 'conv_dw.conv', x, padding=1, groups=512))) + x
    y2 = bn(sd, 'conv_pw.norm', F.relu(bconv(sd, 'conv_pw.conv', y1))) + y1 / sd['conv_pw.link.gamma']
    torch.testing.assert_close(block(x), y2, rtol=1e-4, atol=1e-4)


def test_mobilenet_stem_has_its_activation_before_its_norm():
    model = randomise(timm.create_model('el_mobilenet_v1')).eval()
    sd = model.state_dict()
    x = torch.randn(2, 3, 32, 32)
    expected = bn(sd, 'bn1.norm', F.relu(F.conv2d(x, sd['conv_stem.weight'], stride=2, padding=1)))
    torch.testing.assert_close(model.bn1(model.conv_stem(x)), expected)


def prelu(sd, name, x):
    c = (slice(None), None, None)
    z = x + sd[f'{name}.shift_in'][c]
    return torch.where(z > 0, z, z * sd[f'{name}.slope'][c]) + sd[f'{name}.shift_out'][c]


@pytest.mark.parametrize('name, path', [
    ('reactnet_a', 'stages.2.1'), ('reactnet_a', 'stages.2.0'), ('reactnet_c', 'stages.2.0'),
    ('el_reactnet_c', 'stages.2.0'), ('el_reactnet_c', 'stages.0.0')])
def test_reactnet_block(name, path):
    block, sd = block_of(timm.create_model(name), path)
    c = block.conv_3x3.in_channels
    reduction = path.endswith('.0')
    stride = 1 if path != 'stages.2.0' else 2
    x = torch.randn(2, c, 8, 8)
    shift = sd['conv_3x3.pre.bias'][:, None, None]
    y1 = bn(sd, 'conv_3x3.norm', bconv(sd, 'conv_3x3.conv', x + shift, stride=stride, padding=1))
    y1 = prelu(sd, 'conv_3x3.post', y1 + (F.avg_pool2d(x, 2) if stride == 2 else x))
    if reduction and name != 'reactnet_a':
        y2 = F.conv2d(y1, sd['conv_1x1.conv.weight'])
    else:
        y2 = bconv(sd, 'conv_1x1.conv', y1 + sd['conv_1x1.pre.bias'][:, None, None])
    y2 = bn(sd, 'conv_1x1.norm', y2)
    shortcut = torch.cat([y1, y1], 1) if reduction else y1
    if reduction and name == 'el_reactnet_c':
        shortcut = shortcut / sd['conv_1x1.link.gamma']
    torch.testing.assert_close(block(x), prelu(sd, 'conv_1x1.post', y2 + shortcut), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name, path', [
    ('el_resnet26', 'layer2.0'), ('el_resnet18', 'layer2.0'), ('el_mobilenet_v1', 'blocks.2.0'),
    ('reactnet_a', 'stages.2.0')])
def test_a_negated_convolution_is_seen(name, path):
    """The comparisons above can fail: negating any one convolution of a block changes its output."""
    block, _ = block_of(timm.create_model(name), path)
    convs = [m for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
    x = torch.randn(2, next(m.in_channels for m in convs), 8, 8)
    before = block(x)
    for conv in convs:
        conv.weight.data.neg_()
        assert (block(x) - before).abs().max() > 1e-2
        conv.weight.data.neg_()
