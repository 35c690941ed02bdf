"""Packed files on a disk: written whole or not at all, and checked for damage when they are read."""
import json
import os
import tempfile

import torch
import torch.nn as nn

from ..version import __version__
from .packed import VERSION_KEY, CheckpointError, check_damage, is_packed, pack_state_dict

METADATA_KEY = 'timm_el'


def save_packed(
        model: nn.Module, path: str | os.PathLike[str], float_dtype: torch.dtype | None = None) -> None:
    """Write a model's packed file; either the whole file comes to be, or none, and an older one stays.

    Args:
        model: A binarized model.
        path: File to write; timm expects a name in .safetensors.
        float_dtype: As for `pack_state_dict`.

    Raises:
        ValueError: As for `pack_state_dict`.
        OSError: The folder does not exist or cannot be written.
    """
    from safetensors.torch import save
    tensors = pack_state_dict(model, float_dtype)
    report = getattr(model, 'binarize_report', None)
    facts = {
        'format_version': int(tensors[VERSION_KEY][0]), 'timm_el': __version__,
        'recipe': report.recipe.to_dict() if report is not None else None}
    # One entry only: their order in the file is not fixed, and equal models shall give equal bytes.
    data = save(tensors, metadata={METADATA_KEY: json.dumps(facts, sort_keys=True)})
    path = os.fspath(path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or '.', prefix='.packed-')
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_packed(path: str | os.PathLike, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors of a packed file and check them for damage.

    Args:
        path: The file.
        model: The model that it is for, so that the error can name what is missing.

    Raises:
        CheckpointError: It is not a safetensors file, is damaged, of a newer format, or not packed.
        FileNotFoundError: There is no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load
    path = os.fspath(path)
    with open(path, 'rb') as file:
        data = file.read()
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as e:
        raise CheckpointError(f'{path}: this is not a safetensors file, or a damaged one ({e})') from e
    if not is_packed(tensors):
        first = next(iter(tensors), None)
        raise CheckpointError(
            f'{path}: found a checkpoint of float tensors ({first}, ...), expected a packed file; load_state_dict '
            f'takes that of the model itself, timm_el.load_float that of its float host')
    check_damage(tensors, path, model)
    return tensors
