"""The engine's operators: `binary_conv2d`, `real_conv2d`, `mean` and `chain` of `torch.ops.timm_el`.

Each has a schema, a fake kernel for tracing, a plain-torch reference (reference.py) and, where the native library is
active, a kernel in C that gives the same bits. They are for inference: no gradient is defined.
"""
import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from . import abi, native, reference
from .layout import stored_shape
from .spec import ACTS, LINKS, POOLS, ConvSpec, Window, table_stride

__all__ = [
    'binary_conv2d', 'real_conv2d', 'mean', 'chain', 'check_input', 'check_place', 'in_row', 'pool_layer', 'watched',
    'Chain', 'Layer', 'MOST_POOLED']

_library = torch.library.Library('timm_el', 'DEF')
_EPILOGUE = 'Tensor? link, int[] spec, float[] constants) -> Tensor'
_library.define(f'binary_conv2d(Tensor x, Tensor weight, Tensor table, Tensor? threshold, Tensor? flip, {_EPILOGUE}')
_library.define(f'real_conv2d(Tensor x, Tensor weight, Tensor table, {_EPILOGUE}')
_library.define('mean(Tensor x) -> Tensor')
_library.define(
    'chain(Tensor x, Tensor[] tensors, int[] specs, float[] constants, int[] wires, Tensor? other) -> Tensor')

MOST_PLANS = 64  # of one layer: image sizes that it remembers
FIRST_VALUE = 2  # values of a chain: 0 is x, 1 is `other`, 2 + i is what layer i gives
MOST_POOLED = 64  # pixels of a window
MOST_VALUES = 16  # of a chain that wait for their last reader at once


class Layer(NamedTuple):
    """One layer of a chain. It travels as `tensors` (absent ones as empty tensors), `specs`, `constants` and `wires`.

    A layer without a weight is a pool, that of the link; its spec has no channels, but those of what it reads.
    """
    weight: torch.Tensor
    table: torch.Tensor
    threshold: torch.Tensor | None
    flip: torch.Tensor | None
    ints: list[int]
    constants: list[float]
    source: int = 0  # the value that it reads, and links
    added: int = -1  # the value that is added to what it gives, or -1
    path: str = ''  # where it stands, for errors

    @property
    def real(self) -> bool:
        """The weight is real, the convolution too."""
        return self.weight.is_floating_point()

    @property
    def is_pool(self) -> bool:
        """It has no weight."""
        return self.weight.numel() == 0

    def spec(self, channels: int) -> ConvSpec:
        """The spec, for an input of so many channels."""
        spec = ConvSpec.of(self.ints)
        return replace(spec, c_in=channels, c_out=channels, link_c=channels) if self.is_pool else spec

    def tensors(self) -> list[torch.Tensor]:
        """Four tensors."""
        return [self.weight, self.table, *(
            self.table.new_empty(0) if t is None else t for t in (self.threshold, self.flip))]

    def moved(self, x: int, by: int) -> 'Layer':
        """The same, `by` layers further on, where value `x` is what was x."""
        source, added = (x if v == 0 else v + by if v >= FIRST_VALUE else v for v in (self.source, self.added))
        return self._replace(source=source, added=added)

    @classmethod
    def all_of(
            cls, tensors: list[torch.Tensor], specs: list[int], constants: list[float], wires: list[int],
    ) -> list['Layer']:
        """The layers of a call."""
        n, size = len(tensors) // 4, ConvSpec.SIZE
        if not n or len(tensors) != 4 * n or len(specs) != size * n or len(constants) != 3 * n or len(wires) != 2 * n:
            raise ValueError(
                f'chain: found {len(tensors)} tensors, {len(specs)} integers, {len(constants)} constants and '
                f'{len(wires)} wires, expected 4, {size}, 3 and 2 for each layer')
        layers = [
            cls(*tensors[4 * i:4 * i + 2], *(t if t.numel() else None for t in tensors[4 * i + 2:4 * i + 4]),
                specs[size * i:size * (i + 1)], constants[3 * i:3 * i + 3], *wires[2 * i:2 * i + 2])
            for i in range(n)]
        used = {v: i for i, layer in enumerate(layers) for v in (layer.source, layer.added)}  # when each is read last
        for i, layer in enumerate(layers):
            last = i + FIRST_VALUE
            if layer.source == 1 or not 0 <= layer.source < last or not -1 <= layer.added < last or (
                    i + 1 < n and last not in used) or layer.is_pool and layer.added >= 0:
                raise ValueError(
                    f'chain: layer {i} reads value {layer.source} and adds value {layer.added}, expected x (0) or one '
                    f'of a layer before it (2 and on), `other` (1) to be added only, not to a pool, and every value '
                    f'to be read')
            waiting = sum(used.get(v, i) >= i for v in range(FIRST_VALUE, last + 1))
            if waiting > MOST_VALUES:
                raise ValueError(
                    f'chain: found {waiting} values that wait at layer {i}, expected at most {MOST_VALUES}')
        return layers


