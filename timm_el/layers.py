"""The layers of a binarized network.

One mechanism serves every method: a `BinaryUnit` computes the paper's equation 4,

    unit(x) = post( branch(x) + link(x) )        branch = pre -> conv -> scale -> norm and act, in the recipe's order

where `conv` is usually a `BinaryConv2d`, which signs its input and its weight, and `link` an `ElasticLink`, which
carries the real-valued input around it. Binarization adds no other wrapper to a network.
"""
import math
import operator
from typing import List, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from .quantizers import BITS, ESTIMATORS, WEIGHT_QUANTIZERS, get_quantizer, is_symbolic, lean
from .quantizers import wide_float as _wide_float

__all__ = [
    'weight_scale', 'input_scale', 'BinaryConv2d', 'StandardizedBinaryConv2d', 'BinaryLinear', 'ElasticLink',
    'BinaryUnit', 'Shift', 'RSign', 'RPReLU', 'ZeroShortcut',
]

PAD_VALUES = (-1, 0, 1)


def weight_scale(weight: torch.Tensor, grad: bool = False) -> torch.Tensor:
    """Scale of a binary weight: alpha = mean(abs(W)) per output channel (paper, eq. 3; XNOR-Net).

    The mean is taken in float64, because a float32 mean over +-alpha need not give alpha back, and then a packed file
    would change each time that it is written again.

    Args:
        weight: Latent weight (O, ...).
        grad: Let gradient flow through alpha.

    Returns:
        Tensor (O,) of the weight's dtype.
    """
    weight = weight if grad else weight.detach()
    return weight.abs().flatten(1).mean(1, dtype=_wide_float(weight)).to(weight.dtype)


