"""Creation of networks by name: registered models, and nets of timm that a recipe converts."""
from typing import Any

import timm
import torch.nn as nn

from ..convert import binarize

__all__ = ['create', 'is_ours']


def is_ours(name: str) -> bool:
    """Return whether this package registers a model of this name."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith('timm_el.')


def create(name: str, recipe: str | None = None, **kwargs: Any) -> nn.Module:
    """Create a timm model; a recipe is an argument of a registered model of this package, and converts any other.

    Raises:
        ValueError: The model has a recipe of its own, and another one is asked for.
    """
    if recipe is None:
        return timm.create_model(name, **kwargs)
    if is_ours(name):
        if timm.model_entrypoint(name).__module__.endswith('.reactnet'):
            raise ValueError(f'recipe: found {recipe!r}, expected none, as {name} has its own')
        return timm.create_model(name, recipe=recipe, **kwargs)
    return binarize(timm.create_model(name, **kwargs), recipe)
