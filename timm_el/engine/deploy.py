"""deploy(): a latent network as an inference module whose binary convolutions run as xor and popcount.

The host's class and forward stay; modules are exchanged in a copy. A `BinaryUnit` becomes a `DeployedUnit`: one
operator for the convolution and as much of what follows it as the operator can do, in float64-folded constants, then
whatever is left, as the modules that it was. A float convolution takes its norm in, and its activation where the
engine runs it.
"""
import copy
import inspect
import math
from dataclasses import replace
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers import (
    BinaryConv2d,
    BinaryLinear,
    BinaryUnit,
    ElasticLink,
    RPReLU,
    RSign,
    Shift,
    StandardizedBinaryConv2d,
    input_scale,
    same_pads,
    weight_scale,
)
from . import native, ops
from .follow import followers
from .layout import store
from .spec import ROWS, ConvSpec, Window, table_stride

__all__ = ['deploy', 'DeployedBlock', 'DeployedConv', 'DeployedUnit']

HOST_ATTRIBUTES = (
    'in_channels', 'out_channels', 'in_features', 'out_features', 'kernel_size', 'stride', 'padding', 'dilation',
    'groups', 'padding_mode')
NORMS = (nn.modules.batchnorm._BatchNorm,)
ACTS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.Identity)
INF = math.inf


# ---------------------------------------------------------------------------------------------------------------------
# What can be folded

class _Affine(NamedTuple):
    """y = x * scale + shift per channel, float64."""
    scale: torch.Tensor
    shift: torch.Tensor


def _affine_of(norm: Optional[nn.Module], channels: int) -> Optional[_Affine]:
    """A norm as an affine map in float64, None if it depends on its input."""
    one, zero = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if norm is None or isinstance(norm, nn.Identity):
        return _Affine(one, zero)
    if not isinstance(norm, NORMS) or norm.running_mean is None or norm.training:
        return None
    if any(not isinstance(getattr(norm, name, None), (nn.Identity, type(None))) for name in ('act', 'drop')):
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return _Affine(scale, shift)


def _act_of(act: Optional[nn.Module]) -> Optional[Tuple[str, Any, Any]]:
    """An activation as ('none' | 'clip' | 'prelu', lo or slope, hi), None if it is neither."""
    if act is None or isinstance(act, (nn.Identity, nn.Dropout)):
        return 'none', -INF, INF
    if type(act) is nn.ReLU:
        return 'clip', 0., INF
    if isinstance(act, nn.Hardtanh):
        return 'clip', act.min_val, act.max_val
    if type(act) is nn.LeakyReLU:
        return 'prelu', torch.tensor([act.negative_slope]), None
    if isinstance(act, nn.PReLU):
        return 'prelu', act.weight.detach(), None
    return None


def _drops(module: nn.Module) -> bool:
    """Does nothing in eval mode."""
    return isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d)) or type(module).__name__ == 'DropPath'


class _Fusion:
    """The epilogue of one convolution as it grows, step by step, until a step does not fit."""

    def __init__(self, channels: int, scale: torch.Tensor, bias: Optional[torch.Tensor]) -> None:
        self.channels = channels
        one, zero = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
        self.rows = {name: one if 'scale' in name else zero for name in ROWS}
        self.rows['scale'] = scale.double()
        if bias is not None:
            self.rows['shift'] = bias.detach().double()
        self.facts: Dict[str, Any] = {}
        self.constants = [-INF, INF, 1.]
        self.stage = 0  # 0: affine, 1: after the activation, 2: after the second affine, 3: after the link, 4: closed

    def norm(self, norm: Optional[nn.Module]) -> bool:
        """Take a norm in; False if it does not fit."""
        affine = _affine_of(norm, self.channels)
        if affine is None or self.stage > 2:
            return False
        scale, shift = ('scale', 'shift') if self.stage == 0 else ('scale2', 'shift2')
        self.rows[scale] = self.rows[scale] * affine.scale
        self.rows[shift] = self.rows[shift] * affine.scale + affine.shift
        if self.stage and norm is not None and not isinstance(norm, nn.Identity):
            self.facts['has_affine'], self.stage = True, 2
        return True

    def act(self, act: Optional[nn.Module]) -> bool:
        """Take an activation in."""
        known = _act_of(act)
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
        pool = _pool_of(link.pool)
        if self.stage > 2 or pool is None:
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

    def post(self, post: Optional[nn.Module]) -> bool:
        """Take in what comes after the sum."""
        if post is None or _drops(post):
            return True
        if self.stage > 3:
            return False
        if isinstance(post, RPReLU):
            rows = (post.shift_in, post.slope, post.shift_out)
        elif isinstance(post, nn.PReLU):
            zero = torch.zeros(self.channels)
            rows = (zero, post.weight.expand(self.channels), zero)
        else:
            return False
        self.stage, self.facts['has_post'] = 4, True
        for name, row in zip(('post_in', 'post_slope', 'post_out'), rows):
            self.rows[name] = row.detach().double()
        return True

    def table(self, rows: Sequence[str]) -> torch.Tensor:
        """The rows as the operator takes them."""
        table = torch.zeros(len(rows), table_stride(self.channels))
        for i, name in enumerate(rows):
            table[i, :self.channels] = self.rows[name].float()
        return table


