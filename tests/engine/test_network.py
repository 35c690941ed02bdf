"""Deployed networks that change or are called in unusual ways: state dicts, attributes, hooks, modes, signatures."""
import contextlib
import copy
import functools
import io
import itertools
import types
import warnings
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomise, with_slow, worst_unit
from torch.nn.utils import parametrizations, parametrize, prune
from units import UNITS, negative_norm, net, unit, unit_of

import timm_el
from timm_el import engine
from timm_el.engine import DeployedUnit
from timm_el.layers import BinaryConv2d, BinaryUnit, ElasticLink, RPReLU, Shift

pytestmark = pytest.mark.usefixtures('one_thread')


# ---------------------------------------------------------------------------------------------------------------------
# Weights that change

@pytest.mark.parametrize('fuse', [True, False])
def test_weights_that_are_loaded_are_noticed(fuse):
    first, second, x = net('el_resnet26'), net('el_resnet26', seed=1), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        a, b = timm_el.deploy(first, fuse_blocks=fuse), timm_el.deploy(second, fuse_blocks=fuse)
        expected = b(x).clone()
        a(x)
        a.load_state_dict(b.state_dict())
        assert torch.equal(a(x), expected)


def test_weights_loaded_into_a_part_of_a_block_are_noticed():
    latent, x = net('el_resnet26'), torch.randn(1, 3, 64, 64)
    other = copy.deepcopy(latent)
    other.layer2[1].conv1.norm.bias.data.add_(3)
    other.layer2[1].conv1.link.gamma.data.mul_(3)  # no tensor of the deployed unit
    with torch.inference_mode():
        a, b = timm_el.deploy(latent), timm_el.deploy(other)
        assert not torch.equal(a(x), b(x))
        part = a.get_submodule('layer2.1.conv1')
        part.load_state_dict(b.get_submodule('layer2.1.conv1').state_dict())
        assert torch.equal(a(x), b(x))


def tensors_of(network: nn.Module) -> dict:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def test_what_is_watched_goes_through_torchs_operators():
    deployed, x = timm_el.deploy(net('el_resnet26', layers=[1, 1, 1, 1])), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = deployed(x)
        with torch.profiler.profile() as profile:
            assert torch.equal(deployed(x), expected)
        assert {'timm_el::binary_conv2d', 'timm_el::real_conv2d'} <= {event.key for event in profile.key_averages()}


