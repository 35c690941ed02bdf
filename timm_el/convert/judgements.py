"""Judgements about the layers of a traced graph: which stay float, which activations go, where a link would do harm."""
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F

from ..kinds import fused_act, is_act, is_norm
from .sites import Reason, Why
from .traced_graph import TracedGraph, is_addition, is_layer, name_of, weightless

NON_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Softmax)
NON_NEGATIVE_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, torch.sigmoid, F.sigmoid, F.hardsigmoid, F.softplus, F.softmax}
NON_NEGATIVE_METHODS = ('relu', 'relu_', 'sigmoid')

MaybeNode = fx.Node | None


def norm_and_act_nodes(graph: TracedGraph, conv: fx.Node) -> tuple[MaybeNode, MaybeNode]:
    """Return the norm and the activation that alone read a layer; of a fused norm of timm, the norm twice."""
    norm = graph.follower(conv)
    if norm is None or not is_norm(graph.module(norm)):
        # Without a norm the activation may follow by itself.
        alone = norm is not None and is_act(graph.module(norm)) and graph.uses[norm.target] == 1
        return None, norm if alone else None
    if graph.uses[norm.target] > 1:
        return None, None
    if fused_act(graph.module(norm)) is not None:
        return norm, norm
    act = graph.follower(norm)
    if act is None or not is_act(graph.module(act)) or graph.uses[act.target] > 1:
        act = None
    return norm, act


# ---------------------------------------------------------------------------------------------------------------------
# Which layers stay float. Each rule gives a reason or None.


def runs_twice(graph: TracedGraph, conv: fx.Node, norm: MaybeNode) -> Reason | None:
    """Keep a layer that runs more than once: it has several followers, and one unit cannot hold them."""
    run = graph.run(conv)
    return Reason.TWICE if graph.uses[conv.target] > 1 or run is not None and run.calls > 1 else None


def is_first(graph: TracedGraph, conv: fx.Node, norm: MaybeNode) -> Reason | None:
    """Keep a layer that reads the images, with nothing that has weights between.

        images -> (norm, activation, pool)* -> conv
    """
    if graph.reads_images is False or not graph.reads_input([conv.args[0]], weightless(graph)):
        return None
    if graph.reads_images:
        return Reason.FIRST
    run = graph.run(conv)
    if run is not None:
        return Reason.FIRST if run.input == next(iter(graph.runs.values())).input else None
    first = next(module for module in graph.paths if isinstance(module, nn.Conv2d))
    module = graph.module(conv)
    return Reason.FIRST if isinstance(module, nn.Conv2d) and module.in_channels == first.in_channels else None


def is_on_means(graph: TracedGraph, conv: fx.Node, norm: MaybeNode) -> Reason | None:
    """Keep a layer whose input has been averaged over the image, perhaps through other small layers.

        x -> mean -> (1x1 conv, activation)* -> conv -> output                 classifier
        x -> mean -> (1x1 conv, activation)* -> conv -> sigmoid -> x *         squeeze-excite
    """
    run, linear = graph.run(conv), isinstance(graph.module(conv), nn.Linear)
    if run is not None and run.input[1 if linear else 2:][:2] != (1, 1):
        return None

    def onward(node: fx.Node) -> list[fx.Node]:
        module = graph.module(node)
        small = isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and max(module.kernel_size) == 1
        through = graph.carries(node) or is_act(module) or is_norm(module) or small
        return node.all_input_nodes if through else []

    if not any(_averages(graph, node) for start in conv.all_input_nodes for node in graph.walk_back(start, onward)):
        return None
    is_head = graph.is_end and graph.reaches_output(conv, lambda module: is_layer(module) or is_norm(module))
    return Reason.CLASSIFIER if is_head else Reason.SQUEEZE_EXCITE


