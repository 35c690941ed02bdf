"""Binarized neural networks for timm: Elastic-Link, converters, packed weights.

Importing this package registers its models with timm and does nothing else.
"""
from . import models
from .checkpoints import CheckpointError, load_float
from .convert import binarize
from .recipes import RECIPES, Recipe
from .summary import summarize
from .version import __version__

__all__ = [
    '__version__', 'binarize', 'CheckpointError', 'load_float', 'models', 'Recipe', 'RECIPES', 'summarize',
]