def _pair(value: Any) -> Tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _pool_of(pool: Optional[nn.Module]) -> Optional[Dict[str, Any]]:
    """Facts of a pooling that the kernel knows; None if it does not."""
    if pool is None or isinstance(pool, nn.Identity):
        return {}
    if type(pool) is nn.MaxPool2d and not pool.return_indices:
        kind, dilation = 'max', _pair(pool.dilation)
    elif type(pool) is nn.AvgPool2d and pool.divisor_override is None and (
            not pool.count_include_pad or _pair(pool.padding) == (0, 0)):
        kind, dilation = 'avg', (1, 1)
    else:
        return None
    kernel, stride = _pair(pool.kernel_size), _pair(pool.stride if pool.stride is not None else pool.kernel_size)
    if kernel[0] * kernel[1] > 64:
        return None
    return {'link_pool': kind, 'pool': Window(kernel, stride, _pair(pool.padding), dilation)}


# ---------------------------------------------------------------------------------------------------------------------
# The modules of a deployed network

class _Engine(nn.Module):
    """What `DeployedUnit` and `DeployedConv` share: constants, spec, and the attributes that hosts read."""

    def _set_up(self, source: nn.Module, spec: ConvSpec, fusion: _Fusion) -> None:
        self.spec = replace(spec, **fusion.facts)
        self.constants = fusion.constants
        self.register_buffer('table', fusion.table(self.spec.rows))
        self.ints = list(self.spec.ints())
        self.host_attributes(source)

    def host_attributes(self, source: Optional[nn.Module]) -> None:
        """Copy what hosts read off the layer that this module stands for."""
        for name in HOST_ATTRIBUTES:
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))

    @property
    def bias(self) -> None:
        """None: it is part of the table."""
        return None

    def _check(self, x: torch.Tensor) -> None:
        if x.device.type != 'cpu' and x.device.type != 'meta':
            raise ValueError(
                f'{self.path}: found an input on {x.device}, a deployed network runs on the CPU; '
                f'use the latent network there')
        if x.dtype != torch.float32:
            raise TypeError(f'{self.path}: found an input of {x.dtype}, expected torch.float32; convert it with .float()')

    def _apply(self, fn, recurse: bool = True):
        """Move as modules do, but stay float32: the constants are part of what makes the outputs exact."""
        before = self.table
        super()._apply(fn, recurse)
        if self.table.dtype != torch.float32:
            self.table = before
            raise TypeError(
                f'{self.path}: a deployed network cannot be converted to another dtype; '
                f'convert the latent network, or pass float_dtype to deploy()')
        return self


class DeployedConv(_Engine):
    """A real-valued convolution with what follows it, run by the engine; x (N, C, H, W) float32.

    Args:
        path: Where it stands, for errors.
        conv: The convolution, full or depthwise, zero-padded.
        fusion: Its epilogue.
    """

    def __init__(self, path: str, conv: nn.Conv2d, fusion: _Fusion) -> None:
        super().__init__()
        self.path = path
        weight = conv.weight.detach().double() * fusion.rows['scale'].reshape(-1, 1, 1, 1)
        fusion.rows['scale'] = torch.ones_like(fusion.rows['scale'])
        self.register_buffer('weight', store(weight.float(), _spec_of(conv), True))
        self._set_up(conv, _spec_of(conv), fusion)

    def layer(self) -> ops.Layer:
        """What a chain needs."""
        return ops.Layer(self.weight, self.table, None, None, self.ints, self.constants)

    def forward(self, x: torch.Tensor, link: Optional[torch.Tensor] = None) -> torch.Tensor:
        self._check(x)
        return ops.real_conv2d(x, self.weight, self.table, link, self.ints, self.constants)


