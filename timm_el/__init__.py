"""Binarized neural networks for timm: Elastic-Link, converters, packed weights.

Importing this package registers its models with timm and does nothing else.
"""
from . import models
from .convert import binarize
from .recipes import RECIPES, Recipe
from .summary import summarize

__version__ = '0.1.0'

__all__ = ['binarize', 'models', 'Recipe', 'RECIPES', 'summarize']
