"""Weights: bits, the packed file, and what may be loaded into what."""
from .files import save_packed
from .loading import CheckpointError, load_float, load_packed
from .packed import pack_state_dict, unpack_state_dict

__all__ = ['CheckpointError', 'load_float', 'load_packed', 'pack_state_dict', 'save_packed', 'unpack_state_dict']