class DeployedUnit(_Engine):
    """A `BinaryUnit` for inference: signs are packed, differing bits are counted, the rest is folded into constants.

    Args:
        path: Where the unit stands, for errors.
        unit: The latent unit; it is not changed.
        real: What runs a real convolution inside the unit, None if it is a binary one.
    """

    def __init__(self, path: str, unit: BinaryUnit, float_dtype: torch.dtype) -> None:
        super().__init__()
        self.path = path
        conv = unit.conv
        self.linear = isinstance(conv, nn.Linear)
        self.pre: Optional[nn.Module] = None
        self.conv: Optional[nn.Module] = None
        self.same_pad = bool(getattr(conv, 'same_pad', False))
        self.pad_mode: Optional[Tuple[str, List[int]]] = None
        channels = unit.out_features if self.linear else unit.out_channels
        binary = isinstance(conv, (BinaryConv2d, BinaryLinear)) and conv.is_binary
        scale, bias = _scale_and_bias(conv, channels) if binary else (torch.ones(channels), getattr(conv, 'bias', None))
        fusion = _Fusion(channels, scale, bias)
        steps = self._steps(unit)
        has_k = binary and conv.scale_input
        self.loose_k: Optional[Dict[str, Any]] = None
        native_conv = binary or _engine_runs(conv, float_dtype)
        if conv is None:
            fused = 0
        elif has_k and (self.linear or conv.groups > 1 or conv.padding_mode != 'zeros'):
            fused = 0  # K in torch, and so everything after it
            self.loose_k = dict(kernel_size=conv.kernel_size, stride=conv.stride, dilation=conv.dilation,
                                groups=conv.groups) if not self.linear else {}
            fusion.rows['shift'] = torch.zeros(channels, dtype=torch.float64)
            self.register_buffer('loose_bias', None if bias is None else bias.detach().float())
        elif native_conv or isinstance(conv, nn.Conv2d):
            fused = self._fuse(fusion, steps, native_conv)
        else:
            fused = 0
        self.link_fused = any(name == 'link' for name, _ in steps[:fused])
        link = dict(steps).get('link')
        self.link = None if self.link_fused and isinstance(link, ElasticLink) else copy.deepcopy(link)
        rest = [(name, module) for name, module in steps[fused:] if name != 'link']
        self.before_sum = nn.ModuleList(copy.deepcopy(m) for name, m in rest if name != 'post')
        self.after_sum = nn.ModuleList(copy.deepcopy(m) for name, m in rest if name == 'post')
        if binary:
            self._set_binary(unit, conv, fusion, has_k)
        else:
            self._set_real(unit, conv, fusion, native_conv, float_dtype)
        self.host_attributes(unit)

    @staticmethod
    def _steps(unit: BinaryUnit) -> List[Tuple[str, nn.Module]]:
        """What runs after the convolution, in order, without what does nothing in eval mode."""
        middle = [('act', unit.act), ('norm', unit.norm)] if unit.act_first else [('norm', unit.norm), ('act', unit.act)]
        steps = [*middle, ('tail', unit.tail), ('link', unit.link), ('post', unit.post)]
        return [(name, module) for name, module in steps if module is not None and not _drops(module)]

    def _fuse(self, fusion: _Fusion, steps: Sequence[Tuple[str, nn.Module]], native_conv: bool) -> int:
        """How many of the steps the epilogue takes in."""
        takes = {
            'norm': fusion.norm, 'act': fusion.act, 'tail': lambda m: False, 'post': fusion.post,
            'link': lambda m: fusion.link(m) if _pooled_link(m) else fusion.tensor_link()}
        if self.linear:
            takes['norm'] = lambda m: False
        for i, (name, module) in enumerate(steps):
            if not native_conv and name != 'norm' or not takes[name](module):
                return i
            if not native_conv and fusion.stage:
                return i
        return len(steps)

    def _set_binary(self, unit: BinaryUnit, conv: nn.Module, fusion: _Fusion, has_k: bool) -> None:
        spec = _spec_of(conv)
        if not self.linear and conv.padding_mode != 'zeros':
            self.pad_mode = (conv.padding_mode, conv.pad_sides)
            spec = spec.padded(0, 0, 0, 0)
        if has_k and self.loose_k is None:
            spec = replace(spec, has_k=True)
        threshold = flip = None
        if unit.pre is not None:
            found = None if has_k or self.linear else _threshold_of(unit.pre, spec.c_in)
            if found is None:
                self.pre = copy.deepcopy(unit.pre)
            else:
                threshold, flip = found
        weight = conv.latent_weight().detach()
        self.register_buffer('bits', store(weight if weight.dim() == 4 else weight[:, :, None, None], spec, False))
        self.register_buffer('threshold', threshold)
        self.register_buffer('flip', flip)
        self._set_up(conv, spec, fusion)

    def _set_real(
            self,
            unit: BinaryUnit,
            conv: Optional[nn.Module],
            fusion: _Fusion,
            native_conv: bool,
            float_dtype: torch.dtype,
    ) -> None:
        if unit.pre is not None:
            self.pre = copy.deepcopy(unit.pre)
        if native_conv:
            self.conv = DeployedConv(self.path, conv, fusion)
        elif isinstance(conv, nn.Conv2d):
            self.conv = _folded_conv(_float_layer(conv), fusion, float_dtype)
        elif conv is not None:
            self.conv = _float_layer(conv)

    @property
    def weight(self) -> Optional[torch.Tensor]:
        """A float tensor of the unit: hosts ask it for dtype and device."""
        return self.table if hasattr(self, 'table') else None if self.conv is None else self.conv.weight

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(fn, recurse) if hasattr(self, 'table') else nn.Module._apply(self, fn, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check(x)
        y = self.link_alone(x) if self._is_link_alone() else self.branch_and_link(x)
        for module in self.after_sum:
            y = module(y)
        return y

    def _is_link_alone(self) -> bool:
        return self.conv is None and not hasattr(self, 'table')

    def layer(self) -> Optional[ops.Layer]:
        """What a chain needs, None if more than one operator runs here."""
        if any((len(self.before_sum), len(self.after_sum), self.link is not None, self.pre is not None)):
            return None
        if isinstance(self.conv, DeployedConv):
            return self.conv.layer()
        if not hasattr(self, 'table') or self.linear or self.same_pad or self.pad_mode or self.loose_k is not None:
            return None
        return ops.Layer(self.bits, self.table, self.threshold, self.flip, self.ints, self.constants)

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
        for module in self.before_sum:
            y = module(y)
        return y if link is None or self.link_fused else y + link

    def _run_binary(self, x: torch.Tensor, link: Optional[torch.Tensor]) -> torch.Tensor:
        ints = self.ints
        signed = x
        if self.pad_mode is not None:
            signed = F.pad(x, self.pad_mode[1], self.pad_mode[0])
        pads = None
        if self.same_pad:
            pads = same_pads(x, self.spec.conv.kernel, self.spec.conv.stride, self.spec.conv.dilation)
            ints = list(self.spec.padded(*pads).ints())
        y = ops.binary_conv2d(
            signed, self.bits, self.table, self.threshold, self.flip, link, ints, self.constants)
        if self.loose_k is not None:
            if pads is None:
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

    def _run_linear(self, x: torch.Tensor, link: Optional[torch.Tensor]) -> torch.Tensor:
        """Rows of features are pixels of an image that is one pixel wide."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f'{self.path}: found shape {tuple(x.shape)}, expected (..., {self.in_features})')
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


class DeployedBlock(nn.Module):
    """A block of the host that is nothing but units in a row, and perhaps a shortcut around them: one operator.

    unit3(unit2(unit1(x))) + shortcut(x). What lies between the units never leaves the cache.

    Args:
        block: The host's block, deployed; its children keep their names.
        units: Names of the units, in order.
        shortcut: None if nothing is added, '' if x itself is, or the name of the module that makes it of x.
    """

    def __init__(self, block: nn.Module, units: Sequence[str], shortcut: Optional[str]) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in block.__dict__.items() if k not in self.__dict__})
        for name, child in block.named_children():
            self.add_module(name, child)
        self.units, self.shortcut = tuple(units), shortcut
        self._cached: Optional[Tuple[List[torch.Tensor], List[int], List[float]]] = None

    def _layers(self) -> Tuple[List[torch.Tensor], List[int], List[float]]:
        layers = [self.get_submodule(name).layer() for name in self.units]
        return (
            [t for layer in layers for t in layer.tensors()], [i for layer in layers for i in layer.ints],
            [c for layer in layers for c in layer.constants])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.get_submodule(self.units[0])._check(x)
        added = None
        if self.shortcut is not None:
            added = self.get_submodule(self.shortcut)(x) if self.shortcut else x
        if self._cached is None:
            self._cached = self._layers()
        return ops.chain(x, *self._cached, added)

    def _apply(self, fn, recurse: bool = True):
        self._cached = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_cached': None}

    def extra_repr(self) -> str:
        return f'units={self.units}, shortcut={self.shortcut!r}'


def _as_row(block: nn.Module) -> Optional[nn.Module]:
    """A `DeployedBlock` that gives what the block gives, bit for bit, None if there is none. Found out by a trial."""
    units = {m: name for name, m in block.named_modules() if isinstance(m, DeployedUnit)}
    if not 2 <= len(units) <= ops.MOST_LAYERS or any(m.layer() is None for m in units) or _hooked(block):
        return None
    if len(inspect.signature(block.forward).parameters) != 1:  # the host may pass it more than x
        return None
    calls: List[Tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
    handles = [m.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out, out.clone())))
               for m in block.modules() if m is not block]
    images = torch.randn(2, next(iter(units)).in_channels, 9, 9, generator=torch.Generator().manual_seed(0))
    x = images.clone()
    try:
        with torch.no_grad():
            expected = block(x)
    except Exception:  # it wants something else than an image
        return None
    finally:
        for handle in handles:
            handle.remove()
    row = [(m, source, out) for m, source, out, _ in calls if m in units]
    if [m for m, _, _ in row] != list(dict.fromkeys(m for m, _, _ in row)) or len(row) != len(units):
        return None
    if row[0][1] is not x or any(b[1] is not a[2] for a, b in zip(row, row[1:])):
        return None
    names = {m: name for name, m in block.named_children()}
    inside = {id(n) for m in units for n in m.modules()}
    shortcuts: List[Optional[str]] = [None, '']
    shortcuts += [names[m] for m, source, _, _ in calls if source is x and m in names and id(m) not in inside]
    for shortcut in shortcuts:
        fused = DeployedBlock(block, [units[m] for m, _, _ in row], shortcut)
        try:
            with torch.no_grad():
                found = fused(images)
        except ValueError:  # the shapes do not fit
            continue
        if found.shape == expected.shape and torch.equal(found, expected):
            return fused.eval()
    return None


def _hooked(block: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def _join_units(model: nn.Module) -> None:
    """Put a `DeployedBlock` in place of each block that is a row of units."""
    for name, child in list(model.named_children()):
        if isinstance(child, DeployedUnit):
            continue
        fused = _as_row(child)
        if fused is None:
            _join_units(child)
        else:
            setattr(model, name, fused)


def _as_image(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _pooled_link(link: nn.Module) -> bool:
    return isinstance(link, ElasticLink) and _pool_of(link.pool) is not None


def _scale_and_bias(conv: nn.Module, channels: int) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """alpha, with whatever else multiplies a binary convolution's output, and its bias."""
    scale = torch.ones(channels, dtype=torch.float64)
    if isinstance(conv, StandardizedBinaryConv2d):
        scale = scale * conv.scale
        if conv.gain is not None:
            scale = scale * conv.gain.detach().double().flatten()
    elif conv.scale_weight:
        scale = weight_scale(conv.weight).double()
    return scale, conv.bias


def _spec_of(conv: nn.Module) -> ConvSpec:
    """Geometry of a convolution or linear layer."""
    if isinstance(conv, nn.Linear):
        return ConvSpec(conv.in_features, conv.out_features)
    left, right, top, bottom = (int(p) for p in conv._reversed_padding_repeated_twice)
    window = Window(_pair(conv.kernel_size), _pair(conv.stride), (top, left), _pair(conv.dilation))
    return ConvSpec(
        conv.in_channels, conv.out_channels, window, (bottom, right), conv.groups, getattr(conv, 'pad_value', 0))


def _threshold_of(
        pre: nn.Module, channels: int) -> Optional[Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]]:
    """Where the sign of what `pre` gives changes, for each channel, and whether it changes downwards; None if unknown.

    Sign(x + b) is x >= -b: a float sum has the sign of the exact one. For a norm the threshold is looked for, among all
    floats, with the norm itself as the judge, so that no sign differs from the latent network's.
    """
    if type(pre) in (Shift, RSign):
        return -pre.bias.detach().float(), None
    affine = _affine_of(pre, channels)
    if affine is None:
        return None
    down = affine.scale < 0
    # Floats in their order are these integers in their order.
    low = torch.full((channels,), -(0x7f800000), dtype=torch.int64)
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
    flip = torch.where(down, torch.tensor(-2 ** 31), torch.tensor(0)).to(torch.int32)
    return threshold, flip if down.any() else None


