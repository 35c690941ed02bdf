"""Float layers of a deployed network: the engine's own where it has them, torch's with norms folded in elsewhere."""
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from ..layers import HOST_ATTRIBUTES, BinaryConv2d, BinaryLinear
from . import native
from .calls import copied, without_hooks
from .epilogue import FIXED_NORMS, FOLDED_ACTS, Epilogue, drops, fold, norm_and_act
from .modules import DeployedAct, DeployedConv, DeployedLinear, DeployedNorm, DeployedPool, is_int8, spec_of

__all__ = [
    'deployed_part', 'engine_runs', 'float_layer', 'folded_conv', 'engine_computes', 'linear_layer', 'replace_conv',
    'replacement']


def engine_computes(float_dtype: torch.dtype) -> bool:
    """Return whether the engine itself computes full real layers: in int8 always, in float32 with the library."""
    return float_dtype == torch.int8 or float_dtype == torch.float32 and native.library() is not None


def engine_runs(conv: nn.Module | None, float_dtype: torch.dtype) -> bool:
    """Return whether the engine's own real convolution takes this layer."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != 'zeros' or not engine_computes(float_dtype):
        return False
    spec = spec_of(conv)
    return spec.beyond() is None and (
        float_dtype == torch.int8 and is_int8(spec) or native.library() is not None
        and (conv.groups == 1 or conv.groups == conv.in_channels == conv.out_channels))


def replacement(path: str, module: nn.Module) -> Any:
    """Return the engine's module for a pool, activation or norm of the host, or None if it has none."""
    if native.library() is None:
        return None
    return next((kind(path, module) for kind in (DeployedPool, DeployedAct, DeployedNorm) if kind.takes(module)), None)


def replace_conv(
        path: str, conv: nn.Conv2d, chain: Sequence[tuple[str, nn.Module]], float_dtype: torch.dtype,
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return what replaces a float convolution, and the modules after it that it takes in."""
    own = engine_runs(conv, float_dtype)
    steps: list[tuple[str, nn.Module]] = []
    owners: list[tuple[str, nn.Module | None]] = []  # path of each step, and the activation that is left if it ends it
    for after, module in chain:
        if isinstance(module, FIXED_NORMS):
            norm, act = norm_and_act(module)
            steps.append(('norm', norm))
            owners.append((after, act))
            if act is not None:
                steps.append(('act' if own else 'torch act', act))
                owners.append((after, None))
        else:
            steps.append(('act' if own or drops(module) else 'torch act', module))
            owners.append((after, None))
    epilogue, folded = fold(conv.out_channels, None, conv.bias, steps)
    taken: dict[str, nn.Module] = {}
    for i, (after, act) in enumerate(owners[:folded]):
        ends = act is not None and i + 1 == folded
        taken[after] = copied(act) if ends else nn.Identity()
    if own:
        return DeployedConv(path, conv, epilogue, float_dtype), taken
    return folded_conv(without_hooks(copied(conv)), epilogue, float_dtype), taken


def linear_layer(path: str, linear: nn.Linear, float_dtype: torch.dtype) -> DeployedLinear:
    """Return the engine's module for a linear layer."""
    return DeployedLinear(path, linear, fold(linear.out_features, None, linear.bias, [])[0], float_dtype)


def deployed_part(path: str, module: nn.Module | None, float_dtype: torch.dtype) -> nn.Module | None:
    """Return a copy of a part of a unit in which the engine runs what it can: convolutions, pools, activations, norms.

    Args:
        path: Where the part stands, for errors.
        module: A link, a tail, a squeeze-excite, ...; it is not changed.
        float_dtype: Dtype in which float convolutions compute.
    """
    if module is None:
        return None
    root = nn.Sequential(copied(module))
    for parent_path, parent in list(root.named_modules()):
        children = list(parent.named_children())
        for i, (name, child) in enumerate(children):
            where = f'{path}.{parent_path}.{name}'
            if parent._modules[name] is not child:  # taken in by the convolution before it
                continue
            if engine_runs(child, float_dtype):
                chain = _chain(children[i + 1:]) if type(parent) is nn.Sequential else []
                new, taken = replace_conv(where, child, chain, float_dtype)
                parent._modules.update(taken)
            elif type(child) is nn.Linear and engine_computes(float_dtype):
                new = linear_layer(where, child, float_dtype)
            else:
                new = replacement(where, child)
            if new is not None:
                parent._modules[name] = new
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    return root[0].eval()


def _chain(children: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Return the norms and activations at the start of a row of modules."""
    return list(itertools.takewhile(lambda child: isinstance(child[1], (*FIXED_NORMS, *FOLDED_ACTS)), children))


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
        """Weight of the convolution."""
        return self.conv.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias of the convolution, or None."""
        return self.conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.to(self.conv.weight.dtype)).to(x.dtype)


def folded_conv(conv: nn.Conv2d, epilogue: Epilogue, float_dtype: torch.dtype) -> nn.Module:
    """Return a float convolution of torch with the affine part of an epilogue in its weight and bias."""
    shape = [-1] + [1] * (conv.weight.dim() - 1)
    with torch.no_grad():
        weight = (conv.weight.double() * epilogue.rows['scale'].reshape(shape)).to(conv.weight.dtype)
        bias = epilogue.rows['shift'].to(conv.weight.dtype)
        conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        if conv.bias is not None or bool((bias != 0).any()):
            conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv if float_dtype in (torch.float32, torch.int8) else CastConv(conv, float_dtype)


def float_layer(layer: nn.Module) -> nn.Module:
    """Return a copy of a real layer; a quantized weight is there as the values in use, in a plain layer."""
    if not isinstance(layer, (BinaryConv2d, BinaryLinear)) or layer.weight_quantizer is None:
        return copied(layer)
    if getattr(layer, 'same_pad', False) or getattr(layer, 'pad_value', 0):
        return copied(layer)  # no plain layer pads like this
    plain: nn.Module
    if isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device='meta')
    else:
        plain = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, layer.bias is not None, layer.padding_mode, device='meta')
    with torch.no_grad():
        plain.weight = nn.Parameter(layer.quantized_weight().clone(), requires_grad=False)
        bias = layer.bias
        plain.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain.eval()
