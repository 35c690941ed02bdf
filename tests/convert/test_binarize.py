"""binarize() on timm's and torchvision's nets: what it keeps, reports and refuses, and that it is atomic."""
import copy
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from conftest import randomise
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_leaves

import timm_el
from timm_el.layers import BinaryConv2d, BinaryUnit, input_sign_shares

TIMM_HOSTS = [
    'resnet18', 'resnet26', 'resnet50', 'resnet18d', 'resnet26t', 'seresnet50', 'ecaresnet26t',
    'resnetblur18', 'wide_resnet50_2', 'mobilenetv1_100', 'mobilenetv1_100h']
TV_HOSTS = ['resnet18', 'resnet50', 'resnext50_32x4d']


def host(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith('tv:'):
        return torchvision.models.get_model(name[3:])
    return timm.create_model(name)


HOSTS = [*TIMM_HOSTS, *(f'tv:{name}' for name in TV_HOSTS)]


@pytest.mark.parametrize('name', HOSTS)
def test_host_recipe_gives_the_hosts_own_outputs(name):
    """Proves the pairing of convolutions with norms, and that the comparison can fail."""
    model = randomise(host(name)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        timm_el.binarize(model, 'host')
        units = [m for m in model.modules() if isinstance(m, BinaryUnit)]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        for unit in (units[0], units[-1]):
            unit.norm.running_mean.add_(1)
            assert (model(x) - expected).abs().max() > 1e-3 * expected.abs().max()
            unit.norm.running_mean.sub_(1)


@pytest.mark.parametrize('name', HOSTS)
def test_every_weight_of_the_host_survives(name):
    model = host(name)
    weights = {m.weight.data_ptr(): m.weight.clone() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    modes = {m.training for m in model.eval().modules()}
    timm_el.binarize(model)
    after = {m.weight.data_ptr(): m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[k], weights[k]) for k in weights)
    assert {m.training for m in model.modules()} == modes == {False}


@pytest.mark.parametrize('name', HOSTS)
def test_converted_net_trains_and_no_sign_is_dead(name, photos):
    model = timm_el.binarize(host(name))
    for mode in (True, False):
        shares = input_sign_shares(model.train(mode), photos[:4])
        assert shares and all(0.01 < share < 0.99 for share in shares.values()), (mode, shares)
    model.train()(photos[:2, :, :96, :96]).square().mean().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize('name', HOSTS)
def test_report_accounts_for_every_layer(name):
    model = host(name)
    layers = {p: m.weight.numel() for p, m in model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))}
    report = timm_el.binarize(model).binarize_report
    assert {row.path: row.params for row in report.rows} == layers
    binary = {p: m for p, m in model.named_modules() if isinstance(m, BinaryConv2d)}
    assert {row.path + '.conv' for row in report.rows if row.status == 'binarized'} == set(binary)
    kept = {row.path: row.reason for row in report.rows if row.status == 'kept'}
    assert all(kept.values())
    assert next(iter(kept.values())) == 'first convolution'
    assert report.binarized_share == sum(m.weight.numel() for m in binary.values()) / sum(layers.values())
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    text = str(report)
    assert all(path in text for path in layers) and report.recipe.name in text


def test_el_on_a_depthwise_separable_host_is_el_mobilenet_and_the_report_says_so():
    report = timm_el.binarize(timm.create_model('mobilenetv1_100')).binarize_report
    assert report.recipe.name == 'el_mobilenet' and any('el_mobilenet' in note for note in report.notes)
    own = timm_el.RECIPES['el']
    assert timm_el.binarize(timm.create_model('mobilenetv1_100'), own).binarize_report.recipe is own
    assert timm_el.binarize(timm.create_model('resnet18')).binarize_report.recipe.name == 'el'


def test_roles_that_a_host_lacks_are_named_in_the_report():
    notes = timm_el.binarize(timm.create_model('resnet18')).binarize_report.notes
    assert any('recipe.scale_input' in note and 'reduce' in note for note in notes)


def test_no_activation_is_left_in_a_resnet_and_none_precedes_a_sign_in_a_mobilenet():
    for name in ('resnet50', 'tv:resnet50', 'resnet26t'):
        model = timm_el.binarize(host(name))
        assert not [m for m in model.modules() if isinstance(m, (nn.ReLU, nn.SiLU))]
    model = timm_el.binarize(host('mobilenetv1_100'))
    acts = [m for m in model.modules() if isinstance(m, (nn.ReLU, nn.ReLU6))]
    units = [m for m in model.modules() if isinstance(m, BinaryUnit)]
    assert len(units) == 26 and all(u.act_first and u.act in acts for u in units)
    assert [type(m) for m in model.bn1] == [nn.ReLU6, type(model.blocks[0][0].conv_dw.norm)] and len(acts) == 27


