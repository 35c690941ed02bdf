"""Evaluation of a network as it is, packed, and deployed, on the same images."""
import copy
import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from ..bench.machine import describe
from ..engine import deploy, info
from ..weights.files import save_packed
from ..weights.loading import load_packed
from ..weights.packed import binary_weight_layers
from .images import Batch, check_split, read_image, read_webp
from .nets import PRETRAINED, Net


def as_packed(model: nn.Module) -> nn.Module:
    """Return a model that was packed and loaded again."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():  # all that it computes with shall come from the file
        parameter.data.fill_(math.nan)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.safetensors'
        save_packed(model, path)
        return load_packed(twin, path).eval()


# What is made of the latent model, and by how many points its top-1 may differ from what was recorded.
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    'latent': lambda model: model, 'packed': as_packed, 'deployed': deploy,
    'int8': functools.partial(deploy, float_dtype=torch.int8)}  # deployed, with float parts in int8
TOLERANCE = {'latent': 0.1, 'packed': 0.1, 'deployed': 0.3, 'int8': 0.5}


def _check_classes(indices: dict[str, int], model: nn.Module, data_dir: str) -> None:
    """Raise ValueError if classes, with their indices, are not as many as a model's, or others than its label names.

    A folder has the name of a label, or that of an ImageNet synset which the label describes; numbers say nothing.
    """
    from timm.data import ImageNetInfo
    if len(indices) != model.num_classes:
        raise ValueError(
            f'data-dir: found {len(indices)} classes in {data_dir!r}, expected the {model.num_classes} that the model '
            f'knows')
    labels = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or ()
    imagenet = ImageNetInfo()
    synsets = set(imagenet.label_names())
    for name, index in indices.items():
        if name.isdecimal() or len(labels) != len(indices):
            continue
        said = imagenet.label_name_to_description(name) if name in synsets else name
        if not _names(said) & _names(labels[index]):
            raise ValueError(
                f'data-dir: found {said!r} for class {index} in {data_dir!r}, expected {labels[index]!r}, as the '
                f'weights name it; pass images of their classes, or give each folder the name of its label')


def _order_of_labels(indices: dict[str, int], model: nn.Module) -> dict[str, int] | None:
    """Return the index of each class as the label names of a model have them, if the folders are called like these."""
    labels = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or ()
    order = {name: [i for i, label in enumerate(labels) if _names(name) & _names(label)] for name in indices}
    if sorted(i for found in order.values() for i in found) != list(range(len(labels))) or not all(order.values()):
        return None
    return {name: found[0] for name, found in order.items()}


def _names(text: str) -> set[str]:
    """Return the names in a description such as 'gas pump, petrol_pump', in one spelling."""
    return {name.strip() for name in text.lower().replace('_', ' ').replace('-', ' ').split(',')}


class _Folder(Dataset):
    """Images of a folder with labels, and the name of each file that cannot be read in place of its image."""

    def __init__(self, data: Dataset, transform: Callable) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | str, int]:
        image, label = read_image(self.data, index, self.transform)
        return self.data.filename(index) if image is None else image, label


def _collate(batch: list[tuple[torch.Tensor | str, int]]) -> tuple[Batch | None, list[str]]:
    """Return images (N, C, H, W) and labels (N,), None if there are none, and the files that cannot be read."""
    read = [(image, label) for image, label in batch if isinstance(image, torch.Tensor)]
    return default_collate(read) if read else None, [image for image, _ in batch if isinstance(image, str)]


class Images:
    """Batches of images to evaluate: (N, C, H, W), prepared as the model's config says, and labels (N,).

    Args:
        data: Images and labels; a file name in place of an image that cannot be read.
        batch_size: Images in a batch.
        workers: Processes that read.
    """

    def __init__(self, data: Dataset, batch_size: int, workers: int) -> None:
        self.loader = DataLoader(data, batch_size, num_workers=workers, collate_fn=_collate)
        self.damaged: list[str] = []  # files that could not be read, so far

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        self.damaged = []
        for batch, damaged in self.loader:
            self.damaged += damaged
            if batch is not None:
                yield batch


def load_images(
        model: nn.Module, data_dir: str, split: str | None = None, img_size: int | None = None,
        limit: int | None = None, batch_size: int = 64, workers: int = 0, dataset: str = '', download: bool = False,
) -> Images:
    """Return batches of the images of a folder, prepared as the model's config says.

    Args:
        model: The network that they are for.
        data_dir: A folder that timm's `create_dataset` reads.
        split: Name of the folder in it; None: validation, or the folder itself if it has none for any split.
        img_size: Pixels; None: the model's own.
        limit: Number of images, spread evenly over all; None: all of them.
        batch_size: Images in a batch.
        workers: Processes that read.
        dataset: Kind and name, as for train.py; '' is a folder of images.
        download: Fetch it first, where timm can.

    Raises:
        ValueError: There is no such folder, there are no images, their classes are not those of the model, or the
            dataset is of a kind that cannot be evaluated.
    """
    from timm.data import create_dataset, create_transform, resolve_data_config
    if not download and not Path(data_dir).is_dir():
        raise ValueError(f'data-dir: found no folder {data_dir!r}, expected one with a folder of images per class')
    read_webp()
    config = resolve_data_config({'img_size': img_size}, model=model)
    transform = create_transform(**config)
    where = dict(root=data_dir, split=split or 'validation', download=download, transform=transform)
    data = create_dataset(dataset, **where)
    order = None if dataset else _order_of_labels(data.reader.class_to_idx, model)
    if order is not None:
        data = create_dataset(dataset, **where, class_map=order)
    indices = getattr(getattr(data, 'reader', data), 'class_to_idx', None)
    if not indices or not hasattr(data, '__len__'):
        raise ValueError(
            f'dataset: found {dataset!r}, whose classes are not known by name, expected a folder, or torch/NAME for a '
            f'dataset of torchvision that has classes')
    if not dataset:
        if split is not None or _has_splits(data_dir):
            check_split(data, data_dir, split or 'validation')
        data = _Folder(data, transform)
    _check_classes(indices, model, data_dir)
    chosen = range(len(data)) if limit is None else [i * len(data) // limit for i in range(min(limit, len(data)))]
    return Images(Subset(data, chosen), batch_size, workers)


def _has_splits(data_dir: str) -> bool:
    """Return whether a folder has folders of folders, as one that is divided into splits does."""
    return any(child.is_dir() for folder in Path(data_dir).iterdir() if folder.is_dir() for child in folder.iterdir())


def count_right(nets: dict[str, nn.Module], images: Iterable) -> dict[str, Any]:
    """Return top-1 and top-5 of several nets on the same images, and their agreement in pairs, in percent."""
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
    if not seen:
        raise ValueError('data-dir: found no image that can be read')
    return {
        'images': seen,
        'forms': {name: {'top1': 100 * one / seen, 'top5': 100 * five / seen} for name, (one, five) in right.items()},
        'same_top1': {pair: 100 * n / seen for pair, n in same.items()}}


def evaluate_net(
        text: str, data_dir: str, names: list[str] | None = None, limit: int | None = None, img_size: int | None = None,
        split: str | None = None, **images: Any) -> dict[str, Any]:
    """Return top-1 and top-5 of a network in several forms, and how often they agree.

    Args:
        text: The network, as `Net` reads it; its pretrained weights if it names none.
        data_dir, limit, img_size, split, images: As for `load_images`.
        names: Some of `FORMS`; if None, all that the network takes, and latent alone of a float net.

    Returns:
        As of `count_right`, and the net, size (height and width in pixels), limit, impossible (forms that the network
        does not take, and why), damaged (files that were left out), recorded (metrics beside the weights), comparable
        (whether those are of the same images at the same size), engine and machine.
    """
    from tqdm import tqdm
    net = Net.parse(text, PRETRAINED)
    model = net.build()
    loader = load_images(model, data_dir, split, img_size, limit, **images)
    possible = list(FORMS) if binary_weight_layers(model) else ['latent']
    nets, impossible = {}, {}
    for name in names or possible:
        try:
            nets[name] = FORMS[name](model)
        except ValueError as e:
            if names is not None:
                raise ValueError(f'forms: the network cannot be {name}: {e}') from e
            impossible[name] = str(e)
    own = list(model.pretrained_cfg['input_size'][1:])
    size = own if img_size is None else [img_size, img_size]
    counted = count_right(nets, tqdm(loader, disable=None))
    return {
        'net': text, 'size': size, 'limit': limit, **counted, 'impossible': impossible, 'damaged': loader.damaged,
        'recorded': net.recorded(model), 'comparable': limit is None and size == own and split in (None, 'validation'),
        'engine': info(), 'machine': describe()}
