"""What timm's train.py leaves in its output folder: args.yaml, summary.csv and the weights."""
import csv
from pathlib import Path
from typing import Any, Dict, List, Union

import torch.nn as nn
import yaml
from timm.data import resolve_data_config
from timm.models import load_checkpoint

from . import create

ARGS, SUMMARY, LAST = 'args.yaml', 'summary.csv', 'last.pth.tar'
COLUMNS = ('epoch', 'train_loss', 'eval_loss', 'eval_top1')


def is_run(folder: Union[str, Path]) -> bool:
    """train.py wrote this folder."""
    return (Path(folder) / ARGS).is_file()


def read_args(folder: Union[str, Path]) -> Dict[str, Any]:
    """The arguments of a run, by name."""
    return yaml.safe_load((Path(folder) / ARGS).read_text())


def load_run(folder: Union[str, Path]) -> nn.Module:
    """The model of a run with the weights of its last epoch; its config says how the run prepared its images.

    Not those of the best epoch: they were chosen on the validation images, and among those since the last resume only.

    Raises:
        ValueError: There are no weights yet.
    """
    args, file = read_args(folder), Path(folder) / LAST
    if not file.is_file():
        raise ValueError(f'{folder}: found no {LAST}, expected a run of at least one epoch')
    classes = {} if args['num_classes'] is None else {'num_classes': args['num_classes']}
    model = create(args['model'], **classes, **args['model_kwargs'])
    load_checkpoint(model, str(file))
    # As train.py does it for its validation images.
    config = resolve_data_config(args, model=model)
    if config['input_size'] != model.pretrained_cfg['input_size']:
        config['pool_size'] = None
    cfg = {**model.pretrained_cfg, **config, 'num_classes': model.num_classes}
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def read_summary(file: Union[str, Path]) -> Dict[str, List[float]]:
    """Columns of a summary by name; of an epoch that was run twice, because a job was resumed, the last run counts.

    Raises:
        ValueError: It is no file that train.py wrote.
    """
    if not Path(file).is_file():
        raise ValueError(f'{file}: found no such file, expected the {SUMMARY} of a run of train.py')
    with open(file, newline='') as f:
        rows = {row.get('epoch'): row for row in csv.DictReader(f)}
    rows.pop('epoch', None)  # the head once more, as a resumed job writes it
    if not rows or any(row.get(name) is None for row in rows.values() for name in COLUMNS):
        raise ValueError(f'{file}: expected the columns {", ".join(COLUMNS)} and at least one epoch')
    return {name: [float(row[name]) for row in rows.values()] for name in COLUMNS}


def training_log(folder: Union[str, Path]) -> str:
    """Markdown for a model card: the arguments that matter, and loss and top-1 by epoch."""
    args, run = read_args(folder), read_summary(Path(folder) / SUMMARY)
    names = ('model', 'model_kwargs', 'epochs', 'batch_size', 'world_size', 'opt', 'lr', 'sched', 'weight_decay', 'amp',
             'amp_dtype', 'seed')
    said = ', '.join(f'{name} {args[name]}' for name in names if args.get(name) not in (None, {}, ''))
    epochs = zip(*(run[name] for name in COLUMNS))
    rows = [f'| {epoch:.0f} | {train:.3f} | {loss:.3f} | {top1:.2f} |' for epoch, train, loss, top1 in epochs]
    return '\n'.join([
        '## Training', '', f"timm's `train.py`: {said}.", '',
        '| epoch | training loss | loss | top-1 |', '|---|---|---|---|', *rows])
