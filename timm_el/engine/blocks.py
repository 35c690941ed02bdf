"""Blocks and stages of the host that are nothing but layers in a row and shortcuts around them, run as one operator."""
import inspect
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from . import ops
from .fusion import drops
from .modules import Chained, DeployedUnit

__all__ = ['DeployedBlock', 'join_layers']


class DeployedBlock(Chained):
    """A block of the host that is nothing but layers in a row, and perhaps a shortcut around them: one operator.

    part3(part2(part1(x))) + shortcut(x). What lies between the parts never leaves the cache. A part is a unit, a
    convolution, a pool, or another such block.

    Args:
        block: The host's block, deployed; its children keep their names.
        parts: Names of the parts, in order.
        shortcut: None if nothing is added, '' if x itself is, or the name of the module that makes it of x.
    """
    _hooked: Optional[List[Dict[int, Any]]] = None

    def __init__(self, block: nn.Module, parts: Sequence[str], shortcut: Optional[str] = None) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in block.__dict__.items() if k not in self.__dict__})
        for name, child in block.named_children():
            self.add_module(name, child)
        self.row, self.row_shortcut = tuple(parts), shortcut  # names that no child of a host's block has

    @property
    def path(self) -> str:
        """Where it starts, for errors."""
        return self._first().path

    @property
    def in_channels(self) -> int:
        """Channels of x."""
        return self._first().in_channels

    def _first(self) -> Chained:
        return next(m for m in self.get_submodule(self.row[0]).modules() if isinstance(m, Chained))

    def layers(self) -> List[ops.Layer]:
        rows = [layers_of(self.get_submodule(name)) for name in self.row]
        if any(row is None for row in rows):
            return []
        row = ops.in_row(*rows)
        if self.row_shortcut is None:
            return row
        shortcut = layers_of(self.get_submodule(self.row_shortcut)) if self.row_shortcut else []
        if row[-1].added >= 0:
            return []  # two sums in one layer
        if shortcut is None:
            added = 1
        else:  # before the layer that adds it, so that it is still in cache
            before, last = row[:-1], row[-1]
            shortcut = [layer.moved(0, len(before)) for layer in shortcut]
            added = len(before) + len(shortcut) - 1 + ops.FIRST_VALUE if shortcut else 0
            row = [*before, *shortcut, last]
        return [*row[:-1], row[-1]._replace(added=added)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(self._hooks()):
            return self._one_by_one(x)
        chain = self.chain()
        return chain(x, self.get_submodule(self.row_shortcut)(x)) if chain.takes_other else chain(x)

    def _hooks(self) -> List[Dict[int, Any]]:
        """Where hooks on what runs inside would be."""
        if self._hooked is None:
            self._hooked = [hooks for m in self.modules() if m is not self
                            for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        return self._hooked

    def _one_by_one(self, x: torch.Tensor) -> torch.Tensor:
        """The same bits, for hooks that want to see what lies between."""
        y = x
        for name in self.row:
            y = self.get_submodule(name)(y)
        if self.row_shortcut is None:
            return y
        return y + (self.get_submodule(self.row_shortcut)(x) if self.row_shortcut else x)

    def __getstate__(self) -> Dict[str, Any]:
        return {**super().__getstate__(), '_hooked': None}

    def __iter__(self):
        """Its children, where the host's block was a `Sequential`."""
        return iter(self.children())

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, i):
        return list(self.children())[i]

    def extra_repr(self) -> str:
        return f'row={self.row}, shortcut={self.row_shortcut!r}'


def layers_of(module: nn.Module) -> Optional[List[ops.Layer]]:
    """The layers of a module, none if it does nothing; None if it is not a row of layers."""
    if drops(module):
        return []
    if isinstance(module, Chained):
        layers = module.layers() if module.joins else []
        return layers if layers and not any(layer.added == 1 for layer in layers) else None
    if type(module).forward is not nn.Sequential.forward:
        return None
    parts = [layers_of(child) for child in module.children()]
    return None if any(part is None for part in parts) else ops.in_row(*parts)


def _outermost(module: nn.Module, prefix: str = '') -> Iterator[Tuple[str, Chained]]:
    for name, child in module.named_children():
        if isinstance(child, Chained):
            yield prefix + name, child
        else:
            yield from _outermost(child, f'{prefix}{name}.')


def _as_row(block: nn.Module) -> Optional[DeployedBlock]:
    """A `DeployedBlock` that gives what the block gives, bit for bit, None if there is none."""
    if _hooked(block):
        return None
    if type(block).forward is nn.Sequential.forward:
        parts = [(name, child, layers_of(child)) for name, child in block.named_children()]
        if any(layers is None for _, _, layers in parts) or sum(len(layers) for _, _, layers in parts) < 2:
            return None
        return DeployedBlock(block, [name for name, child, layers in parts if layers]).eval()
    return _by_trial(block)


def _by_trial(block: nn.Module) -> Optional[DeployedBlock]:
    """Found out by watching two batches of images pass."""
    parts = {m: name for name, m in _outermost(block)}
    units = {m: name for m, name in parts.items() if any(isinstance(n, DeployedUnit) for n in m.modules())}
    if not units or len(parts) < 2 or any(not layers_of(m) for m in units):
        return None
    if len(inspect.signature(block.forward).parameters) != 1:  # the host may pass it more than x
        return None
    calls: List[Tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    handles = [m.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out, out.clone())))
               for m in block.modules() if m is not block]
    generator = torch.Generator().manual_seed(0)
    channels = next(iter(units)).in_channels
    images = torch.randn(2, channels, 9, 9, generator=generator)
    other = 3 * torch.randn(1, channels, 8, 12, generator=generator)
    x = images.clone()
    try:
        with torch.no_grad():
            expected = block(x)
            expected_other = block(other.clone())
    except Exception:  # it wants something else than an image
        return None
    finally:
        for handle in handles:
            handle.remove()
    if not torch.equal(x, images):  # it changes its input in place
        return None
    calls = calls[:len(calls) // 2]  # those of the first batch
    row = [(m, source, out) for m, source, out, _ in calls if m in units]
    if [m for m, _, _ in row] != list(dict.fromkeys(m for m, _, _ in row)) or len(row) != len(units):
        return None
    if row[0][1] is not x or any(b[1] is not a[2] for a, b in zip(row, row[1:])):
        return None
    names: Dict[nn.Module, str] = {m: name for name, m in block.named_children()}
    inside = {id(n) for m in units for n in m.modules()}
    shortcuts: List[Optional[str]] = [None, '']
    shortcuts += [names[m] for m, source, _, _ in calls if source is x and m in names and id(m) not in inside]
    for shortcut in shortcuts:
        fused = DeployedBlock(block, [units[m] for m, _, _ in row], shortcut)
        try:
            with torch.no_grad():
                found, found_other = fused(images.clone()), fused(other.clone())
        except ValueError:  # the shapes do not fit
            continue
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in (
                (found, expected), (found_other, expected_other))):
            return fused.eval()
    return None


def _hooked(block: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def join_layers(model: nn.Module) -> None:
    """Put a `DeployedBlock` in place of each block, and of each stage of blocks, that is a row of layers."""
    for name, child in list(model.named_children()):
        if isinstance(child, Chained):
            continue
        join_layers(child)
        fused = _as_row(child)
        if fused is not None:
            setattr(model, name, fused)
