"""Units built from decisions: binary forms of the host's layers, norms for another place, additions of the recipe."""
import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame

from ..dry_run import LayerRun
from ..kinds import fused_act
from ..layers import (
    BinaryConv2d,
    BinaryLinear,
    BinaryUnit,
    ElasticLink,
    RPReLU,
    Shift,
    StandardizedBinaryConv2d,
    expected_statistics,
)
from ..layers.multi_base import MultiBaseConv2d
from ..layers.output_scale import Gate, LearnedScale
from ..layers.ternary import TrainedTernaryConv2d
from ..recipes import Recipe
from .sites import Act, Conv, Convert, Place, Pre, Reason, Site, Why, channels_of

STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
POOLED_BIAS = -0.4


def build_unit(decision: Convert, recipe: Recipe, run: LayerRun | None, image: str) -> BinaryUnit:
    """Return the unit that takes the place of a site; the host's modules in it are the host's own.

    Args:
        decision: Decision about the site.
        recipe: Recipe of the conversion.
        run: Run of the host's layer, None if it is not known.
        image: Size of the image that it ran on, for errors.

    Raises:
        ValueError: The recipe learns a factor for each row and column, and the size of the output is not known.
    """
    site, host = decision.site, decision.site.conv.module
    conv = build_conv(decision, recipe)
    signed = getattr(conv, 'input_quantizer', None) is not None
    norm, act = norm_and_act(decision, recipe, conv)
    if isinstance(decision.link, ElasticLink):
        decision.link.train(host.training).requires_grad_(host.weight.requires_grad)
    tail = build_tail(site) if takes_tail(decision) else None
    pre = build_pre(decision.pre, host) if decision.pre else None
    if drops_norm(decision, recipe):
        norm = None
    scale = build_scale(site, recipe, run, image) if signed and recipe.scale_output else None
    post = None
    if recipe.act == 'rprelu' and conv is not None:
        post = new_beside(RPReLU, host.out_channels, host)
    act_first = decision.act is Act.IN_BRANCH and act is not None
    unit = BinaryUnit(conv, norm, act, decision.link, pre, post, tail, act_first, scale)
    if conv is None:
        unit.take_host_attributes(host)  # the link need not have them
    unit.training = host.training
    return unit


def build_conv(decision: Convert, recipe: Recipe) -> nn.Module | None:
    """Return the layer inside a unit: binary, the host's own, or None."""
    host = decision.site.conv.module
    if decision.conv is not Conv.BINARY:
        return host if decision.conv is Conv.REAL else None
    same = {'same_pad': True} if pads_same(host) else {}
    return binary_form(host, recipe)(
        host, input_quantizer=recipe.input_quantizer, weight_quantizer=recipe.weight_quantizer,
        scale_weight=recipe.scale_weight, weight_scale_grad=recipe.scale_weight_grad,
        scale_input=decision.site.role in recipe.scale_input, **same)


def norm_and_act(
        decision: Convert, recipe: Recipe, conv: nn.Module | None,
) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the norm and the activation of a unit's branch."""
    site = decision.site
    norm = site.norm.module if site.norm else None
    if decision.conv is Conv.OMITTED:
        return None, None
    if decision.act in (None, Act.KEPT):
        return norm, None
    plain = split_norm_act(norm)
    if recipe.act == 'prelu':
        return plain, new_beside(nn.PReLU, channels_of(site.conv.module)[1], site.conv.module)
    if decision.act is not Act.IN_BRANCH:
        return plain, None
    act = act_for_branch(site)
    return norm_after_act(plain, act, conv), act


def drops_norm(decision: Convert, recipe: Recipe) -> bool:
    """Return whether the host's norm goes, because the recipe normalizes in front of the sign."""
    signed = decision.conv is Conv.BINARY and recipe.input_quantizer is not None
    return decision.site.norm is not None and signed and recipe.pre == 'norm'


def takes_tail(decision: Convert) -> bool:
    """Return whether the host's modules behind the norm move into the branch."""
    return decision.link is not None and decision.conv is not Conv.OMITTED


def act_for_branch(site: Site) -> nn.Module:
    """Return the activation of a site for a place of its own; hosts share one between several."""
    inside = fused_act(site.norm.module) if site.norm else None
    return inside if inside is not None else copy.deepcopy(site.act.module)


def build_tail(site: Site) -> nn.Module | None:
    """Return the host's modules behind the norm as one module, or None."""
    places = present(site.tail)
    if len(places) < 2:
        return places[0].module if places else None
    tail = nn.Sequential(OrderedDict((name_of_place(place), place.module) for place in places))
    tail.training = places[0].module.training
    return tail


def present(places: tuple[Place, ...]) -> list[Place]:
    """Return the places with a module that does something."""
    return [place for place in places if place.module is not None and not isinstance(place.module, nn.Identity)]


def name_of_place(place: Place) -> str:
    """Return the last part of a path."""
    return place.path.rpartition('.')[2]


def build_pre(pre: Pre, host: nn.Module) -> nn.Module:
    """Return the module in front of a sign."""
    if pre is Pre.CENTRE:
        return new_norm(host, not host.weight.requires_grad)
    return new_beside(nn.BatchNorm2d if pre is Pre.NORM else Shift, host.in_channels, host)


