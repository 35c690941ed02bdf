"""Photographs: those that scikit-learn carries, and any that a user names, as a model wants to see them."""
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from timm.data import create_transform, resolve_data_config

from ..engine.export import label_names as names_of

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLES = ('china.jpg', 'flower.jpg')  # scikit-learn's


def read(name: str) -> 'Image':
    """Return an image from a path, upright as its EXIF data say, or a sample of scikit-learn by its name.

    Raises:
        ValueError: There is no such file, or it is no image.
    """
    from PIL import Image, ImageOps

    from .images import UNREADABLE
    if not Path(name).is_file() and name in SAMPLES:
        try:
            from sklearn.datasets import load_sample_image
        except ImportError as e:
            raise SystemExit(f'{name} comes with scikit-learn: pip install "timm-el[demo]"') from e
        return Image.fromarray(load_sample_image(name))
    try:
        with Image.open(name) as image:
            return ImageOps.exif_transpose(image).convert('RGB')
    except FileNotFoundError:
        raise ValueError(f'{name}: found no such file, expected an image or a folder of images') from None
    except UNREADABLE as e:
        raise ValueError(f'{name}: Pillow cannot read this as an image: {e}') from None


def find(paths: list[str]) -> list[str]:
    """Return paths of images: files as they are, and those anywhere in a folder; scikit-learn's samples for no path.

    Raises:
        ValueError: There is no image in a folder.
    """
    from PIL import Image
    known = [ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN]
    names: list[str] = []
    for path in paths or SAMPLES:
        inside = [path]
        if Path(path).is_dir():
            inside = sorted(str(p) for p in Path(path).rglob('*') if p.suffix.lower() in known)
            if not inside:
                raise ValueError(f'{path}: found no image in this folder')
        names += inside
    return names


def prepare(model: nn.Module, image: 'Image', img_size: int | None = None) -> torch.Tensor:
    """Return an image (C, H, W) as the config of the model says, at the model's own size if none is given."""
    config = resolve_data_config({'img_size': img_size}, model=model)
    return create_transform(**config)(image)


def label_names(model: nn.Module) -> list[str]:
    """Return the names of the model's classes: its config's, ImageNet's for a head of that size, or numbers."""
    return names_of(model) or [f'class {i}' for i in range(model.num_classes)]


def classify(model: nn.Module, x: torch.Tensor, top: int = 3) -> list[tuple[str, float]]:
    """Return names and probabilities, 0 to 1, of the most probable classes of one image (C, H, W)."""
    names = label_names(model)
    with torch.inference_mode():
        best = model(x[None]).softmax(1)[0].topk(min(top, len(names)))
    return [(names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist())]
