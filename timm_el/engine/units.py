"""Deployed units: what stands where a `BinaryUnit` stood, one operator if its parts allow it."""
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers import (
    BinaryConv2d,
    BinaryLinear,
    BinaryUnit,
    StandardizedBinaryConv2d,
    weight_scale,
)
from ..layers.output_scale import Gate
from . import operators as ops
from .calls import copied
from .epilogue import F64, Epilogue, Slot, drops, fold, folds_link, threshold_of
from .float_layers import deployed_part, engine_runs, float_layer, folded_conv
from .layout import store
from .modules import ConvModule, DeployedConv, DeployedLinear, Engine, as_image, from_image, spec_of
from .spec import SAME
from .steps import Kind, Step, Unary

__all__ = ['DeployedUnit', 'FusedUnit', 'LinkUnit', 'SplitUnit', 'deploy_unit']

MOST_TAPS = 1024


class DeployedUnit(Engine):
    """Base of what stands where a `BinaryUnit` stood: `FusedUnit`, `SplitUnit` and `LinkUnit`."""


class FusedUnit(DeployedUnit, ConvModule):
    """A unit that is one operator: signs are packed, differing bits counted, the rest is in the epilogue.

    Shapes: x (N, C_in, H, W) -> (N, C_out, H', W'); around a linear layer (..., C_in) -> (..., C_out).

    Args:
        path: Where the unit stands, for errors.
        conv: The latent binary convolution or linear layer.
        epilogue: What follows it.
        has_k: K scales the output (paper, eq. 3).
        pads: The convolution pads by itself; False if its input comes padded.
        threshold, flip: Where the sign of each input channel changes, as `threshold_of` finds.
    """

    def __init__(
            self,
            path: str,
            conv: nn.Module,
            epilogue: Epilogue,
            has_k: bool = False,
            pads: bool = True,
            threshold: torch.Tensor | None = None,
            flip: torch.Tensor | None = None,
    ) -> None:
        spec = spec_of(conv)
        if spec.taps > MOST_TAPS:
            raise ValueError(
                f'{path}: found a kernel of {spec.conv.kernel}, expected at most {MOST_TAPS} taps; keep it float')
        if getattr(conv, 'same_pad', False):
            spec = replace(spec, conv=replace(spec.conv, padding=SAME))
        if not pads:
            spec = spec.padded(0, 0, 0, 0)
        weight = conv.latent_weight().detach()
        bits = store(weight if weight.dim() == 4 else weight[:, :, None, None], spec, torch.uint8)
        super().__init__(
            path, conv, replace(spec, has_k=has_k), epilogue, bits=bits, threshold=threshold, flip=flip)
        self.is_linear = isinstance(conv, nn.Linear)

    @property
    def weight(self) -> torch.Tensor:
        """Return a float tensor of the unit, whose dtype and device hosts ask for."""
        return self.table

    def forward(self, x: torch.Tensor, link: torch.Tensor | None = None) -> torch.Tensor:
        if not self.is_linear:
            return super().forward(x, link)
        ops.check_input(self.path, x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f'{self.path}: found shape {tuple(x.shape)}, expected (..., {self.in_features})')
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self.out_features))
        return from_image(super().forward(as_image(x), None if link is None else as_image(link)), x)


class LinkUnit(DeployedUnit):
    """A unit without a convolution: its link, and what comes after it.

    Args:
        path: Where the unit stands, for errors.
        unit: The latent unit; it is not changed.
        float_dtype: Dtype in which float convolutions compute.
    """

    def __init__(self, path: str, unit: BinaryUnit, float_dtype: torch.dtype) -> None:
        super().__init__()
        self.path = path
        self.link = deployed_part(f'{path}.link', unit.link, float_dtype)
        self.after_sum = _parts(path, [('post', unit.post)], float_dtype)
        self.host_attributes(unit)

    @property
    def weight(self) -> None:
        """None: there is no convolution."""
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops.check_input(self.path, x)
        y = self.link(x)
        for module in self.after_sum:
            y = module(y)
        return y


