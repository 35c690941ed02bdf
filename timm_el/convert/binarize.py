"""Verb `binarize`: swap the conv-norm-act chains of a network for `BinaryUnit`s, in place, all or nothing.

    find_sites -> decide -> build_units -> apply          the types between these stages are in sites.py

Nothing is changed before `apply`, and what raises behind it puts all back. The host's class
and forward stay as they are: a unit stands where the convolution stood, and Identity where its norm and activation
stood. In a network that no table describes, signs that would be the same everywhere are found by a run of the converted
network, and decided, built and applied in a second pass.
"""
import fnmatch
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn

from ..dry_run import LayerRun, own_input_size, run_layers
from ..layers import BinaryConv2d, BinaryLinear, BinaryUnit, check_tensors, check_unwrapped, guard_input
from ..layers.checks import check_latent
from ..recipes import Recipe, get_recipe
from ..weights.loading import RECIPE_CODE, guard_loading
from ..weights.parameter_map import ParameterMap, RenewedNorm, tensors_of
from .apply import apply
from .build_unit import shift_before_pool
from .dead_signs import Verdict, judge_signs
from .decide import Question, decide_dead_signs
from .edits import Draft, build_units, make_draft
from .report import find_failures, make_report, starts_anew
from .sites import Act, Convert, Decision, Network

_one_at_a_time = threading.RLock()  # torch.fx patches torch.nn for all threads


def _refuse_unfit(model: nn.Module) -> None:
    """Raise for modules that cannot be swapped without changing more than themselves."""
    check_unwrapped(model, 'convert', parts=True)
    check_latent(model, 'convert')
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise ValueError(f'model: {type(model).__name__} has no Conv2d, there is nothing to binarize')
    for path, module in model.named_modules():
        name = type(module).__name__
        if isinstance(module, (BinaryUnit, BinaryConv2d, BinaryLinear)):
            raise ValueError(
                f'{path or "model"}: the model is already binarized (found a {name}); '
                f'build a fresh float model to convert it with another recipe')
        check_tensors(module, path)


def _is_separable(model: nn.Module) -> bool:
    """Return whether most convolutions larger than 1x1 are depthwise."""
    spatial = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    return 2 * sum(1 < m.groups == m.in_channels for m in spatial) > len(spatial)


def binarize(
        model: nn.Module,
        recipe: str | Recipe | dict[str, Any] = 'el',
        *,
        keep: Sequence[str] = (),
        example_input: torch.Tensor | None = None,
        real_weights: bool = False,
        strict: bool = False,
        like: dict[str, Any] | None = None,
) -> nn.Module:
    """Binarize a network in place: every conv-norm-act chain becomes one `BinaryUnit`.

    ResNets of timm and torchvision and MobileNetV1 are converted by what is known about their blocks; every other
    network by its data flow, as torch.fx traces it (which patches torch.nn: run no model in another thread), or where
    fx cannot, by its modules one by one, which the report says. There a unit whose sign would be the same almost
    everywhere, because an activation cannot be taken away, gets a new norm in front, and this is checked on a batch of
    noise, or on `example_input`. Linear layers on pixels (N, H, W, C) count as the 1x1 convolutions that they are.

    The parameters of the host are kept, so that a pretrained float network becomes the latent initialisation. (Where an
    activation moves in front of its norm, that norm's running statistics are computed from the weights.) The first
    convolution, the classifier, squeeze-excite and the residual downsampling stay float, and so does a layer that runs
    more than once or shares its weight. Activations stay between layers that are kept float. Where a weight is frozen,
    what is new around it is frozen too. Afterwards `model.binarize_report` has a row for each layer. If anything is
    refused, the model is as it was.

    Args:
        model: The network; it is changed in place.
        recipe: Name of a recipe (`recipes.RECIPES`), a `Recipe`, or its dict. The name 'el' means 'el_mobilenet' on a
            host most of whose convolutions beyond 1x1 are depthwise; the report says which one was used.
        keep: Module paths or glob patterns of layers to keep float; a path keeps everything below it.
        example_input: Images (N, C, H, W) on which signs are judged, and whose size the report's operations are for;
            noise, and the model's own size, if None.
        real_weights: Stage one of two-stage training: binary inputs, real weights, the same state dict keys.
        strict: Raise if a convolution has to be kept because it could not be converted.
        like: `binarize_report.plan()` of a network of the same host: recipe, kept layers and norms before signs are
            taken from it, so that their state dicts fit each other.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a module, or `recipe` or `keep` have the wrong type.
        ValueError: The recipe is unknown; the model has no convolutions, is already binarized, quantized, scripted,
            compiled, wrapped for distributed training or not initialised; a layer that is taken apart is hooked, pruned
            or parametrized; `keep` matches nothing; `example_input` has not four axes; the recipe leaves nothing of a
            convolution; or `strict` and a convolution could not be converted.
    """
    _check_arguments(model, example_input, real_weights)
    if like is not None:
        _check_plan(like)
        recipe, keep = Recipe.from_dict(like['recipe']), like['keep']
    chosen, notes = _choose_recipe(model, recipe, real_weights)
    with _one_at_a_time:
        question, not_run = _ask(model, chosen, keep, _image_size(model, example_input, like))
        draft = make_draft(model, question, not_run, notes)
        if strict:
            _refuse_impossible(draft)
        if any(isinstance(decision, Convert) for decision in draft.decisions):
            _convert(model, draft, example_input, like)
        else:
            model.binarize_report = make_report(_all_kept(draft))
    return model


