"""Loading of state dicts into binarized models: packed files, float checkpoints, checks before the first copy.

All four ways of loading use these checks: `load_state_dict` of a registered model by `CheckedLoading`, that of a
converted one or of a model inside another by the hook of `guard_loading`, `pretrained=True` by `float_to_latent`,
and `load_packed` by itself.
"""
import os
import pickle
import re
from typing import Any

import timm.models
import torch
import torch.nn as nn
from timm.models import clean_state_dict
from torch.utils.hooks import RemovableHandle

from .files import read_packed
from .packed import (
    CheckpointError,
    fit_counters,
    is_packed,
    require_binary_weights,
    take_signs,
    unpack_state_dict,
    write_signs,
)
from .parameter_map import ParameterMap


class CheckedLoading:
    """Mixin of the registered models: `load_state_dict` refuses what does not fit before the first tensor is copied."""

    @torch.jit.ignore
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as torch does, but raise `CheckpointError` and load nothing if the state dict does not fit."""
        if is_packed(state_dict):
            state_dict = unpack_state_dict(state_dict, self)
        check_state_dict(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)


RECIPE_CODE = 'recipe_code'
LOOSELY = (
    'model.load_state_dict(state_dict, strict=False), with timm_el.unpack_state_dict(tensors, model) as the state dict '
    'of a packed file')
# Tensors from which torch's pruning, norms of weights and parametrizations compute others.
COMPUTED = re.compile(r'(^|\.)parametrizations\.|_(orig|mask|[guv])$')


def guard_loading(model: nn.Module, recipe_code: int | None = None) -> RemovableHandle:
    """Make a model take packed tensors, and refuse float checkpoints, other recipes and wrong shapes, before the first
    tensor is copied.

    The recipe travels with the state dict as a 0-D buffer, because recipes with the same keys compute different
    things. A state dict without it is taken as it is. A hook is not told whether the call is strict, so what is missing
    or unknown in a state dict of floats stays torch's business, or `CheckedLoading`'s; a packed one is always whole.

    Returns:
        The hook's handle.
    """
    if recipe_code is not None:
        device = next(model.parameters()).device
        model.register_buffer(RECIPE_CODE, torch.tensor(recipe_code, dtype=torch.int32, device=device))
    return model.register_load_state_dict_pre_hook(_before_loading)


def _before_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    given = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
    packed = is_packed(given)
    if packed:
        latent = unpack_state_dict(given, module)
        check_state_dict(module, latent)
        for key in given:
            del state_dict[prefix + key]
        state_dict.update((prefix + key, value) for key, value in latent.items())
    else:
        check_state_dict(module, given, False)
    fit_counters(state_dict, module.state_dict(), prefix)
    if hasattr(module, RECIPE_CODE):
        state_dict.setdefault(prefix + RECIPE_CODE, getattr(module, RECIPE_CODE))


def _map_of(model: nn.Module) -> ParameterMap | None:
    return getattr(model, 'parameter_map', None)


def float_to_latent(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's float host under the model's own keys.

    Tensors of the model itself pass through, packed ones are unpacked. The signature is that of timm's
    `pretrained_filter_fn`. Tensors that the host does not have (gammas, new norms) get the model's own values, and the
    running statistics of norms whose activation moved in front of them follow from the weights. Shortcuts without
    average pooling (conv, norm) are read into ones with it (pool, conv, norm).

    Args:
        state_dict: Checkpoint of the float host (timm's or torchvision's names) or of the model.
        model: The binarized model.
    """
    state_dict = state_dict.get('state_dict', state_dict)
    if is_packed(state_dict):
        return unpack_state_dict(state_dict, model)
    own, moves = model.state_dict(), _map_of(model)
    if moves is None or moves.host_only(state_dict, own) is None:
        return state_dict
    latent = moves.to_latent(state_dict, model)
    fit_counters(latent, own)
    return latent


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state dict of a file that timm reads.

    Raises:
        CheckpointError: It is no file of weights, or a damaged one.
        FileNotFoundError: There is no such file.
    """
    from safetensors import SafetensorError
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: found no such file, expected one of weights')
    try:
        return timm.models.load_state_dict(path)
    except (SafetensorError, EOFError, KeyError, AttributeError, RuntimeError, pickle.UnpicklingError) as e:
        # Of a pickle of other things than tensors, torch and timm say how to let it run the code in there.
        refused = isinstance(e, pickle.UnpicklingError) or 'weights_only' in str(e)
        said = 'or it holds objects that are no tensors, which are not read' if refused else e
        raise CheckpointError(f'{path}: this is no file of weights, or a damaged one ({said})') from e


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file into a model, as timm's function of that name does.

    Raises:
        CheckpointError: It is no file of weights, or a damaged one, or does not fit a binarized model.
        FileNotFoundError: There is no such file.
    """
    model.load_state_dict(read_checkpoint(path))


