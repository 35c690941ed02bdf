"""The plan of a conversion: what replaces which module of a network. Nothing is changed until it is applied."""
import copy
import fnmatch
import math
from collections import OrderedDict
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..dry_run import HOOKS, WEIGHTED, LayerRun, own_input_size, run_layers, undisturbed
from ..layers import BinaryUnit, ElasticLink, RPReLU, Shift, ZeroShortcut, check_own_tensors, guard_input
from ..layers.output_scale import Gate, LearnedScale
from ..recipes import Recipe, role_of_shape
from ..weights.loading import guard_loading
from .build_unit import (
    binary_form,
    channels_of,
    identity_link,
    new_beside,
    norm_after_act,
    pads_same,
    shift_before_pool,
    split_norm_act,
    status_of,
)
from .dead_signs import new_norm, revive_signs
from .known_blocks import Chain, FoundBlock, Network, find_networks, get_module, join_path
from .report import EXEMPT, Report, ReportRow
from .traced_graph import GraphNetwork, trace_network

__all__ = ['Plan']

PRE = {'norm': nn.BatchNorm2d, 'shift': Shift}


class Plan:
    """What replaces which module, and the report. Building one changes nothing in the model."""

    def __init__(
            self,
            model: nn.Module,
            recipe: Recipe,
            keep: Sequence[str],
            input_size: Optional[Tuple[int, int, int]],
            like: Optional[Dict[str, Any]],
    ) -> None:
        self.model = model
        self.keep = tuple(keep) if isinstance(keep, (list, tuple)) else keep
        self.like = like
        self.revived: List[str] = []
        self.hopeless: List[str] = []
        self.recipe = recipe
        self.input_size = input_size or tuple((like or {}).get('input_size') or own_input_size(model))
        self.runs: Dict[str, LayerRun] = {}
        self.edits: Dict[str, nn.Module] = {}
        self.moved: Dict[str, str] = {}
        self.rows: Dict[str, ReportRow] = {}
        self.hosts: Dict[str, nn.Module] = {}
        self.notes: List[str] = []
        self.renewed_norms = 0
        self.dropped_norms: Dict[str, Tuple[str, nn.Module]] = {}
        self.ends: Tuple[str, ...] = ()
        self.pooled_norms: List[nn.Module] = []
        self.kept = self._match(keep)
        self.shared = _shared_weights(model)
        self._run()
        self.networks, strangers = find_networks(model)
        if strangers or not self.networks:
            self.networks = [trace_network(model, self.runs)]
            self.notes += self.networks[0].notes
        self.units = 0
        self.guards: List[Tuple[nn.Conv2d, int]] = []
        for network in self.networks:
            self._plan_network(network)
        if self.units == 0:  # nothing to binarize: then nothing is touched
            self.edits.clear()
            self.moved.clear()
            self.guards.clear()
            self.pooled_norms.clear()
            self.rows = {p: replace(row, act='kept' if row.act else None) for p, row in self.rows.items()}
            self.notes.append('no convolution was converted, the model is as it was')
        self._plan_rest()

    def _run(self) -> None:
        """Shapes and operations of the layers, if the model can tell them."""
        try:
            self.runs = run_layers(self.model, self.input_size, compute=True)
        except Exception as e:  # whatever a foreign forward raises for an image that it does not want
            self.notes.append(
                f'operations were not counted: the model does not run on an image of '
                f'{"x".join(map(str, self.input_size))} ({type(e).__name__}: {e}); pass example_input')
            self.input_size = None

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
        self.ends = self._find_ends(network) if self.recipe.act == 'ends' and not traced else ()
        for found in network.blocks:
            self._plan_block(found, reasons, followers, traced)
        if self.ends:
            self._plan_norm_of_stem(network)
        for path in network.acts if traced and self.recipe.act != 'keep' else ():
            module = get_module(self.model, path)
            _refuse_hooks(path, module)
            self.edits.setdefault(path, split_norm_act(module)[0] if split_norm_act(module)[1] else nn.Identity())
        root = network.blocks[0]
        if self.recipe.input_quantizer and self.recipe.act in ('drop', 'prelu', 'rprelu') and root.block.pool:
            pool = get_module(self.model, join_path(root.path, root.block.pool))
            if any(isinstance(m, nn.MaxPool2d) for m in pool.modules()):
                self.pooled_norms.append(get_module(self.model, root.chains[-1].norm))
        images = network.image_conv if traced else chains[0].conv
        if self.recipe.binarizes and images is not None:
            self.guards.append((get_module(self.model, images), 1 if traced else self._stride(network)))

    def _find_ends(self, network: Network) -> Tuple[str, ...]:
        """Convolutions whose activation stays with act='ends': the stem's, and the last, if it shares it with none."""
        stem, last = network.blocks[0].chains[-1], network.chains[-1]
        if last.act is not None and sum(chain.act == last.act for chain in network.chains) > 1:
            self.notes.append(f'{last.act}: other layers of its block share it, the last activation is dropped too')
            return (stem.conv,)
        return (stem.conv, last.conv)

    def _plan_norm_of_stem(self, network: Network) -> None:
        """A new norm behind the stem's activation and pool, in front of the first sign."""
        root = network.blocks[0]
        stem = root.chains[-1]
        conv = get_module(self.model, stem.conv)
        pool = join_path(root.path, root.block.pool) if root.block.pool else None
        place = pool if pool and not stem.conv.startswith(pool) else stem.act or stem.norm
        if place is None:
            return
        host, name = self.edits.get(place) or get_module(self.model, place), 'pool' if place == pool else 'act'
        norm = new_beside(nn.BatchNorm2d, conv.out_channels, conv)
        self.edits[place] = nn.Sequential(OrderedDict([(name, host), ('new_norm', norm)]))
        self.moved[place] = f'{place}.{name}'

    def _why_kept(self, chain: Chain, reason: Optional[str]) -> Optional[Tuple[str, bool]]:
        """Why a chain's convolution stays as it is, and whether it could be converted; None if it is converted."""
        conv = get_module(self.model, chain.conv)
        if chain.conv in self.kept:
            return f'keep={self.kept[chain.conv]!r}', True
        if chain.conv in self.shared:
            return f'its weight is used at {self.shared[chain.conv]} too', False
        if reason is not None:
            return reason, reason in (*EXEMPT, 'squeeze-excite')
        form = binary_form(conv, self.recipe)
        return (form, False) if isinstance(form, str) else None

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
            links = [identity_link(convs[1]) if host_link is None else host_link, identity_link(convs[1])]
            if host_link is not None:
                self.moved[found.shortcut] = f'{found.chains[0].conv}.link'
        def stays(chain: Chain) -> bool:
            follower = followers.get(chain.conv)
            return reasons[chain.conv] is not None and (follower is None or reasons[follower] is not None)

        for chain, link in zip(found.chains, links):
            reason = reasons[chain.conv]
            if reason:
                # Its activation may stay if no sign comes next, where it is shared: after any of its places.
                self._plan_kept(chain, *reason, keep_act=chain.conv in self.ends or not traced and all(
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
        if act is not None and chain.norm is None:
            fate = 'dropped'  # there is no norm that it could stand at
        elif act is not None:
            if self.recipe.act == 'branch':
                norm = self._renew(norm, act, get_module(self.model, chain.conv))
                norm = nn.Sequential(OrderedDict(act=act, norm=norm))
            else:
                norm = nn.Sequential(OrderedDict(norm=norm, new_act=act))
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
            if chain.no_link:
                why = f'no link: {chain.no_link}'
            elif host_skip:
                why = 'no link: the block keeps its own shortcut'
            elif not recipe.elastic and len(set(channels_of(host))) > 1:
                why = 'no link: the recipe\'s links keep the channel count'
            else:
                link = ElasticLink.for_conv(
                    host, recipe.gamma if recipe.elastic else None, pads_same(host), recipe.link_pool)
                why = '' if link is not None else 'no link: no pooling has its output size'
        if link is None:
            kind = None
        elif isinstance(link, ElasticLink):
            kind = link.kind
            link.train(host.training).requires_grad_(host.weight.requires_grad)
        norm, act, fate = self._norm_and_act(chain, chain.conv in self.ends, unit=True)
        conv: Optional[nn.Module] = host
        if role in recipe.omit:
            status, why, conv, norm, act = 'omitted', f'recipe.omit has {role!r}', None, None, None
            if link is None:
                raise ValueError(f'{chain.conv}: recipe {recipe.name!r} omits it and gives it no link, nothing is left')
        elif role in recipe.real or not recipe.binarizes:
            status, why = 'real', f'recipe.real has {role!r}' if recipe.binarizes else 'the recipe binarizes nothing'
        else:
            same = {'same_pad': True} if pads_same(host) else {}
            conv = binary_form(host, recipe)(
                host, input_quantizer=recipe.input_quantizer, weight_quantizer=recipe.weight_quantizer,
                scale_weight=recipe.scale_weight, weight_scale_grad=recipe.scale_weight_grad,
                scale_input=role in recipe.scale_input, **same)
            status = status_of(conv)
        signed = getattr(conv, 'input_quantizer', None) is not None
        act_first = recipe.act == 'branch' and act is not None
        if act_first:
            norm = self._renew(norm, act, conv)
        tail = self._take_tail(chain) if link is not None and conv is not None else None
        pre = post = scale = None
        if chain.shift and recipe.act != 'keep' and signed:
            pre = new_norm(host, not host.weight.requires_grad)
            why = why or 'an activation that cannot be moved comes before it: a new norm shifts the input of the sign'
        elif signed and recipe.pre:
            pre = new_beside(PRE[recipe.pre], host.in_channels, host)
        norm_goes = norm is not None and signed and recipe.pre == 'norm'
        if norm_goes:
            self.dropped_norms[chain.conv] = (chain.norm, norm)
            norm = None
        if signed and recipe.scale_output:
            scale = self._output_scale(chain, host)
        if recipe.act == 'rprelu' and conv is not None:
            post = new_beside(RPReLU, host.out_channels, host)
        unit = BinaryUnit(conv, norm, act, link, pre, post, tail, act_first, scale)
        unit.training = host.training
        self.units += 1
        self.edits[chain.conv] = unit
        self.hosts[chain.conv] = host
        omitted = conv is None
        self.moved[chain.conv] = '' if omitted else f'{chain.conv}.conv'
        if chain.norm:
            self.edits[chain.norm] = nn.Identity()
            self.moved[chain.norm] = '' if omitted or norm_goes else f'{chain.conv}.norm'
        self._row(
            chain.conv, status, why, role=role, link=kind, scale_input=bool(getattr(conv, 'scale_input', False)),
            norm=chain.norm, act=fate)

    def _role(self, chain: Chain) -> str:
        conv = get_module(self.model, chain.conv)
        geometry = ((1, 1), (1, 1), 1) if isinstance(conv, nn.Linear) else (conv.kernel_size, conv.stride, conv.groups)
        return chain.role or role_of_shape(*channels_of(conv), *geometry)

    def _norm_and_act(
            self, chain: Chain, keep_act: bool = False, unit: bool = False,
    ) -> Tuple[Optional[nn.Module], Optional[nn.Module], Optional[str]]:
        """Norm and branch activation of a chain as they shall be, and the activation's fate."""
        norm = get_module(self.model, chain.norm)
        plain, act = split_norm_act(norm)
        separate = act is None and chain.act is not None
        if separate:
            act = get_module(self.model, chain.act)
        none = act is None or isinstance(act, nn.Identity)
        if keep_act or self.recipe.act == 'keep':
            return norm, None, None if none else 'kept'
        if separate and not none:
            self.edits[chain.act] = nn.Identity()
        if self.recipe.act == 'prelu' and (unit or not none):
            conv = get_module(self.model, chain.conv)
            return plain, new_beside(nn.PReLU, channels_of(conv)[1], conv), 'replaced'
        if none:
            return norm, None, None
        if self.recipe.act != 'branch':
            return plain, None, 'replaced' if self.recipe.act == 'rprelu' and unit else 'dropped'
        # Hosts share one activation between several chains.
        return plain, copy.deepcopy(act) if separate else act, 'in branch'

    def _output_scale(self, chain: Chain, conv: nn.Conv2d) -> nn.Module:
        """The learned factor of a convolution's output."""
        if self.recipe.scale_output == 'gate':
            return new_beside(Gate, conv.in_channels, conv, out_channels=conv.out_channels)
        if self.recipe.scale_output == 'channel':
            return new_beside(LearnedScale, conv.out_channels, conv)
        if chain.conv not in self.runs:
            image = 'x'.join(map(str, self.input_size)) if self.input_size else 'that it was tried on'
            raise ValueError(
                f'{chain.conv}: recipe {self.recipe.name!r} learns a factor for each row and column of its output, but '
                f'it does not run on the image {image}; pass example_input, keep={chain.conv!r}, or '
                f"scale_output='channel' (recipe 'xnor_pp_channel'), which needs no size")
        return new_beside(LearnedScale, conv.out_channels, conv, size=self.runs[chain.conv].output[-2:])

    def _renew(self, norm: Optional[nn.Module], act: nn.Module, conv: nn.Module) -> Optional[nn.Module]:
        renewed = norm_after_act(norm, act, conv)
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
        root = network.blocks[0]
        pools = [get_module(self.model, join_path(root.path, root.block.pool))]
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
        last = next(reversed(self.runs), None)
        for path, module in self.model.named_modules():
            if path in self.rows or not isinstance(module, WEIGHTED):
                continue
            if path in self.kept:
                self._row(path, 'kept', f'keep={self.kept[path]!r}')
            elif path.startswith(shortcuts):
                self._row(path, 'kept', 'residual downsample')
            elif path.startswith(sides):
                self._row(path, 'kept', 'squeeze-excite')
            elif isinstance(module, nn.Linear):
                self._row(path, 'kept', 'classifier' if path == last else 'linear layer on vectors')
            elif isinstance(module, nn.Conv2d):
                self._row(path, 'kept', 'no known block holds it', possible=False)
            elif isinstance(module, nn.Conv1d):
                self._row(path, 'kept', 'one-dimensional convolution')
            else:
                self._row(path, 'kept', f'there is no binary {type(module).__name__}', possible=False)

        self.order = [p for p, m in self.model.named_modules() if p in self.rows]

    def _row(self, path: str, status: str, reason: str, **facts: Any) -> None:
        layer = get_module(self.model, path) if path else self.model
        run = self.runs.get(path)
        macs = (run.macs if run else 0) if self.input_size else None
        with undisturbed(layer):  # a weight that is computed may change buffers
            params = layer.weight.numel()
        self.rows[path] = ReportRow(path, type(layer).__name__, status, reason, params=params, macs=macs, **facts)

    def report(self) -> Report:
        notes = list(self.notes)
        roles = {row.role for row in self.rows.values()}
        for name in ('scale_input', 'link', 'real', 'omit'):
            absent = [role for role in getattr(self.recipe, name) if role not in roles]
            if absent and self.units:
                notes.append(f'recipe.{name}: the host has no convolution of role {", ".join(absent)}')
        if self.renewed_norms:
            notes.append(
                f'running statistics of {self.renewed_norms} norms start anew, because their activation moved in front')
        if self.dropped_norms:
            notes.append(
                f'{len(self.dropped_norms)} norms of the host are gone: the recipe normalizes in front of the sign')
        if self.recipe.scale_output == 'rank1' and self.units:
            notes.append(
                f'factors of rows and columns are for images of {"x".join(map(str, self.input_size))} and interpolated '
                f"at other sizes; pass example_input for one of them, or scale_output='channel' for none")
        if self.recipe.act == 'ends' and not self.ends and self.units:
            notes.append("act='ends': the stem of this host is not known, all activations are dropped")
        return Report(
            self.recipe, [self.rows[p] for p in self.order], notes, self.moved, self.input_size, self.keep,
            tuple(self.revived), tuple(self.hopeless))

    def apply(self, example_input: Optional[torch.Tensor]) -> List[str]:
        """Put the planned modules in their places, at every path that a module has. Gives notes for the report."""
        places: Dict[nn.Module, List[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            places.setdefault(module, []).append(path)
        undo: List[Tuple[nn.Module, str, Any]] = []
        try:
            for path, module in self.edits.items():
                old = get_module(self.model, path)
                for place in places.get(old, [path]):
                    parent_path, _, name = place.rpartition('.')
                    parent = self.model.get_submodule(parent_path)
                    if not isinstance(module, BinaryUnit):
                        module.training = parent.training
                    undo.append((parent, name, old))
                    setattr(parent, name, module)
            notes = self._revive(example_input)
        except BaseException:
            for parent, name, old in reversed(undo):
                setattr(parent, name, old)
            raise
        for conv, stride in self.guards:
            guard_input(conv, stride)
        for norm in self.pooled_norms:
            shift_before_pool(norm)
        if self.units:
            guard_loading(self.model, self.recipe.code)
        return notes

    def _revive(self, example_input: Optional[torch.Tensor]) -> List[str]:
        """Norms before signs that would be constant, in networks that no table describes; notes for the report."""
        if self.recipe.act == 'keep' or not any(isinstance(network, GraphNetwork) for network in self.networks):
            return []
        if self.like is None:
            self.revived, self.hopeless, notes = revive_signs(self.model, example_input)
        else:
            self.revived, self.hopeless, notes = list(self.like['revived']), list(self.like['hopeless']), []
            for path in self.revived:
                unit = self.model.get_submodule(path)
                unit.pre = new_norm(unit.conv, not unit.conv.weight.requires_grad)
        for path in self.hopeless:
            unit = self.model.get_submodule(path)
            unit.conv, unit.pre, unit.scale = self.hosts[path], None, None
            if path in self.dropped_norms:
                norm_path, unit.norm = self.dropped_norms.pop(path)
                self.moved[norm_path] = f'{path}.norm'
            self.rows[path] = replace(
                self.rows[path], status='real', scale_input=False, possible=False,
                reason='its input does not vary, a norm before the sign would not help')
        return [f'a new norm shifts the input of the sign at {", ".join(self.revived)}'] * bool(self.revived) + notes


def _refuse_hooks(path: Optional[str], module: Optional[nn.Module]) -> None:
    """Raise ValueError if a module that is about to be taken apart, or a part of it, carries hooks.

    Those that compute a tensor in each pass are named as what they are.
    """
    for part, holder in module.named_modules(prefix=path) if module is not None else ():
        check_own_tensors(holder, part)
        for name in HOOKS:
            if getattr(holder, name):
                raise ValueError(
                    f'{part}: the {type(holder).__name__} carries hooks ({name}), which would be lost in the '
                    f'conversion; remove them first and register them again on the unit that takes its place')


def _shared_weights(model: nn.Module) -> Dict[str, str]:
    """Layers that share their weight, or themselves, with another place: path and the other place."""
    places: Dict[int, List[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Conv2d, nn.Linear)) and 'weight' in module._parameters:  # else it is computed
            places.setdefault(id(module.weight), []).append(path)
    return {path: next(p for p in paths if p != path)
            for paths in places.values() if len(paths) > 1 for path in paths}
