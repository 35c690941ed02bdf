"""What stands in for the parts of a host: binary forms of its layers, norms for another place, links."""
import copy
from functools import partial
from typing import Any, Callable, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame

from ..layers import BinaryConv2d, BinaryLinear, ElasticLink, StandardizedBinaryConv2d, expected_statistics
from ..layers.multi_base import MultiBaseConv2d
from ..layers.ternary import TrainedTernaryConv2d
from ..quantizers import BITS
from ..recipes import Recipe

__all__ = [
    'binary_form', 'channels_of', 'identity_link', 'new_beside', 'norm_after_act', 'pads_same', 'shift_before_pool',
    'split_norm_act', 'status_of']

STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
POOLED_BIAS = -0.4


def split_norm_act(norm: Optional[nn.Module]) -> Tuple[Optional[nn.Module], Optional[nn.Module]]:
    """A fused norm-and-activation of timm as two modules that share its tensors; other norms as they are."""
    if not isinstance(getattr(norm, 'act', None), nn.Module):
        return norm, None
    twin = _twin(norm)
    twin.act = nn.Identity().train(norm.training)
    return twin, None if isinstance(norm.act, nn.Identity) else norm.act


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same class that shares the tensors and children of another, but not its slots for them."""
    twin = copy.copy(module)
    for slots in ('_parameters', '_buffers', '_modules'):
        twin.__dict__[slots] = dict(module.__dict__[slots])
    return twin


@torch.no_grad()
def norm_after_act(norm: Optional[nn.Module], act: nn.Module, conv: nn.Module) -> Optional[nn.Module]:
    """The norm for conv -> act -> norm, where the host had conv -> norm -> act.

    The host's running statistics describe another tensor, and used here in eval mode they leave every sign at +1. The
    twin starts from the expectation for inputs of unit variance: act(z), z ~ N(0, sum of squared weights).
    """
    if getattr(norm, 'running_mean', None) is None or getattr(norm, 'running_var', None) is None:
        return norm
    weight = conv.quantized_weight() if isinstance(conv, BinaryConv2d) else conv.weight
    mean, var = expected_statistics(weight, act)
    twin = _twin(norm)
    twin.running_mean = mean.to(norm.running_mean.dtype)
    twin.running_var = var.to(norm.running_var.dtype)
    return twin


def pads_same(layer: nn.Module) -> bool:
    """The layer pads as TensorFlow does, by the size of its input."""
    return isinstance(layer, Conv2dSame) or bool(getattr(layer, 'same_pad', False))


def binary_form(layer: nn.Module, recipe: Recipe) -> Union[Callable[..., nn.Module], str]:
    """What makes the binary form of a layer, or why there is none."""
    cls = type(layer)
    if issubclass(cls, nn.Linear):
        known = cls.forward is nn.Linear.forward or _is_timm_linear(cls)
        form = BinaryLinear.from_linear
    else:
        plain = cls.forward is nn.Conv2d.forward and cls._conv_forward is nn.Conv2d._conv_forward
        known = plain or cls is Conv2dSame or cls in STANDARDIZED
        form = StandardizedBinaryConv2d.from_conv if cls in STANDARDIZED else BinaryConv2d.from_conv
    if not known:
        return f'{cls.__name__} has a forward of its own'
    own = recipe.bases or recipe.weight_quantizer == 'ttq'  # convolutions of their own
    around = recipe.pre or recipe.scale_output or recipe.act in ('prelu', 'rprelu')  # on axis 1
    if own and form != BinaryConv2d.from_conv or around and issubclass(cls, nn.Linear):
        return f'recipe {recipe.name!r} has no form of a {cls.__name__}'
    if recipe.bases:
        return partial(MultiBaseConv2d.from_conv, bases=recipe.bases)
    return TrainedTernaryConv2d.from_conv if recipe.weight_quantizer == 'ttq' else form


def _is_timm_linear(cls: type) -> bool:
    return cls.__module__ == 'timm.layers.linear'


@torch.no_grad()
def shift_before_pool(norm: Optional[nn.Module]) -> None:
    """Start the bias of a fresh norm in front of a max-pool below zero.

    The largest of nine values is positive for 99.8 % of white noise (1 - 2^-9), and so would be the sign that comes
    next. With this bias it is 57 to 98 %, whether the norm divides by the batch's deviation or, as yet, by 1. A norm
    that has seen data is left as it is: its bias is the learnable shift.
    """
    running = getattr(norm, 'running_var', None)
    if running is None or norm.bias is None or running.device.type == 'meta':
        return
    if not norm.bias.any() and (norm.weight == 1).all() and (running == 1).all():
        norm.bias.fill_(POOLED_BIAS)


def status_of(conv: nn.Module) -> str:
    """A converted layer's status in the report."""
    if conv.binary_products:
        return 'binarized'
    quantizer, what = (conv.input_quantizer, 'inputs') if conv.input_quantizer else (conv.weight_quantizer, 'weights')
    kinds = {1: 'binary', 2: 'ternary'}
    return f'{kinds.get(BITS.get(quantizer), quantizer)} {what}'


def new_beside(make: Callable[..., nn.Module], channels: int, layer: nn.Module, **kwargs: Any) -> nn.Module:
    """A new module beside a host's layer: on its device, in its dtype and mode, and frozen if it is."""
    module = make(channels, device=layer.weight.device, dtype=layer.weight.dtype, **kwargs)
    return module.train(layer.training).requires_grad_(layer.weight.requires_grad)


def channels_of(layer: nn.Module) -> Tuple[int, int]:
    """Channels that a convolution or linear layer takes and gives."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def identity_link(conv: nn.Conv2d) -> ElasticLink:
    return ElasticLink(conv.out_channels, conv.out_channels, gamma=None)
