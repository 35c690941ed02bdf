"""python -m timm_el eval NET --data-dir D: top-1 and top-5 of a network as it is, packed, and deployed.

D is a folder of one folder of images per class, or one that has such folders for its splits, as timm reads it; images
are prepared as the model's config says. All forms see the same images, and the share of images that two forms put into
the same class is printed. A top-1 in the model card beside the weights, or in the log of
a run, is compared with what was found.
"""
import argparse
import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Subset

from ..bench.machine import describe
from ..engine import deploy, info
from ..weights.loading import load_packed
from ..weights.packed import binary_layers, save_packed
from .nets import HELP, PRETRAINED, Net


def as_packed(model: nn.Module) -> nn.Module:
    """What comes back from the packed file of a model."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():  # all that it computes with shall come from the file
        parameter.data.fill_(math.nan)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.safetensors'
        save_packed(model, path)
        return load_packed(twin, path).eval()


# What is made of the latent model, and by how many points its top-1 may differ from what was recorded.
FORMS: Dict[str, Callable[[nn.Module], nn.Module]] = {
    'latent': lambda model: model, 'packed': as_packed, 'deployed': deploy}
TOLERANCE = {'latent': 0.1, 'packed': 0.1, 'deployed': 0.3}


def forms(text: str) -> List[str]:
    """Names of forms, separated by commas."""
    names = text.split(',')
    for name in names:
        if name not in FORMS:
            raise argparse.ArgumentTypeError(f'unknown form {name!r}, expected some of {",".join(FORMS)}')
    return names


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'found {text!r}, expected a positive integer')
    return int(text)


def load_images(
        model: nn.Module,
        data_dir: str,
        split: str = 'validation',
        img_size: Optional[int] = None,
        limit: Optional[int] = None,
        batch_size: int = 64,
        workers: int = 0,
        dataset: str = '',
        download: bool = False,
) -> DataLoader:
    """Images of a folder, prepared as the model's config says.

    Args:
        model: The network that they are for.
        data_dir: A folder that timm's `create_dataset` reads.
        split: Name of the folder in it, where there is one.
        img_size: Pixels; None: the model's own.
        limit: How many images, spread evenly over all; None: all of them.
        batch_size: Images in a batch.
        workers: Processes that read.
        dataset: Kind and name, as for train.py; '' is a folder of images.
        download: Fetch it first, where timm can.

    Raises:
        ValueError: There is no such folder, there are no images, or their classes are not as many as the model's.
    """
    from timm.data import create_dataset, create_transform, resolve_data_config
    if not download and not Path(data_dir).is_dir():
        raise ValueError(f'data-dir: found no folder {data_dir!r}, expected one with a folder of images per class')
    config = resolve_data_config({'img_size': img_size}, model=model)
    data = create_dataset(
        dataset, root=data_dir, split=split, download=download, transform=create_transform(**config))
    classes = len(getattr(data, 'reader', data).class_to_idx)
    if classes != model.num_classes:
        raise ValueError(
            f'data-dir: found {classes} classes in {data_dir!r}, expected the {model.num_classes} that the model knows')
    chosen = range(len(data)) if limit is None else [i * len(data) // limit for i in range(min(limit, len(data)))]
    return DataLoader(Subset(data, chosen), batch_size, num_workers=workers)


def count_right(nets: Dict[str, nn.Module], images: Iterable) -> Dict[str, Any]:
    """Top-1 and top-5 of several nets on the same images, and how often two of them agree, in percent."""
    seen = 0
    right = {name: [0, 0] for name in nets}
    pairs = [(a, b) for i, a in enumerate(nets) for b in list(nets)[i + 1:]]
    same = {f'{a} = {b}': 0 for a, b in pairs}
    with torch.inference_mode():
        for x, y in images:
            best = {name: net(x).topk(min(5, net.num_classes)).indices for name, net in nets.items()}
            seen += len(y)
            for name, guess in best.items():
                hit = guess == y[:, None]
                right[name][0] += hit[:, 0].sum().item()
                right[name][1] += hit.sum().item()
            for a, b in pairs:
                same[f'{a} = {b}'] += (best[a][:, 0] == best[b][:, 0]).sum().item()
    return {
        'images': seen,
        'forms': {name: {'top1': 100 * one / seen, 'top5': 100 * five / seen} for name, (one, five) in right.items()},
        'same_top1': {pair: 100 * n / seen for pair, n in same.items()}}


def main(argv: List[str]) -> None:
    """Evaluate and print."""
    from tqdm import tqdm
    parser = argparse.ArgumentParser(
        prog='python -m timm_el eval', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('net', metavar='NET', help=f'{HELP}. Default of the weights: {PRETRAINED}')
    parser.add_argument('--data-dir', required=True, metavar='D', help='the images')
    parser.add_argument('--dataset', default='', help='as for train.py: torch/cifar10 (default: a folder)')
    parser.add_argument('--dataset-download', action='store_true', help='fetch it first, where timm can')
    parser.add_argument('--split', default='validation', help='folder in D (default: validation, or D itself)')
    parser.add_argument('--forms', type=forms, metavar='NAMES',
                        help=f'some of {",".join(FORMS)} (default: all, and latent alone of a float net)')
    parser.add_argument('--img-size', type=count, help="pixels (default: the model's own)")
    parser.add_argument('--batch-size', type=count, default=64, help='default: 64')
    parser.add_argument('--limit', type=count, metavar='N', help='N images, spread evenly over all (default: all)')
    parser.add_argument('--threads', type=count, help="default: torch's own choice")
    parser.add_argument('--workers', type=int, default=0, help='processes that read images (default: this one)')
    parser.add_argument('--json', action='store_true', help='print data in place of text')
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    net = Net.parse(args.net, PRETRAINED)
    model = net.build()
    images = load_images(
        model, args.data_dir, args.split, args.img_size, args.limit, args.batch_size, args.workers,
        args.dataset, args.dataset_download)
    possible = list(FORMS) if any(True for _ in binary_layers(model)) else ['latent']
    nets = {name: FORMS[name](model) for name in args.forms or possible}
    result = {
        'net': args.net, 'size': args.img_size or model.pretrained_cfg['input_size'][-1], 'limit': args.limit,
        **count_right(nets, tqdm(images, disable=None)), 'recorded': net.recorded(model),
        'engine': info(), 'machine': describe()}
    print(json.dumps(result, indent=2) if args.json else '\n'.join(show(result)))


def show(r: Dict[str, Any]) -> Iterable[str]:
    """Lines of text for a result."""
    machine = r['machine']
    yield f'{r["net"]}, {r["images"]:,} images, {r["size"]} px, {machine["cpu"]}, {machine["threads"]} threads'
    yield f'  {"":10} {"top-1":>8} {"top-5":>8}'
    for name, found in r['forms'].items():
        body = f'   ({r["engine"]["body"]})' if name == 'deployed' else ''
        yield f'  {name:10} {found["top1"]:>8.2f} {found["top5"]:>8.2f}{body}'
    for pair, share in r['same_top1'].items():
        yield f'  same class, {pair}: {share:.2f} %'
    yield from _beside_recorded(r)


def _beside_recorded(r: Dict[str, Any]) -> Iterable[str]:
    top1 = r['recorded'].get('top1')
    if top1 is None:
        yield '  no top-1 is recorded beside the weights'
    elif r['limit'] is not None:
        yield f'  recorded: top-1 {top1:.2f}, of all images; not compared with one of {r["images"]}'
    else:
        yield f'  recorded: top-1 {top1:.2f}'
        for name, found in r['forms'].items():
            off = found['top1'] - top1
            fits = 'within' if abs(off) <= TOLERANCE[name] + 1e-9 else 'NOT within'
            yield f'  {name:10} {off:>+8.2f}   {fits} {TOLERANCE[name]} points'
