"""Followers: which norm and activation come after which convolution, read from a recording."""
import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from ..dry_run import own_input_size
from .calls import computed_tensors, has_own_forward, is_altered
from .record import Call, Recording, record, shadow_of

__all__ = ['followers']


def followers(
        model: nn.Module, sources: tuple[type, ...], others: tuple[type, ...],
) -> dict[str, list[str]]:
    """Return what comes directly after each source layer, as long as nothing else reads the tensor in between.

    A layer that runs more than once, or whose output leaves the network, has no followers. What hooks, or a forward in
    the instance, get and give is no tensor in between: a module that has them, or has them inside, is not followed, and
    none is followed into, or out of, a module that has them. A source that has them is left out, but for hooks that
    run before it and compute none of its tensors.

    Args:
        model: Any network in eval mode on the CPU; it is not changed. A copy of it runs once, on zeros.
        sources: Classes of the layers to follow.
        others: Classes of the modules that may follow.

    Returns:
        Path of each source, and the paths of what follows it, in order. Nothing if the network takes no image.
    """
    image = torch.zeros((1, *own_input_size(model)), dtype=torch.float32, device='cpu')
    try:
        recording = record(shadow_of(model), lambda network, x: network(x), image)
    except Exception:  # it wants something else than an image: nothing is known
        return {}
    altered = [path for path, m in model.named_modules() if path and (
        m._forward_hooks or has_own_forward(m) or computed_tensors(m) if isinstance(m, sources) else is_altered(m))]
    return _Chains(recording, dict(model.named_modules()), altered, sources, others).all()


class _Chains:
    """The rows of layers of a recording whose tensors in between nobody else reads."""

    def __init__(
            self,
            recording: Recording,
            modules: dict[str, nn.Module],
            altered: list[str],
            sources: tuple[type, ...],
            others: tuple[type, ...],
    ) -> None:
        self.modules, self.altered, self.sources = modules, altered, sources
        watched = [c for c in recording.calls if isinstance(modules[c.path], (*sources, *others))]
        self.calls: dict[str, list[Call]] = {}
        for call in watched:
            self.calls.setdefault(call.path, []).append(call)
        self.leaving = {id(leaf) for leaf in tree_leaves(recording.out)}
        self.readers: dict[int, list[object]] = {}  # by tensor: calls of watched modules, places of other operators
        inside: dict[int, Call] = {i: call for call in watched for i in range(call.first, call.last)}
        for i, op in enumerate(recording.ops):
            for leaf in tree_leaves((op.args, op.kwargs)):
                if isinstance(leaf, torch.Tensor):
                    self._read(leaf, inside.get(i, i))
        for call in watched:
            self._read(_input(call), call)

    def _read(self, tensor: object, reader: object) -> None:
        known = self.readers.setdefault(id(tensor), [])
        if reader not in known:
            known.append(reader)

    def all(self) -> dict[str, list[str]]:
        """Return the followers of each source."""
        return {path: self._after(path) for path, module in self.modules.items()
                if isinstance(module, self.sources) and self._is_single(path)}

    def _after(self, path: str) -> list[str]:
        chain, call = [], self.calls[path][0]
        passed = {call}
        while id(call.out) not in self.leaving:
            tensor = call.out
            calls = [r for r in self.readers.get(id(tensor), ()) if isinstance(r, Call) and r not in passed
                     and _input(r) is tensor]
            following = min(calls, key=lambda c: c.first, default=None)
            if following is None or isinstance(self.modules[following.path], self.sources) or (
                    not self._is_single(following.path) or self._around(following.path) != self._around(path)):
                break
            rest = [r for r in self.readers[id(tensor)] if r not in passed and r is not following]
            in_place = following.out is tensor  # who reads the tensor later reads what this module left in it
            if any(_starts(r) < following.first for r in rest) or rest and not in_place:
                break
            chain.append(following.path)
            passed.add(following)
            call = following
        return chain

    def _is_single(self, path: str) -> bool:
        calls = self.calls.get(path, ())
        return len(calls) == 1 and isinstance(calls[0].out, torch.Tensor) and not any(
            f'{p}.'.startswith(f'{path}.') for p in self.altered)

    def _around(self, path: str) -> list[str]:
        """Return the altered modules that a module is in: the tensor between two is what they get or give."""
        return [p for p in self.altered if path.startswith(f'{p}.')]


def _input(call: Call) -> object:
    return call.args[0] if call.args else None


def _starts(reader: 'Call | int') -> int:
    return reader.first if isinstance(reader, Call) else reader
