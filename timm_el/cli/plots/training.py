"""Loss and top-1 by epoch, from what timm's train.py (summary.csv) and `fit` (log.jsonl) write.

timm-el plot training RUN [TWIN ...]
"""
import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ...experiments.runs import read_log
from . import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = 'loss and top-1 by epoch, from the logs of runs'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this picture."""
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='folder of a run, or the log in it')


def labels(runs: list[Path]) -> list[str]:
    """Return short names of runs: their folders, from where their paths part."""
    folders = [run.resolve() if run.is_dir() else run.resolve().parent for run in runs]
    root = Path(os.path.commonpath(folders)) if len(folders) > 1 else folders[0].parent
    return [str(folder.relative_to(root)) for folder in folders]


def draw(args: argparse.Namespace) -> 'Figure':
    """Draw losses on the left, top-1 on the right."""
    figure, ((losses, top1),) = new_figure(1, 2, (9, 3))
    for i, (path, name) in enumerate(zip(args.runs, labels(args.runs))):
        run, style = read_log(path), dict(color=f'C{i}', marker='.')
        losses.plot(run['epoch'], run['train_loss'], ls=':', label=f'{name}, training', **style)
        losses.plot(run['epoch'], run['eval_loss'], label=f'{name}, validation', **style)
        top1.plot(run['epoch'], run['eval_top1'], label=f'{name}, best {max(run["eval_top1"]):.2f} %', **style)
    losses.set_ylabel('loss (dotted: training)')
    top1.set_ylabel('top-1, %')
    for axis in (losses, top1):
        axis.set_xlabel('epoch')
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.legend(handles=top1.get_lines(), loc='outside right center', fontsize=7)
    return figure
