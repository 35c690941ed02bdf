"""Which norm and activation follow which convolution: seen by running the network once and watching who reads what."""
from typing import Any

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..dry_run import meta_copy, own_input_size
from .calls import computed_tensors, has_own_forward, is_altered

__all__ = ['followers']


class _Watch(TorchDispatchMode):
    """Counts the readers of each tensor: one for each operator outside, one for each module that is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[int, list[Any]] = {}
        self.inside: list[nn.Module] = []
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reader = self.inside[-1] if self.inside else object()
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, torch.Tensor):
                readers = self.readers.setdefault(id(leaf), [])
                if reader not in readers:
                    readers.append(reader)
        out = func(*args, **(kwargs or {}))
        self.alive.append(out)  # an id must not be used twice
        return out


def followers(
        model: nn.Module, sources: tuple[type, ...], others: tuple[type, ...],
) -> dict[str, list[str]]:
    """What comes directly after each source layer, as long as nothing else reads the tensor in between.

    A layer that runs more than once, or whose output leaves the network, has no followers. What hooks, or a forward in
    the instance, get and give is no tensor in between: a module that has them, or has them inside, is not followed, and
    none is followed into, or out of, a module that has them. A source that has them is left out, but for hooks that
    run before it and compute none of its tensors.

    Args:
        model: Any network; it is not changed. It runs on the meta device, or, if it does not, on zeros.
        sources: Classes of the layers to follow.
        others: Classes of the modules that may follow.

    Returns:
        Path of each source, and the paths of what follows it, in order.
    """
    try:
        return _watch(meta_copy(model), 'meta', model, sources, others)
    except Exception:  # the network looks at values
        pass
    try:
        return _watch(model, next(model.parameters()).device, model, sources, others)
    except Exception:  # it wants something else than an image: nothing is known
        return {}


def _watch(
        network: nn.Module,
        device: Any,
        model: nn.Module,
        sources: tuple[type, ...],
        others: tuple[type, ...],
) -> dict[str, list[str]]:
    watch = _Watch()
    altered = [path for path, m in model.named_modules() if path and (
        m._forward_hooks or has_own_forward(m) or computed_tensors(m) if isinstance(m, sources) else is_altered(m))]
    paths = {m: p for p, m in network.named_modules()}
    ran: dict[str, int] = {}
    made: dict[int, str] = {}  # id of an output: the module that gave it
    took: dict[str, int] = {}  # path: id of its input
    gave: dict[str, int] = {}

    def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        watch.inside.append(module)
        if args and isinstance(args[0], torch.Tensor):
            took[paths[module]] = id(args[0])
            watch.alive.append(args[0])

    def after(module: nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> None:
        watch.inside.pop()
        path = paths[module]
        ran[path] = ran.get(path, 0) + 1
        if isinstance(out, torch.Tensor):
            made[id(out)], gave[path] = path, id(out)
            watch.alive.append(out)

    handles = []
    for module in paths:
        if isinstance(module, (*sources, *others)):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        with torch.no_grad(), watch:
            out = network(torch.zeros((1, *own_input_size(model)), device=device, dtype=dtype))
    finally:
        for handle in handles:
            handle.remove()
    leaving = {id(leaf) for leaf in tree_leaves(out)}
    modules = dict(network.named_modules())

    def single(path: str) -> bool:
        return ran.get(path) == 1 and path in gave and not any(f'{p}.'.startswith(f'{path}.') for p in altered)

    def around(path: str) -> list[str]:
        return [p for p in altered if path.startswith(f'{p}.')]

    result: dict[str, list[str]] = {}
    for path, module in modules.items():
        if not isinstance(module, sources) or not single(path):
            continue
        chain: list[str] = []
        tensor = gave[path]
        while tensor not in leaving:
            # In the order of their calls.
            nexts = [p for p, t in took.items() if t == tensor and p not in (path, *chain)]
            if not nexts or isinstance(modules[nexts[0]], sources) or not single(nexts[0]):
                break
            if around(nexts[0]) != around(path):  # the tensor is what they get or give
                break
            passed = [modules[p] for p in chain]
            readers = [r for r in watch.readers.get(tensor, []) if r not in passed]
            in_place = gave[nexts[0]] == tensor  # who reads the tensor later reads what this module left in it
            if readers and readers[0] is not modules[nexts[0]] or not in_place and len(nexts) + len(readers) > 2:
                break
            chain.append(nexts[0])
            tensor = gave[nexts[0]]
        result[path] = chain
    return result
