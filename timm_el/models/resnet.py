"""Binarized ResNets: timm's own ResNet, converted by `binarize`.

`el_resnet*` follow Elastic-Link (AAAI 2022): the shortcut of a stage's first block is a 2x2 average pool, a float 1x1
convolution and a norm, the stride of a bottleneck sits on its first 1x1 (paper, section "The role of the gamma factor",
which speaks of gammas of channel-reduction convolutions "in which downsampling occurred"), and no activation is left.

`bireal_resnet*` and `reactnet_resnet18` are the nets of the official Bi-Real Net and ReActNet checkpoints: the same
classes with another recipe.

`el_resnet20` is the net of three stages for images of 32 px (He et al., 2016, section 4.2), but for its shortcuts.
"""
import re
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.models._builder import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models._registry import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..convert.binarize import binarize
from ..recipes import Recipe
from ..weights.loading import RECIPE_CODE, CheckedLoading, float_to_latent
from ._arguments import check_arguments, check_flags
from ._official import OfficialCheckpoint, strip_wrappers
from ._pretrained import CIFAR10, choose_weights, default_cfg, shipped_cfgs

__all__ = ['BinarizedResNet']

STAGES = 4  # in the forward of timm's ResNet


class BinarizedResNet(CheckedLoading, ResNet):
    """timm's ResNet, binarized.

    Args:
        recipe, real_weights: As for `timm_el.binarize`.
        small_stem: For images of 32 px: the first convolution is a 3x3 without stride, as wide as the first stage, and
            no pool follows, so that every reduction is a quarter of timm's.
        stride_first: Put a bottleneck's stride on its first 1x1. If False it stays on the 3x3, as in timm.
        zero_init_last: As in timm, but False by default: with True a fresh network would not depend on the last
            convolution of any block.
        channels: As for timm's ResNet; three make a net of three stages.
        args, kwargs: As for timm's ResNet.
    """

    def __init__(
            self,
            *args: Any,
            recipe: str | Recipe | dict[str, Any] = 'el',
            real_weights: bool = False,
            small_stem: bool = False,
            stride_first: bool = True,
            zero_init_last: bool = False,
            channels: tuple[int, ...] = (64, 128, 256, 512),
            **kwargs: Any,
    ) -> None:
        check_arguments(ResNet, BinarizedResNet, kwargs)
        check_flags(real_weights=real_weights, small_stem=small_stem, stride_first=stride_first)
        if small_stem:
            kwargs = {**kwargs, **_wide_as(channels[0], kwargs), **_timm_stride(kwargs)}
        super().__init__(*args, zero_init_last=zero_init_last, channels=channels, **kwargs)
        if small_stem:
            self._make_stem_small(channels[0])
        for stage in range(len(channels), STAGES):
            self.add_module(f'layer{stage + 1}', nn.Sequential())
        if stride_first:
            for path, module in self.named_modules():
                if isinstance(module, Bottleneck):
                    if not isinstance(module.aa, nn.Identity):
                        raise ValueError(
                            f'stride_first: the stride of {path} is in its anti-aliasing layer (aa_layer), it cannot '
                            f'move to the first 1x1; pass stride_first=False')
                    module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
        images = torch.zeros((1, self.in_chans, 32, 32)) if small_stem else None  # else timm's own size
        binarize(self, recipe, real_weights=real_weights, example_input=images)

    def _make_stem_small(self, width: int) -> None:
        first = self.conv1[0].weight
        self.conv1 = nn.Conv2d(self.in_chans, width, 3, padding=1, bias=False, device=first.device, dtype=first.dtype)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info['reduction'] = max(info['reduction'] // 4, 1)

    def _timm_indices(self, indices: None | int | list[int]) -> tuple[list[int], list[int]]:
        """Return indices of own features, and timm's indices of them: its last feature is that of a fourth stage."""
        last = len(self.feature_info) - 1
        taken, _ = feature_take_indices(last + 1, indices)
        return taken, [STAGES if i == last else i for i in taken]

    def forward_intermediates(self, x: torch.Tensor, indices: None | int | list[int] = None, **kwargs: Any) -> Any:
        """Same as in timm, with indices of own features."""
        return super().forward_intermediates(x, self._timm_indices(indices)[1], **kwargs)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, **kwargs: Any) -> list[int]:
        """Same as in timm, with indices of own features."""
        taken, timms = self._timm_indices(indices)
        super().prune_intermediate_layers(timms, **kwargs)
        return taken


