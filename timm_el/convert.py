"""binarize(): swap the conv-norm-act chains of a network for `BinaryUnit`s, in place, all or nothing.

Three steps, in this order in the file: *find* the chains (a table of known blocks), *plan* what replaces which module
(nothing is changed yet, every error comes from here), and *apply* the plan. The host's class and forward stay as they
are: a unit stands where the convolution stood, and Identity where its norm and activation stood.
"""
import copy
import fnmatch
import math
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from timm.models import efficientnet, resnet
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from torchvision.models import resnet as tv_resnet

from .layers import BinaryConv2d, BinaryUnit, ElasticLink, ZeroShortcut, guard_input
from .recipes import Recipe, get_recipe, role_of_shape

__all__ = ['binarize', 'Report', 'ReportRow']


# ---------------------------------------------------------------------------------------------------------------------
# Report

@dataclass(frozen=True)
class ReportRow:
    """What became of one convolution or linear layer.

    Args:
        path: Where the layer stood in the host.
        kind: Class name of the host's layer.
        status: 'binarized', 'real' (in a unit, with float weights and inputs as the recipe says), 'omitted', 'kept'
            (as it was).
        reason: Why, where it was not binarized.
        role: Its role (`recipes.ROLES`), None if kept.
        link: What goes around it: 'identity', 'squeeze', 'expand', 'host shortcut', or None.
        scale_input: True if it has K.
        norm: Path of the norm that was paired with it.
        act: What became of its activation: 'dropped', 'in branch', 'kept', or None where it has none.
        params: Number of its weights.
        possible: False if it was kept because it could not be done, which `strict=True` makes an error.
    """
    path: str
    kind: str
    status: str
    reason: str = ''
    role: Optional[str] = None
    link: Optional[str] = None
    scale_input: bool = False
    norm: Optional[str] = None
    act: Optional[str] = None
    params: int = 0
    possible: bool = True


