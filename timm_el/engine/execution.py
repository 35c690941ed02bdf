"""Runner: a lowered network as native programs, with the modules in between that run their own forward."""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from .lower import Island, Lowered, Node
from .program import Output, Program
from .steps import Form, Size, Step
from .views import AXES, Ref, form_of

__all__ = ['Runner']


class Runner:
    """A network on images (N, C, H, W), as one native call, or one between any two islands.

    Args:
        lowered: The network.
        size: (height, width) of the images that it holds for, None for any.
    """

    def __init__(self, lowered: Lowered, size: tuple[int, int] | None) -> None:
        self.size, self.islands = size, lowered.islands
        self.leaves, self.spec, self._sizes = lowered.leaves, lowered.spec, lowered.sizes
        self._parts: list[Program | Island] = []
        self._wires: list[tuple[list[int], list[int]]] = []  # values that each part takes and gives
        self._cut(lowered.nodes)
        refs = [leaf for leaf in self.leaves if isinstance(leaf, Ref)]
        self.program = self._parts[0] if len(self._parts) == 1 and not self.islands else None
        if self.program is not None:  # its outputs have their forms already
            steps, renumbered = _renumbered(lowered.nodes, [0])
            outputs = [Output(renumbered[r.value], form_of(r, self._sizes[r.value])) for r in refs]
            self.program = self._parts[0] = Program(steps, outputs, [self._sizes[0][3]], size)

    def _cut(self, nodes: Sequence[Node]) -> None:
        """Make a program of each run of steps between islands."""
        runs: list[list[Node]] = [[]]
        for node in nodes:
            if isinstance(node.item, Island):
                runs += [[node], []]
            else:
                runs[-1].append(node)
        leaving = {leaf.value for leaf in self.leaves if isinstance(leaf, Ref)}
        for i, run in enumerate(runs):
            if not run:
                continue
            if isinstance(run[0].item, Island):
                self._parts.append(run[0].item)
                self._wires.append((run[0].sources, list(run[0].out)))
                continue
            made = {v for node in run for v in node.out}
            later = leaving | {v for other in runs[i + 1:] for node in other for v in node.sources}
            takes = sorted({v for node in run for v in node.sources} - made)
            gives = sorted(made & later)
            steps, renumbered = _renumbered(run, takes)
            outputs = [Output(renumbered[v], Form.IMAGE) for v in gives]
            self._parts.append(Program(steps, outputs, [self._sizes[v][3] for v in takes]))
            self._wires.append((takes, gives))

    def __call__(self, x: torch.Tensor, modules: Callable[[str], torch.nn.Module]) -> Any:
        """Return what the network returns.

        Args:
            x: Images (N, C, H, W) float32 on the CPU.
            modules: Gives the module at a path, for islands.
        """
        if self.program is not None:
            outputs = iter(self.program.run([x]))
            leaves = [next(outputs) if isinstance(leaf, Ref) else leaf for leaf in self.leaves]
            return leaves[0] if len(leaves) == 1 and self.spec.is_leaf() else tree_unflatten(leaves, self.spec)
        values = {0: x}
        for part, (takes, gives) in zip(self._parts, self._wires):
            if isinstance(part, Program):
                values.update(zip(gives, part.run([values[v] for v in takes])))
            else:
                values.update(zip(gives, _run_island(part, modules(part.path), values)))
        leaves = [_shown(leaf, values[leaf.value]) if isinstance(leaf, Ref) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)

    def __str__(self) -> str:
        """Return a line for each step and island, and which sizes they hold for."""
        lines = []
        for part, (takes, gives) in zip(self._parts, self._wires):
            if isinstance(part, Island):
                lines.append(f'island {part.path} of values {takes} gives {gives}')
                continue
            for i, step in enumerate(part.steps, len(part.channels)):
                sources = ', '.join('-' if v is None else str(v) for v in step.sources)
                lines.append(f'{i:4} = {step.name}({sources})')
        sizes = 'any image size' if self.size is None else 'images of {} x {} pixels'.format(*self.size)
        return '\n'.join([f'{len(lines)} steps, {len(self.islands)} of them islands, for {sizes}', *lines])


def _renumbered(nodes: Sequence[Node], takes: Sequence[int]) -> tuple[list[Step], dict[int, int]]:
    """Return steps whose values are counted from their own inputs, and the new number of each value."""
    number = {value: i for i, value in enumerate(takes)}
    steps = []
    for node in nodes:
        step = node.item
        sources = tuple(None if v is None else number[v] for v in step.sources)
        steps.append(Step(step.kind, sources, step.tensors, step.ints, step.constants, step.path))
        number[node.out[0]] = len(takes) + len(steps) - 1
    return steps, number


def _shown(ref: Ref, image: torch.Tensor) -> torch.Tensor:
    """Return a value (N, C, H, W) as the tensor that shows it."""
    size: Size = (image.shape[0], *image.shape[2:], image.shape[1])
    length = dict(zip(AXES, size))
    order = [axis for group in ref.groups for axis in group]
    order += [axis for axis in AXES if axis not in order]
    nhwc = image.permute(0, 2, 3, 1)
    shape = []
    for group in ref.groups:
        n = 1
        for axis in group:
            n *= length[axis]
        shape.append(n)
    return nhwc.permute([AXES.index(axis) for axis in order]).reshape(shape)


def _run_island(island: Island, module: torch.nn.Module, values: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    def shown(leaf: Any) -> Any:
        return _shown(leaf, values[leaf.value]) if isinstance(leaf, Ref) else leaf

    args, kwargs = tree_map(shown, (island.args, island.kwargs))
    images = []
    for leaf, groups in zip(tree_leaves(module(*args, **kwargs)), island.outs):
        order = [axis for axis in groups]
        leaf = leaf.reshape(*leaf.shape, *[1] * (4 - leaf.dim()))
        order += [axis for axis in 'nchw' if axis not in order]
        images.append(leaf.permute([order.index(axis) for axis in 'nchw']))
    return images