def _check_arguments(model: nn.Module, example_input: torch.Tensor | None, real_weights: bool) -> None:
    """Raise TypeError or ValueError for an argument of the wrong kind, or for a model that is not fit to convert."""
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: found a {type(model).__name__}, expected a torch.nn.Module')
    if not isinstance(real_weights, bool):
        raise ValueError(f'real_weights: found {real_weights!r}, expected True or False')
    if example_input is not None and (not isinstance(example_input, torch.Tensor) or example_input.dim() != 4):
        found = tuple(example_input.shape) if isinstance(example_input, torch.Tensor) else type(example_input).__name__
        raise ValueError(f'example_input: found {found}, expected a tensor (N, C, H, W)')
    _refuse_unfit(model)


def _check_plan(like: dict[str, Any]) -> None:
    """Raise TypeError or ValueError unless a plan has what `Report.plan` writes."""
    if not isinstance(like, dict):
        raise TypeError(f'like: found a {type(like).__name__}, expected the dict that binarize_report.plan() returns')
    absent = [key for key in ('recipe', 'keep', 'revived', 'hopeless') if key not in like]
    if absent:
        raise ValueError(f'like: found no {absent[0]!r}, expected what binarize_report.plan() returns')


def _check_planned_paths(like: dict[str, Any], draft: Draft) -> None:
    """Raise ValueError if a plan names a unit that this conversion does not make."""
    units = {decision.site.path for decision in draft.decisions if isinstance(decision, Convert)}
    for key in ('revived', 'hopeless'):
        for path in like[key]:
            if path not in units:
                raise ValueError(f'like: found {path!r} as {key}, expected a unit of this host; take its own plan')


def _check_still_runs(model: nn.Module, draft: Draft) -> None:
    """Raise ValueError if a traced network, as it is converted now, does not run, or not all of its units do.

    The host ran on an image of the same size, so that the conversion is to blame.
    """
    question = draft.question
    if question.input_size is None or not any(network.is_traced for network in draft.networks):
        return
    units = [d.site.path for d in draft.decisions if isinstance(d, Convert) and d.site.path in question.runs]
    try:
        runs = run_layers(model, question.input_size, extra=units, compute=True)
    except Exception as e:  # whatever a foreign forward raises
        raise ValueError(
            f'model: it runs on an image of {"x".join(map(str, question.input_size))}, but not when it is converted '
            f'({type(e).__name__}: {e}); keep=[...] keeps layers as they are') from e
    for path in units:
        if path not in runs:
            raise ValueError(
                f'{path}: the model does not run what is put in its place, as its forward holds the layer '
                f'itself; pass keep=({path!r},)')


