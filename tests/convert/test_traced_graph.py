"""binarize() by data flow: pairing, activations, links and shortcuts of nets that no table describes."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import randomise

import timm_el
from timm_el.convert.find import find_traced_network
from timm_el.convert.known_blocks import find_known_networks
from timm_el.convert.sites import Reason
from timm_el.dry_run import run_layers
from timm_el.layers import BinaryConv2d, BinaryLinear, BinaryUnit, StandardizedBinaryConv2d, input_sign_shares


def rows(model: nn.Module) -> dict:
    return {row.path: row for row in model.binarize_report.rows}


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
    model = randomise(Tangled()).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    norms = {'bn1': model.y, 'bn2': model.b}
    timm_el.binarize(model, 'host')
    torch.testing.assert_close(model(x), expected)
    assert all(model.get_submodule(p).norm is norm for p, norm in norms.items())
    assert {path: row.norm for path, row in rows(model).items()} == {'bn1': 'y', 'bn2': 'b', 'bn3': 'a', 'z': None}


class Leafy(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return hasattr(module, 'running_mean') or not any(True for _ in module.children())


def rename(model: nn.Module) -> nn.Module:
    """The same computation with each attribute under a name that says nothing, registered in reverse order."""
    graph = Leafy().trace(model.eval())
    names, root = {}, nn.Module()
    for node in reversed(graph.nodes):
        if node.op == 'call_module':
            new = names.setdefault(node.target, f'm{len(names)}')
            root.add_module(new, model.get_submodule(node.target))
            node.target = new
    renamed = torch.fx.GraphModule(root, graph)
    modules = dict(renamed._modules)
    renamed._modules.clear()
    renamed._modules.update((name, modules[name]) for name in names.values())
    return renamed


@pytest.mark.parametrize('name', ['regnetx_002', 'densenet121', 'mobilenetv2_100'])
def test_renamed_and_reversed_nets_convert_as_their_originals(name):
    torch.manual_seed(0)
    original = timm.create_model(name)
    renamed = rename(original)
    weights = {id(m.weight) for m in original.modules() if isinstance(m, nn.Conv2d)}
    x = torch.randn(2, 3, 64, 64)
    expected = randomise(renamed).eval()(x)
    torch.testing.assert_close(timm_el.binarize(renamed, 'host')(x), expected, rtol=1e-4, atol=1e-4)
    pairs = {id(m.conv.weight): id(m.norm) for m in renamed.modules() if isinstance(m, BinaryUnit)}
    timm_el.binarize(original, 'host')
    assert pairs == {id(m.conv.weight): id(m.norm) for m in original.modules() if isinstance(m, BinaryUnit)}
    assert {id(m.weight) for m in original.modules() if isinstance(m, nn.Conv2d)} == weights


@pytest.mark.parametrize('build', [
    lambda: timm.create_model('resnet18'), lambda: timm.create_model('resnet26d'),
    lambda: timm.create_model('seresnet50'), lambda: timm.create_model('mobilenetv1_100'),
    lambda: torchvision.models.resnet18(), lambda: torchvision.models.resnext50_32x4d()])
def test_the_table_of_known_blocks_says_what_the_data_flow_says(build):
    model = build()
    known = {s.path: s for network in find_known_networks(model, {}) for s in network.sites}
    traced = find_traced_network(model, run_layers(model, (3, 64, 64)))
    aside = (Reason.DOWNSAMPLE, Reason.SQUEEZE_EXCITE)
    found = {s.path: s for s in traced.sites if s.kept is None or s.kept.reason not in aside}
    path_of = lambda place: place and place.path  # noqa: E731
    assert {path: path_of(s.norm) for path, s in found.items()} == {path: path_of(s.norm) for path, s in known.items()}
    acts = {s.act.path for s in known.values() if s.act} | {
        s.norm.path for s in known.values() if getattr(s.norm.module, 'act', None) is not None}
    gone = {s.act.path for s in traced.sites if s.act} | {place.path for place in traced.loose_acts}
    if not isinstance(model, torchvision.models.ResNet):  # its blocks share one activation
        assert gone <= acts


def test_a_shared_activation_goes_and_the_hosts_shortcut_is_not_repeated():
    model = timm_el.binarize(Tangled())
    assert isinstance(model.conv_that_is_a_relu, nn.Identity)
    assert model.bn2.link is not None and model.bn1.link is None  # x reaches the addition once, by the host's shortcut
    assert rows(model)['bn1'].reason == 'no link: the shortcut of the host carries the same'
    assert rows(model)['bn3'].reason == 'first convolution'


def test_an_activation_that_cannot_move_gets_a_norm_before_the_sign():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.b(F.relu(self.a(x))).mean((2, 3)))

    torch.manual_seed(0)
    model = timm_el.binarize(Functional())
    assert isinstance(model.b, BinaryUnit) and isinstance(model.b.pre, nn.GroupNorm)
    for mode in (True, False):
        assert 0.1 < input_sign_shares(model.train(mode), torch.randn(4, 3, 32, 32))['b.conv'] < 0.9


def test_an_input_that_never_varies_is_not_signed():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) + self.c(torch.zeros_like(x))

    model = timm_el.binarize(Constant(), example_input=torch.randn(2, 3, 16, 16))
    assert type(model.c.conv) is nn.Conv2d and model.c.pre is None and isinstance(model.b.conv, BinaryConv2d)
    assert rows(model)['c'].status == 'real' and 'does not vary' in rows(model)['c'].reason


def test_a_net_that_wants_another_input_is_converted_and_says_so():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 12 * 12, 2)

        def forward(self, x):
            return self.fc(self.b(F.silu(self.a(x))).flatten(1))

    report = timm_el.binarize(Small()).binarize_report
    assert sum('pass example_input' in note for note in report.notes) == 2  # operations, and signs
    assert report.macs_share is None and all(row.macs is None for row in report.rows) and 'layer' in str(report)
    model = timm_el.binarize(Small(), example_input=torch.randn(2, 3, 16, 16))
    assert not any('example_input' in note for note in model.binarize_report.notes)
    assert model.binarize_report.input_size == (3, 16, 16)
    assert rows(model)['b'].macs == 12 * 12 * 8 * 8 * 9 and model(torch.randn(2, 3, 16, 16)).shape == (2, 2)


# ------------------------------------------------------------------------------------- nets that fx does not see whole

class Inner(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(channels), nn.ReLU()
        self.last = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.last(self.act(self.norm(self.conv(x))))


class Branching(nn.Module):
    """Its way depends on its values."""

    def __init__(self):
        super().__init__()
        self.a, self.inner, self.b = nn.Conv2d(3, 8, 3), Inner(8), nn.Conv2d(8, 8, 3)
        self.twice, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        x = self.a(x)
        x = self.inner(x)
        x = self.b(x) if x.sum() < 1e9 else x
        return self.fc(self.twice(self.twice(x.relu())).mean((2, 3)))


def test_what_cannot_be_traced_is_taken_by_its_modules_and_says_so():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    host = randomise(Branching()).eval()
    expected = host(x)
    torch.testing.assert_close(timm_el.binarize(host, 'host')(x), expected)
    model = timm_el.binarize(Branching())
    found = {path: (row.status, row.reason, row.norm, row.act) for path, row in rows(model).items()}
    assert found == {
        'a': ('kept', 'first convolution', None, None),
        'inner.conv': ('binarized', '', 'inner.norm', 'dropped'),
        'inner.last': ('binarized', '', None, None),
        'b': ('binarized', '', None, None),
        'twice': ('kept', 'it runs more than once', None, None),
        'fc': ('kept', 'classifier', None, None)}
    assert any('torch.fx cannot trace the model (Branching, TraceError' in n for n in model.binarize_report.notes)
    for mode in (True, False):
        assert all(0.01 < share < 0.99 for share in input_sign_shares(model.train(mode), x).values())
    with pytest.raises(ValueError, match=r'twice: Conv2d \(8, 8, 1, 1\) cannot .* \(it runs more than once\)'):
        timm_el.binarize(Branching(), strict=True)


def test_auxiliary_heads_that_run_in_training_only_are_binarized_too():
    torch.manual_seed(0)
    model = timm_el.binarize(torchvision.models.googlenet(init_weights=False))
    assert isinstance(model.aux1.conv.conv, BinaryUnit) and rows(model)['aux1.conv.conv'].macs == 0
    x = torch.randn(4, 3, 96, 96)
    shares = input_sign_shares(model.train(), x)
    assert 0.01 < shares['aux1.conv.conv.conv'] < 0.99 and len(model(x)) == 3


# ------------------------------------------------------------------------------------------- layers of other kinds

def test_linear_layers_on_pixels_are_binarized_as_the_1x1_convolutions_that_they_are():
    model = timm_el.binarize(timm.create_model('test_convnext'), 'el')
    fc1 = model.stages[1].blocks[0].mlp.fc1
    assert isinstance(fc1.conv, BinaryLinear) and fc1.link.kind == 'expand' and fc1.link.gamma.dim() == 0
    x = torch.randn(2, 4, 4, fc1.in_features)
    alpha = fc1.weight.abs().mean(1)
    sign = lambda t: torch.where(t >= 0, 1., -1.)  # noqa: E731
    branch = sign(x) @ sign(fc1.weight).T * alpha + fc1.bias
    if fc1.act is not None:
        branch = fc1.act(branch)
    expected = branch + torch.cat([x] * 4, -1) / fc1.link.gamma
    torch.testing.assert_close(fc1(x), expected)
    assert model.stages[1].blocks[0].mlp.fc2.link.kind == 'squeeze'  # a layer scale is no second signal
    assert rows(model)['head.fc'].reason == 'classifier'
    vit = timm_el.binarize(timm.create_model('vit_tiny_r_s16_p8_224'), 'el')
    assert {row.reason for row in vit.binarize_report.rows if row.kind == 'Linear'} == {
        'linear layer on vectors', 'classifier'}


@pytest.mark.parametrize('name', ['test_nfnet', 'resnetv2_50x1_bit', 'tf_efficientnetv2_b0'])
def test_standardized_and_tensorflow_padded_convolutions_are_binarized(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    weights = {m.weight for m in model.modules() if isinstance(m, nn.Conv2d)}
    gains = {k for k, _ in model.named_parameters() if k.endswith('.gain')}
    timm_el.binarize(model, 'el')
    kinds = {type(m) for m in model.modules() if isinstance(m, BinaryConv2d)}
    assert kinds == {BinaryConv2d if name.startswith('tf_') else StandardizedBinaryConv2d}
    assert any(m.same_pad for m in model.modules() if isinstance(m, BinaryConv2d)) == name.startswith('tf_')
    assert {m.weight for m in model.modules() if isinstance(m, nn.Conv2d)} == weights
    assert len(gains) == sum(k.endswith('.gain') for k, _ in model.named_parameters())
    model(torch.randn(2, 3, 65, 65)).sum().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []


def test_the_recipe_for_separable_hosts_is_chosen_by_their_convolutions():
    for model, recipe in (
            (timm.create_model('mobilenetv2_100'), 'el_mobilenet'), (torchvision.models.mobilenet_v2(), 'el_mobilenet'),
            (timm.create_model('regnetx_002'), 'el'), (timm.create_model('resnext26ts'), 'el')):
        assert timm_el.binarize(model).binarize_report.recipe.name == recipe


def test_a_norm_that_a_batch_got_before_it_failed_is_no_more_there():
    """Small images are tried first. What they find counts for nothing if they fail; the next ones are judged anew."""
    class Tall(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            x = self.c(self.b(self.a(x)) ** 2 + 1)  # a square, which nothing can take away
            if x.shape[-1] < 100:
                raise ValueError('the image is too small')
            return x

    model = timm_el.binarize(Tall())
    assert model.c.pre is not None and model.binarize_report.revived == ('c',)
    twin = timm_el.binarize(Tall(), like=model.binarize_report.plan())
    twin.load_state_dict(model.state_dict(), strict=True)


def chain(i: int, o: int) -> list[nn.Module]:
    return [nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]


def test_an_activation_that_changes_the_channels_stays_and_the_net_runs():
    model = nn.Sequential(
        *chain(3, 8), nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.GLU(1), nn.Conv2d(8, 8, 3, 1, 1),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    timm_el.binarize(model)
    assert isinstance(model[5], nn.GLU) and model(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    assert rows(model)['6'].status == 'binarized'


class SharedRelu(nn.Module):
    """One ReLU for the chains and for a head of two layers."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)])
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.relu, self.fc1, self.fc2 = nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = self.relu(norm(conv(x)))
        return self.fc2(self.relu(self.fc1(x.mean((2, 3)))))


def test_an_activation_between_float_layers_stays_though_others_share_it(photos):
    model = timm_el.binarize(SharedRelu())
    assert isinstance(model.relu, nn.ReLU)
    shares = input_sign_shares(model.eval(), photos)
    assert len(shares) == 2 and all(0.03 < share < 0.97 for share in shares.values())


class HeldInAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*chain(3, 8))
        self.held = [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)]
        for i, conv in enumerate(self.held):
            self.add_module(f'conv{i}', conv)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for conv in self.held:
            x = conv(x).relu()
        return self.fc(x.mean((2, 3)))


def test_a_forward_that_goes_past_its_modules_is_refused_and_the_model_stays_as_it_was():
    model = HeldInAList()
    x, keys = torch.randn(2, 3, 32, 32), list(model.state_dict())
    before = model.eval()(x)
    with pytest.raises(ValueError, match='conv0: the model does not run what is put in its place.*keep='):
        timm_el.binarize(model)
    assert list(model.state_dict()) == keys and torch.equal(model(x), before)
