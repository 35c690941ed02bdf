"""No sign may be the same everywhere: find those that are, on a batch, and put a norm in front of them."""
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..dry_run import own_input_size, undisturbed
from ..layers import BinaryUnit

__all__ = ['new_norm', 'revive_signs']

ALIVE = (0.03, 0.97)  # share of +1 that leaves room for other images than those of the batch
NEW_NORMS = (nn.GroupNorm, nn.LayerNorm)  # a shift, or a BatchNorm that has yet to see data, makes room for one
NEVER = (0.002, 0.998)  # outside of it, behind a norm, there is nothing to take the sign of


def new_norm(layer: nn.Module, frozen: bool = False) -> nn.Module:
    """A norm for the input of a layer, over all of an image, or over the channels of a pixel for a linear layer.

    It centres whatever comes, in training and in eval mode alike; its bias is the learnable shift of the sign.
    """
    dd = {'device': layer.weight.device, 'dtype': layer.weight.dtype}
    linear = isinstance(layer, nn.Linear)
    norm = nn.LayerNorm(layer.in_features, **dd) if linear else nn.GroupNorm(1, layer.in_channels, **dd)
    return norm.train(layer.training).requires_grad_(not frozen)


def revive_signs(
        model: nn.Module, images: Optional[torch.Tensor] = None) -> Tuple[List[str], List[str], List[str]]:
    """Run images through a converted network and give a norm to each unit whose sign they leave (almost) constant.

    They pass in training and in eval mode, until a pass finds nothing. A new norm acts at once, so that what comes
    after it is judged with it in place.

    Args:
        model: The converted network. It only gets new norms.
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
    batches = [images] if images is not None else _noise(model)
    for layer in units:
        # Real weights spread their outputs about as their signs do. To compute those would be most of the time here.
        layer.quantized_weight = layer.latent_weight
    try:
        for batch in batches:
            try:
                for i, training in enumerate((True, False, True, False)):
                    hopeless.clear()
                    found = _pass(model, batch, training, units, hopeless)
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


def _noise(model: nn.Module) -> List[torch.Tensor]:
    """Batches to try, small images first, then the model's own size. Half of each is white noise, half is smooth."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    size = own_input_size(model)
    generator = torch.Generator().manual_seed(0)
    cfg = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None) or {}
    limits = (max(size),) if cfg.get('fixed_input_size') else (64, 96, 128, max(size))
    batches = []
    for height, width in dict.fromkeys(tuple(min(n, limit) for n in size[1:]) for limit in limits):
        white = torch.randn((2, size[0], height, width), generator=generator)
        smooth = torch.randn((2, size[0], 6, 6), generator=generator)
        smooth = F.interpolate(smooth, size=(height, width), mode='bicubic', align_corners=False)
        batches.append(torch.cat([white, smooth]).to(weight.device, weight.dtype))
    return batches


@torch.no_grad()
def _pass(
        model: nn.Module,
        x: torch.Tensor,
        training: bool,
        units: Dict[nn.Module, Tuple[str, BinaryUnit]],
        hopeless: List[str],
) -> List[str]:
    """One batch in one mode; gives the units that got a norm. Modes and buffers are as before afterwards."""
    revived: List[str] = []

    def judge(layer: nn.Module, args: Tuple[torch.Tensor]) -> Optional[Tuple[torch.Tensor]]:
        shares = [(half >= 0).to(torch.float32).mean().item() for half in args[0].chunk(2)]
        if all(ALIVE[0] < share < ALIVE[1] for share in shares):
            return None
        path, unit = units[layer]
        if isinstance(unit.pre, NEW_NORMS):
            if not all(NEVER[0] <= share <= NEVER[1] for share in shares):
                hopeless.append(path)
            return None
        unit.pre = new_norm(layer, not layer.weight.requires_grad)
        revived.append(path)
        return (unit.pre(args[0]),)

    with undisturbed(model), torch.random.fork_rng(devices=[x.device] if x.device.type == 'cuda' else []):
        for layer in units:
            layer.register_forward_pre_hook(judge)
        model.train(training)(x)
    return revived
