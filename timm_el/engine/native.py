"""The native library: found, loaded and asked once. Importing this cannot fail; `info()` says what came of it."""
import ctypes
import functools
import importlib.metadata
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import abi

__all__ = [
    'SlowEngineWarning', 'chip_rate', 'count_rate', 'info', 'library', 'library_path', 'runner', 'use_isa',
    'warn_if_slow',
]

REFERENCE = 'reference'
PORTABLE = 'portable'


class SlowEngineWarning(UserWarning):
    """The engine runs without the kernels of this processor, and nobody asked for that."""


_lib: ctypes.CDLL | None = None
_reason = ''
_asked = False  # the body, or the reference, was chosen by name
_warned = False
_generation = 0  # changes with the body: weights laid out for another one are no longer valid


def _places(name: str) -> Iterator[Path]:
    """Yield the files that may be the library or the runner: beside this file, then in each installed timm-el.

    A checkout that was never installed itself finds the library of the timm-el that was.
    """
    yield Path(__file__).with_name(name)
    for distribution in importlib.metadata.distributions(name='timm-el'):
        yield Path(str(distribution.locate_file(f'timm_el/engine/{name}')))


def _why_missing() -> str:
    """Return why there is no library, as the build wrote it down."""
    try:
        return Path(__file__).with_name(abi.REASON).read_text().strip()
    except OSError:
        return (f'{abi.LIBRARY} is not there: this is a source folder that was not installed; '
                f'run `pip install -e .` in it')


def _open(path: Path) -> ctypes.CDLL:
    """Open a library and declare its functions.

    Raises:
        OSError: It does not load, or is built from other sources than those beside this file.
    """
    try:
        lib = ctypes.CDLL(str(path))
        lib.el_hash.restype = ctypes.c_char_p
        found = lib.el_hash().decode()
    except (OSError, AttributeError) as e:
        raise OSError(f'{path} does not load ({e}); install timm_el again') from None
    expected = abi.source_hash()
    if found != expected:
        raise OSError(
            f'{path} was built from other sources ({found[:8]}, expected {expected[:8]}); install timm_el again')
    address, text = ctypes.c_void_p, ctypes.c_char_p
    error = (text, ctypes.c_size_t)
    for name, result, arguments in (
            ('el_bodies', text, ()), ('el_active', text, ()), ('el_use', ctypes.c_int, (text,)),
            ('el_chip_rate', ctypes.c_double, ()), ('el_count_time', ctypes.c_double, (ctypes.c_int,) * 4),
            ('el_differs', ctypes.c_int, (address, address, ctypes.c_int)),
            ('el_nhwc', None, (address, ctypes.c_int, ctypes.c_int, ctypes.c_int64, address)),
            ('el_large_image', ctypes.c_size_t, (ctypes.c_size_t,)),
            ('el_program_new', address, (address, ctypes.c_size_t, address, *error)),
            ('el_open', address, (text, ctypes.c_int, *error)), ('el_close', None, (address,)),
            ('el_metadata', address, (address, address)),
            ('el_make_ready', address, (address, address, ctypes.c_int, *error)),
            ('el_run_ready', ctypes.c_int, (address, address, address))):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def _find() -> None:
    """Set `_lib` to the first library that can be used, else `_reason` to why there is none."""
    global _lib, _reason
    refused = []
    for path in _places(abi.LIBRARY):
        if not path.exists():
            continue
        try:
            _lib = _open(path)
            return
        except OSError as e:
            refused.append(str(e))
    _reason = refused[0] if refused else _why_missing()


def _load() -> None:
    """Find the library and choose the body that TIMM_EL_ISA names."""
    global _lib, _reason
    wanted = os.environ.get('TIMM_EL_ISA') or None
    _find()
    if _lib is None and wanted != REFERENCE:
        return
    try:
        use_isa(wanted)
    except ValueError as e:
        _lib, _reason = None, f'TIMM_EL_ISA: {e}'


@functools.cache
def _bodies() -> list[str]:
    return _lib.el_bodies().decode().split()


def use_isa(name: str | None = None) -> None:
    """Choose the body by name, the best one if None, or 'reference' for no native library at all.

    The environment variable TIMM_EL_ISA does the same when the package is first imported. Not to be called while
    another thread runs a deployed model.

    Raises:
        ValueError: The processor does not run it, or it is unknown, or there is no library.
    """
    global _lib, _reason, _generation, _asked
    if name == REFERENCE:
        _lib, _reason, _asked = None, f'{REFERENCE} was asked for', True
        _generation += 1
        return
    if _lib is None:
        _find()
        if _lib is None:
            if name is not None:
                raise ValueError(f'found {name!r}, but {_reason}')
            _asked = False
            return
    known = _bodies()
    if name is not None and name not in known:
        raise ValueError(f'found {name!r}, expected one of {", ".join((*known, REFERENCE))} on this processor')
    _lib.el_use((name or known[0]).encode())
    _generation += 1
    _reason, _asked = 'asked for' if name else 'the best one that this processor runs', name is not None


def warn_if_slow() -> None:
    """Warn once in a process if the reference or the portable body runs without having been asked for.

    The warning is a `SlowEngineWarning`.
    """
    global _warned
    found = info()
    if _warned or _asked or found['body'] not in (REFERENCE, PORTABLE):
        return
    _warned = True
    if found['body'] == PORTABLE:
        why = 'timm_el has no kernels for this processor, so the portable ones run, several times slower'
    else:
        why = f'the native kernels do not run, and deployed networks are slower than the latent ones: {found["reason"]}'
    warnings.warn(
        f'{why}. timm_el.engine.info() says more; timm_el.engine.use_isa({found["body"]!r}) or '
        f'TIMM_EL_ISA={found["body"]} asks for this on purpose', SlowEngineWarning, stacklevel=3)


def library() -> ctypes.CDLL | None:
    """Return the library, or None if the reference runs."""
    return _lib


def library_path() -> Path:
    """Return the file of the library.

    Raises:
        RuntimeError: The reference runs.
    """
    return Path(_native()._name)


def generation() -> int:
    """Return a number that changes with the instruction set and with the tensors of any deployed network."""
    return _generation


def touch() -> None:
    """Say that tensors of a deployed network were loaded or moved: what was laid out of tensors is laid out anew."""
    global _generation
    _generation += 1


def info() -> dict[str, Any]:
    """Return which instruction set runs, and why.

    Returns:
        'native' (bool), 'body' ('avx512', 'avx512bw', 'avx2', 'neondot', 'neon', 'portable', or 'reference' without the
        library), 'reason', 'available' (bodies that this processor runs, best first) and 'threads' (torch's number,
        which the engine uses).
    """
    return {
        'native': _lib is not None,
        'body': _lib.el_active().decode() if _lib else REFERENCE,
        'reason': _reason,
        'available': _bodies() if _lib else [],
        'threads': torch.get_num_threads(),
    }


def runner() -> Path:
    """Return the command-line program that runs exported networks without Python, `timm-el-run`.

    Raises:
        FileNotFoundError: It was not built; the message says what to do.
    """
    for path in _places(abi.RUNNER):
        if path.exists():
            return path
    raise FileNotFoundError(
        f'{Path(__file__).with_name(abi.RUNNER)} is not there; it is built with the native library, where there is a C '
        f'compiler or ziglang: run `pip install --force-reinstall --no-deps timm-el`')


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
