"""Tables of ablations: runs of many recipes with the same seeds, compared in pairs, beside the paper's figures.

What a table holds stands in `timm-el ablate --help`.
"""
import glob
import math
import os
import shlex
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch

from ..bench.machine import cpu_name
from ..recipes import RECIPES
from ..training.telemetry import JsonLines
from .config import FitConfig, merge
from .fit import check_resumable, fit

TRAINS = 0.05  # of the way from chance to 100 %
OF_THE_TABLE = ('rows', 'contrasts', 'published')


def plan_rows(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the plain data of each row's run by its name: fields of `FitConfig`, and 'paper'.

    Raises:
        ValueError: There are no rows, a name is missing or taken, a recipe is unknown, a contrast does not name two
            rows, or a figure is no number.
    """
    if not data.get('rows'):
        raise ValueError("rows: found none, expected a list of recipes; a single run is started by 'fit'")
    base = {k: v for k, v in data.items() if k not in OF_THE_TABLE}
    rows: dict[str, dict[str, Any]] = {}
    for row in data['rows']:
        changes = dict(name=row, recipe=row) if isinstance(row, str) else dict(row)
        name = changes.pop('name', None)
        if not isinstance(name, str) or name in rows:
            raise ValueError(f'rows: found the name {name!r}, expected one of its own for each row')
        recipe = changes.get('recipe', base.get('recipe'))
        if 'paper' not in base:
            known = RECIPES.get(recipe) if isinstance(recipe, str) else None
            changes.setdefault('paper', known.paper_top1 if known else None)
        if isinstance(recipe, str) and recipe not in RECIPES:
            raise ValueError(f'rows: found recipe {recipe!r} of {name!r}, expected one of {", ".join(RECIPES)}')
        rows[name] = merge(base, changes)
    for contrast in data.get('contrasts', []):
        if not isinstance(contrast, list) or len(contrast) != 2 or not set(contrast) <= rows.keys():
            raise ValueError(f'contrasts: found {contrast!r}, expected two names of rows: {", ".join(rows)}')
    figures = {**{name: fields['paper'] for name, fields in rows.items()}, **data.get('published', {})}
    for name, top1 in figures.items():
        if not isinstance(top1, (int, float, type(None))):
            raise ValueError(f'{name}: found the figure {top1!r}, expected its top-1 in percent')
    return rows


def run_table(
        table: str, data: dict[str, Any], seeds: Sequence[int], output: str, data_dir: str, cache: str | None = None,
        changes: Sequence[str] = (), **places: Any) -> None:
    """Run what is not in OUTPUT/results.jsonl yet, or go on with it; `changes` have been made to `data` already."""
    name = os.path.splitext(os.path.basename(table))[0]
    shown = os.path.basename(table) if os.path.isabs(table) else table
    changed = f' --set {shlex.join(changes)}' if changes else ''
    rows = plan_rows(data)
    configs = {  # all of them, before any time is spent
        (seed, row): FitConfig.from_dict({**{k: v for k, v in fields.items() if k != 'paper'}, 'seed': seed})
        for seed in seeds for row, fields in rows.items()}
    if data.get('contrasts') and len(seeds) > 1:
        _t_test()
    path = os.path.join(output, 'results.jsonl')
    os.makedirs(output, exist_ok=True)
    for (seed, row), config in configs.items():
        folder = os.path.join(output, row, f'seed_{seed}')
        done = {(line['seed'], line['row']): line['epochs'] for line in JsonLines.read(path)}
        if (seed, row) in done:  # runs of several budgets shall not stand in one table
            check_resumable(config, folder)
            if done[seed, row] != config.epochs:
                raise ValueError(
                    f'epochs: found a run of {done[seed, row]} of {row!r} in {path}, expected {config.epochs} as now; '
                    f'use the same number, or another --output')
            continue
        result = fit(config, folder, data_dir, cache=cache or output, **places)
        line = dict(
            table=name, row=row, seed=seed, top1=result['top1'], loss=result['loss'],
            train_loss=result['train_loss'], epochs=result['epoch'] + 1, seconds=result['seconds'],
            command=shlex.join(['timm-el', 'ablate', shown, '--rows', row, '--seeds', str(seed + 1)]) + changed,
            hardware=cpu_name(), threads=torch.get_num_threads(), torch=torch.__version__, timm=timm.__version__)
        JsonLines.append(path, line)
        for checkpoint in glob.glob(os.path.join(folder, '*.pth.tar')):  # the table needs them no more
            os.remove(checkpoint)


def _t_test() -> Callable[..., Any]:
    """Return the t test of scipy, or raise SystemExit where that is not installed."""
    try:
        from scipy.stats import ttest_1samp
    except ImportError as e:
        raise SystemExit('intervals need scipy: pip install "timm-el[ablate]"') from e
    return ttest_1samp


def paired(differences: Sequence[float]) -> tuple[float, float, float, tuple[float, float]]:
    """Return mean, standard deviation, t statistic and 95 % confidence interval of paired differences.

    The interval is that of Student's t with n - 1 degrees of freedom.

    Raises:
        ValueError: There are fewer than two.
        SystemExit: scipy is not installed.
    """
    n = len(differences)
    if n < 2:
        raise ValueError(f'differences: found {n}, expected at least 2 for a standard deviation; run more seeds')
    mean, sd = statistics.fmean(differences), statistics.stdev(differences)
    if sd == 0:
        return mean, sd, math.copysign(math.inf, mean) if mean else 0., (mean, mean)
    test = _t_test()(differences, 0)
    interval = test.confidence_interval(0.95)
    return mean, sd, float(test.statistic), (float(interval.low), float(interval.high))


def verdict(interval: tuple[float, float]) -> str:
    """Return the verdict on an interval of (better - worse, as the paper has them): agrees, disagrees or open."""
    return 'agrees' if interval[0] > 0 else 'disagrees' if interval[1] < 0 else 'open'


def _number(value: float | None, form: str = '.1f') -> str:
    return '' if value is None else f'{value:{form}}'


def report(data: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """Return a table of results, one of contrasts, and one of the results of others, in Markdown.

    Raises:
        ValueError: A line is of no row of the table, or lines are of runs of different lengths.
    """
    rows = plan_rows(data)
    top1: dict[str, dict[int, float]] = {row: {} for row in rows}
    for line in lines:
        if line.get('row') not in rows:
            raise ValueError(f'results: found row {line.get("row")!r}, expected those of the table: {", ".join(rows)}')
        top1[line['row']][line['seed']] = line['top1']
    lengths = sorted({line['epochs'] for line in lines})
    if len(lengths) > 1:
        raise ValueError(f'results: found runs of {" and ".join(map(str, lengths))} epochs, expected equal lengths')
    out = ['| row | top-1 | sd | seeds | trains | the paper, ImageNet |', '|---|---|---|---|---|---|']
    for row, fields in rows.items():
        values = list(top1[row].values())
        if not values:
            out.append(f'| `{row}` | not run | | 0 | | {_number(fields["paper"])} |')
            continue
        mean, sd = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
        chance = 100 / fields.get('num_classes', 10)
        trains = 'yes' if mean > chance + TRAINS * (100 - chance) else 'does not converge'
        out.append(
            f'| `{row}` | {mean:.2f} | {_number(sd, ".2f")} | {len(values)} | {trains} | {_number(fields["paper"])} |')
    if data.get('contrasts'):
        out += ['', '| contrast | the paper | here | sd | t | 95 % interval | pairs | the named order |',
                '|---|---|---|---|---|---|---|---|']
    for better, worse in data.get('contrasts', []):
        papers = rows[better]['paper'], rows[worse]['paper']
        claimed = '' if None in papers else f'{papers[0] - papers[1]:+.1f}'
        seeds = sorted(top1[better].keys() & top1[worse].keys())
        differences = [top1[better][seed] - top1[worse][seed] for seed in seeds]
        label = f'| `{better}` - `{worse}` | {claimed} |'
        if len(differences) < 2:
            only = _number(differences[0], '+.2f') if differences else ''
            out.append(f'{label} {only} | | | | {len(seeds)} | open |')
            continue
        mean, sd, t, interval = paired(differences)
        out.append(
            f'{label} {mean:+.2f} | {sd:.2f} | {t:+.1f} | {interval[0]:+.2f} to {interval[1]:+.2f} | {len(seeds)} | '
            f'{verdict(interval)} |')
    if data.get('published'):
        out += ['', '| published, as recalled, after trainings of their own | top-1 |', '|---|---|']
        out += [f'| {name} | {top1:.1f} |' for name, top1 in data['published'].items()]
    return '\n'.join(out)


def picked(data: dict[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """Return a table with some of its rows, and without contrasts; all of it if `names` is None.

    Raises:
        ValueError: A name is none of a row.
    """
    if names is None:
        return data
    known = plan_rows(data)
    for row in names:
        if row not in known:
            raise ValueError(f'--rows: found {row!r}, expected some of {", ".join(known)}')
    rows = [row for row in data['rows'] if (row if isinstance(row, str) else row['name']) in names]
    return {**data, 'rows': rows, 'contrasts': []}
