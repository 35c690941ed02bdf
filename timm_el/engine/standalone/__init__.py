"""write_python(): a binarized network as a folder that Python runs with NumPy alone, without torch and timm."""
import os
import shutil
from pathlib import Path

import torch.nn as nn

from .. import abi, native
from ..export import export

__all__ = ['write_python']

TEMPLATE = Path(__file__).with_name('net.py')


def write_python(model: nn.Module, folder: str | os.PathLike, size: tuple[int, int] | None = None) -> int:
    """Write a network's program, the native library and a module `net.py` to a folder; return their bytes.

    Args:
        model: A deployed network, or a latent one in eval mode.
        folder: Where to; it is made if it is not there.
        size: (height, width) of the images to record the network with, pixels; that of its own configuration if None.

    Raises:
        ValueError, RuntimeError: As for `export`; nothing is written then.
    """
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / 'net.program'
    try:
        export(model, program, size=size)
    except (RuntimeError, ValueError):
        if made:
            folder.rmdir()
        raise
    library = folder / abi.LIBRARY
    shutil.copy2(native.library_path(), library.with_suffix('.part'))
    library.with_suffix('.part').replace(library)  # a process may run the old one
    shutil.copyfile(TEMPLATE, folder / TEMPLATE.name)
    return sum(path.stat().st_size for path in (program, library, folder / TEMPLATE.name))
