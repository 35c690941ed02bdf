"""Modules of a deployed network that compute one step of a program each, in place of the host's layers."""
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers import HOST_ATTRIBUTES
from ..layers.binary_conv import pad_sides_of
from ..weights.int8 import quantize
from . import operators as ops
from .calls import copied
from .epilogue import F64, FIXED_NORMS, Epilogue, affine_of, norm_and_act, pair, pool_of
from .layout import store
from .spec import ConvSpec, Window
from .steps import MOST_INT8_INPUTS, Kind, Pool, Step, Unary, pool_step

__all__ = [
    'ConvModule', 'DeployedAct', 'DeployedConv', 'DeployedLinear', 'DeployedNorm', 'DeployedPool', 'Engine',
    'StepModule', 'as_image', 'from_image', 'is_int8', 'spec_of']


class Engine(nn.Module):
    """Base of the engine's modules: tensors that nobody trains, and the attributes that hosts read."""

    def hold(self, name: str, tensor: torch.Tensor | None) -> None:
        """Register real numbers as a parameter, bits as a buffer; no parameter is trained.

        Programs ask a network's first parameter for the device and dtype of its input.
        """
        if tensor is not None and tensor.is_floating_point():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor)

    def host_attributes(self, source: nn.Module | None) -> None:
        """Copy what hosts read off the layer that this module stands for."""
        for name in HOST_ATTRIBUTES:
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))

    @property
    def bias(self) -> None:
        """None: it is part of the table."""
        return None


class StepModule(Engine):
    """A module that computes one step.

    Args:
        path: Where it stands, for errors.
        kind: What it computes.
        ints, constants: Integers and numbers of the step.
        tensors: Its constants by name, in the step's order.
    """

    def __init__(
            self,
            path: str,
            kind: Kind,
            ints: Sequence[int] = (),
            constants: Sequence[float] = (),
            **tensors: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.path, self.kind, self.ints, self.constants = path, kind, tuple(ints), tuple(constants)
        self.tensor_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.hold(name, tensor)

    def apply_step(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return what the step gives for images (N, C, H, W).

        Raises:
            ValueError: They are not on the CPU, do not fit, or the module was moved.
            TypeError: They are not float32.
        """
        tensors = [getattr(self, name) for name in self.tensor_names]
        ops.check_input(self.path, inputs[0])
        ops.check_place(self.path, inputs[0], tensors)
        step = Step(self.kind, tuple(range(len(inputs))), tuple(tensors), self.ints, self.constants, self.path)
        return ops.apply(step, *inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_step(x)

    def get_extra_state(self) -> torch.Tensor:
        """Return the constants, so that a state dict is whole."""
        return torch.tensor(self.constants, **F64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Set the constants."""
        self.constants = tuple(state.tolist())

    def extra_repr(self) -> str:
        return self.kind.name.lower()


class ConvModule(StepModule):
    """A convolution, or linear layer, with its epilogue."""

    def __init__(
            self, path: str, source: nn.Module, spec: ConvSpec, epilogue: Epilogue, **weights: torch.Tensor | None,
    ) -> None:
        self_spec = replace(spec, **epilogue.facts)
        weight, *rest = weights.items()
        super().__init__(
            path, Kind.CONV, self_spec.ints(), epilogue.constants, **dict([weight]),
            table=epilogue.table(self_spec.rows), **{'threshold': None, 'flip': None, **dict(rest)})
        self.spec = self_spec
        self.host_attributes(source)

    def forward(self, x: torch.Tensor, link: torch.Tensor | None = None) -> torch.Tensor:
        if self.spec.link == 'none':
            return self.apply_step(x)
        return self.apply_step(x, x if link is None else link)

    def extra_repr(self) -> str:
        spec = self.spec
        facts = [name for name, on in (
            ('int8', getattr(self, self.tensor_names[0]).dtype == torch.int8), ('K', spec.has_k),
            (f'act={spec.act}', spec.act != 'none'), (f'link={spec.link}', spec.link != 'none'),
            ('threshold', self.threshold is not None), ('post', spec.has_post)) if on]
        return (
            f'{spec.c_in}, {spec.c_out}, kernel_size={spec.conv.kernel}, stride={spec.conv.stride}, '
            f'groups={spec.groups}, fused={"+".join(facts) or None}')


def _weight_and_epilogue(
        weight: torch.Tensor, spec: ConvSpec, epilogue: Epilogue, float_dtype: torch.dtype,
) -> tuple[torch.Tensor, Epilogue]:
    """Return the stored weight of a real layer, and its epilogue: one of them takes in the scale per channel."""
    if float_dtype == torch.int8 and is_int8(spec):
        q, scale = quantize(weight)
        return store(q, spec, torch.int8), epilogue.scaled(scale)
    weight = weight.detach().double() * epilogue.rows['scale'].reshape(-1, 1, 1, 1)
    return store(weight.float(), spec, torch.float32), epilogue.without_scale()


def is_int8(spec: ConvSpec) -> bool:
    """Return whether a real layer computes in int8 where that is asked for: not a depthwise one."""
    return spec.groups == 1 and spec.taps * spec.c_in <= MOST_INT8_INPUTS


class DeployedConv(ConvModule):
    """A real-valued convolution with what follows it, run by the engine; x (N, C, H, W) float32.

    Args:
        path: Where it stands, for errors.
        conv: The convolution, full or depthwise, zero-padded.
        epilogue: What follows it.
        float_dtype: torch.int8 to compute in int8, where `is_int8` allows, float32 otherwise.
    """

    def __init__(
            self, path: str, conv: nn.Conv2d, epilogue: Epilogue, float_dtype: torch.dtype = torch.float32) -> None:
        spec = spec_of(conv)
        weight, epilogue = _weight_and_epilogue(conv.weight, spec, epilogue, float_dtype)
        super().__init__(path, conv, spec, epilogue, weight=weight)


class DeployedLinear(ConvModule):
    """A real-valued linear layer, run by the engine as a 1x1 convolution; x (..., in_features) float32.

    Args:
        path: Where it stands, for errors.
        linear: The layer.
        epilogue: What follows it.
        float_dtype: torch.int8 to compute in int8, where `is_int8` allows, float32 otherwise.
    """

    def __init__(
            self, path: str, linear: nn.Linear, epilogue: Epilogue, float_dtype: torch.dtype = torch.float32) -> None:
        spec = spec_of(linear)
        weight, epilogue = _weight_and_epilogue(linear.weight[:, :, None, None], spec, epilogue, float_dtype)
        super().__init__(path, linear, spec, epilogue, weight=weight)

    def forward(self, x: torch.Tensor, link: torch.Tensor | None = None) -> torch.Tensor:
        ops.check_input(self.path, x)
        if x.numel() == 0 or x.shape[-1] != self.in_features:
            return F.linear(x, x.new_zeros(self.out_features, self.in_features))  # torch's own shape, or its error
        y = super().forward(as_image(x), None if link is None else as_image(link))
        return from_image(y, x)


def as_image(x: torch.Tensor) -> torch.Tensor:
    """Return features (..., C) as an image (1, C, rows, 1), each row a pixel."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def from_image(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return an image made of `as_image(x)` as features (..., C), with the leading axes of x."""
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], y.shape[1])


