"""Export: a binarized network as a program file, for the C runner, a web page and `load_program`."""
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_unflatten

from ..dry_run import own_input_size
from . import native
from .artifact import write_program
from .deploy import deploy
from .execution import Runner
from .network import Deployed, Entries
from .structure import plain
from .views import Ref

__all__ = ['export', 'label_names', 'metadata_of', 'program_of']


def export(model: nn.Module, path: str | os.PathLike, *, size: tuple[int, int] | None = None) -> int:
    """Write a binarized network to a program file, and return the file's bytes.

    The file holds the network as one list of steps with its constants (weights as bits), and what its user must know:
    labels and preprocessing. `timm_el.load_program`, `timm-el-run` and the exported web page run it; docs/program.md
    describes each byte.

    Args:
        model: A deployed network, or a latent one in eval mode, which is deployed for this.
        path: The file; it is replaced whole or not at all.
        size: (height, width) of the images to record the network with, pixels; that of its own configuration if None.

    Raises:
        ValueError: The network holds modules that have no step, or depends on the batch; the text names them.
        RuntimeError: The native library is not there.
    """
    runner = program_of(model, size)
    if runner.islands:
        raise ValueError(
            f'model: {", ".join(runner.islands[:5])} run their own forward, because they hold operators that have no '
            f'step; expected modules of convolutions, pools, norms, activations, sums and products')
    if not all(isinstance(leaf, Ref) for leaf in runner.leaves):
        raise ValueError('model: found outputs that are no tensors, expected tensors')
    return write_program(runner.program, path, metadata_of(model, runner, size))


def program_of(model: nn.Module, size: tuple[int, int] | None = None) -> Runner:
    """Return what runs in place of a network's forward: its steps, its islands, the sizes that it holds for.

    Args:
        model: A deployed network, or a latent one in eval mode, which is deployed for this.
        size: (height, width) of the images to record it with, pixels; that of its own configuration if None.

    Raises:
        ValueError: The network goes module by module.
        RuntimeError: The native library is not there.
    """
    if native.library() is None:
        raise RuntimeError(f'a program needs the native library: {native.info()["reason"]}')
    if size is not None and (not isinstance(size, (tuple, list)) or len(size) != 2 or not all(
            isinstance(n, int) and n > 0 for n in size)):
        raise ValueError(f'size: found {size!r}, expected (height, width)')
    network = model if isinstance(model, Deployed) else deploy(model)
    channels, *own_size = own_input_size(model)
    image = torch.zeros((1, channels, *(size or own_size)), dtype=torch.float32, device='cpu')
    with torch.no_grad():
        entries = Entries(network)
        least = entries.snapshot.least_size
        if min(image.shape[2:]) < least:
            found_size = ' x '.join(map(str, image.shape[2:]))
            raise ValueError(f'size: found {found_size} pixels, expected at least {least} x {least}')
        found = entries.find('forward', (image,), {})
    if found is None:
        raise ValueError(
            'model: it goes module by module, because its own forward has operators that no step computes, or depends '
            'on the batch; expected a network of modules')
    return found[0]


def metadata_of(model: nn.Module, runner: Runner, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return what a user of the program must know: name, labels, preprocessing, and the structure of its outputs.

    Args:
        model: The network that the program was made of.
        runner: Its runner.
        size: (height, width) of the images in pixels; that of the model's configuration if None.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None) or {}
    channels, *own_size = own_input_size(model)
    return {
        'name': _name_of(model, cfg),
        'labels': label_names(model),
        'preprocess': {
            'size': list(size or own_size), 'mean': _per_channel(cfg.get('mean', [0.]), channels),
            'std': _per_channel(cfg.get('std', [1.]), channels), 'interpolation': cfg.get('interpolation', 'bicubic'),
            'crop_pct': cfg.get('crop_pct', 1.), 'crop_mode': cfg.get('crop_mode') or 'center'},
        'outputs': plain(tree_unflatten(range(len(runner.leaves)), runner.spec)),
    }


def _name_of(model: nn.Module, cfg: dict[str, Any]) -> str:
    """Return the name of a network: that of its host if it was loaded from the folder of a converted one."""
    host = getattr(model, '_model_args', {}).get('host')
    return host if isinstance(host, str) else cfg.get('architecture') or type(model).__name__


def _per_channel(values: Sequence[float], channels: int) -> list[float] | None:
    """Return one value per channel: the mean of all for a network of one channel; None if that is not known."""
    if len(values) == channels:
        return list(values)
    if channels == 1 or len(set(values)) == 1:
        return [sum(values) / len(values)] * channels
    return None


def label_names(model: nn.Module) -> list[str] | None:
    """Return the names of a network's classes: its config's, ImageNet's for a head of that size, or None."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    names, classes = cfg.get('label_names'), getattr(model, 'num_classes', 0)
    if names and len(names) == classes:
        return list(names)
    from timm.data import ImageNetInfo, infer_imagenet_subset
    subset = infer_imagenet_subset(model) if classes else None
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(classes)]
