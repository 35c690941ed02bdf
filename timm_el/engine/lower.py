"""Lowering: the operators of a recording as steps of a program; what has no step makes its module an island."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves

from .aten import FACTORIES, HANDLERS
from .operators import KIND_OF, decode
from .record import Call, Op, Recording
from .spec import MOST_CHANNELS
from .steps import Kind, Size, Step, is_pixelwise, output_size
from .views import AXES, IMAGE, UNREAD, NoStep, Ref, form_of, is_flat, is_image, is_pixels, with_channels

__all__ = ['Island', 'Lowered', 'Node', 'lower']

@dataclass(frozen=True, eq=False)
class Island:
    """A module that runs its own forward in the middle of a program.

    Args:
        path: Where it stands.
        args, kwargs: What it is called with; a `Ref` stands for each tensor that a step gives.
        outs: Axes of its outputs, in the order of pytree leaves.
        spec: Structure of its outputs.
    """
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[tuple[str, ...], ...]
    spec: Any

    def equals(self, other: Any) -> bool:
        """Return whether two islands call the same module in the same way."""
        return isinstance(other, Island) and self.path == other.path and self.outs == other.outs and (
            self.spec == other.spec and _same_leaves((self.args, self.kwargs), (other.args, other.kwargs)))


@dataclass(frozen=True, eq=False)
class Node:
    """A step or island, with the values that it gives."""
    item: Step | Island
    out: tuple[int, ...]

    @property
    def sources(self) -> list[int]:
        """Values that it reads."""
        if isinstance(self.item, Step):
            return [v for v in self.item.sources if v is not None]
        return [leaf.value for leaf in tree_leaves((self.item.args, self.item.kwargs)) if isinstance(leaf, Ref)]


@dataclass(eq=False)
class Lowered:
    """A recording as steps: value 0 is the image; leaves are the outputs, each a `Ref`, a tensor, or something else."""
    nodes: list[Node]
    leaves: list[Any]
    spec: Any
    sizes: dict[int, Size]

    def equals(self, other: 'Lowered') -> bool:
        """Return whether two recordings of one network are one program."""
        return self.spec == other.spec and _same_leaves(self.leaves, other.leaves) and (
            len(self.nodes) == len(other.nodes)) and all(
            a.out == b.out and type(a.item) is type(b.item) and a.item.equals(b.item)
            for a, b in zip(self.nodes, other.nodes))

    @property
    def islands(self) -> list[str]:
        """Paths of the modules that run their own forward."""
        return [node.item.path for node in self.nodes if isinstance(node.item, Island)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _written(op: Op) -> list[torch.Tensor]:
    """Return the tensors that an operator writes to."""
    arguments = op.func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, op.args)} | op.kwargs
    return [t for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write
            for t in tree_leaves(given.get(argument.name)) if isinstance(t, torch.Tensor)]


def _same_leaves(a: Any, b: Any) -> bool:
    (a, a_spec), (b, b_spec) = tree_flatten(a), tree_flatten(b)
    return a_spec == b_spec and all(
        isinstance(y, torch.Tensor) and x.shape == y.shape and torch.equal(x, y) if isinstance(x, torch.Tensor)
        else type(x) is type(y) and x == y for x, y in zip(a, b))


def lower(recording: Recording, memo: dict[Any, Any]) -> Lowered:
    """Return a recording as steps and islands.

    Args:
        recording: One run of a network on images.
        memo: Constants made of others, by what they were made of; one for all recordings of a network.

    Raises:
        NoStep: What has no step stands in no module, so that there is no island to make.
    """
    islands: set[Call] = set()
    while True:
        try:
            return Lowering(recording, memo, islands).run()
        except _Unlowered as e:
            islands -= {call for call in islands if _within(call, e.call)}
            islands.add(e.call)


def _within(call: Call | None, outer: Call) -> bool:
    while call is not None and call is not outer:
        call = call.parent
    return call is outer


class _Unlowered(Exception):
    """A call must be made an island."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.path)
        self.call = call


