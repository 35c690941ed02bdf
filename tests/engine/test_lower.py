"""Lowering: what a network does is read from one recording, and a program of it computes the same."""

import contextlib
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomise

import timm_el
from timm_el.engine.network import Entries
from timm_el.engine.steps import Kind, Unary
from timm_el.layers import BinaryConv2d, BinaryUnit, ElasticLink


class Host(nn.Module):
    """A unit, and a function of what it gives."""

    def __init__(self, function, **modules):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.unit = BinaryUnit(BinaryConv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), link=ElasticLink(16, 16))
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, self.unit(self.conv(x)))


def deployed_pair(function, **modules):
    torch.manual_seed(0)
    host = randomise(Host(function, **modules)).eval()
    return timm_el.deploy(host), timm_el.deploy(host, fuse_blocks=False)


def runner_for(network, x):
    found = Entries(network).find('forward', (x,), {})
    return None if found is None else found[0]


def kinds(runner):
    return [step.kind for step in runner.program.steps]


def spread_mean(m, x):
    return x * x.mean((2, 3), keepdim=True).sigmoid()


def attention_of_channels(m, x):
    return x * m.fc(x.mean((2, 3)))[:, :, None, None]


def channels_last_block(m, x):
    y = F.gelu(m.fc(m.norm(x.permute(0, 2, 3, 1))))
    return x + (y * m.gain.weight[:16, 0]).permute(0, 3, 1, 2)


EXACT = {  # functions of the host that round as their steps do
    'sum': lambda m, x: x + m.unit(x), 'difference': lambda m, x: 2 - x * 3, 'quotient': lambda m, x: 1 / (x.abs() + 1),
    'in place': lambda m, x: F.relu_(x.add_(1)) * x, 'views in place': lambda m, x: (x.flatten(2).relu_(), x)[1] + 1,
    'clamp': lambda m, x: x.clamp(-.5) + x.clamp(max=.5) + F.hardtanh(x), 'leaky': lambda m, x: F.leaky_relu(x, .2),
    'cat': lambda m, x: torch.cat([x, m.unit(x), x], 1), 'chunk': lambda m, x: x.chunk(2, 1)[1] * x[:, :8],
    'every second channel': lambda m, x: x[:, ::2], 'tokens': lambda m, x: x.flatten(2).transpose(1, 2) * 2,
    'pixels': lambda m, x: x.permute(0, 2, 3, 1), 'padding': lambda m, x: F.pad(x, (1, 2, 0, 3), value=.5),
    'pool': lambda m, x: (
        F.max_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)),
    'flatten': lambda m, x: x.flatten(1),
    'constant image': lambda m, x: x * torch.arange(x.shape[3]),
    'per channel': lambda m, x: x * m.gain.weight[:, :1, None],
    'several': lambda m, x: {'a': x, 'b': [x.relu(), None]},
}
CLOSE = {  # functions whose steps round in another way than torch, within 1e-6
    'mean': lambda m, x: x.mean((2, 3)), 'squeeze and excite': spread_mean, 'gate': attention_of_channels,
    'silu': lambda m, x: F.silu(x), 'hardswish': lambda m, x: F.hardswish(x) + F.hardsigmoid(x),
    'gelu': lambda m, x: F.gelu(x) + F.gelu(x, approximate='tanh'), 'tanh': lambda m, x: torch.tanh(x) + F.elu(x, .7),
    'mish': lambda m, x: F.mish(x), 'exp': lambda m, x: (x * .1).exp() + (x.abs() + 1).sqrt() + x ** 2,
    'channels last': channels_last_block, 'group norm': lambda m, x: F.group_norm(x, 4),
    'batch norm': lambda m, x: F.batch_norm(x, m.statistics.running_mean, m.statistics.running_var, eps=.1),
    'convolution': lambda m, x: F.conv2d(x, m.kernel.weight, m.kernel.bias, padding=1),
    'depthwise': lambda m, x: F.conv2d(x, m.depthwise.weight, None, 2, 1, groups=16),
    'mean of tokens': lambda m, x: x.flatten(2).mean(2),
    'adaptive': lambda m, x: F.adaptive_avg_pool2d(x, 1).flatten(1),
}


