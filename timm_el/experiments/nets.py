"""Nets as the command line names them: MODEL, MODEL:RECIPE, either with @WEIGHTS behind it, or a folder."""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn

from ..hub import from_hub, is_hub_weights, read_metrics
from ..models.factory import create
from ..weights.loading import load_checkpoint, read_checkpoint
from .runs import is_run, load_run, read_log

PRETRAINED = 'pretrained'
NET_HELP = (
    'MODEL[:RECIPE][@WEIGHTS]: a timm model, el_resnet26 or el_resnet26.imagenette; a recipe to binarize it with; a '
    f'file of weights (packed, or what train.py wrote) or the word {PRETRAINED}. Or a folder that train.py, `fit` or '
    '`push` wrote, with its own weights, or FOLDER@FILE')


@dataclass(frozen=True)
class Net:
    """A network that was named on the command line.

    Args:
        text: As it was named.
        model: Name of a timm model, or a folder.
        recipe: Recipe to binarize it with; None: its own.
        weights: A file, 'pretrained', or None for fresh ones; of a folder, both of these mean its own.
    """
    text: str
    model: str
    recipe: str | None = None
    weights: str | None = None

    @classmethod
    def parse(cls, text: str, weights: str | None = None) -> 'Net':
        """Read a net from text; `weights` are those of a text that names none.

        Raises:
            ValueError: There is no such file of weights, or a recipe stands behind a folder.
        """
        if os.path.isdir(text):
            return cls(text, text, weights=weights)
        name, _, named = text.partition('@')
        model, _, recipe = (name, '', '') if os.path.isdir(name) else name.partition(':')
        if recipe and os.path.isdir(model):
            raise ValueError(f'{text}: found the recipe {recipe!r}, expected none, as the folder has its own')
        if named not in ('', PRETRAINED) and not os.path.isfile(named):
            raise ValueError(f'{text}: found no file {named!r}, expected weights behind @, or the word {PRETRAINED}')
        return cls(text, model, recipe or None, named or weights)

    @property
    def label(self) -> str:
        """Short name for tables and pictures."""
        stem = os.path.basename(os.path.normpath(self.model))
        return stem if self.recipe is None else f'{stem}, {self.recipe}'

    def build(self) -> nn.Module:
        """Return the network in eval mode.

        Raises:
            RuntimeError: Of timm: pretrained weights were asked for, and there are none.
        """
        file = None if self.weights == PRETRAINED else self.weights
        if os.path.isdir(self.model):
            model = (load_run if is_run(self.model) else from_hub)(self.model)
        elif file is None:
            model = create(self.model, self.recipe, pretrained=self.weights == PRETRAINED)
        else:
            model = create(self.model, self.recipe, **self._classes())
        if file is not None:
            load_checkpoint(model, file)
        return model.eval()

    def _classes(self) -> dict[str, Any]:
        """Return the num_classes of the weights' own classifier as an argument, or none where it cannot be found."""
        cfg = timm.get_pretrained_cfg(self.model)
        if cfg is None:
            return {}
        tensors, name = read_checkpoint(self.weights), f'{cfg.classifier}.weight'
        weight = tensors.get(name, tensors.get(f'{name}_int8'))
        return {} if weight is None else {'num_classes': weight.shape[0]}

    def recorded(self, model: nn.Module) -> dict[str, float]:
        """Return metrics by name from the log of a run, or from the card that belongs to the weights of `model`."""
        if os.path.isdir(self.model) and self.weights in (None, PRETRAINED):
            return {'top1': read_log(self.model)['eval_top1'][-1]} if is_run(self.model) else read_metrics(self.model)
        file = model.pretrained_cfg.get('file') if self.weights == PRETRAINED else self.weights
        # A card says nothing of a file that merely lies beside it.
        return read_metrics(Path(file).parent) if file and is_hub_weights(file, model) else {}
