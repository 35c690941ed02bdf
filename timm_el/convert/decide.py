"""Decisions about the sites of a host. Nothing is built or changed here; one function answers each question."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch.nn as nn

from ..dry_run import LayerRun
from ..kinds import fused_act
from ..layers import ElasticLink
from ..recipes import Recipe
from .build_unit import binary_form, pads_same
from .sites import (
    Act,
    Conv,
    Convert,
    Decision,
    Group,
    Keep,
    Network,
    Pre,
    Reason,
    Site,
    Why,
    channels_of,
)


@dataclass(frozen=True)
class Question:
    """Request for a conversion, and what is known of the host.

    Args:
        recipe: Recipe of the conversion.
        asked: Paths of layers to keep float, each with the pattern that says so.
        shared: Paths of layers that share their weight, or themselves, with another place, and that place.
        runs: Runs of the host's layers by path, as far as they are known.
        input_size: (channels, height, width) of the image that they ran on; None if the host does not run on it.
        keep: The caller's keep list.
    """
    recipe: Recipe
    asked: dict[str, str]
    shared: dict[str, str]
    runs: dict[str, LayerRun]
    input_size: tuple[int, int, int] | None
    keep: tuple[str, ...] = ()


def decide(network: Network, question: Question) -> list[Decision]:
    """Return a decision about each site of a network, in the order of its sites.

    Raises:
        ValueError: The recipe leaves nothing of a layer.
    """
    whys = {site.path: reason_to_keep(site, question) for site in network.sites}
    return [decision for group in network.groups for decision in _decide_group(group, network, whys, question)]


def _decide_group(
        group: Group, network: Network, whys: dict[str, Why | None], question: Question) -> Iterator[Decision]:
    recipe, split = question.recipe, splits_shortcut(group, whys, question.recipe)
    for i, site in enumerate(group.sites):
        stays = site in ends_of(network, recipe)
        why = whys[site.path]
        if why is not None:
            yield Keep(site, why, act_of_kept(site, recipe, stays or no_sign_follows(site, group, network, whys)))
            continue
        link, no_link = None, None
        if split:
            link = _own_link(group, i)
        elif site.role in recipe.link:
            link, no_link = choose_link(site, recipe, host_skip=group.is_basic and recipe.residual)
        yield _decide_unit(site, recipe, link, no_link, stays)


def _decide_unit(
        site: Site, recipe: Recipe, link: nn.Module | None, no_link: Why | None, act_stays: bool) -> Convert:
    conv, why = choose_conv(site, recipe)
    if conv is Conv.OMITTED and link is None:
        raise ValueError(f'{site.path}: recipe {recipe.name!r} omits it and gives it no link, nothing is left')
    pre = choose_pre(site, recipe) if conv is Conv.BINARY and recipe.input_quantizer is not None else None
    why = why or no_link or (Reason.CENTRED.why() if pre is Pre.CENTRE else None)
    return Convert(site, conv, link, act_of_unit(site, recipe, act_stays), pre, why)


def decide_dead_signs(
        decisions: Sequence[Decision], revived: Sequence[str], constant: Sequence[str]) -> list[Convert]:
    """Return the decisions that change because a sign would be the same everywhere.

    Args:
        decisions: Those of the first pass.
        revived: Paths of units that get a norm in front of their sign.
        constant: Paths of units whose input does not vary: their layer stays float.
    """
    changed = []
    for decision in decisions:
        if not isinstance(decision, Convert):
            continue
        if decision.site.path in constant:
            changed.append(replace(decision, conv=Conv.REAL, pre=None, why=Reason.CONSTANT.why()))
        elif decision.site.path in revived:
            changed.append(replace(decision, pre=Pre.CENTRE))
    return changed


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def reason_to_keep(site: Site, question: Question) -> Why | None:
    """Return why a site's layer stays float, outside any unit, or None."""
    if site.path in question.asked:
        return Reason.ASKED.why(question.asked[site.path])
    if site.path in question.shared:
        return Reason.SHARED.why(question.shared[site.path])
    if site.kept is not None:
        return site.kept
    form = binary_form(site.conv.module, question.recipe)
    return form if isinstance(form, Why) else None


def whys_of(decisions: Sequence[Decision]) -> dict[str, Why | None]:
    """Return why each site's layer stays float, by path, None where a unit takes its place."""
    return {d.site.path: d.why if isinstance(d, Keep) else None for d in decisions}


