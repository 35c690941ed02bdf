"""deploy(): every unit gives what the latent unit gives, in every model, recipe and converted net."""
import copy
import io
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn as nn
from conftest import EACH_MODEL, randomise, with_slow, worst_unit
from units import UNITS, negative_norm, net, unit

import timm_el
from timm_el import engine
from timm_el.engine import DeployedConv, DeployedUnit
from timm_el.layers import BinaryConv2d, BinaryLinear, BinaryUnit, ElasticLink

REFUSED = ['abc', 'abc_5_5', 'tbn']
RECIPES = [name for name in timm_el.RECIPES if name not in ('host', *REFUSED)]
CONVERTED = [
    'regnety_002', 'mobilenetv3_small_050', 'densenet121', 'convnext_atto', 'resnext26ts', 'nf_regnet_b0',
    'resnetv2_50', 'inception_v3', 'tf_efficientnet_b0', 'resnetv2_50x1_bit', 'hrnet_w18_small', 'poolformerv2_s12']

CALLING_FUNCTIONS = {  # squeeze-excite takes its mean by a function
    'regnety_002', 'mobilenetv3_small_050', 'resnext26ts', 'nf_regnet_b0', 'tf_efficientnet_b0'}


pytestmark = pytest.mark.usefixtures('one_thread')


def check(latent: nn.Module, size: int = 64, exact: bool = True) -> nn.Module:
    """`exact`: the host calls no functions that round in another way than their steps."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, size, size - 1, generator=g) if size < 128 else torch.randn(2, 3, size, size, generator=g)
    deployed = timm_el.deploy(latent)
    assert worst_unit(latent, deployed, x) < 1e-5
    with torch.no_grad():
        alone = timm_el.deploy(latent, fuse_blocks=False)
        found, expected = deployed(x), alone(x)
    assert torch.equal(found, expected) or not exact and (found - expected).abs().max() < 1e-4 * expected.abs().max()
    return deployed


@pytest.mark.parametrize('name', EACH_MODEL)
def test_each_unit_of_a_registered_model_gives_what_the_latent_gives(name):
    deployed = check(net(name))
    units = [path for path, m in net(name).named_modules() if isinstance(m, BinaryUnit)]
    assert all(isinstance(deployed.get_submodule(path), DeployedUnit) for path in units)


@pytest.mark.parametrize('recipe', RECIPES)
def test_each_recipe_deploys(recipe):
    check(net('el_resnet26', recipe=recipe, layers=[1, 1, 1, 1]))


@pytest.mark.parametrize('recipe', REFUSED)
def test_what_takes_more_than_one_product_is_refused_by_name(recipe):
    with pytest.raises(ValueError, match='layer1.0.conv1: .*more than one xor.*bireal'):
        timm_el.deploy(net('el_resnet26', recipe=recipe, layers=[1, 1, 1, 1]))


@pytest.mark.parametrize('recipe', ['el', 'bireal', 's_resnet_k_sie', 'xnor', 'r2b', 'reactnet'])
def test_basic_blocks_deploy(recipe):
    check(net('el_resnet18', recipe=recipe))


@pytest.mark.parametrize('name', with_slow(CONVERTED[:3], CONVERTED))
def test_converted_nets_deploy(name):
    torch.manual_seed(0)
    latent = timm_el.binarize(timm.create_model(name))
    check(randomise(latent).eval(), 96, exact=name not in CALLING_FUNCTIONS)


def test_a_negated_convolution_is_seen():
    """What the tests above measure changes when one layer's weight changes sign."""
    latent = net('el_resnet26')
    deployed = timm_el.deploy(latent)
    with torch.no_grad():
        latent.layer3[0].conv2.conv.weight.neg_()
    assert worst_unit(latent, deployed, torch.randn(1, 3, 64, 64)) > 1e-2


