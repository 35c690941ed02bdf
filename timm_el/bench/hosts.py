"""Nets of a comparison: a binarized model and the float net that it stands for."""
from collections.abc import Callable

import torch
import torch.nn as nn

from ..models.factory import is_ours

# The float nets of timm that the registered models stand for.
FLOAT_HOSTS = {
    'el_resnet18': 'resnet18', 'el_resnet26': 'resnet26', 'el_resnet34': 'resnet34', 'el_resnet50': 'resnet50',
    'el_mobilenet_v1': 'mobilenetv1_100',
}


def host_name(model: str, host: str | None, recipe: str | None) -> str:
    """Return the name of the float net to compare with.

    Raises:
        ValueError: None is known: the model has no entry in `FLOAT_HOSTS`, and no host is given, nor, for a model of
            timm, which is its own, a recipe.
    """
    name = host or FLOAT_HOSTS.get(model.partition('.')[0], model)
    if name == model and is_ours(model):
        raise ValueError(f'host: no float host of {model} is known, name a model of timm (--host)')
    if name == model and not recipe:
        raise ValueError(f'host: no float host of {model} is known, name one (--host) or a recipe (--recipe)')
    return name


def runner(net: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that runs a net once on images (N, C, H, W), without gradients."""
    @torch.inference_mode()
    def run() -> torch.Tensor:
        return net(x)

    return run


@torch.no_grad()
def settle_norms(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Give an untrained net the norm statistics of one batch, so that its values neither grow nor vanish with depth.

    Times hardly depend on values; int8 ranges and comparisons of outputs do.

    Args:
        model: Any network; its batch norms are changed and it is left in eval mode.
        x: Images (N, C, H, W), N of 2 or more.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    model.train()(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return model.eval()