# ---------------------------------------------------------------------------------------------------------------------
# Float layers

def _engine_runs(conv: Optional[nn.Module], float_dtype: torch.dtype) -> bool:
    """The engine's own real convolution takes this layer."""
    return (
        type(conv) is nn.Conv2d and conv.padding_mode == 'zeros' and float_dtype == torch.float32
        and native.library() is not None and (conv.groups == 1 or conv.groups == conv.in_channels == conv.out_channels))


class _CastConv(nn.Module):
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
    def bias(self) -> Optional[torch.Tensor]:
        """The convolution's bias."""
        return self.conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.to(self.conv.weight.dtype)).to(x.dtype)


def _float_layer(layer: nn.Module) -> nn.Module:
    """A real convolution or linear layer; one with a binary weight becomes a plain one that holds alpha * Sign(W)."""
    if not isinstance(layer, (BinaryConv2d, BinaryLinear)):
        return copy.deepcopy(layer)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight = nn.Parameter(layer.quantized_weight())
    plain.weight_quantizer, plain.quantize_weight, plain.scale_weight = None, lambda w: w, False
    return plain


def _folded_conv(conv: nn.Conv2d, fusion: _Fusion, float_dtype: torch.dtype) -> nn.Module:
    """A float convolution of torch with the affine part of an epilogue in its weight and bias."""
    shape = [-1] + [1] * (conv.weight.dim() - 1)
    with torch.no_grad():
        weight = (conv.weight.double() * fusion.rows['scale'].reshape(shape)).to(conv.weight.dtype)
        bias = fusion.rows['shift'].to(conv.weight.dtype)
        conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        if conv.bias is not None or bool((bias != 0).any()):
            conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv if float_dtype == torch.float32 else _CastConv(conv, float_dtype)