def build_scale(site: Site, recipe: Recipe, run: LayerRun | None, image: str) -> nn.Module:
    """Return the learned factor of a convolution's output; raise ValueError if it needs a size that is not known."""
    conv = site.conv.module
    if recipe.scale_output == 'gate':
        return new_beside(Gate, conv.in_channels, conv, out_channels=conv.out_channels)
    if recipe.scale_output == 'channel':
        return new_beside(LearnedScale, conv.out_channels, conv)
    if run is None:
        raise ValueError(
            f'{site.path}: recipe {recipe.name!r} learns a factor for each row and column of its output, but '
            f'it does not run on the image {image}; pass example_input, keep={site.path!r}, or '
            f"scale_output='channel' (recipe 'xnor_pp_channel'), which needs no size")
    return new_beside(LearnedScale, conv.out_channels, conv, size=run.output[-2:])


# ---------------------------------------------------------------------------------------------------------------------
# Single modules


def split_norm_act(norm: nn.Module | None) -> nn.Module | None:
    """Return a fused norm-and-activation of timm as a norm alone that shares its tensors; other norms as they are."""
    if not isinstance(getattr(norm, 'act', None), nn.Module):
        return norm
    twin = _twin(norm)
    twin.act = nn.Identity().train(norm.training)
    return twin


def _twin(module: nn.Module) -> nn.Module:
    """Return a module of the same class that shares the tensors and children of another, but not its slots for them."""
    twin = copy.copy(module)
    for slots in ('_parameters', '_buffers', '_modules'):
        twin.__dict__[slots] = dict(module.__dict__[slots])
    return twin


@torch.no_grad()
def norm_after_act(norm: nn.Module | None, act: nn.Module, conv: nn.Module) -> nn.Module | None:
    """Return the norm for conv -> act -> norm, where the host had conv -> norm -> act.

    The host's running statistics describe another tensor, and used here in eval mode they leave every sign at +1. The
    twin starts from the expectation for inputs of unit variance: act(z), z ~ N(0, sum of squared weights).
    """
    if not has_statistics(norm):
        return norm
    weight = conv.quantized_weight() if isinstance(conv, BinaryConv2d) else conv.weight
    mean, var = expected_statistics(weight, act)
    twin = _twin(norm)
    twin.running_mean = mean.to(norm.running_mean.dtype)
    twin.running_var = var.to(norm.running_var.dtype)
    return twin


def has_statistics(norm: nn.Module | None) -> bool:
    """Return whether a norm has running statistics."""
    return getattr(norm, 'running_mean', None) is not None and getattr(norm, 'running_var', None) is not None


def pads_same(layer: nn.Module) -> bool:
    """Return whether a layer pads as TensorFlow does, by the size of its input."""
    return isinstance(layer, Conv2dSame) or bool(getattr(layer, 'same_pad', False))


def binary_form(layer: nn.Module, recipe: Recipe) -> Callable[..., nn.Module] | Why:
    """Return the maker of the binary form of a layer, or why there is none."""
    cls = type(layer)
    if issubclass(cls, nn.Linear):
        known = cls.forward is nn.Linear.forward or cls.__module__ == 'timm.layers.linear'
        form = BinaryLinear.from_linear
    else:
        plain = cls.forward is nn.Conv2d.forward and cls._conv_forward is nn.Conv2d._conv_forward
        known = plain or cls is Conv2dSame or cls in STANDARDIZED
        form = StandardizedBinaryConv2d.from_conv if cls in STANDARDIZED else BinaryConv2d.from_conv
    if not known:
        return Reason.OWN_FORWARD.why(cls.__name__)
    own = recipe.bases or recipe.weight_quantizer == 'ttq'  # convolutions of their own
    around = recipe.pre or recipe.scale_output or recipe.act in ('prelu', 'rprelu')  # on axis 1
    if own and form != BinaryConv2d.from_conv or around and issubclass(cls, nn.Linear):
        return Reason.NO_FORM.why(recipe.name, cls.__name__)
    if recipe.bases:
        return partial(MultiBaseConv2d.from_conv, bases=recipe.bases)
    return TrainedTernaryConv2d.from_conv if recipe.weight_quantizer == 'ttq' else form


@torch.no_grad()
def shift_before_pool(norm: nn.Module | None) -> None:
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


def new_norm(layer: nn.Module, frozen: bool = False) -> nn.Module:
    """Return a norm for the input of a layer: over all of an image, or over the channels of a pixel for a linear layer.

    It centres whatever comes, in training and in eval mode alike; its bias is the learnable shift of the sign.
    """
    dd = {'device': layer.weight.device, 'dtype': layer.weight.dtype}
    linear = isinstance(layer, nn.Linear)
    norm = nn.LayerNorm(layer.in_features, **dd) if linear else nn.GroupNorm(1, layer.in_channels, **dd)
    return norm.train(layer.training).requires_grad_(not frozen)


def new_beside(make: Callable[..., nn.Module], channels: int, layer: nn.Module, **kwargs: Any) -> nn.Module:
    """Return a new module beside a host's layer: on its device, in its dtype and mode, and frozen if it is."""
    module = make(channels, device=layer.weight.device, dtype=layer.weight.dtype, **kwargs)
    return module.train(layer.training).requires_grad_(layer.weight.requires_grad)
