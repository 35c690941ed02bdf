"""Signs and gammas along the depth of a network and over its training, from the telemetry that `fit` writes.

timm-el plot telemetry RUN [TWIN ...]
"""
import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...training.telemetry import JsonLines
from . import new_figure
from .training import labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = 'signs and gammas along the depth and over training, from the telemetry of runs'
FILE = 'telemetry.jsonl'


def of_layers(field: str) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Return a function that gives a field of a record's layers by path, where they have it."""
    return lambda record: {path: row[field] for path, row in record['layers'].items() if field in row}


# What the panels show of a record, by the path of each layer or link.
PANELS = {
    'inputs whose sign is +1': of_layers('input_positive'),
    'weights that changed sign since the record before': of_layers('flip_ratio'),
    'gamma': lambda record: record['gamma'],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this picture."""
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help=f'folder of a run, with {FILE} in it')


def draw(args: argparse.Namespace) -> 'Figure':
    """Draw a row of axes per run: a line for each record, from dark (the first) to light, over the depth.

    Raises:
        ValueError: A run has no telemetry.
    """
    from matplotlib import colormaps
    figure, axes = new_figure(len(args.runs), len(PANELS), (12, 3 * len(args.runs)))
    for row, run, name in zip(axes, args.runs, labels(args.runs)):
        records = JsonLines.read(run / FILE)
        if not records:
            raise ValueError(f'{run}: found no {FILE} with records, expected the folder of a run of `timm-el fit`')
        for axis, (title, values) in zip(row, PANELS.items()):
            for i, record in enumerate(records):
                found = list(values(record).values())
                color = colormaps['viridis'](i / max(1, len(records) - 1))
                axis.plot(range(len(found)), found, color=color, marker='.', lw=1, label=f'epoch {record["epoch"]}')
            axis.set_title(f'{name}: {title}', fontsize=8)
            axis.set_xlabel('layer' if title != 'gamma' else 'link', fontsize=8)
            axis.grid(alpha=0.3)
    lines = axes[0, 0].get_lines()
    figure.legend(handles=[*dict.fromkeys((lines[0], lines[-1]))], loc='outside right center', fontsize=7)
    return figure
