"""Converted nets of timm under one name, the architecture in a Hub folder of a converted net.

A folder that had its host's name could be opened by timm alone, which would build the float host and, with another
number of classes, drop all that does not fit. This name timm does not know unless this package is imported.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg
from timm.models._builder import build_model_with_cfg
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet, FeatureListNet
from timm.models._features_fx import FeatureGraphNet
from timm.models._registry import register_model

from ..convert import binarize
from ..recipes import Recipe
from ..weights.loading import CheckpointError, check_adapted, float_to_latent

__all__ = ['CONVERTED']

CONVERTED = 'timm_el_converted'
FEATURES = {
    'dict': FeatureDictNet, 'fx': FeatureGraphNet, 'getter': FeatureGetterNet, 'hook': FeatureHookNet,
    'list': FeatureListNet}


def _create_converted(
        host: str, recipe: str | Recipe | dict[str, Any], plan: dict[str, Any] | None, planned_classes: int | None,
        num_classes: int = 1000, **kwargs) -> nn.Module:
    """Return a host that was converted with as many classes as the planned one, and then got its own number.

    In a net without a classifier another layer is the last, may be kept float, and would not take the plan's weights.
    """
    planned_classes = num_classes if planned_classes is None else planned_classes
    model = binarize(timm.create_model(host, num_classes=planned_classes, **kwargs), recipe, like=plan)
    if planned_classes != num_classes:
        model.reset_classifier(num_classes)
    return model


def _features(
        model: nn.Module, feature_cls: None | str | Callable[..., nn.Module], out_indices: Any, **kwargs: Any,
) -> nn.Module:
    """Return the feature extractor of a net: of all levels, and by `forward_intermediates` where nothing else is asked.

    Only the host's own entry point knows the class and the levels that timm takes for it.
    """
    if feature_cls is None:
        feature_cls = 'getter' if hasattr(model, 'forward_intermediates') else 'hook'
    cls = FEATURES[feature_cls] if isinstance(feature_cls, str) else feature_cls
    if cls is FeatureGetterNet:
        kwargs.pop('output_fmt', None)  # timm leaves it to the net
    if out_indices is None:
        out_indices = tuple(range(len(model.feature_info)))
    return cls(model, out_indices=out_indices, **kwargs)


def _own_tensors(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the latent state dict of a packed one.

    timm loads it without asking whether it fits, if the classifier differs.

    Raises:
        CheckpointError: Something else than the classifier and the channels of the images differs.
    """
    try:
        latent = float_to_latent(state_dict, model)
        check_adapted(model, latent)
    except CheckpointError as e:
        raise CheckpointError(
            f'{e}. If an argument makes another net of the host (drop_path_rate=... can), load the folder without it: '
            f'timm_el.from_hub(folder)') from None
    return latent


@register_model
def timm_el_converted(
        pretrained: bool = False, host: str = 'resnet18', recipe: str | Recipe | dict[str, Any] = 'el',
        plan: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """Create a converted net of timm; `pretrained=True` is for folders of `save_for_hub` (`local-dir:`, `hf-hub:`).

    Args:
        pretrained: Load the folder's weights.
        host: Name of the net.
        recipe: As for `binarize`.
        plan: `binarize_report.plan()` of a net of the same host, in place of the recipe.
        kwargs: As for `timm.create_model(host, ...)`.
    """
    cfg = kwargs.pop('pretrained_cfg', None)
    planned_classes = cfg.get('num_classes') if plan is not None and isinstance(cfg, dict) else None
    if cfg is None and (of_host := get_pretrained_cfg(host)) is not None:
        facts = of_host.to_dict(remove_source=True, remove_null=True)
        cfg = {k: v for k, v in facts.items() if k not in ('architecture', 'tag')}
    feature_cls = partial(_features, feature_cls=kwargs.pop('feature_cls', None))
    return build_model_with_cfg(
        _create_converted, CONVERTED, pretrained, cfg, pretrained_filter_fn=_own_tensors,
        feature_cfg=dict(feature_cls=feature_cls, out_indices=None),
        host=host, recipe=recipe, plan=plan, planned_classes=planned_classes, **kwargs)
