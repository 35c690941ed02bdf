"""binarize(): swap the conv-norm-act chains of a network for `BinaryUnit`s, in place, all or nothing.

Three steps: *find* the chains (blocks.py), *plan* what replaces which module (nothing is changed yet, every error comes
from here), and *apply* the plan. The host's class and forward stay as they are: a unit stands where the convolution
stood, and Identity where its norm and activation stood.
"""
import copy
import fnmatch
import math
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from torch.nn.utils import parametrize

from .blocks import Chain, FoundBlock, Network, find_networks, get_module, join_path
from .checkpoints import guard_loading
from .graph import GraphNetwork, trace_network
from .layers import BinaryConv2d, BinaryUnit, ElasticLink, ZeroShortcut, expected_statistics, guard_input
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
        status: 'binarized' (weights and inputs), 'binary inputs' or 'binary weights' (only these), 'real' (in a unit,
            but float), 'omitted' (left out, its link stands alone), 'removed' (with the shortcut that it was on),
            'kept' (float, outside any unit).
        reason: Why, where it was not binarized or got no link.
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
    """What `binarize` did. Prints as a table; `to_dict` gives the data.

    Args:
        recipe: The recipe in use.
        rows: One row for each convolution and linear layer.
        notes: What does not belong to one layer.
        moved: Where the host's modules went, old path to new path, '' for those that are gone.
    """
    recipe: Recipe
    rows: List[ReportRow] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    moved: Dict[str, str] = field(default_factory=dict)

    def count(self, status: str) -> int:
        """Number of layers with a status."""
        return sum(row.status == status for row in self.rows)

    @property
    def binarized_share(self) -> float:
        """Share of the weights of all convolutions and linear layers that are binary, with binary inputs, 0 to 1."""
        total = sum(row.params for row in self.rows if row.status not in ('omitted', 'removed'))
        return sum(row.params for row in self.rows if row.status == 'binarized') / max(total, 1)

    def to_dict(self) -> Dict[str, Any]:
        """Plain data for JSON."""
        rows = [{k: v for k, v in row.__dict__.items()} for row in self.rows]
        return {
            'recipe': self.recipe.to_dict(), 'rows': rows, 'notes': list(self.notes), 'moved': dict(self.moved)}

    def __str__(self) -> str:
        lines = [f'{"layer":44} {"role":10} {"status":14} {"link":14} {"K":2} {"act":10} {"weights":>10}  reason']
        for row in self.rows:
            lines.append(
                f'{row.path:44} {row.role or "-":10} {row.status:14} {row.link or "-":14} '
                f'{"K" if row.scale_input else "-":2} {row.act or "-":10} {row.params:>10,}  {row.reason}'.rstrip())
        lines.append(
            f'recipe {self.recipe.name}: {self.count("binarized")} of {len(self.rows)} layers binarized, '
            f'{100 * self.binarized_share:.1f} % of their weights')
        return '\n'.join(lines + self.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Plan

def _split_norm_act(norm: Optional[nn.Module]) -> Tuple[Optional[nn.Module], Optional[nn.Module]]:
    """A fused norm-and-activation of timm as two modules that share its tensors; other norms as they are."""
    if not isinstance(getattr(norm, 'act', None), nn.Module):
        return norm, None
    twin = _twin(norm)
    twin.act = nn.Identity().train(norm.training)
    return twin, None if isinstance(norm.act, nn.Identity) else norm.act


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same class that shares the tensors and children of another, but not its slots for them."""
    twin = copy.copy(module)
    for slots in ('_parameters', '_buffers', '_modules'):
        twin.__dict__[slots] = dict(module.__dict__[slots])
    return twin


@torch.no_grad()
def _norm_after_act(norm: Optional[nn.Module], act: nn.Module, conv: nn.Module) -> Optional[nn.Module]:
    """The norm for conv -> act -> norm, where the host had conv -> norm -> act.

    The host's running statistics describe another tensor, and used here in eval mode they leave every sign at +1. The
    twin starts from the expectation for inputs of unit variance: act(z), z ~ N(0, sum of squared weights).
    """
    if getattr(norm, 'running_mean', None) is None or getattr(norm, 'running_var', None) is None:
        return norm
    weight = conv.quantized_weight() if isinstance(conv, BinaryConv2d) else conv.weight
    mean, var = expected_statistics(weight, act)
    twin = _twin(norm)
    twin.running_mean = mean.to(norm.running_mean.dtype)
    twin.running_var = var.to(norm.running_var.dtype)
    return twin


class _Plan:
    """What replaces which module, and the report. Building one changes nothing in the model."""

    def __init__(self, model: nn.Module, recipe: Recipe, keep: Sequence[str]) -> None:
        self.model = model
        self.recipe = recipe
        self.edits: Dict[str, nn.Module] = {}
        self.moved: Dict[str, str] = {}
        self.rows: Dict[str, ReportRow] = {}
        self.notes: List[str] = []
        self.renewed_norms = 0
        self.new_norms: List[nn.BatchNorm2d] = []
        self.kept = self._match(keep)
        self.networks, self.strangers = find_networks(model)
        if self.strangers or not self.networks:
            self.networks = self._trace()
        self.units = 0
        self.guards: List[Tuple[nn.Conv2d, int]] = []
        for network in self.networks:
            self._plan_network(network)
        if self.units == 0:  # nothing to binarize: then nothing is touched
            self.edits.clear()
            self.moved.clear()
            self.guards.clear()
            self.rows = {p: replace(row, act='kept' if row.act else None) for p, row in self.rows.items()}
            self.notes.append('no convolution was converted, the model is as it was')
        self._plan_rest()

    def _trace(self) -> List[Network]:
        """The network as torch.fx sees it, none if it cannot."""
        try:
            return [trace_network(self.model)]
        except Exception as e:  # whatever a foreign forward raises under tracing
            reason = f'torch.fx cannot trace the model ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""})'
            self.notes.append(reason)
            self.strangers = {p: reason for p, m in self.model.named_modules() if isinstance(m, nn.Conv2d)}
            return []

    def _match(self, keep: Sequence[str]) -> Dict[str, str]:
        """Paths to keep float, each with the pattern that says so."""
        if isinstance(keep, str) or not isinstance(keep, Sequence) or not all(isinstance(k, str) for k in keep):
            raise TypeError(f'keep: found {keep!r}, expected a sequence of module paths or patterns')
        layers = [p for p, m in self.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        kept = {}
        for pattern in keep:
            hits = [p for p in layers if fnmatch.fnmatch(p, pattern) or p.startswith(pattern + '.')]
            if not hits:
                raise ValueError(f'keep: {pattern!r} matches no convolution or linear layer of the model')
            kept.update({p: pattern for p in hits})
        return kept

    def _plan_network(self, network: Network) -> None:
        chains = network.chains
        for chain in chains:
            for path in (chain.conv, chain.norm, chain.act):
                _refuse_hooks(path, get_module(self.model, path))
        traced = isinstance(network, GraphNetwork)
        known = dict(network.reasons) if traced else {chains[0].conv: 'first convolution'}
        reasons = {chain.conv: self._why_kept(chain, known.get(chain.conv)) for chain in chains}
        # Which convolution comes next is known for networks of one path; a traced one names the activations that go.
        followers = {a.conv: a.conv if traced else b.conv for a, b in zip(chains, [*chains[1:], chains[-1]])}
        if not traced:
            followers.pop(chains[-1].conv)
        for found in network.blocks:
            self._plan_block(found, reasons, followers, traced)
        for path in network.acts if traced and self.recipe.act != 'keep' else ():
            module = get_module(self.model, path)
            self.edits.setdefault(path, _split_norm_act(module)[0] if _split_norm_act(module)[1] else nn.Identity())
        images = network.image_conv if traced else chains[0].conv
        if self.recipe.binarizes and images is not None:
            self.guards.append((get_module(self.model, images), 1 if traced else self._stride(network)))

    def _why_kept(self, chain: Chain, reason: Optional[str]) -> Optional[Tuple[str, bool]]:
        """Why a chain's convolution stays as it is, and whether it could be converted; None if it is converted."""
        conv = get_module(self.model, chain.conv)
        if chain.conv in self.kept:
            return f'keep={self.kept[chain.conv]!r}', True
        if reason is not None:
            return reason, reason in ('first convolution', 'squeeze-excite', 'classifier', 'residual downsample')
        if type(conv) is not nn.Conv2d:
            return f'{type(conv).__name__} has a forward of its own', False
        return None

    def _plan_block(
            self,
            found: FoundBlock,
            reasons: Dict[str, Optional[Tuple[str, bool]]],
            followers: Dict[str, str],
            traced: bool,
    ) -> None:
        recipe = self.recipe
        convs = [get_module(self.model, chain.conv) for chain in found.chains]
        per_conv = (
            found.block.per_conv and 'spatial' in recipe.link
            and not any(reasons[chain.conv] for chain in found.chains)
            and convs[0].out_channels == convs[1].out_channels)
        links: List[Optional[nn.Module]] = [None] * len(convs)
        if per_conv:
            host_link = get_module(self.model, found.shortcut)
            links = [_identity_link(convs[1]) if host_link is None else host_link, _identity_link(convs[1])]
            if host_link is not None:
                self.moved[found.shortcut] = f'{found.chains[0].conv}.link'
        def stays(chain: Chain) -> bool:
            follower = followers.get(chain.conv)
            return reasons[chain.conv] is not None and (follower is None or reasons[follower] is not None)

        for chain, link in zip(found.chains, links):
            reason = reasons[chain.conv]
            if reason:
                # Its activation may stay if no sign comes next, where it is shared: after any of its places.
                self._plan_kept(chain, *reason, keep_act=not traced and all(
                    stays(other) for other in found.chains if other.act == chain.act))
            else:
                self._plan_unit(chain, link, host_skip=found.block.per_conv and not per_conv)
        if per_conv or (found.shortcut and not recipe.residual):
            if not per_conv:
                shortcut = get_module(self.model, found.shortcut)
                for name, module in shortcut.named_modules(prefix=found.shortcut) if shortcut is not None else ():
                    if isinstance(module, nn.Conv2d):
                        self._row(name, 'removed', 'the recipe keeps no residual shortcut')
                self.moved[found.shortcut] = ''
            self.edits[found.shortcut] = ZeroShortcut()

    def _plan_kept(self, chain: Chain, reason: str, possible: bool, keep_act: bool) -> None:
        """A float convolution outside any unit; only its activation may move."""
        norm, act, fate = self._norm_and_act(chain, keep_act)
        if act is not None and self.recipe.act == 'branch':
            norm = self._renew(norm, act, get_module(self.model, chain.conv))
            norm = nn.Sequential(OrderedDict(act=act, norm=norm))
            self.moved[chain.norm] = f'{chain.norm}.norm'
        if chain.norm and norm is not get_module(self.model, chain.norm):
            self.edits[chain.norm] = norm
        role = self._role(chain)
        self._row(chain.conv, 'kept', reason, role=role, norm=chain.norm, act=fate, possible=possible)

    def _plan_unit(self, chain: Chain, link: Optional[nn.Module], host_skip: bool) -> None:
        """A unit in place of a chain.

        Args:
            chain: The chain.
            link: The link of a block with one shortcut a convolution.
            host_skip: The block keeps its own shortcut around both convolutions: no links.
        """
        recipe = self.recipe
        host = get_module(self.model, chain.conv)
        role = self._role(chain)
        kind, why = 'host shortcut', ''
        if link is None and role in recipe.link:
            if not chain.link:
                why = 'no link: the shortcut of the host carries the same'
            elif host_skip:
                why = 'no link: the block keeps its own shortcut'
            elif not recipe.elastic and host.in_channels != host.out_channels:
                why = 'no link: the recipe\'s links keep the channel count'
            else:
                link = ElasticLink.for_conv(host, recipe.gamma)
                why = '' if link is not None else 'no link: no pooling has its output size'
        if link is None:
            kind = None
        elif isinstance(link, ElasticLink):
            kind = link.kind
            link.train(host.training)
        norm, act, fate = self._norm_and_act(chain)
        conv: Optional[nn.Module] = host
        if role in recipe.omit:
            status, why, conv, norm, act = 'omitted', f'recipe.omit has {role!r}', None, None, None
            if link is None:
                raise ValueError(f'{chain.conv}: recipe {recipe.name!r} omits it and gives it no link, nothing is left')
        elif role in recipe.real or not recipe.binarizes:
            status, why = 'real', f'recipe.real has {role!r}' if recipe.binarizes else 'the recipe binarizes nothing'
        else:
            conv = BinaryConv2d.from_conv(
                host, input_quantizer=recipe.input_quantizer, weight_quantizer=recipe.weight_quantizer,
                scale_weight=recipe.scale_weight, scale_input=role in recipe.scale_input)
            status = (
                'binarized' if conv.is_binary else 'binary inputs' if recipe.input_quantizer else 'binary weights')
        if act is not None:
            norm = self._renew(norm, act, conv)
        tail = self._take_tail(chain) if link is not None and conv is not None else None
        pre = None
        if chain.shift and recipe.act != 'keep' and getattr(conv, 'input_quantizer', None) is not None:
            pre = nn.BatchNorm2d(
                host.in_channels, device=host.weight.device, dtype=host.weight.dtype).train(host.training)
            why = why or 'an activation that cannot be moved comes before it: a new norm shifts the input of the sign'
            self.new_norms.append(pre)
        unit = BinaryUnit(conv, norm, act, link, pre, tail=tail, act_first=act is not None)
        unit.training = host.training
        self.units += 1
        self.edits[chain.conv] = unit
        omitted = conv is None
        self.moved[chain.conv] = '' if omitted else f'{chain.conv}.conv'
        if chain.norm:
            self.edits[chain.norm] = nn.Identity()
            self.moved[chain.norm] = '' if omitted else f'{chain.conv}.norm'
        self._row(
            chain.conv, status, why, role=role, link=kind, scale_input=bool(getattr(conv, 'scale_input', False)),
            norm=chain.norm, act=fate)

    def _role(self, chain: Chain) -> str:
        conv = get_module(self.model, chain.conv)
        return chain.role or role_of_shape(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.groups)

    def _norm_and_act(
            self, chain: Chain, keep_act: bool = False,
    ) -> Tuple[Optional[nn.Module], Optional[nn.Module], Optional[str]]:
        """Norm and branch activation of a chain as they shall be, and the activation's fate."""
        norm = get_module(self.model, chain.norm)
        plain, act = _split_norm_act(norm)
        separate = act is None and chain.act is not None
        if separate:
            act = get_module(self.model, chain.act)
        if act is None or isinstance(act, nn.Identity):
            return norm, None, None
        if keep_act or self.recipe.act == 'keep':
            return norm, None, 'kept'
        if separate:
            self.edits[chain.act] = nn.Identity()
        if self.recipe.act == 'drop':
            return plain, None, 'dropped'
        # Hosts share one activation between several chains.
        return plain, copy.deepcopy(act) if separate else act, 'in branch'

    def _renew(self, norm: Optional[nn.Module], act: nn.Module, conv: nn.Module) -> Optional[nn.Module]:
        renewed = _norm_after_act(norm, act, conv)
        self.renewed_norms += renewed is not norm
        return renewed

    def _take_tail(self, chain: Chain) -> Optional[nn.Module]:
        """What moves into the branch, with Identity in its place."""
        present = [(path, get_module(self.model, path)) for path in chain.tail]
        present = [(path, m) for path, m in present if m is not None and not isinstance(m, nn.Identity)]
        for path, _ in present:
            self.edits[path] = nn.Identity()
            self.moved[path] = f'{chain.conv}.tail' + (f'.{path.rpartition(".")[2]}' if len(present) > 1 else '')
        if len(present) > 1:
            tail = nn.Sequential(OrderedDict((path.rpartition('.')[2], m) for path, m in present))
            tail.training = present[0][1].training
            return tail
        return present[0][1] if present else None

    def _stride(self, network: Network) -> int:
        """Stride of the last features to the image: every chain of a known network is on its one path."""
        strides = [max(get_module(self.model, chain.conv).stride) for chain in network.chains]
        pools = [getattr(get_module(self.model, network.path) if network.path else self.model, 'maxpool', None)]
        blurs = [path for chain in network.chains for path in chain.tail if path.endswith('.aa')]
        pools += [get_module(self.model, path) for path in blurs]
        for pool in pools:
            for module in pool.modules() if pool is not None else ():
                stride = getattr(module, 'stride', 1)
                if not isinstance(module, nn.Conv2d):  # convolutions are in chains
                    strides.append(max(stride) if isinstance(stride, (tuple, list)) else stride)
        return math.prod(strides)

    def _plan_rest(self) -> None:
        """Rows for all layers outside the chains."""
        blocks = [found for network in self.networks for found in network.blocks]
        shortcuts = tuple(f'{found.shortcut}.' for found in blocks if found.shortcut)
        sides = tuple(f'{join_path(found.path, name)}.' for found in blocks for name in found.block.ignore)
        for path, module in self.model.named_modules():
            if path in self.rows or not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            if path in self.kept:
                self._row(path, 'kept', f'keep={self.kept[path]!r}')
            elif path.startswith(shortcuts):
                self._row(path, 'kept', 'residual downsample')
            elif path.startswith(sides):
                self._row(path, 'kept', 'side branch')
            elif isinstance(module, nn.Linear):
                self._row(path, 'kept', 'linear layer')
            else:
                self._row(path, 'kept', self.strangers.get(path, 'no known block holds it'), possible=False)

    def _row(self, path: str, status: str, reason: str, **facts: Any) -> None:
        layer = get_module(self.model, path) if path else self.model
        self.rows[path] = ReportRow(path, type(layer).__name__, status, reason, params=layer.weight.numel(), **facts)

    def report(self) -> Report:
        order = [p for p, m in self.model.named_modules() if p in self.rows]
        notes = list(self.notes)
        roles = {row.role for row in self.rows.values()}
        for name in ('scale_input', 'link', 'real', 'omit'):
            absent = [role for role in getattr(self.recipe, name) if role not in roles]
            if absent and self.units:
                notes.append(f'recipe.{name}: the host has no convolution of role {", ".join(absent)}')
        if self.renewed_norms:
            notes.append(
                f'running statistics of {self.renewed_norms} norms start anew, because their activation moved in front')
        return Report(self.recipe, [self.rows[p] for p in order], notes, self.moved)

    def apply(self, example_input: Optional[torch.Tensor]) -> None:
        """Put the planned modules in their places."""
        for path, module in self.edits.items():
            parent_path, _, name = path.rpartition('.')
            parent = self.model.get_submodule(parent_path)
            if not isinstance(module, BinaryUnit):
                module.training = parent.training
            setattr(parent, name, module)
        for conv, stride in self.guards:
            guard_input(conv, stride)
        if self.units:
            guard_loading(self.model, self.recipe.code)
        if any(isinstance(network, GraphNetwork) for network in self.networks) and self.recipe.act != 'keep':
            self._revive(_example(self.model) if example_input is None else example_input)

    def _revive(self, x: torch.Tensor) -> None:
        """Give a norm to units whose sign is the same almost everywhere on a batch, and centre the new norms on it."""
        if x.device.type == 'meta':
            return
        modes = {module: module.training for module in self.model.modules()}
        units = {m.conv: (p, m) for p, m in self.model.named_modules()
                 if isinstance(m, BinaryUnit) and getattr(m.conv, 'input_quantizer', None) is not None}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        revived = []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                for _ in range(5):  # a new norm moves what comes after it
                    shares = [*self._shares(units, x, False), *self._shares(units, x, True)]
                    dead = {conv for conv, share in shares if not 0.05 < share < 0.95 and units[conv][1].pre is None}
                    for conv in dead:
                        norm = nn.BatchNorm2d(conv.in_channels, device=conv.weight.device, dtype=conv.weight.dtype)
                        units[conv][1].pre = norm
                        modes[norm] = conv.training
                        self.new_norms.append(norm)
                        revived.append(units[conv][0])
                    if not dead:
                        break
        except Exception as e:  # the model may want another input than images of its own size
            for name, buffer in self.model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
            self.notes.append(
                f'the signs could not be checked on a batch of shape {tuple(x.shape)} ({type(e).__name__}: {e}); '
                f'pass example_input')
        for module, mode in modes.items():
            module.training = mode
        if revived:
            self.notes.append(f'a new norm shifts the input of the sign at {", ".join(sorted(revived))}')

    def _shares(self, units: Dict[nn.Module, Any], x: torch.Tensor, training: bool) -> List[Tuple[nn.Module, float]]:
        """Share of +1 at each sign; in eval mode the new norms take the statistics of the batch on the way."""
        shares: List[Tuple[nn.Module, float]] = []

        def centre(norm: nn.Module, args: Tuple[torch.Tensor]) -> None:
            if not training:
                norm.running_mean.copy_(args[0].mean((0, 2, 3)))
                norm.running_var.copy_(args[0].var((0, 2, 3)))

        handles = [norm.register_forward_pre_hook(centre) for norm in self.new_norms]
        handles += [conv.register_forward_pre_hook(
            lambda conv, args: shares.append((conv, (args[0] >= 0).float().mean().item()))) for conv in units]
        self.model.train(training)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            self.model(x)
        finally:
            for handle in handles:
                handle.remove()
            for name, buffer in self.model.named_buffers() if training else ():
                buffer.copy_(buffers[name])
        return shares


def _example(model: nn.Module) -> torch.Tensor:
    """A small batch of noise for a model."""
    weight = next(model.parameters())
    cfg = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None) or {}
    size = cfg.get('input_size', (3, 224, 224))
    channels = getattr(model, 'in_chans', size[0])
    noise = torch.randn((2, channels, *(min(n, 96) for n in size[1:])), generator=torch.Generator().manual_seed(0))
    return noise.to(weight.device, weight.dtype)


