"""Every registered model, as timm's users drive it."""
import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import EACH_MODEL, MODELS, randomise
from timm.utils.model import freeze_batch_norm_2d

import timm_el
from timm_el.layers import input_sign_shares
from timm_el.models.reactnet import checkpoint_filter_fn
from timm_el.models.resnet import checkpoint_filter_fn as resnet_filter_fn


def test_registered_names():
    assert MODELS == [
        'bireal_resnet18', 'bireal_resnet34', 'el_mobilenet_v1', 'el_reactnet_c', 'el_resnet18', 'el_resnet20',
        'el_resnet26', 'el_resnet34', 'el_resnet50', 'reactnet_a', 'reactnet_c', 'reactnet_resnet18']


@pytest.mark.parametrize('size', [224, 225, 193])
@pytest.mark.parametrize('name', EACH_MODEL)
def test_forward_backward(name, size):
    model = timm.create_model(name, num_classes=5)
    y = model(torch.randn(2, 3, size, size))
    assert y.shape == (2, 5) and torch.isfinite(y).all()
    y.square().mean().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@pytest.mark.parametrize('name', EACH_MODEL)
def test_variants(name):
    x = torch.randn(1, 3, 64, 64)
    model = timm.create_model(name, in_chans=1, num_classes=0).eval()
    assert model(x[:, :1]).shape == (1, model.num_features)
    features = timm.create_model(name, features_only=True).eval()
    maps = features(x)
    assert len(maps) == (4 if name == 'el_resnet20' else 5)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == features.feature_info.reduction()
    meta = timm.create_model(name, device='meta')
    assert {p.device.type for p in [*meta.parameters(), *meta.buffers()]} == {'meta'}
    assert meta(x.to('meta')).shape == (1, meta.pretrained_cfg['num_classes'])
    with pytest.raises(TypeError):
        timm.create_model(name, no_such_argument=1)


@pytest.mark.parametrize('name', EACH_MODEL)
def test_memory_format_and_dtype(name):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=7)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        seen = []
        for module in last.modules():
            if isinstance(module, timm_el.layers.BinaryUnit):
                module.register_forward_hook(
                    lambda m, a, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)))
        assert last(x.to(memory_format=torch.channels_last)).shape == (2, 7)
        assert seen and all(seen)
        assert copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('name', EACH_MODEL)
def test_no_sign_is_dead_on_real_images_at_initialisation(name, photos):
    torch.manual_seed(0)
    model = timm.create_model(name)
    for mode in (True, False):
        shares = input_sign_shares(model.train(mode), photos)
        assert all(0.01 < share < 0.99 for share in shares.values()), (mode, shares)


