"""Find chains by data flow: torch.fx for networks that the table of known blocks does not hold.

Nothing rests on names or on the order of registration. What fx cannot trace as a whole falls into pieces along the
module structure, each traced by itself: then what is known inside a piece is used, and what is between them is not.
torch.fx patches torch.nn globally while it traces, so do not convert in one thread while another runs a model; the
registered models are not traced.
"""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropBlock2d, DropPath
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import NodePathTracer

from ..dry_run import LayerRun, stand_in, undisturbed
from .known_blocks import Block, Chain, FoundBlock, Network, is_activation

__all__ = ['GraphNetwork', 'trace_network']

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
# What passes a signal on without mixing values of different sign: a non-negative input stays non-negative.
PASS_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout2d, DropPath, DropBlock2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.Upsample, nn.ChannelShuffle, nn.PixelShuffle, nn.Flatten)
PASS_FUNCTIONS = {
    F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.interpolate, F.pad, torch.flatten, torch.chunk,
    torch.split, torch.transpose, torch.permute, torch.mean}
PASS_METHODS = {
    'chunk', 'split', 'view', 'reshape', 'transpose', 'permute', 'contiguous', 'flatten', 'mean', 'narrow', 'unsqueeze',
    'squeeze', 'expand', 'expand_as', 'clone', 'unflatten'}
NON_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Softmax)
NON_NEGATIVE_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, torch.sigmoid, F.sigmoid, F.hardsigmoid, F.softplus, F.softmax}
GATES = ('sigmoid', 'softmax')
ADDITIONS = {'add', 'iadd', 'add_'}
# Functions that hold weights, or mix what they are given as one that does.
WEIGHTED_FUNCTIONS = {'conv1d', 'conv2d', 'linear', 'matmul', 'bmm', 'einsum', 'scaled_dot_product_attention'}

Runs = Dict[str, LayerRun]


@dataclass(frozen=True)
class GraphNetwork(Network):
    """A network found by data flow.

    Args:
        acts: Activation modules outside the chains that stand before a sign.
        reasons: Why layers are kept float, by path.
        image_conv: The convolution that reads the images themselves, if there is one.
        notes: What could not be traced.
    """
    acts: Tuple[str, ...] = ()
    reasons: Tuple[Tuple[str, str], ...] = ()
    image_conv: Optional[str] = None
    notes: Tuple[str, ...] = ()


def trace_network(model: nn.Module, runs: Optional[Runs] = None) -> GraphNetwork:
    """Chains of any network, as torch.fx sees it or its parts. A copy is traced, and no hook runs.

    Args:
        model: The network; it is not changed.
        runs: How its layers ran (`shapes.run_layers`). Without it, linear layers are not looked at, because only the
            shape of its input tells a linear layer on pixels, which is a 1x1 convolution, from one on vectors.
    """
    pieces: List[_Piece] = []
    notes: List[str] = []
    paths = {module: path for path, module in model.named_modules()}
    with undisturbed(model):
        twin = stand_in(model)
        _cut(model, True, True, paths, runs or {}, twin, pieces, notes)
        # Layers that eval mode does not reach (auxiliary heads) are in no graph.
        held = {piece.module(conv) for piece in pieces for conv in piece.convs}
        for module in _without(model, held):
            _cut(module, False, False, paths, runs or {}, twin, pieces, notes)
    chains: List[Chain] = []
    reasons: Dict[str, str] = {}
    loose: List[str] = []
    for piece in pieces:
        piece.read(chains, reasons, loose)
    found = FoundBlock('', Block(tuple(chains)), tuple(chains))
    return GraphNetwork(
        '', (found,), tuple(loose), tuple(reasons.items()), pieces[0].image_conv() if pieces else None, tuple(notes))


def _cut(
        module: nn.Module,
        images: Optional[bool],
        ends: bool,
        paths: Dict[nn.Module, str],
        runs: Runs,
        twin: nn.Module,
        pieces: List['_Piece'],
        notes: List[str],
) -> None:
    """Add the pieces of a module: itself where it can be traced, what it is made of where not.

    Args:
        module: The module.
        images: Its inputs are the images themselves; None if that is not known.
        ends: Its output is the model's.
        paths: Path of each module in the model.
        runs: How layers ran.
        twin: The copy of the model that is traced.
        pieces, notes: Filled.
    """
    if not any(_is_candidate(m, runs.get(paths[m])) for m in module.modules()):
        return
    piece = reason = None
    opaque = _opaque(module)
    # Modules that timm asks not to trace are tried all the same, and left whole only where that fails.
    notrace = set(get_notrace_modules())
    for leaves in (notrace - opaque, notrace) if opaque else (notrace,):
        try:
            piece = _Piece(module, images, ends, paths, runs, twin, leaves)
            break
        except Exception as e:  # whatever a foreign forward raises under tracing
            reason = f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}'
    if piece is not None:
        pieces.append(piece)
        for node, inner in piece.opaque.items():
            reads, final = images and piece.reads_input(node.all_input_nodes), ends and piece.reaches_output(node)
            _cut(inner, reads, final, paths, runs, twin, pieces, notes)
        return
    notes.append(
        f'torch.fx cannot trace {paths[module] or "the model"} ({type(module).__name__}, {reason}): '
        f'it is taken by its module structure, each part by itself')
    for child in module.children():
        _cut(child, None if images is not False else False, False, paths, runs, twin, pieces, notes)


