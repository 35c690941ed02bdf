"""Epilogue: what follows a convolution, folded in float64 into the constants of one operator."""
import copy
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..kinds import is_identity_in_eval
from ..layers import ElasticLink, RPReLU, RSign, Shift
from .spec import ROWS, Window, table_stride

__all__ = [
    'FIXED_NORMS', 'FOLDED_ACTS', 'Affine', 'Epilogue', 'Slot', 'act_of', 'affine_of', 'drops', 'fold', 'folds_link',
    'norm_and_act', 'pair', 'pool_of', 'threshold_of']

FIXED_NORMS = (nn.modules.batchnorm._BatchNorm,)
FOLDED_ACTS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.Identity)
INF = math.inf
F64 = dict(dtype=torch.float64, device='cpu')  # whatever the defaults of torch are


class Affine(NamedTuple):
    """y = x * scale + shift per channel, float64."""
    scale: torch.Tensor
    shift: torch.Tensor


def affine_of(norm: nn.Module | None, channels: int) -> Affine | None:
    """Return a norm as an affine map in float64, or None if it depends on its input."""
    one, zero = torch.ones(channels, **F64), torch.zeros(channels, **F64)
    if norm is None or drops(norm):
        return Affine(one, zero)
    if not isinstance(norm, FIXED_NORMS) or norm.running_mean is None or norm.training or not _is_known(norm):
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


