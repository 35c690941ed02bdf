"""Any recipe, not only the named ones: what holds for every combination of fields that `Recipe` lets through."""
import json
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomise, with_slow, worst_unit
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

import timm_el
from timm_el import Recipe
from timm_el.layers import BinaryConv2d, BinaryUnit
from timm_el.recipes import ROLES

FEW = 25
EXAMPLES = pytest.mark.parametrize('examples', with_slow([FEW], [500]))
SMALL = dict(layers=[1, 1, 1, 1], channels=[8, 8, 12, 16], stem_type='deep', stem_width=4, num_classes=3)


class Separable(nn.Module):
    """Depthwise and 1x1 convolutions of all roles, in a module that only its data flow explains."""

    def __init__(self) -> None:
        super().__init__()

        def conv(c_in: int, c_out: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
            layer = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.ReLU())

        self.stem = conv(3, 12, 3, 2)
        self.down = conv(12, 12, 3, 2, 12)
        self.expand = conv(12, 20, 1, 1)
        self.depthwise = conv(20, 20, 3, 1, 20)
        self.mix = conv(20, 20, 1, 1)
        self.reduce = conv(20, 9, 1, 1)
        self.spatial = conv(9, 9, 3, 2)
        self.fc = nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.depthwise(self.expand(self.down(self.stem(x)))))
        return self.fc(self.spatial(self.reduce(x)).mean((2, 3)))


HOSTS = {
    'basic': lambda: timm.create_model('resnet18', **SMALL),
    'bottleneck': lambda: timm.create_model('resnet26', **SMALL),
    'separable': Separable,
}
HOST_NAMES = st.sampled_from(list(HOSTS))
ROLE_SETS = st.lists(st.sampled_from(ROLES), unique=True).map(tuple)
SIGNS = ('ste', 'approx')
IDLE = dict(  # without effect where nothing is binarized
    scale_weight=st.booleans(), scale_input=ROLE_SETS, elastic=st.booleans(), real=ROLE_SETS,
    gamma=st.sampled_from(['learnable', 'fixed']), link_pool=st.sampled_from(['max', 'avg']),
    scale_weight_grad=st.booleans(), scale_output=st.sampled_from([None, 'channel', 'rank1', 'gate']),
    pre=st.sampled_from([None, 'norm', 'shift']))
ACTIVE = dict(
    link=ROLE_SETS, omit=st.just(()) | ROLE_SETS, residual=st.booleans(),
    act=st.sampled_from(['keep', 'drop', 'branch', 'ends', 'prelu', 'rprelu']))


@st.composite
def recipes(
        draw,
        inputs: tuple = (*SIGNS, 'tanh', 'ternary', None),
        weights: tuple = (*SIGNS, 'twn', 'ttq', None),
        bases: tuple = ((), (), (), (1, 1), (1, 2), (2, 1)),
        **fields: st.SearchStrategy,
) -> Recipe:
    """Recipes with drawn fields; what `Recipe` itself refuses is drawn again."""
    drawn = dict(
        input_quantizer=draw(st.sampled_from(inputs)), weight_quantizer=draw(st.sampled_from(weights)),
        bases=draw(st.sampled_from(bases)), **{name: draw(strategy) for name, strategy in fields.items()})
    drawn['omit'] = tuple(role for role in drawn.get('omit', ()) if role in drawn['link'])
    try:
        return Recipe('drawn', **drawn)
    except ValueError:
        reject()


ANY = recipes(**IDLE, **ACTIVE)
PACKABLE = recipes(weights=SIGNS, bases=((), (), (1, 2)), **IDLE, **ACTIVE)
DEPLOYABLE = recipes(inputs=SIGNS, weights=SIGNS, bases=((),), **IDLE, **ACTIVE)
FLOAT = recipes(inputs=(None,), weights=(None,), bases=((),), **IDLE, act=st.just('keep'))
ALL_REAL = recipes(**{**IDLE, 'real': st.just(ROLES)}, act=st.just('keep'))


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model.eval()(images())