def test_another_default_dtype_is_no_matter():
    latent, x = net('el_resnet26', layers=[1, 1, 1, 1]), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = timm_el.deploy(latent)(x)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(timm_el.deploy(latent)(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)


# Stems with and without the engine's convolution, blocks that are joined and blocks that are not, norms that fold and
# norms that do not, dropout, shortcuts that pool, convolutions whose padding depends on the image.
HOSTS = ['el_resnet26', 'el_mobilenet_v1', 'test_resnet', 'test_efficientnet_ln', 'test_convnext']
MORE_HOSTS = [
    'el_resnet18', 'el_reactnet_c', 'resnet18', 'efficientnet_b0', 'tf_efficientnetv2_b0', 'regnetx_002',
    'convnext_atto', 'densenet121', 'test_byobnet', 'test_efficientnet', 'test_efficientnet_evos', 'test_mambaout',
    'test_nfnet']
EACH_HOST = with_slow(HOSTS, MORE_HOSTS)
SMALL = {'el_resnet26': dict(layers=[1, 1, 1, 1], channels=[16, 16, 32, 32])}


def host(name: str, **kwargs) -> nn.Module:
    """A latent network: a registered model, or one of timm's, converted."""
    kwargs = {**SMALL.get(name, {}), **kwargs}
    if name.startswith('el_'):
        return net(name, **kwargs)
    torch.manual_seed(0)
    return randomise(timm_el.binarize(timm.create_model(name, **kwargs))).eval()


def image(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, *(size or (64, 64)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('name', EACH_HOST)
def test_a_memory_format_and_the_dtype_and_device_that_it_has_are_no_matter(name):
    deployed, x = timm_el.deploy(host(name)), image()
    state = copy.deepcopy(deployed.state_dict())
    with torch.no_grad():
        expected = deployed(x)
        for arguments, options in (
                ((), dict(memory_format=torch.channels_last)), (('cpu',), dict(memory_format=torch.channels_last)),
                ((torch.float32,), {}), ((), dict(memory_format=torch.contiguous_format)),
                (('cpu', torch.float32), dict(memory_format=torch.channels_last))):
            assert deployed.to(*arguments, **options) is deployed
            found = deployed(x.to(memory_format=torch.channels_last))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(deployed.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=0), dict(features_only=True)], ids=str)
@pytest.mark.parametrize('name', EACH_HOST)
def test_parameters_tell_the_device_and_dtype_of_the_input(name, kwargs):
    deployed = timm_el.deploy(host(name, **kwargs))
    first = next(deployed.parameters())
    assert (first.device.type, first.dtype) == ('cpu', torch.float32)
    assert not any(p.requires_grad for p in deployed.parameters())
    for module in deployed.modules():
        if isinstance(module, DeployedUnit):
            assert next(module.parameters()).dtype == torch.float32


def test_a_units_state_is_named_by_what_it_holds():
    unit = BinaryUnit(BinaryConv2d(16, 16, 3), pre=negative_norm(16), post=RPReLU(16))
    deployed = timm_el.deploy(nn.Sequential(unit).eval())
    assert set(deployed.state_dict()) == {'0.bits', '0.table', '0.threshold', '0.flip', '0._extra_state'}
    assert {name for name, _ in deployed.named_buffers()} == {'0.bits', '0.flip'}


@pytest.mark.parametrize('name', HOSTS)
def test_parameters_that_are_asked_for_gradients_do_no_harm(name):
    deployed, x = timm_el.deploy(host(name, num_classes=0)), image()
    expected = deployed(x).detach()
    probe = nn.Sequential(deployed, nn.Linear(expected.shape[1], 2)).requires_grad_(True)
    optimizer = torch.optim.SGD(probe.parameters(), lr=1., weight_decay=.1)
    before = probe[1].weight.detach().clone()
    probe(x).square().sum().backward()
    for parameter in deployed.parameters():
        parameter.grad = None
    optimizer.step()
    assert not torch.equal(probe[1].weight, before)
    assert torch.equal(deployed(x), expected)
    for parameter in deployed.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # writes in place
    assert torch.equal(deployed(x), copy.deepcopy(deployed)(x)) and not torch.equal(deployed(x), expected)


def test_the_copy_does_not_share_the_models_tensors():
    """Not even where a bias stays outside of the operator."""
    conv = BinaryConv2d(16, 16, 3, padding=1, groups=4, scale_input=True)
    latent, x = nn.Sequential(BinaryUnit(conv, nn.BatchNorm2d(16))).eval(), torch.randn(1, 16, 5, 5)
    deployed = timm_el.deploy(latent)
    with torch.no_grad():
        expected = deployed(x)
        for tensor in latent.state_dict().values():
            tensor.fill_(3)
        assert torch.equal(deployed(x), expected)


class Noisy(nn.Module):
    """Everything whose output depends on the mode: dropout of modules and of functions, a norm that does not fold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.unit = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), unit()
        self.drop, self.path, self.free = nn.Dropout2d(.5), timm.layers.DropPath(.5), nn.RReLU()
        self.alpha, self.batch = nn.AlphaDropout(.5), nn.BatchNorm2d(16, track_running_stats=False)

    def forward(self, x):
        x = self.norm(self.stem(x).abs())
        x = self.unit(x) + self.path(self.alpha(self.drop(x)))
        return nn.functional.dropout(self.free(x), .5, self.training).mean((2, 3))


def modes(network: nn.Module) -> set:
    return {m.training for m in network.modules()}


TRAINED = {
    'it': lambda d: d.train() is d, 'a network around it': lambda d: nn.Sequential(nn.Sequential(d)).train(),
    'each module': lambda d: [m.train(True) for m in d.modules()], 'a copy': lambda d: copy.deepcopy(d).train(),
    'its children': lambda d: [m.train() for m in d.children()], 'eval': lambda d: d.eval() is d,
}


@pytest.mark.parametrize('name', [*EACH_HOST, 'noisy'])
def test_a_deployed_network_stays_in_eval_mode(name):
    latent = Noisy().eval() if name == 'noisy' else host(
        name, num_classes=0, drop_rate=.5, **({} if 'convnext' not in name else dict(drop_path_rate=.5)))
    deployed, x = timm_el.deploy(latent), torch.cat([image(seed=1), image(seed=2)])
    state = copy.deepcopy(deployed.state_dict())
    with torch.no_grad():
        expected = deployed(x)
        for who, train in TRAINED.items():
            assert train(deployed), who
            assert modes(deployed) == {False}, who
            assert torch.equal(deployed(x), expected), who
    torch.testing.assert_close(deployed.state_dict(), state, rtol=0, atol=0, equal_nan=True)


def test_a_probe_trains_on_a_deployed_network_that_stays_as_it_is():
    deployed, x = timm_el.deploy(host('test_resnet', num_classes=0)), torch.cat([image(seed=1), image(seed=2)])
    expected = deployed(x)
    probe = nn.Sequential(deployed, nn.Dropout(.5), nn.Linear(expected.shape[1], 5)).train()
    assert modes(probe[1]) == modes(probe[2]) == {True}
    probe(x).sum().backward()
    assert torch.equal(deployed(x), expected) and probe[2].weight.grad is not None


@pytest.mark.parametrize('how', ['deepcopy', 'save'])
def test_a_copy_stays_in_eval_mode_by_itself(how):
    deployed = timm_el.deploy(host('test_resnet'))
    if how == 'deepcopy':
        twin = copy.deepcopy(deployed)
    else:
        file = io.BytesIO()
        torch.save(deployed, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.train() is twin and twin.layer1.train() is twin.layer1 and modes(twin) == {False}
    with pytest.raises(TypeError, match='another dtype'):
        twin.half()


def test_modules_that_are_put_in_later_go_to_eval_mode_with_the_others():
    deployed = timm_el.deploy(host('test_resnet'))
    deployed.reset_classifier(7)
    deployed.fc = nn.Sequential(nn.Dropout(.5), deployed.fc)
    deployed.train()
    assert modes(deployed) == {False}


CONVERSIONS = [
    nn.Module.half, nn.Module.double, nn.Module.bfloat16, lambda m: m.to(torch.float16),
    lambda m: m.to('cpu', torch.float64, memory_format=torch.channels_last), lambda m: m.type(torch.float64)]


@pytest.mark.parametrize('name', HOSTS)
def test_a_conversion_to_another_dtype_is_refused_before_anything_is_changed(name):
    engine.use_isa('reference')  # torch's own stem comes first
    deployed = timm_el.deploy(host(name))
    engine.use_isa(None)
    state, x = copy.deepcopy(deployed.state_dict()), image()
    with torch.no_grad():
        expected = deployed(x)
        for convert in CONVERSIONS:
            for part in (deployed, *deployed.children()):
                with pytest.raises(TypeError, match='another dtype; deploy the latent network again'):
                    convert(part)
        torch.testing.assert_close(deployed.state_dict(), state, rtol=0, atol=0)
        assert torch.equal(deployed(x), expected)


def scaled(module: nn.Module, calls: list):
    """A closure, as timers and profilers write them."""
    old = module.forward

    def forward(*args, **kwargs):
        calls.append(module)
        return old(*args, **kwargs) * -.7
    return forward


def bound(module: nn.Module, calls: list):
    def forward(self, *args, **kwargs):
        calls.append(module)
        return type(self).forward(self, *args, **kwargs) * -.7
    return types.MethodType(forward, module)


def _offloaded(module, calls, *args, **kwargs):
    calls.append(1)
    return module._old_forward(*args, **kwargs) * -.7


def offloaded(module: nn.Module, calls: list):
    """As accelerate writes them."""
    module._old_forward = module.forward
    return functools.partial(_offloaded, module, calls)


PATCHES = {'closure': scaled, 'method': bound, 'partial': offloaded}


def called(network: nn.Module, x: torch.Tensor) -> list:
    """Paths of the modules that run in a pass, but for the network itself."""
    paths, seen = {m: p for p, m in network.named_modules()}, []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(paths.get(m)))
    try:
        network(x)
    finally:
        handle.remove()
    return [path for path in dict.fromkeys(seen) if path]


@pytest.mark.parametrize('kwargs', [{}, dict(features_only=True)], ids=str)
@pytest.mark.parametrize('name', with_slow(HOSTS[:3], HOSTS + MORE_HOSTS))
def test_a_forward_put_on_an_instance_runs_and_its_result_counts(name, kwargs):
    deployed, x = timm_el.deploy(host(name, **kwargs)), image()
    with torch.inference_mode():
        expected = as_list(deployed(x))
        paths = called(deployed, x)
        assert len(paths) > 10
        for path, patch in zip(paths, itertools.cycle(PATCHES)):
            module, calls = deployed.get_submodule(path), []
            handle = module.register_forward_hook(lambda m, args, out: out * -.7)
            hooked = as_list(deployed(x))
            handle.remove()
            module.forward = PATCHES[patch](module, calls)
            patched = as_list(deployed(x))
            del module.forward
            assert calls and all(map(torch.equal, patched, hooked)), path
            assert all(map(torch.equal, as_list(deployed(x)), expected)), path


def as_list(outputs) -> list:
    return [t.clone() for t in (outputs if isinstance(outputs, (list, tuple)) else [outputs])]


@pytest.mark.parametrize('part', ['layer1', 'layer1.0', 'layer1.0.conv2', 'layer3.0.conv1', 'maxpool', 'conv1.0', 'fc'])
def test_a_part_that_is_compiled_by_itself_runs_compiled(part):
    deployed, x, calls = timm_el.deploy(host('test_resnet')), image(), []

    def backend(graph, inputs):
        calls.append(part)
        return graph.forward

    with torch.no_grad():
        expected = deployed(x)
        deployed.get_submodule(part).compile(backend=backend)
        torch.testing.assert_close(deployed(x), expected)
        assert calls
        torch.testing.assert_close(copy.deepcopy(deployed)(x), expected)  # torch's copies are not compiled


def kinds_of_modules(network: nn.Module, x: torch.Tensor) -> list:
    """Paths of the first and the last module of each class that run, and of what stands around them."""
    paths = called(network, x)
    ends = {}
    for path in paths:
        ends.setdefault(type(network.get_submodule(path)), []).append(path)
    return [path for path in paths if any(path in (of[0], of[-1]) for of in ends.values())]


@pytest.mark.parametrize('name', with_slow(['el_resnet26', 'test_efficientnet'], HOSTS + MORE_HOSTS))
def test_a_forward_put_on_an_instance_before_deploying_is_kept_or_refused_by_name(name):
    latent, x, kept, refused = host(name), image(), 0, 0
    units = {path for path, m in latent.named_modules() if isinstance(m, BinaryUnit)}
    with torch.no_grad():
        for path, patch in zip(kinds_of_modules(latent, x), itertools.cycle(PATCHES)):
            module, calls = latent.get_submodule(path), []
            module.forward = PATCHES[patch](module, calls)
            expected = latent(x)
            assert calls
            if any(f'{path}.'.startswith(f'{unit}.') for unit in units):
                refused += 1
                with pytest.raises(ValueError, match=f'^{path}: .*forward in its instance.*on the deployed network'):
                    timm_el.deploy(latent)
            else:
                kept += 1
                deployed = timm_el.deploy(latent)
                calls.clear()
                assert (deployed(x) - expected).abs().max() < 1e-3 * expected.abs().max(), path
                assert patch == 'partial' or calls, path  # a partial's list is copied with it
            vars(module).pop('_old_forward', None)
            del module.forward
    assert kept > 5 and refused > 1


@pytest.mark.parametrize('what', ['forward', 'hook', 'pre hook'])
def test_a_norm_is_not_folded_across_the_border_of_a_module_whose_call_is_altered(what):
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1))
            self.b, self.unit = nn.Sequential(nn.BatchNorm2d(16)), unit()

        def forward(self, x):
            return self.unit(self.b(self.a(x)))

    torch.manual_seed(0)
    latent, x = randomise(Stem()).eval(), image(8, 8)
    if what == 'forward':
        latent.a.forward = scaled(latent.a, [])
    elif what == 'hook':
        latent.a.register_forward_hook(lambda m, args, out: out * 0)
    else:
        latent.b.register_forward_pre_hook(lambda m, args: (args[0] * 0,))
    with torch.no_grad():
        torch.testing.assert_close(timm_el.deploy(latent)(x), latent(x))


@pytest.mark.parametrize('path', ['0.act', '0.drop', '0'])
def test_what_is_put_on_a_norms_own_activation_is_kept(path):
    torch.manual_seed(0)
    norm = randomise(timm.layers.BatchNormAct2d(16))
    latent, x = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 16, 3), norm=nn.Sequential(norm), unit=unit())), image(8, 8)
    latent.eval().norm.get_submodule(path).register_forward_hook(lambda m, args, out: out * 0 - 1)
    with torch.no_grad():
        torch.testing.assert_close(timm_el.deploy(latent)(x), latent(x))


@pytest.mark.parametrize('options', [{}, dict(float_dtype=torch.bfloat16), dict(fuse_blocks=False)], ids=str)
@pytest.mark.parametrize('path', ['conv1', 'layer1.0.conv1', 'maxpool', 'fc', 'layer1', 'bn1'])
def test_hooks_keep_what_they_were_registered_with(path, options):
    latent, x, seen = timm_el.binarize(timm.create_model('resnet18')).eval(), image(), []
    module = latent.get_submodule(path)
    if path != 'conv1':  # a convolution whose output somebody sees stays as it is
        module.register_forward_hook(
            lambda m, args, kwargs, out: seen.append(kwargs), with_kwargs=True, always_call=True)
    module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    deployed = timm_el.deploy(latent, **options)
    seen.clear()
    with torch.no_grad():
        deployed(x)
    assert seen == [{}] * (1 if path == 'conv1' else 2)


class Layers(nn.Module):
    """One of each kind of layer, outside of units and inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.PReLU(16)
        self.grouped, self.group_norm, self.pool = nn.Conv2d(16, 16, 3, groups=4), nn.GroupNorm(4, 16), nn.MaxPool2d(2)
        self.unit = BinaryUnit(
            BinaryConv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), pre=Shift(16), post=RPReLU(32),
            link=ElasticLink(16, 32), tail=nn.Conv2d(32, 32, 1))
        self.real = BinaryUnit(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.PReLU())
        self.fc = nn.Linear(32, 5)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        x = self.pool(self.group_norm(self.grouped(self.act(self.norm(self.stem(x))))))
        return self.fc(self.real(self.unit(x)).mean((2, 3)))


