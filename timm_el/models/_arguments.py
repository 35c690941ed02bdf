"""Checks of constructor arguments, so that a wrong one is named before anything is built."""
import inspect
from typing import Any

import torch.nn as nn


def check_counts(in_chans: Any = 3, num_classes: Any = 1000, **_: Any) -> None:
    """Raise ValueError unless in_chans is a positive and num_classes a non-negative integer."""
    for name, value, least in (('in_chans', in_chans, 1), ('num_classes', num_classes, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f'{name}: found {value!r}, expected an integer of at least {least}')


def check_flags(**flags: Any) -> None:
    """Raise ValueError for a flag that is not a bool: the string 'false' of a command line would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name}: found {value!r}, expected True or False')


def check_arguments(host: type[nn.Module], model: type[nn.Module], kwargs: dict[str, Any]) -> None:
    """Raise TypeError for an argument that neither a host's constructor nor the model's own knows.

    Args:
        host: timm's class.
        model: Our subclass of it.
        kwargs: Arguments for the host's constructor.
    """
    known = [
        name for cls in (model, host) for name, p in inspect.signature(cls.__init__).parameters.items()
        if name != 'self' and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for name in kwargs:
        if name not in known:
            raise TypeError(
                f'{model.__name__}: unknown argument {name!r} (--model-kwargs {name}=...), '
                f'expected some of {", ".join(known)}')
    check_counts(**{k: v for k, v in kwargs.items() if k in ('in_chans', 'num_classes')})
