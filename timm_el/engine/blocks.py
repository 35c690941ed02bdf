"""Blocks and stages of the host that are nothing but layers in a row and shortcuts around them, run as one operator."""
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn as nn

from . import operators as ops
from .calls import is_altered
from .epilogue import drops
from .modules import Chained, DeployedUnit

__all__ = ['DeployedBlock', 'DeployedStage', 'join_layers']


class _Joined(Chained):
    """Several modules that run as one operator, unless calls of what is inside have to be made."""

    @property
    def path(self) -> str:
        """Where it starts, for errors."""
        return next(m.path for m in self.modules() if isinstance(m, Chained) and m is not self)

    def _run(self, x: torch.Tensor, one_by_one: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        chain = self.as_chain()
        if chain is None:
            return one_by_one(x)
        return chain(x, self._other(x)) if chain.takes_other else chain(x)

    def _other(self, x: torch.Tensor) -> torch.Tensor | None:
        return None


class DeployedStage(_Joined, nn.Sequential):
    """A `Sequential` of the host, deployed: one operator if all its modules are layers in a row or do nothing.

    What lies between them never leaves the cache. It is a `Sequential` in every other respect: it may be sliced,
    appended to, and its modules exchanged.
    """

    def as_layers(self) -> list[ops.Layer]:
        return layers_of(self, of_stage=True) or []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(x, super().forward)


class DeployedBlock(_Joined):
    """A block of the host that is nothing but layers in a row, and perhaps a shortcut around them: one operator.

    part3(part2(part1(x))) + shortcut(x). A part is a unit, a convolution, a pool, or another such block.

    Args:
        block: The host's block, deployed; it shares its modules with this one.
        parts: Names of the parts, in order.
        shortcut: None if nothing is added, '' if x itself is, or the name of the module that makes it of x.
    """
    row: tuple[str, ...] = ()
    row_shortcut: str | None = None

    def __init__(self, block: nn.Module, parts: Sequence[str], shortcut: str | None = None) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in block.__dict__.items() if k not in self.__dict__})
        self.__dict__['_modules'] = block._modules
        self.__dict__['_block'] = block  # no child: its forward, for who wants to see what lies between
        self.row, self.row_shortcut = tuple(parts), shortcut

    def as_layers(self) -> list[ops.Layer]:
        rows = [layers_of(self.get_submodule(name)) for name in self.row]
        if any(row is None for row in rows):
            return []
        row = ops.in_row(*rows)
        if self.row_shortcut is None:
            return row
        shortcut = layers_of(self.get_submodule(self.row_shortcut)) if self.row_shortcut else []
        if row[-1].added >= 0 or row[-1].is_pool:
            return []  # two sums in one layer, or a sum in a pool
        if shortcut is None:
            added = 1
        else:  # before the layer that adds it, so that it is still in cache
            before, last = row[:-1], row[-1]
            shortcut = [layer.moved(0, len(before)) for layer in shortcut]
            added = len(before) + len(shortcut) - 1 + ops.FIRST_VALUE if shortcut else 0
            row = [*before, *shortcut, last]
        return [*row[:-1], row[-1]._replace(added=added)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(x, self._block)

    def _other(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.row_shortcut)(x)

    def extra_repr(self) -> str:
        return f'row={self.row}, shortcut={self.row_shortcut!r}'


def layers_of(module: nn.Module, of_stage: bool = False) -> list[ops.Layer] | None:
    """The layers of a module, none if it does nothing; None if it is not a row of layers."""
    if drops(module):
        return []
    if isinstance(module, Chained) and not of_stage:
        layers = module.as_layers() if module.joins else []
        return layers if layers and not any(layer.added == 1 for layer in layers) else None
    if type(module) not in (nn.Sequential, DeployedStage):
        return None
    parts = [layers_of(child) for child in module._modules.values()]  # a module may stand in it twice
    return None if any(part is None for part in parts) else ops.in_row(*parts)


def _joined(block: nn.Module) -> nn.Module | None:
    """What gives what the block gives, bit for bit, as one operator; None if there is nothing."""
    if any(map(is_altered, block.modules())) or any(hasattr(DeployedBlock, name) for name in block._modules):
        return None
    if type(block) is not nn.Sequential:
        return _by_trial(block)
    layers = layers_of(block)
    if not layers or len(layers) < 2 or all(layer.is_pool for layer in layers):
        return None
    stage = DeployedStage()
    stage.__dict__.update({**block.__dict__, **{k: v for k, v in stage.__dict__.items() if k not in block.__dict__}})
    return stage


def _outermost(module: nn.Module, prefix: str = '') -> Iterator[tuple[str, Chained]]:
    for name, child in module.named_children():
        if isinstance(child, Chained):
            yield prefix + name, child
        else:
            yield from _outermost(child, f'{prefix}{name}.')


def _by_trial(block: nn.Module) -> DeployedBlock | None:
    """Found out by watching batches of images pass."""
    parts = {m: name for name, m in _outermost(block)}
    units = {m: name for m, name in parts.items() if any(isinstance(n, DeployedUnit) for n in m.modules())}
    if not units or len(parts) < 2 or any(not layers_of(m) for m in units):
        return None
    if len(inspect.signature(block.forward).parameters) != 1:  # the host may pass it more than x
        return None
    own = (*block._parameters.values(), *block._buffers.values())
    if any(tensor is not None for tensor in own):  # what it does with them may not show, at their values of now
        return None
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
    handles = [m.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out)))
               for m in block.modules() if m is not block]
    generator = torch.Generator('cpu').manual_seed(0)
    channels = next(n.in_channels for m in units for n in m.modules() if isinstance(n, DeployedUnit))
    kind = dict(generator=generator, dtype=torch.float32, device='cpu')
    x, *others = (scale * torch.randn(n, channels, *size, **kind)
                  for scale, n, size in ((1, 2, (9, 9)), (3, 1, (8, 12)), (2, 1, (23, 17))))
    before = x.clone()
    try:
        with torch.no_grad():
            expected = [block(x)]
            watched = len(calls)
            expected += [block(other.clone()) for other in others]
    except Exception:  # it wants something else than an image
        return None
    finally:
        for handle in handles:
            handle.remove()
    if not all(isinstance(y, torch.Tensor) for y in expected) or not torch.equal(x, before):
        return None  # it gives more than one tensor, or changes its input in place
    calls = calls[:watched]
    row = [(m, source, out) for m, source, out in calls if m in units]
    if [m for m, _, _ in row] != list(dict.fromkeys(m for m, _, _ in row)) or len(row) != len(units):
        return None
    if row[0][1] is not x or any(b[1] is not a[2] for a, b in zip(row, row[1:])):
        return None
    names: dict[nn.Module, str] = {m: name for name, m in block.named_children()}
    inside = {id(n) for m in units for n in m.modules()}
    shortcuts: list[str | None] = [None, '']
    shortcuts += [names[m] for m, source, _ in calls if source is x and m in names and id(m) not in inside]
    for shortcut in shortcuts:
        joined = DeployedBlock(block, [units[m] for m, _, _ in row], shortcut)
        if not joined.as_layers():
            continue
        try:
            with torch.no_grad():
                found = [joined(image.clone()) for image in (x, *others)]
        except ValueError:  # the shapes do not fit, or it is too much for one operator
            continue
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected)):
            return joined.eval()
    return None


def join_layers(model: nn.Module, done: dict[nn.Module, nn.Module] | None = None) -> None:
    """Put a `DeployedBlock` or `DeployedStage` in place of each block, and of each stage, that is a row of layers."""
    done = {} if done is None else done
    for name, child in list(model._modules.items()):
        if child is None or isinstance(child, (Chained, torch.jit.ScriptModule)):
            continue
        if child not in done:
            join_layers(child, done)
            done[child] = _joined(child) or child
        model._modules[name] = done[child]