@pytest.mark.parametrize('name, count', [('el_resnet26', 16), ('el_resnet50', 32), ('el_reactnet_c', 5)])
def test_gammas(name, count):
    model = timm.create_model(name)
    gammas = {k: p for k, p in model.named_parameters() if k.endswith('gamma')}
    assert len(gammas) == count and all(p.dim() == 0 for p in gammas.values())
    for key, gamma in gammas.items():
        unit = model.get_submodule(key[:-len('.link.gamma')])
        wide, narrow = sorted((unit.in_channels, unit.out_channels), reverse=True)
        assert gamma.item() == -(-wide // narrow)


# ----------------------------------------------------------------------------------------------------- small images

def test_the_nets_of_the_cifar_papers():
    """Sizes as in the literature (0.27 M and 11.17 M parameters), one block of three stages the same as timm's."""
    resnet20 = timm.create_model('el_resnet20').eval()
    resnet18 = timm.create_model('el_resnet18', small_stem=True, num_classes=10).eval()
    assert [sum(p.numel() for p in m.parameters()) for m in (resnet20, resnet18)] == [272_474, 11_173_962]
    x = torch.randn(2, 3, 32, 32)
    for model, sides, cfg in ((resnet20, [32, 32, 16, 8], resnet20.pretrained_cfg), (resnet18, [32, 32, 16, 8, 4], {})):
        final, maps = model.forward_intermediates(x)
        assert [m.shape[-1] for m in maps] == sides == [32 // info['reduction'] for info in model.feature_info]
        assert torch.equal(final, maps[-1]) and torch.equal(final, model.forward_features(x))
        assert model(x).shape == (2, 10) and model.conv1.stride == (1, 1)
        assert cfg.get('pool_size', (4, 4)) == final.shape[2:]
    cfg = resnet20.pretrained_cfg
    assert cfg['input_size'] == (3, 32, 32) and isinstance(resnet20.get_submodule(cfg['first_conv']), torch.nn.Conv2d)
    resnet20.reset_classifier(7)
    assert resnet20(x).shape == (2, 7)
    assert timm_el.summarize(resnet20).real_macs < 0.02 * timm_el.summarize(resnet20).binary_macs


def test_features_of_three_stages_are_counted_as_three():
    model, x = timm.create_model('el_resnet20').eval(), torch.randn(1, 3, 32, 32)
    maps = model.forward_intermediates(x, intermediates_only=True)
    for indices, expected in ((1, [3]), (2, [2, 3]), ([-1], [3]), ([0, 2], [0, 2])):
        found = model.forward_intermediates(x, indices=indices, intermediates_only=True, stop_early=True)
        assert [torch.equal(f, maps[i]) for f, i in zip(found, expected)] == [True] * len(expected)
    with pytest.raises(AssertionError, match='out of range'):
        model.forward_intermediates(x, indices=[4])
    chosen = timm.create_model('el_resnet20', features_only=True, out_indices=(1, 3))
    assert chosen.feature_info.reduction() == [1, 4] and chosen.feature_info.channels() == [16, 64]
    assert copy.deepcopy(model).prune_intermediate_layers(1, prune_head=False) == [3]
    assert model.prune_intermediate_layers([1]) == [1] and model.num_features == 16
    assert model.forward_features(x).shape == (1, 16, 32, 32)


def test_the_float_twin_of_a_small_net_is_timms_resnet():
    """Nothing binarized, the small stem is a convolution, norm and ReLU, and three stages are timm's."""
    model = randomise(timm.create_model('el_resnet20', recipe='host')).eval()
    x = torch.randn(2, 3, 32, 32)
    y = model.act1(model.bn1(F.conv2d(x, model.conv1.weight, padding=1)))
    for block in [*model.layer1, *model.layer2, *model.layer3]:
        z = F.relu(block.conv1.norm(F.conv2d(y, block.conv1.conv.weight, None, block.conv1.conv.stride, 1)))
        z = block.conv2.norm(F.conv2d(z, block.conv2.conv.weight, None, 1, 1))
        y = F.relu(z + (y if block.downsample is None else block.downsample(y)))
    torch.testing.assert_close(model(x), model.fc(y.mean((2, 3))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kwargs, message', [
    (dict(small_stem='yes'), "small_stem: found 'yes', expected True or False"),
    (dict(stem_type='deep'), "stem_type: found 'deep' beside small_stem=True"),
    (dict(channels=(15, 32, 64)), 'channels: found 15 in the first stage, expected an even number'),
])
def test_a_small_stem_that_cannot_be_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('el_resnet20', **kwargs)


def test_float_twins_are_untouched():
    """Registering and converting changes no class of timm."""
    timm_el.binarize(timm.create_model('resnet18'))
    assert not any(isinstance(m, timm_el.layers.BinaryUnit) for m in timm.create_model('resnet18').modules())


# ------------------------------------------------------------------------------------- official ReActNet-A checkpoints

def official_state(layout: str, prefix: str = 'module.') -> dict:
    """A random state dict under the official names: layout 'step1' (4-D `.weight`) or 'step2' ((N, 1) `.weights`)."""
    g = torch.Generator().manual_seed(0)
    state = {}

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    def bn(name, c):
        state.update({f'{name}.weight': rand(c), f'{name}.bias': rand(c), f'{name}.running_mean': rand(c),
                      f'{name}.running_var': rand(c).abs() + 0.1, f'{name}.num_batches_tracked': torch.tensor(3)})

    def conv(name, *shape):
        w = rand(*shape)
        state.update({f'{name}.weight': w} if layout == 'step1' else {f'{name}.weights': w.reshape(-1, 1)})

    state['feature.0.conv1.weight'] = rand(32, 3, 3, 3)
    bn('feature.0.bn1', 32)
    widths = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    for i, (c, d) in enumerate(zip(widths, widths[1:]), 1):
        f = f'feature.{i}'
        for name, width in (('move11', c), ('move12', c), ('move13', c), ('move21', c), ('move22', d), ('move23', d)):
            state[f'{f}.{name}.bias'] = rand(1, width, 1, 1)
        conv(f'{f}.binary_3x3', c, c, 3, 3)
        bn(f'{f}.bn1', c)
        state[f'{f}.prelu1.weight'], state[f'{f}.prelu2.weight'] = rand(c), rand(d)
        if c == d:
            conv(f'{f}.binary_pw', c, c, 1, 1)
            bn(f'{f}.bn2', c)
        else:
            for half in (1, 2):
                conv(f'{f}.binary_pw_down{half}', c, c, 1, 1)
                bn(f'{f}.bn2_{half}', c)
    state['fc.weight'], state['fc.bias'] = rand(1000, 1024), rand(1000)
    return {prefix + k: v for k, v in state.items()}


@pytest.mark.parametrize('layout', ['step1', 'step2'])
def test_official_reactnet_checkpoint_loads_strictly(layout, tmp_path):
    official = official_state(layout)
    file = tmp_path / 'reactnet.pth.tar'
    torch.save({'epoch': 1, 'state_dict': official, 'best_top1_acc': 0.0}, file)
    model = timm.create_model('reactnet_a', pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    direct = timm.create_model('reactnet_a').eval()
    direct.load_state_dict(checkpoint_filter_fn({'state_dict': official}, direct), strict=True)
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in direct.state_dict().items())
    # A reduction block: block 12 of the official list is the first of our last stage.
    o = {k[len('module.feature.12.'):]: v for k, v in official.items() if k.startswith('module.feature.12.')}
    w1, w2 = (o[f'binary_pw_down{h}.weight' + 's' * (layout == 'step2')].reshape(512, 512, 1, 1) for h in (1, 2))
    assert torch.equal(state['stages.4.0.conv_1x1.conv.weight'], torch.cat([w1, w2]))
    assert torch.equal(state['stages.4.0.conv_1x1.norm.running_var'],
                       torch.cat([o['bn2_1.running_var'], o['bn2_2.running_var']]))
    assert torch.equal(state['stages.4.0.conv_3x3.post.shift_out'], o['move13.bias'].flatten())
    assert torch.equal(state['stages.4.0.conv_3x3.pre.bias'], o['move11.bias'].flatten())


def test_official_checkpoint_gives_the_official_blocks_outputs():
    """The official reduction block as two convolutions that are joined, spelled out, on its own keys."""
    official = official_state('step1', prefix='')
    model = timm.create_model('reactnet_a').eval()
    model.load_state_dict(checkpoint_filter_fn(official, model))
    o = {k[len('feature.12.'):]: v for k, v in official.items() if k.startswith('feature.12.')}

    def bn(name, x):
        return F.batch_norm(x, *(o[f'{name}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')))

    def conv(name, x, **kwargs):
        w = o[f'{name}.weight']
        return F.conv2d(torch.where(x >= 0, 1., -1.), w.abs().mean((1, 2, 3), keepdim=True) * w.sign(), **kwargs)

    x = torch.randn(2, 512, 8, 8)
    y = bn('bn1', conv('binary_3x3', x + o['move11.bias'], stride=2, padding=1)) + F.avg_pool2d(x, 2)
    y = F.prelu(y + o['move12.bias'], o['prelu1.weight']) + o['move13.bias']
    s = y + o['move21.bias']
    z = torch.cat([bn(f'bn2_{h}', conv(f'binary_pw_down{h}', s)) + y for h in (1, 2)], 1)
    z = F.prelu(z + o['move22.bias'], o['prelu2.weight']) + o['move23.bias']
    torch.testing.assert_close(model.stages[4][0](x), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('feature.3.bn1.weight'), r'feature.3.bn1.weight: missing'),
    (lambda s: s.pop('feature.3.binary_pw.weight'), r'feature.3.binary_pw.weight: missing'),
    (lambda s: s.update({'feature.3.extra': torch.zeros(1)}), 'feature.3.extra: unknown key'),
    (lambda s: s.update({'feature.3.binary_pw.weight': torch.zeros(3, 1)}),
     r'feature.3.binary_pw.weight: found shape \(3, 1\), expected \(128, 128, 1, 1\)'),
])
def test_bad_official_checkpoint_is_refused_by_key(change, message):
    state = official_state('step1', prefix='')
    change(state)
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn(state, timm.create_model('reactnet_a', device='meta'))


