"""What single methods of the comparison need beyond the common layers, a few lines each.

| method | what it adds | where it stands in a `BinaryUnit` |
|---|---|---|
| XNOR-Net++ | `LearnedScale`: a factor per channel, row and column | `scale` |
| Real-to-Binary | `Gate`: a factor per channel that depends on the input | `scale` |
| ABC-Net | `MultiBaseConv2d`: M bases for the weight, N for the input | `conv` |
| TTQ | `TrainedTernaryConv2d`: two learned levels for the weight | `conv` |

All others are made of `layers` alone, by their row in `recipes.py`: TBN is a quantizer of the input, TWN one of the
weight, ReActNet a `Shift` and an `RPReLU`.
"""
from typing import Optional, Sequence, Tuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from .layers import BinaryConv2d
from .layers.checks import check_positive
from .quantizers import abc_input, abc_offsets, abc_weight, abc_weight_bases, ttq, ttq_levels

__all__ = ['LearnedScale', 'Gate', 'MultiBaseConv2d', 'TrainedTernaryConv2d']


def _stretched(factors: torch.Tensor, size: int) -> torch.Tensor:
    """Factors (n,) at another length, linearly interpolated."""
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

    def __init__(self, channels: int, size: Optional[Tuple[int, int]] = None, device=None, dtype=None) -> None:
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
        reduction: How much narrower the hidden layer is.
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: int = 8, device=None, dtype=None) -> None:
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


class MultiBaseConv2d(BinaryConv2d):
    r"""ABC-Net's convolution: M * N binary ones (Lin et al., NeurIPS 2017, eq. 11).

    y = sum_n sum_m beta_n alpha_m ( A_n(x) (*) B_m(W) ) + bias

    with B_m and alpha as in `quantizers.abc_weight_bases` (of the latent weight), and A_n as in `quantizers.abc_input`,
    with learned shifts v (`shift`) and scales beta. As a convolution is linear, it is computed as the one convolution
    of sum_n beta_n A_n with sum_m alpha_m B_m.

    v starts at 0.5 + u_n, which is Sign(x) for N = 1 and thresholds spread over (-1, 1) otherwise, as those of the
    weight are; beta at 1 / N. It is no single xor and popcount: `is_binary` is False.

    Args:
        args, quantization: As for `BinaryConv2d`; `input_quantizer` must be 'ste', `scale_weight` has no effect.
        bases: (M, N).

    Raises:
        ValueError: `bases` are not two positive integers, or `input_quantizer` is another.
    """

    def __init__(self, *args, bases: Sequence[int] = (1, 1), **quantization) -> None:
        if not isinstance(bases, (tuple, list)) or len(bases) != 2:
            raise ValueError(f'bases: found {bases!r}, expected (M, N), bases of the weight and of the input')
        check_positive(**{f'bases[{i}]': n for i, n in enumerate(bases)})
        if quantization.get('input_quantizer', 'ste') != 'ste':
            raise ValueError(
                f"input_quantizer: found {quantization['input_quantizer']!r}, the bases of an input are signs, "
                f"expected 'ste'")
        super().__init__(*args, **{**quantization, 'scale_weight': False})
        self.bases = tuple(bases)
        self.has_lean_form = False
        # With one base the weight is +-alpha, as elsewhere, and packs.
        self.scale_weight = self.weight_quantizer is not None
        self._add_parameters()

    def _add_parameters(self) -> None:
        dd = {'device': self.weight.device, 'dtype': self.weight.dtype}
        count, trains = self.bases[1], self.weight.requires_grad
        self.shift = nn.Parameter(torch.tensor([0.5 + offset for offset in abc_offsets(count)], **dd), trains)
        self.beta = nn.Parameter(torch.full((count,), 1 / count, **dd), trains)

    def _share_parameters(self, source: nn.Module):
        super()._share_parameters(source)
        self._add_parameters()
        return self

    @property
    def is_binary(self) -> bool:
        """False: an inference engine for one xor and popcount does not know the bases."""
        return False

    @property
    def weight_bits(self) -> int:
        """Bits of a weight: one a base."""
        return 0 if self.weight_quantizer is None else self.bases[0]

    @property
    def binary_products(self) -> int:
        """Binary convolutions that the layer takes: M * N."""
        return self.weight_bits * self.bases[1]

    def latent_weight(self) -> torch.Tensor:
        """The weight in use, whose sign and magnitude are all that is left of it where there is one base."""
        return self.weight if self.weight_quantizer is None else abc_weight(self.weight, self.bases[0])

    def alpha(self) -> torch.Tensor:
        """Magnitude of the weight in use where there is one base, the same for all channels, (O,)."""
        return abc_weight_bases(self.weight, self.bases[0])[1].sum().abs().expand(self.out_channels)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        return abc_input(x, self.shift, self.beta, self.bases[1])

    def quantized_weight(self) -> torch.Tensor:
        return self.latent_weight()

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, bases={self.bases}'


class TrainedTernaryConv2d(BinaryConv2d):
    r"""TTQ's convolution: ternary weights with two learned levels (Zhu et al., ICLR 2017).

    y = x (*) `quantizers.ttq`(W, levels) + bias

    The levels start at `quantizers.ttq_levels`, the mean magnitude of the weights on either side.

    Args:
        args, quantization: As for `BinaryConv2d`; `weight_quantizer` and `scale_weight` have no effect.
    """

    def __init__(self, *args, **quantization) -> None:
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
