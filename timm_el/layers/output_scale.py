"""Factors of a binary convolution's output: XNOR-Net++'s learned scales, Real-to-Binary's gate."""
import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from .checks import check_positive


def _stretched(factors: torch.Tensor, size: int) -> torch.Tensor:
    """Return factors (n,) at another length (size,), linearly interpolated."""
    if factors.shape[0] == size:
        return factors
    return F.interpolate(factors[None, None], size=[size], mode='linear', align_corners=False)[0, 0]

torch.fx.wrap('_stretched')  # depends on the size of the input, which a tracer does not know


class LearnedScale(nn.Module):
    """XNOR-Net++'s learned scale of a binary convolution (Bulat and Tzimiropoulos, BMVC 2019, section 3).

    y[n, c, i, j] * channel[c] * row[i] * column[j]        (the paper's case 4, the best of its four)
    y[n, c, i, j] * channel[c]                             (case 1, where `size` is None)

    It takes the place of alpha and K. All factors start at 1. Rows and columns belong to one image size; at another
    they are interpolated linearly, so that every size runs, but train at the size of use, or without them.

    Shapes: x any, y (N, C, H', W') -> that of y.

    Args:
        channels: C.
        size: (H', W') of the convolution's output; None for factors of channels alone.
    """

    def __init__(
            self,
            channels: int,
            size: tuple[int, int] | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        check_positive(channels=channels)
        super().__init__()
        self.channel = nn.Parameter(torch.ones(channels, **dd))
        self.row = self.column = None
        if size is not None:
            height, width = size
            check_positive(height=height, width=width)
            self.row = nn.Parameter(torch.ones(height, **dd))
            self.column = nn.Parameter(torch.ones(width, **dd))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        factor = self.channel.reshape(-1, 1, 1)
        row, column = self.row, self.column
        if row is not None and column is not None:
            factor = factor * _stretched(row, y.shape[2]).reshape(-1, 1) * _stretched(column, y.shape[3])
        return y * factor

    def extra_repr(self) -> str:
        return 'x'.join(str(p.numel()) for p in self.parameters())


class Gate(nn.Module):
    """Real-to-Binary's data-driven scale of a binary convolution (Martinez et al., ICLR 2020, section 4.3).

    y[n, c] * sigmoid( F2 relu( F1 mean_hw(x[n]) ) )[c]

    with x the convolution's input before its sign, F1 (C_in / reduction, C_in) and F2 (C_out, C_in / reduction) without
    biases, drawn He-normal.

    Shapes: x (N, C_in, H, W), y (N, C_out, H', W') -> that of y.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        reduction: Ratio of C_in to the width of the hidden layer.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            reduction: int = 8,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        check_positive(in_channels=in_channels, out_channels=out_channels, reduction=reduction)
        super().__init__()
        hidden = max(in_channels // reduction, 1)
        self.fc1 = nn.Linear(in_channels, hidden, bias=False, **dd)
        self.fc2 = nn.Linear(hidden, out_channels, bias=False, **dd)
        for fc in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(fc.weight)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return y * gate.unsqueeze(-1).unsqueeze(-1)
