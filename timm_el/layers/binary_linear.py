"""Linear layer of binary inputs and binary weights (paper, equation 3)."""
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from .checks import check_float, check_positive
from .quantized import _Quantized


class BinaryLinear(_Quantized, nn.Linear):
    """Product of a binary input with a binary weight: y = ( Sign(x) Sign(W)^T ) . alpha . K + bias (paper, eq. 3).

    alpha is the mean of abs(W) per output feature, K the mean of abs(x) per row of the input.

    Shapes: x (..., in_features) float -> (..., out_features).

    Args:
        in_features, out_features, bias, device, dtype: As for `torch.nn.Linear`, in the same order.
        input_quantizer, weight_quantizer, scale_weight, scale_input, input_scale_grad, weight_scale_grad: As for
            `BinaryConv2d`.

    Raises:
        ValueError: An unknown quantizer or a feature count that is not positive.
        TypeError: The input is not a float tensor (forward).
    """

    def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            *,
            input_quantizer: str | None = 'ste',
            weight_quantizer: str | None = 'ste',
            scale_weight: bool = True,
            scale_input: bool = False,
            input_scale_grad: bool = False,
            weight_scale_grad: bool = False,
    ) -> None:
        check_positive(in_features=in_features, out_features=out_features)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_quantization(
            input_quantizer, weight_quantizer, scale_weight, scale_input, input_scale_grad, weight_scale_grad)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **quantization: Any) -> 'BinaryLinear':
        """Return a binary linear layer that shares the parameters of a float one."""
        binary = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device='meta', **quantization)
        return binary._share_parameters(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_float(x, 'BinaryLinear')
        signed = self.quantized_input(x)
        weight = self.quantized_weight()
        if not self.scale_input:
            return F.linear(signed, weight, self.bias)
        real = x if self.input_scale_grad else x.detach()
        y = F.linear(signed, weight) * real.abs().mean(-1, keepdim=True)
        bias = self.bias
        return y if bias is None else y + bias
