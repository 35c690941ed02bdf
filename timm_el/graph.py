"""Find chains by data flow: torch.fx for networks that the table of known blocks does not hold.

Nothing rests on names or on the order of registration. torch.fx patches torch.nn globally while it traces, so do not
convert in one thread while another runs a model; the registered models are not traced.
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

from .blocks import Block, Chain, FoundBlock, Network, is_activation

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
ADDITIONS = {'add', 'iadd', 'add_'}


@dataclass(frozen=True)
class GraphNetwork(Network):
    """A network found by data flow.

    Args:
        acts: Activation modules outside the chains that stand before a sign.
        reasons: Why convolutions are kept float, by path.
        image_conv: The convolution that reads the images themselves, if there is one.
    """
    acts: Tuple[str, ...] = ()
    reasons: Tuple[Tuple[str, str], ...] = ()
    image_conv: Optional[str] = None


def trace_network(model: nn.Module) -> GraphNetwork:
    """Chains of any network that torch.fx can trace.

    Raises:
        Exception: Whatever torch.fx raises where it cannot trace.
    """
    return _Finder(model).network()


def _name(node: fx.Node) -> str:
    return getattr(node.target, '__name__', str(node.target))


class _Finder:
    """Reads one traced graph."""

    def __init__(self, model: nn.Module) -> None:
        acts = tuple({type(m) for m in model.modules() if is_activation(m)})
        norms = tuple({type(m) for m in model.modules() if _is_norm(m)})
        tracer = NodePathTracer(
            leaf_modules=[*get_notrace_modules(), nn.Conv2d, *norms, *acts, DropPath, DropBlock2d],
            autowrap_functions=get_notrace_functions(), param_shapes_constant=True)
        mode = model.training
        try:
            graph = tracer.trace(model.eval())
        finally:
            model.train(mode)
        self.nodes = list(graph.nodes)
        self.modules = dict(model.named_modules())
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.uses: Dict[str, int] = {}
        for node in self.nodes:
            if node.op == 'call_module':
                self.uses[node.target] = self.uses.get(node.target, 0) + 1
        self.convs = [n for n in self.nodes if isinstance(self.module(n), nn.Conv2d)]

    def module(self, node: Any) -> Optional[nn.Module]:
        if isinstance(node, fx.Node) and node.op == 'call_module':
            return self.modules.get(node.target)
        return None

    def network(self) -> GraphNetwork:
        chains, reasons = [], {}
        paired = {conv: self.pair(conv) for conv in self.convs}
        for conv, (norm, _) in paired.items():
            reason = self.why_kept(conv, norm)
            if reason:
                reasons[conv.target] = reason
        binary = [conv for conv in self.convs if conv.target not in reasons]
        dropped = self.acts_before(binary)
        in_chains: Set[str] = set()
        for conv, (norm, act) in paired.items():
            act_path = act.target if act is not None and act.target in dropped else None
            in_chains.update(path for path in (norm.target if norm is not None else None, act_path) if path)
            chains.append(Chain(
                conv.target, norm.target if norm is not None else None, act_path,
                link=not self.repeats_shortcut(conv, norm, binary, dropped),
                shift=conv in binary and self.non_negative(conv.args[0], dropped)))
        loose = tuple(path for path in sorted(dropped) if path not in in_chains)
        found = FoundBlock('', Block(tuple(chains)), tuple(chains))
        image_conv = next((conv.target for conv in self.convs if conv.args[0].op == 'placeholder'), None)
        return GraphNetwork('', (found,), loose, tuple(reasons.items()), image_conv)

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
        if norm is None or not _is_norm(self.module(norm)) or self.uses[norm.target] > 1:
            return None, None
        act = norm if _fused_act(self.module(norm)) is not None else self.follower(norm)
        if act is not norm and (act is None or not is_activation(self.module(act)) or self.uses[act.target] > 1):
            act = None
        return norm, act

    # -------------------------------------------------------------------------------------------------- kept float: why

    def why_kept(self, conv: fx.Node, norm: Optional[fx.Node]) -> Optional[str]:
        module = self.module(conv)
        if type(module) is not nn.Conv2d:
            return f'{type(module).__name__} has a forward of its own'
        if self.uses[conv.target] > 1:
            return 'it runs more than once'
        if any(source.op == 'placeholder' for source in self.sources(conv.args[0])):
            return 'first convolution'
        if self.after_global_pool(conv):
            return 'squeeze-excite'
        if norm is None and self.reaches_output(conv):
            return 'classifier'
        if self.is_downsample(conv, norm):
            return 'residual downsample'
        return None

    def walk_back(
            self, start: Any, onward: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
        """All nodes from `start` backwards, each once, going on to the inputs that `onward` names."""
        stack, seen = [start], set()
        while stack:
            node = stack.pop()
            if isinstance(node, fx.Node) and node not in seen:
                seen.add(node)
                yield node
                stack.extend(onward(node))

    def sources(self, start: Any) -> Iterator[fx.Node]:
        """Nodes behind those that only pass a signal on, norms and activations included."""
        def onward(node: fx.Node) -> List[fx.Node]:
            module = self.module(node)
            weightless = is_activation(module) or _is_norm(module)
            through = weightless or self.passes(node) or _name(node) in ('cat', 'getitem')
            return node.all_input_nodes if through else []

        return (node for node in self.walk_back(start, onward) if not onward(node))

    def passes(self, node: fx.Node) -> bool:
        if node.op == 'call_module':
            return isinstance(self.module(node), PASS_MODULES)
        if node.op == 'call_function':
            return node.target in PASS_FUNCTIONS or _name(node) == 'getitem'
        return node.op == 'call_method' and node.target in PASS_METHODS

    def after_global_pool(self, conv: fx.Node) -> bool:
        """The input has been averaged over the image, perhaps through other small convolutions."""
        stack, seen = list(conv.all_input_nodes), set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            module = self.module(node)
            if 'Adaptive' in type(module).__name__ or _name(node) in ('mean', 'adaptive_avg_pool2d'):
                return True
            if self.passes(node) or is_activation(module) or _is_norm(module) or (
                    isinstance(module, nn.Conv2d) and max(module.kernel_size) == 1):
                stack.extend(node.all_input_nodes)
        return False

    def reaches_output(self, conv: fx.Node) -> bool:
        """Its output becomes the network's without another weight."""
        node: Optional[fx.Node] = conv
        while node is not None and len(node.users) == 1:
            node = next(iter(node.users))
            if node.op == 'output':
                return True
            module = self.module(node)
            if not (self.passes(node) or is_activation(module) or 'Pool' in type(module).__name__):
                return False
        return False

    def is_downsample(self, conv: fx.Node, norm: Optional[fx.Node]) -> bool:
        """A convolution alone on one side of an addition, with others on the other side."""
        if max(self.module(conv).kernel_size) > 1 and max(self.module(conv).stride) == 1:
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
                count += isinstance(self.module(node), nn.Conv2d)
                stack.extend((n, count) for n in node.all_input_nodes)
        return best

    # -------------------------------------------------------------------------------------------- activations and signs

    def acts_before(self, binary: List[fx.Node]) -> Set[str]:
        """Activation modules (or fused norms) whose output reaches a sign through nodes that keep it non-negative."""
        def onward(node: fx.Node) -> List[fx.Node]:
            module = self.module(node)
            through = self.carries(node) or is_activation(module) or _is_norm(module)
            return self.signals(node) if through else []

        return {
            node.target for conv in binary for node in self.walk_back(conv.args[0], onward)
            if is_activation(self.module(node)) or _fused_act(self.module(node)) is not None}

    def scales(self, node: fx.Node) -> bool:
        """A product with a number."""
        return _name(node) == 'mul' and len(node.all_input_nodes) == 1

    def carries(self, node: fx.Node) -> bool:
        """The node's values come from its inputs without weights: passed on, added, joined or gated."""
        return self.passes(node) or _is_addition(node) or _name(node) in ('cat', 'getitem', 'mul')

    def signals(self, node: fx.Node) -> List[fx.Node]:
        """Inputs of a node; of a product, those that are not its gate."""
        if _name(node) != 'mul':
            return list(node.all_input_nodes)
        return [n for n in node.all_input_nodes if not self.is_gate(n)]

    def is_gate(self, node: fx.Node) -> bool:
        """The output of a sigmoid or softmax, which scales another signal."""
        while self.passes(node) and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        name = type(self.module(node)).__name__ if node.op == 'call_module' else _name(node)
        return 'sigmoid' in name.lower() or 'softmax' in name.lower()  # timm has classes of its own for them

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
            if module.in_channels != module.out_channels or max(module.stride) > 1:
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


def _is_norm(module: Optional[nn.Module]) -> bool:
    return isinstance(module, NORMS) or (module is not None and hasattr(module, 'running_mean'))


def _fused_act(module: Optional[nn.Module]) -> Optional[nn.Module]:
    """The activation inside a norm of timm."""
    act = getattr(module, 'act', None) if _is_norm(module) else None
    return act if isinstance(act, nn.Module) and not isinstance(act, nn.Identity) else None


def _is_addition(node: fx.Node) -> bool:
    return node.op in ('call_function', 'call_method') and _name(node) in ADDITIONS
