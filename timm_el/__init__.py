"""Binarized neural networks for timm: Elastic-Link, converters, packed weights.

Importing this package registers its models with timm and does nothing else.
"""
from . import models
from .convert import binarize
from .recipes import RECIPES, Recipe
from .summary import summarize
from .version import __version__

__all__ = ['__version__', 'binarize', 'models', 'Recipe', 'RECIPES', 'summarize']
