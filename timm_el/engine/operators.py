"""The engine's operators, `torch.ops.timm_el.*`: one step of a program each, for networks that run module by module.

Each has a schema, a fake kernel for tracing, a plain-torch reference (reference_steps.py) and, where the native library
is active, a kernel in C that gives the same bits. They are for inference: no gradient is defined.
"""
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .program import Output, Program
from .steps import Kind, Step, Unary, conv_spec, is_pixelwise, output_size

__all__ = ['KIND_OF', 'apply', 'check_input', 'check_place', 'unary', 'watched']

_NAMES = {
    'binary_conv2d': Kind.CONV, 'real_conv2d': Kind.CONV, 'pool2d': Kind.POOL, 'mean': Kind.MEAN,
    'affine': Kind.AFFINE, 'norm': Kind.NORM, 'input_scale': Kind.INPUT_SCALE, 'unary': Kind.UNARY}
KIND_OF: dict[Any, Kind] = {}  # by overload
MOST_PROGRAMS = 64  # of one tensor: other constants beside it

_library = torch.library.Library('timm_el', 'DEF')
_programs = WeakTensorKeyDictionary()  # by the first constant: {the rest: (versions, program)}
_bare_programs: dict[Any, tuple[Any, Program]] = {}  # of steps without constants


def apply(step: Step, *inputs: torch.Tensor | None) -> torch.Tensor:
    """Return what a step gives, through torch's dispatcher.

    Args:
        step: The step; its sources say which of the inputs is absent.
        inputs: Images (N, C, H, W) float32 on the CPU; of a UNARY step, a tensor of any shape.
    """
    name = next(name for name, kind in _NAMES.items() if kind == step.kind)
    if step.kind == Kind.CONV and not step.is_binary_conv:
        name = 'real_conv2d'
    operator = getattr(torch.ops.timm_el, name).default
    present = [x for x in inputs if x is not None]
    tensors = [present[0].new_empty(0) if t is None else t for t in step.tensors]  # jit.trace knows no absent ones
    return operator(present, tensors, step.ints, step.constants)


def unary(op: Unary, x: torch.Tensor, *constants: float) -> torch.Tensor:
    """Return a unary function of a float32 tensor of any shape, in its memory format."""
    return torch.ops.timm_el.unary([x], [], [int(op)], constants)


def decode(
        kind: Kind,
        inputs: Sequence[Any],
        tensors: Sequence[torch.Tensor | None],
        ints: Sequence[int],
        constants: Sequence[float],
        path: str = '',
) -> Step:
    """Return the step that an operator's arguments describe; its sources count the inputs, empty tensors are absent.

    Raises:
        ValueError: There are too few or too many inputs.
    """
    tensors = tuple(t if t is not None and t.numel() else None for t in tensors)
    step = Step(kind, tuple(range(len(inputs))), tensors, tuple(ints), tuple(constants), path)
    if kind != Kind.CONV:
        return step
    linked = conv_spec(step).link != 'none'
    if len(inputs) != 1 + linked:
        found = 'a' if len(inputs) > 1 else 'no'
        raise ValueError(f'link: found {found} tensor, the spec has link={conv_spec(step).link!r}')
    return Step(kind, (0, 1 if linked else None, None), step.tensors, step.ints, step.constants, path)


