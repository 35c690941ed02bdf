"""Shares of +1 among the signs that binary layers take of their inputs."""
import torch
import torch.nn as nn

from .quantized import _Quantized


@torch.no_grad()
def input_sign_shares(model: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Return the share of +1 at each binary layer, by its path, 0 to 1.

    Args:
        model: The network; it runs in the mode that it is in.
        images: Batch (N, C, H, W).
    """
    shares: dict[str, float] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, path=path: shares.__setitem__(path, (args[0] >= 0).float().mean().item()))
        for path, layer in model.named_modules() if isinstance(layer, _Quantized) and layer.input_quantizer is not None]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return shares