def _identity_link(conv: nn.Conv2d) -> ElasticLink:
    return ElasticLink(conv.out_channels, conv.out_channels, gamma=None)


def _refuse_hooks(path: Optional[str], module: Optional[nn.Module]) -> None:
    for name in ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'):
        if getattr(module, name, None):
            raise ValueError(
                f'{path}: the {type(module).__name__} carries hooks ({name}), which would be lost in the conversion; '
                f'remove them first and register them again on the unit that takes its place')


def _refuse_unfit(model: nn.Module) -> None:
    """Raise for modules that cannot be swapped without changing more than themselves."""
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise ValueError(f'model: {type(model).__name__} has no Conv2d, there is nothing to binarize')
    seen: Dict[nn.Module, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (BinaryUnit, BinaryConv2d)):
            raise ValueError(
                f'{path or "model"}: the model is already binarized (found a {type(module).__name__}); '
                f'build a fresh float model to convert it with another recipe')
        if not isinstance(module, nn.Conv2d):
            continue
        if parametrize.is_parametrized(module):
            raise ValueError(
                f'{path}: the weight of the {type(module).__name__} is parametrized; '
                f'call torch.nn.utils.parametrize.remove_parametrizations first')
        if module in seen:
            raise ValueError(
                f'{path}: the {type(module).__name__} is used at {seen[module]} too; '
                f'give each place a convolution of its own (copy.deepcopy)')
        seen[module] = path