def test_registered_resnet_with_stride_on_the_3x3_equals_the_converted_timm_resnet():
    ours = randomise(timm.create_model('el_resnet50', stride_first=False), seed=1).eval()
    theirs = timm_el.binarize(timm.create_model('resnet50', avg_down=True)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        assert not torch.equal(ours(x), timm.create_model('el_resnet50').eval()(x))


def test_keep_takes_paths_and_patterns():
    model = timm_el.binarize(timm.create_model('resnet26'), keep=('layer1', '*.0.conv3'))
    rows = {row.path: row for row in model.binarize_report.rows}
    assert rows['layer1.1.conv2'].reason == "keep='layer1'" and rows['layer3.0.conv3'].reason == "keep='*.0.conv3'"
    assert isinstance(model.layer1[0].conv1, nn.Conv2d) and isinstance(model.layer2[0].conv1, BinaryUnit)
    assert rows['layer2.0.conv2'].status == 'binarized'


def test_kept_convolutions_of_a_basic_block_leave_its_shortcut_alone():
    model = timm_el.binarize(timm.create_model('resnet18'), keep=('layer2.0.conv1',))
    assert isinstance(model.layer2[0].downsample[0], nn.Conv2d)
    assert model.layer2[0].conv2.link is None


def snapshot(model: nn.Module):
    return [(p, id(m), m.training, len(m._forward_pre_hooks)) for p, m in model.named_modules()], {
        k: v.clone() for k, v in model.state_dict().items()
        if isinstance(v, torch.Tensor) and not torch.nn.parameter.is_lazy(v)}


def hooked() -> nn.Module:
    model = timm.create_model('resnet18')
    model.layer3[0].conv2.register_forward_hook(lambda *args: None)
    return model


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)


@pytest.mark.parametrize('build, kwargs, error, message', [
    (lambda: timm.create_model('resnet18'), dict(recipe='foo'), ValueError, "recipe: unknown name 'foo', expected"),
    (lambda: timm.create_model('resnet18'), dict(recipe=7), TypeError, 'recipe: found a int'),
    (Mlp, {}, ValueError, 'model: Mlp has no Conv2d'),
    (lambda: timm_el.binarize(timm.create_model('resnet18')), {}, ValueError, r'layer1.0.conv1: .* already binarized'),
    (lambda: timm.create_model('el_resnet18'), dict(recipe='host'), ValueError, 'already binarized'),
    (hooked, {}, ValueError, r'layer3.0.conv2: the Conv2d carries hooks \(_forward_hooks\)'),
    (lambda: timm.create_model('resnet18'), dict(keep=('layer9',)), ValueError, "keep: 'layer9' matches no"),
    (lambda: timm.create_model('resnet18'), dict(keep='layer1'), TypeError,
     "keep: found 'layer1', expected a sequence"),
])
def test_refusals_name_the_argument_and_leave_the_model_as_it_was(build, kwargs, error, message):
    model = build()
    modules, tensors = snapshot(model)
    with pytest.raises(error, match=message):
        timm_el.binarize(model, **kwargs)
    modules_after, tensors_after = snapshot(model)
    assert modules_after == modules
    assert tensors_after.keys() == tensors.keys() and all(torch.equal(tensors[k], tensors_after[k]) for k in tensors)


def test_a_module_is_asked_for():
    with pytest.raises(TypeError, match='model: found a str'):
        timm_el.binarize('resnet18')


@pytest.mark.parametrize('x, error, message', [
    (torch.zeros(3, 64, 64), ValueError, r'images input: found shape \(3, 64, 64\), expected \(N, 3, H, W\)'),
    (torch.zeros(1, 1, 64, 64), ValueError, r'expected \(N, 3, H, W\)'),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, r'images input: found dtype torch.uint8.*\.float\(\)'),
    (torch.zeros(1, 3, 31, 64), ValueError, r'images input: found 31 x 64 pixels, expected at least 32 x 32'),
])
@pytest.mark.parametrize('name', ['el_resnet26', 'el_mobilenet_v1', 'reactnet_a', 'converted', 'torchvision'])
def test_bad_images_are_refused_by_name(name, x, error, message):
    if name == 'converted':
        model = timm_el.binarize(timm.create_model('resnet18'))
    elif name == 'torchvision':
        model = timm_el.binarize(torchvision.models.resnet18())
    else:
        model = timm.create_model(name)
    with pytest.raises(error, match=message):
        model.eval()(x)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


# ------------------------------------------------------------------------------------- hosts that are not as they were

def test_a_net_that_is_kept_whole_keeps_its_activations():
    model = timm.create_model('resnet26').eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    timm_el.binarize(model, keep=('layer1', 'layer2', 'layer3', 'layer4'))
    assert torch.equal(model(x), expected)


