"""Conversion of many nets, and what came of it: a tool of test_sweep.py.

    python tests/sweep.py PATTERN ...        a line of JSON for each net
"""
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn as nn

from timm_el import binarize
from timm_el.layers import BinaryUnit, input_sign_shares


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


def sweep_one(make: Callable[[], nn.Module], size: int = 96, recipe: str = 'el') -> dict[str, Any]:
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
    dead = {mode: sum(not 0.01 < share < 0.99 for share in input_sign_shares(model.train(mode == 'train'), x).values())
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


def main(patterns: list[str]) -> None:
    """Print a line for each net."""
    for name in [n for p in patterns for n in ([p] if p.startswith('tv:') else timm.list_models(p))]:
        try:
            row = sweep_one(lambda name=name: build(name))
            row = {k: v for k, v in row.items() if k not in ('model', 'report')}
        except Exception as e:  # a sweep tells of every net, whatever it does
            row = {'error': f'{type(e).__name__}: {e}'}
        print(json.dumps({'name': name, **row}), flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