@dataclass
class Report:
    """What `binarize` did: the recipe, one row a layer, and notes. Prints as a table; `to_dict` gives the data."""
    recipe: Recipe
    rows: List[ReportRow] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Number of layers with a status."""
        return sum(row.status == status for row in self.rows)

    @property
    def binarized_share(self) -> float:
        """Share of the weights of all convolutions and linear layers that became binary, 0 to 1."""
        total = sum(row.params for row in self.rows)
        return sum(row.params for row in self.rows if row.status == 'binarized') / max(total, 1)

    def to_dict(self) -> Dict[str, Any]:
        """Plain data for JSON."""
        rows = [{k: v for k, v in row.__dict__.items()} for row in self.rows]
        return {'recipe': self.recipe.to_dict(), 'rows': rows, 'notes': list(self.notes)}

    def __str__(self) -> str:
        lines = [f'{"layer":44} {"role":10} {"status":10} {"link":14} {"K":2} {"act":10} {"weights":>10}  reason']
        for row in self.rows:
            lines.append(
                f'{row.path:44} {row.role or "-":10} {row.status:10} {row.link or "-":14} '
                f'{"K" if row.scale_input else "-":2} {row.act or "-":10} {row.params:>10,}  {row.reason}'.rstrip())
        lines.append(
            f'recipe {self.recipe.name}: {self.count("binarized")} of {len(self.rows)} layers binarized, '
            f'{100 * self.binarized_share:.1f} % of their weights')
        return '\n'.join(lines + self.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Find: known blocks

@dataclass(frozen=True)
class Chain:
    """A convolution with the norm and activation that belong to it, as paths; `act` may stand behind an addition.

    `tail` names what the host applies between this norm and the next addition or convolution (squeeze-excite, drop
    path, blur). It moves into the unit where the host's shortcut does.
    """
    conv: str
    norm: Optional[str] = None
    act: Optional[str] = None
    role: Optional[str] = None
    tail: Tuple[str, ...] = ()

    def under(self, prefix: str) -> 'Chain':
        """The same chain inside the module `prefix`."""
        def full(name: Optional[str]) -> Optional[str]:
            return f'{prefix}.{name}' if prefix and name else name
        return Chain(full(self.conv), full(self.norm), full(self.act), self.role, tuple(full(t) for t in self.tail))


@dataclass(frozen=True)
class Block:
    """How a known block class runs: its chains in order, and its shortcut.

    Args:
        chains: The chains, relative to the block.
        shortcut: Attribute of the module on the shortcut (None in it means identity); None if the block has no
            shortcut that can be taken away.
        per_conv: The block has one shortcut around its two convolutions. With links on spatial convolutions it gets
            one a convolution in its place, as in Bi-Real Net: the host's shortcut module goes around the first.
    """
    chains: Tuple[Chain, ...]
    shortcut: Optional[str] = None
    per_conv: bool = False


KNOWN_BLOCKS: Dict[Type[nn.Module], Block] = {
    # timm
    resnet.BasicBlock: Block((
        Chain('conv1', 'bn1', 'act1', tail=('aa',)),
        Chain('conv2', 'bn2', 'act2', tail=('se', 'drop_path')),
    ), 'downsample', per_conv=True),
    resnet.Bottleneck: Block((
        Chain('conv1', 'bn1', 'act1', 'reduce'),
        Chain('conv2', 'bn2', 'act2', 'spatial'),
        Chain('conv3', 'bn3', 'act3', 'expand'),
    ), 'downsample'),
    resnet.ResNet: Block((Chain('conv1', 'bn1', 'act1'),)),
    DepthwiseSeparableConv: Block((Chain('conv_dw', 'bn1'), Chain('conv_pw', 'bn2'))),
    efficientnet.EfficientNet: Block((Chain('conv_stem', 'bn1'), Chain('conv_head', 'bn2'))),
    efficientnet.EfficientNetFeatures: Block((Chain('conv_stem', 'bn1'),)),
    # torchvision
    tv_resnet.BasicBlock: Block((
        Chain('conv1', 'bn1', 'relu'),
        Chain('conv2', 'bn2', 'relu'),
    ), 'downsample', per_conv=True),
    tv_resnet.Bottleneck: Block((
        Chain('conv1', 'bn1', 'relu', 'reduce'),
        Chain('conv2', 'bn2', 'relu', 'spatial'),
        Chain('conv3', 'bn3', 'relu', 'expand'),
    ), 'downsample'),
    tv_resnet.ResNet: Block((Chain('conv1', 'bn1', 'relu'),)),
}


def known_block(module: nn.Module) -> Optional[Block]:
    """The description of a block whose class, or a base class with the same forward, is known."""
    cls = type(module)
    for base in cls.__mro__:
        if base in KNOWN_BLOCKS and all(
                getattr(cls, name, None) is getattr(base, name, None) for name in ('forward', 'forward_features')):
            return KNOWN_BLOCKS[base]
    return None


@dataclass(frozen=True)
class FoundBlock:
    """A known block in a network: its path, its description, and its chains as full paths."""
    path: str
    block: Block
    chains: Tuple[Chain, ...]


def find_blocks(model: nn.Module) -> List[FoundBlock]:
    """All known blocks of a network, in registration order."""
    found = []
    for path, module in model.named_modules():
        block = known_block(module)
        if block is None:
            continue
        chains: List[Chain] = []
        for chain in block.chains:
            chain = chain.under(path)
            conv = _get(model, chain.conv)
            if isinstance(conv, nn.Sequential):  # a deep stem
                chains.extend(_sequential_chains(chain, conv))
            elif isinstance(conv, nn.Conv2d):
                chains.append(chain)
        found.append(FoundBlock(path, block, tuple(chains)))
    return found


def _sequential_chains(last: Chain, convs: nn.Sequential) -> Iterator[Chain]:
    """Chains of a conv, norm, act, conv, ... sequence that stands where `last` has its convolution."""
    paths = [f'{last.conv}.{name}' for name, _ in convs.named_children()]
    starts = [i for i, module in enumerate(convs) if isinstance(module, nn.Conv2d)]
    for start, stop in zip(starts, starts[1:] + [len(paths)]):
        followers = paths[start + 1:stop]
        if followers:
            yield Chain(paths[start], *followers)
        else:
            yield Chain(paths[start], last.norm, last.act)


# ---------------------------------------------------------------------------------------------------------------------
# Plan

def _get(model: nn.Module, path: Optional[str]) -> Optional[nn.Module]:
    """The module at a path, None where the path is None or names an attribute that is None."""
    module: Optional[nn.Module] = model
    for name in path.split('.') if path else ():
        module = getattr(module, name)
    return module if path else None


def _split_norm_act(norm: Optional[nn.Module]) -> Tuple[Optional[nn.Module], Optional[nn.Module]]:
    """A fused norm-and-activation as two modules that share its tensors; other norms as they are."""
    if not isinstance(norm, BatchNormAct2d):
        return norm, None
    act = norm.act if isinstance(norm.drop, nn.Identity) else nn.Sequential(norm.drop, norm.act)
    return _twin_norm(norm), None if isinstance(act, nn.Identity) else act


def _twin_norm(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A plain batch norm that shares the tensors of another."""
    twin = nn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device='meta')
    for name, tensor in [*norm._parameters.items(), *norm._buffers.items()]:
        setattr(twin, name, tensor)
    return twin.train(norm.training)


