"""Dry run of a network for one image: order, shapes and operations of its layers; nothing is computed."""
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
WEIGHTED = (*CONVOLUTIONS, nn.Linear)
HOOKS = ('_forward_pre_hooks', '_forward_hooks', '_backward_pre_hooks', '_backward_hooks')


@dataclass(frozen=True)
class LayerRun:
    """Run of one layer for one image.

    Args:
        input: Shape of its (first) input, batch axis included.
        output: Shape of its (last) output.
        calls: Number of its runs.
        macs: Multiply-accumulates of all runs; of other modules than convolutions and linear layers, output values.
    """
    input: tuple[int, ...]
    output: tuple[int, ...]
    calls: int
    macs: int


def run_layers(
        model: nn.Module, input_size: tuple[int, int, int], extra: Iterable[str] = (), compute: bool = False,
) -> dict[str, LayerRun]:
    """Run a copy of a network, in eval mode, on the meta device, where shapes are computed and values are not.

    Args:
        model: Any network; it is not changed.
        input_size: (channels, height, width).
        extra: Paths of other modules to record than convolutions and linear layers.
        compute: Compute it, on zeros, if it does not run on the meta device (where it looks at values).

    Returns:
        A `LayerRun` for each layer that ran, by path, in the order of their first calls.

    Raises:
        Exception: Whatever the network raises for this input.
    """
    with undisturbed(model):
        try:
            return _record(meta_copy(model), 'meta', input_size, set(extra))
        except Exception:
            if not compute:
                raise
        return _record(stand_in(model), next(model.parameters()).device, input_size, set(extra))


def _record(
        model: nn.Module, device: str | torch.device, input_size: tuple[int, int, int], extra: set[str],
) -> dict[str, LayerRun]:
    runs: dict[str, LayerRun] = {}

    def record(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        path = paths[module]
        old = runs.get(path, LayerRun(tuple(args[0].shape) if args else (), (), 0, 0))
        runs[path] = LayerRun(
            old.input, tuple(output.shape), old.calls + 1, old.macs + _macs(module, args, output))

    paths = {module: path for path, module in model.named_modules()}
    handles = [module.register_forward_hook(record) for module, path in paths.items()
               if isinstance(module, WEIGHTED) or path in extra]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros((1, *input_size), device=device, dtype=_float_dtype(model)))
    finally:
        for handle in handles:
            handle.remove()
    return runs


def _macs(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> int:
    if isinstance(module, TRANSPOSED):
        return args[0].numel() * module.weight[0].numel()
    if isinstance(module, CONVOLUTIONS):
        return output.numel() * module.weight[0].numel()
    return output.numel() * (module.in_features if isinstance(module, nn.Linear) else 1)


def own_input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return the (channels, height, width) that a model was made for; 224 pixels if it does not say."""
    cfg = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None) or {}
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    size = cfg.get('input_size', (first, 224, 224))
    return (getattr(model, 'in_chans', size[0]), *size[1:])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Take all hooks off while a model is run, traced or copied, and put attributes and buffers back afterwards.

    A user's hooks must not see meta tensors, fx's proxies or noise. Hooks of all modules
    (`torch.nn.modules.module.register_module_forward_hook`) are off too. Parameters and submodules are not put back.
    """
    attributes = [
        (module, dict(vars(module))) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    everywhere = {f'_global{name}': getattr(nn.modules.module, f'_global{name}') for name in HOOKS}
    try:
        for module, values in attributes:
            vars(module).update((name, OrderedDict()) for name in HOOKS if name in values)
        for name in everywhere:
            setattr(nn.modules.module, name, OrderedDict())
        yield
    finally:
        for name, hooks in everywhere.items():
            setattr(nn.modules.module, name, hooks)
        for module, values in attributes:
            registered = {*module._modules, *module._parameters, *module._buffers}  # in place of a None
            vars(module).clear()
            vars(module).update((name, value) for name, value in values.items() if name not in registered)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model on the meta device, without its hooks, made without copying a tensor."""
    def on_meta(tensor: torch.Tensor) -> torch.Tensor:
        twin = torch.empty_like(tensor, device='meta', requires_grad=False)
        return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin

    return _copy(model, on_meta).to('meta')


def stand_in(model: nn.Module) -> nn.Module:
    """Return a copy of the model that shares its parameters but not its hooks, or the model itself."""
    try:
        return _copy(model, lambda tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone())
    except Exception:  # whatever a foreign attribute raises
        return model


def _copy(model: nn.Module, twin_of: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Return a deep copy of a model without hooks, with other tensors in its parameters, buffers and attributes."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    tensors = [*model.parameters(), *model.buffers(), *(v for v in attributes if isinstance(v, torch.Tensor))]
    memo: dict[int, Any] = {id(tensor): twin_of(tensor) for tensor in tensors}
    with undisturbed(model):
        return copy.deepcopy(model, memo)


def _float_dtype(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
