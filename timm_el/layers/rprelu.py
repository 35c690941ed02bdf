"""Learned shifts before and after a sign, as in ReActNet."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..quantizers import get_quantizer
from .checks import check_positive


class Shift(nn.Module):
    """Learnable shift per channel: y = x + bias, bias of shape (C,), initialised to 0.

    Before a `BinaryConv2d` it is ReActNet's threshold: Sign(x + bias) = Sign(x - a) with a = -bias.

    Args:
        channels: C, the size of axis 1 of the input.
    """

    def __init__(
            self,
            channels: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(channels=channels)
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias.reshape(-1, 1, 1)

    def extra_repr(self) -> str:
        return f'{self.bias.numel()}'


class RSign(Shift):
    """ReActNet's RSign: y = Sign(x + bias), with a learnable threshold -bias per channel (ReActNet, section 4.2).

    For use by itself. Inside a `BinaryUnit` the convolution takes the sign, so `Shift` as `pre` is all that is needed.

    Args:
        channels: C, the size of axis 1 of the input.
        quantizer: Name of the sign's estimator.
    """

    def __init__(
            self,
            channels: int,
            quantizer: str = 'approx',
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, device=device, dtype=dtype)
        self.quantize = get_quantizer(quantizer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quantize(x + self.bias.reshape(-1, 1, 1))  # super() cannot be scripted


class RPReLU(nn.Module):
    """ReActNet's RPReLU: y = PReLU(x + shift_in) + shift_out, all three per channel (ReActNet, section 4.2).

    Args:
        channels: C, the size of axis 1 of the input.
        slope: Initial slope for negative values.
    """

    def __init__(
            self,
            channels: int,
            slope: float = 0.25,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(channels=channels)
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels, **dd))
        self.slope = nn.Parameter(torch.full((channels,), slope, **dd))
        self.shift_out = nn.Parameter(torch.zeros(channels, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.prelu(x + self.shift_in.reshape(-1, 1, 1), self.slope) + self.shift_out.reshape(-1, 1, 1)

    def extra_repr(self) -> str:
        return f'{self.slope.numel()}'