class EverySecond(prune.BasePruningMethod):
    """A way of pruning that is not torch's."""
    PRUNING_TYPE = 'unstructured'

    def compute_mask(self, tensor, default_mask):
        return torch.arange(tensor.numel()).reshape(tensor.shape) % 2 * default_mask


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


ANEW = {
    'l1 pruning': lambda m, name: prune.l1_unstructured(m, name, .5),
    'own pruning': lambda m, name: EverySecond.apply(m, name),
    'weight norm': lambda m, name: parametrizations.weight_norm(m, name),
    'spectral norm': lambda m, name: parametrizations.spectral_norm(m, name),
    'orthogonal': lambda m, name: parametrizations.orthogonal(m, name),
    'own parametrization': lambda m, name: parametrize.register_parametrization(m, name, Doubled()),
    'old weight norm': lambda m, name: nn.utils.weight_norm(m, name),
    'old spectral norm': lambda m, name: nn.utils.spectral_norm(m, name),
}
MATRIX_ONLY = ('weight norm', 'spectral norm', 'orthogonal', 'old weight norm', 'old spectral norm')
WEIGHTS = {
    'stem': 'weight', 'norm': 'weight', 'act': 'weight', 'grouped': 'weight', 'group_norm': 'bias', 'fc': 'weight',
    'unit.conv': 'weight', 'unit.norm': 'weight', 'unit.pre': 'bias', 'unit.post': 'slope', 'unit.link': 'gamma',
    'unit.tail': 'weight', 'real.conv': 'weight', 'real.norm': 'bias', 'real.act': 'weight'}


