"""Convolutions of binary inputs with binary weights (paper, equation 3)."""
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.utils import _pair

from ..quantizers import REGISTRY, is_symbolic, lean, wide_float
from .checks import check_images, check_positive
from .quantized import _Quantized
from .scales import input_scale

PAD_VALUES = (-1, 0, 1)


def _quantized_weight(weight: torch.Tensor, alpha: torch.Tensor | None, quantizer: str | None) -> torch.Tensor:
    weight = REGISTRY[quantizer].lean.quantize(weight)
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
            REGISTRY[input_quantizer].lean.quantize(x), _quantized_weight(weight, alpha, weight_quantizer), bias,
            stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, alpha, bias, ctx.input_quantizer, ctx.weight_quantizer, *ctx.geometry = inputs
        ctx.dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(REGISTRY[ctx.input_quantizer].lean.encode(x), weight, alpha)

    @staticmethod
    def backward(ctx, grad):
        code, weight, alpha = ctx.saved_tensors
        of_input, of_weight = REGISTRY[ctx.input_quantizer].lean, REGISTRY[ctx.weight_quantizer].lean
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
        pad_value: Value of a padded tap after the sign: 0 (contributes nothing), -1 or +1. Only for
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
            kernel_size: int | tuple[int, int],
            stride: int | tuple[int, int] = 1,
            padding: str | int | tuple[int, int] = 0,
            dilation: int | tuple[int, int] = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: str = 'zeros',
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            *,
            input_quantizer: str | None = 'ste',
            weight_quantizer: str | None = 'ste',
            scale_weight: bool = True,
            scale_input: bool = False,
            input_scale_grad: bool = False,
            weight_scale_grad: bool = False,
            pad_value: int = 0,
            same_pad: bool = False,
    ) -> None:
        check_positive(in_channels=in_channels, out_channels=out_channels)
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
        self._set_padding()

    def _set_padding(self) -> None:
        """Set what follows from padding, kernel and dilation."""
        # Padding is explicit where conv2d's own zero padding is not what is asked for; 'same' may be uneven.
        self.pad_sides: list[int] = pad_sides_of(self)  # left, right, top, bottom
        is_uneven = self.pad_sides[0] != self.pad_sides[1] or self.pad_sides[2] != self.pad_sides[3]
        self.pad_first: bool = self.padding_mode != 'zeros' or self.pad_value != 0 or self.same_pad or is_uneven
        self.conv_padding: tuple[int, int] = (0, 0) if self.pad_first else (self.pad_sides[2], self.pad_sides[0])

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ('padding', 'dilation') and 'same_pad' in vars(self):  # a backbone is dilated
            self._set_padding()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **quantization: Any) -> 'BinaryConv2d':
        """Return a binary convolution whose latent weight and bias are the parameters of a float one.

        Args:
            conv: The float convolution; it is not changed.
            quantization: The keyword arguments that `BinaryConv2d` has beyond `torch.nn.Conv2d`'s.
        """
        binary = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, device='meta', **quantization)
        return binary._share_parameters(conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, self.in_channels, 'BinaryConv2d')
        bias = self.bias  # TorchScript narrows None on locals only
        inner_bias = None if self.scale_input else bias  # K does not scale the bias
        y = self._convolve(x, inner_bias)
        if self.scale_input:
            y = y * self.scale_of_input(x)
            if bias is not None:
                y = y + bias.to(y.dtype).reshape(-1, 1, 1)  # under autocast, as torch's convolution gives it
        return y

    def _convolve(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve in the lean form where there is a backward pass to save memory for, else spelled out."""
        if torch.jit.is_scripting():
            return self.convolve(x, bias)
        else:
            lean = self.has_lean_form and not self.pad_first and torch.is_grad_enabled() and not is_symbolic(x)
            return self.convolve_lean(x, bias) if lean else self.convolve(x, bias)

    def convolve(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ( Sign(x) (*) Sign(W) ) . alpha + bias (N, C_out, H', W') of x (N, C_in, H, W), spelled out."""
        signed = self.quantized_input(x)
        if self.pad_first:
            mode = 'constant' if self.padding_mode == 'zeros' else self.padding_mode
            value = float(self.pad_value) if mode == 'constant' else None
            signed = F.pad(signed, self.pads(x), mode, value)
        return F.conv2d(
            signed, self.quantized_weight(), bias, self.stride, self.conv_padding, self.dilation, self.groups)

    def pads(self, x: torch.Tensor) -> list[int]:
        """Return the columns and rows to pad: left, right, top, bottom."""
        if not self.same_pad:
            return self.pad_sides
        return same_pads(x, self.kernel_size, self.stride, self.dilation)

    @torch.jit.unused
    def convolve_lean(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Same as `convolve`, but keep one byte a value of the input for backward, and no copy of the weight."""
        alpha = self.alpha().reshape(self.scale_shape) if self.scale_weight else None
        return _QuantizedConv2d.apply(
            x, self.latent_weight(), alpha, bias, self.input_quantizer, self.weight_quantizer,
            self.stride, self.conv_padding, self.dilation, self.groups)

    def scale_of_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return K (N, 1, H', W'), or (N, C_out, H', W') for a grouped convolution, each group's over its channels."""
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

    def __init__(
            self,
            *args: Any,
            scale: float = 1.,
            eps: float = 1e-6,
            has_gain: bool = False,
            **quantization: Any,
    ) -> None:
        super().__init__(*args, **{**quantization, 'scale_weight': False})
        self.scale = scale
        self.eps = eps
        self.gain = nn.Parameter(torch.ones_like(self.weight[:, :1, :1, :1])) if has_gain else None

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **quantization: Any) -> 'StandardizedBinaryConv2d':
        """Return a binary convolution that shares the parameters of a float one, with its `scale`, `eps` and `gain`."""
        gain = getattr(conv, 'gain', None)
        binary = super().from_conv(
            conv, scale=getattr(conv, 'scale', 1.), eps=conv.eps, has_gain=gain is not None, **quantization)
        binary.gain = gain
        return binary

    def latent_weight(self) -> torch.Tensor:
        weight = self.weight.flatten(1)
        mean = weight.to(wide_float(weight)).mean(1, keepdim=True)  # exact for +-c, whose signs must not change
        centred = weight - mean.to(weight.dtype)
        return (centred * (centred.square().mean(1, keepdim=True) + self.eps).rsqrt()).reshape_as(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, self.in_channels, 'StandardizedBinaryConv2d')
        y = self._convolve(x) * self.scale
        gain = self.gain
        if gain is not None:
            y = y * gain.to(y.dtype).reshape(-1, 1, 1)
        if self.scale_input:
            y = y * self.scale_of_input(x)
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype).reshape(-1, 1, 1)