def ends_of(network: Network, recipe: Recipe) -> tuple[Site, ...]:
    """Return the sites whose activation stays with act='ends': the stem, and the last, if it shares it with none."""
    if recipe.act != 'ends' or network.is_traced:
        return ()
    last = network.sites[-1]
    alone = last.act is None or sum(site.act == last.act for site in network.sites) == 1
    return (network.stem, last) if alone else (network.stem,)


def splits_shortcut(group: Group, whys: dict[str, Why | None], recipe: Recipe) -> bool:
    """Return whether a basic block gets one shortcut a convolution in place of its own."""
    if not group.is_basic or 'spatial' not in recipe.link or any(whys[site.path] for site in group.sites):
        return False
    first, second = (site.conv.module for site in group.sites)
    return first.out_channels == second.out_channels


def no_sign_follows(site: Site, group: Group, network: Network, whys: dict[str, Why | None]) -> bool:
    """Return whether no binarized layer comes next after any of the places of the activation of a kept layer.

    That is known of networks on one path; in a traced one only activations that go are in a site at all.
    """
    if network.is_traced:
        return False
    sites = network.sites
    after = {a.path: b.path for a, b in zip(sites, sites[1:])}
    sharing = [other for other in group.sites if (other.act and other.act.path) == (site.act and site.act.path)]
    return all(whys[other.path] is not None and (
        other.path not in after or whys[after[other.path]] is not None) for other in sharing)


def has_act(site: Site) -> bool:
    """Return whether an activation belongs to a site, by itself or inside its norm."""
    if site.norm and fused_act(site.norm.module) is not None:
        return True
    return site.act is not None and not isinstance(site.act.module, nn.Identity)


def act_of_kept(site: Site, recipe: Recipe, stays: bool) -> Act | None:
    """Return the fate of the activation of a layer that stays float."""
    if not has_act(site):
        return None
    if stays or recipe.act == 'keep':
        return Act.KEPT
    if site.norm is None:
        return Act.DROPPED  # there is no norm that it could stand at
    if recipe.act == 'prelu':
        return Act.REPLACED
    return Act.IN_BRANCH if recipe.act == 'branch' else Act.DROPPED


def act_of_unit(site: Site, recipe: Recipe, stays: bool) -> Act | None:
    """Return the fate of the activation of a unit."""
    if stays or recipe.act == 'keep':
        return Act.KEPT if has_act(site) else None
    if recipe.act == 'prelu':
        return Act.REPLACED
    if not has_act(site):
        return None
    return {'branch': Act.IN_BRANCH, 'rprelu': Act.REPLACED}.get(recipe.act, Act.DROPPED)


def choose_conv(site: Site, recipe: Recipe) -> tuple[Conv, Why | None]:
    """Return the fate of the layer inside a unit, and why it is not binarized."""
    if site.role in recipe.omit:
        return Conv.OMITTED, Reason.OMITTED.why(site.role)
    if not recipe.binarizes:
        return Conv.REAL, Reason.BINARIZES_NOTHING.why()
    if site.role in recipe.real:
        return Conv.REAL, Reason.REAL.why(site.role)
    return Conv.BINARY, None


def choose_link(site: Site, recipe: Recipe, host_skip: bool) -> tuple[nn.Module | None, Why | None]:
    """Return the link around a site whose role gets one, or None and the reason.

    Args:
        site: The site.
        recipe: The recipe.
        host_skip: The block keeps its own shortcut around two convolutions.
    """
    conv = site.conv.module
    if site.no_link:
        return None, site.no_link
    if host_skip:
        return None, Reason.NO_LINK_HOST.why()
    if not recipe.elastic and len(set(channels_of(conv))) > 1:
        return None, Reason.NO_LINK_CHANNELS.why()
    link = ElasticLink.for_conv(conv, recipe.gamma if recipe.elastic else None, pads_same(conv), recipe.link_pool)
    return link, None if link is not None else Reason.NO_LINK_SIZE.why()


def _own_link(group: Group, i: int) -> nn.Module:
    """Return the link of the i-th convolution of a basic block: the host's shortcut around the first, else identity."""
    host_link = group.shortcut.module
    if i == 0 and host_link is not None:
        return host_link
    channels = group.sites[1].conv.module.out_channels
    return ElasticLink(channels, channels, gamma=None)


def choose_pre(site: Site, recipe: Recipe) -> Pre | None:
    """Return the kind of module in front of the sign of a binarized layer."""
    if site.constant_sign and recipe.act != 'keep':
        return Pre.CENTRE
    return Pre(recipe.pre) if recipe.pre else None
