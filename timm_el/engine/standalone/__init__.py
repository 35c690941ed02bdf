"""write_python(): a binarized network as a folder that Python runs with NumPy alone, without torch and timm."""
import os
import shutil
import tempfile
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
    program = folder / 'net.program'
    with tempfile.TemporaryDirectory() as temporary:
        export(model, Path(temporary) / program.name, size=size)  # what it refuses leaves no folder behind
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(temporary) / program.name, program.with_suffix('.part'))
    program.with_suffix('.part').replace(program)  # a process may have the old one mapped
    library = folder / abi.LIBRARY
    shutil.copy2(native.library_path(), library.with_suffix('.part'))
    library.with_suffix('.part').replace(library)  # a process may run the old one
    shutil.copyfile(TEMPLATE, folder / TEMPLATE.name)
    return sum(path.stat().st_size for path in (program, library, folder / TEMPLATE.name))
