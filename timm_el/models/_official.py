"""Checkpoints in the layout of the official code: tensors are taken by name, and none may be missing or left over."""
from typing import Any

import torch

__all__ = ['OfficialCheckpoint', 'strip_wrappers']


def strip_wrappers(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without the training script's outer dict and DataParallel's `module.`."""
    state_dict = state_dict.get('state_dict', state_dict)
    return {k[len('module.'):] if k.startswith('module.') else k: v for k, v in state_dict.items()}


class OfficialCheckpoint:
    """Tensors of an official checkpoint, each to be taken once.

    Args:
        state_dict: Tensors under their official names.
        source: Name of the layout, for errors.
    """

    def __init__(self, state_dict: dict[str, torch.Tensor], source: str) -> None:
        self.rest = dict(state_dict)
        self.source = source

    def take(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor in the shape that is asked for, and count it as taken.

        Biases of the official code are (1, C, 1, 1), and some convolution weights lie flat, as (N, 1), under `weights`
        in place of `weight`.

        Raises:
            ValueError: It is missing, or has another number of elements.
        """
        flat = f'{key}s'
        name = flat if len(shape) == 4 and key not in self.rest and flat in self.rest else key
        if name not in self.rest:
            raise ValueError(f'{name}: missing from the checkpoint, expected the layout of {self.source}')
        tensor = self.rest.pop(name)
        if tensor.numel() != torch.Size(shape).numel():
            raise ValueError(f'{name}: found shape {tuple(tensor.shape)}, expected {tuple(shape)}')
        return tensor.reshape(shape)

    def check_empty(self) -> None:
        """Raise ValueError if a tensor was not asked for. Frozen norms ask for no counters of batches."""
        unknown = [key for key in self.rest if not key.endswith('.num_batches_tracked')]
        if unknown:
            raise ValueError(
                f'{unknown[0]}: unknown key in the checkpoint, nor are {len(unknown) - 1} others known; '
                f'expected the layout of {self.source}')