def _timm_stride(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return timm's `output_stride`, to which a stem of stride 4 belongs, for one that is asked for.

    Raises:
        ValueError: There is none such.
    """
    stride = kwargs.get('output_stride', 32)
    if stride not in (2, 4, 8, 16, 32):
        raise ValueError(f'output_stride: found {stride!r}, expected 2, 4 or 8 with small_stem=True')
    return {'output_stride': min(4 * stride, 32)}


def _wide_as(width: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments for the one stem of timm's whose width can be set; `small_stem` takes its place.

    Raises:
        ValueError: The width is odd, or another stem is asked for too.
    """
    for name in ('stem_type', 'stem_width', 'replace_stem_pool'):
        if kwargs.get(name):
            raise ValueError(f'{name}: found {kwargs[name]!r} beside small_stem=True, which has no such; leave one out')
    if width % 2:
        raise ValueError(f'channels: found {width} in the first stage, expected an even number with small_stem=True')
    return dict(stem_type='deep', stem_width=width // 2)


# The official nets have one block a convolution, ours a unit each in timm's blocks of two.
_UNIT = re.compile(r'(layer\d)\.(\d+)\.conv([12])\.(pre|conv|norm|link|post)\.(.+)')
_OFFICIAL = {
    'pre.bias': 'move0.bias', 'conv.weight': 'binary_conv.weight', 'norm': 'bn1', 'link': 'downsample',
    'post.shift_in': 'move1.bias', 'post.slope': 'prelu.weight', 'post.shift_out': 'move2.bias',
}


def _official_name(key: str) -> str:
    """Return the name in the official Bi-Real Net and ReActNet on ResNets for our name of a tensor."""
    found = _UNIT.fullmatch(key)
    if found is None:
        return key
    layer, block, conv, slot, rest = found.groups()
    name = _OFFICIAL.get(f'{slot}.{rest}') or f'{_OFFICIAL.get(slot, slot)}.{rest}'
    return f'{layer}.{2 * int(block) + int(conv) - 1}.{name}'


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Map an official checkpoint of Bi-Real-18, Bi-Real-34 or ReAct-ResNet18 to our names; others as `float_to_latent`.

    Both layouts of convolution weights are read, 4-D `.weight` and (N, 1) `.weights`. Keys may carry DataParallel's
    `module.` prefix, and the file's outer dict may be passed as it is. The model must have the recipe of the
    checkpoint, 'bireal' or 'reactnet'.

    Raises:
        ValueError: A key of the official layout is missing or not known, or a shape does not fit.
    """
    stripped = strip_wrappers(state_dict)
    if not any('.binary_conv.' in key for key in stripped):
        return float_to_latent(state_dict, model)
    recipe = model.binarize_report.recipe.name
    official = OfficialCheckpoint(stripped, f'the official nets for recipe {recipe!r}')
    out = {key: official.take(_official_name(key), tuple(value.shape))
           for key, value in model.state_dict().items() if key != RECIPE_CODE}
    official.check_empty()
    return out


_cfg = partial(default_cfg, first_conv='conv1', classifier='fc')
default_cfgs = generate_default_cfgs({
    'bireal_resnet18.untrained': _cfg(paper_ids='arXiv:1808.00278'),
    'bireal_resnet34.untrained': _cfg(paper_ids='arXiv:1808.00278'),
    'el_resnet18.untrained': _cfg(),
    'el_resnet20.untrained': _cfg(input_size=(3, 32, 32), pool_size=(8, 8), **CIFAR10),
    **shipped_cfgs('el_resnet26'),
    'el_resnet26.untrained*': _cfg(),  # behind those with weights, or theirs would be the default
    'el_resnet34.untrained': _cfg(),
    **shipped_cfgs('el_resnet50'),
    'el_resnet50.untrained*': _cfg(),
    'reactnet_resnet18.untrained': _cfg(paper_ids='arXiv:2003.03488'),
})


def _create_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> BinarizedResNet:
    kwargs = choose_weights(variant, pretrained, kwargs)
    features = 1 + len(kwargs.get('channels', range(STAGES)))
    kwargs = {'feature_cfg': dict(out_indices=tuple(range(features))), **kwargs}
    return build_model_with_cfg(
        BinarizedResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def el_resnet18(pretrained: bool = False, **kwargs: Any) -> BinarizedResNet:
    """Create Elastic-Link ResNet-18: on basic blocks one shortcut per convolution."""
    model_args = dict(block=BasicBlock, layers=[2, 2, 2, 2], avg_down=True)
    return _create_resnet('el_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def el_resnet20(pretrained: bool = False, **kwargs: Any) -> BinarizedResNet:
    """Create Elastic-Link ResNet-20 of the CIFAR papers: stages of 16, 32 and 64 channels, for images of 32 px."""
    model_args = dict(block=BasicBlock, layers=[3, 3, 3], channels=(16, 32, 64), small_stem=True, avg_down=True)
    return _create_resnet('el_resnet20', pretrained, **dict(model_args, **kwargs))


@register_model
def el_resnet26(pretrained: bool = False, **kwargs: Any) -> BinarizedResNet:
    """Create Elastic-Link ResNet-26 (bottleneck)."""
    model_args = dict(block=Bottleneck, layers=[2, 2, 2, 2], avg_down=True)
    return _create_resnet('el_resnet26', pretrained, **dict(model_args, **kwargs))


@register_model
def el_resnet34(pretrained: bool = False, **kwargs: Any) -> BinarizedResNet:
    """Create Elastic-Link ResNet-34: on basic blocks one shortcut per convolution."""
    model_args = dict(block=BasicBlock, layers=[3, 4, 6, 3], avg_down=True)
    return _create_resnet('el_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def el_resnet50(pretrained: bool = False, **kwargs: Any) -> BinarizedResNet:
    """Create Elastic-Link ResNet-50 (bottleneck)."""
    model_args = dict(block=Bottleneck, layers=[3, 4, 6, 3], avg_down=True)
    return _create_resnet('el_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def bireal_resnet18(pretrained: bool = False, **kwargs: Any) -> BinarizedResNet:
    """Create Bi-Real Net 18, the net of the official PyTorch checkpoint."""
    model_args = dict(block=BasicBlock, layers=[2, 2, 2, 2], avg_down=True, recipe='bireal')
    return _create_resnet('bireal_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def bireal_resnet34(pretrained: bool = False, **kwargs: Any) -> BinarizedResNet:
    """Create Bi-Real Net 34, the net of the official PyTorch checkpoint."""
    model_args = dict(block=BasicBlock, layers=[3, 4, 6, 3], avg_down=True, recipe='bireal')
    return _create_resnet('bireal_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def reactnet_resnet18(pretrained: bool = False, **kwargs: Any) -> BinarizedResNet:
    """Create ReActNet on ResNet-18, the net of the official checkpoint."""
    model_args = dict(block=BasicBlock, layers=[2, 2, 2, 2], avg_down=True, recipe='reactnet')
    return _create_resnet('reactnet_resnet18', pretrained, **dict(model_args, **kwargs))