# ----------------------------------------------------------------- official Bi-Real Net and ReAct-ResNet18 checkpoints

def official_resnet(model: str, layout: str, prefix: str = 'module.') -> dict:
    """A random state dict under the official names: one block a convolution, 16 in ResNet-18, 32 in ResNet-34."""
    g = torch.Generator().manual_seed(0)
    state, react = {}, model.startswith('reactnet')

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    def bn(name, c):
        state.update({f'{name}.weight': rand(c), f'{name}.bias': rand(c), f'{name}.running_mean': rand(c),
                      f'{name}.running_var': rand(c).abs() + 0.1, f'{name}.num_batches_tracked': torch.tensor(3)})

    state['conv1.weight'] = rand(64, 3, 7, 7)
    bn('bn1', 64)
    width = 64
    for layer, depth in enumerate([6, 8, 12, 6] if model.endswith('34') else [4, 4, 4, 4]):
        for block in range(depth):
            out, f = 64 * 2 ** layer, f'layer{layer + 1}.{block}'
            if react:
                state.update({f'{f}.move0.bias': rand(1, width, 1, 1), f'{f}.prelu.weight': rand(out),
                              f'{f}.move1.bias': rand(1, out, 1, 1), f'{f}.move2.bias': rand(1, out, 1, 1)})
            w = rand(out, width, 3, 3)
            state.update({f'{f}.binary_conv.weight': w} if layout == '4-D' else
                         {f'{f}.binary_conv.weights': w.reshape(-1, 1)})
            bn(f'{f}.bn1', out)
            if out != width:
                state[f'{f}.downsample.1.weight'] = rand(out, width, 1, 1)
                bn(f'{f}.downsample.2', out)
            width = out
    state['fc.weight'], state['fc.bias'] = rand(1000, 512), rand(1000)
    return {prefix + k: v for k, v in state.items()}


