"""The modules of a deployed network, which stand where units and float convolutions stood."""
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers import (
    HOST_ATTRIBUTES,
    BinaryConv2d,
    BinaryLinear,
    BinaryUnit,
    ElasticLink,
    StandardizedBinaryConv2d,
    input_scale,
    same_pads,
    weight_scale,
)
from . import native
from . import operators as ops
from .calls import Calls, copied
from .epilogue import F64, Fusion, drops, pair, pool_of, threshold_of
from .layout import store
from .spec import SAME, ConvSpec, Window

__all__ = ['DeployedConv', 'DeployedLinear', 'DeployedPool', 'DeployedUnit', 'Engine', 'engine_runs', 'folded_conv']


class Chained(nn.Module):
    """A module that is one operator, or may be."""
    joins = True  # it reads and gives images, so that its layers may stand in a row with others'
    _chain: ops.Chain | None = None
    # For which body, of which tensors and modules, and how many of these.
    _made: tuple[int, list[tuple[dict[str, Any], str, Any]], list[tuple[dict[str, Any], int]]] | None = None
    _calls: Calls | None = None  # of what is inside

    def as_layers(self) -> list[ops.Layer]:
        """What runs here, nothing if that is more than one operator."""
        raise NotImplementedError

    def as_chain(self) -> ops.Chain | None:
        """The operator, None if there is more than one, or if calls of what is inside have to be made."""
        if ops.watched():  # its tensors may be those of a trace
            chain, calls = self._new_chain(direct=False), self._inner_calls()
        else:
            if self._made is None or self._made[0] != native.generation() or any(
                    held.get(name) is not value for held, name, value in self._made[1]) or any(
                    len(held) != n for held, n in self._made[2]):
                self._chain, self._calls = self._new_chain(direct=True), self._inner_calls()
                inside = list(self.modules())
                self._made = native.generation(), [
                    (held, name, value) for m in inside for held in (m._parameters, m._buffers, m._modules)
                    for name, value in held.items()], [(m._modules, len(m._modules)) for m in inside]
            chain, calls = self._chain, self._calls
        return None if calls.any_altered() else chain

    def _inner_calls(self) -> Calls:
        return Calls(m for m in self.modules() if m is not self)

    def _new_chain(self, direct: bool) -> ops.Chain | None:
        layers = self.as_layers()
        return ops.Chain(self.path, layers, direct) if layers else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), '_chain': None, '_made': None, '_calls': None}


class Engine(Chained):
    """What `DeployedUnit` and `DeployedConv` share: tensors, constants, spec, and the attributes that hosts read."""

    def hold(self, name: str, tensor: torch.Tensor | None) -> None:
        """Register real numbers as a parameter, bits as a buffer; no parameter is trained.

        Programs ask a network's first parameter for the device and dtype of its input.
        """
        if tensor is not None and tensor.is_floating_point():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """What was registered here."""
        return (*self._parameters.values(), *self._buffers.values())

    def _set_up(self, source: nn.Module, spec: ConvSpec, fusion: Fusion) -> None:
        self.spec = replace(spec, **fusion.facts)
        self.constants = fusion.constants
        self.hold('table', fusion.table(self.spec.rows))
        self.ints = list(self.spec.ints())
        self.host_attributes(source)

    def host_attributes(self, source: nn.Module | None) -> None:
        """Copy what hosts read off the layer that this module stands for."""
        for name in HOST_ATTRIBUTES:
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))

    @property
    def bias(self) -> None:
        """None: it is part of the table."""
        return None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a file; its tensors count what is written to them, also if it was made in inference mode."""
        super().__setstate__(state)
        with torch.inference_mode(False):
            for held in (self._parameters, self._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor.is_inference():
                        own = tensor.clone()
                        held[name] = nn.Parameter(own, False) if isinstance(tensor, nn.Parameter) else own

    def get_extra_state(self) -> torch.Tensor:
        """The constants, so that a state dict is whole."""
        return torch.tensor(getattr(self, 'constants', []), **F64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Inverse of `get_extra_state`."""
        if hasattr(self, 'constants'):
            self.constants[:] = state.tolist()  # in place: a block may hold the list


