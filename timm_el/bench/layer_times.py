"""Times of the layers of a net, beside their operations."""
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn as nn

from ..summary import LayerSummary, summarize

# Modules of these packages are one layer each, whatever they contain: BinaryUnit, and what stands for it when deployed.
WHOLE = ('timm_el.layers', 'timm_el.engine')
# Word in the class name -> kind, for layers without multiply-accumulates.
KINDS = {'norm': 'norm', 'pool': 'pooling'}


@dataclass(frozen=True)
class LayerTime:
    """One layer of a net in one forward pass.

    Args:
        path: Module path.
        kind: 'binary conv', 'binary linear', 'float conv', 'linear', 'norm', 'pooling' or 'other'.
        ms: Median milliseconds, all calls of one forward pass together.
        binary_macs: Binary multiply-accumulates of the whole batch.
        real_macs: All other multiply-accumulates of the whole batch.
    """
    path: str
    kind: str
    ms: float
    binary_macs: int
    real_macs: int

    @property
    def macs_per_s(self) -> float:
        """Multiply-accumulates of both sorts per second; 0 if there are none."""
        return (self.binary_macs + self.real_macs) / max(self.ms * 1e-3, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), 'macs_per_s': self.macs_per_s}


def timed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules to time by path: those without children and the outermost of `WHOLE`, but no identities."""
    found: dict[str, nn.Module] = {}

    def visit(path: str, module: nn.Module) -> None:
        children = list(module.named_children())
        if path and (not children or type(module).__module__.startswith(WHOLE)):
            if not isinstance(module, nn.Identity):
                found[path] = module
            return
        for name, child in children:
            visit(f'{path}.{name}' if path else name, child)

    visit('', model)
    return found


@torch.inference_mode()
def layer_times(model: nn.Module, x: torch.Tensor, repeats: int = 20) -> tuple[dict[str, float], float]:
    """Time the layers of a net by forward hooks, which add a few microseconds to each.

    Args:
        model: Any network in eval mode.
        x: Images (N, C, H, W).
        repeats: Forward passes that count; one before them does not.

    Returns:
        Median milliseconds by path, in the order of the modules, and of the whole forward pass.
    """
    modules = timed_modules(model)
    paths = {module: path for path, module in reversed(modules.items())}  # a module used twice has one path, its first
    samples: dict[str, list[float]] = {path: [] for path in paths.values()}
    current: dict[str, float] = {}
    started: dict[str, float] = {}

    def before(module: nn.Module, args: Any) -> None:
        started[paths[module]] = time.perf_counter()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        path = paths[module]
        current[path] = current.get(path, 0.) + time.perf_counter() - started[path]

    handles = [h for m in paths for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    whole: list[float] = []
    try:
        for i in range(repeats + 1):
            current.clear()
            start = time.perf_counter()
            model(x)
            if i:
                whole.append(time.perf_counter() - start)
                for path, seconds in current.items():
                    samples[path].append(seconds)
    finally:
        for handle in handles:
            handle.remove()
    ms = {path: 1e3 * statistics.median(samples[path]) for path in modules if samples.get(path)}
    return ms, 1e3 * statistics.median(whole)


def layer_table(model: nn.Module, counted: nn.Module, x: torch.Tensor, repeats: int = 20) -> dict[str, Any]:
    """Return the layers of `model` with their times, and with the operations of `counted` at or below the same paths.

    Args:
        model: The net to time, such as a deployed one.
        counted: The net whose operations count, such as its latent original.
        x: Input (N, C, H, W).
        repeats: As for `layer_times`.

    Returns:
        'layers' (`LayerTime.to_dict`), 'kinds' (per kind: ms, share of the whole, binary_macs, real_macs, macs_per_s;
        'host' is what no layer accounts for: the host's own forward, additions, Python) and 'whole_ms'.
    """
    ms, whole = layer_times(model, x, repeats)
    operations = summarize(counted, tuple(x.shape[1:])).layers
    modules = timed_modules(model)
    rows = [_layer(path, modules[path], time_, operations, len(x)) for path, time_ in ms.items()]
    kinds = {kind: _total_of(kind, [row for row in rows if row.kind == kind], whole)
             for kind in dict.fromkeys(row.kind for row in rows)}
    rest = LayerTime('', 'host', whole - sum(row.ms for row in rows), 0, 0)
    kinds['host'] = _total_of('host', [rest], whole)
    return {'layers': [row.to_dict() for row in rows], 'kinds': kinds, 'whole_ms': whole}


def _total_of(kind: str, rows: list[LayerTime], whole: float) -> dict[str, float]:
    ms, binary, real = (sum(getattr(row, name) for row in rows) for name in ('ms', 'binary_macs', 'real_macs'))
    total = LayerTime('', kind, ms, binary, real)
    return {'ms': ms, 'share': ms / whole, 'binary_macs': binary, 'real_macs': real, 'macs_per_s': total.macs_per_s}


def _layer(path: str, module: nn.Module, ms: float, operations: tuple[LayerSummary, ...], batch: int) -> LayerTime:
    inside = [row for row in operations if row.path == path or row.path.startswith(path + '.')]
    binary, real = (batch * sum(getattr(row, name) for row in inside) for name in ('binary_macs', 'real_macs'))
    linear = any('Linear' in row.kind for row in inside)
    if binary:
        kind = 'binary linear' if linear else 'binary conv'
    elif real:
        kind = 'linear' if linear else 'float conv'
    else:
        name = type(module).__name__.lower()
        kind = next((kind for word, kind in KINDS.items() if word in name), 'other')
    return LayerTime(path, kind, ms, binary, real)
