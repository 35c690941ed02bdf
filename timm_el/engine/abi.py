"""Files of the native library: names, sources, and the hash of what it was built from.

The build reads this file too, without importing the package, so it needs nothing but the standard library.
"""
import hashlib
import sys
from pathlib import Path

__all__ = ['KERNELS', 'LIBRARY', 'REASON', 'RUNNER', 'SUFFIXES', 'WEB_RUNTIME', 'source_hash', 'sources']

KERNELS = Path(__file__).with_name('kernels')
SUFFIXES = {'win32': '.dll', 'darwin': '.dylib'}  # by sys.platform; others have .so
LIBRARY = '_native' + SUFFIXES.get(sys.platform, '.so')
RUNNER = 'timm-el-run' + ('.exe' if sys.platform == 'win32' else '')  # stands beside the library
WEB_RUNTIME = Path(__file__).with_name('web') / 'runtime.wasm'  # the page's other files are beside it
REASON = '_native.txt'  # stands beside this file instead of the library and says why there is none


def sources() -> list[Path]:
    """Return the C files of the library, sorted."""
    return sorted(KERNELS.rglob('*.c'))


def source_hash() -> str:
    """Return the SHA-256 of the kernels, their flags and this file, as 64 hexadecimal digits.

    The build compiles it into the library, and the loader refuses a library with another one: it would read tables that
    are no longer these.
    """
    digest = hashlib.sha256()
    for path in (*sources(), *sorted(KERNELS.rglob('*.h')), KERNELS / 'flags.txt', Path(__file__)):
        digest.update(path.name.encode() + b'\0' + path.read_bytes().replace(b'\r\n', b'\n') + b'\0')
    return digest.hexdigest()