@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated:FutureWarning')
@pytest.mark.parametrize('how', ANEW)
@pytest.mark.parametrize('path', WEIGHTS)
@pytest.mark.parametrize('fresh', [True, False], ids=['fresh', 'run before'])
def test_a_layer_that_computes_its_weight_anew_runs_as_it_is_or_is_refused_by_name(path, how, fresh):
    torch.manual_seed(0)
    latent, x, name = randomise(Layers()).eval(), image(16, 16), WEIGHTS[path]
    module = latent.get_submodule(path)
    if getattr(module, name).dim() < 2 and how in MATRIX_ONLY:
        return
    with torch.no_grad():
        for parameter in latent.parameters():
            parameter.add_(.1 * torch.randn_like(parameter))
        unaltered = latent(x)
    ANEW[how](module, name)
    latent.eval()  # a parametrization comes in training mode
    if not fresh:
        with torch.no_grad():
            latent(x)
    if '.' in path:
        message = f'computes its .*{name}.* anew .*prune.remove.*parametrize.remove_parametrizations'
        with pytest.raises(ValueError, match=f'^{path}: .*{message}'):
            timm_el.deploy(latent)
        return
    deployed = timm_el.deploy(latent)
    with torch.no_grad():
        expected = latent(x)
        assert 'weight norm' in how or not torch.equal(expected, unaltered)
        for model in (deployed, copy.deepcopy(deployed)):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', EACH_HOST)
