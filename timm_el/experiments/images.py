"""Images for `fit`: timm's own loader, or a tensor of decoded images that is cropped and flipped batch by batch.

Both give the same batches for the same seed and epoch, so that a run can be resumed: the tensor by itself, the loader
if all random numbers are seeded anew with `epoch_seed` before each epoch.

`images: memory` keeps what `decode` gives on the device of the run, where every batch is cut, scaled, mirrored and
normalised: by `crop_and_flip` with `pad_crop`, else by `resized_crops`, which is timm's RandomResizedCrop.
"""
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform
from timm.data.readers import add_img_extensions, get_img_extensions
from torch.utils.data import Dataset

Batch = tuple[torch.Tensor, torch.Tensor]
Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
SEED_STEP = 10_000  # epochs between the seeds of two runs
# What Pillow raises for what is no image, half of one, or one that is suspiciously large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
ATTEMPTS = 10  # of RandomResizedCrop to find a box that lies in the image


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch of a run, so that nothing about random numbers has to be saved."""
    return seed * SEED_STEP + epoch


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

def read_webp() -> None:
    """Add WebP to the endings of images in folders that timm reads."""
    if '.webp' not in get_img_extensions():
        add_img_extensions('.webp')


def check_split(data: Dataset, data_dir: str, split: str) -> None:
    """Raise ValueError if timm found no folder for this split and took the whole folder, with the images of all."""
    if os.path.samefile(data.reader.root, data_dir):
        found = sorted(entry.name for entry in os.scandir(data_dir) if entry.is_dir())
        raise ValueError(
            f'data-dir: found no folder {split!r} in {data_dir!r}, but {", ".join(found[:5])}'
            f'{", ..." if len(found) > 5 else ""}; expected one for each split, with a folder of images per class')


def open_folder(data_dir: str, split: str, classes: int) -> Dataset:
    """Return timm's dataset of one split of an ImageFolder, WebP files included. Classes are numbered as in train.

    Raises:
        ValueError: It has no folder for that split, or not so many classes.
    """
    if not os.path.isdir(data_dir):
        raise ValueError(f'data-dir: found no folder {data_dir!r}, expected one with {split}/ and a folder per class')
    read_webp()
    data = create_dataset('', data_dir, split)
    check_split(data, data_dir, split)
    numbers = data.reader.class_to_idx
    if split != 'train' and os.path.isdir(os.path.join(data_dir, 'train')):
        found, numbers = set(numbers), create_dataset('', data_dir, 'train').reader.class_to_idx
        if not found <= set(numbers):
            raise ValueError(
                f'data-dir: found class {min(found - set(numbers))!r} in {split} of {data_dir!r}, expected those of '
                f'train')
        data = create_dataset('', data_dir, split, class_map=numbers)
    if len(numbers) != classes:
        raise ValueError(
            f'data-dir: found {len(numbers)} classes in train of {data_dir!r}, expected the {classes} of num_classes')
    return data


def read_image(data: Dataset, index: int, transform: Callable) -> tuple[torch.Tensor | None, int]:
    """Return an image of timm's dataset as `transform` makes it, None if it cannot be read, and its label."""
    file, label = data.reader[index]
    with file:
        try:
            image = Image.open(file).convert('RGB')
        except UNREADABLE:
            return None, label
    return transform(image), label


def _contents(data: Dataset) -> str:
    """Return a digest of the names, sizes and labels of the files of timm's dataset."""
    digest = hashlib.sha256()
    for path, label in data.reader.samples:
        digest.update(f'{os.path.relpath(path, data.reader.root)} {os.path.getsize(path)} {label}\n'.encode())
    return digest.hexdigest()[:16]


