"""Curve and slope by which each gradient estimator replaces Sign, as the quantizers compute them.

timm-el plot estimators
"""
import argparse
import itertools
from typing import TYPE_CHECKING

import torch

from ...quantizers import QUANTIZERS, sign
from . import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = 'curve and slope of each gradient estimator'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this picture."""
    parser.add_argument('--names', nargs='+', choices=[name for name in QUANTIZERS if name], metavar='NAME',
                        default=[name for name in QUANTIZERS if name], help='quantizers (default: all)')


def slope(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a quantizer at x (n,), in the shape of x."""
    x = x.clone().requires_grad_()
    QUANTIZERS[name](x).sum().backward()
    return x.grad


def draw(args: argparse.Namespace) -> 'Figure':
    """Draw curves on the left, slopes on the right."""
    x = torch.arange(-1000, 1001) / 500  # -1 and 1 are among them
    figure, ((curves, slopes),) = new_figure(1, 2, (8, 3))
    curves.plot(x.numpy(), sign(x).numpy(), 'k', lw=1, label='Sign')
    for name, style in zip(args.names, itertools.cycle(['-', '-.', '--', ':'])):  # equal slopes are both seen
        gradient = slope(name, x)
        area = torch.cumulative_trapezoid(gradient, x)
        curves.plot(x[1:].numpy(), (area - area[-1] / 2).numpy(), style, label=name)
        slopes.plot(x.numpy(), gradient.numpy(), style, label=name)
    curves.set_title('the curve whose slope it takes')
    slopes.set_title('gradient')
    for axis in (curves, slopes):
        axis.grid(alpha=0.3)
        axis.legend()
    return figure