def input_scale(
        x: torch.Tensor,
        kernel_size: Tuple[int, int],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
        groups: int = 1,
) -> torch.Tensor:
    """Scale of a binary input: K = box_filter( mean over channels of abs(x) ) (paper, eq. 3; XNOR-Net, section 3.2).

    Every tap of the box weighs 1 / (kH * kW); taps in the padding count as zeros. A grouped convolution has one plane
    a group, because its kernels see one group of channels each.

    Args:
        x: Real input (N, C, H, W).
        kernel_size, stride, padding, dilation, groups: Those of the convolution.

    Returns:
        Tensor (N, groups, H', W') with the spatial size of the convolution's output.
    """
    planes = x.abs().unflatten(1, [groups, x.shape[1] // groups]).mean(2)
    box = torch.ones(
        [groups, 1, kernel_size[0], kernel_size[1]], dtype=x.dtype, device=x.device) / (kernel_size[0] * kernel_size[1])
    return F.conv2d(planes, box, None, stride, padding, dilation, groups)


class _Quantized(nn.Module):
    """What `BinaryConv2d` and `BinaryLinear` share: two quantizers and two scales."""
    __jit_unused_properties__ = ['is_binary', 'weight_bits', 'binary_products']

    def _set_quantization(
            self,
            input_quantizer: Optional[str],
            weight_quantizer: Optional[str],
            scale_weight: bool,
            scale_input: bool,
            input_scale_grad: bool,
            weight_scale_grad: bool,
    ) -> None:
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight_quantizer
        self.quantize_input = get_quantizer(input_quantizer, 'input_quantizer')
        self.quantize_weight = get_quantizer(weight_quantizer, 'weight_quantizer', WEIGHT_QUANTIZERS)
        # Ternary weights bring their own scale.
        self.scale_weight = scale_weight and weight_quantizer in ('ste', 'approx')
        self.scale_input = scale_input and input_quantizer is not None
        self.input_scale_grad = input_scale_grad
        self.weight_scale_grad = weight_scale_grad
        self.scale_shape = [-1] + [1] * (self.weight.dim() - 1)
        self.has_lean_form = weight_quantizer in ESTIMATORS

    @property
    def is_binary(self) -> bool:
        """True if weight and input are both signs, so that the layer can run as one xor and popcount."""
        return self.binary_products == 1

    @property
    def weight_bits(self) -> int:
        """Bits of a weight: 1 for signs, 2 for ternary weights, 0 if it is real."""
        return BITS.get(self.weight_quantizer, 0)

    @property
    def binary_products(self) -> int:
        """Products of +-1 and +-1 in one multiply-accumulate: the bits of the input times those of the weight."""
        return BITS.get(self.input_quantizer, 0) * self.weight_bits

    def latent_weight(self) -> torch.Tensor:
        """What the sign is taken of."""
        return self.weight

    def alpha(self) -> torch.Tensor:
        """Scale of the binary weight, (O,)."""
        return weight_scale(self.weight, self.weight_scale_grad)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input in use: Sign(x), or the real input where there is no quantizer."""
        return self.quantize_input(x)

    def quantized_weight(self) -> torch.Tensor:
        """The weight in use: alpha * Sign(W), or the real weight where there is no quantizer."""
        weight = self.quantize_weight(self.latent_weight())
        if self.scale_weight:
            weight = weight * self.alpha().reshape(self.scale_shape)
        return weight

    def _share_parameters(self, source: nn.Module):
        self.weight, self.bias = source.weight, source.bias
        return self.train(source.training)

    def extra_repr(self) -> str:
        scales = [name for name, on in (('alpha', self.scale_weight), ('K', self.scale_input)) if on]
        return (
            f'{super().extra_repr()}, input={self.input_quantizer}, weight={self.weight_quantizer}, '
            f'scales={"+".join(scales) or None}')


def _quantized_weight(weight: torch.Tensor, alpha: Optional[torch.Tensor], quantizer: Optional[str]) -> torch.Tensor:
    weight = ESTIMATORS[quantizer].quantize(weight)
    return weight if alpha is None else weight * alpha


class _QuantizedConv2d(torch.autograd.Function):
    """conv2d of a quantized input with a quantized weight, in their lean forms.

    Autograd would keep the signs of the input as floats, a mask, and the quantized weight. Here it keeps the
    estimator's code of the input (one byte a value for 'ste') and the latent weight, which is a parameter anyway;
    signs are taken again in backward.
    """
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, alpha, bias, input_quantizer, weight_quantizer, stride, padding, dilation, groups):
        return F.conv2d(
            ESTIMATORS[input_quantizer].quantize(x), _quantized_weight(weight, alpha, weight_quantizer), bias,
            stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, alpha, bias, ctx.input_quantizer, ctx.weight_quantizer, *ctx.geometry = inputs
        ctx.dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(ESTIMATORS[ctx.input_quantizer].encode(x), weight, alpha)

    @staticmethod
    def backward(ctx, grad):
        code, weight, alpha = ctx.saved_tensors
        of_input, of_weight = ESTIMATORS[ctx.input_quantizer], ESTIMATORS[ctx.weight_quantizer]
        stride, padding, dilation, groups = ctx.geometry
        # Under autocast the convolution, and so its gradient, has another dtype than the input and the weight.
        signed = of_input.decode(code, grad.dtype)
        quantized = lean(weight, ctx.weight_quantizer)  # with an estimator of its own, for gradients of gradients
        quantized = (quantized if alpha is None else quantized * alpha).to(grad.dtype)
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, signed, quantized, (weight.shape[0],), stride, padding, dilation, False, (0, 0), groups,
            (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]))
        if grad_x is not None:
            grad_x = of_input.gradient_of_code(code, grad_x.to(ctx.dtype))
        grad_alpha = None
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grad_alpha = (grad_weight * lean(weight, ctx.weight_quantizer)).flatten(1).sum(1).reshape_as(alpha)
            grad_weight = of_weight.gradient(weight, grad_weight if alpha is None else grad_weight * alpha)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_alpha, grad_bias, None, None, None, None, None, None


class BinaryConv2d(_Quantized, nn.Conv2d):
    r"""Convolution of a binary input with a binary weight (paper, eq. 3).

    y = ( Sign(x) (*) Sign(W) ) . alpha . K + bias

    with alpha = mean(abs(W)) per output channel (`weight_scale`) and K the local mean of abs(x) (`input_scale`). The
    parameter `weight` is the *latent* real weight. The input is signed first and padded afterwards.

    Gradient: that of the quantizers' estimators; none through alpha unless `weight_scale_grad`, none through K unless
    `input_scale_grad`.

    Shapes: x (N, C_in, H, W) float -> (N, C_out, H', W'), H' and W' as for `torch.nn.Conv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            As for `torch.nn.Conv2d`, in the same order.
        input_quantizer: 'ste', 'approx', 'ternary', 'tanh' (`quantizers.QUANTIZERS`), or None for a real input.
        weight_quantizer: 'ste', 'approx', 'twn' (`quantizers.WEIGHT_QUANTIZERS`), or None for a real weight (stage one
            of two-stage training).
        scale_weight: Apply alpha. Without effect on a real or ternary weight.
        scale_input: Apply K. Without effect on a real input.
        input_scale_grad: Let gradient flow through K.
        weight_scale_grad: Let gradient flow through alpha.
        pad_value: What a padded tap holds after the sign: 0 (contributes nothing), -1 or +1. Only for
            padding_mode='zeros'.
        same_pad: Pad for an output of ceil(H / stride), uneven where need be and known only when the input is
            (TensorFlow's SAME, timm's `Conv2dSame`), in place of `padding`, which must be 0.

    Raises:
        ValueError: An unknown quantizer or pad value, a pad value or `same_pad` with another padding mode, `same_pad`
            with padding, or channel counts that are not positive (construction); an input that is not 4-D or has
            another number of channels (forward).
        TypeError: The input is not a float tensor (forward).
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]],
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[str, int, Tuple[int, int]] = 0,
            dilation: Union[int, Tuple[int, int]] = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: str = 'zeros',
            device=None,
            dtype=None,
            *,
            input_quantizer: Optional[str] = 'ste',
            weight_quantizer: Optional[str] = 'ste',
            scale_weight: bool = True,
            scale_input: bool = False,
            input_scale_grad: bool = False,
            weight_scale_grad: bool = False,
            pad_value: int = 0,
            same_pad: bool = False,
    ) -> None:
        _check_positive(in_channels=in_channels, out_channels=out_channels)
        if pad_value not in PAD_VALUES:
            raise ValueError(f'pad_value: found {pad_value!r}, expected one of {PAD_VALUES}')
        if padding_mode != 'zeros':
            for name, value in (('pad_value', pad_value), ('same_pad', same_pad)):
                if value:
                    raise ValueError(f"{name}: {value} needs padding_mode='zeros', found {padding_mode!r}")
        if same_pad and padding not in (0, (0, 0)):
            raise ValueError(f'same_pad: it takes the place of padding, found padding={padding!r}, expected 0')
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device=device, dtype=dtype)
        self._set_quantization(
            input_quantizer, weight_quantizer, scale_weight, scale_input, input_scale_grad, weight_scale_grad)
        self.pad_value = pad_value
        self.same_pad = same_pad
        # Padding is explicit where conv2d's own zero padding is not what is asked for; 'same' may be uneven.
        self.pad_first = padding_mode != 'zeros' or pad_value != 0 or same_pad or _is_uneven(self)
        self.pad_sides = [int(p) for p in self._reversed_padding_repeated_twice]  # left, right, top, bottom
        if self.pad_first or padding == 'valid':
            self.conv_padding = (0, 0)
        else:
            self.conv_padding = (self.pad_sides[2], self.pad_sides[0])

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **quantization) -> 'BinaryConv2d':
        """A binary convolution that shares the parameters of a float one, which become its latent weight and bias.

        Args:
            conv: The float convolution; it is not changed.
            quantization: The keyword arguments that `BinaryConv2d` has beyond `torch.nn.Conv2d`'s.
        """
        binary = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, device='meta', **quantization)
        return binary._share_parameters(conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_images(x, self.in_channels, 'BinaryConv2d')
        bias = self.bias  # TorchScript narrows None on locals only
        inner_bias = None if self.scale_input else bias  # K does not scale the bias
        if torch.jit.is_scripting():
            y = self.convolve(x, inner_bias)
        else:
            spelled = self.pad_first or not self.has_lean_form or not torch.is_grad_enabled() or is_symbolic(x)
            y = self.convolve_lean(x, inner_bias) if not spelled else self.convolve(x, inner_bias)
        if self.scale_input:
            y = y * self.scale_of_input(x)
            if bias is not None:
                y = y + bias.reshape(-1, 1, 1)
        return y

    def convolve(self, x: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
        """( Sign(x) (*) Sign(W) ) . alpha + bias, spelled out."""
        signed = self.quantized_input(x)
        if self.pad_first:
            mode = 'constant' if self.padding_mode == 'zeros' else self.padding_mode
            value = float(self.pad_value) if mode == 'constant' else None
            signed = F.pad(signed, self.pads(x), mode, value)
        return F.conv2d(
            signed, self.quantized_weight(), bias, self.stride, self.conv_padding, self.dilation, self.groups)

    def pads(self, x: torch.Tensor) -> List[int]:
        """Rows and columns to pad: left, right, top, bottom."""
        if not self.same_pad:
            return self.pad_sides
        return same_pads(x, self.kernel_size, self.stride, self.dilation)

    @torch.jit.unused
    def convolve_lean(self, x: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The same as `convolve`, keeping one byte a value of the input for backward, and no copy of the weight."""
        alpha = self.alpha().reshape(self.scale_shape) if self.scale_weight else None
        return _QuantizedConv2d.apply(
            x, self.latent_weight(), alpha, bias, self.input_quantizer, self.weight_quantizer,
            self.stride, self.conv_padding, self.dilation, self.groups)

    def scale_of_input(self, x: torch.Tensor) -> torch.Tensor:
        """K for this convolution, one plane for all channels, or one a group repeated over its channels."""
        x = x if self.input_scale_grad else x.detach()
        if self.pad_first:
            x = F.pad(x, self.pads(x))
        scale = input_scale(x, self.kernel_size, self.stride, self.conv_padding, self.dilation, self.groups)
        return scale if self.groups == 1 else scale.repeat_interleave(self.out_channels // self.groups, 1)

    def extra_repr(self) -> str:
        padding = 'same_pad' if self.same_pad else f'pad_value={self.pad_value}'
        return f'{super().extra_repr()}, {padding}'


class StandardizedBinaryConv2d(BinaryConv2d):
    r"""Binary convolution whose host standardizes its weight (Weight Standardization; NFNet's scaled form).

    y = ( Sign(x) (*) Sign(V) ) . gain . scale . K + bias,   V = (W - mean(W)) / sqrt(var(W) + eps) per output channel

    V has a second moment of 1, and so has Sign(V): no alpha is needed. With a real weight V itself stands in its
    place, which is the host's convolution. W = +-c with any c > 0 gives back its own signs.

    Args:
        args, quantization: As for `BinaryConv2d`; `scale_weight` has no effect.
        scale: Constant factor of the weight, 1 or NFNet's gamma / sqrt(fan-in).
        eps: Added to the variance.
        has_gain: Learn a factor per output channel, `gain` (O, 1, 1, 1), initialised to 1.
    """

    def __init__(self, *args, scale: float = 1., eps: float = 1e-6, has_gain: bool = False, **quantization) -> None:
        super().__init__(*args, **{**quantization, 'scale_weight': False})
        self.scale = scale
        self.eps = eps
        self.gain = nn.Parameter(torch.ones_like(self.weight[:, :1, :1, :1])) if has_gain else None

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **quantization) -> 'StandardizedBinaryConv2d':
        """A binary convolution that shares the parameters of a float one, with its `scale`, `eps` and `gain`."""
        gain = getattr(conv, 'gain', None)
        binary = super().from_conv(
            conv, scale=getattr(conv, 'scale', 1.), eps=conv.eps, has_gain=gain is not None, **quantization)
        binary.gain = gain
        return binary

    def latent_weight(self) -> torch.Tensor:
        weight = self.weight.flatten(1)
        mean = weight.to(_wide_float(weight)).mean(1, keepdim=True)  # exact for +-c, whose signs must not change
        centred = weight - mean.to(weight.dtype)
        return (centred * (centred.square().mean(1, keepdim=True) + self.eps).rsqrt()).reshape_as(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_images(x, self.in_channels, 'StandardizedBinaryConv2d')
        if torch.jit.is_scripting():
            y = self.convolve(x)
        else:
            spelled = self.pad_first or not self.has_lean_form or not torch.is_grad_enabled() or is_symbolic(x)
            y = self.convolve(x) if spelled else self.convolve_lean(x)
        y = y * self.scale
        gain = self.gain
        if gain is not None:
            y = y * gain.reshape(-1, 1, 1)
        if self.scale_input:
            y = y * self.scale_of_input(x)
        bias = self.bias
        return y if bias is None else y + bias.reshape(-1, 1, 1)


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
            device=None,
            dtype=None,
            *,
            input_quantizer: Optional[str] = 'ste',
            weight_quantizer: Optional[str] = 'ste',
            scale_weight: bool = True,
            scale_input: bool = False,
            input_scale_grad: bool = False,
            weight_scale_grad: bool = False,
    ) -> None:
        _check_positive(in_features=in_features, out_features=out_features)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_quantization(
            input_quantizer, weight_quantizer, scale_weight, scale_input, input_scale_grad, weight_scale_grad)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **quantization) -> 'BinaryLinear':
        """A binary linear layer that shares the parameters of a float one."""
        binary = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device='meta', **quantization)
        return binary._share_parameters(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_float(x, 'BinaryLinear')
        signed = self.quantized_input(x)
        weight = self.quantized_weight()
        if not self.scale_input:
            return F.linear(signed, weight, self.bias)
        real = x if self.input_scale_grad else x.detach()
        y = F.linear(signed, weight) * real.abs().mean(-1, keepdim=True)
        bias = self.bias
        return y if bias is None else y + bias


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
            stride: Union[int, Tuple[int, int]] = 1,
            gamma: Optional[str] = 'learnable',
            pool: Optional[nn.Module] = None,
            device=None,
            dtype=None,
            channels_last: bool = False,
    ) -> None:
        _check_positive(in_channels=in_channels, out_channels=out_channels)
        if gamma not in ('learnable', 'fixed', None):
            raise ValueError(f"gamma: found {gamma!r}, expected 'learnable', 'fixed' or None")
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.squeeze = in_channels > out_channels
        self.expand = in_channels < out_channels
        self.ratio = math.ceil(max(in_channels, out_channels) / min(in_channels, out_channels))
        strides = tuple(stride) if isinstance(stride, (tuple, list)) else (stride, stride)
        _check_positive(**{f'stride[{i}]': s for i, s in enumerate(strides)})
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
            cls,
            conv: nn.Module,
            gamma: Optional[str] = 'learnable',
            same_pad: bool = False,
    ) -> Optional['ElasticLink']:
        """The link around a given convolution or linear layer.

        gamma is dropped on a link that neither changes channels nor stands for a 1x1 convolution: the paper's Fig. 4
        counts 16 in ResNet26, two a block. Where the convolution's output has not ceil(H / stride) rows for every H
        (no padding, even kernels), the link pools with the convolution's own kernel, stride, padding and dilation.

        Args:
            conv: `torch.nn.Conv2d` or `torch.nn.Linear`.
            gamma: As for the link itself.
            same_pad: The convolution pads for ceil(H / stride) rows, whatever its `padding` says.

        Returns:
            The link, or None if no pooling has the convolution's output size.
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
        pool = None
        if not same_pad and padding != 'same' and any(
                2 * p != d * (k - 1) for k, p, d in zip(conv.kernel_size, padding, conv.dilation)):
            if any(2 * p > k for k, p in zip(conv.kernel_size, padding)):
                return None
            pool = nn.MaxPool2d(conv.kernel_size, conv.stride, padding, conv.dilation)
        return cls(
            conv.in_channels, conv.out_channels, conv.stride, gamma, pool, **dd)

    __jit_unused_properties__ = ['kind']

    @property
    def kind(self) -> str:
        """'squeeze', 'expand' or 'identity'."""
        return 'squeeze' if self.squeeze else 'expand' if self.expand else 'identity'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.channel_axis == 1:
            _check_images(x, self.in_channels, 'ElasticLink')
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


class Shift(nn.Module):
    """Learnable shift per channel: y = x + bias, bias of shape (C,), initialised to 0.

    Before a `BinaryConv2d` it is ReActNet's threshold: Sign(x + bias) = Sign(x - a) with a = -bias.

    Args:
        channels: C, the size of axis 1 of the input.
    """

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        _check_positive(channels=channels)
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

    def __init__(self, channels: int, quantizer: str = 'approx', device=None, dtype=None) -> None:
        super().__init__(channels, device=device, dtype=dtype)
        self.quantize = get_quantizer(quantizer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quantize(super().forward(x))


class RPReLU(nn.Module):
    """ReActNet's RPReLU: y = PReLU(x + shift_in) + shift_out, all three per channel (ReActNet, section 4.2).

    Args:
        channels: C, the size of axis 1 of the input.
        slope: Initial slope for negative values.
    """

    def __init__(self, channels: int, slope: float = 0.25, device=None, dtype=None) -> None:
        _check_positive(channels=channels)
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels, **dd))
        self.slope = nn.Parameter(torch.full((channels,), slope, **dd))
        self.shift_out = nn.Parameter(torch.zeros(channels, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.prelu(x + self.shift_in.reshape(-1, 1, 1), self.slope) + self.shift_out.reshape(-1, 1, 1)

    def extra_repr(self) -> str:
        return f'{self.slope.numel()}'


class ZeroShortcut(nn.Module):
    """Stands where a host block had its shortcut: returns a 0-D zero, which the host adds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(())


HOST_ATTRIBUTES = (
    'in_channels', 'out_channels', 'in_features', 'out_features', 'kernel_size', 'stride', 'padding', 'dilation',
    'groups', 'padding_mode')


class BinaryUnit(nn.Module):
    """One convolution of a binarized network with all that belongs to it (paper, eq. 4).

    unit(x) = post( branch(x) + link(x) ),   branch(x) = tail( norm_act( scale( z, conv(z) ) ) ),   z = pre(x)

    norm_act is act(norm(y)), or norm(act(y)) if `act_first`. Every part but one of conv and link may be None.

    Shapes: those of `conv`; x (N, C_in, H, W) -> (N, C_out, H', W') around a convolution.

    Args:
        conv: `BinaryConv2d`, `BinaryLinear`, a float layer, or None (then the unit is its link alone).
        norm: Normalization of the convolution's output.
        act: Activation inside the branch.
        link: `ElasticLink` or any module that maps x to the shape of the branch's output.
        pre: Applied to the branch's input (the link sees x itself).
        post: Applied to the sum.
        tail: End of the branch: what a host had between its norm and the addition (squeeze-excite, drop path, blur).
        act_first: conv -> act -> norm in place of conv -> norm -> act.
        scale: Module of two arguments, the convolution's real input z (before its sign) and its output y, that gives y
            times a factor (`methods.py`: XNOR-Net++'s learned scales, Real-to-Binary's gate).

    Raises:
        ValueError: Neither conv nor link is given.
    """
    __jit_unused_properties__ = ['weight', 'bias']

    def __init__(
            self,
            conv: Optional[nn.Module],
            norm: Optional[nn.Module] = None,
            act: Optional[nn.Module] = None,
            link: Optional[nn.Module] = None,
            pre: Optional[nn.Module] = None,
            post: Optional[nn.Module] = None,
            tail: Optional[nn.Module] = None,
            act_first: bool = False,
            scale: Optional[nn.Module] = None,
    ) -> None:
        if conv is None and link is None:
            raise ValueError('conv, link: both are None, a unit needs at least one of them')
        super().__init__()
        # Registered in the order in which they run.
        self.pre = pre
        self.conv = conv
        self.scale = scale
        if act_first:
            self.act, self.norm = act, norm
        else:
            self.norm, self.act = norm, act
        self.tail = tail
        self.link = link
        self.post = post
        self.act_first = act_first
        # Hosts read these off the layer that the unit replaces.
        source = link if conv is None else conv
        for name in HOST_ATTRIBUTES:
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))

    @property
    def weight(self) -> Optional[torch.Tensor]:
        """The latent weight, None for a unit without a convolution; hosts ask it for its dtype and device."""
        return None if self.conv is None else self.conv.weight

    @property
    def bias(self) -> Optional[torch.Tensor]:
        """The convolution's bias."""
        return None if self.conv is None else self.conv.bias

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """Everything that runs beside the link."""
        if self.pre is not None:
            x = self.pre(x)
        if self.scale is None:
            x = self.conv(x)
        else:
            x = self.scale(x, self.conv(x))
        if self.act_first:
            if self.act is not None:
                x = self.act(x)
        if self.norm is not None:
            x = self.norm(x)
        if not self.act_first:
            if self.act is not None:
                x = self.act(x)
        if self.tail is not None:
            x = self.tail(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv is None:
            y = self.link(x)
        elif self.link is None:
            y = self.branch(x)
        else:
            y = self.branch(x) + self.link(x)
        return y if self.post is None else self.post(y)


@torch.no_grad()
def expected_statistics(weight: torch.Tensor, act: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of act(z) per channel, z ~ N(0, sum of squared weights): unit-variance inputs."""
    dd = {'device': weight.device, 'dtype': torch.float32}
    normal = torch.special.ndtri((torch.arange(256, **dd) + 0.5) / 256)
    std = weight.detach().float().flatten(1).square().sum(1).sqrt()
    values = act((std[:, None] * normal).to(weight.dtype)[None, :, :, None]).float().flatten(2)[0]
    return values.mean(1), values.var(1)


def _check_positive(**counts: int) -> None:
    for name, value in counts.items():
        try:
            positive = not isinstance(value, bool) and operator.index(value) > 0
        except TypeError:
            positive = False
        if not positive:
            raise ValueError(f'{name}: found {value!r}, expected a positive integer')


def _check_float(x: torch.Tensor, where: str) -> None:
    """Raise TypeError unless x is a float tensor. Tracers see no shapes, so they are let pass."""
    if torch.jit.is_scripting():
        if not x.is_floating_point():
            raise TypeError('input: expected a float tensor; convert images with .float() and normalise them')
    elif not is_symbolic(x) and not x.is_floating_point():
        raise TypeError(
            f'{where} input: found dtype {x.dtype}, expected a float tensor; '
            f'convert images with .float() and normalise them')


def _check_images(x: torch.Tensor, channels: int, where: str) -> None:
    """Raise unless x is a float tensor (N, channels, H, W)."""
    _check_float(x, where)
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
    _check_images(x, self.in_channels, 'images')
    if torch.jit.is_scripting():
        if min(x.shape[2], x.shape[3]) < self.min_input_size:
            raise ValueError('images input: smaller than the stride of the network; resize the images')
    else:
        if not is_symbolic(x) and min(x.shape[2:]) < self.min_input_size:
            raise ValueError(
                f'images input: found {x.shape[2]} x {x.shape[3]} pixels, expected at least '
                f'{self.min_input_size} x {self.min_input_size}, the stride of the network; resize the images')


def same_pads(
        x: torch.Tensor,
        kernel_size: Tuple[int, int],
        stride: Tuple[int, int],
        dilation: Tuple[int, int],
) -> List[int]:
    """Left, right, top, bottom for an output of ceil(size / stride); the odd one of a pair goes right and down."""
    pads: List[int] = []
    for i in (1, 0):
        size = x.shape[2 + i]
        steps = (size + stride[i] - 1) // stride[i] - 1
        total = max(steps * stride[i] + (kernel_size[i] - 1) * dilation[i] + 1 - size, 0)
        pads += [total // 2, total - total // 2]
    return pads


torch.fx.wrap('same_pads')  # depends on the size of the input, which a tracer does not know


def _is_uneven(conv: nn.Conv2d) -> bool:
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return left != right or top != bottom

