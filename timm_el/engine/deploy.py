"""deploy(): a latent network as an inference module whose binary convolutions run as xor and popcount.

The host's class and forward stay; modules are exchanged in a copy. A `BinaryUnit` becomes a `DeployedUnit`: one
operator for the convolution and as much of what follows it as the operator can do, in float64-folded constants, then
whatever is left, as the modules that it was. A float convolution takes its norm in, and its activation where the
engine runs it.
"""
import copy
from typing import Any

import torch
import torch.nn as nn

from ..layers import BinaryConv2d, BinaryLinear, BinaryUnit, check_tensors, check_unwrapped
from . import native
from .calls import FORWARD_HOOKS, computed_tensors, copied, has_hooks, has_own_forward, is_altered
from .epilogue import FIXED_NORMS, FOLDED_ACTS
from .float_layers import engine_computes, linear_layer, replace_conv, replacement
from .follow import followers
from .inference import keep_for_inference
from .modules import Engine
from .network import as_deployed
from .units import deploy_unit

__all__ = ['deploy']

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def _refuse_unfit(model: nn.Module, float_dtype: torch.dtype) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: found a {type(model).__name__}, expected a torch.nn.Module')
    check_unwrapped(model, 'deploy')
    if isinstance(model, torch.fx.GraphModule):
        raise ValueError('model: found a GraphModule, expected the model that it was traced from; deploy that one')
    if float_dtype not in FLOAT_DTYPES:
        raise ValueError(f'float_dtype: found {float_dtype}, expected one of {", ".join(map(str, FLOAT_DTYPES))}')
    for path, module in model.named_modules():
        if isinstance(module, Engine):
            raise ValueError(f'{path or "model"}: the model is already deployed; deploy the latent one')
    units = 0
    for path, module in model.named_modules():
        name = path or 'model'
        check_tensors(module, name)
        if isinstance(module, BinaryUnit):
            units += 1
            conv = module.conv
            _refuse_inside(name, module)
            if getattr(conv, 'input_quantizer', None) is not None and conv.weight_quantizer is None:
                raise ValueError(
                    f'{name}: the weights are still real (stage one of two-stage training); '
                    f'finish the second stage, or build the model without real_weights')
            if getattr(conv, 'input_quantizer', None) is not None and not conv.is_binary:
                raise ValueError(
                    f'{name}: {conv} takes more than one xor and popcount, for which the engine has no kernel; '
                    f'run the latent network, or train with a recipe of one bit each, such as bireal or el')
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


def _refuse_inside(name: str, unit: BinaryUnit) -> None:
    """Raise for what would be lost: hooks and parametrizations inside the unit, and a forward of one's own."""
    for key, part in unit.named_modules():
        where = f'{name}.{key}' if key else name
        computed = computed_tensors(part)
        if computed:
            raise ValueError(
                f'{where}: the {type(part).__name__} computes its {" and ".join(computed)} anew in each pass, expected '
                f'parameters; make it so first, with torch.nn.utils.prune.remove, remove_weight_norm or '
                f'remove_spectral_norm of torch.nn.utils, or parametrize.remove_parametrizations')
        if has_own_forward(part):
            raise ValueError(
                f'{where}: the {type(part).__name__} has a forward in its instance, which would be lost; remove it, '
                f'and put it on the deployed network')
        if key and has_hooks(part):
            raise ValueError(
                f'{where}: the {type(part).__name__} carries hooks, which would be lost; remove them, or hook the '
                f'unit itself')
    conv = unit.conv
    if isinstance(conv, (BinaryConv2d, BinaryLinear)) and not type(conv).forward.__module__.startswith('timm_el.'):
        raise ValueError(f'{name}.conv: {type(conv).__name__} has a forward of its own, which the engine does not know')