def _replace_float(
        path: str, conv: nn.Conv2d, chain: Sequence[Tuple[str, nn.Module]], float_dtype: torch.dtype,
) -> Tuple[nn.Module, Dict[str, nn.Module]]:
    """What replaces a float convolution, and the modules after it that it takes in."""
    fusion = _Fusion(conv.out_channels, torch.ones(conv.out_channels, dtype=torch.float64), conv.bias)
    own = _engine_runs(conv, float_dtype)
    taken: Dict[str, nn.Module] = {}
    for after, module in chain:
        norm, act = module, getattr(module, 'act', None) if isinstance(module, NORMS) else None
        if isinstance(module, NORMS):
            if isinstance(act, nn.Module):
                norm = copy.copy(module)
                norm.__dict__['_modules'] = {}
                norm.act = norm.drop = None
            if not own and fusion.stage or not fusion.norm(norm):
                break
            taken[after] = nn.Identity()
            if act is not None and not (own and fusion.act(act)):
                taken[after] = copy.deepcopy(act)
                break
        elif not own or not fusion.act(module):
            break
        else:
            taken[after] = nn.Identity()
    if own:
        return DeployedConv(path, conv, fusion), taken
    return _folded_conv(copy.deepcopy(conv), fusion, float_dtype), taken


# ---------------------------------------------------------------------------------------------------------------------
# The verb

