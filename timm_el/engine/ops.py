"""The engine's operators: `binary_conv2d`, `real_conv2d`, `pool2d` and `chain` of `torch.ops.timm_el`.

Each has a schema, a fake kernel for tracing, a plain-torch reference (reference.py) and, where the native library is
active, a kernel in C that gives the same bits. They are for inference: no gradient is defined.
"""
import ctypes
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from . import native, reference
from .layout import stored_shape
from .spec import ACTS, LINKS, POOLS, ConvSpec, Window, has_empty_window, pooled_size, table_stride

__all__ = ['binary_conv2d', 'real_conv2d', 'chain', 'pool2d', 'check_input', 'watched', 'Chain', 'Layer', 'Pool']

_library = torch.library.Library('timm_el', 'DEF')
_EPILOGUE = 'Tensor? link, int[] spec, float[] constants) -> Tensor'
_library.define(f'binary_conv2d(Tensor x, Tensor weight, Tensor table, Tensor? threshold, Tensor? flip, {_EPILOGUE}')
_library.define(f'real_conv2d(Tensor x, Tensor weight, Tensor table, {_EPILOGUE}')

_library.define('pool2d(Tensor x, int[] window, str mode, bool ceil_mode) -> Tensor')
_library.define('chain(Tensor x, Tensor[] tensors, int[] specs, float[] constants, Tensor? added) -> Tensor')

MOST_LAYERS = 8  # of a chain
MOST_PLANS = 64  # of one layer: image sizes that it remembers


class Layer(NamedTuple):
    """One layer of a chain. It travels as `tensors` (absent ones as empty tensors), `specs` and `constants`."""
    weight: torch.Tensor
    table: torch.Tensor
    threshold: Optional[torch.Tensor]
    flip: Optional[torch.Tensor]
    ints: List[int]
    constants: List[float]

    @property
    def real(self) -> bool:
        """The weight is real, the convolution too."""
        return self.weight.is_floating_point()

    def tensors(self) -> List[torch.Tensor]:
        """Four tensors."""
        return [self.weight, self.table, *(
            self.table.new_empty(0) if t is None else t for t in (self.threshold, self.flip))]

    @classmethod
    def all_of(cls, tensors: List[torch.Tensor], specs: List[int], constants: List[float]) -> List['Layer']:
        """The layers of a call."""
        n, size = len(tensors) // 4, ConvSpec.SIZE
        if not 1 <= n <= MOST_LAYERS or len(tensors) != 4 * n or len(specs) != size * n or len(constants) != 3 * n:
            raise ValueError(
                f'chain: found {len(tensors)} tensors, {len(specs)} integers and {len(constants)} constants, '
                f'expected 4, {size} and 3 for each of 1 to {MOST_LAYERS} layers')
        return [
            cls(*tensors[4 * i:4 * i + 2], *(t if t.numel() else None for t in tensors[4 * i + 2:4 * i + 4]),
                specs[size * i:size * (i + 1)], constants[3 * i:3 * i + 3])
            for i in range(n)]


class _Prepared:
    """What the native library keeps for one weight tensor: its own layout, and a plan for each shape of input."""

    def __init__(self, version: Tuple[int, int]) -> None:
        self.version = version
        self.generation = native.generation()
        self.weights: Dict[Tuple[int, ...], Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]] = {}
        self.plans: Dict[Tuple[Any, ...], Any] = {}


_prepared = WeakTensorKeyDictionary()


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
    expected: Dict[str, Tuple[Optional[torch.Tensor], Tuple[int, ...], torch.dtype]] = {
        'weight': (weight, stored_shape(spec, real), torch.float32 if real else torch.uint8),
        'table': (table, (len(spec.rows), table_stride(spec.c_out)), torch.float32),
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


def _version(weight: torch.Tensor) -> Tuple[int, int]:
    """Changes when the weight is written to or moves. Inference tensors do not count; `deploy` makes none."""
    return 0 if weight.is_inference() else weight._version, weight.data_ptr()


def _prepared_for(weight: torch.Tensor) -> _Prepared:
    prepared, version = _prepared.get(weight), _version(weight)
    if prepared is None or prepared.version != version or prepared.generation != native.generation():
        prepared = _prepared[weight] = _Prepared(version)
    return prepared


def _remember(plans: Dict[Any, Any], key: Any, value: Any) -> Any:
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = value
    return value


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
) -> Tuple[int, List[int], native.Plan]:
    """Address of the C plan of a call, shape of its output, and the plan: made and checked once an input shape."""
    prepared = _prepared_for(weight)
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
    plan.weight, plan.tap_sums = _pointer(weight if ready is None else ready), _pointer(sums)
    plan.keeps = ready, sums  # as long as somebody has the plan
    return _remember(prepared.plans, key, (ctypes.addressof(plan), [n, spec.c_out, oh, ow], plan))