def modules():
    return dict(
        fc=nn.Linear(16, 16), norm=nn.LayerNorm(16), gain=nn.Linear(16, 16, bias=False), kernel=nn.Conv2d(16, 8, 3),
        statistics=nn.BatchNorm2d(16), depthwise=nn.Conv2d(16, 16, 3, groups=16, bias=False))


def leaves(out):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
@pytest.mark.parametrize('name', [*EXACT, *CLOSE])
def test_a_program_gives_what_the_modules_give(name):
    program, apart = deployed_pair({**EXACT, **CLOSE}[name], **modules())
    for size in ((24, 24), (24, 24), (31, 27), (57, 75)):
        x = torch.randn(2, 3, *size)
        expected, found = apart(x), program(x)
        assert type(found) is type(expected)
        for a, b in zip(leaves(found), leaves(expected), strict=True):
            assert a.shape == b.shape
            if name in EXACT:
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
    runner = runner_for(program, torch.randn(1, 3, 24, 24))
    assert runner is not None and runner.program is not None, 'it must not have been run module by module'


def split_and_write(m, x):
    a, b = x.split(8, 1)
    F.relu_(a)
    return x + torch.cat([a, b], 1)


def write_under_a_slice(m, x):
    y = x[:, :8]
    x.add_(1)
    return torch.cat([y, x], 1)


def write_behind_a_view(m, x):
    y, z = x.flatten(2), x[:, 8:]
    y.add_(1)
    return z * 1


def write_to_a_constant_twice(m, x):
    c = torch.full((1,), 2.)
    y = x * c
    c.add_(1)
    return y * c


def island_that_writes(m, x):
    y = m.unit2(x)
    return y + m.writing(x)


def island_and_a_slice(m, x):
    y = x[:, :8]
    return torch.cat([y, m.writing(x)[:, 8:]], 1)


def island_that_gives_a_view(m, x):
    m.viewing(x).add_(1)
    return x * 1


def island_that_writes_to_a_constant(m, x):
    c = torch.full((1,), 2.)
    return x * m.constant_writing(c, x)


class Viewing(nn.Module):
    def forward(self, x):
        x.sort(1)
        return x.view(x.shape)


class Writing(nn.Module):
    def forward(self, x):
        return x.relu_().sort(1).values


class ConstantWriting(nn.Module):
    def forward(self, c, x):
        c.add_(1)
        return x.sort(1).values * c


UNUSUAL = {  # what may end in no program at all, and must be right
    'a slice is written to': lambda m, x: (x[:, :8].mul_(2), x)[1], 'a part is written to': split_and_write,
    'written under a slice': write_under_a_slice, 'written behind a view': write_behind_a_view,
    'a constant is written to': write_to_a_constant_twice, 'an island writes': island_that_writes,
    'an island writes under a slice': island_and_a_slice, 'an island gives a view': island_that_gives_a_view,
    'an island writes to a constant': island_that_writes_to_a_constant,
    'power of a number': lambda m, x: 2 ** x, 'power of a constant': lambda m, x: torch.full((1,), 2.) ** x,
    'a tensor as power': lambda m, x: x.abs() ** m.gain.weight[:, :1, None],
    'a constant squared': lambda m, x: x * torch.full((1,), 3.).pow(2),
    'strides of its own': lambda m, x: x.mean((2, 3)).as_strided((2, 16), (1, 2)),
    'a mean of another dtype': lambda m, x: x.mean((2, 3), dtype=torch.float64),
    'a kernel of 33 x 33': lambda m, x: m.wide(x),
    'many features': lambda m, x: m.wide(x).repeat(1, 70, 1, 1).flatten(1),
}