def test_activations_stay_between_float_convolutions_and_go_before_signs():
    model = timm_el.binarize(timm.create_model('resnet26'), keep=('layer1.1',))
    assert isinstance(model.layer1[1].act1, nn.ReLU) and isinstance(model.layer1[1].act2, nn.ReLU)
    assert isinstance(model.layer1[1].act3, nn.Identity)  # layer2.0.conv1 is binary
    assert isinstance(model.act1, nn.Identity)


@pytest.mark.parametrize('build', [
    lambda: timm.create_model('resnetrs50'), lambda: timm.create_model('el_resnet26', replace_stem_pool=True),
    lambda: timm.layers.freeze_batch_norm_2d(timm.create_model('mobilenetv1_100')),
    lambda: timm.layers.convert_sync_batchnorm(timm.create_model('mobilenetv1_100')),
], ids=['resnetrs', 'stem pool', 'frozen norm', 'sync norm'])
def test_no_sign_is_dead_on_unusual_stems_and_norms(build, photos):
    model = build()
    if not hasattr(model, 'binarize_report'):
        timm_el.binarize(model)
    assert model.binarize_report.count('binarized') > 20
    for share in input_sign_shares(model.eval(), photos[:4]).values():
        assert 0.01 < share < 0.99


@pytest.mark.parametrize('change', ['stem', 'pool', 'pool stride'])
def test_cifar_stems_set_the_smallest_image(change):
    model = torchvision.models.resnet18()
    if change == 'stem':
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.MaxPool2d(3, (2, 2), 1) if change == 'pool stride' else nn.Identity()
    stride = {'stem': 8, 'pool': 16, 'pool stride': 32}[change]
    timm_el.binarize(model).eval()
    assert model(torch.zeros(1, 3, stride, stride)).shape == (1, 1000)
    with pytest.raises(ValueError, match=f'expected at least {stride} x {stride}'):
        model(torch.zeros(1, 3, stride - 1, stride))


class Doubled(nn.Conv2d):
    """A convolution with a forward that nobody knows."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_convolutions_with_a_forward_of_their_own_are_kept_and_named():
    model = timm.create_model('resnet26')
    model.layer2[0].conv2 = Doubled(128, 128, 3, stride=2, padding=1, bias=False)
    report = timm_el.binarize(model).binarize_report
    row = next(row for row in report.rows if row.path == 'layer2.0.conv2')
    assert row.status == 'kept' and row.reason == 'Doubled has a forward of its own' and not row.possible
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize('fails', [False, True])
def test_frozen_norms_stay_frozen(fails):
    model = timm.create_model('resnet26').train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if fails:
        model.layer4[1].conv3 = Doubled(512, 2048, 1, bias=False)
        with pytest.raises(ValueError, match='layer4.1.conv3'):
            timm_el.binarize(model, strict=True)
    else:
        timm_el.binarize(model)
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_each_network_in_a_model_has_a_first_convolution_of_its_own():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(512, 2, 1)
            self.backbone = torchvision.models.resnet18()

    model = timm_el.binarize(Segmenter())
    rows = {row.path: row for row in model.binarize_report.rows}
    assert rows['backbone.conv1'].reason == 'first convolution' and type(model.head) is nn.Conv2d
    assert rows['backbone.layer1.0.conv1'].status == 'binarized' and rows['head'].reason == 'no known block holds it'


def test_report_tells_removed_layers_stage_one_and_missing_links():
    rows = {row.path: row for row in timm_el.binarize(timm.create_model('resnet26'), 'el_4').binarize_report.rows}
    assert rows['layer1.0.downsample.0'].status == 'removed'
    report = timm_el.binarize(timm.create_model('resnet26'), real_weights=True).binarize_report
    assert report.count('binary inputs') == 24 and report.binarized_share == 0
    report = timm_el.binarize(timm.create_model('resnet18'), 'el_2').binarize_report
    assert report.count('binarized') == 16
    report = timm_el.binarize(timm.create_model('resnet18'), 'first_float').binarize_report
    assert any('recipe.real' in note and 'reduce' in note for note in report.notes)
    report = timm_el.binarize(timm.create_model('mobilenetv1_100')).binarize_report
    assert any('running statistics of 27 norms start anew' in note for note in report.notes)


def test_shared_layers_are_kept_and_named():
    model = timm.create_model('resnet26')
    model.layer1[1].conv2 = model.layer1[0].conv2
    model.layer2[1].conv3.weight = model.layer2[0].conv3.weight
    rows = {row.path: row for row in timm_el.binarize(model).binarize_report.rows}
    reasons = {path: row.reason for path, row in rows.items() if not row.possible}
    assert reasons == {
        'layer1.0.conv2': 'its weight is used at layer1.1.conv2 too',
        'layer2.0.conv3': 'its weight is used at layer2.1.conv3 too',
        'layer2.1.conv3': 'its weight is used at layer2.0.conv3 too'}
    assert model.layer1[1].conv2 is model.layer1[0].conv2 and type(model.layer1[0].conv2) is nn.Conv2d
    assert rows['layer1.1.conv1'].status == 'binarized'


def test_frozen_layers_stay_frozen_with_all_that_is_new():
    model = timm.create_model('regnetx_002')
    for p in model.s2.parameters():
        p.requires_grad_(False)
    timm_el.binarize(model)
    trainable = {k for k, p in model.named_parameters() if p.requires_grad}
    assert not any(k.startswith('s2.') for k in trainable)
    assert 's2.b1.conv1.conv.link.gamma' in dict(model.named_parameters())
    assert 's1.b1.conv1.conv.link.gamma' in trainable


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))


def quantized() -> nn.Module:
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.ao.quantization.quantize_dynamic(timm.create_model('resnet18'), {nn.Linear})


def whole_numbers() -> nn.Module:
    model = timm.create_model('resnet18')
    model.layer1[0].conv1.weight = nn.Parameter(torch.ones(64, 64, 3, 3, dtype=torch.int8), requires_grad=False)
    return model


class Foreign(torch.Tensor):
    """A tensor subclass, such as torchao's and DTensor."""


