"""TTQ's convolution of trained ternary weights."""
from typing import Any

import torch
import torch.fx
import torch.nn as nn

from ..quantizers import ttq, ttq_levels
from . import BinaryConv2d


class TrainedTernaryConv2d(BinaryConv2d):
    r"""TTQ's convolution: ternary weights with two learned levels (Zhu et al., ICLR 2017).

    y = x (*) `quantizers.ttq`(W, levels) + bias

    The levels start at `quantizers.ttq_levels`, the mean magnitude of the weights on either side.

    Args:
        args, quantization: As for `BinaryConv2d`; `weight_quantizer` and `scale_weight` have no effect.
    """

    def __init__(self, *args: Any, **quantization: Any) -> None:
        super().__init__(*args, **{**quantization, 'weight_quantizer': 'twn'})
        self.weight_quantizer = 'ttq'
        self._add_parameters()

    def _add_parameters(self) -> None:
        self.levels = nn.Parameter(ttq_levels(self.weight), self.weight.requires_grad)

    def _share_parameters(self, source: nn.Module):
        super()._share_parameters(source)
        self._add_parameters()
        return self

    def quantized_weight(self) -> torch.Tensor:
        return ttq(self.weight, self.levels)

    def derived_state(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {'levels': ttq_levels(weight)}
