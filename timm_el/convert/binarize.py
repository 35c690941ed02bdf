"""binarize(): swap the conv-norm-act chains of a network for `BinaryUnit`s, in place, all or nothing.

Three steps: *find* the chains (blocks.py), *plan* what replaces which module (nothing is changed yet, every error comes
from here), and *apply* the plan. The host's class and forward stay as they are: a unit stands where the convolution
stood, and Identity where its norm and activation stood.
"""
from typing import Any, Dict, Optional, Sequence, Union

import torch
import torch.nn as nn

from ..layers import BinaryConv2d, BinaryLinear, BinaryUnit, check_tensors
from ..recipes import Recipe, get_recipe
from .plan import Plan

__all__ = ['binarize']

WRAPPERS = ('OptimizedModule', 'DistributedDataParallel', 'DataParallel', 'FullyShardedDataParallel')


def _refuse_unfit(model: nn.Module) -> None:
    """Raise for modules that cannot be swapped without changing more than themselves."""
    if isinstance(model, torch.jit.ScriptModule) or type(model).__name__ in WRAPPERS:
        raise ValueError(
            f'model: found a {type(model).__name__}, expected the model that it was made of; '
            f'convert that one first, then script, compile or wrap it')
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise ValueError(f'model: {type(model).__name__} has no Conv2d, there is nothing to binarize')
    for path, module in model.named_modules():
        name = type(module).__name__
        if isinstance(module, (BinaryUnit, BinaryConv2d, BinaryLinear)):
            raise ValueError(
                f'{path or "model"}: the model is already binarized (found a {name}); '
                f'build a fresh float model to convert it with another recipe')
        check_tensors(module, path)


def _is_separable(model: nn.Module) -> bool:
    """Most convolutions larger than 1x1 are depthwise."""
    spatial = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    return 2 * sum(1 < m.groups == m.in_channels for m in spatial) > len(spatial)


def binarize(
        model: nn.Module,
        recipe: Union[str, Recipe, Dict[str, Any]] = 'el',
        *,
        keep: Sequence[str] = (),
        example_input: Optional[torch.Tensor] = None,
        real_weights: bool = False,
        strict: bool = False,
        like: Optional[Dict[str, Any]] = None,
) -> nn.Module:
    """Binarize a network in place: every conv-norm-act chain becomes one `BinaryUnit`.

    ResNets of timm and torchvision and MobileNetV1 are converted by what is known about their blocks; every other
    network by its data flow, as torch.fx traces it (not thread-safe: fx patches torch.nn while it traces), or where fx
    cannot, by its modules one by one, which the report says. There a unit whose sign would be the same almost
    everywhere, because an activation cannot be taken away, gets a new norm in front, and this is checked on a batch of
    noise, or on `example_input`. Linear layers on pixels (N, H, W, C) count as the 1x1 convolutions that they are.

    The parameters of the host are kept, so that a pretrained float network becomes the latent initialisation. (Where an
    activation moves in front of its norm, that norm's running statistics start anew.) The first convolution, the
    classifier, squeeze-excite and the residual downsampling stay float, and so does a layer that runs more than once or
    shares its weight. Activations stay between layers that are kept float. Where a weight is frozen, what is new around
    it is frozen too. Afterwards `model.binarize_report` says what became of each layer. If anything is refused, the
    model is as it was.

    Args:
        model: The network; it is changed in place.
        recipe: Name of a recipe (`recipes.RECIPES`), a `Recipe`, or its dict. The name 'el' means 'el_mobilenet' on a
            host most of whose convolutions beyond 1x1 are depthwise; the report says which one was used.
        keep: Module paths or glob patterns of layers to keep float; a path keeps everything below it.
        example_input: Images (N, C, H, W) on which signs are judged, and whose size the report's operations are for;
            noise, and the model's own size, if None.
        real_weights: Stage one of two-stage training: binary inputs, real weights, the same state dict keys.
        strict: Raise if a convolution has to be kept because it could not be converted.
        like: `binarize_report.plan()` of a network of the same host: recipe, kept layers and norms before signs are
            taken from it, so that their state dicts fit each other.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a module, or `recipe` or `keep` have the wrong type.
        ValueError: The recipe is unknown; the model has no convolutions, is already binarized, quantized, scripted,
            compiled, wrapped for distributed training or not initialised; a layer that is taken apart is hooked, pruned
            or parametrized; `keep` matches nothing; `example_input` has not four axes; the recipe leaves nothing of a
            convolution; or `strict` and a convolution could not be converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: found a {type(model).__name__}, expected a torch.nn.Module')
    if not isinstance(real_weights, bool):
        raise ValueError(f'real_weights: found {real_weights!r}, expected True or False')
    if example_input is not None and (not isinstance(example_input, torch.Tensor) or example_input.dim() != 4):
        found = tuple(example_input.shape) if isinstance(example_input, torch.Tensor) else type(example_input).__name__
        raise ValueError(f'example_input: found {found}, expected a tensor (N, C, H, W)')
    _refuse_unfit(model)
    if like is not None:
        recipe, keep = Recipe.from_dict(like['recipe']), like['keep']
    chosen = get_recipe(recipe)
    note = None
    if isinstance(recipe, str) and recipe == 'el' and _is_separable(model):
        chosen = get_recipe('el_mobilenet')
        note = "recipe 'el' on a depthwise-separable host is 'el_mobilenet': activations in the branches, no K"
    plan = Plan(
        model, chosen.with_real_weights() if real_weights else chosen, keep,
        None if example_input is None else tuple(example_input.shape[1:]), like)
    impossible = [row for row in plan.report().rows if not row.possible]
    if strict and impossible:
        row = impossible[0]
        raise ValueError(
            f'{row.path}: {row.kind} {tuple(model.get_submodule(row.path).weight.shape)} cannot be binarized '
            f'({row.reason}), nor can {len(impossible) - 1} others; pass keep=({row.path!r}, ...) to keep them float')
    found_out = plan.apply(example_input)
    report = plan.report()
    report.notes += [note] * bool(note) + found_out
    model.binarize_report = report
    return model
