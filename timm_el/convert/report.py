"""Report of a conversion, layer by layer, made once from the decisions."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn

from ..dry_run import WEIGHTED, undisturbed
from ..layers import ElasticLink
from ..quantizers import REGISTRY
from ..recipes import Recipe
from ..tables import table
from .build_unit import drops_norm, has_statistics
from .decide import ends_of, splits_shortcut, whys_of
from .edits import Draft
from .sites import EXEMPT, FAILURES, Act, Conv, Convert, Decision, Edit, Keep, Reason, Why


@dataclass(frozen=True)
class ReportRow:
    """Row of a report: one convolution or linear layer of the host.

    Args:
        path: Path of the layer in the host.
        kind: Class name of the host's layer.
        status: 'binarized' (weights and inputs; also as several bases, or with ternary inputs), 'binary inputs',
            'binary weights' or 'ternary weights' (only these), 'real' (in a unit, but float), 'omitted' (left out, its
            link stands alone), 'removed' (with the shortcut that it was on), 'kept' (float, outside any unit).
        why: Reason why it was not binarized or got no link, None where it was and did.
        role: Its role (`recipes.ROLES`), None if kept.
        link: Kind of its link: 'identity', 'squeeze', 'expand', 'host shortcut', or None.
        scale_input: True if it has K.
        norm: Path of the norm that was paired with it.
        act: Fate of its activation: 'dropped', 'in branch', 'replaced' (by a learned one of the recipe's),
            'kept', or None where it has none.
        params: Number of its weights.
        macs: Its multiply-accumulates for one image; None if they could not be counted, 0 if it does not run in eval
            mode.
    """
    path: str
    kind: str
    status: str
    why: Why | None = None
    role: str | None = None
    link: str | None = None
    scale_input: bool = False
    norm: str | None = None
    act: Act | None = None
    params: int = 0
    macs: int | None = None

    @property
    def reason(self) -> str:
        """Reason why the layer was not binarized or got no link, in words."""
        return '' if self.why is None else str(self.why)

    @property
    def possible(self) -> bool:
        """False if it stays float because it could not be converted, which `strict=True` makes an error."""
        return self.why is None or self.why.reason not in FAILURES

    @property
    def stays(self) -> bool:
        """False if the layer is no longer there."""
        return self.status not in ('omitted', 'removed')

    @property
    def exempt(self) -> bool:
        """True for a layer that no method binarizes."""
        return self.status == 'kept' and self.why.reason in EXEMPT

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        act = None if self.act is None else self.act.value
        facts = {name: getattr(self, name) for name in (
            'path', 'kind', 'status', 'reason', 'role', 'link', 'scale_input', 'norm')}
        return {**facts, 'act': act, 'params': self.params, 'macs': self.macs, 'possible': self.possible}


@dataclass
class Report:
    """Report of a conversion. Prints as a table; `to_dict` gives the data.

    Args:
        recipe: The recipe in use.
        rows: One row for each convolution and linear layer.
        notes: Remarks that belong to no single layer.
        moved: New path of each of the host's modules that moved, by its old path; '' for those that are gone.
        input_size: (channels, height, width) of the image for which operations were counted, None if they were not.
        keep: The caller's keep list.
        revived: Units that got a norm because their sign was the same almost everywhere.
        hopeless: Units whose layer stays float because its input does not vary.
    """
    recipe: Recipe
    rows: list[ReportRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    input_size: tuple[int, int, int] | None = None
    keep: tuple[str, ...] = ()
    revived: tuple[str, ...] = ()
    hopeless: tuple[str, ...] = ()

    def plan(self) -> dict[str, Any]:
        """Return the plain data by which `binarize(like=...)` builds the same network again from the same host."""
        return {
            'recipe': self.recipe.to_dict(), 'keep': list(self.keep), 'revived': list(self.revived),
            'hopeless': list(self.hopeless), 'input_size': list(self.input_size) if self.input_size else None}

    def count(self, status: str) -> int:
        """Return the number of layers with a status."""
        return sum(row.status == status for row in self.rows)

    @property
    def binarized_share(self) -> float:
        """Share of the weights of all convolutions and linear layers that are binary, with binary inputs, 0 to 1."""
        total = sum(row.params for row in self.rows if row.stays)
        return sum(row.params for row in self.rows if row.status == 'binarized') / max(total, 1)

    @property
    def macs_share(self) -> float | None:
        """Share of the multiply-accumulates of all layers that are binary, 0 to 1; None if they were not counted."""
        return self._macs_share(self.rows)

    @property
    def eligible_macs_share(self) -> float | None:
        """Same as `macs_share`, without first convolution, classifier, residual downsample and layers on vectors."""
        return self._macs_share([row for row in self.rows if not row.exempt])

    def _macs_share(self, rows: Sequence[ReportRow]) -> float | None:
        rows = [row for row in rows if row.stays]
        if self.input_size is None:
            return None
        return sum(row.macs for row in rows if row.status == 'binarized') / max(sum(row.macs for row in rows), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            'recipe': self.recipe.to_dict(),
            'input_size': list(self.input_size) if self.input_size else None,
            'total': {
                'layers': len(self.rows), 'binarized': self.count('binarized'),
                'binarized_share': self.binarized_share, 'macs_share': self.macs_share,
                'eligible_macs_share': self.eligible_macs_share},
            'rows': [row.to_dict() for row in self.rows], 'notes': list(self.notes), 'moved': dict(self.moved)}

    def __str__(self) -> str:
        lines = [table(
            ('layer', 'role', 'status', 'link', 'K', 'act', 'norm', 'weights', 'MACs', 'reason'),
            [(row.path, row.role, row.status, row.link, 'K' if row.scale_input else None, row.act, row.norm,
              f'{row.params:,}', None if row.macs is None else f'{row.macs:,}', row.reason) for row in self.rows],
            '<<<<<<<>><')]
        total = (
            f'recipe {self.recipe.name}: {self.count("binarized")} of {len(self.rows)} layers binarized, '
            f'{100 * self.binarized_share:.1f} % of their weights')
        if self.input_size is not None:
            total += (
                f', {100 * self.macs_share:.1f} % of their MACs at {"x".join(map(str, self.input_size))} '
                f'({100 * self.eligible_macs_share:.1f} % without first convolution, classifier and downsampling)')
        return '\n'.join([*lines, total, *self.notes])


# ---------------------------------------------------------------------------------------------------------------------
# Projection of the decisions


def make_report(draft: Draft, revived: Sequence[str] = (), hopeless: Sequence[str] = ()) -> Report:
    """Return the report of a conversion; `revived` and `hopeless` as in `Report`."""
    rows = {row.path: row for row in _rows(draft)}
    converted = any(isinstance(decision, Convert) for decision in draft.decisions)
    notes = [*draft.notes, *(_notes_of_recipe(draft, rows) if converted else ())]
    moved = {edit.path: edit.moved_to for edit in draft.edits.values() if edit.moved_to is not None}
    return Report(
        draft.question.recipe, [rows[path] for path in draft.layers if path in rows], notes, moved,
        draft.question.input_size, tuple(draft.question.keep), tuple(revived), tuple(hopeless))


def _rows(draft: Draft) -> Iterator[ReportRow]:
    """Yield a row for each layer: those of sites, of shortcuts that are gone, and all others."""
    layers, question, edits = draft.layers, draft.question, draft.edits

    def row(path: str, status: str, why: Why | None, **facts: Any) -> ReportRow:
        run = question.runs.get(path)
        macs = (run.macs if run else 0) if question.input_size else None
        with undisturbed(layers[path]):  # a weight that is computed may change buffers
            params = layers[path].weight.numel()
        return ReportRow(path, type(layers[path]).__name__, status, why, params=params, macs=macs, **facts)

    of_sites = {decision.site.path: decision for decision in draft.decisions}
    gone = _gone_shortcuts(draft)
    for path, layer in layers.items():
        if path in of_sites:
            decision = of_sites[path]
            yield row(path, *_facts(decision, edits), role=decision.site.role, act=decision.act,
                      norm=decision.site.norm and decision.site.norm.path, **_link_facts(decision, edits))
        elif path.startswith(gone) and isinstance(layer, nn.Conv2d):
            yield row(path, 'removed', Reason.SHORTCUT_GONE.why())
        elif isinstance(layer, WEIGHTED):
            yield row(path, 'kept', _why_outside(path, draft))


def find_failures(draft: Draft) -> list[tuple[str, Why]]:
    """Return the layers that stay float because they could not be converted, with the reasons."""
    of_sites = {decision.site.path: decision.why for decision in draft.decisions}
    whys = ((path, of_sites[path] if path in of_sites else _why_outside(path, draft)) for path in draft.layers)
    return [(path, why) for path, why in whys if why is not None and why.reason in FAILURES]


def _facts(decision: Decision, edits: dict[str, Edit]) -> tuple[str, Why | None]:
    """Return status and reason of a site's layer."""
    if isinstance(decision, Keep):
        return 'kept', decision.why
    if decision.conv is not Conv.BINARY:
        return ('omitted' if decision.conv is Conv.OMITTED else 'real'), decision.why
    conv = edits[decision.site.path].module.conv
    if conv.binary_products:
        return 'binarized', decision.why
    quantizer, what = (conv.input_quantizer, 'inputs') if conv.input_quantizer else (conv.weight_quantizer, 'weights')
    kinds = {1: 'binary', 2: 'ternary'}
    return f'{kinds.get(REGISTRY[quantizer].bits, quantizer)} {what}', decision.why


def _link_facts(decision: Decision, edits: dict[str, Edit]) -> dict[str, Any]:
    if isinstance(decision, Keep):
        return {}
    link = decision.link
    kind = None if link is None else link.kind if isinstance(link, ElasticLink) else 'host shortcut'
    conv = edits[decision.site.path].module.conv
    return {'link': kind, 'scale_input': bool(getattr(conv, 'scale_input', False))}


def _gone_shortcuts(draft: Draft) -> tuple[str, ...]:
    """Return the prefixes of the paths on shortcuts that the recipe takes away."""
    recipe = draft.question.recipe
    if recipe.residual or not any(isinstance(decision, Convert) for decision in draft.decisions):
        return ()
    whys = whys_of(draft.decisions)
    return tuple(
        f'{group.shortcut.path}.' for network in draft.networks for group in network.groups
        if group.shortcut and not splits_shortcut(group, whys, recipe))


def _why_outside(path: str, draft: Draft) -> Why:
    """Return why a layer in no site stays float."""
    layer, networks, question = draft.layers[path], draft.networks, draft.question
    shortcuts = tuple(f'{group.shortcut.path}.' for n in networks for group in n.groups if group.shortcut)
    if path in question.asked:
        return Reason.ASKED.why(question.asked[path])
    if path.startswith(shortcuts):
        return Reason.DOWNSAMPLE.why()
    if path.startswith(tuple(side for network in networks for side in network.side_paths)):
        return Reason.SQUEEZE_EXCITE.why()
    if isinstance(layer, nn.Linear):
        last = next(reversed(question.runs), None)
        return Reason.CLASSIFIER.why() if path == last else Reason.ON_VECTORS.why()
    if isinstance(layer, nn.Conv2d):
        return Reason.UNKNOWN_BLOCK.why()
    return Reason.ONE_DIMENSIONAL.why() if isinstance(layer, nn.Conv1d) else Reason.NO_BINARY.why(type(layer).__name__)


def _notes_of_recipe(draft: Draft, rows: dict[str, ReportRow]) -> Iterator[str]:
    """Yield notes on changes that the recipe made to the host as a whole."""
    networks, decisions, question = draft.networks, draft.decisions, draft.question
    recipe, roles = question.recipe, {row.role for row in rows.values()}
    for name in ('scale_input', 'link', 'real', 'omit'):
        absent = [role for role in getattr(recipe, name) if role not in roles]
        if absent:
            yield f'recipe.{name}: the host has no convolution of role {", ".join(absent)}'
    renewed = sum(starts_anew(decision) for decision in decisions)
    if renewed:
        yield f'running statistics of {renewed} norms start anew, because their activation moved in front'
    dropped = sum(isinstance(decision, Convert) and drops_norm(decision, recipe) for decision in decisions)
    if dropped:
        yield f'{dropped} norms of the host are gone: the recipe normalizes in front of the sign'
    if recipe.scale_output == 'rank1':
        yield (f'factors of rows and columns are for images of {"x".join(map(str, question.input_size))} and '
               f"interpolated at other sizes; pass example_input for one of them, or scale_output='channel' for none")
    for network in networks:
        if len(ends_of(network, recipe)) == 1:
            yield (f'{network.sites[-1].act.path}: other layers of its block share it, '
                   f'the last activation is dropped too')
    if not recipe.residual and any(network.is_traced for network in networks):
        yield 'residual=False: the blocks of this host are not known, its shortcuts stay'
    if recipe.act == 'ends' and not any(ends_of(network, recipe) for network in networks):
        yield "act='ends': the stem of this host is not known, all activations are dropped"


def starts_anew(decision: Decision) -> bool:
    """Return whether the running statistics of a site's norm describe another tensor than the host's did."""
    site, omitted = decision.site, isinstance(decision, Convert) and decision.conv is Conv.OMITTED
    return decision.act is Act.IN_BRANCH and not omitted and bool(site.norm) and has_statistics(site.norm.module)