def _averages(graph: TracedGraph, node: fx.Node) -> bool:
    """Return whether a node is a mean, or an adaptive pooling down to one value."""
    module = graph.module(node)
    if module is not None:
        return 'Adaptive' in type(module).__name__ and getattr(module, 'output_size', 1) in (1, (1, 1))
    return name_of(node) == 'mean' or (
        name_of(node) == 'adaptive_avg_pool2d' and (*node.args[1:], *node.kwargs.values())[0] in (1, (1, 1)))


def is_last(graph: TracedGraph, conv: fx.Node, norm: MaybeNode) -> Reason | None:
    """Keep a layer without a norm whose output is the model's.

        conv -> (pool, activation)* -> output
    """
    return Reason.CLASSIFIER if norm is None and graph.is_end and graph.reaches_output(conv) else None


def is_downsample(graph: TracedGraph, conv: fx.Node, norm: MaybeNode) -> Reason | None:
    """Keep a layer alone on one side of an addition, with two others or more on the other side.

        x -> conv ----------------> +
        x -> conv -> ... -> conv -> +
    """
    module = graph.module(conv)
    if isinstance(module, nn.Linear) or max(module.kernel_size) > 1 and max(module.stride) == 1:
        return None
    end = norm if norm is not None else conv
    addition = graph.follower_through(end)
    if addition is None or not is_addition(addition):
        return None
    start = graph.skip_back(conv.args[0])
    others = [n for n in addition.all_input_nodes if graph.skip_back(n) is not end]
    alone = others and all(graph.convs_between(start, other) >= 2 for other in others)
    return Reason.DOWNSAMPLE if alone else None


KEEP_RULES = (runs_twice, is_first, is_on_means, is_last, is_downsample)


def why_kept(graph: TracedGraph, conv: fx.Node, norm: MaybeNode) -> Why | None:
    """Return why a layer stays float by its place in the network, or None."""
    found = (rule(graph, conv, norm) for rule in KEEP_RULES)
    return next((reason.why() for reason in found if reason), None)


# ---------------------------------------------------------------------------------------------------------------------
# Which activations go


def acts_before(graph: TracedGraph, starts: Iterable[Any], binary: Collection[fx.Node]) -> set[str]:
    """Return the activations (or fused norms) whose output reaches a sign through nodes that keep it non-negative.

    One that also follows a layer that stays float, on another way than to a sign, stays for that layer's sake.

    Args:
        graph: The graph.
        starts: Nodes whose values are signed.
        binary: Layers that are binarized.

    Returns:
        The graph's names of the modules.
    """
    def onward(node: fx.Node) -> list[fx.Node]:
        module = graph.module(node)
        through = graph.carries(node) or is_act(module) or is_norm(module)
        return graph.signals(node) if through and not graph.is_product(node) else []

    reached = {
        node for start in starts for node in graph.walk_back(start, onward)
        if is_act(graph.module(node)) and not graph.is_gate(node) or fused_act(graph.module(node)) is not None}
    names = {node.target for node in reached}
    return names - {
        node.target for node in graph.nodes if node.op == 'call_module' and node.target in names
        and node not in reached and _follows_float(graph, node, binary)}


def _follows_float(graph: TracedGraph, act: fx.Node, binary: Collection[fx.Node]) -> bool:
    """Return whether an activation stands behind a layer that stays float, and perhaps its norm."""
    node = graph.skip_back(act.args[0])
    if is_norm(graph.module(node)):
        node = graph.skip_back(node.args[0])
    return is_layer(graph.module(node)) and node not in binary


def is_non_negative(
        graph: TracedGraph, node: Any, dropped: set[str], known: dict[fx.Node, bool] | None = None) -> bool:
    """Return whether a node cannot be negative once the activations in `dropped` are gone.

    Args:
        graph: The graph.
        node: The node; what is not one may be negative.
        dropped: The graph's names of the activations that go.
        known: Results for other nodes; it is added to.
    """
    if not isinstance(node, fx.Node):
        return False
    known = {} if known is None else known
    if node not in known:
        known[node] = False  # in a circle nothing is known
        known[node] = _gives_non_negative(graph, node, dropped) or _is_sum_of_non_negative(graph, node, dropped, known)
    return known[node]