class Lowering:
    """One pass over a recording; the handlers of aten/ add its steps."""

    def __init__(self, recording: Recording, memo: dict[Any, Any], islands: set[Call]) -> None:
        n, c, h, w = recording.x.shape
        self.recording, self.memo, self.islands = recording, memo, islands
        self.sizes: dict[int, Size] = {0: (n, h, w, c)}
        self.nodes: list[Node] = []
        self.refs = {id(recording.x): Ref(0, IMAGE)}
        self.storages: dict[int, list[torch.Tensor]] = {}
        self.fresh: set[int] = set()  # constants that the run made itself
        self.fresh_storages: set[int] = set()  # and their memory
        self.read_storages: set[int] = set()  # memory of constants that steps read, which they do when the run is over
        self._remember(recording.x)

    # What handlers use ------------------------------------------------------------------------------------------------

    def ref(self, tensor: Any) -> Ref | None:
        """Return the view of a value that a tensor is, None if it is a constant or no tensor."""
        ref = self.refs.get(id(tensor)) if isinstance(tensor, torch.Tensor) else None
        if ref == UNREAD:
            raise NoStep('an output that has no step')
        return ref

    def step(self, kind: Kind, sources: Sequence[int | None], tensors=(), ints=(), constants=()) -> int:
        """Add a step; return the value that it gives."""
        return self.add(Step(kind, tuple(sources), tuple(tensors), tuple(ints), tuple(constants)))

    def add(self, step: Step) -> int:
        """Add a step; return the value that it gives."""
        value, size = len(self.sizes), output_size(step, [self.sizes[v] for v in step.sources if v is not None])
        if size[3] > MOST_CHANNELS:
            raise NoStep('more channels than the engine counts')
        self.sizes[value] = tuple(size)
        self.nodes.append(Node(step, (value,)))
        return value

    def size(self, ref: Ref) -> Size:
        """Return the size of the value that a tensor shows."""
        return self.sizes[ref.value]

    def image(self, tensor: torch.Tensor) -> int:
        """Return the value that a tensor (N, C, H, W) shows."""
        ref = self.ref(tensor)
        if ref is None or not is_image(ref, self.size(ref)):
            raise NoStep('read as an image')
        return ref.value

    def pixels(self, tensor: torch.Tensor, axis: int) -> Ref:
        """Return the view that a tensor is, whose axis `axis` must be the channels, the others pixels in order."""
        ref = self.ref(tensor)
        if ref is None or not is_pixels(ref, self.size(ref), axis):
            raise NoStep('read pixel by pixel')
        return ref

    def constant(self, make: Callable[[], Any], *key: Any) -> Any:
        """Return what `make` gives, made once for a key of tensors and numbers."""
        known = tuple(id(k) if isinstance(k, torch.Tensor) else k for k in key)
        if known not in self.memo:
            self.memo[known] = key, make()  # keeps the tensors of the key
        return self.memo[known][1]

    # The pass ---------------------------------------------------------------------------------------------------------

    def run(self) -> Lowered:
        """Return the recording as steps and islands."""
        starts = {call.first: call for call in self.islands if call.first != call.last}
        i, ops = 0, self.recording.ops
        while i < len(ops):
            call = starts.get(i)
            if call is not None:
                self._enter(call, self._island, call)
                i = call.last
                continue
            self._enter(self._innermost(i), self._lower, ops[i])
            i += 1
        leaves, spec = tree_flatten(self.recording.out)
        return Lowered(self.nodes, [self._leaf(leaf) for leaf in leaves], spec, self.sizes)

    def _innermost(self, i: int) -> Call | None:
        found = [call for call in self.recording.calls if call.first <= i < call.last]
        return found[-1] if found else None

    def _enter(self, call: Call | None, work: Callable[[Any], None], what: Any) -> None:
        """Do the work of a call; if there is no step for it, the smallest call around it becomes an island."""
        try:
            work(what)
        except NoStep:
            while call is not None and call in self.islands:
                call = call.parent
            if call is None:
                raise
            raise _Unlowered(call) from None

    def _leaf(self, leaf: Any) -> Any:
        ref = self.ref(leaf)
        if ref is None:
            return leaf
        if ref.groups == ('n', 'chw') and is_flat(ref, self.size(ref)):
            return Ref(self.step(Kind.FLATTEN, [ref.value]), ('n', 'c'))
        form_of(ref, self.size(ref))
        return ref

    def _lower(self, op: Op) -> None:
        inputs = [t for t in tree_leaves((op.args, op.kwargs)) if self.ref(t) is not None]
        name = op.func._schema.name.split('::')[1]
        in_place = name.endswith('_') and not name.startswith('_')
        if in_place and self.ref(op.args[0]) is None and (
                id(op.args[0]) not in self.fresh or _storage(op.args[0]) in self.read_storages):
            raise NoStep('a constant that is written to')
        if not inputs or name in FACTORIES:
            made = [t for t in tree_leaves(op.out) if isinstance(t, torch.Tensor)]
            self.fresh |= {id(t) for t in made}
            self.fresh_storages |= {_storage(t) for t in made}
            return
        self._read_constants((op.args, op.kwargs))
        if op.func in KIND_OF:
            result: Any = _engine_step(self, KIND_OF[op.func], *op.args)
        else:
            handler = HANDLERS.get(name.rstrip('_') if in_place else name)
            if handler is None:
                raise NoStep(name)
            result = handler(self, op)
        if in_place:
            self._overwrite(op.args[0], result)
        outs = op.out if isinstance(op.out, (list, tuple)) else [op.out]
        for out, ref in zip(outs, result if isinstance(result, list) else [result]):
            if ref != UNREAD and len(ref.groups) != out.dim():
                raise NoStep(name)
            self.refs[id(out)] = ref
            self._remember(out)

    def _remember(self, tensor: torch.Tensor) -> None:
        self.storages.setdefault(_storage(tensor), []).append(tensor)

    def _read_constants(self, args: Any) -> None:
        self.read_storages |= {
            _storage(t) for t in tree_leaves(args) if isinstance(t, torch.Tensor) and id(t) not in self.refs}

    def _overwrite(self, target: torch.Tensor, result: Ref) -> None:
        """Let all tensors that show the memory of `target` show what was written there.

        Those that show another part of it, such as some of its channels, can be read no more.
        """
        old = self.ref(target)
        if old is None:
            raise NoStep('a constant that is written to')
        for tensor in self.storages.get(_storage(target), []):
            ref = self.refs[id(tensor)]
            self.refs[id(tensor)] = Ref(result.value, ref.groups) if ref.value == old.value else UNREAD

    def _island(self, call: Call) -> None:
        args, kwargs = torch.utils._pytree.tree_map(lambda x: self.ref(x) or x, (call.args, call.kwargs))
        self._read_constants((call.args, call.kwargs))
        leaves, spec = tree_flatten(call.out)
        if any(isinstance(t, torch.Tensor) and _storage(t) in self.storages for t in leaves):
            raise NoStep('an island that gives its input back, or a view of it')
        for op in self.recording.ops[call.first:call.last]:
            if any(_storage(t) in self.storages or _storage(t) in self.fresh_storages for t in _written(op)):
                raise NoStep('an island that writes to what others read')
        outs, values = [], []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) or leaf.dtype != torch.float32 or leaf.dim() not in _GROUPS_OF_RANK:
                raise NoStep('what an island gives')
            groups = _GROUPS_OF_RANK[leaf.dim()]
            size = dict.fromkeys(AXES, 1) | dict(zip(groups, leaf.shape))
            value = len(self.sizes)
            self.sizes[value] = tuple(size[a] for a in AXES)
            self.refs[id(leaf)] = Ref(value, groups)
            self._remember(leaf)
            outs.append(groups)
            values.append(value)
        self.nodes.append(Node(Island(call.path, args, kwargs, tuple(outs), spec), tuple(values)))


_GROUPS_OF_RANK = {2: ('n', 'c'), 3: ('n', 'w', 'c'), 4: IMAGE}

def _engine_step(low: Lowering, kind: Kind, inputs, tensors, ints, constants) -> Ref:
    step = decode(kind, inputs, tensors, ints, constants)
    if kind == Kind.UNARY:
        ref = low.ref(inputs[0])
        return Ref(low.add(replace(step, sources=(ref.value,))), ref.groups)
    if is_pixelwise(step):
        refs = [low.pixels(x, 1) for x in inputs]
        if any(ref.groups != refs[0].groups for ref in refs):
            raise NoStep('a link of another form')
        groups = with_channels(refs[0].groups, 1)
    else:
        refs, groups = [Ref(low.image(x), IMAGE) for x in inputs], IMAGE
    sources = tuple(None if i is None else refs[i].value for i in step.sources)
    return Ref(low.add(replace(step, sources=sources)), groups)
