"""Benchmark of inference: a deployed model beside its float host, its latent original and the engines of others."""
import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from .. import engine
from ..dry_run import own_input_size, run_layers
from ..engine import deploy
from ..models.factory import create
from .hosts import host_name, runner, settle_norms
from .layer_times import layer_table
from .machine import describe, emulated_class
from .peers import PACKAGES, PEERS, Setting, build_all, choose, torch_kernels
from .processor_classes import ProcessorClass
from .turns import Spread, ratios, take_turns


@dataclass(frozen=True)
class Contestant:
    """One way to compute a net, that takes part in the rounds.

    Args:
        run: One inference; returns the logits.
        of: Name of the model that it computes, with a recipe if one is given.
        original: Logits of the same net in torch.
        kernels: Kernels or instruction sets that it uses.
        note: Remark for the table.
    """
    run: Callable[[], Any]
    of: str
    original: torch.Tensor
    kernels: str
    note: str = ''

    def difference(self) -> tuple[float, float]:
        """Return the largest difference of a logit from the original's, and the top-1 agreement, 0 to 1.

        The difference is relative to the largest logit.
        """
        found = torch.as_tensor(self.run()).float()
        difference = (found - self.original).abs().max() / self.original.abs().max()
        return difference.item(), (found.argmax(1) == self.original.argmax(1)).float().mean().item()


def check_engine(allow_reference: bool) -> None:
    """Raise RuntimeError if a deployed time would be one of the reference.

    Raises:
        RuntimeError: The native path is not active and `allow_reference` is False.
    """
    info = engine.info()
    if not info['native'] and not allow_reference:
        raise RuntimeError(
            f'deploy: found the backend {info["body"]!r} ({info["reason"]}), expected a native one: a time of the '
            f'reference says nothing about a deployed model; make the native path work, or pass --allow-reference')


def measure_inference(
        model: str,
        host: str | None = None,
        recipe: str | None = None,
        batch: int = 1,
        size: int | None = None,
        pairs: int = 21,
        warmup: int = 2,
        peers: str = 'all',
        also: Sequence[str] = (),
        float_dtypes: Sequence[str] = (),
        processor_class: str | None = None,
        allow_reference: bool = False,
) -> dict[str, Any]:
    """Measure all contestants in turns, and the layers of the deployed model, and return the result as plain data.

    Args:
        model: Name of a timm model.
        host: The float net to compare with; None: that of a registered model.
        recipe: Binarize the model with this recipe; None: its own.
        batch: Images.
        size: Pixels; None: the model's own.
        pairs: Rounds that count.
        warmup: Rounds before them.
        peers: 'all', 'none', or names separated by commas.
        also: Recipes to deploy the net with too.
        float_dtypes: Names of torch dtypes: deploy once more with float parts of each.
        processor_class: Name of the class of processors that this one runs as, as for `emulated_class`.
        allow_reference: Report times of the plain torch reference as deployed.

    Raises:
        RuntimeError: The native path of the engine is not active, and that is not allowed.
        ValueError: No float host is known, or a name of a recipe or peer is not, or `emulated_class` raises it.
    """
    host_of, chosen = host_name(model, host, recipe), choose(peers)
    emulated = emulated_class(processor_class)
    check_engine(allow_reference)
    torch.manual_seed(0)
    latent = create(model, recipe)
    channels, *own = own_input_size(latent)
    pixels = [size, size] if size else own
    x = torch.randn(batch, channels, *pixels)
    norm_batch = torch.randn(4, channels, *pixels)
    binarized = _Net.settled(latent, model if recipe is None else f'{model}, {recipe}', x, norm_batch)
    float_host = _Net.settled(timm.create_model(host_of), host_of, x, norm_batch)
    others = {other: _Net.settled(create(model, other), f'{model}, {other}', x, norm_batch) for other in also}
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(float_host.net, latent, x, torch.get_num_threads(), Path(folder), emulated)
        built, absent = build_all(chosen, setting)
        contestants = _own_contestants(float_host, binarized, others, x, float_dtypes)
        for peer, ready in built.items():
            contestants[peer] = (binarized if PEERS[peer].binary else float_host).contestant(*ready)
        bases = ['deployed', *(f'deployed {dtype}' for dtype in float_dtypes)]
        rows = _race(contestants, bases, pairs, warmup, emulated)
    alone = deploy(copy.deepcopy(latent), fuse_blocks=False)  # each unit an operator of its own
    table = layer_table(alone, latent, x, pairs)
    return {
        'model': model, 'recipe': recipe, 'host': host_of, 'batch': batch, 'size': list(pixels),
        'pairs': pairs, 'machine': describe(PACKAGES), 'emulated': emulated and emulated.name, 'engine': engine.info(),
        'contestants': rows, 'absent': absent, **table,
        'binary': _binary_rates(table['kinds'], alone, latent, x),
    }