def test_the_shipped_model_gives_the_same_top1(photos):
    """Trained weights: whole-net agreement, on crops of photographs."""
    latent = timm.create_model('el_resnet26', pretrained=True).eval()
    deployed = timm_el.deploy(latent)
    size, step = 128, 16
    crops = photos.unfold(2, size, step).unfold(3, size, step).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, size, size)
    with torch.no_grad():
        expected = latent(crops)
        same = expected.argmax(1) == deployed(crops).argmax(1)
    best, second = expected.topk(2).values.T
    clear = best - second > 0.5  # of what no class is sure, a sign near zero decides
    assert len(crops) >= 300 and clear.float().mean() > 0.5
    assert same[clear].float().mean() >= .995 and same.float().mean() >= .98


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('kind', UNITS)
def test_whatever_a_unit_can_hold_deploys(kind, native):
    torch.manual_seed(0)
    unit = UNITS[kind]()
    engine.use_isa(None if native else 'reference')
    deployed = timm_el.deploy(nn.Sequential(unit).eval())
    x = torch.randn(3, 20, 10, 9)
    x[0, :, 0, 0] = torch.tensor([0., -0., 1e-42, -1e-42, *[0.] * 16])
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), unit(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('options', [{}, {'scale_input': True}, {'bias': False, 'scale_weight': False}])
def test_linear_units_deploy(options):
    torch.manual_seed(0)
    unit = randomise(BinaryUnit(
        BinaryLinear(50, 30, **options), norm=nn.LayerNorm(30), link=ElasticLink(50, 30, channels_last=True))).eval()
    fused = BinaryUnit(BinaryLinear(50, 30, **options), link=ElasticLink(50, 30, channels_last=True)).eval()
    for module in (unit, fused):
        deployed = timm_el.deploy(nn.Sequential(module).eval())
        for shape in ((4, 7, 50), (3, 50), (50,), (0, 50), (2, 3, 5, 50)):
            x = torch.randn(shape)
            with torch.no_grad():
                torch.testing.assert_close(deployed(x), module(x), rtol=1e-5, atol=1e-5)


def test_a_threshold_for_a_norm_is_the_norms_own():
    """At, just below and just above each channel's threshold the signs are those of the norm."""
    from timm_el.engine.epilogue import threshold_of
    norm = negative_norm(16).eval()
    threshold, flip = threshold_of(norm, 16)
    up = torch.where(threshold.isnan(), torch.zeros(16), threshold)
    for x in (up, torch.nextafter(up, torch.tensor(1e30)), torch.nextafter(up, torch.tensor(-1e30)), -up,
              torch.full((16,), 1e20), torch.full((16,), -1e20), torch.full((16,), float('nan'))):
        with torch.no_grad():
            expected = norm(x.reshape(1, -1, 1, 1)).flatten() >= 0
        assert torch.equal(torch.where(flip < 0, -x, x) >= threshold, expected)


# ---------------------------------------------------------------------------------------------------------------------
# What a deployed network is

def test_the_model_is_not_changed_and_the_copy_is_its_own():
    latent = net('el_resnet26')
    before = {k: v.clone() for k, v in latent.state_dict().items()}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = latent(x)
        deployed = timm_el.deploy(latent)
        found = deployed(x)
        assert torch.equal(latent(x), expected)
        for parameter in latent.parameters():
            parameter.fill_(3.)
        assert torch.equal(deployed(x), found)
    assert list(before) == list(latent.state_dict()) and isinstance(deployed, type(latent))
    assert not any(p.requires_grad for p in deployed.parameters())


def test_no_float_convolution_runs_for_a_binary_unit():
    deployed = timm_el.deploy(net('el_resnet26'))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        deployed(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert not any('conv' in key for key in counts if not key.startswith('timm_el::')), counts
    assert counts['timm_el::binary_conv2d'] == 3 * 8  # three a block
    assert counts['timm_el::real_conv2d'] == 2 + 4  # stem, classifier, shortcuts
    assert not any('pool' in key for key in counts if key.startswith('aten'))


def test_hosts_ways_of_running_stay():
    latent, x = net('el_resnet26'), torch.randn(2, 3, 96, 64)
    deployed = timm_el.deploy(latent)
    with torch.no_grad():
        features = deployed.forward_features(x)
        assert features.shape == latent.forward_features(x).shape
        assert torch.equal(deployed.forward_head(features), deployed(x))
        for a, b in zip(deployed.forward_intermediates(x, intermediates_only=True),
                        latent.forward_intermediates(x, intermediates_only=True)):
            assert a.shape == b.shape
        for size in ((33, 32), (64, 160)):
            assert deployed(torch.randn(3, 3, *size)).shape == (3, 1000)
        assert deployed(torch.randn(0, 3, 64, 64)).shape == (0, 1000)


@pytest.mark.parametrize('name', ['el_resnet26', 'el_mobilenet_v1', 'el_reactnet_c'])
def test_features_only_deploys(name):
    latent, x = net(name, features_only=True), torch.randn(1, 3, 64, 64)
    deployed = timm_el.deploy(latent)
    with torch.no_grad():
        expected, found = latent(x), deployed(x)
    assert [f.shape for f in found] == [f.shape for f in expected]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


def test_features_by_hooks_deploy():
    latent = net('el_mobilenet_v1', features_only=True, feature_location='expansion')
    deployed = timm_el.deploy(latent)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert [f.shape for f in deployed(x)] == [f.shape for f in latent(x)] != []


@pytest.mark.parametrize('name', ['el_resnet26', 'el_mobilenet_v1'])
def test_hooks_put_on_what_is_inside_a_program_see_it(name):
    deployed, x = timm_el.deploy(net(name)), torch.randn(1, 3, 64, 64)
    units = {m for m in deployed.modules() if isinstance(m, DeployedUnit)}
    seen = {}
    with torch.no_grad():
        expected = deployed(x)
        handles = [m.register_forward_hook(lambda m, args, out: seen.setdefault(m, out)) for m in units]
        assert torch.equal(deployed(x), expected)
        assert len(seen) == len(units) > 8
        for handle in handles:
            handle.remove()
        seen.clear()
        assert torch.equal(deployed(x), expected) and not seen


@pytest.mark.parametrize('name', EACH_MODEL)
def test_a_registered_model_is_one_program_for_any_image_and_still_its_modules(name):
    deployed = timm_el.deploy(net(name))
    runner = engine.program_of(deployed, (64, 64))
    assert runner.program is not None and runner.size is None and runner.islands == []
    kinds = [step.kind for step in runner.program.steps]
    binary = [m for m in deployed.modules() if isinstance(m, engine.FusedUnit)]
    assert len(binary) == sum(step.is_binary_conv for step in runner.program.steps) < len(kinds) < 120


class Around(nn.Module):
    """x + what is inside."""

    def __init__(self, *inside):
        super().__init__()
        for i, module in enumerate(inside):
            self.add_module(f'part{i}', module)

    def forward(self, x):
        y = x
        for child in self.children():
            y = child(y)
        return x + y


class Pooled(nn.Module):
    """A shortcut that is declared first, and begins with a pool."""

    def __init__(self):
        super().__init__()
        self.short = nn.Sequential(nn.AvgPool2d(2), unit())
        self.a, self.b = unit(), unit(stride=2)

    def forward(self, x):
        return self.short(x) + self.b(self.a(x))


class Two(nn.Module):
    """It gives two tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = unit(), unit()

    def forward(self, x):
        return self.b(self.a(x)), x


class First(nn.Module):
    """The first of two tensors."""

    def __init__(self):
        super().__init__()
        self.two = Two()

    def forward(self, x):
        return self.two(x)[0]


class Scaled(nn.Module):
    """It has a parameter of its own, which is 1."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.g = unit(), unit(), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.b(self.a(x)) * self.g


class Wide(nn.Module):
    """What it does depends on the size of the image."""

    def __init__(self):
        super().__init__()
        self.a, self.b = unit(), unit()

    def forward(self, x):
        y = self.b(self.a(x))
        return y + 1 if x.shape[3] > 15 else y


class Sliced(nn.Module):
    """Its forward takes a part of its body."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(unit(), unit(), unit())

    def forward(self, x):
        return self.body[:2](x) + self.body[2](x)


def deep(n):
    """Shortcuts around shortcuts."""
    return Around(unit(), deep(n - 1), unit()) if n else Around(unit(), unit())


TWICE = unit()
POOL = nn.MaxPool2d(2)
ODD_HOSTS = {
    'a unit twice': nn.Sequential(TWICE, unit(), TWICE), 'a pool twice': nn.Sequential(unit(), POOL, unit(), POOL),
    'a sum of sums': Around(Around(unit(), unit()), Around(unit(), unit())), 'deep': deep(5), 'deeper': deep(18),
    'a shortcut first': Pooled(), 'two tensors': First(), 'its own parameter': Scaled(), 'by size': Wide(),
    'sliced': Sliced(),
    'names': nn.Sequential(OrderedDict(step=unit(), link=unit(), path=unit())), 'pools': nn.Sequential(
        unit(), nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2)), unit()),
}


@pytest.mark.parametrize('name', ODD_HOSTS)
def test_odd_hosts_give_the_same_bits_joined_or_not(name):
    torch.manual_seed(0)
    host = randomise(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), copy.deepcopy(ODD_HOSTS[name]), nn.Flatten())).eval()
    joined, apart = timm_el.deploy(host), timm_el.deploy(host, fuse_blocks=False)
    assert sorted(joined.state_dict()) == sorted(apart.state_dict())
    with torch.no_grad():
        for size in ((12, 16), (20, 24)):
            x = torch.randn(2, 3, *size)
            assert torch.equal(joined(x), apart(x))
        state = {key: value * 3 if key.endswith('.g') else value for key, value in joined.state_dict().items()}
        for network in (joined, apart):
            network.load_state_dict(state)
        assert torch.equal(joined(x), apart(x))


def test_a_stage_is_a_sequential_that_sees_its_changes():
    deployed, apart = (timm_el.deploy(net('el_resnet26'), fuse_blocks=fuse) for fuse in (True, False))
    x = torch.randn(1, 64, 9, 11)

    def same_now():
        with torch.no_grad():
            return torch.equal(deployed.layer1(x), apart.layer1(x))

    assert isinstance(deployed.layer1, nn.Sequential) and same_now()
    with torch.no_grad():
        assert torch.equal(deployed.layer1[:1](x), apart.layer1[:1](x))
    for model in (deployed, apart):
        model.layer1.append(nn.Hardtanh(-.1, .1))
    assert same_now()
    for model in (deployed, apart):
        model.layer1[1] = nn.Identity()
    assert same_now()
    for model in (deployed, apart):
        model.layer1[0].conv3 = nn.Conv2d(64, 256, 1, bias=False, device='cpu')
        nn.init.constant_(model.layer1[0].conv3.weight, .01)
    assert same_now()
    deployed, apart = (timm_el.deploy(net('el_mobilenet_v1'), fuse_blocks=fuse) for fuse in (True, False))
    for model in (deployed, apart):
        model.prune_intermediate_layers([0, 1])
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(deployed.forward_features(image), apart.forward_features(image))


def test_global_hooks_see_what_is_inside():
    deployed, x = timm_el.deploy(net('el_resnet26')), torch.randn(1, 3, 64, 64)
    seen = []
    with torch.no_grad():
        expected = deployed(x)
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m)))
        try:
            assert torch.equal(deployed(x), expected)
        finally:
            handle.remove()
    assert sum(issubclass(cls, DeployedUnit) for cls in seen) == 3 * 8


def test_outputs_are_nhwc_throughout():
    deployed = timm_el.deploy(net('el_resnet26'))
    layouts = []
    for module in deployed.modules():
        if isinstance(module, (DeployedUnit, DeployedConv)):
            module.register_forward_hook(
                lambda m, args, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last)))
    with torch.no_grad():
        deployed(torch.randn(2, 3, 64, 64))
    assert len(layouts) > 10 and all(layouts)


def test_a_deployed_net_copies_and_saves_whole():
    deployed, x = timm_el.deploy(net('el_resnet26')), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = deployed(x)
        assert torch.equal(copy.deepcopy(deployed)(x), expected)
        file = io.BytesIO()
        torch.save(deployed, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)
        twin = timm_el.deploy(net('el_resnet26', seed=1))
        assert not torch.equal(twin(x), expected)
        twin.load_state_dict(deployed.state_dict())
        assert torch.equal(twin(x), expected)


def test_a_net_without_the_library_gives_the_same_units():
    latent, x = net('el_resnet26', layers=[1, 1, 1, 1]), torch.randn(1, 3, 64, 64)
    engine.use_isa('reference')
    slow = timm_el.deploy(latent)
    assert worst_unit(latent, slow, x) < 1e-5
    assert not any(isinstance(m, DeployedConv) for m in slow.modules())  # torch's own float convolutions are faster
    engine.use_isa(None)
    fast = timm_el.deploy(latent)
    with torch.no_grad():
        found = fast(x)
        engine.use_isa('reference')
        assert torch.equal(fast(x), found)


def test_a_deployed_net_compiles():
    deployed, x = timm_el.deploy(net('el_resnet26', layers=[1, 1, 1, 1])), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(deployed)(x), deployed(x), rtol=1e-4, atol=1e-4)


def test_a_deployed_net_exports():
    deployed, x = timm_el.deploy(net('el_resnet26', layers=[1, 1, 1, 1])), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exported = torch.export.export(deployed, (x,)).module()
        torch.testing.assert_close(exported(x), deployed(x), rtol=1e-5, atol=1e-5)


def test_packed_weights_deploy_to_what_they_are(tmp_path):
    latent = net('el_resnet26')
    timm_el.save_packed(latent, tmp_path / 'el.safetensors')
    loaded = timm_el.load_packed(timm.create_model('el_resnet26'), tmp_path / 'el.safetensors').eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(timm_el.deploy(loaded)(x), timm_el.deploy(latent)(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_float_convolutions_may_have_another_dtype(dtype):
    latent, x = net('el_resnet26'), torch.randn(1, 3, 64, 64)
    deployed = timm_el.deploy(latent, float_dtype=dtype)
    assert deployed.conv1.weight.dtype == dtype
    assert worst_unit(latent, deployed, x) < 1e-5  # of units with binary convolutions alone
    with torch.no_grad():
        assert deployed(x).dtype == torch.float32


def test_resident_weights_are_small():
    latent = net('el_resnet50')
    deployed = timm_el.deploy(latent)
    size = sum(t.numel() * t.element_size() for t in (*deployed.parameters(), *deployed.buffers()))
    host = timm.create_model('resnet50')
    assert sum(p.numel() * 4 for p in host.parameters()) / size >= 4.5


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize('make, error, message', [
    (lambda: timm.create_model('el_resnet26').train(), ValueError, 'training mode'),
    (lambda: timm.create_model('el_resnet26', real_weights=True).eval(), ValueError, 'layer1.0.conv1: .*still real'),
    (lambda: timm.create_model('el_resnet26').eval().half(), ValueError, 'conv1.weight: found torch.float16'),
    (lambda: timm.create_model('el_resnet26').eval().to('meta'), ValueError, 'found device meta'),
    (lambda: timm.create_model('resnet18').eval(), ValueError, 'no BinaryUnit'),
    (lambda: timm_el.deploy(timm.create_model('el_resnet26').eval()), ValueError, 'already deployed'),
    (lambda: torch.compile(timm.create_model('el_resnet26').eval()), ValueError, 'OptimizedModule'),
    (lambda: {'a': 1}, TypeError, 'found a dict'),
])
def test_what_cannot_be_deployed_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        timm_el.deploy(make())


def test_a_network_around_a_deployed_one_is_called_that_whatever_its_mode():
    with pytest.raises(ValueError, match='0.conv1: the model is already deployed'):
        timm_el.deploy(nn.Sequential(timm_el.deploy(net('el_resnet26')), nn.Linear(1000, 2)).train())


def test_one_module_in_training_mode_is_named():
    latent = net('el_resnet26')
    latent.layer2[0].conv1.norm.train()
    with pytest.raises(ValueError, match='layer2.0.conv1.norm: found training mode'):
        timm_el.deploy(latent)


def test_an_unknown_float_dtype_is_refused():
    with pytest.raises(ValueError, match='float_dtype'):
        timm_el.deploy(net('el_resnet26'), float_dtype=torch.int16)


def test_inputs_that_do_not_fit_are_refused_by_name():
    deployed = timm_el.deploy(net('el_resnet26'))
    unit = timm_el.deploy(net('el_resnet26'), fuse_blocks=False).layer1[0].conv1
    for x, error, message in (
            (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, 'float'),
            (torch.zeros(1, 3, 64, 64, dtype=torch.float64), TypeError, 'float32'),
            (torch.zeros(3, 64, 64), ValueError, 'shape'), (torch.zeros(1, 4, 64, 64), ValueError, 'shape'),
            (torch.zeros(1, 3, 16, 16), ValueError, 'pixels'), (torch.zeros(1, 3, 64, 64, device='meta'), None, '')):
        if error is not None:
            with pytest.raises(error, match=message), torch.no_grad():
                deployed(x)
    with pytest.raises(TypeError, match='layer1.0.conv1'):
        unit(torch.zeros(1, 64, 8, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match='expected'):
        unit(torch.zeros(1, 63, 8, 8))
    with pytest.raises(TypeError, match='another dtype'):
        deployed.half()


# ---------------------------------------------------------------------------------------------------------------------
# What is not joined or folded

def small_unit(**parts) -> BinaryUnit:
    return randomise(BinaryUnit(BinaryConv2d(16, 16, 3, padding=1), norm=nn.BatchNorm2d(16), **parts)).eval()


class Clamping(nn.Module):
    """Changes its input in place before it uses it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.down = nn.ReLU6(inplace=True), nn.Conv2d(16, 16, 1)
        self.conv1, self.conv2 = small_unit(), small_unit()

    def forward(self, x):
        x = self.act(x)
        shortcut = self.down(x)
        return self.conv2(self.conv1(x)) + shortcut


def test_a_block_that_changes_its_input_stays_as_it_is():
    torch.manual_seed(0)
    latent = nn.Sequential(Clamping()).eval()
    deployed, x = timm_el.deploy(latent), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        assert torch.equal(deployed(x), timm_el.deploy(latent, fuse_blocks=False)(x))
        torch.testing.assert_close(deployed[0].conv1(x), latent[0].conv1(x), rtol=1e-5, atol=1e-5)


class Listed(nn.Module):
    """Goes through its units one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(small_unit(), small_unit(), small_unit())

    def forward(self, x):
        for layer in self.body:
            x = layer(x)
        return self.body[len(self.body) - 1](x)


def test_a_row_of_units_can_still_be_listed():
    torch.manual_seed(0)
    latent, x = Listed().eval(), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(timm_el.deploy(latent)(x), latent(x), rtol=1e-4, atol=1e-4)


class OddNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).abs()


class OddPReLU(nn.PReLU):
    def forward(self, x):
        return super().forward(x) + 3


def test_a_forward_of_ones_own_is_not_folded():
    torch.manual_seed(0)
    latent = nn.Sequential(nn.Conv2d(3, 16, 1), randomise(OddNorm(16)), small_unit(act=OddPReLU())).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(timm_el.deploy(latent)(x), latent(x), rtol=1e-4, atol=1e-4)


def test_hooks_inside_a_unit_are_refused_by_name():
    unit = small_unit()
    unit.norm.register_forward_hook(lambda m, args, out: out + 1)
    with pytest.raises(ValueError, match='0.norm: .*hooks'):
        timm_el.deploy(nn.Sequential(unit).eval())


def test_a_convolution_with_a_forward_of_its_own_is_refused_by_name():
    class Own(BinaryConv2d):
        def forward(self, x):
            return super().forward(x) + 1
    with pytest.raises(ValueError, match='0.conv: Own'):
        timm_el.deploy(nn.Sequential(BinaryUnit(Own(16, 16, 1))).eval())


def test_a_refused_conversion_leaves_the_network_as_it_was():
    latent, x = net('el_resnet26'), torch.randn(1, 3, 64, 64)
    deployed = timm_el.deploy(latent)
    with torch.no_grad():
        expected = deployed(x)
        with pytest.raises(TypeError):
            deployed.to(torch.bfloat16)
        assert torch.equal(deployed(x), expected)