def subclassed(path: str) -> nn.Module:
    model = timm.create_model('resnet18')
    layer = model.get_submodule(path)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Foreign))
    return model


def scripted() -> nn.Module:
    return torch.jit.script(timm.create_model('test_resnet'))


def parametrized() -> nn.Module:
    model = timm.create_model('resnet26')
    torch.nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    return model


def act_hooked() -> nn.Module:
    model = timm.create_model('resnet26')
    model.layer1[0].act2.register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize('build, kwargs, error, message', [
    (lazy, {}, ValueError, '0.weight: the LazyConv2d is not initialised yet; pass a batch'),
    (quantized, {}, ValueError, 'fc: found Linear of a quantized model, expected a float model'),
    (whole_numbers, {}, ValueError, 'layer1.0.conv1: the weight of the Conv2d is a Parameter of torch.int8'),
    (lambda: subclassed('layer2.0.conv1'), {}, ValueError,
     'layer2.0.conv1: the weight of the Conv2d is a Foreign of torch.float32, expected a plain float tensor; take'),
    (lambda: subclassed('fc'), {}, ValueError, 'fc: the weight of the Linear is a Foreign'),
    (lambda: subclassed('layer1.0.bn2'), {}, ValueError, 'layer1.0.bn2: the weight of the BatchNorm2d is a Foreign'),
    (scripted, {}, ValueError, 'model: found a RecursiveScriptModule, expected the module that it was made of'),
    (lambda: torch.compile(timm.create_model('resnet18')), {}, ValueError, 'model: found a OptimizedModule'),
    (lambda: nn.DataParallel(timm.create_model('resnet18')), {}, ValueError, 'model: found a DataParallel'),
    (lambda: timm.create_model('resnet18'), dict(example_input=torch.zeros(3, 64, 64)), ValueError,
     r'example_input: found \(3, 64, 64\), expected a tensor \(N, C, H, W\)'),
    (parametrized, {}, ValueError, 'layer1.0.conv1: the weight of the .* is parametrized'),
    (act_hooked, {}, ValueError, 'layer1.0.act2: the ReLU carries hooks'),
    (lambda: timm.create_model('resnet26'), dict(keep=None), TypeError, 'keep: found None'),
    (lambda: timm.create_model('resnet26'), dict(keep=[5]), TypeError, r'keep: found \[5\]'),
    (lambda: timm.create_model('resnet26'),
     dict(recipe=timm_el.Recipe('x', link=('reduce',), omit=('reduce',), elastic=False)), ValueError,
     "layer1.1.conv1: recipe 'x' omits it and gives it no link"),
])
def test_unfit_hosts_are_refused_by_name_and_left_as_they_were(build, kwargs, error, message):
    model = build()
    modules, _ = snapshot(model)
    with pytest.raises(error, match=message):
        timm_el.binarize(model, **kwargs)
    assert snapshot(model)[0] == modules


@pytest.mark.parametrize('name, kwargs, message', [
    ('el_resnet18', dict(in_chans=0), 'in_chans: found 0'), ('reactnet_a', dict(in_chans=-1), 'in_chans: found -1'),
    ('el_mobilenet_v1', dict(num_classes=-1), 'num_classes: found -1'),
    ('el_resnet26', dict(aa_layer=nn.AvgPool2d), 'stride_first: .* anti-aliasing'),
])
def test_bad_counts_of_a_registered_model(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **kwargs)