def load_float(model: nn.Module, checkpoint: str | os.PathLike[str] | dict[str, torch.Tensor]) -> nn.Module:
    """Load a checkpoint of a binarized model's float host: its weights become the latent initialisation.

        model = timm_el.load_float(timm.create_model("el_resnet50"), "resnet50.safetensors")

    Args:
        model: The binarized model.
        checkpoint: State dict, or path of a file that timm reads.

    Returns:
        The model.

    Raises:
        CheckpointError: The file is damaged or none of weights, a key is missing or unknown, or a shape differs.
            Nothing was loaded.
        FileNotFoundError: There is no such file.
        ValueError: The model is not binarized.
        TypeError: The checkpoint is neither a dict nor a path.
    """
    if _map_of(model) is None:
        raise ValueError('model: it is not binarized, its own load_state_dict takes the checkpoint')
    if isinstance(checkpoint, dict):
        for key in ('state_dict', 'model'):
            checkpoint = checkpoint.get(key, checkpoint)
        checkpoint = clean_state_dict(checkpoint)
    elif isinstance(checkpoint, (str, os.PathLike)):
        checkpoint = read_checkpoint(checkpoint)
    else:
        raise TypeError(f'checkpoint: found a {type(checkpoint).__name__}, expected a state dict or the path of a file')
    if is_packed(checkpoint):
        raise CheckpointError('checkpoint: found a packed file, expected one of the float host; load_packed takes it')
    checkpoint = float_to_latent(checkpoint, model)
    check_state_dict(model, checkpoint)
    model.load_state_dict(checkpoint, strict=True)
    return model


def load_packed(model: nn.Module, path: str | os.PathLike[str], assign: bool = False) -> nn.Module:
    """Load a packed file (`save_packed`): each binary weight becomes +-alpha, and can be trained on.

    Args:
        model: The model that was packed, or one built like it.
        path: The file.
        assign: Take the file's tensors in place of the model's own, as for `load_state_dict`: for a model on the meta
            device.

    Returns:
        The model.

    Raises:
        CheckpointError: The file is damaged, newer, not packed, or of another model or recipe. Nothing was loaded.
        FileNotFoundError: There is no such file.
        ValueError: The model is not binarized.
    """
    require_binary_weights(model)
    state_dict, signs = take_signs(read_packed(path, model), model, os.fspath(path))
    # Until all has been checked the own weights stand for themselves; to copy a tensor to itself costs nothing.
    state_dict.update((key, weight) for key, (_, _, weight) in signs.items())
    if assign:
        state_dict.update((key, torch.empty_like(weight, device='cpu')) for key, (_, _, weight) in signs.items())
    try:
        check_state_dict(model, state_dict)
    except CheckpointError as e:
        raise CheckpointError(f'{os.fspath(path)}: {e}') from None
    nn.Module.load_state_dict(model, state_dict, strict=True, assign=assign)  # checked already
    for key, (bits, alpha, _) in signs.items():
        write_signs(bits, alpha, model.get_parameter(key).data)
    return model