def norm_and_act(module: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """Return a norm and the activation inside it, if timm put one there."""
    act = getattr(module, 'act', None)
    if not isinstance(act, nn.Module):
        return module, None
    norm = copy.copy(module)
    norm.__dict__['_modules'] = {}
    norm.act = norm.drop = None
    return norm, act


def _is_known(module: nn.Module) -> bool:
    """Return whether the forward of a module is torch's or timm's, not one of a subclass."""
    if isinstance(module, torch.jit.ScriptModule):  # whose class has none
        return False
    return type(module).forward.__module__.startswith(('torch.nn.', 'timm.layers.'))


def act_of(act: nn.Module | None) -> tuple[str, Any, Any] | None:
    """Return an activation as ('none' | 'clip' | 'prelu', lo or slope, hi), or None if it is neither."""
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
    """Return whether a module does nothing in eval mode."""
    return is_identity_in_eval(module) and _is_known(module)


class Slot(IntEnum):
    """Places of an epilogue, in the order of its formula (`ConvSpec`)."""
    AFFINE = 0
    ACT = 1
    AFFINE2 = 2
    LINK = 3
    POST = 4


@dataclass(frozen=True)
class Epilogue:
    """Epilogue of one convolution, in the same operator: the steps of `ConvSpec`'s formula, with their constants.

    Args:
        rows: Constants per output channel, float64, by the names of `spec.ROWS`.
        slot: The last place that is taken; what comes next must go to a later one.
        facts: Fields of `ConvSpec` that it sets.
        constants: lo, hi and 1 / gamma.
    """
    rows: dict[str, torch.Tensor]
    slot: Slot = Slot.AFFINE
    facts: dict[str, Any] = field(default_factory=dict)
    constants: tuple[float, float, float] = (-INF, INF, 1.)

    @property
    def channels(self) -> int:
        """Output channels."""
        return len(self.rows['scale'])

    def table(self, rows: Sequence[str]) -> torch.Tensor:
        """Return the constants (rows, stride) float32 as the operator takes them."""
        table = torch.zeros(len(rows), table_stride(self.channels), dtype=torch.float32, device='cpu')
        for i, name in enumerate(rows):
            table[i, :self.channels] = self.rows[name].float()
        return table

    def scaled(self, factor: torch.Tensor) -> 'Epilogue':
        """Return the same after a convolution whose output (C,) lacks a factor."""
        return replace(self, rows={**self.rows, 'scale': self.rows['scale'] * factor.double()})

    def without_scale(self) -> 'Epilogue':
        """Return the same with a scale of one, for a convolution whose weight has taken the scale in."""
        return replace(self, rows={**self.rows, 'scale': torch.ones_like(self.rows['scale'])})

    def without_shift(self) -> 'Epilogue':
        """Return the same without a shift, for a convolution whose bias comes later."""
        return replace(self, rows={**self.rows, 'shift': torch.zeros_like(self.rows['shift'])})


def fold(
        channels: int,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        steps: Sequence[tuple[str, nn.Module]],
        slots: Container[Slot] = tuple(Slot),
) -> tuple[Epilogue, int]:
    """Return the epilogue of a convolution, and how many of the steps after it are in it.

    Args:
        channels: Output channels.
        scale: Factor of the convolution's output per channel, one if None.
        bias: Its bias.
        steps: What runs next, in order: ('norm' | 'act' | 'scale' | 'link' | 'post' | other, module).
        slots: Places that the operator at hand has.
    """
    one, zero = torch.ones(channels, **F64), torch.zeros(channels, **F64)
    rows = {name: one if 'scale' in name else zero for name in ROWS}
    if scale is not None:
        rows['scale'] = scale.double()
    if bias is not None:
        rows['shift'] = bias.detach().double()
    epilogue = Epilogue(rows)
    for i, (name, module) in enumerate(steps):
        longer = _TAKES[name](epilogue, module) if name in _TAKES else None
        if longer is None or longer.slot not in slots:
            return epilogue, i
        epilogue = longer
    return epilogue, len(steps)


def _with_factor(epilogue: Epilogue, factor: nn.Module) -> Epilogue | None:
    """Take in a factor per channel; others depend on the input, or on the place."""
    channel = getattr(factor, 'channel', None)
    if channel is None or getattr(factor, 'row', None) is not None:
        return None
    channel, rows = channel.detach().double(), epilogue.rows
    return replace(epilogue, rows={**rows, 'scale': rows['scale'] * channel, 'shift': rows['shift'] * channel})


def _with_norm(epilogue: Epilogue, norm: nn.Module) -> Epilogue | None:
    affine = affine_of(norm, epilogue.channels)
    if affine is None or epilogue.slot > Slot.AFFINE2:
        return None
    if drops(norm):
        return epilogue
    first = epilogue.slot == Slot.AFFINE
    scale, shift = ('scale', 'shift') if first else ('scale2', 'shift2')
    rows = {
        **epilogue.rows, scale: epilogue.rows[scale] * affine.scale,
        shift: epilogue.rows[shift] * affine.scale + affine.shift}
    if first:
        return replace(epilogue, rows=rows)
    return replace(epilogue, rows=rows, slot=Slot.AFFINE2, facts={**epilogue.facts, 'has_affine': True})


def _with_act(epilogue: Epilogue, act: nn.Module) -> Epilogue | None:
    known = act_of(act)
    if known is None or known[0] != 'none' and epilogue.slot > Slot.AFFINE:
        return None
    kind, low, high = known
    if kind == 'none':
        return epilogue
    longer = replace(epilogue, slot=Slot.ACT, facts={**epilogue.facts, 'act': kind})
    if kind == 'clip':
        return replace(longer, constants=(float(low), float(high), epilogue.constants[2]))
    return replace(longer, rows={**epilogue.rows, 'slope': low.double().expand(epilogue.channels)})


def _with_link(epilogue: Epilogue, link: nn.Module) -> Epilogue | None:
    """Take in a link, or the output of another module in its place."""
    if epilogue.slot > Slot.AFFINE2:
        return None
    facts = {**epilogue.facts, 'link': 'identity', 'link_c': epilogue.channels}
    if not folds_link(link):
        return replace(epilogue, slot=Slot.LINK, facts=facts)
    if link.gamma is not None and link.gamma.item() == 0:
        return None
    facts.update(link=link.kind, link_c=link.in_channels, **pool_of(link.pool))
    inverse = 1. if link.gamma is None else 1. / link.gamma.double().item()
    return replace(epilogue, slot=Slot.LINK, facts=facts, constants=(*epilogue.constants[:2], inverse))


def folds_link(link: nn.Module | None) -> bool:
    """Return whether the operator pools the link's source and changes its channels itself."""
    return isinstance(link, ElasticLink) and pool_of(link.pool) is not None


def _with_post(epilogue: Epilogue, post: nn.Module) -> Epilogue | None:
    """Take in what comes after the sum."""
    if drops(post):
        return epilogue
    if epilogue.slot > Slot.LINK:
        return None
    if type(post) is RPReLU:
        rows = (post.shift_in, post.slope, post.shift_out)
    elif isinstance(post, nn.PReLU) and _is_known(post):
        zero = torch.zeros(epilogue.channels, **F64)
        rows = (zero, post.weight.expand(epilogue.channels), zero)
    else:
        return None
    named = {name: row.detach().double() for name, row in zip(('post_in', 'post_slope', 'post_out'), rows)}
    return replace(
        epilogue, slot=Slot.POST, rows={**epilogue.rows, **named}, facts={**epilogue.facts, 'has_post': True})


_TAKES = {'scale': _with_factor, 'norm': _with_norm, 'act': _with_act, 'link': _with_link, 'post': _with_post}


def pair(value: Any) -> tuple[int, int]:
    """Return a size of one or two numbers as two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def pool_of(pool: nn.Module | None) -> dict[str, Any] | None:
    """Return the fields of `ConvSpec` for a pool that the kernels know, or None."""
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
    """Return the thresholds (C,) at which the sign of what `pre` gives changes, and the flips; None if unknown.

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
