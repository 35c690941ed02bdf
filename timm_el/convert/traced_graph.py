"""Traced graphs: a network as torch.fx sees it, and the moves in it.

A network that fx cannot trace as a whole falls into parts along the module structure, each traced by itself: then the
data flow inside the parts is known, and that between them is not. torch.fx patches torch.nn globally while it traces,
so do not convert in one thread while another runs a model; the registered models are not traced.
"""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropBlock2d, DropPath
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import NodePathTracer

from ..dry_run import LayerRun, stand_in, undisturbed
from ..kinds import is_act, is_norm, is_pass_through

PASS_FUNCTIONS = {
    F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.interpolate, F.pad, torch.flatten, torch.chunk,
    torch.split, torch.transpose, torch.permute, torch.mean}
PASS_METHODS = {
    'chunk', 'split', 'view', 'reshape', 'transpose', 'permute', 'contiguous', 'flatten', 'mean', 'narrow', 'unsqueeze',
    'squeeze', 'expand', 'expand_as', 'clone', 'unflatten'}
GATES = ('sigmoid', 'softmax')
ADDITIONS = {'add', 'iadd', 'add_'}
ABOUT_SHAPES = ('getattr', 'size', 'dim')

Runs = dict[str, LayerRun]


@dataclass(frozen=True)
class Untraceable:
    """A module that torch.fx cannot trace.

    Args:
        path: In the model; '' is the model itself.
        kind: Its class.
        error: What was raised.
    """
    path: str
    kind: str
    error: str


def is_layer(module: nn.Module | None) -> bool:
    """Return whether a module is a two-dimensional convolution or a linear layer."""
    return isinstance(module, (nn.Conv2d, nn.Linear))


def name_of(node: fx.Node) -> str:
    """Return the name of what a node calls: a function, a method, or the path of a module."""
    return getattr(node.target, '__name__', str(node.target))


@dataclass(frozen=True)
class Part:
    """A module of the model that is traced by itself.

    Args:
        module: The module.
        reads_images: Its inputs are the images themselves; None if that is not known.
        is_end: Its output is the model's.
    """
    module: nn.Module
    reads_images: bool | None
    is_end: bool