def deploy(
        model: nn.Module, *, float_dtype: torch.dtype = torch.float32, fuse_blocks: bool = True) -> nn.Module:
    """Return an inference copy of a binarized network, whose binary convolutions run as xor and popcount on the CPU.

    Every `BinaryUnit` becomes one operator: signs are packed, differing bits counted, and scale, K, norm, activation,
    link and RPReLU applied before the result is written, with norms folded in float64. Norms after float convolutions
    are folded too. What cannot be folded runs as the module that it was, and so does each float layer that has hooks, a
    parametrization, or a forward in its instance. The copy is an instance of the host's class, with its forward
    (`forward_features`, `features_only`, any batch and image size), and keeps NHWC memory format throughout. Signs are
    computed exactly; values differ from the latent network's by rounding, and where rounding moves a value across zero,
    a sign flips. The copy stays in eval mode and float32: `train()` of it, of its modules, or of a network around it
    leaves its modules in eval mode.

    The copy is immutable but for `load_state_dict` (of it, or of a part), attributes that are set on it
    (`reset_classifier` sets some), and modules that are added or removed. Tensors that are written to in place, and
    modules inside that are exchanged, need not be noticed: change the latent network, and deploy it again.

    Args:
        model: A latent network in eval mode, float32, on the CPU. It is not changed.
        float_dtype: Dtype in which float convolutions and the classifier compute; activations between layers stay
            float32. torch.int8 needs no calibration: weights have a scale per output channel, and inputs one per output
            pixel (kernels of one tap) or row of output pixels, max(abs(x)) / 127. Depthwise and grouped convolutions
            stay float32. Where an input that shares a scale, or a weight of a channel, is not finite, outputs are NaN.
        fuse_blocks: Run the whole network as one program, recorded at its first call. It goes module by module where a
            hook, or a forward, is put on an instance inside. Without it every module runs by itself.

    Returns:
        A module of the model's class. Its state dict is its own; save the latent network, not this one.

    Raises:
        TypeError: `model` is not a module.
        ValueError: It is in training mode, not on the CPU, not float32, scripted, compiled, wrapped or already
            deployed; it has no binary unit, or one whose weights are still real, or one with hooks, parametrizations or
            a forward in an instance inside.

    Warns:
        SlowEngineWarning: Once in a process, if the kernels of this processor do not run and nobody asked for that.
    """
    _refuse_unfit(model, float_dtype)
    native.warn_if_slow()
    with torch.inference_mode(False), torch.no_grad():
        return _deployed(model, float_dtype, fuse_blocks)


def _deployed(model: nn.Module, float_dtype: torch.dtype, fuse_blocks: bool) -> nn.Module:
    memo: dict[int, Any] = {}
    replaced: list[tuple[nn.Module, nn.Module]] = []

    def exchange(old: nn.Module, new: nn.Module) -> None:
        memo[id(old)] = new.eval().requires_grad_(False)
        replaced.append((old, new))

    inner = set()
    for path, module in model.named_modules():
        if isinstance(module, BinaryUnit) and id(module) not in memo:
            exchange(module, deploy_unit(path, module, float_dtype))
            inner.update(id(m) for m in module.modules())
    modules = dict(model.named_modules())
    for path, chain in followers(model, (nn.Conv2d,), (*FIXED_NORMS, *FOLDED_ACTS)).items():
        conv = modules[path]
        if id(conv) in inner or isinstance(conv, BinaryConv2d):
            continue
        after = [(p, modules[p]) for p in chain if id(modules[p]) not in inner]
        new, taken = replace_conv(path, conv, after, float_dtype)
        exchange(conv, new)
        for p, rest in taken.items():
            exchange(modules[p], rest)
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    for path, module in modules.items():
        if id(module) in inner or id(module) in memo or any(map(is_altered, module.modules())):
            continue
        own = replacement(path, module)
        if own is not None:
            exchange(module, own)
        elif module is classifier and type(module) is nn.Linear and engine_computes(float_dtype):
            exchange(module, linear_layer(path, module, float_dtype))
    twin = copied(model, memo)
    for old, new in replaced:
        for hooks in FORWARD_HOOKS:
            getattr(new, hooks).update(copy.deepcopy(getattr(old, hooks), memo))
            if hasattr(old, 'min_input_size'):
                new.min_input_size = old.min_input_size
    network = keep_for_inference(twin.requires_grad_(False))
    return as_deployed(network) if fuse_blocks else network
