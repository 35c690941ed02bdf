"""ReActNet: a binary MobileNet whose depthwise convolutions are full 3x3 ones (Liu et al., ECCV 2020).

`reactnet_a` is the net of the official checkpoints. In `reactnet_c` the 1x1 convolutions of the five reduction blocks,
those that double the channels, are real-valued. `el_reactnet_c` is Elastic-Link's integration (its section "Comparison
with the state-of-the-art"): the duplicated shortcut of the reduction blocks becomes Expand / gamma.

The official net writes a reduction 1x1 as two convolutions C -> C with a norm and the same shortcut each, and joins the
halves. That equals one convolution C -> 2C with one norm of 2C channels and a tiling Expand without gamma, as here.
"""
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, create_classifier
from timm.models._builder import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint, checkpoint_seq
from timm.models._registry import generate_default_cfgs, register_model

from ..layers import BinaryConv2d, BinaryUnit, ElasticLink, RPReLU, Shift, guard_input
from ..weights.loading import CheckedLoading, guard_loading
from ..weights.packed import is_packed, unpack_state_dict
from ._arguments import check_counts, check_flags
from ._official import OfficialCheckpoint, strip_wrappers
from ._pretrained import choose_weights, default_cfg, shipped_cfgs

__all__ = ['ReActNet', 'ReActBlock']


