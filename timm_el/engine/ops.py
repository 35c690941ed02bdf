"""The engine's operators: `torch.ops.timm_el.binary_conv2d` and `torch.ops.timm_el.real_conv2d`.

Each has a schema, a fake kernel for tracing, a plain-torch reference (reference.py) and, where the native library is
active, a kernel in C that gives the same bits. They are for inference: no gradient is defined.
"""
import ctypes
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from ..bits import packed_size
from . import native, reference
from .spec import ACTS, LINKS, POOLS, ROWS, ConvSpec, table_stride

__all__ = ['binary_conv2d', 'real_conv2d']

_library = torch.library.Library('timm_el', 'DEF')
_EPILOGUE = 'Tensor? link, int[] spec, float[] constants) -> Tensor'
_library.define(f'binary_conv2d(Tensor x, Tensor weight, Tensor table, Tensor? threshold, Tensor? flip, {_EPILOGUE}')
_library.define(f'real_conv2d(Tensor x, Tensor weight, Tensor table, {_EPILOGUE}')

MOST_PLANS = 64  # of one layer: image sizes that it remembers


class _Prepared:
    """What the native library keeps for one weight tensor: its own layout, and a plan for each shape of input."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.generation = native.generation()
        self.weights: Dict[Tuple[int, ...], Tuple[torch.Tensor, Optional[torch.Tensor]]] = {}
        self.plans: Dict[Tuple[Any, ...], Tuple[native.Plan, List[int]]] = {}


_prepared: WeakIdKeyDictionary = WeakTensorKeyDictionary()


def _check(
        x: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        threshold: Optional[torch.Tensor],
        flip: Optional[torch.Tensor],
        link: Optional[torch.Tensor],
        spec: ConvSpec,
        constants: List[float],
        real: bool,
) -> None:
    """Raise ValueError or TypeError unless everything fits together."""
    floats = (('x', x), ('table', table), ('threshold', threshold), ('link', link), *([('weight', weight)] * real))
    for name, tensor in floats:
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f'{name}: found dtype {tensor.dtype}, expected torch.float32; convert it with .float()')
    problem = spec.problem(x.shape, None if link is None else link.shape)
    if problem:
        raise ValueError(problem)
    if real and (spec.has_k or 1 < spec.groups and not spec.is_depthwise):
        raise ValueError(f'spec: found {spec}, a real convolution has no K and is full or depthwise')
    channels = spec.c_in // spec.groups
    expected: Dict[str, Tuple[Optional[torch.Tensor], Tuple[int, ...], torch.dtype]] = {
        'weight': (
            weight, (spec.c_out, channels, *spec.conv.kernel) if real else
            (spec.c_out, *spec.conv.kernel, packed_size(channels)), torch.float32 if real else torch.uint8),
        'table': (table, (len(ROWS), table_stride(spec.c_out)), torch.float32),
        'threshold': (threshold, (spec.c_in,), torch.float32),
        'flip': (flip, (spec.c_in,), torch.int32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f'{name}: found {tensor.dtype} {tuple(tensor.shape)}, expected a contiguous {dtype} tensor {shape}')
    if len(constants) != 3:
        raise ValueError(f'constants: found {len(constants)} numbers, expected lo, hi and 1 / gamma')


def _pointer(tensor: Optional[torch.Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def _plan(
        lib: ctypes.CDLL,
        x: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        threshold: Optional[torch.Tensor],
        flip: Optional[torch.Tensor],
        link: Optional[torch.Tensor],
        ints: List[int],
        constants: List[float],
        real: bool,
) -> Tuple[native.Plan, List[int]]:
    """The C plan of a call and the shape of its output: made and checked once for each shape of input."""
    prepared = _prepared.get(weight)
    if prepared is None or prepared.version != weight._version or prepared.generation != native.generation():
        prepared = _prepared[weight] = _Prepared(weight._version)
    key = (
        x.shape, x.dtype, None if link is None else (link.shape, link.dtype), *ints, *constants, table.data_ptr(),
        _pointer(threshold), _pointer(flip), real)
    found = prepared.plans.get(key)
    if found is not None:
        return found
    spec = ConvSpec.of(ints)
    _check(x, weight, table, threshold, flip, link, spec, constants, real)
    n, _, h, w = x.shape
    oh, ow = spec.output_size(h, w)
    window = native.Plan._fields_[7][1]
    plan = native.Plan(
        n, h, w, spec.c_in, oh, ow, spec.c_out, window(*spec.conv.ints()), spec.groups, spec.pad_value, int(real),
        int(spec.has_k), ACTS.index(spec.act), int(spec.has_affine), int(spec.has_post), LINKS.index(spec.link),
        POOLS.index(spec.link_pool), *((0, 0, 0) if link is None else (*link.shape[2:], spec.link_c)),
        window(*spec.pool.ints()), table_stride(spec.c_out), *constants, table.data_ptr(), _pointer(threshold),
        _pointer(flip))
    padded = any((*spec.conv.padding, *spec.pad_end)) and spec.pad_value != -1 and not real
    layout = (spec.c_in, spec.groups, spec.pad_value, padded)
    if layout not in prepared.weights:
        prepared.weights[layout] = _lay_out(lib, plan, weight, spec, padded, real)
    ready, sums = prepared.weights[layout]
    plan.weight, plan.tap_sums = ready.data_ptr(), _pointer(sums)
    if len(prepared.plans) >= MOST_PLANS:
        prepared.plans.clear()
    prepared.plans[key] = found = (plan, [n, spec.c_out, oh, ow])
    return found


def _lay_out(
        lib: ctypes.CDLL, plan: native.Plan, weight: torch.Tensor, spec: ConvSpec, padded: bool, real: bool,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The weight in the body's layout, and what padding adds for each tap."""
    ready = torch.empty(lib.el_weight_size(ctypes.byref(plan)) + 64, dtype=torch.uint8)
    ready = ready[-ready.data_ptr() % 64:]
    if real:
        lib.el_prepack_real(ctypes.byref(plan), weight.data_ptr(), ready.data_ptr())
        return ready, None
    sums = torch.empty((spec.taps, table_stride(spec.c_out)), dtype=torch.int32) if padded else None
    if lib.el_prepack(ctypes.byref(plan), weight.data_ptr(), ready.data_ptr(), _pointer(sums)):
        raise MemoryError('the weights could not be laid out')
    return ready, sums