def host(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(HOSTS[name]())


def binarized(name: str, recipe: Recipe) -> nn.Module:
    """A host's binarized net; where a layer without a link is to be omitted, the refusal leaves the host as it was."""
    model = host(name)
    try:
        return timm_el.binarize(model, recipe, example_input=images())
    except ValueError as e:
        assert 'nothing is left' in str(e) and torch.equal(outputs(model), outputs(host(name)))
        reject()


def hold(check: Callable[..., None], examples: int, *strategies: st.SearchStrategy) -> None:
    """Run a check on drawn arguments: the same few in every run, others each time where there are many."""
    options = settings(
        max_examples=examples, derandomize=examples == FEW, deadline=None, suppress_health_check=list(HealthCheck))
    options(given(*strategies)(check))()


@EXAMPLES
def test_a_recipe_is_equal_to_its_json_and_keeps_its_code(examples):
    def check(recipe: Recipe) -> None:
        data = json.loads(json.dumps(recipe.to_dict()))
        again = Recipe.from_dict(data)
        assert again == recipe and hash(again) == hash(recipe) and again.code == recipe.code
        assert again.to_dict() == data and 0 <= recipe.code < 2 ** 16
        assert recipe.replace(name='another', paper_top1=1.).code == recipe.code
    hold(check, examples, ANY)


@EXAMPLES
@pytest.mark.parametrize('kind', ['float', 'all_real'])
def test_where_nothing_is_binarized_the_outputs_are_the_hosts(kind, examples):
    def check(name: str, recipe: Recipe) -> None:
        assert torch.equal(outputs(binarized(name, recipe)), outputs(host(name)))
    hold(check, examples, HOST_NAMES, FLOAT if kind == 'float' else ALL_REAL)


@EXAMPLES
def test_a_net_comes_out_of_its_packed_tensors(examples):
    """Its outputs are equal, and what it is packed to again is equal bit for bit."""
    def check(name: str, recipe: Recipe) -> None:
        model = randomise(binarized(name, recipe), 2)
        assume(any(getattr(module, 'weight_bits', 0) for module in model.modules()))
        packed = timm_el.pack_state_dict(model)
        twin = binarized(name, recipe)
        twin.load_state_dict(packed)
        assert torch.equal(outputs(twin), outputs(model))
        again = timm_el.pack_state_dict(twin)
        assert again.keys() == packed.keys() and all(torch.equal(again[key], packed[key]) for key in packed)
    hold(check, examples, HOST_NAMES, PACKABLE)


@pytest.mark.parametrize('name', HOSTS)
def test_a_negated_convolution_is_seen(name):
    """Whichever it is, by the comparison of outputs and by that of units."""
    recipe = Recipe('el_everywhere', link=ROLES, act='branch', real=())
    model = randomise(binarized(name, recipe), 2).eval()
    deployed, expected = timm_el.deploy(model), outputs(model)
    layers = [m for m in model.modules() if isinstance(m, BinaryConv2d)]
    assert len(layers) >= 6 and worst_unit(model, deployed, images()) < 1e-5
    for layer in layers:
        layer.weight.data.neg_()
        assert (outputs(model) - expected).abs().max() > 1e-3
        assert worst_unit(model, deployed, images()) > 1e-2
        layer.weight.data.neg_()


def check_deployed(name: str, recipe: Recipe) -> None:
    model = randomise(binarized(name, recipe), 2).eval()
    assert worst_unit(model, timm_el.deploy(model), images()) < 1e-5


@EXAMPLES
def test_each_unit_deploys_to_what_it_gives(examples):
    hold(check_deployed, examples, HOST_NAMES, DEPLOYABLE)


@pytest.mark.parametrize('recipe', [
    Recipe(f'omits-{residual}-{pool}', link=ROLES, omit=ROLES, residual=residual, link_pool=pool)
    for residual in (True, False) for pool in ('max', 'avg')], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize('name', HOSTS)
def test_a_unit_of_a_link_alone_has_what_hosts_read_off_a_layer(name, recipe):
    """The first convolution of a basic block has the host's downsample path for a link, which has no channels."""
    model, floats = binarized(name, recipe), dict(host(name).named_modules())
    units = {path: m for path, m in model.named_modules() if isinstance(m, BinaryUnit) and m.conv is None}
    assert units
    for path, unit in units.items():
        for key in ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups'):
            assert getattr(unit, key) == getattr(floats[path], key), (path, key)
    check_deployed(name, recipe)
