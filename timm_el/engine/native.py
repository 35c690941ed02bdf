"""The native library: found, loaded and asked once. Importing this cannot fail; `info()` says what came of it."""
import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

__all__ = ['info', 'use_isa', 'library', 'chip_rate', 'count_rate', 'Plan', 'Step', 'Window']

ABI = 2
NAME = {'win32': '_native.dll', 'darwin': '_native.dylib'}.get(sys.platform, '_native.so')
REFERENCE = 'reference'


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


_lib: Optional[ctypes.CDLL] = None
_reason = ''
_generation = 0  # changes with the body: weights laid out for another one are no longer valid


def _load() -> None:
    global _lib, _reason
    path = Path(__file__).with_name(NAME)
    if not path.exists():
        _reason = f'{NAME} is not there: no C compiler was found when timm_el was installed'
        return
    try:
        lib = ctypes.CDLL(str(path))
        found = lib.el_abi()
    except (OSError, AttributeError) as e:
        _reason = f'{NAME} does not load ({e}); install timm_el again'
        return
    if found != ABI:
        _reason = f'{NAME} is of another version ({found}, expected {ABI}); install timm_el again'
        return
    plan = ctypes.POINTER(Plan)
    for name, result, arguments in (
            ('el_bodies', ctypes.c_char_p, ()), ('el_active', ctypes.c_char_p, ()),
            ('el_use', ctypes.c_int, (ctypes.c_char_p,)), ('el_chip_rate', ctypes.c_double, ()),
            ('el_nhwc', None, (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p)),
            ('el_large_image', ctypes.c_size_t, (ctypes.c_size_t,)),
            ('el_weight_size', ctypes.c_size_t, (plan,)),
            ('el_own_layout', ctypes.c_int, ()), ('el_advise', None, (ctypes.c_void_p, ctypes.c_size_t)),
            ('el_lay_out', None, (plan, *[ctypes.c_void_p] * 2)),
            ('el_tap_sums', None, (plan, *[ctypes.c_void_p] * 2)),
            ('el_conv', ctypes.c_int, (*[ctypes.c_void_p] * 5, ctypes.c_int)),
            ('el_chain', ctypes.c_int, (ctypes.c_void_p, ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_int)),
            ('el_count_time', ctypes.c_double, (ctypes.c_int,) * 4)):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    _lib = lib
    wanted = os.environ.get('TIMM_EL_ISA', '')
    try:
        use_isa(wanted or None)
    except ValueError as e:
        _lib, _reason = None, f'TIMM_EL_ISA: {e}'


@functools.lru_cache(maxsize=None)
def _bodies() -> List[str]:
    return _lib.el_bodies().decode().split()


def use_isa(name: Optional[str] = None) -> None:
    """Choose the body by name, the best one if None, or 'reference' for no native library at all.

    The environment variable TIMM_EL_ISA does the same when the package is first imported. Not to be called while
    another thread runs a deployed model.

    Raises:
        ValueError: The processor does not run it, or it is unknown.
    """
    global _lib, _reason, _generation
    if name == REFERENCE:
        _lib, _reason = None, f'{REFERENCE} was asked for'
        _generation += 1
        return
    if _lib is None:
        _load_again(name)
        return
    known = _bodies()
    if name is not None and name not in known:
        raise ValueError(f'found {name!r}, expected one of {", ".join((*known, REFERENCE))} on this processor')
    _lib.el_use((name or known[0]).encode())
    _generation += 1
    _reason = 'asked for' if name else 'the best one that this processor runs'


def _load_again(name: Optional[str]) -> None:
    before = os.environ.pop('TIMM_EL_ISA', None)
    try:
        _load()
        if _lib is None:
            if name is not None:
                raise ValueError(f'found {name!r}, but {_reason}')
        elif name is not None:
            use_isa(name)
    finally:
        if before is not None:
            os.environ['TIMM_EL_ISA'] = before


def library() -> Optional[ctypes.CDLL]:
    """The library, None if the reference runs."""
    return _lib


def generation() -> int:
    """A number that changes when another body is chosen."""
    return _generation


def info() -> Dict[str, Any]:
    """Which path computes binary layers, and why.

    Returns:
        'native' (bool), 'body' ('avx512', 'avx2', 'neon', 'portable', or 'reference' without the library), 'reason',
        'available' (bodies that this processor runs, best first) and 'threads' (torch's number, which the engine uses).
    """
    return {
        'native': _lib is not None,
        'body': _lib.el_active().decode() if _lib else REFERENCE,
        'reason': _reason,
        'available': _bodies() if _lib else [],
        'threads': torch.get_num_threads(),
    }


def chip_rate() -> float:
    """Binary multiply-accumulates per second that one core reaches with xor, popcount and add on registers.

    Raises:
        RuntimeError: There is no native library.
    """
    return _native().el_chip_rate()


def count_rate(words: int, channels: int, pixels: int, repeats: int = 20) -> float:
    """Binary multiply-accumulates per second of the GEMM kernel alone on one core, best of `repeats` passes.

    Args:
        words: 64-bit words of an output pixel's string, ceil(C_in / 64) * taps.
        channels: Output channels.
        pixels: Output pixels.
        repeats: Passes.
    """
    return 64. * words * channels * pixels / _native().el_count_time(words, channels, pixels, repeats)


def _native() -> ctypes.CDLL:
    if _lib is None:
        raise RuntimeError(f'the native library is not active: {_reason}')
    return _lib


_load()
