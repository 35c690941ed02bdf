"""Recording: one run of a network, as the list of operators and module calls that it made."""
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import copied, without_hooks

__all__ = ['Call', 'Op', 'Recording', 'record', 'shadow_of']


@dataclass(eq=False)
class Op:
    """One operator that ran: torch's, or one of the engine's."""
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


@dataclass(eq=False)
class Call:
    """One call of a module: its operators are those from `first` to before `last`."""
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    first: int
    parent: 'Call | None'
    out: Any = None
    last: int = -1


@dataclass(eq=False)
class Recording:
    """One run: the tensor that went in, what came out, and everything in between, in order."""
    x: torch.Tensor
    out: Any = None
    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


class _Recorder(TorchDispatchMode):
    def __init__(self, ops: list[Op]) -> None:
        super().__init__()
        self._ops = ops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._ops.append(Op(func, args, kwargs or {}, out))  # keeps the tensors: an id must not be used twice
        return out


def shadow_of(network: nn.Module) -> nn.Module:
    """Return a copy of a network that shares its tensors and has no hooks, to be recorded while others use it."""
    memo: dict[int, Any] = {
        id(value): value for m in network.modules()
        for values in (m._parameters, m._buffers, vars(m)) for value in values.values()
        if isinstance(value, torch.Tensor)}
    shadow = copied(network, memo)
    for module in shadow.modules():
        without_hooks(module)
    return shadow


def record(shadow: nn.Module, run: Callable[[nn.Module, torch.Tensor], Any], x: torch.Tensor) -> Recording:
    """Run a network once and return what it did; its buffers are what they were before.

    Args:
        shadow: The network, from `shadow_of`.
        run: Calls the network on an image.
        x: Images (N, C, H, W).

    Raises:
        Exception: Whatever the network raises.
    """
    recording, stack, thread = Recording(x), [], threading.get_ident()
    paths = {module: path for path, module in shadow.named_modules()}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            call = Call(paths[module], args, kwargs, len(recording.ops), stack[-1] if stack else None)
            recording.calls.append(call)
            stack.append(call)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if threading.get_ident() == thread:
            call = stack.pop()
            call.out, call.last = out, len(recording.ops)

    buffers = [(buffer, buffer.clone()) for buffer in shadow.buffers() if not buffer.is_meta]
    handles = []
    for module, path in paths.items():
        if path and not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with torch.no_grad(), _Recorder(recording.ops):
            recording.out = run(shadow, x)
    finally:
        for handle in handles:
            handle.remove()
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
    return recording