def _refuse_unfit(model: nn.Module, float_dtype: torch.dtype) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: found a {type(model).__name__}, expected a torch.nn.Module')
    if isinstance(model, torch.jit.ScriptModule) or type(model).__name__ in (
            'OptimizedModule', 'DistributedDataParallel', 'DataParallel', 'FullyShardedDataParallel', 'GraphModule'):
        raise ValueError(
            f'model: found a {type(model).__name__}, expected the model that it was made of; deploy that one')
    if float_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f'float_dtype: found {float_dtype}, expected torch.float32, torch.bfloat16 or torch.float16')
    units = 0
    for path, module in model.named_modules():
        name = path or 'model'
        if isinstance(module, _Engine):
            raise ValueError(f'{name}: the model is already deployed; deploy the latent one')
        if isinstance(module, BinaryUnit):
            units += 1
            conv = module.conv
            if getattr(conv, 'input_quantizer', None) is not None and conv.weight_quantizer is None:
                raise ValueError(
                    f'{name}: the weights are still real (stage one of two-stage training); '
                    f'finish the second stage, or build the model without real_weights')
        if module.training:
            raise ValueError(f'{name}: found training mode, expected eval mode; call model.eval() first')
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            where = f'{path}.{key}' if path else key
            if tensor.device.type != 'cpu':
                raise ValueError(f'{where}: found device {tensor.device}, expected cpu; call model.cpu() first')
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ValueError(f'{where}: found {tensor.dtype}, expected torch.float32; call model.float() first')
    if not units:
        raise ValueError(
            'model: there is no BinaryUnit in it; binarize it, or create one of the registered models, first')


