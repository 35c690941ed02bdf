"""python -m timm_el sweep [PATTERN ...]: binarize many nets and print what came of it.

For each net: the units made, whether the recipe `host` gives the host's own outputs (largest difference over largest
output), signs that are the same almost everywhere in eval and in training mode, the share of binary MACs at the net's
own image size, among all and among those that are neither first convolution, classifier nor residual downsample, and
the seconds that `binarize` took.
"""
import argparse
import json
import time
from collections import Counter
from typing import Any, Callable, Dict, List

import timm
import torch
import torch.nn as nn

from ..convert.binarize import binarize
from ..layers import BinaryConv2d, BinaryLinear, BinaryUnit


def build(name: str) -> nn.Module:
    """A float net by its timm name, or `tv:` and its torchvision name."""
    if name.startswith('tv:'):
        import torchvision
        return torchvision.models.get_model(name[3:])
    return timm.create_model(name)


def randomise_norms(model: nn.Module) -> None:
    """Give every batch norm statistics and affine parameters that matter."""
    for module in model.modules():
        if getattr(module, 'running_mean', None) is not None:
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)


def first_output(output: Any) -> torch.Tensor:
    """The logits, where a net gives more."""
    return output if isinstance(output, torch.Tensor) else next(iter(
        output.values() if isinstance(output, dict) else output))


def positive_shares(model: nn.Module, x: torch.Tensor) -> List[float]:
    """Share of +1 at each sign."""
    shares: List[float] = []
    handles = [
        m.register_forward_pre_hook(lambda m, args: shares.append((args[0] >= 0).float().mean().item()))
        for m in model.modules() if isinstance(m, (BinaryConv2d, BinaryLinear)) and m.input_quantizer is not None]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return shares


def sweep_one(make: Callable[[], nn.Module], size: int = 96, recipe: str = 'el') -> Dict[str, Any]:
    """Convert a net and look at it.

    Args:
        make: Builds the float net.
        size: Pixels, for nets that do not insist on their own size.
        recipe: Recipe to convert with.

    Returns:
        What the columns of the table say, why layers are not binary, and `model`, the converted net.
    """
    torch.manual_seed(0)
    model = make().eval()
    cfg = getattr(model, 'default_cfg', {})
    if cfg.get('fixed_input_size') or size < min(cfg.get('min_input_size', (0,))[-1:]):
        size = cfg['input_size'][-1]
    x = torch.randn(4, 3, size, size)
    randomise_norms(model)
    with torch.no_grad():
        expected = first_output(model(x))
        found = first_output(binarize(model, 'host')(x))
    model = make()
    start = time.perf_counter()
    binarize(model, recipe)
    seconds = time.perf_counter() - start
    report = model.binarize_report
    dead = {mode: sum(not 0.01 < share < 0.99 for share in positive_shares(model.train(mode == 'train'), x))
            for mode in ('eval', 'train')}
    return {
        'model': model, 'report': report, 'recipe': report.recipe.name, 'size': size,
        'host_error': ((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6)).item(),
        'units': sum(isinstance(m, BinaryUnit) for m in model.modules()), 'binarized': report.count('binarized'),
        'dead': dead, 'macs_share': report.macs_share, 'eligible_macs_share': report.eligible_macs_share,
        'reasons': dict(Counter(row.reason for row in report.rows if row.status != 'binarized')),
        'impossible': dict(Counter(row.reason.split(' at ')[0] for row in report.rows if not row.possible)),
        'seconds': seconds,
    }


def table_row(name: str, row: Dict[str, Any]) -> str:
    """One line of the table."""
    if 'error' in row:
        return f'{name:36} {row["error"].splitlines()[0][:110]}'
    shares = ['-' if row[key] is None else f'{100 * row[key]:.1f}' for key in ('macs_share', 'eligible_macs_share')]
    return (
        f'{name:36} {row["recipe"]:12} {row["units"]:>5} {row["binarized"]:>9} {row["host_error"]:>9.1e} '
        f'{row["dead"]["eval"]:>5} {row["dead"]["train"]:>5} {shares[0]:>6} {shares[1]:>8} {row["seconds"]:>6.2f}')


def main(argv: List[str]) -> None:
    """Sweep and print."""
    from tqdm import tqdm
    parser = argparse.ArgumentParser(
        prog='python -m timm_el sweep', description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('patterns', nargs='*', default=['resnet18'], help="names or patterns of timm's models, tv:NAME")
    parser.add_argument('--recipe', default='el')
    parser.add_argument('--size', type=int, default=96, help='pixels')
    parser.add_argument('--json', action='store_true', help='print data in place of a table')
    args = parser.parse_args(argv)
    names = [n for p in args.patterns for n in ([p] if p.startswith('tv:') else timm.list_models(p))]
    if not names:
        raise ValueError(f'patterns: {args.patterns} match no model of timm')
    rows = []
    for name in tqdm(names):
        try:
            row = sweep_one(lambda name=name: build(name), args.size, args.recipe)
            row = {k: v for k, v in row.items() if k not in ('model', 'report')}
        except Exception as e:  # a sweep tells of every net, whatever it does
            row = {'error': f'{type(e).__name__}: {e}'}
        rows.append({'name': name, **row})
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f'{"model":36} {"recipe":12} {"units":>5} {"binarized":>9} {"host":>9} {"dead":>5} {"train":>5} '
          f'{"MACs %":>6} {"eligible":>8} {"s":>6}')
    for row in rows:
        print(table_row(row['name'], row))
    good = [r for r in rows if 'error' not in r]
    converted = [r for r in good if r['binarized'] > 0]
    print(f'{len(rows)} nets, {len(rows) - len(good)} failed, {len(converted)} with binary layers, of which '
          f'{sum(r["host_error"] < 1e-4 for r in converted)} give the host\'s outputs by recipe host, '
          f'{sum(not any(r["dead"].values()) for r in converted)} have no dead sign, '
          f'{sum((r["eligible_macs_share"] or 0) >= 0.9 for r in converted)} have at least 90 % of the eligible MACs')
    for reason, count in Counter(k for r in good for k in r['impossible']).most_common():
        print(f'could not be done in {count} nets: {reason}')
