"""Dead signs: a search on a batch of images for units whose sign would be the same everywhere."""
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..dry_run import own_input_size, undisturbed
from ..layers import BinaryUnit, real_weights
from .build_unit import new_norm

ALIVE = (0.03, 0.97)  # share of +1 that leaves room for other images than those of the batch
NEW_NORMS = (nn.GroupNorm, nn.LayerNorm)  # a shift, or a BatchNorm that has yet to see data, makes room for one
NEVER = (0.002, 0.998)  # outside of it, behind a norm, there is nothing to take the sign of


@dataclass
class Verdict:
    """Judgement of the signs of a network by a batch of images.

    Args:
        revived: Paths of units that need a norm in front of their sign.
        constant: Paths of units that no norm can help, because their input does not vary.
        notes: Remarks for the report.
    """
    revived: list[str] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def judge_signs(model: nn.Module, images: torch.Tensor | None = None) -> Verdict:
    """Run images through a converted network and judge each sign by its share of +1.

    Passes alternate between training and eval mode, until one finds nothing. A dead sign gets a norm for the rest of
    the passes, so that later signs are judged with the norm in place. The network is as before afterwards.

    Args:
        model: The converted network.
        images: The batch (N, C, H, W); noise of the model's own size, or less where that will do, if None.
    """
    units = {m.conv: (path, m) for path, m in model.named_modules()
             if isinstance(m, BinaryUnit) and getattr(m.conv, 'input_quantizer', None) is not None}
    if not units or next(iter(units)).weight.device.type == 'meta':
        return Verdict()
    batches = [images] if images is not None else _noise(model)
    for batch in batches:
        try:
            # Real weights spread their outputs about as their signs do, which would take most of the time here.
            with real_weights(model), _own_pre(unit for _, unit in units.values()):
                return _judge_on(model, batch, units)
        except Exception as e:  # the network may want other images
            error = f'{type(e).__name__}: {e}'
    return Verdict(notes=[
        f'the signs could not be checked on a batch of shape {tuple(batches[-1].shape)} ({error}); pass example_input'])


@contextmanager
def _own_pre(units: Iterable[BinaryUnit]) -> Iterator[None]:
    """Put the modules in front of the units' signs back afterwards."""
    before = [(unit, unit.pre) for unit in units]
    try:
        yield
    finally:
        for unit, pre in before:
            unit.pre = pre


def _judge_on(
        model: nn.Module, batch: torch.Tensor, units: dict[nn.Module, tuple[str, BinaryUnit]]) -> Verdict:
    """Return the verdict of one batch of images (N, C, H, W).

    Raises:
        Exception: Whatever the network raises for it.
    """
    revived: list[str] = []
    constant: list[str] = []
    for i, training in enumerate((True, False, True, False)):
        constant.clear()
        found = _pass(model, batch, training, units, constant)
        revived += found
        if i and not found:
            break
    return Verdict([path for path in revived if path not in constant], constant)


def _noise(model: nn.Module) -> list[torch.Tensor]:
    """Return batches to try, small images first, then the model's own size; half is white noise, half is smooth."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    size = own_input_size(model)
    generator = torch.Generator('cpu').manual_seed(0)
    cfg = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None) or {}
    limits = (max(size),) if cfg.get('fixed_input_size') else (64, 96, 128, max(size))
    batches = []
    for height, width in dict.fromkeys(tuple(min(n, limit) for n in size[1:]) for limit in limits):
        white = torch.randn((2, size[0], height, width), generator=generator, device='cpu')
        smooth = torch.randn((2, size[0], 6, 6), generator=generator, device='cpu')
        smooth = F.interpolate(smooth, size=(height, width), mode='bicubic', align_corners=False)
        batches.append(torch.cat([white, smooth]).to(weight.device, weight.dtype))
    return batches


@torch.no_grad()
def _pass(
        model: nn.Module, x: torch.Tensor, training: bool, units: dict[nn.Module, tuple[str, BinaryUnit]],
        constant: list[str]) -> list[str]:
    """Run one batch in one mode and return the units that got a norm. Modes and buffers are as before afterwards."""
    revived: list[str] = []

    def judge(layer: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        shares = [(half >= 0).to(torch.float32).mean().item() for half in args[0].chunk(2)]
        if all(ALIVE[0] < share < ALIVE[1] for share in shares):
            return None
        path, unit = units[layer]
        if isinstance(unit.pre, NEW_NORMS):
            if not all(NEVER[0] <= share <= NEVER[1] for share in shares):
                constant.append(path)
            return None
        unit.pre = new_norm(layer, not layer.weight.requires_grad)
        revived.append(path)
        return (unit.pre(args[0]),)

    with undisturbed(model), torch.random.fork_rng(devices=[x.device] if x.device.type == 'cuda' else []):
        for layer in units:
            layer.register_forward_pre_hook(judge)
        model.train(training)(x)
    return revived
