"""Folders of runs of train.py and `fit`: args.yaml, the weights, and summary.csv or log.jsonl."""
import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn
import yaml
from timm.data import resolve_data_config

from ..models.factory import create
from ..training.telemetry import JsonLines
from ..weights.loading import load_checkpoint

ARGS, LOG, LAST, PACKED = 'args.yaml', 'log.jsonl', 'last.pth.tar', 'packed.safetensors'
COLUMNS = ('epoch', 'train_loss', 'eval_loss', 'eval_top1')
# What the columns are called in each log.
LOGS = {'summary.csv': COLUMNS, LOG: ('epoch', 'train_loss', 'loss', 'top1')}


def is_run(folder: str | Path) -> bool:
    """Return whether train.py or `fit` wrote this folder."""
    return (Path(folder) / ARGS).is_file()


def read_args(folder: str | Path) -> dict[str, Any]:
    """Return the arguments of a run by name; those of `fit` have a 'recipe'.

    Raises:
        ValueError: The file holds none.
    """
    path = Path(folder) / ARGS
    args = yaml.safe_load(path.read_text(encoding='utf-8'))
    if not isinstance(args, dict):
        raise ValueError(f'{path}: found a {type(args).__name__}, expected the arguments of a run; delete its folder')
    return args


def write_args(folder: str | Path, args: dict[str, Any]) -> None:
    """Write the arguments of a run of `fit`, the whole file or none."""
    part = Path(folder) / f'{ARGS}.part'
    part.write_text(yaml.safe_dump(args, sort_keys=False), encoding='utf-8')
    os.replace(part, Path(folder) / ARGS)


def load_run(folder: str | Path) -> nn.Module:
    """Return the model of a run with the weights of its last epoch; its config says how the run prepared its images.

    They are those of last.pth.tar or, where a run was handed over without it, of packed.safetensors.

    The best epoch would not be fair: it was chosen on the validation images, among the epochs since the last resume.

    Raises:
        ValueError: There are no weights yet, or it is no run.
    """
    args = read_args(folder)
    absent = [name for name in ('model', 'num_classes', 'model_kwargs') if name not in args]
    if absent:
        raise ValueError(f'{folder}: found no {absent[0]!r} in {ARGS}, expected a run of train.py or of `timm-el fit`')
    file = next((path for path in (Path(folder) / name for name in (LAST, PACKED)) if path.is_file()), None)
    if file is None:
        raise ValueError(f'{folder}: found no {LAST}, expected a run of at least one epoch')
    classes = {} if args['num_classes'] is None else {'num_classes': args['num_classes']}
    model = create(args['model'], **classes, **{'recipe': args.get('recipe'), **args['model_kwargs']})
    load_checkpoint(model, file)
    # As train.py does it for its validation images.
    config = resolve_data_config(args, model=model)
    config['pool_size'] = _pool_size(model.pretrained_cfg, config['input_size'])
    cfg = {**model.pretrained_cfg, **config, 'num_classes': model.num_classes}
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def _pool_size(cfg: dict[str, Any], input_size: Sequence[int]) -> tuple[int, ...] | None:
    """Return the pixels of the last features for images of a size, as a config says for its own, or None."""
    known = cfg.get('pool_size')
    sides = zip(input_size[1:], known or (), cfg['input_size'][1:])
    return tuple(math.ceil(n * pool / own) for n, pool, own in sides) if known else None


def read_log(run: str | Path) -> dict[str, list[float]]:
    """Return `COLUMNS` of a run's log by name; of an epoch that a resumed job ran twice, the last run counts.

    Args:
        run: The folder, or the file.

    Raises:
        ValueError: There is no log, or it is none that train.py or `fit` wrote.
    """
    file = next((path for path in (Path(run) / name for name in LOGS) if path.is_file()), Path(run))
    if not file.is_file():
        raise ValueError(f'{run}: found no {" or ".join(LOGS)}, expected the folder of a run, or one of these files')
    if file.suffix == '.jsonl':
        names, lines = LOGS[LOG], JsonLines.read(str(file))
        lines = [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]
    else:
        with open(file, newline='') as f:
            names, lines = COLUMNS, list(csv.DictReader(f))
    rows = {str(line.get('epoch')): line for line in lines}
    rows.pop('epoch', None)  # the head once more, as a resumed job writes it
    if not rows or any(row.get(name) is None for row in rows.values() for name in names):
        raise ValueError(f'{file}: expected the columns {", ".join(names)} and at least one epoch')
    return {column: [float(row[name]) for row in rows.values()] for column, name in zip(COLUMNS, names)}