@torch.no_grad()
def _norm_after_act(norm: nn.Module, act: nn.Module, conv: nn.Module) -> nn.Module:
    """The norm for conv -> act -> norm, where the host had conv -> norm -> act.

    The host's running statistics describe another tensor, and used here in eval mode they leave every sign at +1. The
    twin starts from the expectation for inputs of unit variance: act(z), z ~ N(0, sum of squared weights).
    """
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return norm
    weight = conv.quantized_weight() if isinstance(conv, BinaryConv2d) else conv.weight
    dd = {'device': weight.device, 'dtype': torch.float32}
    normal = torch.special.ndtri((torch.arange(256, **dd) + 0.5) / 256)
    std = weight.detach().float().flatten(1).square().sum(1).sqrt()
    values = act((std[:, None] * normal).to(weight.dtype)[None, :, :, None]).float().flatten(2)[0]
    twin = _twin_norm(norm)
    twin.running_mean = values.mean(1).to(norm.running_mean.dtype)
    twin.running_var = values.var(1).to(norm.running_var.dtype)
    return twin


class _Plan:
    """What replaces which module, and the report. Building one changes nothing in the model."""

    def __init__(self, model: nn.Module, recipe: Recipe, keep: Sequence[str]) -> None:
        self.model = model
        self.recipe = recipe
        self.edits: Dict[str, nn.Module] = {}
        self.rows: Dict[str, ReportRow] = {}
        self.convs = {p: m for p, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        self.first_conv = next(iter(self.convs))
        self.kept = self._match(keep)
        self.blocks = find_blocks(model)
        for found in self.blocks:
            self._plan_block(found)
        self._plan_rest()

    def _match(self, keep: Sequence[str]) -> Dict[str, str]:
        """Paths to keep float, each with the pattern that says so."""
        if isinstance(keep, str):
            raise TypeError(f'keep: found the string {keep!r}, expected a sequence of module paths or patterns')
        layers = [p for p, m in self.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        kept = {}
        for pattern in keep:
            hits = [p for p in layers if fnmatch.fnmatch(p, pattern) or p.startswith(pattern + '.')]
            if not hits:
                raise ValueError(f'keep: {pattern!r} matches no convolution or linear layer of the model')
            kept.update({p: pattern for p in hits})
        return kept

    def _why_kept(self, path: str) -> Optional[str]:
        if path in self.kept:
            return f'keep={self.kept[path]!r}'
        return 'first convolution' if path == self.first_conv else None

    def _plan_block(self, found: FoundBlock) -> None:
        recipe, block = self.recipe, found.block
        shortcut = f'{found.path}.{block.shortcut}' if block.shortcut else None
        per_conv = (
            block.per_conv and 'spatial' in recipe.link and len(found.chains) == 2
            and not any(chain.conv in self.kept for chain in found.chains)
            and self.convs[found.chains[0].conv].out_channels == self.convs[found.chains[1].conv].out_channels)
        links: List[Optional[nn.Module]] = [None, None]
        if per_conv:
            second = self.convs[found.chains[1].conv]
            host_link = _get(self.model, shortcut)
            links = [host_link or _identity_link(second), _identity_link(second)]
        for i, chain in enumerate(found.chains):
            reason = self._why_kept(chain.conv)
            if reason:
                self._plan_kept(chain, reason)
            else:
                self._plan_unit(chain, links[i] if per_conv else None, per_conv, block.per_conv and not per_conv)
        if per_conv or (shortcut and not recipe.residual):
            self.edits[shortcut] = ZeroShortcut()

    def _plan_kept(self, chain: Chain, reason: str) -> None:
        """A float convolution outside any unit, unless its activation has to move."""
        conv, norm, act, fate = self._parts(chain)
        if self.recipe.act == 'branch' and act is not None:
            norm = _norm_after_act(norm, act, conv)
            self._put_unit(chain, BinaryUnit(conv, norm, act, act_first=True))
        elif self.recipe.act == 'drop' and chain.norm and norm is not _get(self.model, chain.norm):
            self.edits[chain.norm] = norm
        self._row(chain.conv, 'kept', reason, norm=chain.norm, act=fate)

    def _plan_unit(self, chain: Chain, link: Optional[nn.Module], per_conv: bool, host_skip: bool) -> None:
        """A unit in place of a chain.

        Args:
            chain: The chain.
            link: The link of a block with one shortcut a convolution.
            per_conv: The block is such a block: its tails move into the units.
            host_skip: The block keeps its own shortcut around both convolutions: no links.
        """
        recipe = self.recipe
        host = self.convs[chain.conv]
        conv, norm, act, fate = self._parts(chain)
        role = chain.role or role_of_shape(
            host.in_channels, host.out_channels, host.kernel_size, host.stride, host.groups)
        kind = 'host shortcut' if link is not None and not isinstance(link, ElasticLink) else None
        if link is None and not host_skip and role in recipe.link and (
                recipe.elastic or host.in_channels == host.out_channels):
            link = ElasticLink.for_conv(host, recipe.gamma)
        status, reason = 'binarized', ''
        if role in recipe.omit:
            status, reason, conv, norm = 'omitted', f'recipe.omit has {role!r}', None, None
        elif role in recipe.real or not recipe.binarizes:
            status, reason = 'real', f'recipe.real has {role!r}' if recipe.binarizes else 'the recipe binarizes nothing'
        else:
            conv = BinaryConv2d.from_conv(
                host, input_quantizer=recipe.input_quantizer, weight_quantizer=recipe.weight_quantizer,
                scale_weight=recipe.scale_weight, scale_input=role in recipe.scale_input)
        tail = None
        if per_conv:
            tails = [_get(self.model, path) for path in chain.tail]
            tails = [module for module in tails if module is not None and not isinstance(module, nn.Identity)]
            tail = nn.Sequential(*tails) if len(tails) > 1 else tails[0] if tails else None
            for path in chain.tail:
                if _get(self.model, path) is not None:
                    self.edits[path] = nn.Identity()
        branch_act = act if recipe.act == 'branch' and status != 'omitted' else None
        if branch_act is not None:
            norm = _norm_after_act(norm, branch_act, conv)
        self._put_unit(chain, BinaryUnit(conv, norm, branch_act, link, tail=tail, act_first=branch_act is not None))
        self._row(
            chain.conv, status, reason, role=role, link=kind or (link.kind if link is not None else None),
            scale_input=status == 'binarized' and conv.scale_input, norm=chain.norm, act=fate)

    def _parts(self, chain: Chain) -> Tuple[nn.Module, Optional[nn.Module], Optional[nn.Module], Optional[str]]:
        """Convolution, norm and activation of a chain as the unit shall hold them, and the activation's fate."""
        for path in (chain.conv, chain.norm):
            _refuse_hooks(path, _get(self.model, path))
        norm = _get(self.model, chain.norm)
        if self.recipe.act == 'keep':  # the activation stays where it stands, or inside a fused norm
            return self.convs[chain.conv], norm, None, 'kept' if chain.act or isinstance(norm, BatchNormAct2d) else None
        norm, act = _split_norm_act(norm)
        if act is None and chain.act:
            act = _get(self.model, chain.act)
            if isinstance(act, nn.Identity):
                act = None
            self.edits[chain.act] = nn.Identity()
        if act is not None and self.recipe.act == 'branch' and chain.act:
            act = copy.deepcopy(act)  # hosts share one activation between several chains
        fate = None if act is None else 'dropped' if self.recipe.act == 'drop' else 'in branch'
        return self.convs[chain.conv], norm, act, fate

    def _put_unit(self, chain: Chain, unit: BinaryUnit) -> None:
        unit.train(self.convs[chain.conv].training)
        self.edits[chain.conv] = unit
        if chain.norm:
            self.edits[chain.norm] = nn.Identity()

    def _plan_rest(self) -> None:
        """Rows for all layers outside the chains."""
        shortcuts = tuple(
            f'{found.path}.{found.block.shortcut}.' for found in self.blocks if found.block.shortcut)
        for path, module in self.model.named_modules():
            if path in self.rows or not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            if self._why_kept(path):
                self._row(path, 'kept', self._why_kept(path))
            elif path.startswith(shortcuts):
                self._row(path, 'kept', 'residual downsample')
            elif isinstance(module, nn.Linear):
                self._row(path, 'kept', 'linear layer')
            else:
                self._row(path, 'kept', 'no known block holds it', possible=False)

    def _row(self, path: str, status: str, reason: str, **facts: Any) -> None:
        layer = self.model.get_submodule(path)
        self.rows[path] = ReportRow(path, type(layer).__name__, status, reason, params=layer.weight.numel(), **facts)

    def report(self) -> Report:
        order = [p for p, m in self.model.named_modules() if p in self.rows]
        notes = []
        for name in ('scale_input', 'link', 'omit'):
            roles = {row.role for row in self.rows.values()}
            absent = [role for role in getattr(self.recipe, name) if role not in roles]
            if absent:
                notes.append(f'recipe.{name}: the host has no convolution of role {", ".join(absent)}')
        return Report(self.recipe, [self.rows[p] for p in order], notes)

    def apply(self) -> None:
        """Put the planned modules in their places."""
        for path, module in self.edits.items():
            parent_path, _, name = path.rpartition('.')
            parent = self.model.get_submodule(parent_path)
            module.training = parent.training
            setattr(parent, name, module)
        guard_input(self.convs[self.first_conv], network_stride(self.model))


def _identity_link(conv: nn.Conv2d) -> ElasticLink:
    return ElasticLink(conv.out_channels, conv.out_channels, gamma=None)


def _refuse_hooks(path: Optional[str], module: Optional[nn.Module]) -> None:
    if module is None:
        return
    for name in ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'):
        if getattr(module, name, None):
            raise ValueError(
                f'{path}: the {type(module).__name__} carries hooks ({name}), which would be lost in the conversion; '
                f'remove them first and register them again on the unit that takes its place')


def network_stride(model: nn.Module) -> int:
    """Stride of the last features to the image, 1 if unknown."""
    info = getattr(model, 'feature_info', None)
    if info is not None:
        info = info if isinstance(info, list) else info.info
        return max((int(level.get('reduction', 1)) for level in info), default=1)
    if isinstance(model, tv_resnet.ResNet):
        stages = (model.layer1, model.layer2, model.layer3, model.layer4)
        strides = [model.conv1.stride[0], model.maxpool.stride, *(stage[0].stride for stage in stages)]
        return math.prod(strides)
    return 1


# ---------------------------------------------------------------------------------------------------------------------
# The verb

def binarize(
        model: nn.Module,
        recipe: Union[str, Recipe, Dict[str, Any]] = 'el',
        *,
        keep: Sequence[str] = (),
        real_weights: bool = False,
        strict: bool = False,
) -> nn.Module:
    """Binarize a network in place: every conv-norm-act chain of a known block becomes one `BinaryUnit`.

    The tensors of the host are kept, so that a pretrained float network becomes the latent initialisation. The first
    convolution, the classifier and the residual downsampling stay float. Afterwards `model.binarize_report` says what
    became of each layer. If anything is refused, the model is as it was.

    Args:
        model: The network; it is changed in place.
        recipe: Name of a recipe (`recipes.RECIPES`), a `Recipe`, or its dict. The name 'el' means 'el_mobilenet' on a
            depthwise-separable host; the report says which one was used.
        keep: Module paths or glob patterns of layers to keep float; a path keeps everything below it.
        real_weights: Stage one of two-stage training: binary inputs, real weights, the same state dict keys.
        strict: Raise if a convolution has to be kept because it could not be converted.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a module, or `recipe` or `keep` have the wrong type.
        ValueError: The recipe is unknown, the model has no convolutions, is already binarized, holds a hooked
            convolution, `keep` matches nothing, or `strict` and a convolution could not be converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: found a {type(model).__name__}, expected a torch.nn.Module')
    for path, module in model.named_modules():
        if isinstance(module, (BinaryUnit, BinaryConv2d)):
            raise ValueError(
                f'{path or "model"}: the model is already binarized (found a {type(module).__name__}); '
                f'build a fresh float model to convert it with another recipe')
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise ValueError(f'model: {type(model).__name__} has no Conv2d, there is nothing to binarize')
    chosen = get_recipe(recipe)
    note = None
    if recipe == 'el' and any(isinstance(module, DepthwiseSeparableConv) for module in model.modules()):
        chosen = get_recipe('el_mobilenet')
        note = "recipe 'el' on a depthwise-separable host is 'el_mobilenet': activations in the branches, no K"
    plan = _Plan(model, chosen.with_real_weights() if real_weights else chosen, keep)
    report = plan.report()
    if note:
        report.notes.append(note)
    impossible = [row for row in report.rows if not row.possible]
    if strict and impossible:
        row = impossible[0]
        raise ValueError(
            f'{row.path}: {row.kind} {tuple(model.get_submodule(row.path).weight.shape)} cannot be binarized '
            f'({row.reason}), nor can {len(impossible) - 1} others; pass keep=({row.path!r}, ...) to keep them float')
    plan.apply()
    model.binarize_report = report
    return model
