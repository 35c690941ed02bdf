"""What follows a convolution, folded into the constants of one operator, in float64, as far as it can be."""
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..kinds import is_identity_in_eval
from ..layers import ElasticLink, RPReLU, RSign, Shift
from .spec import ROWS, Window, table_stride

__all__ = ['NORMS', 'ACTS', 'Affine', 'Fusion', 'act_of', 'affine_of', 'drops', 'pair', 'pool_of', 'threshold_of']

NORMS = (nn.modules.batchnorm._BatchNorm,)
ACTS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.Identity)
INF = math.inf
F64 = dict(dtype=torch.float64, device='cpu')  # whatever the defaults of torch are


class Affine(NamedTuple):
    """y = x * scale + shift per channel, float64."""
    scale: torch.Tensor
    shift: torch.Tensor


def affine_of(norm: nn.Module | None, channels: int) -> Affine | None:
    """A norm as an affine map in float64, None if it depends on its input."""
    one, zero = torch.ones(channels, **F64), torch.zeros(channels, **F64)
    if norm is None or drops(norm):
        return Affine(one, zero)
    if not isinstance(norm, NORMS) or norm.running_mean is None or norm.training or not _is_known(norm):
        return None
    parts = (getattr(norm, name, None) for name in ('act', 'drop'))
    if not all(part is None or drops(part) for part in parts):
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return Affine(scale, shift)


def _is_known(module: nn.Module) -> bool:
    """Its forward is torch's or timm's, not one of its own."""
    if isinstance(module, torch.jit.ScriptModule):  # whose class has none
        return False
    return type(module).forward.__module__.startswith(('torch.nn.', 'timm.layers.'))


def act_of(act: nn.Module | None) -> tuple[str, Any, Any] | None:
    """An activation as ('none' | 'clip' | 'prelu', lo or slope, hi), None if it is neither."""
    if act is None or drops(act):
        return 'none', -INF, INF
    if type(act) is nn.ReLU:
        return 'clip', 0., INF
    if not _is_known(act):
        return None
    if isinstance(act, nn.Hardtanh):
        return 'clip', act.min_val, act.max_val
    if type(act) is nn.LeakyReLU:
        return 'prelu', torch.tensor([act.negative_slope], **F64), None
    if isinstance(act, nn.PReLU):
        return 'prelu', act.weight.detach(), None
    return None


def drops(module: nn.Module) -> bool:
    """Does nothing in eval mode."""
    return is_identity_in_eval(module) and _is_known(module)