def _run(
        x: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        threshold: Optional[torch.Tensor],
        flip: Optional[torch.Tensor],
        link: Optional[torch.Tensor],
        ints: List[int],
        constants: List[float],
        real: bool,
) -> torch.Tensor:
    lib = native.library()
    if lib is None:
        spec = ConvSpec.of(ints)
        _check(x, weight, table, threshold, flip, link, spec, constants, real)
        if real:
            return reference.real_conv2d(x, weight, table, link, spec, constants)
        return reference.binary_conv2d(x, weight, table, threshold, flip, link, spec, constants)
    plan, shape = _plan(lib, x, weight, table, threshold, flip, link, ints, constants, real)
    same = link is x
    x = x.contiguous(memory_format=torch.channels_last)
    if link is not None:
        link = x if same else link.contiguous(memory_format=torch.channels_last)
    y = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    tensors = native.Tensors(x.data_ptr(), None if link is None else link.data_ptr(), y.data_ptr())
    failed = lib.el_conv(plan, tensors, torch.get_num_threads()) if y.numel() else 0
    if failed:
        raise MemoryError('no memory for the scratch of a convolution') if failed == 2 else RuntimeError(
            f'the native library refused {ConvSpec.of(ints)} for {tuple(x.shape)}')
    return y


def _binary(x, weight, table, threshold, flip, link, spec, constants):
    return _run(x, weight, table, threshold, flip, link, spec, constants, False)


def _real(x, weight, table, link, spec, constants):
    return _run(x, weight, table, None, None, link, spec, constants, True)


def _fake(x: torch.Tensor, spec: List[int]) -> torch.Tensor:
    parsed = ConvSpec.of(spec)
    torch._check(x.dim() == 4, lambda: f'x: found {x.dim()} axes, expected (N, C, H, W)')
    size = [x.shape[0], parsed.c_out, *parsed.output_size(*x.shape[2:])]
    return x.new_empty(size).to(memory_format=torch.channels_last)


_library.impl('binary_conv2d', _binary, 'CPU')
_library.impl('real_conv2d', _real, 'CPU')
torch.library.register_fake(
    'timm_el::binary_conv2d', lambda x, weight, table, threshold, flip, link, spec, constants: _fake(x, spec))
torch.library.register_fake(
    'timm_el::real_conv2d', lambda x, weight, table, link, spec, constants: _fake(x, spec))

binary_conv2d = torch.ops.timm_el.binary_conv2d.default
real_conv2d = torch.ops.timm_el.real_conv2d.default
