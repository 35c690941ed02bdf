"""Application of edits to a model, with a way back."""
from collections.abc import Iterable
from contextlib import ExitStack

import torch.nn as nn

from ..layers import BinaryUnit
from .sites import Edit, get_module


def apply(model: nn.Module, edits: Iterable[Edit], undo: ExitStack) -> None:
    """Put modules in their places, at every path that the module has that was there.

        with ExitStack() as undo:
            apply(model, edits, undo)
            ...              # whatever is raised here, KeyboardInterrupt too, leaves the model as it was
            undo.pop_all()   # it went well

    Args:
        model: The model; it is changed.
        edits: In the order in which they are made.
        undo: Gets a callback for each assignment, before it is made.
    """
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    for edit in edits:
        old = get_module(model, edit.path)
        for place in places.get(old, [edit.path]):
            parent_path, _, name = place.rpartition('.')
            parent = model.get_submodule(parent_path)
            undo.callback(setattr, parent, name, old)
            if not isinstance(edit.module, BinaryUnit):
                edit.module.training = parent.training
            setattr(parent, name, edit.module)
