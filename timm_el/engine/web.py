"""Web page: a binarized network that classifies pictures in the browser, as a folder (docs/web.md)."""
import os
import shutil
import tempfile
from pathlib import Path

import torch.nn as nn

from . import abi
from .export import export

__all__ = ['web_runtime', 'write_web_page']

PROGRAM = 'net.program'  # the name that app.js fetches


def write_web_page(model: nn.Module, folder: str | os.PathLike, size: tuple[int, int] | None = None) -> int:
    """Write a page that runs a binarized network in the browser to a folder, and return the bytes of all its files.

    The page takes a picture, dropped, chosen or the camera's, and shows the likeliest labels and the time that the
    network took. Its runtime is WebAssembly and gives the bits of `deploy`. The folder needs a web server, such as
    `python -m http.server`. Files of the same names are replaced; nothing is written after an error.

    Args:
        model: A deployed network, or a latent one in eval mode; as for `export`.
        folder: Where the page goes; made if it is not there.
        size: (height, width) of the images, pixels; that of the network's own configuration if None.

    Raises:
        FileNotFoundError: timm_el was installed without the runtime.
        ValueError: No step computes a part of the network; as for `export`.
        RuntimeError: The native library is not there.
    """
    parts, folder = sorted(web_runtime().parent.iterdir()), Path(folder)
    with tempfile.TemporaryDirectory() as made:
        program = Path(made, PROGRAM)
        export(model, program, size=size)
        folder.mkdir(parents=True, exist_ok=True)
        return sum(Path(shutil.copyfile(path, folder / path.name)).stat().st_size for path in (program, *parts))


def web_runtime() -> Path:
    """Return the file of the runtime in WebAssembly; the page's other files are beside it.

    Raises:
        FileNotFoundError: It was not built, or from other sources than those beside this file.
    """
    path = abi.WEB_RUNTIME
    if not path.exists():
        found = 'is not there'
    elif abi.source_hash().encode() not in path.read_bytes():
        found = 'was built from other sources'
    else:
        return path
    raise FileNotFoundError(
        f'{path} {found}: Zig builds it with the package; install a wheel of timm_el, or `pip install ziglang` and '
        f'then timm_el again, in a checkout with `python setup.py build_ext`')
