"""What inputs and arguments must be, and the errors that say so."""
import operator
from typing import Tuple

import torch
import torch.nn as nn

from ..quantizers import is_symbolic

__all__ = ['check_positive', 'check_float', 'check_images', 'guard_input']


def check_positive(**counts: int) -> None:
    for name, value in counts.items():
        try:
            positive = not isinstance(value, bool) and operator.index(value) > 0
        except TypeError:
            positive = False
        if not positive:
            raise ValueError(f'{name}: found {value!r}, expected a positive integer')


def check_float(x: torch.Tensor, where: str) -> None:
    """Raise TypeError unless x is a float tensor. Tracers see no shapes, so they are let pass."""
    if torch.jit.is_scripting():
        if not x.is_floating_point():
            raise TypeError('input: expected a float tensor; convert images with .float() and normalise them')
    elif not is_symbolic(x) and not x.is_floating_point():
        raise TypeError(
            f'{where} input: found dtype {x.dtype}, expected a float tensor; '
            f'convert images with .float() and normalise them')


def check_images(x: torch.Tensor, channels: int, where: str) -> None:
    """Raise unless x is a float tensor (N, channels, H, W)."""
    check_float(x, where)
    if torch.jit.is_scripting():
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError('input: expected a 4-D tensor (N, C, H, W) with the channels of the layer')
    elif not is_symbolic(x) and (x.dim() != 4 or x.shape[1] != channels):
        raise ValueError(
            f'{where} input: found shape {tuple(x.shape)}, expected (N, {channels}, H, W); '
            f'a single image needs a batch axis: x.unsqueeze(0)')


def guard_input(conv: nn.Conv2d, min_size: int) -> None:
    """Make a network's first convolution refuse what its network cannot take, before anything is computed.

    The guard is a forward pre-hook, because the first convolution is the host's own; it also runs in TorchScript.

    Args:
        conv: The convolution that sees the images.
        min_size: Smallest height and width, the stride of the whole network.
    """
    conv.min_input_size = min_size
    conv.register_forward_pre_hook(_guard_input)


def _guard_input(self, input: Tuple[torch.Tensor]) -> None:
    x = input[0]
    check_images(x, self.in_channels, 'images')
    if torch.jit.is_scripting():
        if min(x.shape[2], x.shape[3]) < self.min_input_size:
            raise ValueError('images input: smaller than the stride of the network; resize the images')
    else:
        if not is_symbolic(x) and min(x.shape[2:]) < self.min_input_size:
            raise ValueError(
                f'images input: found {x.shape[2]} x {x.shape[3]} pixels, expected at least '
                f'{self.min_input_size} x {self.min_input_size}, the stride of the network; resize the images')