def decode(
        data_dir: str, split: str, size: int, cache: str, *, classes: int, crop_pct: float = 1.0,
        interpolation: str = 'bilinear', workers: int = 0) -> Batch:
    """Return all images of a split of an ImageFolder as uint8 (N, 3, size, size), and their labels (N,).

    They are prepared as timm prepares images to evaluate: the shorter side is scaled, and a square out of the middle
    is kept. They are decoded once and kept in the folder `cache`, in a file of their own for other contents of the
    folder: other names, sizes or labels of files.

    Args:
        data_dir, split: The folder, and the name of the folder in it.
        size: Pixels.
        cache: Where the decoded images are kept.
        classes: Number of folders that there must be.
        crop_pct, interpolation: As for timm's transforms.
        workers: Threads that decode.

    Raises:
        ValueError: The folder has other classes, or no image can be read.

    Warns:
        UserWarning: Some images cannot be read, and are left out.
    """
    data = open_folder(data_dir, split, classes)
    path = os.path.join(cache, f'images_{split}_{size}_{interpolation}_{crop_pct:g}_{_contents(data)}.pt')
    if not os.path.exists(path):
        transform = create_transform(
            (3, size, size), crop_pct=crop_pct, interpolation=interpolation, normalize=False)
        images, labels = torch.empty(len(data), 3, size, size, dtype=torch.uint8), torch.empty(len(data)).long()
        kept, damaged = 0, []
        with ThreadPoolExecutor(workers or 1) as pool:  # Pillow decodes outside of the interpreter's lock
            read = pool.map(partial(read_image, data, transform=transform), range(len(data)))
            for i, (image, label) in enumerate(read):
                if image is None:
                    damaged.append(data.filename(i))
                else:
                    images[kept], labels[kept] = image, label
                    kept += 1
        if not kept:
            raise ValueError(f'data-dir: found no image that can be read in {split} of {data_dir!r}, as {damaged[0]}')
        if damaged:
            images, labels = images[:kept].clone(), labels[:kept].clone()  # the whole storage is saved
        os.makedirs(cache, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as part:  # an interrupted run leaves no half file
            torch.save((images, labels, damaged), os.path.join(part, 'images'))
            os.replace(os.path.join(part, 'images'), path)
    images, labels, damaged = torch.load(path, weights_only=True)
    if damaged:
        warnings.warn(
            f'data-dir: left out {len(damaged)} of {len(labels) + len(damaged)} images of {split}, which cannot be '
            f'read: {", ".join(damaged[:5])}{", ..." if len(damaged) > 5 else ""}', stacklevel=2)
    return images, labels


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation, on the device of the images

def crop_and_flip(images: torch.Tensor, generator: torch.Generator, pad: int, hflip: float = 0.5) -> torch.Tensor:
    """Pad each image by `pad` black pixels, cut it to its old size at a random place, and mirror some of the images.

    Shapes: (N, C, H, W) -> (N, C, H, W). `hflip` is the share of images that are mirrored.
    """
    n, _, height, width = images.shape
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < hflip
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    each, rows, columns = (t.to(images.device) for t in (torch.arange(n), rows, columns))
    padded = torch.nn.functional.pad(images, [pad] * 4)
    return padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def draw_boxes(
        n: int, height: int, width: int, scale: Sequence[float], ratio: Sequence[float], generator: torch.Generator,
) -> torch.Tensor:
    """Return n boxes as RandomResizedCrop draws them, int64 (4, n): top, left, height, width.

    Of ten areas, uniform between the bounds of `scale` (shares of the image), and ratios of width to height, uniform in
    their logarithm between those of `ratio`, the first box that lies in the image is taken; else the largest one in
    its middle whose ratio lies between the bounds.
    """
    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    areas = height * width * uniform(*scale, n, ATTEMPTS)
    ratios = uniform(*torch.tensor(ratio, dtype=torch.float64).log().tolist(), n, ATTEMPTS).exp()
    widths, heights = (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()
    fits = (widths <= width) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h = widths.gather(1, first)[:, 0], heights.gather(1, first)[:, 0]
    top, left = (torch.floor(uniform(0, 1, n) * (side - taken + 1)).long() for side, taken in ((height, h), (width, w)))
    none, (low, high) = ~fits.any(1), ratio
    w_most, h_most = min(width, round(height * high)), min(height, round(width / low))
    middle = torch.tensor([(height - h_most) // 2, (width - w_most) // 2, h_most, w_most])
    return torch.where(none, middle[:, None], torch.stack([top, left, h, w]))


def _triangle(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    x = x.abs()  # Keys' kernel with a = -1/2, as Pillow has it
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


FILTERS = {'bilinear': _triangle, 'bicubic': _cubic}


def resampling(start: torch.Tensor, length: torch.Tensor, of: int, to: int, interpolation: str) -> torch.Tensor:
    """Return matrices that cut pieces out of lines of pixels and scale them, with antialiasing, as Pillow does.

    Args:
        start, length: First pixel and number of pixels of each piece, (N,).
        of: Pixels of a line.
        to: Pixels of a scaled piece.
        interpolation: One of `FILTERS`.

    Returns:
        Float tensor (N, to, of), whose rows sum to 1.
    """
    start, length = start[:, None, None], length[:, None, None]
    pixels = torch.arange(of, device=start.device) + 0.5  # centres
    step = length / to
    centres = start + (torch.arange(to, device=start.device)[:, None] + 0.5) * step
    weights = FILTERS[interpolation]((pixels - centres) / step.clamp(min=1))
    weights = weights * ((pixels > start) & (pixels < start + length))
    return weights / weights.sum(-1, keepdim=True)


def cut_and_scale(
        images: torch.Tensor, boxes: torch.Tensor, mirrored: torch.Tensor, size: Sequence[int], interpolation: str,
) -> torch.Tensor:
    """Cut a box out of each image, scale it, and mirror it where asked for.

    Args:
        images: (N, C, H, W), of any dtype.
        boxes: (4, N): top, left, height, width.
        mirrored: bool (N,).
        size: Height and width of the result.
        interpolation: One of `FILTERS`.

    Returns:
        Float tensor (N, C, *size). Bicubic values may lie beyond those of the image, and are cut to [0, 255].
    """
    (top, left, h, w), (height, width) = boxes, images.shape[2:]
    rows = resampling(top, h, height, size[0], interpolation)
    columns = resampling(left, w, width, size[1], interpolation)
    columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    return (rows[:, None] @ images.float() @ columns[:, None].mT).clamp(0, 255)


def resized_crops(
        images: torch.Tensor, generator: torch.Generator, size: Sequence[int], scale: Sequence[float],
        ratio: Sequence[float], hflip: float, interpolation: str) -> torch.Tensor:
    """Scale a random box of each image to `size`, and mirror some of the images.

    Shapes: (N, C, H, W) -> float (N, C, *size). The others as for `draw_boxes`, `crop_and_flip` and `cut_and_scale`.
    """
    n, _, height, width = images.shape
    boxes = draw_boxes(n, height, width, scale, ratio, generator)
    mirrored = torch.rand(n, generator=generator) < hflip
    return cut_and_scale(images, boxes.to(images.device), mirrored.to(images.device), size, interpolation)


# ---------------------------------------------------------------------------------------------------------------------
# Batches

class TensorImages:
    """Batches out of `decode`'s tensors, on the device of these.

    Args:
        images, labels: uint8 (N, 3, H, W) and (N,).
        batch_size: Images a batch. In training the last, incomplete one is left out.
        mean, std: Per channel, for images in [0, 1].
        seed: Of the run; order, crops and mirrors depend on it and on the epoch alone.
        augment: Function of images (N, 3, H, W) and a generator of the CPU; None for evaluation: every image once, in
            order.
    """

    def __init__(
            self, images: torch.Tensor, labels: torch.Tensor, batch_size: int, mean: Sequence[float],
            std: Sequence[float], seed: int = 0, augment: Augment | None = None) -> None:
        self.images, self.labels, self.batch_size, self.seed, self.augment = images, labels, batch_size, seed, augment
        self.scale = (1 / (255 * torch.tensor(std))).reshape(-1, 1, 1).to(images.device)
        self.offset = (torch.tensor(mean) / torch.tensor(std)).reshape(-1, 1, 1).to(images.device)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + (rest > 0 and self.augment is None)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch: normalised images (N, 3, H, W) and labels (N,)."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        order = torch.arange(len(self.labels))
        if self.augment is not None:
            order = torch.randperm(len(self.labels), generator=generator)
        for chosen in order.to(self.images.device).split(self.batch_size)[:len(self)]:
            images = self.images[chosen]
            if self.augment is not None:
                images = self.augment(images, generator)
            yield images * self.scale - self.offset, self.labels[chosen]


class LoaderImages:
    """Batches of timm's loader, whose random numbers are those that torch, numpy and Python are seeded with."""

    def __init__(self, loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Return the batches of an epoch: normalised images (N, 3, H, W) and labels (N,)."""
        return iter(self.loader)


def _augment(config) -> Augment:
    if config.pad_crop is not None:
        return partial(crop_and_flip, pad=config.pad_crop, hflip=config.hflip)
    return partial(
        resized_crops, size=config.input_size[1:], scale=config.scale, ratio=config.ratio, hflip=config.hflip,
        interpolation=config.interpolation)


def create_images(config, data_dir: str, cache: str, workers: int, training: bool, device: torch.device):
    """Return the images of one split, as a `FitConfig` says."""
    split = config.train_split if training else config.val_split
    common = dict(batch_size=config.batch_size, mean=config.mean, std=config.std)
    if config.in_memory:
        size = config.memory_size if training and config.memory_size else config.input_size[-1]
        images, labels = decode(
            data_dir, split, size, cache, classes=config.num_classes, crop_pct=1.0 if training else config.crop_pct,
            interpolation=config.interpolation, workers=workers)
        return TensorImages(
            images.to(device), labels.to(device), seed=config.seed, augment=_augment(config) if training else None,
            **common)
    # Without a prefetcher and with new workers each epoch, no state of theirs outlives it.
    loader = create_loader(
        open_folder(data_dir, split, config.num_classes), tuple(config.input_size), is_training=training,
        train_crop_mode=config.train_crop_mode, scale=config.scale, ratio=config.ratio, hflip=config.hflip,
        color_jitter=config.color_jitter, crop_pct=config.crop_pct, interpolation=config.interpolation,
        num_workers=workers, use_prefetcher=False, persistent_workers=False, **common)
    return LoaderImages(loader)