def test_a_pruned_stem_and_classifier_stay_pruned(name):
    latent, x = host(name), image()
    stem = next(p for p, m in latent.named_modules() if type(m) is nn.Conv2d)
    for module in (latent.get_submodule(stem), latent.get_classifier()):
        prune.l1_unstructured(module, 'weight', .5)
    deployed, seen = timm_el.deploy(latent), {}
    with torch.no_grad():
        for part in (latent.get_submodule(stem), latent.get_classifier()):
            part.register_forward_hook(lambda m, args, out: seen.update({m: (args[0].clone(), out.clone())}))
        latent(x)
        for part, twin in ((latent.get_submodule(stem), deployed.get_submodule(stem)),
                           (latent.get_classifier(), deployed.get_classifier())):
            assert torch.equal(twin(seen[part][0]), seen[part][1])
        assert worst_unit(latent, deployed, x) < 1e-5
        before = deployed(x)
        prune.remove(deployed.get_classifier(), 'weight')
        assert torch.equal(deployed(x), before)


def test_tensors_with_a_history_that_a_module_keeps_are_copied_without_it():
    class Keeping(nn.Identity):
        def forward(self, x):
            self.last, self.all = x, {'seen': [x]}
            return x

    latent = nn.Sequential(
        nn.Conv2d(3, 16, 3), Keeping(), unit(), BinaryUnit(BinaryConv2d(16, 16, 1), act=Keeping(), link=Keeping()))
    latent.eval()(image(8, 8))
    assert latent[1].last.requires_grad
    deployed = timm_el.deploy(latent)
    with torch.no_grad():
        torch.testing.assert_close(deployed(image(8, 8)), latent(image(8, 8)), rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def default(kind: str):
    """Another default of torch's."""
    try:
        if kind == 'with meta':
            with torch.device('meta'):
                yield
            return
        if kind == 'meta':
            torch.set_default_device('meta')
        else:
            torch.set_default_dtype(getattr(torch, kind))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


DEFAULTS = ['with meta', 'meta', 'float64', 'bfloat16']


@pytest.mark.parametrize('kind', DEFAULTS)
@pytest.mark.parametrize('name', EACH_HOST)
def test_default_device_and_dtype_are_no_matter(name, kind):
    latent, x = host(name), image()
    before = timm_el.deploy(latent)
    with torch.no_grad():
        expected = before(x)
        with default(kind):
            deployed = timm_el.deploy(latent)
            assert torch.equal(before(x), expected) and torch.equal(copy.deepcopy(before)(x), expected)
            assert torch.equal(deployed(x), expected)
            state = deployed.state_dict()
            deployed.load_state_dict(before.state_dict())
            assert torch.equal(deployed(x), expected)
        assert list(map(type, deployed.modules())) == list(map(type, before.modules()))
    torch.testing.assert_close(state, before.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('kind', DEFAULTS)
def test_units_are_the_same_under_every_default(kind, native):
    engine.use_isa(None if native else 'reference')
    for name, make in UNITS.items():
        torch.manual_seed(0)
        latent, x = nn.Sequential(make()).eval(), torch.randn(3, 20, 10, 9)
        with torch.no_grad():
            expected = timm_el.deploy(latent)(x)
            with default(kind):
                assert torch.equal(timm_el.deploy(latent)(x), expected), name


@pytest.mark.parametrize('name', HOSTS)
def test_a_network_on_another_device_says_so(name):
    deployed, x = timm_el.deploy(host(name)), image()
    with torch.no_grad():
        shape = deployed(x).shape
        deployed.to('meta')
        assert deployed(x.to('meta')).shape == shape
        with pytest.raises(ValueError, match=r"found a tensor .* on meta, expected cpu, .*\.to\('cpu'\)"):
            deployed(x)


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('fuse', [True, False])
@pytest.mark.parametrize('part', ['layer1.1', 'layer2.0.conv2', 'layer3.1.conv3', 'maxpool', 'conv1', 'fc'])
def test_the_part_that_is_on_another_device_is_named(part, fuse, native):
    engine.use_isa(None if native else 'reference')
    deployed, x = timm_el.deploy(host('el_resnet26', layers=[2, 2, 2, 2]), fuse_blocks=fuse), image()
    if part in ('conv1', 'fc') and not native:
        return  # torch's own layers
    with torch.no_grad():
        expected = deployed(x)
        deployed.get_submodule(part).to('meta')
        if part == 'maxpool':
            assert torch.equal(deployed(x), expected)
            return
        with pytest.raises(ValueError, match=f'^{part}.*: found a tensor of the deployed network on meta'):
            deployed(x)
        for tensor in tensors_of(deployed.get_submodule(part)).values():
            assert tensor.device.type == 'meta'


def test_a_unit_of_several_operators_says_that_it_is_on_another_device():
    for name, make in UNITS.items():
        deployed = timm_el.deploy(nn.Sequential(make()).eval()).to('meta')
        if tensors_of(deployed) and name not in ('real grouped', 'weights only, same', 'link only'):
            with pytest.raises(ValueError, match='^0: found a tensor'), torch.no_grad():
                deployed(torch.randn(3, 20, 10, 9))


# Ways to write into a tensor a what is in b, all of which torch counts.
def different(make) -> tuple:
    """Two deployed networks of one structure, no tensor of which is the same."""
    pair = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        latent = make()
        with torch.no_grad():
            for parameter in latent.parameters():
                parameter.mul_(1 + .3 * torch.rand_like(parameter)).add_(.01 * torch.randn_like(parameter))
        pair.append(timm_el.deploy(randomise(latent, seed).eval()))
    return tuple(pair)


def first_blocks(recipe: str) -> nn.Module:
    """The stem and the first two blocks of a small ResNet."""
    network = timm.create_model('el_resnet26', recipe=recipe, **SMALL['el_resnet26'])
    return nn.Sequential(*(
        part for name, part in network.named_children() if not name.startswith(('layer3', 'layer4', 'global', 'fc'))))


STRUCTURES = {
    'stages': (lambda: timm.create_model('el_resnet26', **SMALL['el_resnet26']), (64, 64)),
    'thresholds': (lambda: first_blocks('r2b'), (64, 64)),
    'rprelu': (lambda: timm.create_model('el_resnet26', recipe='reactnet', **SMALL['el_resnet26']), (64, 64)),
    'K': (lambda: first_blocks('xnor'), (64, 64)),
    'converted': (lambda: timm_el.binarize(timm.create_model('test_efficientnet')), (64, 64)),
    'several operators': (lambda: nn.Sequential(nn.Conv2d(3, 20, 3), BinaryUnit(
        BinaryConv2d(20, 30, 3, padding=1, groups=5, scale_input=True), nn.BatchNorm2d(30))), (9, 9)),
    'a flip': (lambda: nn.Sequential(nn.Conv2d(3, 20, 3), nn.GroupNorm(1, 20), BinaryUnit(
        BinaryConv2d(20, 20, 3, padding=1), pre=negative_norm(20))), (9, 9)),
}


@pytest.mark.parametrize('inference', [False, True], ids=['no_grad', 'inference_mode'])
@pytest.mark.parametrize('structure', STRUCTURES)
def test_each_tensor_that_is_loaded_is_used_at_the_next_call(structure, inference):
    make, size = STRUCTURES[structure]
    (a, b), x = different(make), image(*size)
    with torch.inference_mode() if inference else torch.no_grad():
        before, changed = a(x), 0
        for path, module in reversed(list(a.named_modules())):
            if not any(True for tensors in (module.parameters, module.buffers) for _ in tensors(recurse=False)):
                continue  # what it holds are modules that have loaded theirs
            module.load_state_dict(b.get_submodule(path).state_dict())
            now = a(x)
            assert torch.equal(now, copy.deepcopy(a)(x)), path
            changed += not torch.equal(now, before)
            before = now
        assert changed > 1 and torch.equal(a(x), b(x))


@pytest.mark.parametrize('made', ['deepcopy', 'save', 'assign'])
@pytest.mark.parametrize('structure', ['stages', 'several operators'])
def test_a_network_that_is_copied_or_loaded_in_inference_mode_notices_what_is_loaded_into_it(structure, made):
    make, size = STRUCTURES[structure]
    (a, b), x = different(make), image(*size)
    with torch.inference_mode():
        if made == 'deepcopy':
            a = copy.deepcopy(a)
        elif made == 'assign':
            a.load_state_dict({k: v.clone() for k, v in a.state_dict().items()}, assign=True)
        else:
            file = io.BytesIO()
            torch.save(a, file)
            file.seek(0)
            a = torch.load(file, weights_only=False)
        assert not torch.equal(a(x), b(x))
        a.load_state_dict(b.state_dict())
        assert torch.equal(a(x), b(x))


def both(latent: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A network deployed as a program, and module by module, as tracers and compilers see it."""
    return timm_el.deploy(latent), timm_el.deploy(latent, fuse_blocks=False)


def traced_by_jit(network: nn.Module, x: torch.Tensor):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it is deprecated, and tells of every size that the host looks at
        return torch.jit.trace(network, x)


LARGER = ((3, 3, 96, 130), (1, 3, 64, 97), (2, 3, 33, 64), (1, 3, 320, 288))  # means of few pixels and of many


@pytest.mark.parametrize('kwargs', [{}, dict(features_only=True)], ids=str)
@pytest.mark.parametrize('name', EACH_HOST)
def test_a_trace_takes_any_image(name, kwargs):
    deployed, apart = both(host(name, **kwargs))
    with torch.no_grad():
        traced = traced_by_jit(deployed, torch.randn(2, 3, 64, 64))
        for shape in LARGER:
            y = torch.randn(shape)
            assert all(map(torch.equal, as_list(traced(y)), as_list(apart(y)))), shape


@pytest.mark.parametrize('name', EACH_HOST)
def test_an_export_takes_any_image(name):
    (deployed, apart), x = both(host(name)), torch.randn(2, 3, 64, 64)
    some = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    with torch.no_grad():
        exported = torch.export.export(deployed, (x,), dynamic_shapes=(some,)).module()
        for shape in LARGER[:2]:
            y = torch.randn(shape)
            assert torch.equal(exported(y), apart(y)), shape


def test_an_export_takes_the_range_of_images_that_it_was_asked_for():
    deployed, x = timm_el.deploy(timm_el.binarize(timm.create_model('resnet18')).eval()), torch.randn(2, 3, 64, 64)
    dims = {0: torch.export.Dim('n', max=64), **{
        axis: torch.export.Dim(name, min=33, max=512) for axis, name in ((2, 'h'), (3, 'w'))}}
    with torch.no_grad():
        for strict in (False, True):
            exported = torch.export.export(deployed, (x,), dynamic_shapes=(dims,), strict=strict).module()
            for shape in LARGER[:3]:
                y = torch.randn(shape)
                assert torch.equal(exported(y), deployed(y)), (strict, shape)


@pytest.mark.parametrize('name', with_slow(['test_resnet', 'test_efficientnet_ln'], HOSTS))
def test_a_compiled_network_takes_any_image(name):
    deployed, apart = both(host(name))
    compiled = torch.compile(deployed, dynamic=True, fullgraph=True, backend='eager')
    with torch.no_grad():
        for shape in ((2, 3, 64, 64), *LARGER[:1], (4, 3, 160, 192)):
            y = torch.randn(shape)
            assert torch.equal(compiled(y), apart(y)), shape


@pytest.mark.parametrize('kind', UNITS)
def test_a_trace_of_a_unit_takes_any_image(kind):
    deployed, x = timm_el.deploy(nn.Sequential(UNITS[kind]()).eval()), torch.randn(2, 20, 10, 10)
    if kind == 'odd pool':
        return  # 5 x 5 pixels, whatever the image
    some = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    with torch.no_grad():
        traced = traced_by_jit(deployed, x)
        exported = torch.export.export(deployed, (x,), dynamic_shapes=(some,)).module()
        for shape in ((3, 20, 13, 11), (2, 20, 31, 24)):
            y = torch.randn(shape)
            for found in (traced(y), exported(y)):
                if kind == 'weights only, same':  # a convolution of torch's, whose sums have another order
                    torch.testing.assert_close(found, deployed(y), rtol=1e-5, atol=1e-5)
                else:
                    assert torch.equal(found, deployed(y))


class Subclassed(torch.Tensor):
    """A tensor that is not plain, such as those of quantization libraries."""


@pytest.mark.parametrize('spoil, message', [
    (lambda m: setattr(m.fc, 'weight', torch.nn.Parameter(m.fc.weight.detach().as_subclass(Subclassed))),
     'fc: the weight of the Linear is a Subclassed of torch.float32, expected a plain float tensor'),
    (lambda m: setattr(m.layer1[0].conv1.conv, 'weight', torch.nn.Parameter(
        m.layer1[0].conv1.conv.weight.detach().to(torch.int8), requires_grad=False)),
     'layer1.0.conv1.conv: the weight of the BinaryConv2d is a Parameter of torch.int8, expected a plain float tensor'),
], ids=['classifier', 'unit'])
def test_tensors_that_are_not_plain_are_refused_by_path(spoil, message):
    model = timm_el.binarize(timm.create_model('test_resnet', num_classes=5)).eval()
    spoil(model)
    with pytest.raises(ValueError, match=message):
        timm_el.deploy(model)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_each_tensor_keeps_the_dtype_that_it_was_deployed_with(dtype):
    deployed, x = timm_el.deploy(host('test_resnet'), float_dtype=dtype), image()
    state = copy.deepcopy(deployed.state_dict())
    with torch.no_grad():
        expected = deployed(x)
        for convert in (nn.Module.float, lambda m: m.type(torch.float32), lambda m: m.to(x), nn.Module.cpu):
            assert torch.equal(convert(deployed)(x), expected)
            torch.testing.assert_close(deployed.state_dict(), state, rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
def test_scripted_modules_run_as_they_are():
    def scripted(module):
        return torch.jit.script(module.eval())

    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3), scripted(nn.ReLU()), nn.Conv2d(16, 16, 1))
    latent = nn.Sequential(
        stem, scripted(nn.BatchNorm2d(16)), scripted(nn.Identity()),
        unit_of(BinaryConv2d(16, 16, 1), norm=scripted(nn.BatchNorm2d(16)), act=scripted(nn.PReLU())),
        nn.Sequential(unit(), scripted(nn.Sequential(nn.SiLU(), nn.MaxPool2d(2)))), unit()).eval()
    deployed, x = timm_el.deploy(latent), image(12, 12)
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), latent(x), rtol=1e-4, atol=1e-4)
        assert modes(deployed.train()) == {False}
        torch.testing.assert_close(copy.deepcopy(deployed)(x), latent(x), rtol=1e-4, atol=1e-4)
