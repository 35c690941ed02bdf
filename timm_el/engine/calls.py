"""What a call of a module runs besides the forward of its class: hooks, a forward of the instance, a compiled call.

Profilers, offloaders and timers put them there, and so do pruning, weight norm and spectral norm. Each must run, and
its result must count, where the engine would go past the module.
"""
import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

__all__ = [
    'HOOKS', 'Calls', 'computed_tensors', 'copied', 'has_hooks', 'has_own_forward', 'is_altered', 'without_hooks']

# Where a module keeps its forward hooks, and what they were registered with.
HOOKS = (
    '_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called', '_forward_pre_hooks',
    '_forward_pre_hooks_with_kwargs')


def has_hooks(module: nn.Module) -> bool:
    """Forward hooks, before or after."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_own_forward(module: nn.Module) -> bool:
    """A forward in the instance, in front of that of its class. Scripted modules are made with one."""
    return 'forward' in vars(module) and not isinstance(module, torch.jit.ScriptModule)


def computed_tensors(module: nn.Module) -> list[str]:
    """Names of the tensors that the module computes anew in each pass, by a parametrization or in a hook."""
    names = list(module.parametrizations) if is_parametrized(module) else []
    if has_hooks(module):
        names += [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
    return names


def is_altered(module: nn.Module) -> bool:
    """A call of the module runs something else than the forward of its class on tensors of its own."""
    return has_hooks(module) or has_own_forward(module) or is_parametrized(module)


def copied(module: nn.Module | None, memo: dict[int, Any] | None = None) -> nn.Module | None:
    """A deep copy; tensors that somebody computed and left in it lose their history, with which torch copies none."""
    memo = {} if memo is None else memo
    for part in () if module is None else module.modules():
        for leaf in tree_leaves(vars(part)):
            if isinstance(leaf, torch.Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(module, memo)


def without_hooks(module: nn.Module) -> nn.Module:
    """The module, whose hooks are taken away."""
    for hooks in HOOKS:
        getattr(module, hooks).clear()
    return module


class Calls:
    """The calls of modules that the engine would go past, to be looked at in each pass.

    Args:
        modules: The modules; lists of modules among them do not count, nobody calls them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        called = [m for m in modules if not isinstance(m, (nn.ModuleList, torch.jit.ScriptModule))]
        self._hooks = [hooks for m in called for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._instances = [vars(m) for m in called]

    def any_altered(self) -> bool:
        """One of the calls runs something else than the forward of a class."""
        return bool(self._instances) and (
            bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks) or any(self._hooks)
            or any('forward' in own or '_compiled_call_impl' in own for own in self._instances))