def check_state_dict(module: nn.Module, state_dict: dict[str, Any], strict: bool = True, prefix: str = '') -> None:
    """Raise unless a state dict fits a model.

    Args:
        module: The model.
        state_dict: Tensors that are about to be loaded.
        strict: Missing and unknown keys count too; a float checkpoint and wrong shapes always do.
        prefix: Prefix of the model's keys in the state dict.

    Raises:
        CheckpointError: It does not fit.
    """
    given = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
    own = module.state_dict()
    fit_counters(given, own)
    moves = _map_of(module)
    float_key = moves.host_only(given, own) if moves is not None else None
    if float_key is not None:
        raise CheckpointError(
            f'{prefix}{float_key}: this is a checkpoint of the float host, expected '
            f'{prefix}{moves.new_key(float_key)}; '
            f'timm_el.load_float(model, checkpoint) takes it as the latent initialisation')
    missing = [k for k in own if k not in given and not k.endswith(RECIPE_CODE)]
    unknown = [k for k in given if k not in own]
    if strict and (missing or unknown):
        _raise_mismatch(module, missing, unknown, prefix)
    report = getattr(module, 'binarize_report', None)
    code = given.get(RECIPE_CODE)
    known = report is not None and code is not None and not code.is_meta and code.numel() == 1
    if known and int(code) != report.recipe.code:
        raise CheckpointError(
            f'{prefix}{RECIPE_CODE}: found {int(code)}, expected {report.recipe.code}: this is a checkpoint of another '
            f'recipe than {report.recipe.name!r}; create the model with the recipe of the checkpoint (recipe=...)')
    for key, value in own.items():
        if key in given and tuple(given[key].shape) != tuple(value.shape):
            hint = _shape_hint(key, tuple(given[key].shape), tuple(value.shape), module)
            raise CheckpointError(
                f'{prefix}{key}: found shape {tuple(given[key].shape)}, expected {tuple(value.shape)}{hint}')


def check_adapted(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Raise CheckpointError unless a state dict fits a model but for the classifier and the channels of the images."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    first = cfg.get('first_conv') or ()
    adapted = tuple(f'{name}.' for name in ([first] if isinstance(first, str) else first))

    def stays(key: str) -> bool:
        return not key.startswith(adapted) and not _in_classifier(key, model)

    own = {key: value for key, value in model.state_dict().items() if not stays(key)}
    check_state_dict(model, {**own, **{key: value for key, value in state_dict.items() if stays(key)}})


def _raise_mismatch(module: nn.Module, missing: list[str], unknown: list[str], prefix: str) -> None:
    parts = [f'{name} {prefix}{keys[0]}' + (f' and {len(keys) - 1} more' if len(keys) > 1 else '')
             for name, keys in (('missing', missing), ('unknown', unknown)) if keys]
    first = prefix + (missing + unknown)[0]
    computed = next((key for key in missing + unknown if COMPUTED.search(key)), None)
    if computed is not None:
        raise CheckpointError(
            f'{prefix}{computed}: {"the model" if computed in missing else "the checkpoint"} is pruned or parametrized '
            f"there, and the other is not ({'; '.join(parts)}); call torch.nn.utils.prune.remove(module, 'weight') or "
            f'torch.nn.utils.parametrize.remove_parametrizations before loading or saving')
    if all(_in_classifier(key, module) for key in missing + unknown):
        whose, remedy = ('checkpoint', '0') if missing else ('model', ' of the checkpoint')
        raise CheckpointError(
            f'{first}: the {whose} has no classifier ({"; ".join(parts)}); create the model with num_classes={remedy}, '
            f'or load what fits by {LOOSELY}')
    report = getattr(module, 'binarize_report', None)
    if report is not None and all(_belongs_to_recipe(key) for key in missing + unknown):
        raise CheckpointError(
            f'{first}: this is a checkpoint of another recipe than {report.recipe.name!r} ({"; ".join(parts)}); '
            f'create the model with the recipe that it was trained with (recipe=...)')
    raise CheckpointError(
        f'{first}: this is a checkpoint of another model ({"; ".join(parts)}); '
        f'create the model that it was saved from, or load what fits by {LOOSELY}')


def _in_classifier(key: str, model: nn.Module) -> bool:
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier') or 'fc'
    return key.startswith(tuple(f'{name}.' for name in ([names] if isinstance(names, str) else names)))


def _belongs_to_recipe(key: str) -> bool:
    """Return whether some recipes have this tensor and others have not."""
    return re.search(r'(^|\.)(link|pre|post|conv|norm|downsample|bn\d*|scale|act|new_norm|new_act)\.', key) is not None


def _shape_hint(key: str, found: tuple[int, ...], expected: tuple[int, ...], model: nn.Module) -> str:
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if _in_classifier(key, model) and found[1:] == expected[1:]:
        return '; create the model with num_classes= of the checkpoint'
    if key.startswith(f'{cfg.get("first_conv", "conv1")}.') and found[2:] == expected[2:]:
        return '; create the model with in_chans= of the checkpoint'
    return '; this is a checkpoint of another model'
