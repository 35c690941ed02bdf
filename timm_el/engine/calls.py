"""Calls of modules, and what they run besides the forward of a class: hooks, forwards of instances, compiled calls.

Profilers, offloaders and timers put them there, and so do pruning, weight norm and spectral norm. Each must run, and
its result must count, where the engine would go past the module.
"""
import copy
import ctypes
import sys
from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from ..layers.checks import count_guards
from . import native

__all__ = [
    'FORWARD_HOOKS', 'Snapshot', 'computed_tensors', 'copied', 'has_hooks', 'has_own_forward', 'is_altered',
    'without_hooks']

# Where a module keeps its forward hooks, and what they were registered with.
FORWARD_HOOKS = (
    '_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called', '_forward_pre_hooks',
    '_forward_pre_hooks_with_kwargs')


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward hooks, before or after."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a forward in the instance stands in front of that of the class; scripted modules have one."""
    return 'forward' in vars(module) and not isinstance(module, torch.jit.ScriptModule)


def computed_tensors(module: nn.Module) -> list[str]:
    """Return the names of the tensors that a module computes anew in each pass, by a parametrization or in a hook."""
    names = list(module.parametrizations) if is_parametrized(module) else []
    if has_hooks(module):
        names += [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
    return names


def is_altered(module: nn.Module) -> bool:
    """Return whether a call runs something else than the forward of a class on the module's own tensors."""
    return has_hooks(module) or has_own_forward(module) or is_parametrized(module)


def copied(module: nn.Module | None, memo: dict[int, Any] | None = None) -> nn.Module | None:
    """Return a deep copy; tensors with a history, which torch does not copy, lose it."""
    memo = {} if memo is None else memo
    for part in () if module is None else module.modules():
        for leaf in tree_leaves(vars(part)):
            if isinstance(leaf, torch.Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(module, memo)


def without_hooks(module: nn.Module) -> nn.Module:
    """Take the hooks of a module away; return it."""
    for hooks in FORWARD_HOOKS:
        getattr(module, hooks).clear()
    return module


class Lengths:
    """The lengths of many dicts at one moment.

    A look by Python at a thousand dicts takes a tenth of a millisecond, most of it to fetch them one by one from
    memory, after a network has gone through the cache. So the native library looks where CPython keeps the length of a
    dict, if that is where it is expected; else Python does.

    Args:
        dicts: The dicts.
    """

    def __init__(self, dicts: tuple[dict, ...]) -> None:
        self._dicts, self._lengths = dicts, [*map(len, dicts)]
        self._places = (ctypes.c_void_p * len(dicts))(*(id(d) + LENGTH_OFFSET for d in dicts))
        self._expected = (ctypes.c_int64 * len(dicts))(*self._lengths)

    def have_changed(self) -> bool:
        """Return whether one of the dicts has another length now."""
        lib = native.library() if LENGTHS_ARE_IN_PLACE else None
        if lib is None:
            return [*map(len, self._dicts)] != self._lengths
        return bool(lib.el_differs(self._places, self._expected, len(self._dicts)))


LENGTH_OFFSET = 16  # bytes from the start of a dict: after its reference count and type


def _lengths_are_in_place() -> bool:
    """Return whether dicts of this Python have their length where `LENGTH_OFFSET` says."""
    if sys.implementation.name != 'cpython':
        return False
    samples = [{i: i for i in range(n)} for n in (0, 1, 3, 200)] + [OrderedDict(a=1, b=2), vars(nn.Identity())]
    return all(ctypes.c_int64.from_address(id(d) + LENGTH_OFFSET).value == len(d) for d in samples)


LENGTHS_ARE_IN_PLACE = _lengths_are_in_place()


class Snapshot:
    """The calls inside a network at one moment, and whether they would do something else by now.

    Guards of the image size do not count: `least_size` is what they ask for. Only lengths are compared.

    Args:
        network: The network. Its own hooks and forward are no matter here: whoever calls it runs them.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = [m for m in network.modules() if not isinstance(m, torch.jit.ScriptModule)]
        called = [m for m in modules if m is not network and not isinstance(m, nn.ModuleList)]
        hooks = [hooks for m in called for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        instances = [vars(m) for m in called]
        self.least_size = max((getattr(m, 'min_input_size', 0) for m in called), default=0)
        own_calls = any('forward' in own or '_compiled_call_impl' in own for own in instances)
        self.is_plain = not own_calls and [*map(len, hooks)] == [*map(count_guards, hooks)]
        children = [m._modules for m in modules if m._modules]
        self._lengths = Lengths((*hooks, *instances, *children))
        self._generation = native.generation()

    def is_current(self) -> bool:
        """Return whether no tensor of a deployed network was loaded or moved since."""
        return self._generation == native.generation()

    def is_altered(self) -> bool:
        """Return whether a call inside runs something else than the forward of a class, a hook for example."""
        return not self.is_plain or self._lengths.have_changed() or bool(
            torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
