"""Images for `fit`: timm's own loader, or a tensor of decoded images that is cropped and flipped batch by batch.

Both give the same batches for the same seed and epoch, so that a run can be resumed: the tensor by itself, the loader
if all random numbers are seeded anew with `epoch_seed` before each epoch.
"""
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from timm.data import create_dataset, create_loader

Batch = tuple[torch.Tensor, torch.Tensor]
SEED_STEP = 10_000  # epochs between the seeds of two runs


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch of a run, so that nothing about random numbers has to be saved."""
    return seed * SEED_STEP + epoch


def decode(data_dir: str, split: str, size: int, cache: str) -> Batch:
    """Return all images of a split of an ImageFolder as uint8 (N, 3, size, size), and their labels (N,).

    They are decoded once and kept in the folder `cache`; delete the file there if the images change.
    """
    path = os.path.join(cache, f'{os.path.basename(os.path.abspath(data_dir))}_{split}_{size}.pt')
    if not os.path.exists(path):
        images, labels = [], []
        for image, label in create_dataset('', data_dir, split):
            if image.size != (size, size):
                image = image.resize((size, size), resample=2)  # bilinear
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            labels.append(label)
        os.makedirs(cache, exist_ok=True)
        torch.save((torch.stack(images), torch.tensor(labels)), path + '.part')
        os.replace(path + '.part', path)  # an interrupted run leaves no half file
    return torch.load(path, weights_only=True)


def crop_and_flip(images: torch.Tensor, pad: int, generator: torch.Generator) -> torch.Tensor:
    """Pad each image by `pad` black pixels, cut it to its old size at a random place, and mirror half of the images.

    Shapes: (N, C, H, W) -> (N, C, H, W).
    """
    n, _, height, width = images.shape
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, [pad] * 4)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class TensorImages:
    """Batches out of `decode`'s tensors.

    Args:
        images, labels: uint8 (N, 3, H, W) and (N,).
        batch_size: Images a batch. In training the last, incomplete one is left out.
        mean, std: Per channel, for images in [0, 1].
        seed: Of the run; order, crops and mirrors depend on it and on the epoch alone.
        pad: For `crop_and_flip`; None for evaluation: every image once, in order.
    """

    def __init__(
            self, images: torch.Tensor, labels: torch.Tensor, batch_size: int, mean: Sequence[float],
            std: Sequence[float], seed: int = 0, pad: int = None) -> None:
        self.images, self.labels, self.batch_size, self.seed, self.pad = images, labels, batch_size, seed, pad
        self.scale = (1 / (255 * torch.tensor(std))).reshape(-1, 1, 1)
        self.offset = (torch.tensor(mean) / torch.tensor(std)).reshape(-1, 1, 1)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + (rest > 0 and self.pad is None)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch: normalised images (N, 3, H, W) and labels (N,)."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        order = torch.arange(len(self.labels))
        if self.pad is not None:
            order = torch.randperm(len(self.labels), generator=generator)
        for chosen in order.split(self.batch_size)[:len(self)]:
            images = self.images[chosen]
            if self.pad is not None:
                images = crop_and_flip(images, self.pad, generator)
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


def create_images(config, data_dir: str, cache: str, workers: int, training: bool):
    """Return the images of one split, as a `FitConfig` says."""
    split = config.train_split if training else config.val_split
    common = dict(batch_size=config.batch_size, mean=config.mean, std=config.std)
    if config.pad_crop is not None:
        images, labels = decode(data_dir, split, config.input_size[-1], cache)
        return TensorImages(images, labels, seed=config.seed, pad=config.pad_crop if training else None, **common)
    # Without a prefetcher and with new workers each epoch, no state of theirs outlives it.
    loader = create_loader(
        create_dataset('', data_dir, split, is_training=training), tuple(config.input_size), is_training=training,
        train_crop_mode=config.train_crop_mode, scale=config.scale, hflip=config.hflip,
        color_jitter=config.color_jitter, crop_pct=config.crop_pct, interpolation=config.interpolation,
        num_workers=workers, use_prefetcher=False, persistent_workers=False, **common)
    return LoaderImages(loader)
