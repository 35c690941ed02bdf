"""Describe a run for a model card: results, arguments, curves, and its twins beside it."""
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .runs import COLUMNS, read_args, read_log

EVAL = 'eval.json'


def training_log(
        folder: str | Path, twins: Mapping[str, str | Path] | None = None, details: str = '') -> str:
    """Return Markdown for a model card: how a run was trained and evaluated, and its twins beside it.

    Args:
        folder: The run. What `timm-el eval --json` printed of it counts where it was kept as eval.json.
        twins: Runs to compare it with, by what the card calls them: float, Bi-Real.
        details: What else is to be said of the training, in Markdown.

    Raises:
        ValueError: A run has no log, or an argument that decides the budget differs between the run and a twin.
    """
    runs = {'': folder, **(twins or {})}
    _check_budget(runs)
    evaluated = [line for name, run in runs.items() for line in _evaluated(name, Path(run))]
    results = ['## Results', '', '| form | image | top-1 | top-5 |', '|---|---|---|---|', *evaluated, '']
    return '\n'.join([*(results if evaluated else []), '## Training', '', *([details.strip(), ''] if details else []),
                      _arguments(read_args(folder)), '',
                      *_curves({name: read_log(run) for name, run in runs.items()})])


def _check_budget(runs: Mapping[str, str | Path]) -> None:
    """Raise ValueError unless all runs, of which the first is the one that is compared, had the same budget."""
    expected, *others = ((name, run, read_args(run)) for name, run in runs.items())
    for name, run, args in others:
        for key in ('epochs', 'batch_size', 'input_size', 'opt', 'lr'):
            if args.get(key) != expected[2].get(key):
                raise ValueError(
                    f'twin {name}: found {key} {args.get(key)!r} in {run}, expected {expected[2].get(key)!r} as in '
                    f'{expected[1]}; a twin is trained with the same budget')


def _evaluated(name: str, run: Path) -> Iterator[str]:
    """Yield a row of Markdown for each form of a run that was evaluated."""
    if not (run / EVAL).is_file():
        return
    result = json.loads((run / EVAL).read_text(encoding='utf-8'))
    for form, found in result['forms'].items():
        what = f'{name} twin' if name else form
        yield f'| {what} | {"x".join(map(str, result["size"]))} px | {found["top1"]:.2f} | {found["top5"]:.2f} |'


def _arguments(args: dict[str, Any]) -> str:
    """Return a sentence with the arguments of a run that matter."""
    names = ('model', 'recipe', 'model_kwargs', 'input_size', 'epochs', 'batch_size', 'world_size', 'opt', 'lr',
             'sched', 'weight_decay', 'amp', 'amp_dtype', 'seed')
    trainer = '`timm-el fit`' if 'recipe' in args else "timm's `train.py`"
    said = ', '.join(f'{name} {args[name]}' for name in names if args.get(name) not in (None, {}, ''))
    if args.get('model_ema'):
        said += f', weights averaged with decay {args["model_ema_decay"]}'
    return f'{trainer}: {said}.'


def _curves(logs: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return rows of Markdown: loss and top-1 of the first log by epoch, and top-1 of the others."""
    first, *twins = logs.values()
    head = ['epoch', 'training loss', 'loss', 'top-1', *(f'{name} twin, top-1' for name in logs if name)]
    by_epoch = [dict(zip(log['epoch'], log['eval_top1'])) for log in twins]
    rows = [
        [f'{epoch:.0f}', f'{train:.3f}', f'{loss:.3f}', f'{found:.2f}',
         *(f'{top1[epoch]:.2f}' if epoch in top1 else '' for top1 in by_epoch)]
        for epoch, train, loss, found in zip(*(first[name] for name in COLUMNS))]
    return [f'| {" | ".join(row)} |' for row in (head, ['---'] * len(head), *rows)]