class SplitUnit(DeployedUnit):
    """A unit of several operators, in order: post( rest( scales( z, core(z) ) ) + link(x) ), z = pre(x).

    Args:
        path: Where the unit stands, for errors.
        unit: The latent unit; it is not changed.
        core: The convolution with what its epilogue takes in.
        core_links: The epilogue takes in the link's output (or x itself, where there is no link left to run).
        rest: What runs after it, in order: (name in the unit, module).
        scales: Modules of (z, y) that give y times a factor.
        pre: Applied to x first.
        float_dtype: Dtype in which float convolutions compute.
    """

    def __init__(
            self,
            path: str,
            unit: BinaryUnit,
            core: nn.Module,
            core_links: bool,
            rest: Sequence[tuple[str, nn.Module]],
            scales: Sequence[nn.Module],
            pre: nn.Module | None,
            float_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.path, self.core_links = path, core_links
        self.pre = deployed_part(f'{path}.pre', pre, float_dtype)
        self.core = core
        self.scales = nn.ModuleList(scales)
        self.before_sum = _parts(path, [(name, m) for name, m in rest if name not in ('link', 'post')], float_dtype)
        has_link = unit.link is not None and not (core_links and folds_link(unit.link))
        self.link = deployed_part(f'{path}.link', unit.link, float_dtype) if has_link else None
        self.after_sum = _parts(path, [(name, m) for name, m in rest if name == 'post'], float_dtype)
        self.host_attributes(unit)

    @property
    def weight(self) -> torch.Tensor | None:
        """Return a float tensor of the unit, whose dtype and device hosts ask for."""
        return next(iter(self.core.parameters()), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops.check_input(self.path, x)
        ops.check_place(self.path, x, (*self.parameters(), *self.buffers()))
        link = None if self.link is None else self.link(x)
        z = x if self.pre is None else self.pre(x)
        y = self.core(z, x if link is None else link) if self.core_links else self.core(z)
        for scale in self.scales:
            y = scale(z, y)
        for module in self.before_sum:
            y = module(y)
        if link is not None and not self.core_links:
            y = y + link
        for module in self.after_sum:
            y = module(y)
        return y


def deploy_unit(path: str, unit: BinaryUnit, float_dtype: torch.dtype) -> DeployedUnit:
    """Return the inference module of a unit.

    Args:
        path: Where the unit stands, for errors.
        unit: The latent unit; it is not changed.
        float_dtype: Dtype in which a float convolution computes.
    """
    conv = unit.conv
    if conv is None:
        return LinkUnit(path, unit, float_dtype)
    binary = isinstance(conv, (BinaryConv2d, BinaryLinear)) and conv.is_binary
    linear = isinstance(conv, nn.Linear)
    steps = _steps_after(unit, linear)
    channels = unit.out_features if linear else unit.out_channels
    if not binary:
        return _deploy_real(path, unit, float_layer(conv), steps, channels, float_dtype)
    scale, bias = _scale_and_bias(conv, channels)
    scale_apart = conv.scale_input and (linear or conv.groups > 1 or conv.padding_mode != 'zeros')
    epilogue, folded = fold(channels, scale, bias, [] if scale_apart else steps)
    if scale_apart:
        epilogue = epilogue.without_shift()
    scales = [InputScale(path, conv, bias)] if scale_apart else []
    scales += [_scale_of(f'{path}.scale', m) for name, m in steps[folded:] if name == 'scale']
    pre, threshold = unit.pre, None
    if pre is not None and not (conv.scale_input or linear or scales):
        threshold = threshold_of(pre, conv.in_channels)
    if threshold is not None:
        pre = None
    pad_mode = None if linear or conv.padding_mode == 'zeros' else conv.padding_mode
    core = FusedUnit(
        path, conv, epilogue, conv.scale_input and not scale_apart, pad_mode is None, *(threshold or (None, None)))
    return _assembled(path, unit, core, steps[folded:], scales, pre, pad_mode, float_dtype)


def _deploy_real(
        path: str,
        unit: BinaryUnit,
        conv: nn.Module,
        steps: list[tuple[str, nn.Module]],
        channels: int,
        float_dtype: torch.dtype,
) -> DeployedUnit:
    own = engine_runs(conv, float_dtype)
    folds = own or isinstance(conv, nn.Conv2d) and not isinstance(conv, BinaryConv2d)
    if not folds:
        epilogue, folded = None, 0
    else:
        slots = tuple(Slot) if own else (Slot.AFFINE,)
        norms = list(itertools.takewhile(lambda step: step[0] == 'norm', steps))
        epilogue, folded = fold(channels, None, conv.bias, steps if own else norms, slots)
    if own:
        core: nn.Module = DeployedConv(path, conv, epilogue, float_dtype)
    else:
        core = folded_conv(conv, epilogue, float_dtype) if folds else conv
    scales = [_scale_of(f'{path}.scale', m) for name, m in steps[folded:] if name == 'scale']
    return _assembled(path, unit, core, steps[folded:], scales, unit.pre, None, float_dtype)


def _assembled(
        path: str,
        unit: BinaryUnit,
        core: nn.Module,
        rest: list[tuple[str, nn.Module]],
        scales: list[nn.Module],
        pre: nn.Module | None,
        pad_mode: str | None,
        float_dtype: torch.dtype,
) -> DeployedUnit:
    core_links = isinstance(core, ConvModule) and core.spec.link != 'none'
    rest = [(name, m) for name, m in rest if name != 'scale']
    links_itself = unit.link is None or folds_link(unit.link)
    if isinstance(core, FusedUnit) and links_itself and pad_mode is None and pre is None and not (scales or rest):
        core.host_attributes(unit)
        return core
    if pad_mode is not None:
        core = Padded(core, pad_mode, unit.conv.pad_sides)
    return SplitUnit(path, unit, core, core_links, rest, scales, pre, float_dtype)


def _steps_after(unit: BinaryUnit, linear: bool) -> list[tuple[str, nn.Module]]:
    """Return what runs after the convolution, in order, without what does nothing in eval mode."""
    middle = [('features norm' if linear else 'norm', unit.norm), ('act', unit.act)]
    if unit.act_first:
        middle.reverse()
    steps = [('scale', unit.scale), *middle, ('tail', unit.tail), ('link', unit.link), ('post', unit.post)]
    return [(name, m) for name, m in steps if m is not None and (name == 'link' or not drops(m))]


def _scale_and_bias(conv: nn.Module, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return alpha, with whatever else multiplies a binary convolution's output, and its bias."""
    scale = torch.ones(channels, **F64)
    if isinstance(conv, StandardizedBinaryConv2d):
        scale = scale * conv.scale
        if conv.gain is not None:
            scale = scale * conv.gain.detach().double().flatten()
    elif conv.scale_weight:
        scale = weight_scale(conv.weight).double()
    return scale, conv.bias


def _parts(
        path: str, named: Sequence[tuple[str, nn.Module | None]], float_dtype: torch.dtype) -> nn.ModuleList:
    return nn.ModuleList(
        deployed_part(f'{path}.{name}', m, float_dtype) for name, m in named if m is not None and not drops(m))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a `SplitUnit`

class Padded(nn.Module):
    """A convolution whose input is padded in one of torch's modes other than zeros.

    Args:
        core: The convolution, which pads nothing.
        mode: 'reflect', 'replicate' or 'circular'.
        sides: Pixels at left, right, top and bottom.
    """

    def __init__(self, core: nn.Module, mode: str, sides: Sequence[int]) -> None:
        super().__init__()
        self.core, self.mode, self.sides = core, mode, tuple(sides)

    def forward(self, x: torch.Tensor, link: torch.Tensor | None = None) -> torch.Tensor:
        padded = F.pad(x, self.sides, self.mode)
        return self.core(padded) if link is None else self.core(padded, link)


class InputScale(Engine):
    """K as an operator of its own (paper, eq. 3): y * K(z) + bias, for groups, padding modes and linear layers.

    Args:
        path: Where the unit stands, for errors.
        conv: The latent convolution or linear layer.
        bias: Its bias, which is added after the scale.
    """

    def __init__(self, path: str, conv: nn.Module, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.path, self.is_linear = path, isinstance(conv, nn.Linear)
        spec = spec_of(conv)
        if getattr(conv, 'same_pad', False):
            spec = replace(spec, conv=replace(spec.conv, padding=SAME))
        self.ints = (*spec.conv.ints(), *spec.pad_end, spec.groups)
        self.hold('offset', None if bias is None else bias.detach().float().clone())

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        image = as_image(z) if self.is_linear else z
        k = ops.apply(Step(Kind.INPUT_SCALE, (0,), (), self.ints, (), self.path), image)
        if self.is_linear:
            y = y * from_image(k, z)
            return y if self.offset is None else y + self.offset
        y = y * k.repeat_interleave(y.shape[1] // k.shape[1], 1)
        return y if self.offset is None else y + self.offset.reshape(-1, 1, 1)


class DeployedGate(Engine):
    """Real-to-Binary's gate (`layers.Gate`) by the engine's operators: y * sigmoid(F2 relu(F1 mean(z))).

    Args:
        path: Where it stands, for errors.
        gate: The latent gate.
    """

    def __init__(self, path: str, gate: Gate) -> None:
        super().__init__()
        self.path = path
        self.fc1, self.fc2 = (
            DeployedLinear(f'{path}.{name}', fc, fold(fc.out_features, None, None, [])[0])
            for name, fc in (('fc1', gate.fc1), ('fc2', gate.fc2)))

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mean = ops.apply(Step(Kind.MEAN, (0,), path=self.path), z)
        gate = ops.unary(Unary.SIGMOID, self.fc2(F.relu(self.fc1(mean.flatten(1)))))
        return y * gate[..., None, None]


def _scale_of(path: str, scale: nn.Module) -> nn.Module:
    return DeployedGate(path, scale) if type(scale) is Gate else copied(scale)
