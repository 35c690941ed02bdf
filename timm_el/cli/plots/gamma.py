"""Gammas of all links, net by net: of a fresh net and a trained one, the Elastic-Link paper's Fig. 4.

timm-el plot gamma el_resnet26 el_resnet26@pretrained
"""
import argparse
from typing import TYPE_CHECKING

import torch.nn as nn

from ...experiments.nets import NET_HELP, Net
from ...layers import ElasticLink
from . import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = 'the gamma of every link, before and after training'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this picture."""
    parser.add_argument('nets', nargs='+', metavar='NET', help=NET_HELP)


def gammas(model: nn.Module) -> dict[str, float]:
    """Return the gamma of each link that has one, by the path of its unit."""
    return {
        path.removesuffix('.link'): module.gamma.item() for path, module in model.named_modules()
        if isinstance(module, ElasticLink) and module.gamma is not None}


def draw(args: argparse.Namespace) -> 'Figure':
    """Draw one mark per link and net.

    Raises:
        ValueError: A net has no gamma, or two nets have other links.
    """
    figure, axes = new_figure(1, 1, (8, 4))
    axis, paths = axes[0, 0], None
    for text in args.nets:
        found = gammas(Net.parse(text).build())
        if not found:
            raise ValueError(f'{text}: found no link with a gamma, expected a recipe that has them, such as el')
        if paths is not None and list(found) != paths:
            raise ValueError(f'{text}: its links are not those of {args.nets[0]}; draw nets of one kind')
        paths = list(found)
        axis.plot(range(len(paths)), list(found.values()), 'o', label=text)
    axis.set_xticks(range(len(paths)), paths, rotation=60, ha='right', fontsize=8)
    axis.set_ylabel('gamma')
    axis.grid(axis='y', alpha=0.3)
    axis.legend()
    return figure