@pytest.mark.parametrize('name, kwargs, message', [
    ('el_resnet26', dict(real_weights='false'), "real_weights: found 'false', expected True or False"),
    ('el_resnet26', dict(stride_first='false'), "stride_first: found 'false'"),
    ('el_mobilenet_v1', dict(real_weights='false'), "real_weights: found 'false'"),
    ('reactnet_a', dict(real_weights='false'), "real_weights: found 'false'"),
])
def test_flags_of_the_command_line_are_not_taken_for_true(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **kwargs)


def test_a_shared_activation_is_reported_as_it_is():
    model = timm_el.binarize(torchvision.models.resnet50(), keep=('layer1.0.conv1', 'layer1.0.conv2'))
    rows = {row.path: row for row in model.binarize_report.rows}
    assert rows['layer1.0.conv1'].act == 'dropped' and isinstance(model.layer1[0].relu, nn.Identity)


def test_foreign_activations_between_known_blocks_kill_no_sign(photos):
    class Other(torchvision.models.ResNet):
        def _forward_impl(self, x):
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                x = torch.relu(stage(x))
            return self.fc(x.mean((2, 3)))

    appended = timm.create_model('resnet18')
    appended.layer1 = nn.Sequential(appended.layer1, nn.ReLU())
    for model in (Other(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]), appended):
        timm_el.binarize(model)
        shares = input_sign_shares(model.eval(), photos[:4, :, :96, :96])
        assert shares and all(0.01 < share < 0.99 for share in shares.values())


def test_a_net_that_was_left_alone_can_be_converted_again():
    model = timm_el.binarize(timm.create_model('resnet18'), keep=('layer*',))
    assert timm_el.binarize(model).binarize_report.count('binarized') == 16


# ---------------------------------------------------------------------------------------------------- the user's hooks

class Keeper(nn.Module):
    """A net that keeps its last signal, counts its passes, may look at values, and may hold what cannot be copied."""

    def __init__(self, values: bool = False, lock: bool = False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 2)
        self.register_buffer('passes', torch.zeros((), dtype=torch.int32))
        self.last, self.values, self.lock = None, values, threading.Lock() if lock else None

    def forward(self, x):
        self.passes += 1
        self.last = self.block(self.stem(x))
        if self.values and x.sum() > 1e9:
            return x
        return self.fc(self.last.mean((2, 3)))


WATCHED = {
    'features by hooks': lambda: timm.create_model('efficientnet_b0', features_only=True, feature_cls='hook'),
    'features by hooks, refused': lambda: timm.create_model('resnet18', features_only=True, feature_cls='hook'),
    'known blocks': lambda: timm.create_model('resnet18'),
    'traced': lambda: timm.create_model('test_efficientnet'),
    'keeper': Keeper,
    'keeper of values': lambda: Keeper(values=True),
    'keeper of a lock': lambda: Keeper(lock=True),
    'keeper of values and a lock': lambda: Keeper(values=True, lock=True),
}


@pytest.fixture
def watch():
    """Puts hooks on all that holds a convolution, and on all modules; gives what they have stored."""
    seen, handles = [], []

    def store(module, *values):
        seen.append(values)

    def start(model: nn.Module) -> list:
        handles.append(register_module_forward_hook(store))
        handles.append(register_module_forward_pre_hook(store))
        for module in model.modules():
            if any(isinstance(m, nn.Conv2d) for m in module.children()):
                handles.append(module.register_forward_hook(store))
                handles.append(module.register_forward_pre_hook(store))
                handles.append(module.register_full_backward_hook(store))
        return seen

    yield start
    for handle in handles:
        handle.remove()


def attributes(model: nn.Module) -> dict:
    """What the modules hold beside tensors and other modules; of a dict of hooks, its identity and its hooks."""
    slots = ('_modules', '_parameters', '_buffers', 'binarize_report')
    return {module: {k: (id(v), dict(v)) if k.endswith('hooks') and isinstance(v, dict) else v
                     for k, v in vars(module).items() if k not in slots} for module in model.modules()}


@pytest.mark.parametrize('run, refused', [
    (timm_el.binarize, False), (timm_el.summarize, False), (lambda m: timm_el.binarize(m, strict=True), True)],
    ids=['binarize', 'summarize', 'strict'])
