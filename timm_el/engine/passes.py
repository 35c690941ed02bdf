"""Passes over the steps of a recording: sums into convolutions, scales and shifts together, unread steps away."""
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .lower import Lowered, Node
from .steps import Binary, Kind, Step
from .views import Ref

__all__ = ['normalised']


def normalised(lowered: Lowered) -> Lowered:
    """Return the same program in fewer steps, with the same bits."""
    nodes = _with_sums_in_convolutions(lowered.nodes, lowered)
    nodes = _with_shifts_after_scales(nodes, lowered.leaves)
    return replace(lowered, nodes=_read(nodes, lowered.leaves))


def _readers(nodes: Sequence[Node], leaves: Sequence[Any]) -> Counter:
    counts = Counter(v for node in nodes for v in node.sources)
    counts.update(leaf.value for leaf in leaves if isinstance(leaf, Ref))
    return counts


def _with_sums_in_convolutions(nodes: Sequence[Node], lowered: Lowered) -> list[Node]:
    """Let a convolution add a block's shortcut as the last operation of its epilogue: v + added, as the host does.

    It moves to the place of the sum, behind the shortcut, so that the shortcut is still in cache when it is read.
    """
    readers, made = _readers(nodes, lowered.leaves), {node.out[0]: node for node in nodes}
    moved: set[Node] = set()
    result: list[Node] = []
    for node in nodes:
        step = node.item
        if not isinstance(step, Step) or step.kind != Kind.BINARY or step.ints[0] != Binary.ADD or (
                lowered.sizes[step.sources[0]] != lowered.sizes[step.sources[1]]):
            result.append(node)
            continue
        convs = [made[v] for v in step.sources if v in made and readers[v] == 1 and _adds_nothing(made[v].item)]
        if not convs or step.sources[0] == step.sources[1]:
            result.append(node)
            continue
        conv = max(convs, key=lambda n: n.item.is_binary_conv)
        other = next(v for v in step.sources if v != conv.out[0])
        moved.add(conv)
        joined = Node(replace(conv.item, sources=(*conv.item.sources[:2], other)), node.out)
        made[node.out[0]] = joined
        result.append(joined)
    return [node for node in result if node not in moved]


def _adds_nothing(item: Any) -> bool:
    return isinstance(item, Step) and item.kind == Kind.CONV and item.sources[2] is None


def _with_shifts_after_scales(nodes: Sequence[Node], leaves: Sequence[Any]) -> list[Node]:
    readers, made, dropped = _readers(nodes, leaves), {node.out[0]: node for node in nodes}, set()
    result = []
    for node in nodes:
        before = made.get(node.sources[0]) if node.sources else None
        if _is_affine(node.item, 1) and before is not None and _is_affine(before.item, 0) and (
                readers[node.sources[0]] == 1):
            dropped.add(before)
            node = Node(
                replace(before.item, tensors=(before.item.tensors[0], node.item.tensors[1])), node.out)
            made[node.out[0]] = node
        result.append(node)
    return [node for node in result if node not in dropped]


def _is_affine(item: Any, alone: int) -> bool:
    """Return whether a step has only a scale (0) or only a shift (1)."""
    return isinstance(item, Step) and item.kind == Kind.AFFINE and (
        item.tensors[alone] is not None and item.tensors[1 - alone] is None)


def _read(nodes: Sequence[Node], leaves: Sequence[Any]) -> list[Node]:
    """Return the nodes that somebody reads."""
    needed = {leaf.value for leaf in leaves if isinstance(leaf, Ref)}
    kept = []
    for node in reversed(nodes):
        if needed & {*node.out}:
            needed |= {*node.sources}
            kept.append(node)
    return kept[::-1]
