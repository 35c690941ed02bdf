"""Elastic-Link (paper, equations 4 and 5)."""
import math
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from .checks import check_images, check_positive


class ElasticLink(nn.Module):
    r"""Real-valued path around a binary convolution: pool, then Squeeze, Expand or Identity, divided by gamma (eq. 4).

    With r from eq. 5, r = ceil(C_in / C_out) if C_in >= C_out else ceil(C_out / C_in):

    * Squeeze (C_in > C_out): zero-pad the channels to r * C_out, cut them into r groups of C_out *consecutive*
      channels, sum the groups: y[c] = sum_j x[j * C_out + c].
    * Expand (C_in < C_out): tile all channels r times and cut to C_out: y[c] = x[c mod C_in].
    * Identity: y = x.

    Pooling (for a strided convolution) is a max-pool that comes first: by default kernel = stride, ceil mode, so that
    the output has ceil(H / stride) rows for every H.

    Shapes: x (N, C_in, H, W) -> (N, C_out, H', W'); with channels_last x (..., C_in) -> (..., C_out).

    Args:
        in_channels: C_in.
        out_channels: C_out.
        stride: Stride of the convolution that the link goes around.
        gamma: 'learnable' (a 0-D parameter), 'fixed' (a 0-D buffer of the same name) or None (no division).
            Initialised to r.
        pool: Pooling module to use in place of the default one.
        channels_last: Channels are the last axis, as around a linear layer; there is no pooling then.

    Raises:
        ValueError: Channel counts that are not positive, an unknown gamma, pooling with channels_last.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            stride: int | tuple[int, int] = 1,
            gamma: str | None = 'learnable',
            pool: nn.Module | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            channels_last: bool = False,
    ) -> None:
        check_positive(in_channels=in_channels, out_channels=out_channels)
        if gamma not in ('learnable', 'fixed', None):
            raise ValueError(f"gamma: found {gamma!r}, expected 'learnable', 'fixed' or None")
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.squeeze = in_channels > out_channels
        self.expand = in_channels < out_channels
        self.ratio = math.ceil(max(in_channels, out_channels) / min(in_channels, out_channels))
        strides = tuple(stride) if isinstance(stride, (tuple, list)) else (stride, stride)
        check_positive(**{f'stride[{i}]': s for i, s in enumerate(strides)})
        if channels_last and (pool is not None or strides != (1, 1)):
            raise ValueError('channels_last: there is no pooling around a linear layer, expected stride 1 and no pool')
        self.channel_axis = -1 if channels_last else 1
        if pool is None and strides != (1, 1):
            pool = nn.MaxPool2d(strides, strides, ceil_mode=True)
        self.pool = pool
        self.gamma_mode = gamma
        if gamma is None:
            self.gamma = None
        else:
            value = torch.full((), float(self.ratio), device=device, dtype=dtype)
            if gamma == 'learnable':
                self.gamma = nn.Parameter(value)
            else:
                self.register_buffer('gamma', value)

    @classmethod
    def for_conv(
            cls, conv: nn.Module, gamma: str | None = 'learnable', same_pad: bool = False, pool: str = 'max',
    ) -> Optional['ElasticLink']:
        """Return the link around a given convolution or linear layer.

        gamma is dropped on a link that neither changes channels nor stands for a 1x1 convolution: the paper's Fig. 4
        counts 16 in ResNet26, two a block. Where the convolution's output has not ceil(H / stride) rows for every H
        (no padding, even kernels), the link pools with the convolution's own kernel, stride, padding and dilation.

        Args:
            conv: `torch.nn.Conv2d` or `torch.nn.Linear`.
            gamma: As for the link itself.
            same_pad: The convolution pads for ceil(H / stride) rows, whatever its `padding` says.
            pool: 'max', as in the paper, or 'avg', the mean of the pixels inside the image, where there is pooling.

        Returns:
            The link, or None if no pooling has the convolution's output size (a mean knows no dilation).
        """
        dd = {'device': conv.weight.device, 'dtype': conv.weight.dtype}
        if isinstance(conv, nn.Linear):
            return cls(conv.in_features, conv.out_features, gamma=gamma, channels_last=True, **dd)
        identity = conv.in_channels == conv.out_channels
        if identity and max(conv.kernel_size) > 1:
            gamma = None
        padding = conv.padding
        if padding == 'valid':
            padding = (0, 0)
        window = dict(kernel_size=conv.stride, stride=conv.stride, ceil_mode=True)
        if not same_pad and padding != 'same' and any(
                2 * p != d * (k - 1) for k, p, d in zip(conv.kernel_size, padding, conv.dilation)):
            if any(2 * p > k or k == 2 and p and d > 2 for k, p, d in zip(conv.kernel_size, padding, conv.dilation)):
                return None  # a window would lie in the padding as a whole
            window = dict(kernel_size=conv.kernel_size, stride=conv.stride, padding=padding, dilation=conv.dilation)
        elif tuple(conv.stride) == (1, 1):
            return cls(conv.in_channels, conv.out_channels, 1, gamma, **dd)
        if pool == 'max':
            module: nn.Module = nn.MaxPool2d(**window)
        elif max(window.pop('dilation', (1, 1))) > 1:
            return None
        else:
            module = nn.AvgPool2d(**window, count_include_pad=False)
        return cls(conv.in_channels, conv.out_channels, conv.stride, gamma, module, **dd)

    __jit_unused_properties__ = ['kind']

    @property
    def kind(self) -> str:
        """'squeeze', 'expand' or 'identity'."""
        return 'squeeze' if self.squeeze else 'expand' if self.expand else 'identity'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.channel_axis == 1:
            check_images(x, self.in_channels, 'ElasticLink')
        if self.pool is not None:
            x = self.pool(x)
        if self.squeeze:
            missing = self.ratio * self.out_channels - self.in_channels
            if missing > 0:
                x = F.pad(x, [0, 0, 0, 0, 0, missing] if self.channel_axis == 1 else [0, missing])
            # A sum of slices keeps channels_last, a reduction over an unflattened axis does not.
            groups = x.split(self.out_channels, self.channel_axis)
            x = groups[0]
            for i in range(1, self.ratio):
                x = x + groups[i]
        if self.gamma is not None:
            x = x / self.gamma  # where there are fewest channels: autograd keeps x
        if self.expand:
            x = torch.cat([x] * self.ratio, self.channel_axis)
            if self.ratio * self.in_channels != self.out_channels:
                x = x.narrow(self.channel_axis, 0, self.out_channels)
        return x

    def extra_repr(self) -> str:
        return f'{self.in_channels}, {self.out_channels}, {self.kind}, gamma={self.gamma_mode}'
