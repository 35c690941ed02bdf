"""Summary of any network: bits, bytes and operations, layer by layer.

OPs follow Bi-Real Net and ReActNet: OPs = float MACs + binary MACs / 64, one MAC counted once, convolutions and linear
layers only. The links' own operations, one fused multiply-add for each value that a link adds, have a column of their
own.
"""
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn as nn

from .dry_run import own_input_size, run_layers
from .layers import BinaryConv2d, BinaryLinear, BinaryUnit, check_own_tensors, check_unwrapped
from .layers.checks import check_latent
from .tables import table

BINARY_MACS_PER_OP = 64


@dataclass(frozen=True)
class LayerSummary:
    """One convolution, linear layer, link or other holder of parameters, for one image.

    Args:
        path: Module path.
        kind: Class name.
        output: Shape of its output without the batch axis; None if it did not run.
        bit_params: Parameters that are stored in one bit, or a few (`weight_bits`).
        real_params: Parameters that are stored in 32 bits.
        binary_macs: Multiply-accumulates of a binary input with a binary weight; where operands are made of several
            bases or ternary, which takes two, those of each pair of them.
        real_macs: All other multiply-accumulates.
        link_ops: Values that a link gives to its unit's output.
        weight_bits: Bits of each of `bit_params`: 1, 2 for ternary weights, one a base.
    """
    path: str
    kind: str
    output: tuple[int, ...] | None
    bit_params: int = 0
    real_params: int = 0
    binary_macs: int = 0
    real_macs: int = 0
    link_ops: int = 0
    weight_bits: int = 0

    @property
    def bits(self) -> int:
        """Size of the parameters in bits."""
        return self.weight_bits * self.bit_params + 32 * self.real_params


def _total(name: str, doc: str) -> property:
    """Return a property of a summary, the sum of an attribute of its layers."""
    return property(lambda summary: sum(getattr(layer, name) for layer in summary.layers), doc=doc)


@dataclass(frozen=True)
class Summary:
    """Layers and totals. Prints as a table; `to_dict` gives the same as data."""
    input_size: tuple[int, int, int]
    layers: tuple[LayerSummary, ...]

    bit_params = _total('bit_params', 'Parameters stored in one bit, or a few.')
    real_params = _total('real_params', 'Parameters stored in 32 bits.')
    binary_macs = _total('binary_macs', 'Multiply-accumulates of binary inputs with binary weights.')
    real_macs = _total('real_macs', 'All other multiply-accumulates of convolutions and linear layers.')
    link_ops = _total('link_ops', 'Values that links add.')
    bits = _total('bits', 'Size of the parameters in bits.')

    @property
    def params(self) -> int:
        """Number of all parameters."""
        return self.bit_params + self.real_params

    @property
    def mbit(self) -> float:
        """Size of the parameters in 10^6 bits: one bit per binary weight and base, 32 per other parameter."""
        return self.bits / 1e6

    @property
    def ops(self) -> float:
        """real_macs + binary_macs / 64."""
        return self.real_macs + self.binary_macs / BINARY_MACS_PER_OP

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        totals = ('params', 'bit_params', 'real_params', 'mbit', 'binary_macs', 'real_macs', 'ops', 'link_ops')
        return {
            'input_size': list(self.input_size), 'total': {name: getattr(self, name) for name in totals},
            'layers': [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        counts = ('bit_params', 'real_params', 'binary_macs', 'real_macs', 'link_ops')
        rows = [(layer.path, layer.kind, layer.output and 'x'.join(map(str, layer.output)), layer)
                for layer in self.layers]
        lines = [table(
            ('layer', 'kind', 'output', '1-bit params', '32-bit params', 'binary MACs', 'float MACs', 'link ops'),
            [(path, kind, output, *(f'{getattr(row, name):,}' for name in counts))
             for path, kind, output, row in [*rows, ('total', '', '', self)]], '<<>')]
        size = 'x'.join(map(str, self.input_size))
        lines.append(
            f'{size} input: {self.ops / 1e6:.1f} M OPs ({self.real_macs / 1e6:.1f} M float MACs + '
            f'{self.binary_macs / 1e6:.1f} M binary MACs / {BINARY_MACS_PER_OP}), '
            f'{self.link_ops / 1e6:.2f} M link ops; {self.params:,} parameters in {self.mbit:.1f} Mbit '
            f'({self.mbit / 8:.2f} MB, {self.params * 32 / 1e6 / max(self.mbit, 1e-9):.1f}x smaller than float)')
        return '\n'.join(lines)


def summarize(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Summary:
    """Count bits, bytes and operations of a network for one image. The model is not changed and nothing is computed.

    Operations are counted in convolutions and linear layers; attention's own products are not.

    Args:
        model: Any network; binarized or not.
        input_size: (channels, height, width); the model's own `default_cfg` if None, else (3, 224, 224).

    Raises:
        TypeError: `model` is not a module.
        ValueError: `input_size` is not three positive integers, or none that the model takes; the model is deployed, or
            scripted, compiled or wrapped; or a binary weight is computed in each pass (pruned, normed or parametrized),
            so that its parameters are other ones.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: found a {type(model).__name__}, expected a torch.nn.Module')
    if input_size is None:
        input_size = own_input_size(model)
    input_size = tuple(input_size) if isinstance(input_size, (tuple, list)) else (input_size,)
    if len(input_size) != 3 or any(not isinstance(n, int) or isinstance(n, bool) or n <= 0 for n in input_size):
        raise ValueError(f'input_size: found {input_size}, expected (channels, height, width)')
    check_unwrapped(model, 'summarize', parts=True)
    check_latent(model, 'summarize')
    paths = {module: path for path, module in model.named_modules()}
    for module, path in paths.items():
        if isinstance(module, (BinaryConv2d, BinaryLinear)):
            check_own_tensors(module, path)
    links = {f'{p}.link' if p else 'link' for m, p in paths.items()
             if isinstance(m, BinaryUnit) and m.link is not None}
    try:
        runs = run_layers(model, input_size, links)
    except (RuntimeError, ValueError) as e:
        raise ValueError(f'input_size: found {input_size}, on which the network does not run ({e})') from e

    layers: list[LayerSummary] = []
    seen = set()
    for module, path in paths.items():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        real_params, bit_params = sum(p.numel() for p in own), 0
        run = runs.get(path)
        macs = run.macs if run else 0
        kind = dict(binary_macs=0, real_macs=macs, link_ops=0)
        if isinstance(module, (BinaryConv2d, BinaryLinear)):
            if module.weight_bits and any(p is module.weight for p in own):
                bit_params = module.weight.numel()
                kind['weight_bits'] = module.weight_bits
            if module.binary_products:
                kind.update(binary_macs=macs * module.binary_products, real_macs=0)
        elif path in links:
            kind = dict(binary_macs=0, real_macs=0, link_ops=macs)
        if real_params or run:
            layers.append(LayerSummary(
                path, type(module).__name__, run.output[1:] if run else None, bit_params, real_params - bit_params,
                **kind))
    return Summary(input_size, tuple(layers))