def deploy(
        model: nn.Module, *, float_dtype: torch.dtype = torch.float32, fuse_blocks: bool = True) -> nn.Module:
    """An inference copy of a binarized network: binary convolutions run as xor and popcount on the CPU.

    Every `BinaryUnit` becomes one operator: signs are packed, differing bits counted, and scale, K, norm, activation,
    link and RPReLU applied before the result is written, with norms folded in float64. Norms after float convolutions
    are folded too. What cannot be folded runs as the module that it was. The copy has the host's class and forward
    (`forward_features`, `features_only`, any batch and image size) and keeps NHWC memory format throughout. Signs are
    computed exactly; values differ from the latent network's by rounding, and where rounding moves a value across zero,
    a sign flips.

    Args:
        model: A latent network in eval mode, float32, on the CPU. It is not changed.
        float_dtype: Dtype in which float convolutions compute; activations between layers stay float32.
        fuse_blocks: Run each block that is a row of units as one operator: the same bits, faster. Without it every unit
            stands by itself, for time by layer and for hooks.

    Returns:
        A module of the model's class. Its state dict is its own; save the latent network, not this one.

    Raises:
        TypeError: `model` is not a module.
        ValueError: It is in training mode, not on the CPU, not float32, scripted, compiled, wrapped or already
            deployed; it has no binary unit, or one whose weights are still real.
    """
    _refuse_unfit(model, float_dtype)
    memo: Dict[int, Any] = {}
    replaced: List[Tuple[nn.Module, nn.Module]] = []

    def exchange(old: nn.Module, new: nn.Module) -> None:
        memo[id(old)] = new.eval().requires_grad_(False)
        replaced.append((old, new))

    inner = set()
    for path, module in model.named_modules():
        if isinstance(module, BinaryUnit) and id(module) not in memo:
            exchange(module, DeployedUnit(path, module, float_dtype))
            inner.update(id(m) for m in module.modules())
    modules = dict(model.named_modules())
    for path, chain in followers(model, (nn.Conv2d,), (*NORMS, *ACTS)).items():
        conv = modules[path]
        if id(conv) in inner or isinstance(conv, BinaryConv2d):
            continue
        after = [(p, modules[p]) for p in chain if id(modules[p]) not in inner]
        new, taken = _replace_float(path, conv, after, float_dtype)
        exchange(conv, new)
        for p, rest in taken.items():
            exchange(modules[p], rest)
    twin = copy.deepcopy(model, memo)
    for old, new in replaced:
        for hooks in ('_forward_hooks', '_forward_pre_hooks'):
            getattr(new, hooks).update(copy.deepcopy(getattr(old, hooks), memo))
            if hasattr(old, 'min_input_size'):
                new.min_input_size = old.min_input_size
    if fuse_blocks:
        _join_units(twin)
    return twin.requires_grad_(False)
