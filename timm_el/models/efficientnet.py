"""Binarized MobileNetV1: timm's own EfficientNet class, converted by `binarize`.

`el_mobilenet_v1` follows Elastic-Link (AAAI 2022, Fig. 3 right): a link around each depthwise and each pointwise
convolution, activations kept but never between anything and a sign (recipe `el_mobilenet`).
"""
from functools import partial
from typing import Any

import torch.nn as nn
from timm.models._builder import build_model_with_cfg, pretrained_cfg_for_features
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
from timm.models._features import FeatureHooks
from timm.models._registry import generate_default_cfgs, register_model
from timm.models.efficientnet import EfficientNet, EfficientNetFeatures

from ..convert.binarize import binarize
from ..recipes import Recipe
from ..weights.loading import CheckedLoading, float_to_latent
from ._arguments import check_arguments
from ._pretrained import choose_weights, default_cfg, shipped_cfgs

__all__ = ['BinarizedEfficientNet', 'BinarizedEfficientNetFeatures']


class BinarizedEfficientNet(CheckedLoading, EfficientNet):
    """timm's EfficientNet class (MobileNetV1 is one of its architectures), binarized.

    Args:
        recipe, real_weights: As for `timm_el.binarize`.
        args, kwargs: As for timm's EfficientNet.
    """

    def __init__(
            self,
            *args: Any,
            recipe: str | Recipe | dict[str, Any] = 'el_mobilenet',
            real_weights: bool = False,
            **kwargs: Any,
    ) -> None:
        check_arguments(EfficientNet, BinarizedEfficientNet, kwargs)
        super().__init__(*args, **kwargs)
        # timm draws it from +-1 / sqrt(classes). With ten classes, and features that are sums over all links, the first
        # loss would be ten times that of chance, and training would not recover.
        if isinstance(self.classifier, nn.Linear):
            nn.init.normal_(self.classifier.weight, std=0.01)
        binarize(self, recipe, real_weights=real_weights)


class BinarizedEfficientNetFeatures(EfficientNetFeatures):
    """timm's feature extractor of the EfficientNet class, binarized.

    Args:
        recipe, real_weights: As for `timm_el.binarize`.
        args, kwargs: As for timm's EfficientNetFeatures.
    """

    def __init__(
            self,
            *args: Any,
            recipe: str | Recipe | dict[str, Any] = 'el_mobilenet',
            real_weights: bool = False,
            **kwargs: Any,
    ) -> None:
        check_arguments(EfficientNetFeatures, BinarizedEfficientNetFeatures, kwargs)
        super().__init__(*args, **kwargs)
        # With feature_location='expansion' the features are read by hooks on the convolutions that are replaced.
        hooked = self.feature_hooks is not None
        if hooked:
            for module in self.modules():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
        binarize(self, recipe, real_weights=real_weights)
        if hooked:
            self.feature_hooks = FeatureHooks(
                self.feature_info.get_dicts(keys=('module', 'hook_type')), self.named_modules())


_cfg = partial(default_cfg, first_conv='conv_stem', classifier='classifier')
default_cfgs = generate_default_cfgs({
    **shipped_cfgs('el_mobilenet_v1'),
    'el_mobilenet_v1.untrained*': _cfg(),  # behind those with weights, or theirs would be the default
})


def _create_mobilenet_v1(
        variant: str, channel_multiplier: float = 1.0, pretrained: bool = False, **kwargs) -> BinarizedEfficientNet:
    kwargs = choose_weights(variant, pretrained, kwargs)
    arch_def = [
        ['dsa_r1_k3_s1_c64'], ['dsa_r2_k3_s2_c128'], ['dsa_r2_k3_s2_c256'], ['dsa_r6_k3_s2_c512'],
        ['dsa_r2_k3_s2_c1024']]
    model_args = dict(
        block_args=decode_arch_def(arch_def), num_features=0, stem_size=32,
        round_chs_fn=partial(round_channels, multiplier=channel_multiplier),
        norm_layer=kwargs.pop('norm_layer', None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        act_layer=resolve_act_layer(kwargs, 'relu'), **kwargs)
    features_only = model_args.pop('features_only', False)
    as_features = features_only and not {'feature_cfg', 'feature_cls'} & set(kwargs)
    model = build_model_with_cfg(
        BinarizedEfficientNetFeatures if as_features else BinarizedEfficientNet, variant, pretrained,
        features_only=features_only and not as_features, pretrained_strict=not as_features,
        pretrained_filter_fn=float_to_latent,
        kwargs_filter=('num_classes', 'num_features', 'head_conv', 'global_pool') if as_features else None,
        **model_args)
    if as_features:
        model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    return model


@register_model
def el_mobilenet_v1(pretrained: bool = False, channel_multiplier: float = 1.0, **kwargs: Any) -> BinarizedEfficientNet:
    """Create Elastic-Link MobileNetV1."""
    return _create_mobilenet_v1('el_mobilenet_v1', channel_multiplier, pretrained, **kwargs)