def _opaque(module: nn.Module) -> Set[type]:
    """Classes that timm asks not to trace and that hold layers here."""
    notrace = tuple(get_notrace_modules())
    return {
        type(m) for m in module.modules() if m is not module and isinstance(m, notrace)
        and not isinstance(m, nn.Conv2d) and any(_is_layer(n) for n in m.modules())}


def _without(module: nn.Module, held: Set[nn.Module]) -> Iterator[nn.Module]:
    """The largest submodules with convolutions and without any layer in `held`."""
    inside = set(module.modules())
    if any(isinstance(m, nn.Conv2d) for m in inside - held):
        if inside & held:
            for child in module.children():
                yield from _without(child, held)
        else:
            yield module


def _name(node: fx.Node) -> str:
    return getattr(node.target, '__name__', str(node.target))


class _Piece:
    """Reads one traced graph."""

    def __init__(
            self,
            module: nn.Module,
            images: Optional[bool],
            ends: bool,
            paths: Dict[nn.Module, str],
            runs: Runs,
            twin: nn.Module,
            notrace: Iterable[type],
    ) -> None:
        acts = tuple({type(m) for m in module.modules() if is_activation(m)})
        norms = tuple({type(m) for m in module.modules() if _is_norm(m)})
        tracer = NodePathTracer(
            leaf_modules=[*notrace, nn.Conv2d, *norms, *acts, DropPath, DropBlock2d],
            autowrap_functions=get_notrace_functions(), param_shapes_constant=True)
        traced = twin.get_submodule(paths[module])
        # A layer by itself is its own piece: its forward would be traced through.
        graph = tracer.trace((nn.Sequential(traced) if _is_layer(module) else traced).eval())
        self.images, self.ends, self.paths, self.runs = images, ends, paths, runs
        self.nodes = list(graph.nodes)
        self.modules = {'0': module} if _is_layer(module) else dict(module.named_modules(remove_duplicate=False))
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.uses: Dict[str, int] = {}
        for node in self.nodes:
            if node.op == 'call_module':
                self.uses[node.target] = self.uses.get(node.target, 0) + 1
        self.convs = [n for n in self.nodes if self.is_candidate(n)]
        self.opaque = {
            n: self.module(n) for n in self.nodes if n.op == 'call_module' and not _is_layer(self.module(n))
            and not type(self.module(n)).__module__.startswith('torch.nn.')
            and any(_is_layer(m) for m in self.module(n).modules())}

    def full(self, node: fx.Node) -> str:
        """A node's path in the model."""
        return self.paths[self.module(node)]

    def module(self, node: Any) -> Optional[nn.Module]:
        if isinstance(node, fx.Node) and node.op == 'call_module':
            return self.modules.get(node.target)
        return None

    def is_candidate(self, node: fx.Node) -> bool:
        module = self.module(node)
        return _is_layer(module) and _is_candidate(module, self.runs.get(self.full(node)))

    def read(self, chains: List[Chain], reasons: Dict[str, str], loose: List[str]) -> None:
        """Add what the graph says."""
        paired = {conv: self.pair(conv) for conv in self.convs}
        kept = {conv: reason for conv, (norm, _) in paired.items() if (reason := self.why_kept(conv, norm))}
        reasons.update({self.full(conv): reason for conv, reason in kept.items()})
        binary = [conv for conv in self.convs if conv not in kept]
        dropped = self.acts_before([conv.args[0] for conv in binary] + [
            x for node in self.opaque for x in node.all_input_nodes])
        in_chains: Set[str] = set()
        for conv, (norm, act) in paired.items():
            if act is not None and (act.target not in dropped or (norm is None and conv in kept)):
                act = None
            in_chains.update(node.target for node in (norm, act) if node is not None)
            chains.append(Chain(
                self.full(conv), norm and self.full(norm), act and self.full(act),
                no_link=self.why_no_link(conv, norm, binary, dropped),
                shift=conv in binary and self.non_negative(conv.args[0], dropped)))
        loose += [self.paths[self.modules[path]] for path in sorted(dropped) if path not in in_chains]

    def image_conv(self) -> Optional[str]:
        return next((self.full(conv) for conv in self.convs if isinstance(self.module(conv), nn.Conv2d)
                     and self.images and conv.args[0].op == 'placeholder'), None)

    # -------------------------------------------------------------------------------------------------------- pairing

    def follower(self, node: fx.Node) -> Optional[fx.Node]:
        """The only reader of a node, Identity passed over."""
        while len(node.users) == 1:
            node = next(iter(node.users))
            if not isinstance(self.module(node), nn.Identity):
                return node
        return None

    def pair(self, conv: fx.Node) -> Tuple[Optional[fx.Node], Optional[fx.Node]]:
        """Norm and activation that alone read the convolution."""
        norm = self.follower(conv)
        if norm is None or not _is_norm(self.module(norm)):
            # Without a norm the activation may follow by itself.
            act = norm if norm is not None and is_activation(self.module(norm)) else None
            return None, act if act is not None and self.uses[act.target] == 1 else None
        if self.uses[norm.target] > 1:
            return None, None
        act = norm if _fused_act(self.module(norm)) is not None else self.follower(norm)
        if act is not norm and (act is None or not is_activation(self.module(act)) or self.uses[act.target] > 1):
            act = None
        return norm, act

    # -------------------------------------------------------------------------------------------------- kept float: why

    def why_kept(self, conv: fx.Node, norm: Optional[fx.Node]) -> Optional[str]:
        run = self.runs.get(self.full(conv))
        if self.uses[conv.target] > 1 or (run is not None and run.calls > 1):
            return 'it runs more than once'
        if self.reads_images(conv, run):
            return 'first convolution'
        if self.after_global_pool(conv, run):
            return 'classifier' if self.ends and self.reaches_output(conv, head=True) else 'squeeze-excite'
        if norm is None and self.ends and self.reaches_output(conv):
            return 'classifier'
        if self.is_downsample(conv, norm):
            return 'residual downsample'
        return None

    def reads_images(self, conv: fx.Node, run: Optional[LayerRun]) -> bool:
        """Nothing with weights stands between the images and this layer."""
        if self.images is False or not self.reads_input([conv.args[0]]):
            return False
        if self.images:
            return True
        if run is not None:
            return run.input == next(iter(self.runs.values())).input
        first = next(module for module in self.paths if isinstance(module, nn.Conv2d))
        module = self.module(conv)
        return isinstance(module, nn.Conv2d) and module.in_channels == first.in_channels

    def reads_input(self, starts: Iterable[Any]) -> bool:
        """Some input of the graph comes to one of these nodes without passing a weight."""
        def onward(node: fx.Node) -> List[fx.Node]:
            module = self.module(node)
            if module is not None:
                through = is_activation(module) or _is_norm(module) or not any(True for _ in module.parameters())
            else:
                through = _name(node) not in WEIGHTED_FUNCTIONS
            return node.all_input_nodes if through else []

        return any(node.op == 'placeholder' for start in starts for node in self.walk_back(start, onward))

    def walk_back(
            self, start: Any, onward: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
        """All nodes from `start` backwards, each once, going on to the inputs that `onward` names, shapes left out."""
        stack, seen = [start], set()
        while stack:
            node = stack.pop()
            if isinstance(node, fx.Node) and node not in seen and _name(node) not in ('getattr', 'size', 'dim'):
                seen.add(node)
                yield node
                stack.extend(onward(node))

    def passes(self, node: fx.Node) -> bool:
        if node.op == 'call_module':
            return isinstance(self.module(node), PASS_MODULES)
        if node.op == 'call_function':
            return node.target in PASS_FUNCTIONS or _name(node) == 'getitem'
        return node.op == 'call_method' and node.target in PASS_METHODS

    def after_global_pool(self, conv: fx.Node, run: Optional[LayerRun]) -> bool:
        """The input has been averaged over the image, perhaps through other small convolutions."""
        if run is not None and run.input[1 if isinstance(self.module(conv), nn.Linear) else 2:][:2] != (1, 1):
            return False

        def onward(node: fx.Node) -> List[fx.Node]:
            module = self.module(node)
            small = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and max(module.kernel_size) == 1)
            through = self.carries(node) or is_activation(module) or _is_norm(module) or small
            return node.all_input_nodes if through else []

        return any(
            self.averages(node) for start in conv.all_input_nodes for node in self.walk_back(start, onward))

    def averages(self, node: fx.Node) -> bool:
        """A mean, or an adaptive pooling down to one value."""
        module = self.module(node)
        if module is not None:
            return 'Adaptive' in type(module).__name__ and getattr(module, 'output_size', 1) in (1, (1, 1))
        return _name(node) == 'mean' or (
            _name(node) == 'adaptive_avg_pool2d' and (*node.args[1:], *node.kwargs.values())[0] in (1, (1, 1)))

    def reaches_output(self, node: fx.Node, head: bool = False) -> bool:
        """Its output becomes the graph's without another weight, or only through the linear layers of a head."""
        while len(node.users) == 1:
            node = next(iter(node.users))
            if node.op == 'output':
                return True
            module = self.module(node)
            layers = head and (_is_layer(module) or _is_norm(module))
            if not (self.passes(node) or is_activation(module) or 'Pool' in type(module).__name__ or layers):
                return False
        return False

    def is_downsample(self, conv: fx.Node, norm: Optional[fx.Node]) -> bool:
        """A convolution alone on one side of an addition, with others on the other side."""
        module = self.module(conv)
        if isinstance(module, nn.Linear) or (max(module.kernel_size) > 1 and max(module.stride) == 1):
            return False
        end = norm if norm is not None else conv
        addition = self.follower_through(end)
        if addition is None or not _is_addition(addition):
            return False
        start = self.skip_back(conv.args[0])
        others = [n for n in addition.all_input_nodes if self.skip_back(n) is not end]
        return bool(others) and all(self.convs_between(start, other) >= 2 for other in others)

    def follower_through(self, node: fx.Node) -> Optional[fx.Node]:
        follower = self.follower(node)
        while follower is not None and (self.passes(follower) or self.scales(follower)):
            follower = self.follower(follower)
        return follower

    def skip_back(self, node: Any) -> Any:
        """The node before those that pass a signal on along one input."""
        while isinstance(node, fx.Node) and self.passes(node) and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return node

    def convs_between(self, start: fx.Node, end: fx.Node) -> int:
        """Convolutions on the way back from `end` to `start`, 0 if it does not lead there."""
        best, stack = 0, [(end, 0)]
        while stack:
            node, count = stack.pop()
            if node is start:
                best = max(best, count)
            elif self.order[node] > self.order[start] and count < 8 and len(stack) < 64:
                count += _is_layer(self.module(node))
                stack.extend((n, count) for n in node.all_input_nodes)
        return best

    # -------------------------------------------------------------------------------------------- activations and signs

    def acts_before(self, starts: Iterable[Any]) -> Set[str]:
        """Activation modules (or fused norms) whose output reaches a sign through nodes that keep it non-negative."""
        def onward(node: fx.Node) -> List[fx.Node]:
            module = self.module(node)
            through = self.carries(node) or is_activation(module) or _is_norm(module)
            return self.signals(node) if through and not self.is_product(node) else []

        return {
            node.target for start in starts for node in self.walk_back(start, onward)
            if is_activation(self.module(node)) and not self.is_gate(node)
            or _fused_act(self.module(node)) is not None}

    def scales(self, node: fx.Node) -> bool:
        """A product with a number."""
        return _name(node) == 'mul' and len(node.all_input_nodes) == 1

    def carries(self, node: fx.Node) -> bool:
        """The node's values come from its inputs without weights: passed on, added, joined or gated."""
        return self.passes(node) or _is_addition(node) or _name(node) in ('cat', 'getitem', 'mul')

    def signals(self, node: fx.Node) -> List[fx.Node]:
        """Inputs of a node; of a product, those that are neither its gate nor a parameter."""
        if _name(node) != 'mul':
            return list(node.all_input_nodes)
        return [n for n in node.all_input_nodes if not self.is_gate(n) and self.skip_back(n).op != 'get_attr']

    def is_gate(self, node: fx.Node) -> bool:
        """The output of a sigmoid or softmax, which scales another signal."""
        while self.passes(node) and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        name = type(self.module(node)).__name__ if node.op == 'call_module' else _name(node)
        return any(gate in name.lower() for gate in GATES)  # timm has classes of its own for them

    def is_product(self, node: Optional[fx.Node]) -> bool:
        """A product of two signals."""
        return node is not None and _name(node) == 'mul' and len(self.signals(node)) > 1

    def is_factor(self, conv: fx.Node, norm: Optional[fx.Node]) -> bool:
        """The output goes into a product of two signals, which would grow without bound if links carried them there."""
        node = self.follower_through(norm if norm is not None else conv)
        while node is not None and is_activation(self.module(node)):
            node = self.follower_through(node)
        return self.is_product(node)

    def non_negative(self, node: Any, dropped: Set[str], depth: int = 0) -> bool:
        """True if a node cannot be negative once the activations in `dropped` are gone."""
        if not isinstance(node, fx.Node) or depth > 200:
            return False
        module = self.module(node)
        act = _fused_act(module) if _is_norm(module) else module
        if node.op == 'call_module' and node.target not in dropped and isinstance(act, NON_NEGATIVE):
            return True
        if node.op == 'call_function' and node.target in NON_NEGATIVE_FUNCTIONS:
            return True
        if node.op == 'call_method' and node.target in ('relu', 'relu_', 'sigmoid'):
            return True
        dropped_act = node.op == 'call_module' and node.target in dropped and is_activation(module)
        if self.carries(node) or dropped_act:
            inputs = node.all_input_nodes
            return bool(inputs) and all(self.non_negative(n, dropped, depth + 1) for n in inputs)
        return False

    def why_no_link(
            self, conv: fx.Node, norm: Optional[fx.Node], binary: List[fx.Node], dropped: Set[str]) -> str:
        if self.repeats_shortcut(conv, norm, binary, dropped):
            return 'the shortcut of the host carries the same'
        return 'its output is a factor of a product' if self.is_factor(conv, norm) else ''

    def repeats_shortcut(
            self, conv: fx.Node, norm: Optional[fx.Node], binary: List[fx.Node], dropped: Set[str]) -> bool:
        """The links up to this one carry x unchanged to an addition that adds x itself: one copy is enough."""
        if conv not in binary:
            return False
        addition = self.follower_through(norm if norm is not None else conv)
        while addition is not None and addition.op == 'call_module' and addition.target in dropped:
            addition = self.follower_through(addition)
        if addition is None or not _is_addition(addition):
            return False
        seen = set()
        node = conv
        while True:
            module = self.module(node)
            if isinstance(module, nn.Linear):
                same = module.in_features == module.out_features
            else:
                same = module.in_channels == module.out_channels and max(module.stride) == 1
            if not same:
                return False
            start = node.args[0]
            while isinstance(start, fx.Node):
                seen.add(start)
                signals = self.signals(start)
                if len(signals) != 1 or not (
                        self.passes(start) or _name(start) == 'mul' or _is_norm(self.module(start))
                        or start.op == 'call_module' and start.target in dropped):
                    break
                start = signals[0]
            if any(self.repeated(other, seen, conv, binary) for other in self.terms(addition)):
                return True
            if start not in binary:
                return False
            node = start

    def terms(self, addition: fx.Node) -> Iterator[fx.Node]:
        """All that is summed up where an addition takes part."""
        while (follower := self.follower(addition)) is not None and _is_addition(follower):
            addition = follower
        stack = [addition]
        while stack:
            for node in stack.pop().all_input_nodes:
                if _is_addition(node) and len(node.users) == 1:
                    stack.append(node)
                yield node

    def repeated(self, term: fx.Node, seen: Set[fx.Node], conv: fx.Node, binary: List[fx.Node]) -> bool:
        """A term of a sum is x itself, a norm of it, or a parallel convolution before this one, which has a link."""
        if term in seen:
            return True
        end = self.skip_back(term)
        if _is_norm(self.module(end)):
            end = end.args[0]
            if end in seen:
                return True
        return end in binary and end is not conv and self.order[end] < self.order[conv] and end.args[0] in seen


def _is_layer(module: Optional[nn.Module]) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear))


def _is_candidate(module: nn.Module, run: Optional[LayerRun]) -> bool:
    """A convolution, or a linear layer on pixels (N, H, W, C), which is a 1x1 convolution."""
    if isinstance(module, nn.Linear):
        return run is not None and len(run.input) == 4
    return isinstance(module, nn.Conv2d)


def _is_norm(module: Optional[nn.Module]) -> bool:
    return isinstance(module, NORMS) or (module is not None and hasattr(module, 'running_mean'))


def _fused_act(module: Optional[nn.Module]) -> Optional[nn.Module]:
    """The activation inside a norm of timm."""
    act = getattr(module, 'act', None) if _is_norm(module) else None
    return act if isinstance(act, nn.Module) and not isinstance(act, nn.Identity) else None


def _is_addition(node: fx.Node) -> bool:
    return node.op in ('call_function', 'call_method') and _name(node) in ADDITIONS
