"""ABC-Net's convolution of several binary bases."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn as nn

from ..quantizers import abc_input, abc_offsets, abc_weight, abc_weight_bases
from . import BinaryConv2d
from .checks import check_positive


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

    def __init__(self, *args: Any, bases: Sequence[int] = (1, 1), **quantization: Any) -> None:
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
        """Return the weight in use. With one base it is its own sign times its magnitude."""
        return self.weight if self.weight_quantizer is None else abc_weight(self.weight, self.bases[0])

    def alpha(self) -> torch.Tensor:
        """Return the magnitude of the weight in use where there is one base, the same for all channels, (O,)."""
        return abc_weight_bases(self.weight, self.bases[0])[1].sum().abs().expand(self.out_channels)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        return abc_input(x, self.shift, self.beta, self.bases[1])

    def quantized_weight(self) -> torch.Tensor:
        return self.latent_weight()

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, bases={self.bases}'