class DeployedPool(StepModule):
    """A pool of the host, run by the engine, whose threads it shares; x (N, C, H, W) float32.

    Args:
        path: Where it stands, for errors.
        pool: A pool that `takes` knows; it stays for tensors that are no float32 images.
    """

    def __init__(self, path: str, pool: nn.Module) -> None:
        if type(pool) is nn.AdaptiveAvgPool2d:
            super().__init__(path, Kind.MEAN)
        else:
            facts = pool_of(pool)
            window, mode = facts['pool'], Pool.MAX if facts['link_pool'] == 'max' else Pool.MEAN
            pad_end, ceil = window.padding, pool.ceil_mode
            covers = all(k >= s for k, s in zip(window.kernel, window.stride))
            if ceil and window.padding == (0, 0) and window.dilation == (1, 1) and covers:
                pad_end, ceil = tuple(s - 1 for s in window.stride), False  # the same, and no matter of the image
            super().__init__(path, Kind.POOL, pool_step(window, mode, pad_end, ceil).ints)
        self.pool = copied(pool)

    @staticmethod
    def takes(pool: nn.Module) -> bool:
        """Return whether the engine runs this pool."""
        if type(pool) is nn.AdaptiveAvgPool2d:
            return pool.output_size in (1, (1, 1))
        return type(pool) in (nn.MaxPool2d, nn.AvgPool2d) and bool(pool_of(pool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != 'cpu':
            return self.pool(x)
        return self.apply_step(x)


class DeployedAct(Engine):
    """An activation of the host, run by the engine; x of any shape, float32.

    Args:
        path: Where it stands, for errors.
        act: An activation that `takes` knows.
    """
    OPERATIONS = {
        nn.SiLU: Unary.SILU, nn.Sigmoid: Unary.SIGMOID, nn.Hardsigmoid: Unary.HARDSIGMOID,
        nn.Hardswish: Unary.HARDSWISH, nn.Tanh: Unary.TANH, nn.ELU: Unary.ELU, nn.Mish: Unary.MISH}
    TIMM = {
        'Swish': Unary.SILU, 'Sigmoid': Unary.SIGMOID, 'HardSigmoid': Unary.HARDSIGMOID, 'HardSwish': Unary.HARDSWISH,
        'Tanh': Unary.TANH, 'GELU': Unary.GELU, 'GELUTanh': Unary.GELU_TANH, 'Mish': Unary.MISH}

    def __init__(self, path: str, act: nn.Module) -> None:
        super().__init__()
        self.path, self.operation = path, self._operation(act)
        self.constants = (float(act.alpha),) if type(act) is nn.ELU else ()

    @classmethod
    def _operation(cls, act: nn.Module) -> Unary | None:
        if type(act) is nn.GELU:
            return Unary.GELU if act.approximate == 'none' else Unary.GELU_TANH
        if type(act).__module__ == 'timm.layers.activations':
            return cls.TIMM.get(type(act).__name__)
        return cls.OPERATIONS.get(type(act))

    @classmethod
    def takes(cls, act: nn.Module) -> bool:
        """Return whether the engine runs this activation."""
        return cls._operation(act) is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops.check_input(self.path, x)
        return ops.unary(self.operation, x, *self.constants)

    def extra_repr(self) -> str:
        return self.operation.name.lower()


class DeployedNorm(StepModule):
    """A norm of the host that no convolution takes in, run by the engine.

    Args:
        path: Where it stands, for errors.
        norm: A norm that `takes` knows: BatchNorm2d of fixed statistics, GroupNorm of images (N, C, H, W), LayerNorm of
            channels, last (..., C) or of images (timm's LayerNorm2d), and timm's with an activation inside.
    """
    TIMM = {  # class: whether channels are the last axis
        'LayerNorm': True, 'LayerNorm2d': False, 'LayerNormAct': True, 'LayerNormAct2d': False, 'GroupNormAct': False}

    def __init__(self, path: str, norm: nn.Module) -> None:
        if isinstance(norm, FIXED_NORMS):
            scale, shift = affine_of(norm_and_act(norm)[0], norm.num_features)
            super().__init__(path, Kind.AFFINE, scale=scale.float(), shift=shift.float())
        else:
            groups, over_pixels = (norm.num_groups, 1) if isinstance(norm, nn.GroupNorm) else (1, 0)
            super().__init__(
                path, Kind.NORM, (groups, over_pixels), (norm.eps,), scale=_plain(norm.weight), shift=_plain(norm.bias))
        self.is_last = isinstance(norm, nn.LayerNorm) and self.TIMM.get(type(norm).__name__, True)
        self.norm = copied(norm)
        self.drop, act = self.norm._modules.get('drop'), self.norm._modules.get('act')
        self.act = DeployedAct(f'{path}.act', act) if act is not None and DeployedAct.takes(act) else act

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # hosts may read the norm's own tensors and attributes
            norm = vars(self).get('_modules', {}).get('norm')
            if norm is None:
                raise
            return getattr(norm, name)

    @staticmethod
    def takes(norm: nn.Module) -> bool:
        """Return whether the engine runs this norm."""
        if isinstance(norm, nn.BatchNorm2d):
            return affine_of(norm_and_act(norm)[0], norm.num_features) is not None
        if type(norm) is nn.LayerNorm:
            return len(norm.normalized_shape) == 1
        timms = type(norm).__module__ in ('timm.layers.norm', 'timm.layers.norm_act')
        return type(norm) is nn.GroupNorm or timms and type(norm).__name__ in DeployedNorm.TIMM

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops.check_input(self.path, x)
        y = from_image(self.apply_step(as_image(x)), x) if self.is_last else self.apply_step(x)
        for part in (self.drop, self.act):
            y = y if part is None else part(y)
        return y


def _plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().float().clone()


def spec_of(conv: nn.Module) -> ConvSpec:
    """Return the geometry of a convolution or linear layer."""
    if isinstance(conv, nn.Linear):
        return ConvSpec(conv.in_features, conv.out_features)
    left, right, top, bottom = pad_sides_of(conv)  # torch's own list of them is older than a padding set later
    window = Window(pair(conv.kernel_size), pair(conv.stride), (top, left), pair(conv.dilation))
    return ConvSpec(
        conv.in_channels, conv.out_channels, window, (bottom, right), conv.groups, getattr(conv, 'pad_value', 0))
