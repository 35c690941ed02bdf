"""What follows a convolution is found by watching, whatever it is called."""
import pytest
import torch
import torch.nn as nn

from timm_el.engine.follow import followers

OTHERS = (nn.BatchNorm2d, nn.ReLU)


class Net(nn.Module):
    """One convolution, one norm and one activation, used in the given way."""

    def __init__(self, how, inplace: bool = False) -> None:
        super().__init__()
        self.z = nn.BatchNorm2d(4)
        self.y = nn.ReLU(inplace)
        self.x = nn.Conv2d(3, 4, 1)
        self.how = how

    def forward(self, x):
        return self.how(self, x)


@pytest.mark.parametrize('how, inplace, expected', [
    (lambda m, x: m.y(m.z(m.x(x))) * 2, False, ['z', 'y']),
    (lambda m, x: m.z(m.y(m.x(x))) * 2, False, ['y', 'z']),
    (lambda m, x: m.z(m.y(m.x(x))) * 2, True, ['y', 'z']),
    (lambda m, x: m.y(m.z(m.x(x))) * 2, True, ['z', 'y']),
    (lambda m, x: m.y(m.x(x)) * 2, True, ['y']),
    (lambda m, x: (lambda c: m.z(c) + c)(m.x(x)), False, []),  # read twice
    (lambda m, x: (lambda c: (m.z(c), c))(m.x(x)), False, []),  # leaves the net
    (lambda m, x: (lambda c: m.z(c) + m.y(c))(m.x(x)), False, []),  # two followers
    (lambda m, x: (lambda c: m.z(m.y(c)) + c)(m.x(x)), True, ['y']),  # in place, and then read twice
    (lambda m, x: (lambda c: (c + 1) * m.y(c))(m.x(x)), True, []),  # read before it is changed in place
    (lambda m, x: m.z(m.x(x) + 1), False, []),
    (lambda m, x: m.z(m.x(x)) + m.z(m.x(x)), False, None),  # runs twice
    (lambda m, x: m.y(m.z(m.x(x)) + 1), False, ['z']),
    (lambda m, x: (lambda c: m.y(c) + c)(m.z(m.x(x))), False, ['z']),
])
def test_followers(how, inplace, expected):
    net = Net(how, inplace).eval()
    assert followers(net, (nn.Conv2d,), OTHERS).get('x') == expected


def test_modules_with_hooks_are_not_followed():
    net = Net(lambda m, x: m.y(m.z(m.x(x))) * 2).eval()
    net.z.register_forward_hook(lambda *args: None)
    assert followers(net, (nn.Conv2d,), OTHERS)['x'] == []


def test_a_net_that_does_not_run_has_no_followers():
    net = Net(lambda m, x: 1 / 0).eval()
    assert followers(net, (nn.Conv2d,), OTHERS) == {}


def test_watching_changes_nothing():
    net = Net(lambda m, x: m.y(m.z(m.x(x))) * 2).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    followers(net, (nn.Conv2d,), OTHERS)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