def _lay_out(
        lib: ctypes.CDLL, plan: native.Plan, weight: torch.Tensor, spec: ConvSpec, padded: bool, real: bool,
) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """The weight in the body's own layout, None if it reads the weight as it is, and what padding adds for each tap."""
    plan_at = ctypes.byref(plan)
    ready = sums = None
    if real:
        lib.el_advise(weight.data_ptr(), weight.numel() * 4)
    elif lib.el_own_layout() and not spec.is_depthwise:
        ready = torch.empty(lib.el_weight_size(plan_at), dtype=torch.uint8)
        lib.el_lay_out(plan_at, weight.data_ptr(), ready.data_ptr())
    if padded:
        sums = torch.empty((spec.taps, table_stride(spec.c_out)), dtype=torch.int32)
        lib.el_tap_sums(plan_at, weight.data_ptr(), sums.data_ptr())
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
    plan, shape, _ = _plan(lib, x, weight, table, threshold, flip, link, ints, constants, real)
    same = link is x
    x = _nhwc(lib, x)
    if link is not None:
        link = x if same else _nhwc(lib, link)
    y = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    failed = 0
    if y.numel():
        failed = lib.el_conv(plan, x.data_ptr(), _pointer(link), None, y.data_ptr(), torch.get_num_threads())
    _raise_if(failed, ints, x)
    return y


def _nhwc(lib: ctypes.CDLL, x: torch.Tensor) -> torch.Tensor:
    """channels_last memory. torch's own copy would wake its threads, which then spin where ours want to work."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    if not x.is_contiguous():
        return x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    lib.el_nhwc(x.data_ptr(), x.shape[0], x.shape[1], x.shape[2] * x.shape[3], y.data_ptr())
    return y


def _raise_if(failed: int, ints: List[int], x: torch.Tensor) -> None:
    if failed:
        raise MemoryError('no memory for the scratch of a convolution') if failed == 2 else RuntimeError(
            f'the native library refused {ints} for {tuple(x.shape)}')


class Chain:
    """Layers that run as one operator, `chain`, with what is found out once for each shape of image.

    Args:
        path: Where it stands, for errors.
        layers: What runs, one after another; each one's link reads what the layer itself reads.
        direct: Go past torch's dispatcher, for which a hundred arguments are wrapped in the time of a small layer. Not
            if `watched()`.
    """

    def __init__(self, path: str, layers: List[Layer], direct: bool) -> None:
        self.path, self.layers, self.direct = path, layers, direct
        self.tensors = [t for layer in layers for t in layer.tensors()]
        self.ints = [i for layer in layers for i in layer.ints]
        self.constants = [layer.constants for layer in layers]
        self.ready: Dict[Any, Tuple[Any, ...]] = {}

    def __call__(self, x: torch.Tensor, added: Optional[torch.Tensor] = None) -> torch.Tensor:
        if not self.direct or type(x) is not torch.Tensor or x.device.type != 'cpu' or native.library() is None:
            return self._through_torch(x, added)
        lib, state, found = native.library(), self._state(), self.ready.get((x.shape, x.dtype))
        if found is None or found[0] != state:
            check_input(self.path, x)
            plans = _chain_plans(lib, x, Layer.all_of(self.tensors, self.ints, self._constants()))
            found = _remember(self.ready, (x.shape, x.dtype), (state, *plans))
        _, addresses, shape, _ = found
        return _run_chain(lib, addresses, shape, x, added)

    def _through_torch(self, x: torch.Tensor, added: Optional[torch.Tensor]) -> torch.Tensor:
        check_input(self.path, x)
        if len(self.layers) > 1 or added is not None:
            return chain(x, self.tensors, self.ints, self._constants(), added)
        weight, table, threshold, flip, ints, constants = layer = self.layers[0]
        link = x if ConvSpec.of(ints).link != 'none' else None
        if layer.real:
            return real_conv2d(x, weight, table, link, ints, constants)
        return binary_conv2d(x, weight, table, threshold, flip, link, ints, constants)

    def _constants(self) -> List[float]:
        return [c for row in self.constants for c in row]

    def _state(self) -> List[Any]:
        """Changes with what the plans point to and with what they have copied."""
        return [*map(_version, self.tensors), *self._constants()]


def check_input(path: str, x: torch.Tensor) -> None:
    """Raise ValueError or TypeError unless the engine takes this tensor."""
    if x.device.type != 'cpu' and x.device.type != 'meta':
        raise ValueError(
            f'{path}: found an input on {x.device}, a deployed network runs on the CPU; use the latent network there')
    if x.dtype != torch.float32:
        raise TypeError(f'{path}: found an input of {x.dtype}, expected torch.float32; convert it with .float()')


def watched() -> bool:
    """Somebody wants to see operators: a compiler, a tracer, a profiler, a dispatch mode, a transform of functorch."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    try:
        return (
            torch.autograd._profiler_enabled() or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None)
    except AttributeError:  # a torch that names them otherwise: better slower than unseen
        return True


