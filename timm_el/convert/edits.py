"""Draft of a conversion: decisions, and the edits that carry them out. The model is not changed yet."""
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn as nn

from ..dry_run import HOOKS, WEIGHTED
from ..kinds import fused_act
from ..layers import ZeroShortcut, check_own_tensors
from .build_unit import (
    act_for_branch,
    build_unit,
    drops_norm,
    name_of_place,
    new_beside,
    norm_after_act,
    present,
    split_norm_act,
    takes_tail,
)
from .decide import Question, decide, ends_of, splits_shortcut, whys_of
from .find import find_sites
from .sites import Act, Conv, Convert, Decision, Edit, Group, Keep, Network, Place, Site, channels_of


@dataclass(frozen=True)
class Draft:
    """A conversion that is decided and built; the model is not changed yet.

    Args:
        question: The request, and what is known of the host.
        layers: Convolutions and linear layers of the host by path.
        networks: Networks in the host.
        decisions: Decisions about their sites.
        edits: By path, in the order in which they are made.
        notes: Remarks that belong to no single layer.
    """
    question: Question
    layers: dict[str, nn.Module]
    networks: Sequence[Network]
    decisions: Sequence[Decision]
    edits: dict[str, Edit]
    notes: Sequence[str]


def make_draft(model: nn.Module, question: Question, first_notes: Sequence[str], last_notes: Sequence[str]) -> Draft:
    """Return the draft of a conversion; its notes are the given ones with those of the host's networks between them.

    Raises:
        ValueError: A unit cannot be built, the recipe leaves nothing of a layer, or a module that would be taken apart
            carries hooks.
    """
    networks = find_sites(model, question.runs)
    for network in networks:
        _refuse_computed_tensors(network)
    decisions: list[Decision] = []
    edits: dict[str, Edit] = {}
    for network in networks:
        decided = decide(network, question)
        made = _build_network(network, decided, question)
        _refuse_hooked_sites(network, made)
        edits.update(made)
        decisions += decided
    layers = {path: module for path, module in model.named_modules() if isinstance(module, WEIGHTED)}
    notes = [*first_notes, *(note for network in networks for note in network.notes), *last_notes]
    return Draft(question, layers, networks, decisions, edits, notes)


def _build_network(network: Network, decisions: Sequence[Decision], question: Question) -> dict[str, Edit]:
    """Return the edits of a network by path, in the order in which they are made.

    Raises:
        ValueError: A unit cannot be built, or an activation outside of the sites carries hooks.
    """
    edits = build_units(decisions, question)
    whys = whys_of(decisions)
    for group in network.groups:
        edits.update((edit.path, edit) for edit in _edit_shortcut(group, splits_shortcut(
            group, whys, question.recipe), question))
    if ends_of(network, question.recipe):
        edits.update((edit.path, edit) for edit in _edit_stem(network, edits))
    for place in network.loose_acts if question.recipe.act != 'keep' else ():
        _refuse_hooks(place.path, place.module)
        bare = nn.Identity() if fused_act(place.module) is None else split_norm_act(place.module)
        edits.setdefault(place.path, Edit(place.path, bare))
    return edits


def build_units(decisions: Sequence[Decision], question: Question) -> dict[str, Edit]:
    """Return the edits of single sites by path."""
    edits: dict[str, Edit] = {}
    for decision in decisions:
        made = _edit_unit(decision, question) if isinstance(decision, Convert) else _edit_kept(decision, question)
        edits.update((edit.path, edit) for edit in made)
    return edits


def _edit_act(site: Site, act: Act | None) -> Iterator[Edit]:
    """Yield the edit that takes away an activation that is a module of its own."""
    separate = site.act is not None and not isinstance(site.act.module, nn.Identity)
    if act not in (None, Act.KEPT) and separate and (site.norm is None or fused_act(site.norm.module) is None):
        yield Edit(site.act.path, nn.Identity())


