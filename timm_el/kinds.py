"""Kinds of modules: norms, activations, and modules that pass a signal on."""
import torch.nn as nn
from timm.layers import DropBlock2d, DropPath

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
NO_ACTS = (nn.Identity, nn.Softmax, nn.MultiheadAttention, nn.GLU)  # torch keeps them beside its activations
ACT_MODULES = ('torch.nn.modules.activation', 'timm.layers.activations')
IDENTITIES_IN_EVAL = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    DropPath, DropBlock2d)
POOLS_AND_SHUFFLES = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ChannelShuffle,
    nn.PixelShuffle, nn.Flatten)


def is_norm(module: nn.Module | None) -> bool:
    """Return whether a module normalizes: torch's norms, and whatever has running statistics (timm's frozen norms)."""
    return isinstance(module, NORMS) or module is not None and hasattr(module, 'running_mean')


def is_act(module: nn.Module | None) -> bool:
    """Return whether a module is an activation of torch or timm."""
    return module is not None and not isinstance(module, NO_ACTS) and type(module).__module__.startswith(ACT_MODULES)


def is_identity_in_eval(module: nn.Module | None) -> bool:
    """Return whether a module gives its input back in eval mode."""
    return isinstance(module, IDENTITIES_IN_EVAL) or type(module).__name__ == 'DropPath'  # timm and torchvision copy it


def is_pass_through(module: nn.Module | None) -> bool:
    """Return whether a module mixes no values of different sign: a non-negative input stays non-negative."""
    return is_identity_in_eval(module) or isinstance(module, POOLS_AND_SHUFFLES)


def fused_act(norm: nn.Module | None) -> nn.Module | None:
    """Return the activation inside a norm of timm, or None."""
    act = getattr(norm, 'act', None) if is_norm(norm) else None
    return act if isinstance(act, nn.Module) and not isinstance(act, nn.Identity) else None
