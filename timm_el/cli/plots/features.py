"""Feature maps of the same channels in several nets on one photograph, the Elastic-Link paper's Fig. 1.

timm-el plot features resnet26@float.pth.tar el_resnet26:bireal@bireal.pth.tar el_resnet26@el.pth.tar

Nets that were not trained show little. Without --image, the photograph is one of scikit-learn's.
"""
import argparse
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from ...experiments.nets import NET_HELP, Net
from ...experiments.photos import SAMPLES, prepare, read
from . import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = 'feature maps of the same channels in several nets on one photograph'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this picture."""
    parser.add_argument('nets', nargs='+', metavar='NET', help=NET_HELP)
    parser.add_argument('--image', default=SAMPLES[0], help='path of an image, or one of ' + ', '.join(SAMPLES))
    parser.add_argument('--layer', default='layer1', help='path of a module in the nets (default: layer1)')
    parser.add_argument('--channels', nargs='+', type=int, default=[0, 1, 2, 3, 4, 5])
    parser.add_argument('--img-size', type=int, default=224, help='pixels (default: 224)')


def feature_maps(model: nn.Module, layer: str, x: torch.Tensor) -> torch.Tensor:
    """Return the output (N, C, H', W') of a module of a net for images x (N, 3, H, W).

    Raises:
        ValueError: The net has no module of this name.
    """
    if layer not in dict(model.named_modules()):
        known = ', '.join(name for name, _ in model.named_children())
        raise ValueError(f'layer: {type(model).__name__} has no module {layer!r}, expected a path such as {known}')
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    return kept[0]


def draw(args: argparse.Namespace) -> 'Figure':
    """Draw one row per net: the photograph as the net sees it, then its channels.

    Raises:
        ValueError: A net has no such layer, or not so many channels.
    """
    image = read(args.image)
    columns = 1 + len(args.channels)
    figure, axes = new_figure(len(args.nets), columns, (1.4 * columns, 1.5 * len(args.nets)))
    for channel, axis in zip(args.channels, axes[0, 1:]):
        axis.set_title(f'channel {channel}', fontsize=8)
    for row, text in zip(axes, args.nets):
        net = Net.parse(text)
        model = net.build()
        x = prepare(model, image, args.img_size)
        maps = feature_maps(model, args.layer, x[None])[0].numpy()
        if not 0 <= min(args.channels) <= max(args.channels) < len(maps):
            raise ValueError(
                f'channels: found {args.channels}, expected 0 to {len(maps) - 1} at {args.layer} of {text}')
        row[0].imshow(((x - x.min()) / (x.max() - x.min())).permute(1, 2, 0).numpy())
        row[0].set_ylabel(net.label, fontsize=8)
        for axis, channel in zip(row[1:], args.channels):
            axis.imshow(maps[channel], cmap='gray', interpolation='nearest')
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    return figure