@pytest.mark.parametrize('name', WATCHED)
def test_no_hook_of_the_users_runs_and_the_modules_stay_as_they_were(name, run, refused, watch):
    torch.manual_seed(0)
    model = WATCHED[name]()
    if refused:
        next(m for m in model.modules() if isinstance(m, nn.Conv2d)).more = Doubled(3, 4, 1)
    seen, buffers = watch(model), {k: v.clone() for k, v in model.named_buffers()}
    before = attributes(model)
    try:
        run(model)
    except (ValueError, RuntimeError, TypeError):
        assert refused or 'refused' in name or run is timm_el.summarize and 'keeper of' in name
    assert not seen
    after = attributes(model)
    guarded = {m for m in after if hasattr(m, 'min_input_size')} | {model}  # with hooks of the conversion's own
    for module in after.keys() & before.keys() - guarded:
        assert after[module] == {k: v for k, v in before[module].items() if k in after[module]}
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers() if k in buffers)
    assert getattr(model, 'last', None) is None
    if not getattr(model, 'lock', None):
        copy.deepcopy(model)
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert seen and not any(x.is_meta for values in seen for x in tree_leaves(values) if isinstance(x, torch.Tensor))


def test_writing_a_hub_folder_runs_no_hook(watch, tmp_path):
    model = timm_el.binarize(timm.create_model('test_resnet', num_classes=3)).eval()
    seen = watch(model)
    timm_el.save_for_hub(model, tmp_path)
    assert not seen
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert seen


def test_loading_a_float_checkpoint_runs_no_hook(watch):
    host = timm.create_model('mobilenetv1_100')
    model = timm_el.binarize(timm.create_model('mobilenetv1_100'))
    seen = watch(model)
    timm_el.load_float(model, host.state_dict())
    assert not seen


def test_hooks_that_hold_tensors_of_a_graph_hinder_nothing():
    """Such tensors cannot be copied."""
    class Recorder:
        outputs = ()

        def __call__(self, module, args, output):
            self.outputs = (*self.outputs, output)

    model, recorder = timm.create_model('test_efficientnet'), Recorder()
    model.blocks[0].register_forward_hook(recorder)
    model(torch.randn(1, 3, 64, 64))
    kept = recorder.outputs
    timm_el.summarize(model, (3, 64, 64))
    timm_el.binarize(model)
    assert len(kept) == 1 and recorder.outputs is kept and kept[0].requires_grad


@pytest.mark.parametrize('path', ['bn1', 'bn1.act', 'bn1.drop', 'blocks.1.0.bn1.act'])
def test_hooks_on_the_parts_of_a_norm_are_refused_too(path):
    model = timm.create_model('test_efficientnet')
    model.get_submodule(path).register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=f'{path}: the .* carries hooks'):
        timm_el.binarize(model)


# ------------------------------------------------------------------------------------------- weights that are computed

COMPUTING = {
    'pruned': lambda layer: prune.l1_unstructured(layer, 'weight', 0.5), 'weight norm': parametrizations.weight_norm,
    'spectral norm': parametrizations.spectral_norm, 'old weight norm': nn.utils.weight_norm,
    'old spectral norm': nn.utils.spectral_norm}
RESNET, TRACED = 'resnet18', 'test_efficientnet'


@pytest.mark.filterwarnings('ignore:.*weight_norm.*is deprecated:FutureWarning')
@pytest.mark.parametrize('name, path', [
    (RESNET, 'conv1'), (RESNET, 'layer1.0.conv1'), (TRACED, 'conv_stem'), (TRACED, 'blocks.1.0.conv_pwl')])
@pytest.mark.parametrize('kind', COMPUTING)
def test_a_convolution_whose_weight_is_computed_is_refused_by_path_with_the_remedy(kind, name, path):
    model = timm.create_model(name)
    COMPUTING[kind](model.get_submodule(path))
    modules, tensors = snapshot(model)
    with pytest.raises(ValueError, match=rf"^{path}: the weight of the .*; call torch\.nn\.utils\..*'weight'\) first"):
        timm_el.binarize(model)
    after, tensors_after = snapshot(model)
    assert after == modules and all(torch.equal(tensors[k], v) for k, v in tensors_after.items())


@pytest.mark.filterwarnings('ignore:.*weight_norm.*is deprecated:FutureWarning')
@pytest.mark.parametrize('name, path, reason', [
    (RESNET, 'fc', 'classifier'), (RESNET, 'layer2.0.downsample.0', 'residual downsample'),
    (TRACED, 'classifier', 'classifier')])