def _gives_non_negative(graph: TracedGraph, node: fx.Node, dropped: set[str]) -> bool:
    """Return whether a node is an activation that gives nothing below zero, and stays."""
    if node.op == 'call_module':
        module = graph.module(node)
        act = fused_act(module) if is_norm(module) else module
        return node.target not in dropped and isinstance(act, NON_NEGATIVE)
    return node.op == 'call_function' and node.target in NON_NEGATIVE_FUNCTIONS or (
        node.op == 'call_method' and node.target in NON_NEGATIVE_METHODS)


def _is_sum_of_non_negative(graph: TracedGraph, node: fx.Node, dropped: set[str], known: dict[fx.Node, bool]) -> bool:
    goes = node.op == 'call_module' and node.target in dropped and is_act(graph.module(node))
    inputs = node.all_input_nodes if graph.carries(node) or goes else []
    return bool(inputs) and all(is_non_negative(graph, n, dropped, known) for n in inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Where a link would do harm


def why_no_link(
        graph: TracedGraph, conv: fx.Node, norm: MaybeNode, binary: list[fx.Node], dropped: set[str],
) -> Why | None:
    """Return why a layer gets no link, or None.

    Args:
        graph: The graph.
        conv, norm: The layer and its norm.
        binary: The layers that are binarized.
        dropped: The graph's names of the activations that go.
    """
    if conv in binary and _repeats_shortcut(graph, conv, norm, binary, dropped):
        return Reason.NO_LINK_REPEATS.why()
    return Reason.NO_LINK_FACTOR.why() if _is_factor(graph, conv, norm) else None


def _is_factor(graph: TracedGraph, conv: fx.Node, norm: MaybeNode) -> bool:
    """Return whether the output goes into a product of two signals, which would grow without bound by links."""
    node = graph.follower_through(norm if norm is not None else conv)
    while node is not None and is_act(graph.module(node)):
        node = graph.follower_through(node)
    return graph.is_product(node)


def _repeats_shortcut(
        graph: TracedGraph, conv: fx.Node, norm: MaybeNode, binary: list[fx.Node], dropped: set[str]) -> bool:
    """Return whether the links up to this one carry x unchanged to an addition that adds x itself.

        x -> conv (link) -> ... -> conv (link) -> +        one copy of x is enough
        x ---------------------------------------> +
    """
    addition = graph.follower_through(norm if norm is not None else conv)
    while addition is not None and addition.op == 'call_module' and addition.target in dropped:
        addition = graph.follower_through(addition)
    if addition is None or not is_addition(addition):
        return False
    carried: set[fx.Node] = set()
    node = conv
    while _keeps_shape(graph.module(node)):
        start = node.args[0]
        while isinstance(start, fx.Node):
            carried.add(start)
            signals = graph.signals(start)
            if len(signals) != 1 or not _leaves_signal(graph, start, dropped):
                break
            start = signals[0]
        if any(_is_repeated(graph, term, carried, conv, binary) for term in graph.terms(addition)):
            return True
        if start not in binary:
            return False
        node = start
    return False


def _keeps_shape(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return module.in_features == module.out_features
    return module.in_channels == module.out_channels and max(module.stride) == 1


def _leaves_signal(graph: TracedGraph, node: fx.Node, dropped: set[str]) -> bool:
    return graph.passes(node) or name_of(node) == 'mul' or is_norm(graph.module(node)) or (
        node.op == 'call_module' and node.target in dropped)


def _is_repeated(
        graph: TracedGraph, term: fx.Node, carried: set[fx.Node], conv: fx.Node, binary: list[fx.Node]) -> bool:
    """Return whether a term of a sum is x, a norm of it, or a parallel layer before this one, which has a link."""
    if term in carried:
        return True
    end = graph.skip_back(term)
    if is_norm(graph.module(end)):
        end = end.args[0]
        if end in carried:
            return True
    return end in binary and end is not conv and graph.order[end] < graph.order[conv] and end.args[0] in carried
