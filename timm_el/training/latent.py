"""Latent weights: the layers that have them, and their clipping."""
import torch
import torch.nn as nn

from ..layers import BinaryConv2d, BinaryLinear


def binary_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that sign their input or their weight, by path."""
    return {
        path: module for path, module in model.named_modules()
        if isinstance(module, (BinaryConv2d, BinaryLinear))
        and (module.weight_quantizer is not None or module.input_quantizer is not None)}


@torch.no_grad()
def clip_latent_weights(model: nn.Module, bound: float = 1.0) -> None:
    """Clip each quantized layer's latent weight to [-bound, bound], to be called after an optimizer's step.

    Frozen ones stay as they are. Outside [-1, 1] the estimator has no gradient, and a latent weight could not come back
    (BinaryConnect, XNOR-Net).
    """
    for layer in binary_layers(model).values():
        if layer.weight_quantizer is not None and layer.weight.requires_grad:
            layer.weight.clamp_(-bound, bound)