class DeployedConv(Engine):
    """A real-valued convolution with what follows it, run by the engine; x (N, C, H, W) float32.

    Args:
        path: Where it stands, for errors.
        conv: The convolution, full or depthwise, zero-padded.
        fusion: Its epilogue.
    """

    def __init__(self, path: str, conv: nn.Conv2d, fusion: Fusion) -> None:
        super().__init__()
        self.path = path
        weight = conv.weight.detach().double() * fusion.rows['scale'].reshape(-1, 1, 1, 1)
        fusion.rows['scale'] = torch.ones_like(fusion.rows['scale'])
        self.hold('weight', store(weight.float(), spec_of(conv), True))
        self._set_up(conv, spec_of(conv), fusion)

    def as_layers(self) -> list[ops.Layer]:
        return [ops.Layer(self.weight, self.table, None, None, self.ints, self.constants, path=self.path)]

    def forward(self, x: torch.Tensor, link: torch.Tensor | None = None) -> torch.Tensor:
        if link is None or link is x:
            return self.as_chain()(x)
        ops.check_input(self.path, x)
        ops.check_place(self.path, x, self.tensors())
        return ops.real_conv2d(x, self.weight, self.table, link, self.ints, self.constants)


class DeployedUnit(Engine):
    """A `BinaryUnit` for inference: signs are packed, differing bits are counted, the rest is folded into constants.

    Args:
        path: Where the unit stands, for errors.
        unit: The latent unit; it is not changed.
        float_dtype: As for `deploy`.
    """

    def __init__(self, path: str, unit: BinaryUnit, float_dtype: torch.dtype) -> None:
        super().__init__()
        self.path = path
        conv = unit.conv
        binary = isinstance(conv, (BinaryConv2d, BinaryLinear)) and conv.is_binary
        if not binary:
            conv = float_layer(conv)
        self.linear = isinstance(conv, nn.Linear)
        self.pre: nn.Module | None = None
        self.conv: nn.Module | None = None
        self.same_pad = bool(getattr(conv, 'same_pad', False))
        self.pad_mode: tuple[str, list[int]] | None = None
        channels = unit.out_features if self.linear else unit.out_channels
        scale, bias = _scale_and_bias(conv, channels) if binary else (None, getattr(conv, 'bias', None))
        fusion = Fusion(channels, scale, bias)
        steps = self._steps(unit)
        has_k = binary and conv.scale_input
        self.loose_k: dict[str, Any] | None = None
        native_conv = binary or engine_runs(conv, float_dtype)
        if conv is None:
            fused = 0
        elif has_k and (self.linear or conv.groups > 1 or conv.padding_mode != 'zeros'):
            fused = 0  # K in torch, and so everything after it
            self.loose_k = dict(kernel_size=conv.kernel_size, stride=conv.stride, dilation=conv.dilation,
                                groups=conv.groups) if not self.linear else {}
            fusion.rows['shift'] = torch.zeros(channels, **F64)
            self.hold('loose_bias', None if bias is None else bias.detach().float().clone())
        elif native_conv or _folds(conv):
            fused = self._fuse(fusion, steps, native_conv)
        else:
            fused = 0
        self.link_fused = any(name == 'link' for name, _ in steps[:fused])
        link = dict(steps).get('link')
        self.link = None if self.link_fused and _pooled_link(link) else copied(link)
        rest = [(name, module) for name, module in steps[fused:] if name not in ('link', 'scale')]
        self.scale = copied(dict(steps[fused:]).get('scale'))
        self.before_sum = nn.ModuleList(copied(m) for name, m in rest if name != 'post')
        self.after_sum = nn.ModuleList(copied(m) for name, m in rest if name == 'post')
        if binary:
            self._set_binary(unit, conv, fusion, has_k)
        else:
            self._set_real(unit, conv, fusion, native_conv, float_dtype)
        self.host_attributes(unit)

    @staticmethod
    def _steps(unit: BinaryUnit) -> list[tuple[str, nn.Module]]:
        """What runs after the convolution, in order, without what does nothing in eval mode."""
        middle = [('norm', unit.norm), ('act', unit.act)]
        if unit.act_first:
            middle.reverse()
        steps = [('scale', unit.scale), *middle, ('tail', unit.tail), ('link', unit.link), ('post', unit.post)]
        return [(name, m) for name, m in steps if m is not None and (name == 'link' or not drops(m))]

    def _fuse(self, fusion: Fusion, steps: Sequence[tuple[str, nn.Module]], native_conv: bool) -> int:
        """How many of the steps the epilogue takes in."""
        takes = {
            'scale': fusion.scale, 'norm': fusion.norm, 'act': fusion.act, 'tail': lambda m: False, 'post': fusion.post,
            'link': lambda m: fusion.link(m) if _pooled_link(m) else fusion.tensor_link()}
        if self.linear:
            takes['norm'] = lambda m: False
        for i, (name, module) in enumerate(steps):
            if not native_conv and name != 'norm' or not takes[name](module):
                return i
            if not native_conv and fusion.stage:
                return i
        return len(steps)

    def _set_binary(self, unit: BinaryUnit, conv: nn.Module, fusion: Fusion, has_k: bool) -> None:
        spec = spec_of(conv)
        if spec.taps > 1024:
            raise ValueError(
                f'{self.path}: found a kernel of {spec.conv.kernel}, expected at most 1024 taps; keep it float')
        if self.same_pad:
            spec = replace(spec, conv=replace(spec.conv, padding=SAME))
        if not self.linear and conv.padding_mode != 'zeros':
            self.pad_mode = (conv.padding_mode, conv.pad_sides)
            spec = spec.padded(0, 0, 0, 0)
        if has_k and self.loose_k is None:
            spec = replace(spec, has_k=True)
        threshold = flip = None
        if unit.pre is not None:
            found = None if has_k or self.linear or self.scale is not None else threshold_of(unit.pre, spec.c_in)
            if found is None:
                self.pre = copied(unit.pre)
            else:
                threshold, flip = found
        weight = conv.latent_weight().detach()
        self.hold('bits', store(weight if weight.dim() == 4 else weight[:, :, None, None], spec, False))
        self.hold('threshold', threshold)
        self.hold('flip', flip)
        self._set_up(conv, spec, fusion)

    def _set_real(
            self,
            unit: BinaryUnit,
            conv: nn.Module | None,
            fusion: Fusion,
            native_conv: bool,
            float_dtype: torch.dtype,
    ) -> None:
        if unit.pre is not None:
            self.pre = copied(unit.pre)
        if native_conv:
            self.conv = DeployedConv(self.path, conv, fusion)
        elif _folds(conv):
            self.conv = folded_conv(conv, fusion, float_dtype)
        elif conv is not None:
            self.conv = conv

    @property
    def weight(self) -> torch.Tensor | None:
        """A float tensor of the unit: hosts ask it for dtype and device."""
        return self.table if hasattr(self, 'table') else None if self.conv is None else self.conv.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chain = self.as_chain()
        if chain is not None:
            return chain(x)
        ops.check_input(self.path, x)
        ops.check_place(self.path, x, self.tensors())
        y = self.link_alone(x) if self._is_link_alone() else self.branch_and_link(x)
        for module in self.after_sum:
            y = module(y)
        return y

    def _is_link_alone(self) -> bool:
        return self.conv is None and not hasattr(self, 'table')

    def as_layers(self) -> list[ops.Layer]:
        modules = (self.link, self.pre, self.scale)
        if len(self.before_sum) or len(self.after_sum) or any(module is not None for module in modules):
            return []
        if isinstance(self.conv, DeployedConv):
            return self.conv.as_layers()
        if not hasattr(self, 'table') or self.linear or self.same_pad or self.pad_mode or self.loose_k is not None:
            return []
        return [ops.Layer(
            self.bits, self.table, self.threshold, self.flip, self.ints, self.constants, path=self.path)]

    def link_alone(self, x: torch.Tensor) -> torch.Tensor:
        """A unit without a convolution."""
        return self.link(x)

    def branch_and_link(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution with its fused epilogue, then the rest of the branch, then the link if it is not fused."""
        link = None
        if self.link is not None:
            link = self.link(x)
        source = x if self.pre is None else self.pre(x)
        fused_link = (x if self.link is None else link) if self.link_fused else None
        if self.conv is not None:
            y = self.conv(source) if fused_link is None else self.conv(source, fused_link)
        elif self.linear:
            y = self._run_linear(source, fused_link)
        else:
            y = self._run_binary(source, fused_link)
        if self.scale is not None:
            y = self.scale(source, y)
        for module in self.before_sum:
            y = module(y)
        return y if link is None or self.link_fused else y + link

    def _run_binary(self, x: torch.Tensor, link: torch.Tensor | None) -> torch.Tensor:
        signed = x
        if self.pad_mode is not None:
            signed = F.pad(x, self.pad_mode[1], self.pad_mode[0])
        y = ops.binary_conv2d(
            signed, self.bits, self.table, self.threshold, self.flip, link, self.ints, self.constants)
        if self.loose_k is not None:
            if self.same_pad:
                pads = same_pads(x, self.spec.conv.kernel, self.spec.conv.stride, self.spec.conv.dilation)
            else:
                (top, left), (bottom, right) = self.spec.conv.padding, self.spec.pad_end
                pads = [left, right, top, bottom] if self.pad_mode is None else self.pad_mode[1]
            scale = input_scale(F.pad(x, pads), padding=(0, 0), **self.loose_k)
            y = self._scaled(y, scale.repeat_interleave(y.shape[1] // scale.shape[1], 1))
        return y

    def _scaled(self, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = y * scale
        if self.loose_bias is not None:
            y = y + (self.loose_bias if self.linear else self.loose_bias.reshape(-1, 1, 1))
        return y

    def _run_linear(self, x: torch.Tensor, link: torch.Tensor | None) -> torch.Tensor:
        """Rows of features are pixels of an image that is one pixel wide."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f'{self.path}: found shape {tuple(x.shape)}, expected (..., {self.in_features})')
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self.out_features))
        y = ops.binary_conv2d(
            _as_image(x), self.bits, self.table, self.threshold, self.flip, None if link is None else _as_image(link),
            self.ints, self.constants)
        y = y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)
        return y if self.loose_k is None else self._scaled(y, x.abs().mean(-1, keepdim=True))

    def extra_repr(self) -> str:
        if not hasattr(self, 'table'):
            return ''
        facts = [name for name, on in (
            ('K', self.spec.has_k or self.loose_k is not None), (f'act={self.spec.act}', self.spec.act != 'none'),
            (f'link={self.spec.link}', self.spec.link != 'none'), ('threshold', self.threshold is not None),
            ('post', self.spec.has_post)) if on]
        return (
            f'{self.spec.c_in}, {self.spec.c_out}, kernel_size={self.spec.conv.kernel}, '
            f'stride={self.spec.conv.stride}, groups={self.spec.groups}, fused={"+".join(facts) or None}')