RESNETS = [('bireal_resnet18', '(N, 1)'), ('bireal_resnet34', '(N, 1)'), ('reactnet_resnet18', '4-D')]


def official_block(o: dict, x: torch.Tensor) -> torch.Tensor:
    """An official block on its own keys, whichever parts it has."""
    def bn(name, x):
        return F.batch_norm(x, *(o[f'{name}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')))

    shortcut = x
    if 'downsample.1.weight' in o:
        shortcut = bn('downsample.2', F.conv2d(F.avg_pool2d(x, 2), o['downsample.1.weight']))
    stride = x.shape[2] // shortcut.shape[2]
    w = o['binary_conv.weight'] if 'binary_conv.weight' in o else o['binary_conv.weights']
    w = w.reshape(-1, x.shape[1], 3, 3)
    a = torch.where(x + o.get('move0.bias', 0) >= 0, 1., -1.)
    y = bn('bn1', F.conv2d(a, w.abs().mean((1, 2, 3), keepdim=True) * w.sign(), None, stride, 1)) + shortcut
    return F.prelu(y + o['move1.bias'], o['prelu.weight']) + o['move2.bias'] if 'move1.bias' in o else y


@pytest.mark.parametrize('name, layout', RESNETS)
def test_official_resnet_checkpoint_gives_the_official_blocks_outputs(name, layout, tmp_path):
    official = official_resnet(name, layout)
    file = tmp_path / 'model.pth.tar'
    torch.save({'epoch': 1, 'state_dict': official, 'best_top1_acc': 0.0}, file)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    assert timm_el.summarize(model).ops / 1e6 == pytest.approx(192.89 if '34' in name else 163.98, rel=1e-3)
    torch.manual_seed(0)
    width, blocks = 64, 0
    for layer in range(1, 5):
        stage = getattr(model, f'layer{layer}')
        for block in range(2 * len(stage)):
            prefix = f'module.layer{layer}.{block}.'
            o = {k[len(prefix):]: v for k, v in official.items() if k.startswith(prefix)}
            x = torch.randn(1, width, 16, 16)
            unit = getattr(stage[block // 2], f'conv{block % 2 + 1}')
            expected = official_block(o, x)
            torch.testing.assert_close(unit(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
            width, blocks = o['bn1.weight'].numel(), blocks + 1
    assert blocks == len([k for k in official if 'binary_conv' in k])
    assert torch.equal(model.fc.weight, official['module.fc.weight'])
    x = torch.randn(2, 64, 8, 8)  # nothing but the units is left in a block
    torch.testing.assert_close(model.layer1[0](x), model.layer1[0].conv2(model.layer1[0].conv1(x)))


def test_official_resnet_checkpoint_of_the_first_step_and_at_other_doors():
    official = official_resnet('reactnet_resnet18', '4-D', prefix='')
    one = timm.create_model('reactnet_resnet18', real_weights=True)
    one.load_state_dict(resnet_filter_fn(official, one), strict=True)
    unit = one.layer1[0].conv1
    assert torch.equal(unit.conv.quantized_weight(), official['layer1.0.binary_conv.weight'])
    el = timm.create_model('el_resnet18', recipe='reactnet')
    el.load_state_dict(resnet_filter_fn({'state_dict': official}, el), strict=True)
    own = el.state_dict()
    assert resnet_filter_fn(own, el) is own


@pytest.mark.parametrize('name, recipe, change, message', [
    ('bireal_resnet18', 'bireal', lambda s: s.pop('layer2.1.bn1.bias'), 'layer2.1.bn1.bias: missing from'),
    ('bireal_resnet18', 'bireal', lambda s: s.pop('layer2.1.binary_conv.weights'), 'layer2.1.binary_conv.weight: miss'),
    ('bireal_resnet18', 'bireal', lambda s: s.update(extra=torch.zeros(1)), 'extra: unknown key'),
    ('bireal_resnet18', 'bireal', lambda s: s.update({'layer2.1.binary_conv.weights': torch.zeros(5, 1)}),
     r'layer2.1.binary_conv.weights: found shape \(5, 1\), expected \(128, 128, 3, 3\)'),
    ('reactnet_resnet18', 'bireal', lambda s: None,
     "layer1.0.move0.bias: unknown key .* expected the layout of the official nets for recipe 'bireal'"),
    ('bireal_resnet18', 'reactnet', lambda s: None, "layer1.0.move0.bias: missing .* for recipe 'reactnet'"),
])
def test_bad_official_resnet_checkpoint_is_refused_by_key(name, recipe, change, message):
    state = official_resnet(name, '(N, 1)', prefix='')
    change(state)
    with pytest.raises(ValueError, match=message):
        resnet_filter_fn(state, timm.create_model('el_resnet18', recipe=recipe, device='meta'))


def test_a_fresh_mobilenet_starts_near_chance_with_few_classes():
    """Features are sums over all links: with timm's classifier the first loss is ten times that of chance."""
    torch.manual_seed(0)
    model = timm.create_model('el_mobilenet_v1', num_classes=10)
    loss = F.cross_entropy(model(torch.randn(16, 3, 64, 64)), torch.arange(16) % 10)
    assert loss < 2 * math.log(10)


@pytest.mark.parametrize('name, official, to_ours', [
    ('reactnet_a', lambda: official_state('step1', ''), checkpoint_filter_fn),
    ('bireal_resnet18', lambda: official_resnet('bireal_resnet18', '4-D', ''), resnet_filter_fn)])
def test_an_official_checkpoint_loads_into_frozen_norms(name, official, to_ours):
    plain, frozen = timm.create_model(name), freeze_batch_norm_2d(timm.create_model(name))
    plain.load_state_dict(to_ours(official(), plain))
    frozen.load_state_dict(to_ours(official(), frozen))
    expected = plain.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in frozen.state_dict().items())


FEATURES = [(name, cls) for name in ('el_resnet20', 'el_mobilenet_v1', 'el_reactnet_c')
            for cls in ('fx', 'hook', 'getter', 'list', 'dict') if (name, cls) not in (
                ('el_mobilenet_v1', 'list'), ('el_mobilenet_v1', 'dict'))]  # timm's lists want features at the root


@pytest.mark.parametrize('name, cls', FEATURES)
def test_feature_extractors_of_every_class_keep_the_units_and_what_is_done_with_them(name, cls, tmp_path):
    def maps(model):
        with torch.no_grad():
            found = model.eval()(x)
        return list(found.values()) if isinstance(found, dict) else found

    x, size = torch.randn(2, 3, 64, 64), (3, 64, 64)
    whole, part = tmp_path / 'whole.safetensors', tmp_path / 'part.safetensors'
    torch.manual_seed(0)
    timm_el.save_packed(randomise(timm.create_model(name)), whole)
    kwargs = dict(features_only=True, pretrained=True, pretrained_cfg_overlay=dict(file=str(whole)))
    model, features = timm.create_model(name, **kwargs), timm.create_model(name, feature_cls=cls, **kwargs)
    expected = maps(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, maps(features), strict=True))
    assert timm_el.summarize(features, size).binary_macs == timm_el.summarize(model, size).binary_macs > 0
    for a, b in zip(maps(timm_el.deploy(model)), maps(timm_el.deploy(features)), strict=True):
        torch.testing.assert_close(a, b)
    timm_el.save_packed(features, part)
    again = timm_el.load_packed(timm.create_model(name, features_only=True, feature_cls=cls), part)
    assert all(torch.equal(a, b) for a, b in zip(expected, maps(again), strict=True))


@pytest.mark.parametrize('trace', [torch.fx.symbolic_trace, torch.jit.script])
def test_a_traced_model_is_called_that_and_not_a_float_one(trace, tmp_path):
    model = timm.create_model('el_resnet20')
    timm_el.save_packed(model, tmp_path / 'm.safetensors')
    traced = trace(model)
    for run in (timm_el.pack_state_dict, lambda m: timm_el.load_packed(m, tmp_path / 'm.safetensors')):
        with pytest.raises(ValueError, match='model: found a .*(Graph|Script)Module.*, expected the model that it was'):
            run(traced)