def same_pads(
        x: torch.Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> list[int]:
    """Return the pixels to pad left, right, top and bottom for an output of ceil(size / stride).

    The odd one of a pair goes right and down.

    Args:
        x: Input (N, C, H, W).
        kernel_size, stride, dilation: Those of the convolution.
    """
    pads: list[int] = []
    for i in (1, 0):
        size = x.shape[2 + i]
        steps = (size + stride[i] - 1) // stride[i] - 1
        total = max(steps * stride[i] + (kernel_size[i] - 1) * dilation[i] + 1 - size, 0)
        pads += [total // 2, total - total // 2]
    return pads

torch.fx.wrap('same_pads')  # depends on the size of the input, which a tracer does not know


def pad_sides_of(conv: nn.Conv2d) -> list[int]:
    """Return the columns and rows that a convolution pads, left, right, top and bottom, as its attributes say now."""
    if conv.padding == 'valid':
        return [0, 0, 0, 0]
    if conv.padding == 'same':
        reach = [d * (k - 1) for d, k in zip(_pair(conv.dilation), conv.kernel_size)]
        return [reach[1] // 2, reach[1] - reach[1] // 2, reach[0] // 2, reach[0] - reach[0] // 2]
    rows, columns = _pair(conv.padding)
    return [columns, columns, rows, rows]
