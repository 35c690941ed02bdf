"""What `binarize` did to each layer."""
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Tuple

from ..recipes import Recipe

__all__ = ['Report', 'ReportRow']

# Layers that no method binarizes: their operations are not counted as missed.
EXEMPT = (
    'first convolution', 'classifier', 'residual downsample', 'linear layer on vectors', 'one-dimensional convolution')


@dataclass(frozen=True)
class ReportRow:
    """What became of one convolution or linear layer.

    Args:
        path: Where the layer stood in the host.
        kind: Class name of the host's layer.
        status: 'binarized' (weights and inputs; also as several bases, or with ternary inputs), 'binary inputs',
            'binary weights' or 'ternary weights' (only these), 'real' (in a unit, but float), 'omitted' (left out, its
            link stands alone), 'removed' (with the shortcut that it was on), 'kept' (float, outside any unit).
        reason: Why, where it was not binarized or got no link.
        role: Its role (`recipes.ROLES`), None if kept.
        link: What goes around it: 'identity', 'squeeze', 'expand', 'host shortcut', or None.
        scale_input: True if it has K.
        norm: Path of the norm that was paired with it.
        act: What became of its activation: 'dropped', 'in branch', 'replaced' (by a learned one of the recipe's),
            'kept', or None where it has none.
        params: Number of its weights.
        macs: Its multiply-accumulates for one image; None if they could not be counted, 0 if it does not run in eval
            mode.
        possible: False if it was kept because it could not be done, which `strict=True` makes an error.
    """
    path: str
    kind: str
    status: str
    reason: str = ''
    role: Optional[str] = None
    link: Optional[str] = None
    scale_input: bool = False
    norm: Optional[str] = None
    act: Optional[str] = None
    params: int = 0
    macs: Optional[int] = None
    possible: bool = True

    @property
    def stays(self) -> bool:
        """False if the layer is no longer there."""
        return self.status not in ('omitted', 'removed')


@dataclass
class Report:
    """What `binarize` did. Prints as a table; `to_dict` gives the data.

    Args:
        recipe: The recipe in use.
        rows: One row for each convolution and linear layer.
        notes: What does not belong to one layer.
        moved: Where the host's modules went, old path to new path, '' for those that are gone.
        input_size: (channels, height, width) of the image for which operations were counted, None if they were not.
        keep: What the caller asked to keep float.
        revived: Units that got a norm because their sign was the same almost everywhere.
        hopeless: Units whose layer stays float because its input does not vary.
    """
    recipe: Recipe
    rows: List[ReportRow] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    moved: Dict[str, str] = field(default_factory=dict)
    input_size: Optional[Tuple[int, int, int]] = None
    keep: Tuple[str, ...] = ()
    revived: Tuple[str, ...] = ()
    hopeless: Tuple[str, ...] = ()

    def plan(self) -> Dict[str, Any]:
        """What `binarize` needs, beside the host, to build the same network again (`like`), as plain data."""
        return {
            'recipe': self.recipe.to_dict(), 'keep': list(self.keep), 'revived': list(self.revived),
            'hopeless': list(self.hopeless), 'input_size': list(self.input_size) if self.input_size else None}

    def count(self, status: str) -> int:
        """Number of layers with a status."""
        return sum(row.status == status for row in self.rows)

    @property
    def binarized_share(self) -> float:
        """Share of the weights of all convolutions and linear layers that are binary, with binary inputs, 0 to 1."""
        total = sum(row.params for row in self.rows if row.stays)
        return sum(row.params for row in self.rows if row.status == 'binarized') / max(total, 1)

    @property
    def macs_share(self) -> Optional[float]:
        """Share of the multiply-accumulates of all layers that are binary, 0 to 1; None if they were not counted."""
        return self._macs_share(exempt=())

    @property
    def eligible_macs_share(self) -> Optional[float]:
        """The same among layers that are neither first convolution, classifier, residual downsample nor on vectors."""
        return self._macs_share(EXEMPT)

    def _macs_share(self, exempt: Tuple[str, ...]) -> Optional[float]:
        rows = [row for row in self.rows if row.stays and not (row.status == 'kept' and row.reason in exempt)]
        if self.input_size is None:
            return None
        return sum(row.macs for row in rows if row.status == 'binarized') / max(sum(row.macs for row in rows), 1)

    def to_dict(self) -> Dict[str, Any]:
        """Plain data for JSON."""
        return {
            'recipe': self.recipe.to_dict(),
            'input_size': list(self.input_size) if self.input_size else None,
            'total': {
                'layers': len(self.rows), 'binarized': self.count('binarized'),
                'binarized_share': self.binarized_share, 'macs_share': self.macs_share,
                'eligible_macs_share': self.eligible_macs_share},
            'rows': [asdict(row) for row in self.rows], 'notes': list(self.notes), 'moved': dict(self.moved)}

    def __str__(self) -> str:
        width = max([len(row.path) for row in self.rows] + [5])
        norms = max([len(row.norm or '') for row in self.rows] + [4])
        lines = [
            f'{"layer":{width}} {"role":10} {"status":15} {"link":14} {"K":1} {"act":9} {"norm":{norms}} '
            f'{"weights":>11} {"MACs":>14}  reason']
        for row in self.rows:
            macs = '-' if row.macs is None else f'{row.macs:,}'
            lines.append(
                f'{row.path:{width}} {row.role or "-":10} {row.status:15} {row.link or "-":14} '
                f'{"K" if row.scale_input else "-":1} {row.act or "-":9} {row.norm or "-":{norms}} '
                f'{row.params:>11,} {macs:>14}  {row.reason}'.rstrip())
        total = (
            f'recipe {self.recipe.name}: {self.count("binarized")} of {len(self.rows)} layers binarized, '
            f'{100 * self.binarized_share:.1f} % of their weights')
        if self.input_size is not None:
            total += (
                f', {100 * self.macs_share:.1f} % of their MACs at {"x".join(map(str, self.input_size))} '
                f'({100 * self.eligible_macs_share:.1f} % without first convolution, classifier and downsampling)')
        return '\n'.join([*lines, total, *self.notes])
