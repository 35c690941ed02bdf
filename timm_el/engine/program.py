"""Program: a network, or a part of one, as a list of steps that runs in one call of the native library."""
import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import native, reference_steps
from .steps import Form, Size, Step, check_sizes, output_size
from .table import Tensors, encode

__all__ = ['Output', 'Program', 'dense_image']

MOST_SIZES = 64  # sizes of input that a program remembers
ERROR_BYTES = 512
NO_MEMORY = 2  # what el_run_ready answers
# One for all programs, so that no process is forked while it is held.
_making_ready = threading.Lock()
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(
        before=_making_ready.acquire, after_in_parent=_making_ready.release, after_in_child=_making_ready.release)


@dataclass(frozen=True)
class Output:
    """One output of a program: a value and the form of the tensor that shows it."""
    value: int
    form: Form = Form.IMAGE

    def tensor(self, size: Size) -> torch.Tensor:
        """Return an uninitialised float32 tensor in this form, over the NHWC memory of a value of this size."""
        n, h, w, c = size
        memory = torch.empty((n, h, w, c), dtype=torch.float32, device='cpu')
        return self.view(memory)

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """Return NHWC memory (n, h, w, c) in this form."""
        n, h, w, c = memory.shape
        if self.form == Form.IMAGE:
            return memory.permute(0, 3, 1, 2)
        return memory.view({Form.ROWS: (n, c), Form.NHWC: (n, h, w, c), Form.TOKENS: (n, h * w, c)}[self.form])


@dataclass
class _Handle:
    """A program as the native library holds it, for one instruction set and one state of the tensors."""
    address: int
    keeps: Any  # memory that the library reads
    generation: Any  # of the instruction set
    ready: dict[tuple[Any, ...], tuple[int, list[Size]]] = field(default_factory=dict)


class Program:
    """A list of steps over values in NHWC; value i is input i, or what step i - (number of inputs) gives.

    It is immutable: its tensors are read where they lie, and laid out for the instruction set at the first call.

    Args:
        steps: The steps, each of which reads values before it.
        outputs: Which values leave, and in which form.
        channels: Channels of each input.
        size: (height, width) of the inputs that the program is for, None for any.
        path: Where it stands in a network, for errors.
    """

    def __init__(
            self,
            steps: Sequence[Step],
            outputs: Sequence[Output],
            channels: Sequence[int],
            size: tuple[int, int] | None = None,
            path: str = '',
    ) -> None:
        self.steps, self.outputs, self.channels = tuple(steps), tuple(outputs), tuple(channels)
        self.size, self.path = size, path
        self._handle: _Handle | None = None

    def sizes(self, inputs: Sequence[Size]) -> list[Size]:
        """Return the sizes of all values for inputs of these sizes.

        Raises:
            ValueError: They do not fit; the text names the module.
        """
        if len(inputs) != len(self.channels):
            raise ValueError(f'inputs: found {len(inputs)}, expected {len(self.channels)}')
        values = list(inputs)
        for step in self.steps:
            sources = [values[v] for v in step.sources if v is not None]
            try:
                check_sizes(step, sources)
                values.append(output_size(step, sources))
            except ValueError as e:
                raise ValueError(f'{step.path or self.path}: {e}' if step.path or self.path else str(e)) from None
        return values

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the outputs for images (N, C, H, W) float32 on the CPU.

        Raises:
            ValueError: The images do not fit.
            MemoryError: There is no memory for the values in between.
        """
        lib = native.library()
        if lib is None:
            return self._run_reference(inputs)
        inputs = [dense_image(lib, x) for x in inputs]
        key = (torch.get_num_threads(), *(x.shape for x in inputs))
        handle = self._handle
        ready = handle.ready.get(key) if handle is not None and handle.generation == native.generation() else None
        if ready is None:
            handle, ready = self._make_ready(lib, key, inputs)
        address, sizes = ready
        outputs = [out.tensor(size) for out, size in zip(self.outputs, sizes)]
        if not any(out.numel() for out in outputs):
            return outputs
        failed = lib.el_run_ready(address, _pointers(inputs), _pointers(outputs))
        if failed == NO_MEMORY:
            raise MemoryError(f'{self.path or "program"}: no memory for the values of {len(self.steps)} steps')
        if failed:
            raise RuntimeError(f'{self.path or "program"}: the library answers {failed} to what it made ready itself')
        return outputs

    def _make_ready(
            self, lib: ctypes.CDLL, key: tuple[Any, ...], inputs: Sequence[torch.Tensor],
    ) -> tuple[_Handle, tuple[int, list[Size]]]:
        """Return the library's handle, and what it has made ready for inputs of these sizes."""
        shapes = [(x.shape[0], *x.shape[2:], x.shape[1]) for x in inputs]
        sizes = self.sizes(shapes)
        with _making_ready:
            handle = self._handle
            if handle is None or handle.generation != native.generation() or len(handle.ready) >= MOST_SIZES:
                handle = self._new_handle(lib)
            error = ctypes.create_string_buffer(ERROR_BYTES)
            array = (ctypes.c_int64 * (4 * len(shapes)))(*(n for shape in shapes for n in shape))
            address = lib.el_make_ready(handle.address, array, key[0], error, ERROR_BYTES)
            if not address:
                raise ValueError(f'{self.path or "program"}: {error.value.decode()}')
            handle.ready[key] = address, [sizes[out.value] for out in self.outputs]
        return handle, handle.ready[key]

    def _new_handle(self, lib: ctypes.CDLL) -> _Handle:
        tensors = Tensors(self.steps)
        inputs = [(channels, *(self.size or (0, 0))) for channels in self.channels]
        table = encode(inputs, [(out.value, int(out.form)) for out in self.outputs], self.steps, tensors)
        error = ctypes.create_string_buffer(ERROR_BYTES)
        generation = native.generation()
        address = lib.el_program_new(table, len(table), _pointers(tensors.all), error, ERROR_BYTES)
        if not address:
            raise ValueError(f'{self.path or "program"}: {error.value.decode()}')
        handle = self._handle = _Handle(address, tensors.all, generation)
        weakref.finalize(handle, lib.el_close, address)
        return handle

    def _run_reference(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.sizes([(x.shape[0], *x.shape[2:], x.shape[1]) for x in inputs])
        values = list(inputs)
        for step in self.steps:
            values.append(reference_steps.run(step, [None if v is None else values[v] for v in step.sources]))
        return [out.view(values[out.value].permute(0, 2, 3, 1).contiguous()) for out in self.outputs]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), '_handle': None}


def dense_image(lib: ctypes.CDLL, x: torch.Tensor) -> torch.Tensor:
    """Return images (N, C, H, W) in NHWC memory.

    torch's own copy would wake its threads, which then spin where ours want to work.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    if not x.is_contiguous():
        return x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    lib.el_nhwc(x.data_ptr(), x.shape[0], x.shape[1], x.shape[2] * x.shape[3], y.data_ptr())
    return y


def _pointers(tensors: Sequence[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