@pytest.mark.parametrize('kind', COMPUTING)
def test_a_layer_that_stays_float_may_compute_its_weight(kind, name, path, reason):
    torch.manual_seed(0)
    model, twin = timm.create_model(name), timm.create_model(name)
    twin.load_state_dict(model.state_dict())
    COMPUTING[kind](model.get_submodule(path))
    layer, keys = model.get_submodule(path), model.get_submodule(path).state_dict().keys()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    timm_el.binarize(model)
    timm_el.binarize(twin)
    row = {row.path: row for row in model.binarize_report.rows}[path]
    other = {row.path: row for row in twin.binarize_report.rows}[path]
    assert (row.status, row.reason, row.params) == ('kept', reason, other.params)
    place = next(p for p, m in model.named_modules() if m is layer)
    assert layer.state_dict().keys() == keys and all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert any(p.grad is not None for p in model.get_submodule(place).parameters())
    counted = timm_el.summarize(model, (3, 64, 64))
    assert counted.params == sum(p.numel() for p in model.parameters())
    assert counted.real_macs == timm_el.summarize(twin, (3, 64, 64)).real_macs


@pytest.mark.filterwarnings('ignore:.*weight_norm.*is deprecated:FutureWarning')
@pytest.mark.parametrize('kind', COMPUTING)
def test_a_binary_weight_that_is_computed_is_not_counted_as_float(kind):
    model = timm_el.binarize(timm.create_model('test_resnet'))
    COMPUTING[kind](model.layer1[0].conv2.conv)
    with pytest.raises(ValueError, match=r'^layer1.0.conv2.conv: the weight of the .* call torch\.nn\.utils'):
        timm_el.summarize(model)
# ------------------------------------------------------------------------------------------- all or nothing

class Stubborn(nn.Sequential):
    """A stage that lets its parts be exchanged a few times, and then refuses once."""
    patience = 1000

    def __setattr__(self, name, value):
        if isinstance(value, nn.Module) and name in self.__dict__.get('_modules', {}):
            type(self).patience -= 1
            if type(self).patience == -1:
                raise KeyboardInterrupt
        super().__setattr__(name, value)