def _chain_plans(
        lib: ctypes.CDLL, x: torch.Tensor, layers: List[Layer],
) -> Tuple[Any, List[int], List[native.Plan]]:
    """An array of the addresses of the plans of a chain, the shape of its output, and the plans."""
    plans, value = [], x
    for layer in layers:
        weight, table, threshold, flip, ints, constants = layer
        has_link = ConvSpec.of(ints).link != 'none'
        _, shape, plan = _plan(
            lib, value, weight, table, threshold, flip, value if has_link else None, ints, constants, layer.real)
        plans.append(plan)
        value = torch.empty(shape, device='meta', dtype=torch.float32)
    addresses = (ctypes.c_void_p * len(plans))(*map(ctypes.addressof, plans))
    return addresses, shape, plans


def _run_chain(
        lib: ctypes.CDLL, addresses: Any, shape: List[int], x: torch.Tensor, added: Optional[torch.Tensor],
) -> torch.Tensor:
    if added is not None:
        _check_added(added, shape)
        added = _nhwc(lib, added)
    x = _nhwc(lib, x)
    y = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    if y.numel():
        _raise_if(lib.el_chain(
            addresses, len(addresses), x.data_ptr(), _pointer(added), y.data_ptr(), torch.get_num_threads()), shape, x)
    return y


def _chain(
        x: torch.Tensor,
        tensors: List[torch.Tensor],
        specs: List[int],
        constants: List[float],
        added: Optional[torch.Tensor],
) -> torch.Tensor:
    lib, layers = native.library(), Layer.all_of(tensors, specs, constants)
    if lib is not None:
        addresses, shape, _plans = _chain_plans(lib, x, layers)
        return _run_chain(lib, addresses, shape, x, added)
    y = x
    for layer in layers:
        weight, table, threshold, flip, ints, numbers = layer
        link = y if ConvSpec.of(ints).link != 'none' else None
        y = _run(y, weight, table, threshold, flip, link, ints, numbers, layer.real)
    if added is not None:
        _check_added(added, list(y.shape))
        y = y + added
    return y


