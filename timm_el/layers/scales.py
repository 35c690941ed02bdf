"""Scales of binary weights and inputs: alpha and K (paper, equation 3)."""
import torch
import torch.fx
import torch.nn.functional as F

from ..quantizers import wide_float


def weight_scale(weight: torch.Tensor, grad: bool = False) -> torch.Tensor:
    """Return the scale of a binary weight: alpha = mean(abs(W)) per output channel (paper, eq. 3; XNOR-Net).

    The mean is taken in float64, because a float32 mean over +-alpha need not give alpha back, and then a packed file
    would change each time that it is written again.

    Args:
        weight: Latent weight (O, ...).
        grad: Let gradient flow through alpha.

    Returns:
        Tensor (O,) of the weight's dtype.
    """
    weight = weight if grad else weight.detach()
    return weight.abs().flatten(1).mean(1, dtype=wide_float(weight)).to(weight.dtype)


def input_scale(
        x: torch.Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
        dilation: tuple[int, int], groups: int = 1) -> torch.Tensor:
    """Return the scale of a binary input, K (paper, eq. 3; XNOR-Net, section 3.2).

    K = box_filter( mean over channels of abs(x) ). Every tap of the box weighs 1 / (kH * kW); taps in the padding count
    as zeros. A grouped convolution has one plane a group, because its kernels see one group of channels each.

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