class TracedGraph:
    """One traced graph, and the moves in it that rules about convolutions need.

    Args:
        graph: Graph that fx has traced.
        modules: Modules of the model by the names that the graph has for them.
        paths: Path of each module in the model.
        runs: Runs of layers by path.
        part: The module that was traced.
    """

    def __init__(
            self, graph: fx.Graph, modules: dict[str, nn.Module], paths: dict[nn.Module, str], runs: Runs, part: Part,
    ) -> None:
        self.nodes = list(graph.nodes)
        self.modules, self.paths, self.runs = modules, paths, runs
        self.reads_images, self.is_end = part.reads_images, part.is_end
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.uses: dict[str, int] = {}
        for node in self.nodes:
            if node.op == 'call_module':
                self.uses[node.target] = self.uses.get(node.target, 0) + 1
        self.convs = [n for n in self.nodes if is_candidate(self.module(n), self.run(n))]
        self.opaque = {
            n: self.module(n) for n in self.nodes if n.op == 'call_module' and not is_layer(self.module(n))
            and not type(self.module(n)).__module__.startswith('torch.nn.')
            and any(is_layer(m) for m in self.module(n).modules())}

    # one node

    def module(self, node: Any) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        return self.modules.get(node.target) if isinstance(node, fx.Node) and node.op == 'call_module' else None

    def path(self, node: fx.Node) -> str:
        """Return the path in the model of the module that a node calls."""
        return self.paths[self.module(node)]

    def run(self, node: fx.Node) -> LayerRun | None:
        """Return how the layer of a node ran, or None if that is not known."""
        module = self.module(node)
        return None if module is None else self.runs.get(self.paths.get(module))

    def passes(self, node: fx.Node) -> bool:
        """Return whether a node passes a signal on: it mixes no values of different sign."""
        if node.op == 'call_module':
            return is_pass_through(self.module(node))
        if node.op == 'call_function':
            return node.target in PASS_FUNCTIONS or name_of(node) == 'getitem'
        return node.op == 'call_method' and node.target in PASS_METHODS

    def carries(self, node: fx.Node) -> bool:
        """Return whether a node's values come from its inputs without weights: passed on, added, joined or gated."""
        return self.passes(node) or is_addition(node) or name_of(node) in ('cat', 'getitem', 'mul')

    def is_gate(self, node: fx.Node) -> bool:
        """Return whether a node is the output of a sigmoid or softmax, which scales another signal."""
        while self.passes(node) and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        name = type(self.module(node)).__name__ if node.op == 'call_module' else name_of(node)
        return any(gate in name.lower() for gate in GATES)  # timm has classes of its own for them

    def is_product(self, node: fx.Node | None) -> bool:
        """Return whether a node multiplies two signals."""
        return node is not None and name_of(node) == 'mul' and len(self.signals(node)) > 1

    def signals(self, node: fx.Node) -> list[fx.Node]:
        """Return the inputs of a node; of a product, those that are neither its gate nor a parameter."""
        if name_of(node) != 'mul':
            return list(node.all_input_nodes)
        return [n for n in node.all_input_nodes if not self.is_gate(n) and self.skip_back(n).op != 'get_attr']

    # forwards, backwards

    def follower(self, node: fx.Node) -> fx.Node | None:
        """Return the only reader of a node, modules that do nothing passed over; None if there are several."""
        while len(node.users) == 1:
            node = next(iter(node.users))
            if not isinstance(self.module(node), nn.Identity):
                return node
        return None

    def follower_through(self, node: fx.Node) -> fx.Node | None:
        """Return the next reader that does more than pass the signal on or scale it by a number, or None."""
        follower = self.follower(node)
        while follower is not None and (
                self.passes(follower) or name_of(follower) == 'mul' and len(follower.all_input_nodes) == 1):
            follower = self.follower(follower)
        return follower

    def walk_back(self, start: Any, onward: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
        """Yield all nodes from `start` backwards, each once, going on to the inputs that `onward` names.

        Nodes about shapes are left out.
        """
        stack, seen = [start], set()
        while stack:
            node = stack.pop()
            if isinstance(node, fx.Node) and node not in seen and name_of(node) not in ABOUT_SHAPES:
                seen.add(node)
                yield node
                stack.extend(onward(node))

    def skip_back(self, node: Any) -> Any:
        """Return the node before those that pass a signal on along one input."""
        while isinstance(node, fx.Node) and self.passes(node) and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return node

    def terms(self, addition: fx.Node) -> Iterator[fx.Node]:
        """Yield the terms of the sum that an addition is part of."""
        while (follower := self.follower(addition)) is not None and is_addition(follower):
            addition = follower
        stack = [addition]
        while stack:
            for node in stack.pop().all_input_nodes:
                if is_addition(node) and len(node.users) == 1:
                    stack.append(node)
                yield node

    def convs_between(self, start: fx.Node, end: fx.Node) -> int:
        """Return the number of layers on the longest way from `start` to `end`, 0 if there is none."""
        counts = {start: 0}
        for node in self.nodes[self.order[start] + 1:self.order[end] + 1]:
            reached = [counts[n] for n in node.all_input_nodes if n in counts]
            if reached:
                counts[node] = max(reached) + is_layer(self.module(node))
        return counts.get(end, 0)

    def reads_input(self, starts: Iterable[Any], through: Callable[[fx.Node], bool]) -> bool:
        """Return whether some input of the graph comes to one of `starts` by way of nodes for which `through` holds."""
        def onward(node: fx.Node) -> list[fx.Node]:
            return node.all_input_nodes if through(node) else []

        return any(node.op == 'placeholder' for start in starts for node in self.walk_back(start, onward))

    def reaches_output(self, node: fx.Node, through: Callable[[nn.Module | None], bool] = lambda _: False) -> bool:
        """Return whether a node's output becomes the graph's with nothing but pools and activations between.

        Args:
            node: The node.
            through: Other modules that may stand between.
        """
        while len(node.users) == 1:
            node = next(iter(node.users))
            if node.op == 'output':
                return True
            module = self.module(node)
            if not (self.passes(node) or is_act(module) or 'Pool' in type(module).__name__ or through(module)):
                return False
        return False


def is_addition(node: fx.Node) -> bool:
    """Return whether a node adds."""
    return node.op in ('call_function', 'call_method') and name_of(node) in ADDITIONS


def is_candidate(module: nn.Module | None, run: LayerRun | None) -> bool:
    """Return whether a layer may be binarized: a convolution, or a linear layer on pixels (N, H, W, C), a 1x1 one."""
    if isinstance(module, nn.Linear):
        return run is not None and len(run.input) == 4
    return isinstance(module, nn.Conv2d)


# ---------------------------------------------------------------------------------------------------------------------
# Tracing


def trace(model: nn.Module, runs: Runs) -> tuple[list[TracedGraph], list[Untraceable]]:
    """Return the graphs of a network, or of its parts, and the modules that could not be traced.

    A copy is traced, and no hook runs: a hook of the user's must not see fx's proxies.

    Args:
        model: The network; it is not changed.
        runs: Runs of its layers (`dry_run.run_layers`). Only the shape of its input tells a linear layer on pixels from
            one on vectors.
    """
    with undisturbed(model):
        tracing = _Tracing(stand_in(model), {module: path for path, module in model.named_modules()}, runs)
        tracing.trace_part(Part(model, True, True))
        # Layers that eval mode does not reach (auxiliary heads) are in no graph.
        held = {graph.module(conv) for graph in tracing.graphs for conv in graph.convs}
        for module in _without(model, held):
            tracing.trace_part(Part(module, False, False))
    return tracing.graphs, tracing.failures


class _Tracing:
    """Tracing of a network: a module that cannot be traced as a whole is traced part by part.

    Args:
        twin: A copy of the network, which is traced in its place.
        paths: Path of each module in the network.
        runs: Runs of its layers by path.
    """

    def __init__(self, twin: nn.Module, paths: dict[nn.Module, str], runs: Runs) -> None:
        self.twin, self.paths, self.runs = twin, paths, runs
        self.graphs: list[TracedGraph] = []
        self.failures: list[Untraceable] = []

    def trace_part(self, part: Part) -> None:
        """Add the graph of a part where it can be traced, and those of its own parts where not."""
        if not any(is_candidate(m, self.runs.get(self.paths[m])) for m in part.module.modules()):
            return
        graph = error = None
        opaque, notrace = _opaque(part.module), set(get_notrace_modules())
        # Modules that timm asks not to trace are tried all the same, and left whole only where that fails.
        for leaves in (notrace - opaque, notrace) if opaque else (notrace,):
            try:
                graph = self._trace_whole(part, leaves)
                break
            except Exception as e:  # whatever a foreign forward raises under tracing
                error = f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}'
        if graph is not None:
            self.graphs.append(graph)
            parts = [
                Part(inner, part.reads_images and graph.reads_input(node.all_input_nodes, weightless(graph)),
                     part.is_end and graph.reaches_output(node))
                for node, inner in graph.opaque.items()]
        else:
            self.failures.append(Untraceable(self.paths[part.module], type(part.module).__name__, error))
            reads_images = None if part.reads_images is not False else False
            parts = [Part(child, reads_images, False) for child in part.module.children()]
        for inner in parts:
            self.trace_part(inner)

    def _trace_whole(self, part: Part, leaves: Iterable[type]) -> TracedGraph:
        """Trace one module, in the copy of the network.

        Raises:
            Exception: Whatever its forward raises under tracing.
        """
        module = part.module
        acts = tuple({type(m) for m in module.modules() if is_act(m)})
        norms = tuple({type(m) for m in module.modules() if is_norm(m)})
        tracer = NodePathTracer(
            leaf_modules=[*leaves, nn.Conv2d, *norms, *acts, DropPath, DropBlock2d],
            autowrap_functions=get_notrace_functions(), param_shapes_constant=True)
        traced = self.twin.get_submodule(self.paths[module])
        # A layer by itself is its own part: its forward would be traced through.
        graph = tracer.trace((nn.Sequential(traced) if is_layer(module) else traced).eval())
        modules = {'0': module} if is_layer(module) else dict(module.named_modules(remove_duplicate=False))
        return TracedGraph(graph, modules, self.paths, self.runs, part)


def weightless(graph: TracedGraph) -> Callable[[fx.Node], bool]:
    """Return a test of nodes: no weight but that of a norm or activation is applied there."""
    weighted = {'conv1d', 'conv2d', 'linear', 'matmul', 'bmm', 'einsum', 'scaled_dot_product_attention'}

    def test(node: fx.Node) -> bool:
        module = graph.module(node)
        if module is None:
            return name_of(node) not in weighted
        return is_act(module) or is_norm(module) or not any(True for _ in module.parameters())

    return test


def _opaque(module: nn.Module) -> set[type]:
    """Return the classes that timm asks not to trace and that hold layers here."""
    notrace = tuple(get_notrace_modules())
    return {
        type(m) for m in module.modules() if m is not module and isinstance(m, notrace)
        and not isinstance(m, nn.Conv2d) and any(is_layer(n) for n in m.modules())}


def _without(module: nn.Module, held: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the largest submodules with convolutions and without any layer in `held`."""
    inside = set(module.modules())
    if any(isinstance(m, nn.Conv2d) for m in inside - held):
        if inside & held:
            for child in module.children():
                yield from _without(child, held)
        else:
            yield module
