"""Print top-1 and top-5 of a network as it is, packed, deployed, and deployed with float parts in int8.

D is a folder of one folder of images per class, or one that has such folders for its splits, as timm reads it; images
are prepared as the model's config says. All forms see the same images, and the share of images that two forms put into
the same class is printed. A top-1 in the model card beside the weights, or in the log of a run, is compared with what
was found.
"""
import argparse
import json
from collections.abc import Iterator
from typing import Any

from ..experiments.evaluate import FORMS, TOLERANCE, evaluate_net
from ..experiments.nets import NET_HELP, PRETRAINED
from ..tables import table
from ._arguments import add_json, add_threads, parser_of, positive, set_threads


def forms(text: str) -> list[str]:
    """Return names of forms from a list with commas, or raise ArgumentTypeError; the type of an argument."""
    names = text.split(',')
    for name in names:
        if name not in FORMS:
            raise argparse.ArgumentTypeError(f'unknown form {name!r}, expected some of {",".join(FORMS)}')
    return names


def main(argv: list[str]) -> None:
    """Evaluate a network and print the result."""
    parser = parser_of('eval', __doc__)
    parser.add_argument('net', metavar='NET', help=f'{NET_HELP}. Default of the weights: {PRETRAINED}')
    parser.add_argument('--data-dir', required=True, metavar='D', help='the images')
    parser.add_argument('--dataset', default='', help='as for train.py: torch/cifar10 (default: a folder)')
    parser.add_argument('--dataset-download', action='store_true', help='fetch it first, where timm can')
    parser.add_argument('--split', help='folder in D (default: validation, or D itself if it has no splits)')
    parser.add_argument('--forms', type=forms, metavar='NAMES',
                        help=f'some of {",".join(FORMS)} (default: all, and latent alone of a float net)')
    parser.add_argument('--img-size', type=positive, help="pixels (default: the model's own)")
    parser.add_argument('--batch-size', type=positive, default=64, help='default: 64')
    parser.add_argument('--limit', type=positive, metavar='N', help='N images, spread evenly over all (default: all)')
    parser.add_argument('--workers', type=int, default=0, help='processes that read images (default: this one)')
    add_threads(parser)
    add_json(parser)
    args = parser.parse_args(argv)
    set_threads(args.threads)
    result = evaluate_net(
        args.net, args.data_dir, args.forms, args.limit, args.img_size, split=args.split, batch_size=args.batch_size,
        workers=args.workers, dataset=args.dataset, download=args.dataset_download)
    print(json.dumps(result, indent=2) if args.json else '\n'.join(show(result)))


def show(result: dict[str, Any]) -> Iterator[str]:
    """Yield lines of text for a result."""
    machine, body = result['machine'], result['engine']['body']
    size = 'x'.join(map(str, result['size']))
    yield f'{result["net"]}, {result["images"]:,} images, {size} px, {machine["cpu"]}, {machine["threads"]} threads'
    for name, why in result['impossible'].items():
        yield f'not {name}: {why}'
    if result['damaged']:
        yield f'left out {len(result["damaged"])} files that cannot be read: {", ".join(result["damaged"][:5])}'
    yield table(('', 'top-1', 'top-5', ''), [
        (name, f'{found["top1"]:.2f}', f'{found["top5"]:.2f}', f'({body})' if name in ('deployed', 'int8') else '')
        for name, found in result['forms'].items()], '<>><')
    for pair, share in result['same_top1'].items():
        yield f'same class, {pair}: {share:.2f} %'
    top1 = result['recorded'].get('top1')
    if top1 is None:
        yield 'no top-1 is recorded beside the weights'
    elif not result['comparable']:
        yield f'recorded: top-1 {top1:.2f}, of all validation images at the own size; not compared'
    else:
        yield f'recorded: top-1 {top1:.2f}'
        for name, found in result['forms'].items():
            off = found['top1'] - top1
            fits = 'within' if abs(off) <= TOLERANCE[name] + 1e-9 else 'NOT within'
            yield f'{name:10} {off:>+8.2f}   {fits} {TOLERANCE[name]} points'