def _compute(kind: Kind, inputs, tensors, ints, constants) -> torch.Tensor:
    for name, tensor in zip(('x', 'link'), inputs):
        if tensor.dtype != torch.float32:
            raise TypeError(f'{name}: found dtype {tensor.dtype}, expected torch.float32; convert it with .float()')
    for name, tensor in zip(('weight', 'table', 'threshold'), tensors if kind == Kind.CONV else ()):
        if tensor is not None and tensor.dtype in (torch.float64, torch.float16, torch.bfloat16):
            raise TypeError(f'{name}: found dtype {tensor.dtype}, expected torch.float32; convert it with .float()')
    if kind == Kind.UNARY:
        return _compute_unary(inputs[0], tensors, ints, constants)
    if inputs[0].dim() == 4 and not inputs[0].numel():  # no rows of features
        step, (n, c, h, w) = decode(kind, inputs, tensors, ints, constants), inputs[0].shape
        if is_pixelwise(step) and n:
            return inputs[0].new_empty((n, output_size(step, [(1, 1, 1, c)] * len(inputs))[3], h, w))
    programs = _bare_programs if not tensors or not tensors[0].numel() else _programs.setdefault(tensors[0], {})
    channels = [x.shape[1] for x in inputs if x.dim() == 4]
    tensors = [t if t.numel() else None for t in tensors]
    key = (kind, *ints, *constants, *channels, *(None if t is None else id(t) for t in tensors))
    state = [None if t is None else (_version(t), t.data_ptr()) for t in tensors]
    found = programs.get(key)
    if found is None or found[0] != state:
        # Aliases, or a program would keep the tensor alive under which it is found.
        aliases = [None if t is None else t.detach() for t in tensors]
        step = decode(kind, inputs, aliases, ints, constants)
        for x in inputs:
            if x.dim() != 4:
                raise ValueError(f'x: found shape {tuple(x.shape)}, expected (N, C, H, W)')
        if len(programs) >= MOST_PROGRAMS:
            programs.clear()
        found = programs[key] = state, Program([step], [Output(len(inputs))], channels)
    return found[1].run(inputs)[0]


def _compute_unary(x: torch.Tensor, tensors, ints, constants) -> torch.Tensor:
    is_nhwc = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    dense = x if is_nhwc else x.contiguous()
    y = torch.empty_like(dense)
    if not x.numel():
        return y
    flat = dense.as_strided((1, 1, 1, x.numel()), (x.numel(), x.numel(), x.numel(), 1))
    key = (Kind.UNARY, *ints, *constants)
    if key not in _bare_programs:
        step = Step(Kind.UNARY, (0,), (), tuple(ints), tuple(constants))
        _bare_programs[key] = None, Program([step], [Output(1)], [1])
    result = _bare_programs[key][1].run([flat])[0]
    return y.copy_(torch.as_strided(result, dense.shape, dense.stride()))


def _version(tensor: torch.Tensor) -> Any:
    """Return what changes when the tensor is written to, and at each look if it counts no writes."""
    return object() if tensor.is_inference() else tensor._version


def _fake(kind: Kind, inputs, tensors, ints, constants) -> torch.Tensor:
    if kind == Kind.UNARY:
        return torch.empty_like(inputs[0])
    torch._check(all(x.dim() == 4 for x in inputs), lambda: 'x: expected (N, C, H, W)')
    step = decode(kind, inputs, tensors, ints, constants)
    n, h, w, c = output_size(step, [(x.shape[0], *x.shape[2:], x.shape[1]) for x in inputs])
    return inputs[0].new_empty((n, c, h, w)).to(memory_format=torch.channels_last)


def _define(name: str, kind: Kind) -> None:
    _library.define(f'{name}(Tensor[] inputs, Tensor[] tensors, int[] ints, float[] constants) -> Tensor')
    _library.impl(name, lambda *args: _compute(kind, *args), 'CPU')
    torch.library.register_fake(f'timm_el::{name}', lambda *args: _fake(kind, *args))
    KIND_OF[getattr(torch.ops.timm_el, name).default] = kind


for _name, _kind in _NAMES.items():
    _define(_name, _kind)


def check_input(path: str, x: torch.Tensor) -> None:
    """Raise ValueError or TypeError unless the engine takes this tensor."""
    if x.device.type != 'cpu' and x.device.type != 'meta':
        raise ValueError(
            f'{path}: found an input on {x.device}, a deployed network runs on the CPU; use the latent network there')
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f'{path}: found an input that wants a gradient, a deployed network has none; use the latent network, or '
            f'torch.no_grad()')
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
    """Return whether a compiler, tracer, profiler, dispatch mode or functorch transform wants to see operators."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    try:
        return (
            torch.autograd._profiler_enabled() or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None)
    except AttributeError:  # a torch that names them otherwise: better slower than unseen
        return True
