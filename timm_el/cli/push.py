"""Write a Hub folder of packed weights, check it, and upload it."""
import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..hub import CARD, CONFIG, WEIGHTS, file_facts, push_to_hub, save_for_hub
from ._arguments import parser_of

FLOATS = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16, 'int8': torch.int8}


def metric(text: str) -> dict[str, float]:
    """Return NAME=NUMBER as a dict; the type of an argument."""
    name, _, value = text.partition('=')
    try:
        return {name: float(value)}
    except ValueError:
        raise argparse.ArgumentTypeError(f'found {text!r}, expected NAME=NUMBER') from None


def mapping(text: str) -> dict[str, Any]:
    """Return a JSON object as a dict; the type of an argument."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'found {text!r}, expected a JSON object such as {{"num_classes": 10}}')
    return found


def twin(text: str) -> dict[str, str]:
    """Return NAME=RUN as a dict; the type of an argument."""
    name, found, run = text.partition('=')
    if not (name and found and run):
        raise argparse.ArgumentTypeError(f'found {text!r}, expected NAME=RUN')
    return {name: run}


def main(argv: list[str]) -> None:
    """Write, check and upload a Hub folder."""
    parser = parser_of('push', __doc__)
    parser.add_argument('repo', help='user/repo on the Hub')
    parser.add_argument('--model', required=True,
                        help='registered model, a timm model that --recipe converts, or the folder of a run')
    parser.add_argument('--recipe', help='how it is binarized; its own recipe for a registered model if not given')
    parser.add_argument('--checkpoint', help='weights: what train.py wrote, or a packed file; fresh ones if not given')
    parser.add_argument('--model-kwargs', type=mapping, default={}, metavar='JSON', help='e.g. {"num_classes": 10}')
    parser.add_argument('--pretrained-cfg', type=mapping, default={}, metavar='JSON',
                        help="changes to timm's config: input_size, mean, std, crop_pct, ...")
    parser.add_argument(
        '--float-dtype', choices=FLOATS,
        help='dtype of all float tensors (int8: of real weights); their own if not given')
    parser.add_argument('--metric', type=metric, action='append', default=[], metavar='NAME=NUMBER', help='for a card')
    parser.add_argument('--dataset', help='for the card')
    parser.add_argument('--details', type=Path, metavar='FILE', help='Markdown for the card: how it was trained')
    parser.add_argument('--twin', type=twin, action='append', default=[], metavar='NAME=RUN',
                        help='run of the same budget to show beside that of --model on the card: float=runs/float')
    parser.add_argument('--folder', type=Path, help='where to write; a temporary folder if not given')
    parser.add_argument('--private', action='store_true')
    parser.add_argument('--dry-run', action='store_true', help='stop before the upload')
    args = parser.parse_args(argv)

    import timm

    from ..experiments.card import training_log
    from ..experiments.runs import is_run, load_run
    from ..models.factory import create
    from ..weights.loading import load_checkpoint
    details = args.details.read_text(encoding='utf-8') if args.details else ''
    if is_run(args.model):
        if args.recipe or args.model_kwargs:
            parser.error(f'model: found the run {args.model!r}, whose arguments are its own, with --recipe or '
                         f'--model-kwargs; expected neither')
        model = load_run(args.model)
        details = training_log(args.model, {name: run for one in args.twin for name, run in one.items()}, details)
    elif args.twin:
        parser.error(f'twin: found {args.model!r} as --model, expected the folder of a run to compare with')
    else:
        model = create(args.model, args.recipe, **args.model_kwargs)
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_for_hub(
            model, args.folder or temporary, float_dtype=FLOATS.get(args.float_dtype), repo_id=args.repo,
            metrics={k: v for m in args.metric for k, v in m.items()}, dataset=args.dataset, details=details,
            pretrained_cfg=args.pretrained_cfg)
        facts = {name: file_facts(folder / name) for name in (WEIGHTS, CONFIG, CARD)}
        for name, fact in facts.items():
            print(f'{name}: {fact["size"]:,} bytes, sha256 {fact["sha256"]}')
        print(f'{folder}: loads back to the same outputs (timm {timm.__version__})')
        if args.dry_run:
            print('dry run: nothing was uploaded')
        else:
            print(push_to_hub(folder, args.repo, private=args.private))
