"""Binarized neural networks for timm: Elastic-Link, converters, packed weights.

Importing this package registers its models with timm and does nothing else.
"""
from . import engine, models
from .convert.binarize import binarize
from .engine import deploy
from .hub import from_hub, push_to_hub, save_for_hub
from .recipes import RECIPES, Recipe
from .summary import summarize
from .version import __version__
from .weights.loading import CheckpointError, load_float, load_packed
from .weights.packed import pack_state_dict, save_packed, unpack_state_dict

__all__ = [
    '__version__', 'binarize', 'CheckpointError', 'deploy', 'engine', 'from_hub', 'load_float', 'load_packed', 'models',
    'pack_state_dict', 'push_to_hub', 'Recipe', 'RECIPES', 'save_for_hub', 'save_packed', 'summarize',
    'unpack_state_dict',
]
