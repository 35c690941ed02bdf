"""What runs in a network for one image: order, shapes and operations of its layers; nothing is computed."""
import copy
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Optional, Set, Tuple, Union

import torch
import torch.nn as nn

__all__ = ['LayerRun', 'run_layers', 'own_input_size', 'meta_copy', 'WEIGHTED']

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
WEIGHTED = (*CONVOLUTIONS, nn.Linear)


@dataclass(frozen=True)
class LayerRun:
    """How one layer ran for one image.

    Args:
        input: Shape of its (first) input, batch axis included.
        output: Shape of its (last) output.
        calls: How often it ran.
        macs: Multiply-accumulates of all calls; values of the output for what is neither convolution nor linear layer.
    """
    input: Tuple[int, ...]
    output: Tuple[int, ...]
    calls: int
    macs: int


def run_layers(
        model: nn.Module,
        input_size: Tuple[int, int, int],
        extra: Iterable[str] = (),
        compute: bool = False,
) -> Dict[str, LayerRun]:
    """Run a copy of a network, in eval mode, on the meta device, where shapes are computed and values are not.

    Args:
        model: Any network; it is not changed.
        input_size: (channels, height, width).
        extra: Paths of other modules to record than convolutions and linear layers.
        compute: Run the model itself, on zeros, if it does not run on the meta device (where it looks at values).

    Returns:
        A `LayerRun` for each layer that ran, by path, in the order of their first calls.

    Raises:
        Exception: Whatever the network raises for this input.
    """
    try:
        return _record(meta_copy(model), 'meta', input_size, set(extra))
    except Exception:
        if not compute:
            raise
    modes = {module: module.training for module in model.modules()}
    try:
        return _record(model, next(model.parameters()).device, input_size, set(extra))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _record(
        model: nn.Module, device: Union[str, torch.device], input_size: Tuple[int, int, int], extra: Set[str],
) -> Dict[str, LayerRun]:
    runs: Dict[str, LayerRun] = {}

    def record(module: nn.Module, args: Tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
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


def _macs(module: nn.Module, args: Tuple[torch.Tensor, ...], output: torch.Tensor) -> int:
    if isinstance(module, TRANSPOSED):
        return args[0].numel() * module.weight[0].numel()
    if isinstance(module, CONVOLUTIONS):
        return output.numel() * module.weight[0].numel()
    return output.numel() * (module.in_features if isinstance(module, nn.Linear) else 1)


def own_input_size(model: nn.Module) -> Tuple[int, int, int]:
    """(channels, height, width) that a model was made for; 224 pixels if it does not say."""
    cfg = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None) or {}
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    size = cfg.get('input_size', (first, 224, 224))
    return (getattr(model, 'in_chans', size[0]), *size[1:])


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, made without copying a tensor."""
    memo: Dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        twin = torch.empty_like(tensor, device='meta')
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    twin = copy.deepcopy(model, memo).to('meta')
    for module in twin.modules():  # whatever the host's hooks do, they shall not do it here
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


def _float_dtype(model: nn.Module) -> Optional[torch.dtype]:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