class ReActBlock(nn.Module):
    """3x3 unit, then 1x1 unit; each Shift -> BinaryConv2d -> norm, plus link, then RPReLU (ReActNet, Fig. 4).

    Args:
        in_chs: Input channels.
        out_chs: Output channels; a reduction block has twice the input channels.
        stride: Stride of the 3x3; its shortcut is then a 2x2 average pool.
        real_reduction: The 1x1 of a reduction block is real-valued, on real inputs (ReActNet-C).
        gamma: Gamma of a reduction block's Expand: None (ReActNet's duplicated shortcut), 'learnable' or 'fixed'.
        weight_quantizer: None for stage one of two-stage training.
        drop_path: Probability with which a branch is dropped.
    """

    def __init__(
            self, in_chs: int, out_chs: int, stride: int = 1, real_reduction: bool = False, gamma: str | None = None,
            weight_quantizer: str | None = 'ste', drop_path: float = 0., device: torch.device | str | None = None,
            dtype: torch.dtype | None = None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        quantizers = dict(input_quantizer='approx', weight_quantizer=weight_quantizer)
        pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else None
        self.conv_3x3 = BinaryUnit(
            pre=Shift(in_chs, **dd),
            conv=BinaryConv2d(in_chs, in_chs, 3, stride, padding=1, bias=False, **quantizers, **dd),
            norm=nn.BatchNorm2d(in_chs, **dd),
            link=ElasticLink(in_chs, in_chs, stride, gamma=None, pool=pool, **dd),
            tail=DropPath(drop_path) if drop_path > 0. else None,
            post=RPReLU(in_chs, **dd),
        )
        reduction = in_chs != out_chs
        real = reduction and real_reduction
        self.conv_1x1 = BinaryUnit(
            pre=None if real else Shift(in_chs, **dd),
            conv=(
                nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd) if real else
                BinaryConv2d(in_chs, out_chs, 1, bias=False, **quantizers, **dd)),
            norm=nn.BatchNorm2d(out_chs, **dd),
            link=ElasticLink(in_chs, out_chs, gamma=gamma if reduction else None, **dd),
            tail=DropPath(drop_path) if drop_path > 0. else None,
            post=RPReLU(out_chs, **dd),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_1x1(self.conv_3x3(x))


class ReActNet(CheckedLoading, nn.Module):
    """ReActNet-A, ReActNet-C and EL-ReActNet-C.

    Args:
        num_classes: Classes; 0 for no classifier.
        in_chans: Input channels.
        output_stride: Stride of the last features; 32 only.
        global_pool: Pooling before the classifier.
        stem_chs: Channels of the first convolution.
        depths: Blocks in each stage; the first block of a stage doubles the channels.
        real_reduction: The 1x1 of reduction blocks are real-valued (ReActNet-C).
        gamma: Gamma of reduction blocks, None for ReActNet's own duplicated shortcut.
        real_weights: Stage one of two-stage training: binary inputs, real weights, the same state dict keys.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the branches, growing linearly from block to block.

    Raises:
        ValueError: output_stride is not 32.
    """

    def __init__(
            self,
            num_classes: int = 1000,
            in_chans: int = 3,
            output_stride: int = 32,
            global_pool: str = 'avg',
            stem_chs: int = 32,
            depths: tuple[int, ...] = (1, 2, 2, 6, 2),
            real_reduction: bool = False,
            gamma: str | None = None,
            real_weights: bool = False,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_counts(in_chans, num_classes)
        check_flags(real_weights=real_weights, real_reduction=real_reduction)
        if output_stride != 32:
            raise ValueError(f'output_stride: found {output_stride}, ReActNet has 32 only')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.conv_stem = nn.Conv2d(in_chans, stem_chs, 3, 2, padding=1, bias=False, **dd)
        self.bn_stem = nn.BatchNorm2d(stem_chs, **dd)

        chs, reduction = stem_chs, 2
        stages = []
        self.feature_info = []
        for i, depth in enumerate(depths):
            stride = 1 if i == 0 else 2
            reduction *= stride
            blocks = []
            for j in range(depth):
                first = j == 0
                out_chs = 2 * chs if first else chs
                drop_path = drop_path_rate * (sum(depths[:i]) + j) / max(sum(depths) - 1, 1)
                blocks.append(ReActBlock(
                    chs, out_chs, stride if first else 1, real_reduction, gamma, None if real_weights else 'ste',
                    drop_path, **dd))
                chs = out_chs
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=f'stages.{i}'))
        self.stages = nn.Sequential(*stages)

        self.num_features = chs
        self.global_pool, self.fc = create_classifier(chs, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = chs * self.global_pool.feat_mult()
        guard_input(self.conv_stem, reduction)
        guard_loading(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return regex patterns of parameter groups."""
        return dict(stem=r'^conv_stem|bn_stem', blocks=r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier module."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 for no classifier.
            global_pool: Pooling; None keeps the current one.
        """
        weight = self.conv_stem.weight
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool, device=weight.device, dtype=weight.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
            self, x: torch.Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
            output_fmt: str = 'NCHW', intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the final features (N, C, H', W') and those of selected stages.

        Args:
            x: Images.
            indices: Last n stages if int, all if None, matching indices if a sequence.
            norm: Without effect, there is no final norm.
            stop_early: Stop after the last stage that is asked for.
            output_fmt: 'NCHW'.
            intermediates_only: Return only the intermediate features.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.bn_stem(self.conv_stem(x))
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[:max_index + 1]
        for i, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(stage, x)
            else:
                x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
            self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop all that the given intermediate features do not need, and return their indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        ends_early = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if ends_early:  # the classifier was made for other features
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or ends_early:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last feature map (N, C, H / 32, W / 32) of images (N, C_in, H, W)."""
        x = self.bn_stem(self.conv_stem(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x, flatten=True)
        return self.stages(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Return the logits (N, classes) of features (N, C, H, W), or the pooled features (N, C) if `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate > 0.:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


# Official names of what a ReActBlock holds: 3x3 unit, 1x1 unit, and the halves of a reduction 1x1.
_OFFICIAL_3X3 = {
    'move11.bias': 'pre.bias', 'binary_3x3.weight': 'conv.weight', 'bn1': 'norm',
    'move12.bias': 'post.shift_in', 'prelu1.weight': 'post.slope', 'move13.bias': 'post.shift_out',
}
_OFFICIAL_1X1 = {
    'move21.bias': 'pre.bias', 'binary_pw.weight': 'conv.weight', 'bn2': 'norm',
    'move22.bias': 'post.shift_in', 'prelu2.weight': 'post.slope', 'move23.bias': 'post.shift_out',
}
_BN = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Map an official ReActNet-A checkpoint to our names; ours pass through, packed ones unpacked.

    Both official layouts are read: step one and AdamBNN store convolution weights in 4-D (`.weight`), step two in
    (N, 1) (`.weights`). The two halves of a reduction 1x1 are joined along the output channels. Keys may carry
    DataParallel's `module.` prefix, and the file's outer dict may be passed as it is.

    Raises:
        ValueError: A key of the official layout is missing or not known, or a shape does not fit.
    """
    state_dict = strip_wrappers(state_dict)
    if is_packed(state_dict):
        return unpack_state_dict(state_dict, model)
    if not any(k.startswith('feature.') for k in state_dict):
        return state_dict
    blocks = {f'stages.{i}.{j}': b for i, s in enumerate(model.stages) for j, b in enumerate(s)}
    official = OfficialCheckpoint(state_dict, 'the official ReActNet-A')
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    out: dict[str, torch.Tensor] = {}

    def take(target: str, *sources: str) -> None:
        """Fill a tensor of ours, if we have it, from one official tensor, or from two halves."""
        if target not in shapes:
            return
        shape = shapes[target]
        if len(sources) == 2 and shape:
            shape = (shape[0] // 2, *shape[1:])
        parts = [official.take(source, shape) for source in sources]
        out[target] = torch.cat(parts) if len(parts) == 2 and shape else parts[0]

    for name, ours in (('conv1', 'conv_stem'), ('bn1', 'bn_stem')):
        for leaf in ('weight',) if name == 'conv1' else _BN:
            take(f'{ours}.{leaf}', f'feature.0.{name}.{leaf}')
    for i, (path, block) in enumerate(blocks.items(), 1):
        for unit, names in (('conv_3x3', _OFFICIAL_3X3), ('conv_1x1', _OFFICIAL_1X1)):
            module = getattr(block, unit)
            for name, ours in names.items():
                source, target = f'feature.{i}.{name}', f'{path}.{unit}.{ours}'
                halves = unit == 'conv_1x1' and module.in_channels != module.out_channels
                if ours == 'conv.weight':
                    down = [f'feature.{i}.binary_pw_down{n}.weight' for n in (1, 2)]
                    take(target, *(down if halves else [source]))
                elif ours == 'norm':
                    for leaf in _BN:
                        norms = [f'feature.{i}.bn2_{n}' for n in (1, 2)] if halves else [source]
                        take(f'{target}.{leaf}', *(f'{norm}.{leaf}' for norm in norms))
                else:
                    take(target, source)
    for leaf in ('weight', 'bias'):
        take(f'fc.{leaf}', f'fc.{leaf}')
    official.check_empty()
    return out


_cfg = partial(default_cfg, first_conv='conv_stem', classifier='fc')
default_cfgs = generate_default_cfgs({
    'reactnet_a.untrained': _cfg(paper_ids='arXiv:2003.03488'),
    'reactnet_c.untrained': _cfg(paper_ids='arXiv:2003.03488'),
    **shipped_cfgs('el_reactnet_c'),
    'el_reactnet_c.untrained*': _cfg(),
})


def _create_reactnet(variant: str, pretrained: bool = False, **kwargs: Any) -> ReActNet:
    kwargs = choose_weights(variant, pretrained, kwargs)
    return build_model_with_cfg(
        ReActNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True), **kwargs)


@register_model
def reactnet_a(pretrained: bool = False, **kwargs: Any) -> ReActNet:
    """Create ReActNet-A: all convolutions but the first binary."""
    return _create_reactnet('reactnet_a', pretrained, **kwargs)


@register_model
def reactnet_c(pretrained: bool = False, **kwargs: Any) -> ReActNet:
    """Create ReActNet-C: the 1x1 convolutions of reduction blocks are real-valued."""
    model_args = dict(real_reduction=True)
    return _create_reactnet('reactnet_c', pretrained, **dict(model_args, **kwargs))


@register_model
def el_reactnet_c(pretrained: bool = False, **kwargs: Any) -> ReActNet:
    """Create ReActNet-C with Elastic-Link: the duplicated shortcut of reduction blocks is Expand / gamma."""
    model_args = dict(real_reduction=True, gamma='learnable')
    return _create_reactnet('el_reactnet_c', pretrained, **dict(model_args, **kwargs))
