"""Handwritten digits: scikit-learn's 1,797 scans as a folder of images, for a training of a few minutes."""
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
DIGITS, HELD_OUT = 1_797, 360  # images, the last fifth of the shuffled set


def _held_out(limit: int) -> int:
    return limit * HELD_OUT // DIGITS


def write_digits(folder: Path, seed: int, limit: int = DIGITS) -> None:
    """Write an ImageFolder with train/ and validation/, shuffled by the seed.

    Args:
        folder: Folder to write.
        seed: Of the shuffle.
        limit: Images in all; a fifth of them is held out.

    Raises:
        SystemExit: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise SystemExit('the demo needs scikit-learn: pip install "timm-el[demo]"') from e
    data = load_digits()
    order = np.random.RandomState(seed).permutation(len(data.target))[:limit]
    held_out = _held_out(len(order))
    for place, i in enumerate(order):
        split = 'train' if place < len(order) - held_out else 'validation'
        path = folder / split / str(data.target[i]) / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 255 / 16).astype(np.uint8)).convert('RGB').save(path)  # 0 to 16 in the set


def digits_config(model: str, recipe: str, epochs: int, size: int, seed: int, limit: int = DIGITS) -> dict:
    """Return the fields of a `FitConfig` for as many digits as `write_digits` wrote.

    Digits must not be mirrored, and an 8x8 image can spare little at its edges.
    """
    return dict(
        model=model, recipe=recipe, epochs=epochs, input_size=[3, size, size], seed=seed, mean=[0.5] * 3, std=[0.5] * 3,
        train_crop_mode='rrc', scale=[0.8, 1.0], hflip=0.0, opt='adam', lr=0.003,
        batch_size=min(64, limit - _held_out(limit)))