def _all_kept(draft: Draft) -> Draft:
    """Return the draft in which everything stays: activations go for the sake of signs only."""
    return replace(
        draft, decisions=[replace(d, act=Act.KEPT if d.act else None) for d in draft.decisions], edits={},
        notes=[*draft.notes, 'no convolution was converted, the model is as it was'])


def _convert(
        model: nn.Module, draft: Draft, example_input: torch.Tensor | None, like: dict[str, Any] | None) -> None:
    """Carry out a draft, then find and repair the signs that are dead; leave the model as it was if anything raises."""
    recipe, before = draft.question.recipe, tensors_of(model)
    stem_norms = _norms_before_max_pool(draft.networks, recipe)
    with ExitStack() as undo:
        apply(model, draft.edits.values(), undo)
        _check_still_runs(model, draft)
        if like is not None:
            _check_planned_paths(like, draft)
        verdict = _judge(model, draft, example_input, like)
        changed = {d.site.path: d for d in decide_dead_signs(draft.decisions, verdict.revived, verdict.constant)}
        second = build_units(changed.values(), draft.question)
        apply(model, second.values(), undo)
        _finish(model, draft.networks, recipe, stem_norms, undo)
        final = replace(
            draft, decisions=[changed.get(d.site.path, d) for d in draft.decisions], edits={**draft.edits, **second},
            notes=[*draft.notes, *verdict.notes])
        model.binarize_report = make_report(final, verdict.revived, verdict.constant)
        model.parameter_map = ParameterMap.between(before, model, _renewed_norms(final.decisions))
        undo.pop_all()


def _image_size(
        model: nn.Module, example_input: torch.Tensor | None, like: dict[str, Any] | None,
) -> tuple[int, int, int]:
    """Return (channels, height, width) of the image on which a host is looked at."""
    if example_input is not None:
        return tuple(example_input.shape[1:])
    own = own_input_size(model)
    planned = (like or {}).get('input_size') or own
    return (own[0], *planned[1:])  # a net of other channels has the same plan


def _choose_recipe(
        model: nn.Module, recipe: str | Recipe | dict[str, Any], real_weights: bool) -> tuple[Recipe, list[str]]:
    """Return the recipe, in its first stage if `real_weights`, and a note where it is not the one that was named."""
    chosen, notes = get_recipe(recipe), []
    if isinstance(recipe, str) and recipe == 'el' and _is_separable(model):
        chosen = get_recipe('el_mobilenet')
        notes = ["recipe 'el' on a depthwise-separable host is 'el_mobilenet': activations in the branches, no K"]
    return chosen.with_real_weights() if real_weights else chosen, notes


def _ask(
        model: nn.Module, recipe: Recipe, keep: Sequence[str], size: tuple[int, int, int],
) -> tuple[Question, list[str]]:
    """Return the question of a conversion, and a note if the host does not run on an image of this size.

    Raises:
        TypeError: `keep` has the wrong type.
        ValueError: `keep` matches nothing.
    """
    asked = _match(model, keep)
    try:
        runs = run_layers(model, size, compute=True)
    except Exception as e:  # whatever a foreign forward raises for an image that it does not want
        note = (f'operations were not counted: the model does not run on an image of {"x".join(map(str, size))} '
                f'({type(e).__name__}: {e}); pass example_input')
        return Question(recipe, asked, _shared_weights(model, {}), {}, None, tuple(keep)), [note]
    return Question(recipe, asked, _shared_weights(model, runs), runs, size, tuple(keep)), []


