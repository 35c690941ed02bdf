"""No sign may be the same everywhere: find those that are, on a batch, and put a norm in front of them."""
import functools
from typing import Dict, List, Optional, Set, Tuple

import torch
import torch.nn as nn

from .layers import BinaryUnit
from .shapes import own_input_size

__all__ = ['new_norm', 'revive_signs']

ALIVE = (0.05, 0.95)  # share of +1 that leaves room for other images than those of the batch
NEVER = (0.002, 0.998)  # outside of it, behind a norm, there is nothing to take the sign of


def new_norm(layer: nn.Module, frozen: bool = False) -> nn.Module:
    """A norm for the input of a layer: batch norm for images, layer norm for pixels with channels last."""
    dd = {'device': layer.weight.device, 'dtype': layer.weight.dtype}
    norm = nn.LayerNorm(layer.in_features, **dd) if isinstance(layer, nn.Linear) else nn.BatchNorm2d(
        layer.in_channels, **dd)
    return norm.train(layer.training).requires_grad_(not frozen)


def revive_signs(
        model: nn.Module, images: Optional[torch.Tensor] = None) -> Tuple[List[str], List[str], List[str]]:
    """Run a batch through a converted network and give a norm to each unit whose sign it leaves (almost) constant.

    The batch passes in training and in eval mode, until a pass finds nothing. A new norm acts at once, so that what
    comes after it is judged with it in place; batch norms in front of signs take the statistics of the batch for eval
    mode.

    Args:
        model: The converted network. Only its new norms are changed.
        images: The batch; noise of the model's own size, or less where that will do, if None.

    Returns:
        Paths of the units that got a norm, of those that no norm can help (their input does not vary), and what to tell
        the user.
    """
    units = {m.conv: (path, m) for path, m in model.named_modules()
             if isinstance(m, BinaryUnit) and getattr(m.conv, 'input_quantizer', None) is not None}
    if not units or next(iter(units)).weight.device.type == 'meta':
        return [], [], []
    revived: List[str] = []
    hopeless: List[str] = []
    centred: Set[nn.Module] = set()
    batches = [images] if images is not None else _noise(model)
    for layer in units:  # most of the time here would go into weights, which do not change between the passes
        layer.quantized_weight = functools.cache(functools.partial(_weight, layer))
    try:
        for batch in batches:
            try:
                for i, training in enumerate((True, False, True, False)):
                    hopeless.clear()
                    found = _pass(model, batch, training, units, centred, hopeless)
                    revived += found
                    if i and not found:
                        break
                return [path for path in revived if path not in hopeless], hopeless, []
            except Exception as e:  # the network may want other images
                error = f'{type(e).__name__}: {e}'
    finally:
        for layer in units:
            del layer.quantized_weight
    return revived, [], [
        f'the signs could not be checked on a batch of shape {tuple(batches[-1].shape)} ({error}); pass example_input']


@torch.no_grad()
def _weight(layer: nn.Module) -> torch.Tensor:
    """`layer.quantized_weight()`, but for -0.0 and the rounding of alpha, in two passes over memory."""
    latent = layer.latent_weight()
    if layer.weight_quantizer is None:
        return latent
    shape = [-1] + [1] * (latent.dim() - 1)
    alpha = torch.linalg.vector_norm(latent.flatten(1), 1, dim=1) / latent[0].numel()
    return torch.copysign(alpha.reshape(shape) if layer.scale_weight else torch.ones_like(alpha).reshape(shape), latent)


def _noise(model: nn.Module) -> List[torch.Tensor]:
    """Batches to try: small images first, then the model's own size."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    size = own_input_size(model)
    generator = torch.Generator().manual_seed(0)
    cfg = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None) or {}
    limits = (max(size),) if cfg.get('fixed_input_size') else (64, 96, 128, max(size))
    sizes = [(size[0], *(min(n, limit) for n in size[1:])) for limit in limits]
    return [torch.randn((2, *s), generator=generator).to(weight.device, weight.dtype) for s in dict.fromkeys(sizes)]


@torch.no_grad()
def _pass(
        model: nn.Module,
        x: torch.Tensor,
        training: bool,
        units: Dict[nn.Module, Tuple[str, BinaryUnit]],
        centred: Set[nn.Module],
        hopeless: List[str],
) -> List[str]:
    """One batch in one mode; gives the units that got a norm. Modes and statistics are as before afterwards."""
    revived: List[str] = []

    def judge(layer: nn.Module, args: Tuple[torch.Tensor]) -> Optional[Tuple[torch.Tensor]]:
        share = (args[0] >= 0).to(torch.float32).mean().item()
        if ALIVE[0] < share < ALIVE[1]:
            return None
        path, unit = units[layer]
        if unit.pre is not None:
            if not NEVER[0] <= share <= NEVER[1]:
                hopeless.append(path)
            return None
        unit.pre = new_norm(layer, not layer.weight.requires_grad)
        modes[unit.pre] = layer.training
        revived.append(path)
        handles.append(unit.pre.register_forward_pre_hook(centre))
        unit.pre.train(training)
        return (unit.pre(args[0]),)

    def centre(norm: nn.Module, args: Tuple[torch.Tensor]) -> None:
        if isinstance(norm, nn.BatchNorm2d):
            if not training or norm not in centred:
                norm.running_mean.copy_(args[0].mean((0, 2, 3)))
                norm.running_var.copy_(args[0].var((0, 2, 3)))
            centred.add(norm)

    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    handles = [layer.register_forward_pre_hook(judge) for layer in units]
    handles += [unit.pre.register_forward_pre_hook(centre) for _, unit in units.values() if unit.pre is not None]
    try:
        with torch.random.fork_rng(devices=[x.device] if x.device.type == 'cuda' else []):
            model.train(training)
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)
    return revived
