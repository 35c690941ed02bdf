"""Run the network in net.program, which lies beside this file with the native library. Needs NumPy alone.

    import net
    net.classify(image)            # uint8 (H, W, 3) -> [(label, probability), ...]
    net.run(net.preprocess(image)) # float32 (N, C, H, W) -> outputs

`net.labels` are the names of the classes or None, and `net.metadata` is what else the file says.
"""
import ctypes
import json
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np

__all__ = ['classify', 'labels', 'metadata', 'preprocess', 'run']

FOLDER = Path(__file__).resolve().parent
PROGRAM = FOLDER / 'net.program'
LIBRARY = FOLDER / ('_native' + {'win32': '.dll', 'darwin': '.dylib'}.get(sys.platform, '.so'))
ERROR_BYTES = 512
NO_MEMORY = 2  # what el_run answers
FORMS = (  # of outputs: (n, h, w, c) -> what the network returns
    lambda y: y.transpose(0, 3, 1, 2), lambda y: y[:, 0, 0], lambda y: y,
    lambda y: y.reshape(len(y), y.shape[1] * y.shape[2], y.shape[3]))


def run(x, threads=1):
    """Return the outputs of the network.

    Args:
        x: Images (N, C, H, W), float32, prepared as `preprocess` does it.
        threads: Threads that may work.

    Returns:
        An array, or lists, tuples and dicts of them, as the network itself returns.

    Raises:
        TypeError: x is no array of float32.
        ValueError: Its shape does not fit.
        MemoryError: There is no memory for the values in between.
    """
    if not isinstance(x, np.ndarray) or x.dtype != np.float32:
        found = f'an array of {x.dtype}' if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f'{PROGRAM}: found {found}, expected a NumPy array of float32')
    if x.ndim != 4 or x.shape[1] != _channels or (_height and x.shape[2:] != (_height, _width)):
        wanted = f'(N, {_channels}, {_height or "H"}, {_width or "W"})'
        raise ValueError(f'{PROGRAM}: found an input of shape {x.shape}, expected {wanted}')
    image = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    error = ctypes.create_string_buffer(ERROR_BYTES)
    sizes, shapes = (ctypes.c_int64 * 4)(*image.shape), (ctypes.c_int64 * (4 * len(_forms)))()
    if _lib.el_shapes(_program, sizes, shapes, error, ERROR_BYTES):
        raise ValueError(f'{PROGRAM}: {error.value.decode()}')
    outputs = [np.empty(shapes[i:i + 4], np.float32) for i in range(0, len(shapes), 4)]
    failed = _lib.el_run(_program, sizes, _pointers([image]), _pointers(outputs), threads, error, ERROR_BYTES)
    if failed:
        raise (MemoryError if failed == NO_MEMORY else ValueError)(f'{PROGRAM}: {error.value.decode()}')
    return _nested(metadata['outputs'], [FORMS[form](y) for form, y in zip(_forms, outputs)])


def classify(image, top=5):
    """Return the likeliest classes of a picture as pairs of label, or number, and probability.

    Args:
        image: uint8 (H, W, C), or (H, W) for a network of one channel; of any size.
        top: How many.
    """
    logits = run(preprocess(image))
    if not isinstance(logits, np.ndarray) or logits.ndim != 2:
        raise ValueError(f'{PROGRAM}: this network does not give one row of numbers per image; use net.run')
    scores = np.exp(logits[0].astype(np.float64) - logits[0].max())
    best = np.argsort(-scores, kind='stable')[:top]
    return [(labels[i] if labels else int(i), float(scores[i] / scores.sum())) for i in best]


def preprocess(image):
    """Return a picture as the network takes it, float32 (1, C, H, W): resized and cropped as timm does, and normalised.

    Args:
        image: uint8 (H, W, C), or (H, W) for a network of one channel.

    Raises:
        TypeError: It is no array of uint8.
        ValueError: Its shape does not fit, or the network was trained with another kind of crop or interpolation.
    """
    how = metadata['preprocess']
    height, width = how['size']
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = f'an array of {image.dtype}' if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f'{PROGRAM}: found {found}, expected a NumPy array of uint8')
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] != _channels or not image.size:
        raise ValueError(f'{PROGRAM}: found a picture of shape {image.shape}, expected (H, W, {_channels})')
    image = _resize(image, _scaled_size(image.shape[:2], how), how['interpolation'])
    top, left = (round((n - m) / 2.) for n, m in zip(image.shape, (height, width)))
    image = image[top:top + height, left:left + width].astype(np.float32) / np.float32(255)
    if how['mean'] is None or how['std'] is None:
        raise ValueError(f'{PROGRAM}: mean and std of its {_channels} channels are not known; prepare images yourself')
    image = (image - np.float32(how['mean'])) / np.float32(how['std'])
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None])


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def _scaled_size(size, how):
    """Return the rows and columns to which a picture is scaled before it is cropped."""
    target = [math.floor(n / how['crop_pct']) for n in how['size']]
    if how['crop_mode'] == 'squash':
        return target
    if how['crop_mode'] != 'center':
        raise ValueError(
            f'{PROGRAM}: found crop_mode {how["crop_mode"]!r}, expected center or squash; prepare images yourself')
    if target[0] == target[1]:  # the shorter side
        short = min(size)
        return [target[0] if n == short else int(target[0] * n / short) for n in size]
    ratio = min(n / m for n, m in zip(size, target))
    return [round(n / ratio) for n in size]