def _match(model: nn.Module, keep: Sequence[str]) -> dict[str, str]:
    """Return the paths to keep float, each with the pattern that says so."""
    if isinstance(keep, str) or not isinstance(keep, Sequence) or not all(isinstance(k, str) for k in keep):
        raise TypeError(f'keep: found {keep!r}, expected a sequence of module paths or patterns')
    layers = [p for p, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    kept = {}
    for pattern in keep:
        hits = [p for p in layers if fnmatch.fnmatch(p, pattern) or p.startswith(pattern + '.')]
        if not hits:
            raise ValueError(f'keep: {pattern!r} matches no convolution or linear layer of the model')
        kept.update({p: pattern for p in hits})
    return kept


def _shared_weights(model: nn.Module, runs: dict[str, LayerRun]) -> dict[str, str]:
    """Return the layers that share their weight, or themselves, with another place: path and the other place.

    A layer that has two names (a backbone's stage that is an attribute of the whole, too) and runs once is not shared.
    """
    places: dict[int, dict[str, nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Conv2d, nn.Linear)) and 'weight' in module._parameters:  # else it is computed
            places.setdefault(id(module.weight), {})[path] = module

    def is_shared(paths: dict[str, nn.Module]) -> bool:
        once = len(set(paths.values())) == 1 and any(path in runs and runs[path].calls == 1 for path in paths)
        return len(paths) > 1 and not once

    return {path: next(p for p in paths if p != path)
            for paths in places.values() if is_shared(paths) for path in paths}


def _refuse_impossible(draft: Draft) -> None:
    """Raise ValueError if some convolution stays float because it could not be converted."""
    failures = find_failures(draft)
    if failures:
        path, why = failures[0]
        layer = draft.layers[path]
        raise ValueError(
            f'{path}: {type(layer).__name__} {tuple(layer.weight.shape)} cannot be binarized ({why}), '
            f'nor can {len(failures) - 1} others; pass keep=({path!r}, ...) to keep them float')


def _judge(
        model: nn.Module, draft: Draft, example_input: torch.Tensor | None, like: dict[str, Any] | None) -> Verdict:
    """Return the dead signs: those of another conversion, or those that a run of a traced network shows."""
    if draft.question.recipe.act == 'keep' or not any(network.is_traced for network in draft.networks):
        return Verdict()
    if like is not None:
        return Verdict(list(like['revived']), list(like['hopeless']))
    verdict = judge_signs(model, example_input)
    if verdict.revived:
        verdict.notes.insert(0, f'a new norm shifts the input of the sign at {", ".join(verdict.revived)}')
    return verdict


def _finish(
        model: nn.Module, networks: Sequence[Network], recipe: Recipe, stem_norms: Sequence[nn.Module], undo: ExitStack,
) -> None:
    """Set up what the whole network needs beside its units: guards of images and loading, norms before a max-pool."""
    for network in networks:
        if recipe.binarizes and network.image_conv is not None:
            undo.callback(guard_input(network.image_conv.module, network.stride).remove)
    for norm in stem_norms:
        undo.callback(norm.bias.data.copy_, norm.bias.detach().clone())
        shift_before_pool(norm)
    undo.callback(model._buffers.pop, RECIPE_CODE, None)
    undo.callback(guard_loading(model, recipe.code).remove)


def _renewed_norms(decisions: Sequence[Decision]) -> tuple[RenewedNorm, ...]:
    """Return the norms whose activation moved in front of them."""
    return tuple(
        RenewedNorm(f'{d.site.path}.norm', f'{d.site.path}.act', f'{d.site.path}.conv') if isinstance(d, Convert) else
        RenewedNorm(f'{d.site.norm.path}.norm', f'{d.site.norm.path}.act', d.site.path)
        for d in decisions if starts_anew(d))


def _norms_before_max_pool(networks: Sequence[Network], recipe: Recipe) -> list[nn.Module]:
    """Return the norms of stems whose activation goes and behind which the host takes a maximum."""
    if not recipe.input_quantizer or recipe.act not in ('drop', 'prelu', 'rprelu'):
        return []
    pools = [(network.stem, network.stem_pool.module) for network in networks if network.stem_pool]
    norms = [stem.norm.module for stem, pool in pools if stem.norm and pool is not None and any(
        isinstance(m, nn.MaxPool2d) for m in pool.modules())]
    return [norm for norm in norms if getattr(norm, 'bias', None) is not None]
