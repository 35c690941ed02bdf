"""Binarized neural networks for timm: Elastic-Link, converters, packed weights, an engine for CPUs.

Importing this package registers its models with timm, loads the engine's native library, of which TIMM_EL_ISA may name
the instruction set, and defines the engine's operators.
"""
from typing import TYPE_CHECKING

from . import engine, models
from ._moved import moved_to
from .convert import binarize
from .engine import deploy, export
from .engine import read_program as load_program
from .hub import from_hub, push_to_hub, save_for_hub
from .recipes import RECIPES, Recipe
from .summary import summarize
from .version import __version__
from .weights import CheckpointError, load_float, load_packed, pack_state_dict, save_packed, unpack_state_dict

__all__ = [
    '__version__', 'binarize', 'CheckpointError', 'deploy', 'engine', 'export', 'from_hub', 'load_float',
    'load_packed', 'load_program', 'models', 'pack_state_dict', 'push_to_hub', 'Recipe', 'RECIPES', 'save_for_hub',
    'save_packed', 'summarize', 'unpack_state_dict',
]


if not TYPE_CHECKING:  # to a type checker a module with `__getattr__` has every name
    def __getattr__(name: str):
        raise AttributeError(moved_to(f'{__name__}.{name}') or f'module {__name__!r} has no attribute {name!r}')
