"""Top-1 against the size of the file and against latency, measured in this call: batch 1, nets taking turns.

timm-el plot tradeoff el_resnet26@pretrained el_resnet50@pretrained resnet26@float.pth.tar --data-dir imagenette

A binarized net is deployed and its size is that of its packed file, a float net stays as it is. Top-1 is measured on
the images of --data-dir, else it is that of a run's last epoch, or of the model card beside the weights.
"""
import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...bench.inference import runner
from ...bench.machine import cpu_name
from ...bench.turns import Spread, take_turns
from ...dry_run import own_input_size
from ...engine import deploy
from ...experiments.nets import NET_HELP, Net
from ...weights.files import save_packed
from ...weights.packed import binary_weight_layers
from . import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = 'accuracy against size and latency'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this picture."""
    parser.add_argument('nets', nargs='+', metavar='NET', help=NET_HELP)
    parser.add_argument('--data-dir', metavar='D', help='measure top-1 on these images, as `eval` does')
    parser.add_argument('--img-size', type=int, help="pixels (default: each model's own)")
    parser.add_argument('--rounds', type=int, default=21, help='default: 21')
    parser.add_argument('--threads', type=int, help="default: torch's own choice")


def size_mb(model: torch.nn.Module) -> float:
    """Return the megabytes to ship: the packed file of a binarized net, the tensors of a float one."""
    if not binary_weight_layers(model):
        return sum(t.nbytes for t in model.state_dict().values()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.safetensors'
        save_packed(model, path)
        return path.stat().st_size / 1e6


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return label, top-1 in percent, megabytes and milliseconds of each net.

    Raises:
        ValueError: No top-1 is known of a net.
    """
    rows, runs = [], {}
    for text in args.nets:
        net = Net.parse(text)
        model = net.build()
        binary = bool(binary_weight_layers(model))
        fast = deploy(model) if binary else model
        channels, *own = own_input_size(model)
        size = [args.img_size] * 2 if args.img_size else own
        if args.data_dir:
            from ...experiments.evaluate import count_right, load_images
            images = load_images(model, args.data_dir, img_size=args.img_size)
            top1 = count_right({text: fast}, images)['forms'][text]['top1']
        else:
            top1 = net.recorded(model).get('top1')
            if top1 is None:
                raise ValueError(f'{text}: no top-1 is recorded beside its weights; add --data-dir')
            if size != own:
                raise ValueError(f'{text}: its top-1 was recorded at {own[-1]} px, not at {size[-1]}; add --data-dir')
        runs[text] = runner(fast, torch.randn(1, channels, *size))
        rows.append({'text': text, 'label': net.label + (' (deployed)' if binary else ''), 'top1': top1,
                     'mb': size_mb(model)})
    seconds = take_turns(runs, args.rounds, settle=True)
    return [{**row, 'ms': 1e3 * Spread.of(seconds[row['text']]).median} for row in rows]


def draw(args: argparse.Namespace) -> 'Figure':
    """Draw size on the left, latency on the right."""
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = measure(args)
    figure, axes = new_figure(1, 2, (10, 3), sharey=True)
    sizes, times = axes[0]
    for row in rows:
        for axis, key in ((sizes, 'mb'), (times, 'ms')):
            axis.plot(row[key], row['top1'], 'o', label=f'{row["label"]}: {row["mb"]:.1f} MB, {row["ms"]:.2f} ms')
    sizes.set_xlabel('size, MB')
    sizes.set_ylabel('top-1, %')
    times.set_xlabel('latency of one image, ms')
    figure.suptitle(f'{cpu_name()}, {torch.get_num_threads()} threads, median of {args.rounds} rounds', fontsize=9)
    for axis in (sizes, times):
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    figure.legend(handles=times.get_lines(), loc='outside right center', fontsize=8)
    return figure
