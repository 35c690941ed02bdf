"""Deployed networks: classes made for the host's class whose forward runs as one program."""
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import native
from . import operators as ops
from .calls import Snapshot
from .execution import Runner
from .lower import Lowered, lower
from .passes import normalised
from .record import Recording, record, shadow_of
from .views import NoStep

__all__ = ['ENTRIES', 'Deployed', 'as_deployed']

ENTRIES = ('forward', 'forward_features', 'forward_intermediates')
_building = threading.RLock()
if hasattr(os, 'register_at_fork'):  # no process is forked while it is held
    os.register_at_fork(before=_building.acquire, after_in_parent=_building.release, after_in_child=_building.release)


class Deployed:
    """Base of deployed networks, beside the host's class: a program for each entry, made at its first use.

    A program is run where nobody could tell the difference: in front of hooks, forwards of instances, tracers and
    profilers, and for inputs other than one plain float32 image batch on the CPU, the network runs module by module.
    The network is immutable but for `load_state_dict`, attributes of its own (`reset_classifier` sets some), and
    modules that are added or removed: then programs are made anew.
    """
    _entries: 'Entries | None' = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), '_entries': None}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        vars(self)['_entries'] = None

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        vars(self)['_entries'] = None

    def __reduce_ex__(self, protocol: int) -> Any:
        return _restored, (type(self)._host,), self.__getstate__()


def _restored(host: type) -> nn.Module:
    cls = deployed_class(host)
    return cls.__new__(cls)


@functools.cache
def deployed_class(host: type) -> type:
    """Return the class of deployed networks whose latent networks are of class `host`."""
    entries = {name: _entry(host, name) for name in ENTRIES if callable(getattr(host, name, None))}
    return type(f'Deployed{host.__name__}', (Deployed, host), {
        **entries, '_host': host, '__module__': host.__module__, '__doc__': Deployed.__doc__})


def as_deployed(network: nn.Module) -> nn.Module:
    """Give a network of deployed modules the class of deployed networks; return it."""
    network.__class__ = deployed_class(type(network))
    return network


def _entry(host: type, name: str) -> Callable[..., Any]:
    own = getattr(host, name)

    @functools.wraps(own)
    def run(self, *args, **kwargs):
        if ops.watched() or native.library() is None:
            return own(self, *args, **kwargs)
        entries = vars(self).get('_entries')
        if entries is None or not entries.snapshot.is_current():
            entries = vars(self)['_entries'] = Entries(self)
        if entries.snapshot.is_altered():
            entries = vars(self)['_entries'] = Entries(self)
            if entries.snapshot.is_altered():
                return own(self, *args, **kwargs)
        found = entries.find(name, args, kwargs)
        return own(self, *args, **kwargs) if found is None else found[0](found[1], self.get_submodule)

    return run


class Entries:
    """The programs of a network, by entry and by what it is called with besides the image.

    Args:
        network: The deployed network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.snapshot = network, Snapshot(network)
        self._runners: dict[Any, dict[Any, Runner | None]] = {}

    def find(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Runner, torch.Tensor] | None:
        """Return the runner of a call and its image, or None if it goes module by module."""
        if len(args) == 1 and not kwargs:
            x, key, call = args[0], name, None
        else:
            leaves, spec = tree_flatten((args, kwargs))
            images = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            if len(images) != 1:
                return None
            x, leaves[images[0]] = leaves[images[0]], None
            call = leaves, spec, images[0]
            key = (name, spec, images[0], *(_plain(leaf) for leaf in leaves))
        if not self._takes(x):
            return None
        sized = self._runners.get(key, {})
        size = tuple(x.shape[2:])
        runner = sized.get(None) or sized.get(size, self)
        if runner is self:
            runner = self._make(key, name, call, x)
        return None if runner is None else (runner, x)

    def _takes(self, x: torch.Tensor) -> bool:
        """Return whether a program may run on x; the modules say what is wrong with others."""
        if type(x) is not torch.Tensor or x.dim() != 4 or x.dtype != torch.float32 or x.device.type != 'cpu':
            return False
        if x.requires_grad and torch.is_grad_enabled() or x.is_neg():  # its memory holds the numbers with another sign
            return False
        return x.numel() > 0 and min(x.shape[2:]) >= self.snapshot.least_size

    def _make(self, key: Any, name: str, call: Any, x: torch.Tensor) -> Runner | None:
        own, size = getattr(type(self.network)._host, name), tuple(x.shape[2:])

        def run(network: nn.Module, image: torch.Tensor) -> Any:
            if call is None:
                return own(network, image)
            leaves, spec, place = call
            args, kwargs = tree_unflatten([*leaves[:place], image, *leaves[place + 1:]], spec)
            return own(network, *args, **kwargs)

        with _building:
            sized = self._runners.setdefault(key, {})
            if size not in sized:
                lowered, holds_for_any = lowered_for(self.network, run, x.shape[1], size)
                holds_for_any = holds_for_any and not sized  # no other size had steps of its own
                runner = None if lowered is None else Runner(lowered, None if holds_for_any else size)
                sized[None if holds_for_any and runner is not None else size] = runner
            return sized.get(None) or sized[size]


def lowered_for(
        network: nn.Module, run: Callable[[nn.Module, torch.Tensor], Any], channels: int, size: tuple[int, int],
) -> tuple[Lowered | None, bool]:
    """Return the steps of a network, None if they depend on the batch, and whether they hold for any image size.

    It is recorded at two batches and three sizes: what stands in the steps is no matter of these if it is equal.

    Args:
        network: The deployed network.
        run: Calls it on images.
        channels, size: Channels, and (height, width), of the images.
    """
    memo: dict[Any, Any] = {}
    shadow = shadow_of(network)

    def recorded(n: int, size: tuple[int, int]) -> Recording | None:
        """Return a run on n images of a size, None if the network takes none such."""
        generator = torch.Generator('cpu').manual_seed(n)
        x = torch.randn((n, channels, *size), generator=generator, dtype=torch.float32, device='cpu')
        try:
            return record(shadow, run, x)
        except Exception:  # of its own forward, which will say it of the caller's images
            return None

    def lowered(recording: Recording) -> Lowered | None:
        try:
            return normalised(lower(recording, memo))
        except NoStep:
            return None

    def other_sizes() -> Iterator[bool]:
        """Yield whether the steps at other sizes are the same, for those that the network takes."""
        height, width = size
        for other in ((height + 33, width + 51), (height // 2 + 1, width // 2 - 1 + width % 2)):
            recording = recorded(1, other)
            if recording is not None:
                found = lowered(recording)
                yield found is not None and first.equals(found)

    with torch.inference_mode(False):
        runs = (recorded(n, size) for n in (1, 2))
        first, second = (None if one is None else lowered(one) for one in runs)
        if first is None or second is None or not first.equals(second):
            return None, False
        same = list(other_sizes())
        return first, bool(same) and all(same)


def _plain(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return type(leaf), leaf