def in_row(*parts: Sequence[Layer]) -> list[Layer]:
    """Rows of layers one after another: what one gives is x to the next."""
    row: list[Layer] = []
    for part in parts:
        row += [layer.moved(len(row) - 1 + FIRST_VALUE if row else 0, len(row)) for layer in part]
    return row


def pool_layer(window: Window, mode: str, pad_end: tuple[int, int]) -> Layer:
    """A pool; `pad_end` rows and columns may be missing after the last ones. A mean is that of pixels inside."""
    none = torch.empty(0, dtype=torch.float32, device='cpu')
    spec = ConvSpec(0, 0, window, pad_end, link='identity', link_pool=mode, pool=window)
    return Layer(none, none, None, None, list(spec.ints()), [0., 0., 1.])


class _Prepared:
    """What the native library keeps for one weight tensor: its own layout, and a plan for each shape of input."""

    def __init__(self, version: tuple[Any, int]) -> None:
        self.version = version
        self.generation = native.generation()
        self.weights: dict[tuple[int, ...], tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self.plans: dict[tuple[Any, ...], Any] = {}


_prepared = WeakTensorKeyDictionary()


def _check(
        x: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        threshold: torch.Tensor | None,
        flip: torch.Tensor | None,
        link: torch.Tensor | None,
        spec: ConvSpec,
        constants: list[float],
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
    expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...], torch.dtype]] = {
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


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _version(tensor: torch.Tensor) -> tuple[Any, int]:
    """Changes when the tensor is written to or moves; at each look at an inference tensor, which counts no writes."""
    return object() if tensor.is_inference() else tensor._version, tensor.data_ptr()


def _facts(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.is_contiguous())


def _prepared_for(weight: torch.Tensor) -> _Prepared:
    prepared, version = _prepared.get(weight), _version(weight)
    if prepared is None or prepared.version != version or prepared.generation != native.generation():
        prepared = _prepared[weight] = _Prepared(version)
    return prepared


def _remember(plans: dict[Any, Any], key: Any, value: Any) -> Any:
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = value
    return value


def _plan(
        lib: ctypes.CDLL,
        x: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        threshold: torch.Tensor | None,
        flip: torch.Tensor | None,
        link: torch.Tensor | None,
        ints: list[int],
        constants: list[float],
        real: bool,
) -> tuple[int, list[int], abi.Plan]:
    """Address of the C plan of a call, shape of its output, and the plan: made and checked once an input shape."""
    prepared = _prepared_for(weight)
    key = (
        x.shape, x.dtype, None if link is None else (link.shape, link.dtype), *ints, *constants, real,
        *map(_facts, (table, threshold, flip)))
    found = prepared.plans.get(key)
    if found is not None:
        return found
    spec = ConvSpec.of(ints).at(x.shape)
    _check(x, weight, table, threshold, flip, link, spec, constants, real)
    n, _, h, w = x.shape
    oh, ow = spec.output_size(h, w)
    window = abi.Window
    plan = abi.Plan(
        n, h, w, spec.c_in, oh, ow, spec.c_out, window(*spec.conv.ints()), spec.groups, spec.pad_value, int(real), 0,
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


def _pool_plan(x: torch.Tensor, spec: ConvSpec) -> tuple[int, list[int], abi.Plan]:
    """The same of a pool."""
    _check_pool(x, spec)
    n, c, h, w = x.shape
    oh, ow = spec.output_size(h, w)
    window = abi.Window(*spec.pool.ints())
    plan = abi.Plan(
        n=n, h=h, w=w, c_in=c, oh=oh, ow=ow, c_out=c, conv=window, groups=1, real=1, is_pool=1, inverse_gamma=1.,
        link=LINKS.index('identity'), link_pool=POOLS.index(spec.link_pool), link_h=h, link_w=w, link_c=c, pool=window)
    return ctypes.addressof(plan), [n, c, oh, ow], plan


def _check_pool(x: torch.Tensor, spec: ConvSpec) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f'x: found dtype {x.dtype}, expected torch.float32; convert it with .float()')
    problem = spec.problem(x.shape, x.shape)
    if not problem and (spec.link, spec.conv) != ('identity', spec.pool) or spec.link_pool == 'none':
        problem = f'spec: found {spec}, expected a pool whose window is that of the convolution'
    if problem:
        raise ValueError(problem)


def _lay_out(
        lib: ctypes.CDLL, plan: abi.Plan, weight: torch.Tensor, spec: ConvSpec, padded: bool, real: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The weight in the body's own layout, None if it reads the weight as it is, and what padding adds for each tap."""
    plan_at = ctypes.byref(plan)
    ready = sums = None
    if real:
        lib.el_advise(weight.data_ptr(), weight.numel() * 4)
    elif lib.el_own_layout() and not spec.is_depthwise:
        ready = torch.empty(lib.el_weight_size(plan_at), dtype=torch.uint8, device='cpu')
        lib.el_lay_out(plan_at, weight.data_ptr(), ready.data_ptr())
    if padded:
        sums = torch.empty((spec.taps, table_stride(spec.c_out)), dtype=torch.int32, device='cpu')
        lib.el_tap_sums(plan_at, weight.data_ptr(), sums.data_ptr())
    return ready, sums


def _run(
        x: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        threshold: torch.Tensor | None,
        flip: torch.Tensor | None,
        link: torch.Tensor | None,
        ints: list[int],
        constants: list[float],
        real: bool,
) -> torch.Tensor:
    lib = native.library()
    if lib is None:
        spec = ConvSpec.of(ints).at(x.shape)
        _check(x, weight, table, threshold, flip, link, spec, constants, real)
        if real:
            return reference.real_conv2d(x, weight, table, link, spec, constants)
        return reference.binary_conv2d(x, weight, table, threshold, flip, link, spec, constants)
    plan, shape, _ = _plan(lib, x, weight, table, threshold, flip, link, ints, constants, real)
    same = link is x
    x = _nhwc(lib, x)
    if link is not None:
        link = x if same else _nhwc(lib, link)
    y = torch.empty(shape, dtype=torch.float32, device='cpu', memory_format=torch.channels_last)
    failed = 0
    if y.numel():
        failed = lib.el_conv(plan, x.data_ptr(), _pointer(link), None, y.data_ptr(), torch.get_num_threads())
    _raise_if(failed, f'{ints}', x)
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


def _raise_if(failed: int, what: str, x: torch.Tensor) -> None:
    if failed:
        raise MemoryError('no memory for the scratch of a convolution') if failed == 2 else RuntimeError(
            f'the native library refused {what} for {tuple(x.shape)}')


class Chain:
    """Layers that run as one operator, `chain`, with what is found out once for each shape of image.

    Args:
        path: Where it stands, for errors.
        layers: What runs, each on the value that its `source` says; each one's link reads what the layer itself reads.
        direct: Go past torch's dispatcher, for which a hundred arguments are wrapped in the time of a small layer. Not
            if `watched()`.
    """

    def __init__(self, path: str, layers: list[Layer], direct: bool) -> None:
        self.path, self.layers, self.direct = path, layers, direct
        self.takes_other = any(layer.added == 1 for layer in layers)
        self.tensors = [t for layer in layers for t in layer.tensors()]
        self.present = [t for t in self.tensors if t.numel()]
        self.ints = [i for layer in layers for i in layer.ints]
        self.wires = [v for layer in layers for v in (layer.source, layer.added)]
        self.constants = [layer.constants for layer in layers]
        self.ready: dict[Any, tuple[Any, _Steps]] = {}

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        if not self.direct or type(x) is not torch.Tensor or x.device.type != 'cpu' or native.library() is None:
            return self._through_torch(x, other)
        lib, state, found = native.library(), self._state(), self.ready.get((x.shape, x.dtype))
        if found is None or found[0] != state:
            self._check(x)
            steps = _Steps(lib, x, Layer.all_of(self.tensors, self.ints, self._constants(), self.wires))
            found = _remember(self.ready, (x.shape, x.dtype), (state, steps))
        return found[1].run(lib, x, other)

    def _through_torch(self, x: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
        self._check(x)
        weight, table, threshold, flip, ints, constants, *_ = layer = self.layers[0]
        if len(self.layers) > 1 or layer.added >= 0 or layer.is_pool:
            return chain(x, self.tensors, self.ints, self._constants(), self.wires, other)
        link = x if ConvSpec.of(ints).link != 'none' else None
        if layer.real:
            return real_conv2d(x, weight, table, link, ints, constants)
        return binary_conv2d(x, weight, table, threshold, flip, link, ints, constants)

    def _check(self, x: torch.Tensor) -> None:
        check_input(self.path, x)
        for layer in self.layers:
            check_place(layer.path, x, layer[:4])

    def _constants(self) -> list[float]:
        return [c for row in self.constants for c in row]

    def _state(self) -> list[Any]:
        """Changes with what the plans point to and with what they have copied."""
        return [*map(_version, self.present), *self._constants()]


def check_input(path: str, x: torch.Tensor) -> None:
    """Raise ValueError or TypeError unless the engine takes this tensor."""
    if x.device.type != 'cpu' and x.device.type != 'meta':
        raise ValueError(
            f'{path}: found an input on {x.device}, a deployed network runs on the CPU; use the latent network there')
    if x.dtype != torch.float32:
        raise TypeError(f'{path}: found an input of {x.dtype}, expected torch.float32; convert it with .float()')


def check_place(path: str, x: torch.Tensor, tensors: Iterable[torch.Tensor | None]) -> None:
    """Raise ValueError unless a layer's tensors are where the engine runs, or stand for tensors, as x does."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type not in ('cpu', x.device.type):
            raise ValueError(
                f'{path}: found a tensor of the deployed network on {tensor.device}, expected cpu, where it runs; move '
                f"it back with .to('cpu'), or deploy the latent network again")


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


class _Steps:
    """A chain for one shape of x, as the native library takes it."""

    def __init__(self, lib: ctypes.CDLL, x: torch.Tensor, layers: list[Layer]) -> None:
        values: list[torch.Tensor | None] = [x, None]
        self.array = (abi.Step * len(layers))()
        self.keeps = []
        self.other_shape: list[int] | None = None
        for step, layer in zip(self.array, layers):
            source = values[layer.source]
            spec = layer.spec(source.shape[1])
            if layer.is_pool:
                step.plan, shape, plan = _pool_plan(source, spec)
            else:
                step.plan, shape, plan = _plan(
                    lib, source, *layer[:4], source if spec.link != 'none' else None, layer.ints, layer.constants,
                    layer.real)
            step.source, step.added = layer.source, layer.added
            self.keeps.append(plan)
            if layer.added == 1:
                self.other_shape = shape
            elif layer.added >= 0:
                _check_added(values[layer.added], shape)
            values.append(torch.empty(shape, device='meta', dtype=torch.float32))
        self.shape = shape

    def run(self, lib: ctypes.CDLL, x: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
        """The chain's output."""
        if self.other_shape is not None:
            _check_added(other, self.other_shape)
            other = _nhwc(lib, other)
        x = _nhwc(lib, x)
        y = torch.empty(self.shape, dtype=torch.float32, device='cpu', memory_format=torch.channels_last)
        if y.numel():
            _raise_if(lib.el_chain(
                self.array, len(self.array), x.data_ptr(), _pointer(other), y.data_ptr(), torch.get_num_threads()),
                f'a chain of {len(self.array)} layers', x)
        return y


def _chain(
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        specs: list[int],
        constants: list[float],
        wires: list[int],
        other: torch.Tensor | None,
) -> torch.Tensor:
    lib, layers = native.library(), Layer.all_of(tensors, specs, constants, wires)
    if lib is not None:
        return _Steps(lib, x, layers).run(lib, x, other)
    values = [x, other]
    for layer in layers:
        source = values[layer.source]
        spec = layer.spec(source.shape[1])
        if layer.is_pool:
            _check_pool(source, spec)
            y = reference.pool2d(source, spec.pool, spec.link_pool, spec.output_size(*source.shape[2:]))
        else:
            link = source if spec.link != 'none' else None
            y = _run(source, *layer[:4], link, layer.ints, layer.constants, layer.real)
        if layer.added >= 0:
            _check_added(values[layer.added], list(y.shape))
            y = y + values[layer.added]
        values.append(y)
    return y


def _check_added(added: torch.Tensor | None, shape: list[int]) -> None:
    if added is None or list(added.shape) != shape or added.dtype != torch.float32:
        found = None if added is None else f'{added.dtype} {tuple(added.shape)}'
        raise ValueError(f'added: found {found}, expected torch.float32 {tuple(shape)}')


def _mean(x: torch.Tensor) -> torch.Tensor:
    """Mean over all pixels (N, C, 1, 1): the kernels' as far as they go, so that its bits are those of a chain."""
    height, width = x.shape[2:]
    if not 1 <= height * width <= MOST_POOLED:
        return F.adaptive_avg_pool2d(x, 1)
    layer = pool_layer(Window((height, width)), 'avg', (0, 0))
    return chain(x, layer.tensors(), layer.ints, layer.constants, [layer.source, layer.added], None)


def _binary(x, weight, table, threshold, flip, link, spec, constants):
    return _run(x, weight, table, threshold, flip, link, spec, constants, False)


def _real(x, weight, table, link, spec, constants):
    return _run(x, weight, table, None, None, link, spec, constants, True)


def _fake(x: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    torch._check(x.dim() == 4, lambda: f'x: found {x.dim()} axes, expected (N, C, H, W)')
    size = [x.shape[0], spec.c_out, *spec.output_size(*x.shape[2:])]
    return x.new_empty(size).to(memory_format=torch.channels_last)


def _fake_chain(x, tensors, specs, constants, wires, other):
    values = [x, other]
    for layer in Layer.all_of(tensors, specs, constants, wires):
        source = values[layer.source]
        values.append(_fake(source, layer.spec(source.shape[1])))
    return values[-1]


_library.impl('mean', _mean, 'CPU')
torch.library.register_fake('timm_el::mean', lambda x: x.new_empty((*x.shape[:2], 1, 1)))
_library.impl('chain', _chain, 'CPU')
torch.library.register_fake('timm_el::chain', _fake_chain)
_library.impl('binary_conv2d', _binary, 'CPU')
_library.impl('real_conv2d', _real, 'CPU')
torch.library.register_fake('timm_el::binary_conv2d', lambda x, *rest: _fake(x, ConvSpec.of(rest[-2])))
torch.library.register_fake('timm_el::real_conv2d', lambda x, *rest: _fake(x, ConvSpec.of(rest[-2])))

binary_conv2d = torch.ops.timm_el.binary_conv2d.default
real_conv2d = torch.ops.timm_el.real_conv2d.default
chain = torch.ops.timm_el.chain.default
mean = torch.ops.timm_el.mean.default