def _as_image(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _folds(conv: nn.Module | None) -> bool:
    """A factor may be taken into its weight."""
    return isinstance(conv, nn.Conv2d) and not isinstance(conv, BinaryConv2d)


def _pooled_link(link: nn.Module) -> bool:
    return isinstance(link, ElasticLink) and pool_of(link.pool) is not None


def _scale_and_bias(conv: nn.Module, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """alpha, with whatever else multiplies a binary convolution's output, and its bias."""
    scale = torch.ones(channels, **F64)
    if isinstance(conv, StandardizedBinaryConv2d):
        scale = scale * conv.scale
        if conv.gain is not None:
            scale = scale * conv.gain.detach().double().flatten()
    elif conv.scale_weight:
        scale = weight_scale(conv.weight).double()
    return scale, conv.bias


def spec_of(conv: nn.Module) -> ConvSpec:
    """Geometry of a convolution or linear layer."""
    if isinstance(conv, nn.Linear):
        return ConvSpec(conv.in_features, conv.out_features)
    left, right, top, bottom = (int(p) for p in conv._reversed_padding_repeated_twice)
    window = Window(pair(conv.kernel_size), pair(conv.stride), (top, left), pair(conv.dilation))
    return ConvSpec(
        conv.in_channels, conv.out_channels, window, (bottom, right), conv.groups, getattr(conv, 'pad_value', 0))


class DeployedPool(Chained):
    """A pool of the host, run by the engine, whose threads it shares; x (N, C, H, W) float32.

    Args:
        path: Where it stands, for errors.
        pool: `torch.nn.MaxPool2d`, `AvgPool2d` or `AdaptiveAvgPool2d(1)`; it stays for inputs that the engine has no
            kernel for, such as means of more than 64 pixels.
    """
    _means: tuple[Window, ops.Chain] | None = None  # of all pixels of images of one size

    def __init__(self, path: str, pool: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.pool = copied(pool)
        facts = pool_of(pool) if type(pool) is not nn.AdaptiveAvgPool2d else None
        self.mode = 'avg' if facts is None else facts['link_pool']
        self.window: Window | None = None if facts is None else facts['pool']

    @staticmethod
    def takes(pool: nn.Module) -> bool:
        """The engine runs this pool."""
        if type(pool) is nn.AdaptiveAvgPool2d:
            return pool.output_size in (1, (1, 1))
        return isinstance(pool, (nn.MaxPool2d, nn.AvgPool2d)) and bool(pool_of(pool))

    def as_layers(self) -> list[ops.Layer]:
        window = self.window
        if window is None:
            return []
        if not self.pool.ceil_mode:
            return [ops.pool_layer(window, self.mode, window.padding)]
        if window.padding != (0, 0) or window.dilation != (1, 1) or any(
                k < s for k, s in zip(window.kernel, window.stride)):
            return []  # how much is missing after the last row depends on the image
        return [ops.pool_layer(window, self.mode, (window.stride[0] - 1, window.stride[1] - 1))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != 'cpu':
            return self.pool(x)
        if self.window is None:
            return self._mean(x)
        chain = self.as_chain()
        return self.pool(x) if chain is None else chain(x)

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        """Of all pixels. A trace must not remember how many there are."""
        if self._inner_calls().any_altered():
            return self.pool(x)
        if ops.watched():
            return ops.mean(x)
        size = Window(tuple(x.shape[2:]))
        if self._means is None or self._means[0] != size:
            if not 1 <= x.shape[2] * x.shape[3] <= ops.MOST_POOLED:
                return self.pool(x)
            self._means = size, ops.Chain(self.path, [ops.pool_layer(size, self.mode, (0, 0))], direct=True)
        return self._means[1](x)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), '_means': None}


class DeployedLinear(Engine):
    """A real-valued linear layer, run by the engine as a 1x1 convolution; x (..., in_features) float32.

    Args:
        path: Where it stands, for errors.
        linear: The layer.
    """
    joins = False

    def __init__(self, path: str, linear: nn.Linear) -> None:
        super().__init__()
        self.path = path
        spec = spec_of(linear)
        self.hold('weight', store(linear.weight[:, :, None, None].float(), spec, True))
        self._set_up(linear, spec, Fusion(linear.out_features, None, linear.bias))

    def as_layers(self) -> list[ops.Layer]:
        return [ops.Layer(self.weight, self.table, None, None, self.ints, self.constants, path=self.path)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops.check_input(self.path, x)
        if x.numel() == 0 or x.shape[-1] != self.in_features:
            return F.linear(x, x.new_zeros(self.out_features, self.in_features))  # torch's own shape, or its error
        y = self.as_chain()(_as_image(x))
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


# ---------------------------------------------------------------------------------------------------------------------
# Float layers

def engine_runs(conv: nn.Module | None, float_dtype: torch.dtype) -> bool:
    """The engine's own real convolution takes this layer."""
    return (
        type(conv) is nn.Conv2d and conv.padding_mode == 'zeros' and float_dtype == torch.float32
        and native.library() is not None and (conv.groups == 1 or conv.groups == conv.in_channels == conv.out_channels))


class CastConv(nn.Module):
    """A float convolution in another dtype, float32 outside."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = conv.to(dtype)
        for name in HOST_ATTRIBUTES:
            if hasattr(conv, name):
                setattr(self, name, getattr(conv, name))

    @property
    def weight(self) -> torch.Tensor:
        """The convolution's weight."""
        return self.conv.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The convolution's bias."""
        return self.conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.to(self.conv.weight.dtype)).to(x.dtype)


def float_layer(layer: nn.Module | None) -> nn.Module | None:
    """A real layer, to be changed; one with a quantized weight becomes a plain one that holds the values in use."""
    if not isinstance(layer, (BinaryConv2d, BinaryLinear)) or layer.weight_quantizer is None:
        return copied(layer)
    if getattr(layer, 'same_pad', False) or getattr(layer, 'pad_value', 0):
        return copied(layer)  # no plain layer pads like this
    plain: nn.Module
    if isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device='meta')
    else:
        padding = layer.padding
        plain = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, padding, layer.dilation,
            layer.groups, layer.bias is not None, layer.padding_mode, device='meta')
    with torch.no_grad():
        plain.weight = nn.Parameter(layer.quantized_weight().clone(), requires_grad=False)
        bias = layer.bias
        plain.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain.eval()


def folded_conv(conv: nn.Conv2d, fusion: Fusion, float_dtype: torch.dtype) -> nn.Module:
    """A float convolution of torch with the affine part of an epilogue in its weight and bias."""
    shape = [-1] + [1] * (conv.weight.dim() - 1)
    with torch.no_grad():
        weight = (conv.weight.double() * fusion.rows['scale'].reshape(shape)).to(conv.weight.dtype)
        bias = fusion.rows['shift'].to(conv.weight.dtype)
        conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        if conv.bias is not None or bool((bias != 0).any()):
            conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv if float_dtype == torch.float32 else CastConv(conv, float_dtype)