# ---------------------------------------------------------------------------------------------------------------------
# The verb

def binarize(
        model: nn.Module,
        recipe: Union[str, Recipe, Dict[str, Any]] = 'el',
        *,
        keep: Sequence[str] = (),
        example_input: Optional[torch.Tensor] = None,
        real_weights: bool = False,
        strict: bool = False,
) -> nn.Module:
    """Binarize a network in place: every conv-norm-act chain becomes one `BinaryUnit`.

    ResNets of timm and torchvision and MobileNetV1 are converted by what is known about their blocks; every other
    network by its data flow, as torch.fx traces it (not thread-safe: fx patches torch.nn while it traces). There a unit
    whose sign would be the same almost everywhere, because an activation cannot be taken away, gets a new norm in
    front, and this is checked on a batch of noise, or on `example_input`. What fx cannot trace is left as it is.

    The parameters of the host are kept, so that a pretrained float network becomes the latent initialisation. (Where an
    activation moves in front of its norm, that norm's running statistics start anew.) The first convolution, the
    classifier and the residual downsampling stay float. Activations stay between layers that are kept float. Afterwards
    `model.binarize_report` says what became of each layer. If anything is refused, the model is as it was.

    Args:
        model: The network; it is changed in place.
        recipe: Name of a recipe (`recipes.RECIPES`), a `Recipe`, or its dict. The name 'el' means 'el_mobilenet' on a
            depthwise-separable host; the report says which one was used.
        keep: Module paths or glob patterns of layers to keep float; a path keeps everything below it.
        example_input: Images on which the norms that some networks need before a sign are centred; noise if None.
        real_weights: Stage one of two-stage training: binary inputs, real weights, the same state dict keys.
        strict: Raise if a convolution has to be kept because it could not be converted.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a module, or `recipe` or `keep` have the wrong type.
        ValueError: The recipe is unknown; the model has no convolutions, is already binarized, or holds a convolution
            that is hooked, parametrized or used twice; `keep` matches nothing; the recipe leaves nothing of a
            convolution; or `strict` and a convolution could not be converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: found a {type(model).__name__}, expected a torch.nn.Module')
    if not isinstance(real_weights, bool):
        raise ValueError(f'real_weights: found {real_weights!r}, expected True or False')
    _refuse_unfit(model)
    chosen = get_recipe(recipe)
    note = None
    separable = any(isinstance(module, DepthwiseSeparableConv) for module in model.modules())
    if isinstance(recipe, str) and recipe == 'el' and separable:
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
    plan.apply(example_input)
    report.notes.extend(text for text in plan.notes if text not in report.notes)  # what apply found out
    model.binarize_report = report
    return model