@dataclass(frozen=True)
class _Net:
    """A net whose norms suit its values, its name in the table, and its logits (N, classes) in torch."""
    net: nn.Module
    name: str
    logits: torch.Tensor

    @classmethod
    def settled(cls, net: nn.Module, name: str, x: torch.Tensor, norm_batch: torch.Tensor) -> '_Net':
        """Settle the norms of a net on one batch of images, and compute its logits of another (both N, C, H, W)."""
        net = settle_norms(net, norm_batch)
        return cls(net, name, runner(net, x)().clone())

    def contestant(self, run: Callable[[], Any], kernels: str, note: str = '') -> Contestant:
        """Return a contestant that computes this net with kernels of these names."""
        return Contestant(run, self.name, self.logits, kernels, note)


def _own_contestants(
        host: _Net, latent: _Net, others: dict[str, _Net], x: torch.Tensor, float_dtypes: Sequence[str],
) -> dict[str, Contestant]:
    """Return the contestants that run in torch and in this package's engine on images (N, C, H, W), by name."""
    def deployed(net: _Net, **options: Any) -> Contestant:
        return net.contestant(runner(deploy(copy.deepcopy(net.net), **options), x), engine.info()['body'])

    eager = torch_kernels('eager')
    channels_last = copy.deepcopy(host.net).to(memory_format=torch.channels_last)
    contestants = {
        'host': host.contestant(runner(host.net, x), eager),
        'host channels_last': host.contestant(runner(channels_last, x), eager),
        'latent': latent.contestant(runner(latent.net, x), eager),
        'deployed': deployed(latent),
    }
    for dtype in float_dtypes:
        contestants[f'deployed {dtype}'] = deployed(latent, float_dtype=getattr(torch, dtype))
    for name, net in others.items():
        contestants[f'deployed {name}'] = deployed(net)
    return contestants


def _race(
        contestants: dict[str, Contestant], bases: Sequence[str], rounds: int, warmup: int,
        emulated: ProcessorClass | None,
) -> list[dict[str, Any]]:
    """Return a row for each contestant, with the ratios of its times to those of each base within a round.

    'capped' says whether the emulated class can run its kernels; None if no class is emulated.
    """
    differences = {name: contestant.difference() for name, contestant in contestants.items()}
    seconds = take_turns({name: c.run for name, c in contestants.items()}, rounds, warmup, settle=True)
    to_base = {base: ratios(seconds, base) for base in bases}
    rows = []
    for name, contestant in contestants.items():
        ms = Spread.of([1e3 * s for s in seconds[name]])
        rows.append({
            'name': name, 'of': contestant.of, 'ms': ms._asdict(),
            'images_per_s': 1e3 * len(contestant.original) / ms.median,
            'ratios': {base: ratio[name]._asdict() for base, ratio in to_base.items()},
            'difference': differences[name][0], 'top1_agreement': differences[name][1],
            'kernels': contestant.kernels, 'capped': emulated and emulated.can_run(contestant.kernels),
            'note': contestant.note})
    return rows


def _binary_rates(
        kinds: dict[str, dict[str, float]], alone: nn.Module, latent: nn.Module, x: torch.Tensor,
) -> dict[str, float] | None:
    """Return the rates of the binary layers and of the chip, in binary MAC/s of one core; None without binary layers.

    'macs_per_s' is the rate of whole units: signs, packing, products, scale and shift and link together.
    'gemm_macs_per_s' is that of the products of all full and grouped convolutions alone, on data in cache.
    'chip_macs_per_s' is that of xor, popcount and add (or of the look-ups of an instruction set without popcount) on
    registers.
    """
    binary = [kinds[kind] for kind in ('binary conv', 'binary linear') if kind in kinds]
    if not binary:
        return None
    macs, ms = (sum(total[key] for total in binary) for key in ('binary_macs', 'ms'))
    rates = {'macs': macs, 'ms': ms, 'macs_per_s': macs / (ms * 1e-3 * torch.get_num_threads())}
    if not engine.info()['native']:
        return rates
    chip = max(engine.chip_rate() for _ in range(5))
    gemm = _gemm_rate(alone, latent, x)
    rates.update({'chip_macs_per_s': chip, 'share_of_chip': rates['macs_per_s'] / chip})
    if gemm is not None:
        rates.update({'gemm_macs_per_s': gemm, 'gemm_share_of_chip': gemm / chip})
    return rates


def _gemm_rate(alone: nn.Module, latent: nn.Module, x: torch.Tensor) -> float | None:
    """Return the binary MAC/s of the kernel over all full and grouped binary convolutions of a net, one by one."""
    runs = run_layers(latent, tuple(x.shape[1:]))
    macs = seconds = 0.
    for path, unit in alone.named_modules():
        if not isinstance(unit, engine.FusedUnit) or unit.spec.is_depthwise:
            continue
        latent_path = path.removesuffix('.core').removesuffix('.core')  # of a unit of several operators
        spec, out = unit.spec, runs[f'{latent_path}.conv'].output
        pixels = len(x) * math.prod(out[1:-1] if unit.is_linear else out[2:])
        channels, outputs = spec.c_in // spec.groups, spec.c_out // spec.groups
        words = spec.taps * -(-channels // 64)
        rate = engine.count_rate(words, outputs, pixels)
        macs += spec.groups * spec.taps * channels * outputs * pixels
        seconds += spec.groups * 64 * words * outputs * pixels / rate
    return macs / seconds if macs else None