class Pool:
    """`pool2d` with what is found out once for each shape of image; past torch's dispatcher as a `Chain`.

    Args:
        window, mode, ceil_mode: As for `pool2d`.
    """

    def __init__(self, window: List[int], mode: str, ceil_mode: bool) -> None:
        self.window, self.mode, self.ceil_mode = window, mode, ceil_mode
        self.ready: Dict[Any, Tuple[Any, List[int]]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        lib = native.library()
        if watched() or lib is None or type(x) is not torch.Tensor:
            return pool2d(x, self.window, self.mode, self.ceil_mode)
        found = self.ready.get(x.shape)
        if found is None:
            size, _ = _pooled(x, self.window, self.mode, self.ceil_mode)
            found = _remember(self.ready, x.shape, (native.Window(*self.window), [*x.shape[:2], *size]))
        return _run_pool(lib, x, *found, self.mode)

    def __reduce__(self):
        return Pool, (self.window, self.mode, self.ceil_mode)


def _run_pool(lib: ctypes.CDLL, x: torch.Tensor, window: native.Window, shape: List[int], mode: str) -> torch.Tensor:
    x = _nhwc(lib, x)
    n, c, h, w = x.shape
    y = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    _raise_if(lib.el_pool(
        x.data_ptr(), n, h, w, c, window, POOLS.index(mode), *shape[2:], y.data_ptr(),
        torch.get_num_threads()) if n else 0, shape, x)
    return y


def _pool2d(x: torch.Tensor, window: List[int], mode: str, ceil_mode: bool) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise TypeError(f'x: found dtype {x.dtype}, expected torch.float32; convert it with .float()')
    size, parsed = _pooled(x, window, mode, ceil_mode)
    lib = native.library()
    if lib is None:
        return reference.pool2d(x, parsed, mode, size)
    return _run_pool(lib, x, native.Window(*window), [*x.shape[:2], *size], mode)


def _pooled(x: torch.Tensor, window: List[int], mode: str, ceil_mode: bool) -> Tuple[List[int], Window]:
    """Size of the output and the window, checked."""
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f'x: found shape {tuple(x.shape)}, expected (N, C, H, W) with at least one pixel')
    if mode not in POOLS[1:]:
        raise ValueError(f'mode: found {mode!r}, expected one of {POOLS[1:]}')
    if len(window) != 8 or min(*window[:4], *window[6:]) < 1 or min(window[4:6]) < 0 or window[0] * window[1] > 64:
        raise ValueError(f'window: found {window}, expected Window.ints() with at most 64 pixels')
    parsed = Window.of(window)
    size = pooled_size(parsed, *x.shape[2:], ceil_mode)
    if min(size) < 1 or has_empty_window(parsed, x.shape[2:], size):
        raise ValueError(f'window: found {parsed}, which has no pixel of {tuple(x.shape)} in some place')
    return size, parsed


def _check_added(added: torch.Tensor, shape: List[int]) -> None:
    if list(added.shape) != shape or added.dtype != torch.float32:
        raise ValueError(f'added: found {added.dtype} {tuple(added.shape)}, expected torch.float32 {tuple(shape)}')


def _binary(x, weight, table, threshold, flip, link, spec, constants):
    return _run(x, weight, table, threshold, flip, link, spec, constants, False)


def _real(x, weight, table, link, spec, constants):
    return _run(x, weight, table, None, None, link, spec, constants, True)


def _fake(x: torch.Tensor, spec: List[int]) -> torch.Tensor:
    parsed = ConvSpec.of(spec)
    torch._check(x.dim() == 4, lambda: f'x: found {x.dim()} axes, expected (N, C, H, W)')
    size = [x.shape[0], parsed.c_out, *parsed.output_size(*x.shape[2:])]
    return x.new_empty(size).to(memory_format=torch.channels_last)


def _fake_pool(x, window, mode, ceil_mode):
    size, _ = _pooled(x, window, mode, ceil_mode)
    return x.new_empty([*x.shape[:2], *size]).to(memory_format=torch.channels_last)


def _fake_chain(x, tensors, specs, constants, added):
    for i in range(0, len(specs), ConvSpec.SIZE):
        x = _fake(x, specs[i:i + ConvSpec.SIZE])
    return x


_library.impl('chain', _chain, 'CPU')
torch.library.register_fake('timm_el::chain', _fake_chain)
_library.impl('pool2d', _pool2d, 'CPU')
torch.library.register_fake('timm_el::pool2d', _fake_pool)
_library.impl('binary_conv2d', _binary, 'CPU')
_library.impl('real_conv2d', _real, 'CPU')
torch.library.register_fake(
    'timm_el::binary_conv2d', lambda x, weight, table, threshold, flip, link, spec, constants: _fake(x, spec))
torch.library.register_fake(
    'timm_el::real_conv2d', lambda x, weight, table, link, spec, constants: _fake(x, spec))

binary_conv2d = torch.ops.timm_el.binary_conv2d.default
real_conv2d = torch.ops.timm_el.real_conv2d.default
chain = torch.ops.timm_el.chain.default
pool2d = torch.ops.timm_el.pool2d.default
