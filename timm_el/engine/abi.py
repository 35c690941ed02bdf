"""The binary interface of the native library: its file name, its structures, and the hash of what it was built from.

The build reads this file too, without importing the package, so it needs nothing but the standard library.
"""
import ctypes
import hashlib
import sys
from pathlib import Path

__all__ = ['KERNELS', 'LIBRARY', 'REASON', 'RUNNER', 'SUFFIXES', 'Plan', 'Step', 'Window', 'source_hash', 'sources']

KERNELS = Path(__file__).with_name('kernels')
SUFFIXES = {'win32': '.dll', 'darwin': '.dylib'}  # by sys.platform; others have .so
LIBRARY = '_native' + SUFFIXES.get(sys.platform, '.so')
RUNNER = 'timm-el-run' + ('.exe' if sys.platform == 'win32' else '')  # stands beside the library
REASON = '_native.txt'  # stands beside this file instead of the library and says why there is none


class Window(ctypes.Structure):
    """`el_window` of engine.h."""
    _fields_ = [(n, ctypes.c_int32) for n in ('kh', 'kw', 'sh', 'sw', 'ph', 'pw', 'dh', 'dw')]


class Plan(ctypes.Structure):
    """`el_plan` of engine.h."""
    _fields_ = [
        *[(n, ctypes.c_int32) for n in ('n', 'h', 'w', 'c_in', 'oh', 'ow', 'c_out')],
        ('conv', Window),
        *[(n, ctypes.c_int32) for n in (
            'groups', 'pad_value', 'real', 'is_pool', 'has_k', 'act', 'has_affine', 'has_post', 'link', 'link_pool',
            'link_h', 'link_w', 'link_c')],
        ('pool', Window),
        ('table_stride', ctypes.c_int32),
        *[(n, ctypes.c_float) for n in ('lo', 'hi', 'inverse_gamma')],
        *[(n, ctypes.c_void_p) for n in ('table', 'threshold', 'flip', 'weight', 'tap_sums')],
    ]


class Step(ctypes.Structure):
    """`el_step` of engine.h."""
    _fields_ = [('plan', ctypes.c_void_p), ('source', ctypes.c_int32), ('added', ctypes.c_int32)]


def sources() -> list[Path]:
    """Return the C files of the library, sorted; the test driver is not among them."""
    return sorted(path for path in KERNELS.rglob('*.c') if path.name != 'driver.c')


def source_hash() -> str:
    """Return the SHA-256 of the kernels, their flags and this file, as 64 hexadecimal digits.

    The build compiles it into the library, and the loader refuses a library with another one: it would read structures
    that are no longer these.
    """
    digest = hashlib.sha256()
    for path in (*sources(), *sorted(KERNELS.rglob('*.h')), KERNELS / 'flags.txt', Path(__file__)):
        digest.update(path.name.encode() + b'\0' + path.read_bytes().replace(b'\r\n', b'\n') + b'\0')
    return digest.hexdigest()