# Reach in pixels and weight of a pixel at a distance.
FILTERS = {
    'bilinear': (1., lambda x: np.maximum(1 - x, 0)),
    'bicubic': (2., lambda x: np.where(  # a = -0.5
        x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))),
}
FRACTION_BITS = 22


def _resize(image, size, interpolation):
    """Return a uint8 picture (H, W, C) at another size, bit for bit as Pillow does where it scales columns first."""
    if interpolation not in FILTERS:
        raise ValueError(
            f'{PROGRAM}: found interpolation {interpolation!r}, expected one of {", ".join(FILTERS)}; scale pictures '
            f'yourself and pass them to net.run')
    for axis in (1, 0):
        if image.shape[axis] != size[axis]:
            image = _resample(image, axis, size[axis], *FILTERS[interpolation])
    return image


def _resample(image, axis, n, reach, weight):
    """Return a picture with n rows or columns; each pixel is a sum in whole numbers, rounded to 8 bits."""
    before = image.shape[axis]
    scale = before / n
    wide = max(scale, 1.)
    lines = np.moveaxis(image, axis, 0).astype(np.int64)
    out = np.empty((n, *lines.shape[1:]), np.uint8)
    for i in range(n):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - reach * wide + 0.5), 0), min(int(centre + reach * wide + 0.5), before)
        weights = weight(np.abs((np.arange(first, last) - centre + 0.5) * (1 / wide)))
        whole = np.floor(np.abs(weights * (1 / weights.sum())) * (1 << FRACTION_BITS) + 0.5) * np.sign(weights)
        total = np.tensordot(whole.astype(np.int64), lines[first:last], 1) + (1 << FRACTION_BITS - 1)
        out[i] = np.clip(total >> FRACTION_BITS, 0, 255)
    return np.moveaxis(out, 0, axis)


# ----------------------------------------------------------------------------------------------------------------------
# The file


def _open():
    """Open library and program; return both, the metadata, the input's sizes and the forms of the outputs."""
    for path in (PROGRAM, LIBRARY):
        if not path.is_file():
            raise FileNotFoundError(f'{path}: found no such file, expected what `timm-el export --python` wrote')
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError as e:
        raise OSError(f'{LIBRARY} does not load: {e}; expected a library for this system; export on it') from None
    address, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    for name, result, arguments in (
            ('el_open', address, (text, ctypes.c_int, text, size)), ('el_metadata', address, (address, address)),
            ('el_shapes', ctypes.c_int, (address, address, address, text, size)),
            ('el_run', ctypes.c_int, (address, address, address, address, ctypes.c_int, text, size)),
            ('el_inputs', ctypes.c_int, (address,)),
            ('el_input', ctypes.c_int, (address, ctypes.c_int, address, address, address))):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    error = ctypes.create_string_buffer(ERROR_BYTES)
    program = lib.el_open(os.fsencode(PROGRAM), 0, error, ERROR_BYTES)
    if not program:
        raise ValueError(f'{PROGRAM}: {error.value.decode()}')
    if lib.el_inputs(program) != 1:
        raise ValueError(f'{PROGRAM}: found {lib.el_inputs(program)} inputs, expected one')
    length = size()
    data = json.loads(ctypes.string_at(lib.el_metadata(program, ctypes.byref(length)), length.value))
    facts = [ctypes.c_int32() for _ in range(3)]
    lib.el_input(program, 0, *map(ctypes.byref, facts))
    with open(PROGRAM, 'rb') as file:
        n_inputs, n_outputs = struct.unpack_from('<2I', file.read(96), 16)
        file.seek(96 + 16 * n_inputs)
        forms = [form for _, form, _, _ in struct.iter_unpack('<4i', file.read(16 * n_outputs))]
    return lib, program, data, [n.value for n in facts], forms


def _nested(structure, outputs):
    """Return outputs in the lists, tuples and dicts of the metadata, in which numbers stand for them."""
    if isinstance(structure, int):
        return outputs[structure]
    (kind, inner), = structure.items()
    if kind == 'dict':
        return {key: _nested(value, outputs) for key, value in inner.items()}
    return {'list': list, 'tuple': tuple}[kind](_nested(value, outputs) for value in inner)


def _pointers(arrays):
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


_lib, _program, metadata, (_channels, _height, _width), _forms = _open()
labels = metadata['labels']