@torch.no_grad()
@pytest.mark.parametrize('name', UNUSUAL)
def test_what_shares_memory_or_has_no_step_gives_what_the_modules_give(name):
    program, apart = deployed_pair(
        UNUSUAL[name], **modules(), unit2=BinaryUnit(BinaryConv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)),
        wide=nn.Conv2d(16, 8, 33, padding=16))
    for network in (program, apart):
        network.writing, network.viewing, network.constant_writing = Writing(), Viewing(), ConstantWriting()
    for size in ((24, 24), (24, 24), (57, 75)):
        x = torch.randn(2, 3, *size)
        expected, found = apart(x), program(x)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@torch.no_grad()
def test_the_sign_bit_of_a_tensor_is_not_lost(tmp_path):
    program, apart = deployed_pair(lambda m, x: x.relu())
    x = torch.randn(2, 3, 24, 24).contiguous(memory_format=torch.channels_last)
    negative = torch._neg_view(x)
    assert torch.equal(program(negative), apart(-x)) and torch.equal(apart(negative), apart(-x))
    timm_el.export(program, tmp_path / 'net.program', size=(24, 24))
    assert torch.equal(timm_el.load_program(tmp_path / 'net.program')(negative), apart(-x))


@torch.no_grad()
def test_a_deployed_network_that_ran_leaves_no_tensor_behind():
    network, _ = deployed_pair(lambda m, x: m.unit(x))
    for module_by_module in (False, True):
        with contextlib.ExitStack() as stack:
            if module_by_module:
                stack.enter_context(torch.profiler.profile())
            network(torch.randn(1, 3, 24, 24))
    tensors = [weakref.ref(t) for m in network.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    tensors += [weakref.ref(t) for t in network.state_dict(keep_vars=True).values()]
    assert len(tensors) > 5
    del network, _
    gc.collect()
    assert not [t for t in tensors if t() is not None]


class Sorting(nn.Module):
    """What no step does."""

    def forward(self, x, scale=1):
        return x.sort(1).values * scale


@torch.no_grad()
def test_a_module_without_a_step_is_an_island_and_is_named():
    program, apart = deployed_pair(lambda m, x: m.unit(m.island(x, scale=2)) + x, island=nn.Sequential())
    for network in (program, apart):
        network.island = Sorting()
    x = torch.randn(2, 3, 24, 24)
    assert torch.equal(program(x), apart(x))
    runner = runner_for(program, x)
    assert runner.islands == ['island'] and runner.program is None
    with pytest.raises(ValueError, match='island.*run their own forward'):
        timm_el.export(program, 'never', size=(24, 24))


@torch.no_grad()
def test_the_smallest_module_is_the_island():
    outer = nn.Sequential(nn.ReLU(), nn.Sequential(Sorting()))
    program, apart = deployed_pair(lambda m, x: m.outer(x) + x, outer=outer)
    x = torch.randn(2, 3, 24, 24)
    assert torch.equal(program(x), apart(x)) and runner_for(program, x).islands == ['outer.1.0']


@torch.no_grad()
def test_what_stands_in_the_hosts_own_forward_makes_it_go_module_by_module():
    program, apart = deployed_pair(lambda m, x: x.sort(1).values)
    x = torch.randn(2, 3, 24, 24)
    assert torch.equal(program(x), apart(x)) and runner_for(program, x) is None


@torch.no_grad()
@pytest.mark.parametrize('function, sizes', [
    (lambda m, x: F.pad(x, (x.shape[3] % 2, 0)), [(24, 24), (25, 25), (24, 25)]),
    (lambda m, x: x + 1 if x.shape[2] > 40 else x - 1, [(24, 24), (48, 48), (41, 41)]),
    (lambda m, x: x * torch.linspace(0, 1, x.shape[3]), [(24, 24), (16, 48)]),
    (lambda m, x: x.relu() if x.shape[2] < 20 else x, [(24, 24), (16, 16)])])
def test_a_network_that_depends_on_the_size_has_a_program_for_each(function, sizes):
    program, apart = deployed_pair(function)
    for size in (*sizes, *sizes):
        x = torch.randn(2, 3, *size)
        assert torch.equal(program(x), apart(x))
    assert runner_for(program, torch.randn(1, 3, *sizes[0])).size == sizes[0]


@torch.no_grad()
def test_a_network_that_depends_on_the_batch_goes_module_by_module():
    program, apart = deployed_pair(lambda m, x: x * len(x) if len(x) == 2 else x)
    for n in (1, 2, 3):
        x = torch.randn(n, 3, 24, 24)
        assert torch.equal(program(x), apart(x))


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


@torch.no_grad()
def test_a_module_that_writes_to_its_own_buffer_runs_each_time():
    program, apart = deployed_pair(lambda m, x: m.counting(x) + 1, counting=Counting())
    program.counting.calls.zero_()
    apart.counting.calls.zero_()
    x = torch.randn(1, 3, 24, 24)
    for i in range(1, 4):
        assert torch.equal(program(x), apart(x))
        assert program.counting.calls == apart.counting.calls == i


@torch.no_grad()
def test_sums_are_taken_into_convolutions():
    program, _ = deployed_pair(lambda m, x: m.unit(x) + x)
    assert kinds(runner_for(program, torch.randn(1, 3, 24, 24))) == [Kind.CONV] * 3


@torch.no_grad()
def test_an_entry_with_other_arguments_is_another_program():
    import timm
    torch.manual_seed(0)
    latent = randomise(timm.create_model('el_resnet18', num_classes=4)).eval()
    program, apart = timm_el.deploy(latent), timm_el.deploy(latent, fuse_blocks=False)
    x = torch.randn(1, 3, 64, 64)
    for options in ({}, dict(indices=2), dict(indices=[1, 3], norm=True), dict(intermediates_only=True),
                    dict(output_fmt='NCHW', stop_early=True, indices=[0])):
        a, b = program.forward_intermediates(x, **options), apart.forward_intermediates(x, **options)
        assert len(leaves(a)) == len(leaves(b)) and all(torch.equal(p, q) for p, q in zip(leaves(a), leaves(b)))
    assert torch.equal(program.forward_features(x), apart.forward_features(x))
    assert len(program._entries._runners) == 6
    program.reset_classifier(7)
    apart.reset_classifier(7)
    apart.fc.load_state_dict(program.fc.state_dict())
    assert program(x).shape == (1, 7)
    torch.testing.assert_close(program(x), apart(x), rtol=1e-6, atol=1e-5)


@torch.no_grad()
def test_four_threads_may_call_first_at_once():
    program, apart = deployed_pair(lambda m, x: m.unit(x) + x)
    images = [torch.randn(1 + i % 2, 3, 20 + i, 24) for i in range(4)]
    expected, wrong = [apart(x) for x in images], []

    def work(i):
        for _ in range(20):
            if not torch.equal(program(images[i]), expected[i]):
                wrong.append(i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not wrong


FUNCTIONS = {
    Unary.SIGMOID: torch.sigmoid, Unary.SILU: F.silu, Unary.HARDSIGMOID: F.hardsigmoid, Unary.HARDSWISH: F.hardswish,
    Unary.GELU: F.gelu, Unary.GELU_TANH: lambda x: F.gelu(x, approximate='tanh'), Unary.TANH: torch.tanh,
    Unary.ELU: F.elu, Unary.MISH: F.mish, Unary.EXP: torch.exp, Unary.SQRT: torch.sqrt, Unary.SQUARE: torch.square,
    Unary.ABS: torch.abs}


@pytest.mark.parametrize('body', [None, 'reference'])
@pytest.mark.parametrize('operation', FUNCTIONS)
def test_unary_functions_are_torchs_in_float64_rounded(operation, body):
    timm_el.engine.use_isa(body)
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0., -0., 1e-30, -1e-30, 60., -60., float('nan')])])
    x = x.abs() if operation == Unary.SQRT else x
    expected = FUNCTIONS[operation](x.double()).float()
    found = timm_el.engine.operators.unary(operation, x, *([1.] if operation == Unary.ELU else []))
    timm_el.engine.use_isa(None)
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=2e-7, equal_nan=True)