class Interrupted(nn.Module):
    """A net that no table describes; it is interrupted when it is run for real, to judge its signs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

    def forward(self, x):
        if isinstance(x, torch.Tensor) and x.device.type != 'meta':
            raise KeyboardInterrupt
        return self.fc(self.b(torch.relu(self.a(x))).mean((2, 3)))


def in_the_middle(patience: int) -> nn.Module:
    Stubborn.patience = patience
    return nn.Sequential(nn.Conv2d(3, 8, 3), Stubborn(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize('build', [
    lambda: in_the_middle(0), lambda: in_the_middle(2), lambda: in_the_middle(4), Interrupted])
def test_an_interruption_in_the_middle_leaves_the_model_as_it_was(build):
    model = build()
    modules, tensors = snapshot(model)
    try:
        with pytest.raises(KeyboardInterrupt):
            timm_el.binarize(model)
    finally:
        Stubborn.patience = 1000
    modules_after, tensors_after = snapshot(model)
    assert modules_after == modules and tensors_after.keys() == tensors.keys()
    assert not hasattr(model, 'binarize_report') and not model._load_state_dict_pre_hooks
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize('fails', ['guard_loading', 'make_report', 'shift_before_pool'])
def test_what_fails_behind_the_exchange_of_modules_is_taken_back_too(fails, monkeypatch):
    monkeypatch.setattr(sys.modules[timm_el.binarize.__module__], fails, lambda *args, **kwargs: 1 / 0)
    model = timm.create_model('resnet18')
    modules, tensors = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        timm_el.binarize(model)
    modules_after, tensors_after = snapshot(model)
    assert modules_after == modules and tensors_after.keys() == tensors.keys()
    assert all(torch.equal(tensors[k], tensors_after[k]) for k in tensors)


def test_threads_that_binarize_at_once_each_get_their_net():
    names = ['test_resnet', 'test_efficientnet', 'test_convnext', 'test_nfnet'] * 2

    def report(name: str) -> str:
        return str(timm_el.binarize(timm.create_model(name, num_classes=3)).binarize_report)

    alone = [report(name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(report, names)) == alone


# ---------------------------------------------------------------------------------------------------------------------
# Known networks in other clothes


SMALL = dict(layers=[1] * 4, channels=(8, 8, 16, 16), num_classes=3)


def with_mlp(model: nn.Module) -> nn.Module:
    model.fc = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    return model


def with_a_spare_layer(model: nn.Module) -> nn.Module:
    model.spare = nn.Conv2d(3, 3, 1)  # which the forward does not know
    return model


@pytest.mark.parametrize('dress', [
    with_mlp, with_a_spare_layer, lambda model: timm.create_model('resnet18', features_only=True, **SMALL)],
    ids=['MLP', 'spare layer', 'features'])
def test_what_stands_beside_a_known_network_does_not_change_how_it_is_converted(dress):
    def facts(model):
        report = timm_el.binarize(model, 'bireal').binarize_report
        return {row.path: row.to_dict() for row in report.rows if row.path.startswith(('conv1', 'layer'))}

    plain, dressed = timm.create_model('resnet18', **SMALL), dress(timm.create_model('resnet18', **SMALL))
    assert facts(dressed) == facts(plain)
    own = {key for key in plain.state_dict() if key.startswith(('conv1', 'bn1', 'layer'))}
    assert own == {key for key in dressed.state_dict() if key.startswith(('conv1', 'bn1', 'layer'))}


def test_layers_of_a_backbone_of_torchvision_are_converted_as_in_the_whole_network():
    from torchvision.models._utils import IntermediateLayerGetter
    whole = timm_el.binarize(torchvision.models.resnet18(), 'bireal')
    part = timm_el.binarize(IntermediateLayerGetter(torchvision.models.resnet18(), {'layer4': 'out'}), 'bireal')
    assert {key for key in whole.state_dict() if 'layer' in key} == {key for key in part.state_dict() if 'layer' in key}


def test_a_kept_convolution_of_a_block_without_shortcut_leaves_the_other_its_link():
    model = timm_el.binarize(timm.create_model('resnet18', **SMALL), 'el_4', keep=['layer1.0.conv1'])
    assert model.layer1[0].conv2.link is not None


def test_shortcuts_that_a_recipe_takes_away_and_nobody_knows_are_named():
    notes = timm_el.binarize(timm.create_model('regnetx_002'), 'el_4').binarize_report.notes
    assert any(note.startswith('residual=False: ') for note in notes)
    assert not any('residual' in note for note in timm_el.binarize(
        timm.create_model('regnetx_002'), 'el').binarize_report.notes)


def test_hooks_of_layers_that_stay_as_they_are_stay():
    model, calls = timm.create_model('resnet18', **SMALL), []
    for layer in (model.conv1, model.layer1[0].conv1):
        layer.register_forward_hook(lambda *args: calls.append(args[0]))
    timm_el.binarize(model, keep=['layer1.0.conv1'])
    model(torch.randn(1, 3, 64, 64))
    assert calls == [model.conv1, model.layer1[0].conv1]


@pytest.mark.parametrize('verb', [timm_el.binarize, lambda model: timm_el.summarize(model, (3, 32, 32))])
def test_a_scripted_part_costs_nobody_a_hook(verb):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())), nn.Conv2d(8, 8, 3))
    calls: list[str] = []
    model[2].register_forward_hook(lambda *args: calls.append('own'))
    handle = register_module_forward_hook(lambda *args: calls.append('everywhere'))
    try:
        with pytest.raises(ValueError, match='1: found a RecursiveScriptModule, expected the module that'):
            verb(model)
        calls.clear()
        model(torch.randn(1, 3, 32, 32))
    finally:
        handle.remove()
    assert calls.count('own') == 1 and calls.count('everywhere') > 2


@pytest.mark.parametrize('like, error, message', [
    ('el', TypeError, 'like: found a str'), ({}, ValueError, "like: found no 'recipe'"),
    ({'revived': ['gone.conv']}, ValueError, "like: found 'gone.conv' as revived, expected a unit of this host")])
def test_a_plan_that_is_none_of_the_host_is_refused(like, error, message):
    def host():
        return timm.create_model('regnetx_002')

    if isinstance(like, dict) and like:
        like = {**timm_el.binarize(host()).binarize_report.plan(), **like}
    model = host()
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        timm_el.binarize(model, like=like)
    assert list(model.state_dict()) == keys and not hasattr(model, 'binarize_report')


def test_a_deployed_network_is_no_host(photos):
    deployed = timm_el.deploy(timm.create_model('el_resnet20').eval())
    for verb in (timm_el.binarize, timm_el.summarize, lambda m: timm_el.save_packed(m, 'never')):
        with pytest.raises(ValueError, match='model: it is deployed .*, expected the latent network'):
            verb(deployed)


def test_another_default_device_than_the_cpu_changes_nothing():
    plain = timm_el.binarize(timm.create_model('regnetx_002')).binarize_report.to_dict()
    model = timm.create_model('regnetx_002')
    before = torch.get_default_device()
    torch.set_default_device('meta')
    try:
        found = timm_el.binarize(model).binarize_report.to_dict()
    finally:
        torch.set_default_device(before)
    assert found == plain


def test_a_stage_with_two_names_is_converted_and_stays_one(photos):
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = timm.create_model('resnet18', **SMALL)
            self.stage = self.backbone.layer4

        def forward(self, x):
            return self.backbone(x)

    model, plain = Aliased(), timm_el.binarize(timm.create_model('resnet18', **SMALL))
    timm_el.binarize(model)
    assert model.stage is model.backbone.layer4
    assert {f'backbone.{row.path}' for row in plain.binarize_report.rows if row.status == 'binarized'} == {
        row.path for row in model.binarize_report.rows if row.status == 'binarized'}
    assert model(photos).isfinite().all()