def _edit_kept(decision: Keep, question: Question) -> Iterator[Edit]:
    """Yield the edits of a layer that stays float: only its activation may move to its norm."""
    site, act = decision.site, decision.act
    yield from _edit_act(site, act)
    if site.norm is None or act in (None, Act.KEPT):
        return
    norm, moved_to = split_norm_act(site.norm.module), None
    if act is Act.IN_BRANCH:
        own = act_for_branch(site)
        norm = nn.Sequential(OrderedDict(act=own, norm=norm_after_act(norm, own, site.conv.module)))
    elif act is Act.REPLACED:
        own = new_beside(nn.PReLU, channels_of(site.conv.module)[1], site.conv.module)
        norm = nn.Sequential(OrderedDict(norm=norm, new_act=own))
    if isinstance(norm, nn.Sequential):
        moved_to = f'{site.norm.path}.norm'
    if norm is not site.norm.module:
        yield Edit(site.norm.path, norm, moved_to)


def _edit_unit(decision: Convert, question: Question) -> Iterator[Edit]:
    """Yield the edits of a converted site: the unit, and Identity where its other modules stood."""
    site, recipe = decision.site, question.recipe
    image = 'x'.join(map(str, question.input_size)) if question.input_size else 'that it was tried on'
    yield from _edit_act(site, decision.act)
    omitted = decision.conv is Conv.OMITTED
    unit = build_unit(decision, recipe, question.runs.get(site.path), image)
    if takes_tail(decision):
        places = present(site.tail)
        for place in places:
            inner = f'.{name_of_place(place)}' if len(places) > 1 else ''
            yield Edit(place.path, nn.Identity(), f'{site.path}.tail{inner}')
    yield Edit(site.path, unit, '' if omitted else f'{site.path}.conv')
    if site.norm:
        gone = omitted or drops_norm(decision, recipe)
        yield Edit(site.norm.path, nn.Identity(), '' if gone else f'{site.path}.norm')


def _edit_shortcut(group: Group, splits: bool, question: Question) -> Iterator[Edit]:
    """Yield the edit that takes a host's shortcut away: it goes around one convolution, or the recipe keeps none."""
    shortcut = group.shortcut
    if splits:
        moved_to = None if shortcut.module is None else f'{group.sites[0].path}.link'
        yield Edit(shortcut.path, ZeroShortcut(), moved_to)
    elif shortcut is not None and not question.recipe.residual:
        yield Edit(shortcut.path, ZeroShortcut(), '')


def _edit_stem(network: Network, edits: dict[str, Edit]) -> Iterator[Edit]:
    """Yield a new norm behind the stem's activation and pool, in front of the first sign."""
    stem, pool = network.stem, network.stem_pool
    if pool is not None and pool.module is not None and not stem.path.startswith(pool.path):
        place, name = pool, 'pool'
    else:
        place, name = stem.act or stem.norm, 'act'
    if place is None:
        return
    host = edits[place.path].module if place.path in edits else place.module
    norm = new_beside(nn.BatchNorm2d, stem.conv.module.out_channels, stem.conv.module)
    yield Edit(place.path, nn.Sequential(OrderedDict([(name, host), ('new_norm', norm)])), f'{place.path}.{name}')


def _places_of_sites(network: Network) -> Iterator[Place]:
    for site in network.sites:
        yield from present(tuple(place for place in (site.conv, site.norm, site.act) if place is not None))


def _refuse_computed_tensors(network: Network) -> None:
    """Raise if a module of a site computes a tensor in each pass, before any weight is looked at, which may change it.
    """
    for place in _places_of_sites(network):
        for part, holder in place.module.named_modules(prefix=place.path):
            check_own_tensors(holder, part)


def _refuse_hooked_sites(network: Network, edits: dict[str, Edit]) -> None:
    """Raise if a module of a site that is taken apart carries hooks."""
    for place in _places_of_sites(network):
        if place.path in edits:
            _refuse_hooks(place.path, place.module)


def _refuse_hooks(path: str, module: nn.Module) -> None:
    """Raise if a module that would be taken apart, or a part of it, carries hooks.

    Hooks that compute a tensor in each pass are named as such.

    Raises:
        ValueError: It does.
    """
    for part, holder in module.named_modules(prefix=path):
        check_own_tensors(holder, part)
        for name in HOOKS:
            if getattr(holder, name):
                raise ValueError(
                    f'{part}: the {type(holder).__name__} carries hooks ({name}), which would be lost in the '
                    f'conversion; remove them first and register them again on the unit that takes its place')