class Fusion:
    """The epilogue of one convolution as it grows, step by step, until a step does not fit."""

    def __init__(self, channels: int, scale: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        self.channels = channels
        one, zero = torch.ones(channels, **F64), torch.zeros(channels, **F64)
        self.rows = {name: one if 'scale' in name else zero for name in ROWS}
        if scale is not None:
            self.rows['scale'] = scale.double()
        if bias is not None:
            self.rows['shift'] = bias.detach().double()
        self.facts: dict[str, Any] = {}
        self.constants = [-INF, INF, 1.]
        self.stage = 0  # 0: affine, 1: after the activation, 2: after the second affine, 3: after the link, 4: closed

    def scale(self, scale: nn.Module) -> bool:
        """Take in a factor per channel; others depend on the input, or on the place."""
        channel = getattr(scale, 'channel', None)
        if channel is None or getattr(scale, 'row', None) is not None:
            return False
        for name in ('scale', 'shift'):
            self.rows[name] = self.rows[name] * channel.detach().double()
        return True

    def norm(self, norm: nn.Module | None) -> bool:
        """Take a norm in; False if it does not fit."""
        affine = affine_of(norm, self.channels)
        if affine is None or self.stage > 2:
            return False
        scale, shift = ('scale', 'shift') if self.stage == 0 else ('scale2', 'shift2')
        self.rows[scale] = self.rows[scale] * affine.scale
        self.rows[shift] = self.rows[shift] * affine.scale + affine.shift
        if self.stage and norm is not None and not drops(norm):
            self.facts['has_affine'], self.stage = True, 2
        return True

    def act(self, act: nn.Module | None) -> bool:
        """Take an activation in."""
        known = act_of(act)
        if known is None:
            return False
        kind, low, high = known
        if kind == 'none':
            return True
        if self.stage > 0:
            return False
        self.stage, self.facts['act'] = 1, kind
        if kind == 'clip':
            self.constants[:2] = [float(low), float(high)]
        else:
            self.rows['slope'] = low.double().expand(self.channels)
        return True

    def link(self, link: ElasticLink) -> bool:
        """Take a link in."""
        pool = pool_of(link.pool)
        if self.stage > 2 or pool is None or (link.gamma is not None and link.gamma.item() == 0):
            return False
        self.stage = 3
        self.facts.update(link=link.kind, link_c=link.in_channels, **pool)
        if link.gamma is not None:
            self.constants[2] = 1. / link.gamma.double().item()
        return True

    def tensor_link(self) -> bool:
        """Take in the output of another module as the link."""
        if self.stage > 2:
            return False
        self.stage = 3
        self.facts.update(link='identity', link_c=self.channels)
        return True

    def post(self, post: nn.Module | None) -> bool:
        """Take in what comes after the sum."""
        if post is None or drops(post):
            return True
        if self.stage > 3:
            return False
        if type(post) is RPReLU:
            rows = (post.shift_in, post.slope, post.shift_out)
        elif isinstance(post, nn.PReLU) and _is_known(post):
            zero = torch.zeros(self.channels, **F64)
            rows = (zero, post.weight.expand(self.channels), zero)
        else:
            return False
        self.stage, self.facts['has_post'] = 4, True
        for name, row in zip(('post_in', 'post_slope', 'post_out'), rows):
            self.rows[name] = row.detach().double()
        return True

    def table(self, rows: Sequence[str]) -> torch.Tensor:
        """The rows as the operator takes them."""
        table = torch.zeros(len(rows), table_stride(self.channels), dtype=torch.float32, device='cpu')
        for i, name in enumerate(rows):
            table[i, :self.channels] = self.rows[name].float()
        return table


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def pool_of(pool: nn.Module | None) -> dict[str, Any] | None:
    """Facts of a pooling that the kernel knows; None if it does not."""
    if pool is None or drops(pool):
        return {}
    if type(pool) is nn.MaxPool2d and not pool.return_indices:
        kind, dilation = 'max', pair(pool.dilation)
    elif type(pool) is nn.AvgPool2d and pool.divisor_override is None and (
            not pool.count_include_pad or pair(pool.padding) == (0, 0)):
        kind, dilation = 'avg', (1, 1)
    else:
        return None
    kernel, stride = pair(pool.kernel_size), pair(pool.stride if pool.stride is not None else pool.kernel_size)
    if kernel[0] * kernel[1] > 64:
        return None
    return {'link_pool': kind, 'pool': Window(kernel, stride, pair(pool.padding), dilation)}


def threshold_of(
        pre: nn.Module, channels: int) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """Where the sign of what `pre` gives changes, for each channel, and whether it changes downwards; None if unknown.

    Sign(x + b) is x >= -b: a float sum has the sign of the exact one. For a norm the threshold is looked for, among all
    floats, with the norm itself as the judge, so that no sign differs from the latent network's.
    """
    if type(pre) in (Shift, RSign):
        return -pre.bias.detach().float(), None
    affine = affine_of(pre, channels)
    if affine is None:
        return None
    down = affine.scale < 0
    # Floats in their order are these integers in their order.
    low = torch.full((channels,), -(0x7f800000), dtype=torch.int64, device='cpu')
    high = -low + 1  # beyond infinity: the sign never changes

    def value(key: torch.Tensor) -> torch.Tensor:
        bits = torch.where(key < 0, -key - 0x80000000, key).clamp(max=0x7f800000)
        return bits.to(torch.int32).view(torch.float32)

    for _ in range(34):
        middle = (low + high).div(2, rounding_mode='floor')
        x = value(middle)
        with torch.no_grad():
            plus = pre(torch.where(down, -x, x).reshape(1, -1, 1, 1)).flatten() >= 0
        low, high = torch.where(plus, low, middle + 1), torch.where(plus, middle, high)
        low = torch.minimum(low, high)
    threshold = value(high)
    threshold[high > 0x7f800000] = math.nan  # nothing is >= NaN: always -1
    flip = down.to(torch.int32) * -2 ** 31
    return threshold, flip if down.any() else None
