"""Checks of inputs and arguments, and their errors."""
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..quantizers import is_symbolic

WRAPPERS = ('OptimizedModule', 'DistributedDataParallel', 'DataParallel', 'FullyShardedDataParallel')
QUANTIZED = ('torch.ao.', 'torch.nn.quantized', 'torchao.')
# Modules of torch's hooks that compute a tensor from others before each pass, and what makes it a parameter again.
COMPUTING = {
    'torch.nn.utils.prune': "torch.nn.utils.prune.remove(module, '{name}')",
    'torch.nn.utils.weight_norm': "torch.nn.utils.remove_weight_norm(module, '{name}')",
    'torch.nn.utils.spectral_norm': "torch.nn.utils.remove_spectral_norm(module, '{name}')",
}


def check_positive(**counts: int) -> None:
    """Raise ValueError unless all counts, which bear the names of the caller's arguments, are positive integers."""
    for name, value in counts.items():
        try:
            positive = not isinstance(value, bool) and operator.index(value) > 0
        except TypeError:
            positive = False
        if not positive:
            raise ValueError(f'{name}: found {value!r}, expected a positive integer')


def check_float(x: torch.Tensor, where: str) -> None:
    """Raise TypeError unless x is a float tensor. A tracer's proxy has no dtype and passes."""
    if torch.jit.is_scripting():
        if not x.is_floating_point():
            raise TypeError('input: expected a float tensor; convert images with .float() and normalise them')
    elif not is_symbolic(x) and not x.is_floating_point():
        raise TypeError(
            f'{where} input: found dtype {x.dtype}, expected a float tensor; '
            f'convert images with .float() and normalise them')


def check_images(x: torch.Tensor, channels: int, where: str) -> None:
    """Raise TypeError or ValueError unless x is a float tensor (N, channels, H, W)."""
    check_float(x, where)
    if torch.jit.is_scripting():
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError('input: expected a 4-D tensor (N, C, H, W) with the channels of the layer')
    elif not is_symbolic(x) and (x.dim() != 4 or x.shape[1] != channels):
        raise ValueError(
            f'{where} input: found shape {tuple(x.shape)}, expected (N, {channels}, H, W); '
            f'a single image needs a batch axis: x.unsqueeze(0)')


def check_unwrapped(model: nn.Module, verb: str, parts: bool = False) -> None:
    """Raise ValueError if a model is a wrapper around another one: compiled, scripted, or for several processes.

    Args:
        model: Model to change or copy.
        verb: The intention, for the error.
        parts: No module in it may be one either.
    """
    for path, module in model.named_modules() if parts else [('', model)]:
        if isinstance(module, torch.jit.ScriptModule) or type(module).__name__ in WRAPPERS:
            raise ValueError(
                f'{path or "model"}: found a {type(module).__name__}, expected the module that it was made of; '
                f'{verb} that one first, then script, compile or wrap it')


def check_latent(model: nn.Module, verb: str) -> None:
    """Raise ValueError if a model is deployed, so that its binary layers are no layers any more.

    Args:
        model: Model to look into.
        verb: The intention, for the error.
    """
    engine = f'{__package__.partition(".")[0]}.engine.'
    for path, module in model.named_modules():
        if type(module).__module__.startswith(engine):
            raise ValueError(
                f'model: it is deployed (found a {type(module).__name__} at {path or "its root"}), expected the latent '
                f'network that it was made of; {verb} that one')


def check_tensors(module: nn.Module, path: str) -> None:
    """Raise ValueError unless a module's parameters and buffers are plain tensors, and a layer's weight a float one.

    Quantized layers, tensor subclasses (torchao, DTensor, bitsandbytes), sparse tensors and lazy parameters are not.
    Children of the module are not looked at.

    Args:
        module: Any module.
        path: Its path in the model, for the error.
    """
    kind = type(module).__name__
    if type(module).__module__.startswith(QUANTIZED):
        raise ValueError(
            f'{path}: found {kind} of a quantized model, expected a float model; take the model as it was before '
            f'quantization')
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if is_lazy(tensor):
            raise ValueError(
                f'{path}.{name}: the {kind} is not initialised yet; pass a batch through the model first')
        layer = name == 'weight' and isinstance(module, (nn.Conv2d, nn.Linear))
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or layer and not tensor.is_floating_point():
            layout = '' if tensor.layout == torch.strided else f' ({tensor.layout})'
            raise ValueError(
                f'{path}: the {name} of the {kind} is a {type(tensor).__name__} of {tensor.dtype}{layout}, expected a '
                f'plain float tensor; take the model as it was before quantization or distribution')


def check_own_tensors(module: nn.Module, path: str) -> None:
    """Raise ValueError if a module computes a tensor anew in each pass: it is pruned, normed or parametrized.

    Args:
        module: Any module.
        path: Its path in the model, for the error.
    """
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))
        how, remedy = 'parametrized', f"torch.nn.utils.parametrize.remove_parametrizations(module, '{name}')"
    else:
        computing = ((hook, COMPUTING[cls.__module__]) for hook in module._forward_pre_hooks.values()
                     for cls in type(hook).__mro__ if cls.__module__ in COMPUTING)
        hook, remedy = next(computing, (None, ''))
        if hook is None:
            return
        name = hook._tensor_name if hasattr(hook, '_tensor_name') else hook.name
        how, remedy = f'computed in each pass ({type(hook).__name__})', remedy.format(name=name)
    raise ValueError(
        f'{path}: the {name} of the {type(module).__name__} is {how}, expected a parameter; call {remedy} first')


def guard_input(conv: nn.Conv2d, min_size: int) -> RemovableHandle:
    """Make a network's first convolution refuse what its network cannot take, before anything is computed.

    The guard is a forward pre-hook, because the first convolution is the host's own; it also runs in TorchScript.

    Args:
        conv: The convolution that sees the images.
        min_size: Smallest height and width in pixels, the stride of the whole network.

    Returns:
        The hook's handle, to take the guard away again.
    """
    conv.min_input_size = min_size
    return conv.register_forward_pre_hook(_guard_input)


def count_guards(hooks: Mapping[int, Callable[..., Any]]) -> int:
    """Return how many of a module's hooks are guards of the input's size."""
    return sum(hook is _guard_input for hook in hooks.values())


def _guard_input(self, input: tuple[torch.Tensor]) -> None:
    x = input[0]
    check_images(x, self.in_channels, 'images')
    if torch.jit.is_scripting():
        if min(x.shape[2], x.shape[3]) < self.min_input_size:
            raise ValueError('images input: smaller than the stride of the network; resize the images')
    else:
        if not is_symbolic(x) and min(x.shape[2:]) < self.min_input_size:
            raise ValueError(
                f'images input: found {x.shape[2]} x {x.shape[3]} pixels, expected at least '
                f'{self.min_input_size} x {self.min_input_size}, the stride of the network; resize the images')
