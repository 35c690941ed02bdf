"""Loss and top-1 by epoch, from the summary.csv that timm's train.py writes.

python -m timm_el plot training RUN/summary.csv [TWIN/summary.csv ...]
"""
import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs import read_summary
from . import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = 'loss and top-1 by epoch, from summary.csv'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this picture."""
    parser.add_argument('files', nargs='+', type=Path, metavar='SUMMARY.CSV', help='each is named after its folder')


def draw(args: argparse.Namespace) -> 'Figure':
    """Losses on the left, top-1 on the right."""
    figure, ((losses, top1),) = new_figure(1, 2, (8, 3))
    for i, file in enumerate(args.files):
        run, name, color = read_summary(file), file.resolve().parent.name, f'C{i}'
        losses.plot(run['epoch'], run['train_loss'], color, ls=':', label=f'{name}, training')
        losses.plot(run['epoch'], run['eval_loss'], color, label=f'{name}, validation')
        top1.plot(run['epoch'], run['eval_top1'], color, label=f'{name}, best {max(run["eval_top1"]):.2f} %')
    losses.set_ylabel('loss')
    top1.set_ylabel('top-1, %')
    for axis in (losses, top1):
        axis.set_xlabel('epoch')
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure
