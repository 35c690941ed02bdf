"""Blocks of the host that are nothing but units in a row, run as one operator."""
import inspect
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from . import ops
from .modules import Chained, DeployedUnit

__all__ = ['DeployedBlock', 'join_units']


class DeployedBlock(Chained):
    """A block of the host that is nothing but units in a row, and perhaps a shortcut around them: one operator.

    unit3(unit2(unit1(x))) + shortcut(x). What lies between the units never leaves the cache.

    Args:
        block: The host's block, deployed; its children keep their names.
        units: Names of the units, in order.
        shortcut: None if nothing is added, '' if x itself is, or the name of the module that makes it of x.
    """

    def __init__(self, block: nn.Module, units: Sequence[str], shortcut: Optional[str]) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in block.__dict__.items() if k not in self.__dict__})
        for name, child in block.named_children():
            self.add_module(name, child)
        self.row, self.row_shortcut = tuple(units), shortcut  # names that no child of a host's block has

    @property
    def path(self) -> str:
        """Where it starts, for errors."""
        return self.get_submodule(self.row[0]).path

    def layers(self) -> List[ops.Layer]:
        return [layer for name in self.row for layer in self.get_submodule(name).layers()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = None
        if self.row_shortcut is not None:
            added = self.get_submodule(self.row_shortcut)(x) if self.row_shortcut else x
        return self.chain()(x, added)

    def __iter__(self):
        """Its children, where the host's block was a `Sequential`."""
        return iter(self.children())

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, i):
        return list(self.children())[i]

    def extra_repr(self) -> str:
        return f'units={self.row}, shortcut={self.row_shortcut!r}'


def _as_row(block: nn.Module) -> Optional[nn.Module]:
    """A `DeployedBlock` that gives what the block gives, bit for bit, None if there is none. Found out by a trial."""
    units = {m: name for name, m in block.named_modules() if isinstance(m, DeployedUnit)}
    if not 2 <= len(units) <= ops.MOST_LAYERS or any(not m.layers() for m in units) or _hooked(block):
        return None
    if len(inspect.signature(block.forward).parameters) != 1:  # the host may pass it more than x
        return None
    calls: List[Tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
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
    names = {m: name for name, m in block.named_children()}
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


def join_units(model: nn.Module) -> None:
    """Put a `DeployedBlock` in place of each block that is a row of units."""
    for name, child in list(model.named_children()):
        if isinstance(child, DeployedUnit):
            continue
        fused = _as_row(child)
        if fused is None:
            join_units(child)
        else:
            setattr(model, name, fused)
