"""Program files: a deployed network as one file that needs neither torch nor Python; docs/program.md has the format."""
import ctypes
import json
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import native
from .layout import stored_shape
from .program import ERROR_BYTES, Output, Program
from .spec import table_stride
from .steps import Form, Kind, Step, conv_spec
from .structure import filled
from .table import CRC_OFFSET, HEADER, INPUT, MAGIC, OUTPUT, STEP, TENSOR, TENSOR_TYPES, VERSION, WIRE, Tensors, encode

__all__ = ['ProgramFile', 'read_program', 'write_program']

ALIGNMENT = 64
LENGTHS = {  # integers, constants and tensors that a kind of step has
    Kind.CONV: (29, 3, 4), Kind.POOL: (12, 0, 0), Kind.MEAN: (0, 0, 0), Kind.BINARY: (1, 0, 0), Kind.UNARY: (1, 2, 0),
    Kind.AFFINE: (0, 0, 2), Kind.PRELU: (0, 0, 1), Kind.NORM: (2, 1, 2), Kind.CONCAT: (0, 0, 0),
    Kind.CHANNELS: (0, 0, 1), Kind.CONST: (4, 0, 1), Kind.INPUT_SCALE: (11, 0, 0), Kind.FLATTEN: (0, 0, 0),
    Kind.PAD: (4, 1, 0)}


def write_program(program: Program, path: str | os.PathLike, metadata: dict[str, Any]) -> int:
    """Write a program to a file, whole or not at all; return its bytes.

    Args:
        program: The program.
        path: The file.
        metadata: Plain data for JSON: labels, preprocessing and so on.
    """
    tensors = Tensors(program.steps)
    text = json.dumps(metadata, ensure_ascii=False).encode()
    inputs = [(channels, *(program.size or (0, 0))) for channels in program.channels]
    outputs = [(out.value, int(out.form)) for out in program.outputs]
    meta_offset = len(encode(inputs, outputs, program.steps, tensors))
    end, places, blocks = meta_offset + len(text), [], []
    for tensor in tensors.all:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        block = tensor.detach().contiguous().numpy().tobytes()
        places.append((zlib.crc32(block), offset))
        blocks += [bytes(offset - end), block]
        end = offset + len(block)
    table = encode(
        inputs, outputs, program.steps, tensors, places, (meta_offset, len(text), zlib.crc32(text), end))
    path = Path(path)
    part = path.with_name(f'{path.name}.part')
    try:
        part.write_bytes(b''.join((table, text, *blocks)))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return end


class ProgramFile:
    """A program from a file; call it on images (N, C, H, W) float32, as a tensor or a NumPy array.

    The file is mapped. All is checked when it is opened but for the checksums of its tensors, which are read at the
    first call.

    Args:
        path: The file.

    Raises:
        ValueError: The file is damaged, of a newer version, or no program; the text says what was found.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = str(path)
        with open(path, 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            if size < HEADER.size:
                raise ValueError(f'{path}: found {size} bytes, expected a program file')
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        memory = memoryview(self._memory)
        header = _checked_header(self.path, memory)
        self.metadata = _metadata(self.path, memory, header)
        _check_steps(self.path)
        try:
            self.program, self._checks = _parse(self.path, memory, header)
            filled(self.metadata.get('outputs'), self.program.outputs)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, struct.error) as e:
            # Its checksum is right, so this was written, not damaged.
            raise ValueError(f'{self.path}: its table or metadata is no program of version {VERSION}: {e}') from None

    @property
    def labels(self) -> list[str] | None:
        """Names of the classes."""
        return self.metadata.get('labels')

    def verify(self) -> None:
        """Raise ValueError unless the checksum of every tensor is right."""
        for name, block, expected in self._checks:
            if zlib.crc32(block) != expected:
                raise ValueError(
                    f'{self.path}: the checksum of {name} is {zlib.crc32(block):08x}, expected {expected:08x}; '
                    f'the file is damaged, fetch it again')
        self._checks = []

    def __call__(self, x: Any) -> Any:
        is_tensor = isinstance(x, torch.Tensor)
        image = x.resolve_neg() if is_tensor else torch.from_numpy(x)
        channels, size = self.program.channels[0], self.program.size
        if image.dtype != torch.float32:
            raise TypeError(f'{self.path}: found an input of {image.dtype}, expected float32')
        if image.dim() != 4 or image.shape[1] != channels or size is not None and tuple(image.shape[2:]) != size:
            wanted = '(N, {}, {}, {})'.format(channels, *(size or ('H', 'W')))
            raise ValueError(f'{self.path}: found an input of shape {tuple(image.shape)}, expected {wanted}')
        if self._checks:
            self.verify()
        outputs = self.program.run([image])
        return filled(self.metadata['outputs'], [y if is_tensor else y.numpy() for y in outputs])


def read_program(path: str | os.PathLike) -> ProgramFile:
    """Open a program file; see `ProgramFile`."""
    return ProgramFile(path)


class _Header(NamedTuple):
    """Contents of the first 96 bytes of a file."""
    magic: bytes
    version: int
    table_bytes: int
    n_inputs: int
    n_outputs: int
    n_steps: int
    n_wires: int
    n_tensors: int
    table_crc: int
    meta_offset: int
    meta_bytes: int
    file_bytes: int
    meta_crc: int


def _checked_header(path: str, memory: memoryview) -> _Header:
    """Return the header of a file whose table is undamaged."""
    header = _Header(*HEADER.unpack_from(memory)[:len(_Header._fields)])
    if header.magic != MAGIC:
        raise ValueError(f'{path}: found {header.magic!r} at its start, expected {MAGIC!r}: it is no program file')
    if header.version > VERSION:
        raise ValueError(f'{path}: found version {header.version}, expected {VERSION} at most; update timm_el')
    if header.version < 1:
        raise ValueError(f'{path}: found version {header.version}, expected {VERSION}; it is damaged')
    if header.file_bytes != len(memory):
        raise ValueError(f'{path}: found {len(memory)} bytes, expected {header.file_bytes}; the file is cut short')
    if not HEADER.size <= header.table_bytes <= len(memory):
        raise ValueError(f'{path}: found a table of {header.table_bytes} bytes of {len(memory)} in all; it is damaged')
    table = bytes(memory[:header.table_bytes])
    crc = zlib.crc32(table[:CRC_OFFSET] + bytes(4) + table[CRC_OFFSET + 4:])
    if crc != header.table_crc:
        raise ValueError(
            f'{path}: the checksum of its table is {crc:08x}, expected {header.table_crc:08x}; the file is damaged, '
            f'fetch it again')
    return header


def _metadata(path: str, memory: memoryview, header: _Header) -> dict[str, Any]:
    text = bytes(memory[header.meta_offset:header.meta_offset + header.meta_bytes])
    crc = zlib.crc32(text)
    if len(text) != header.meta_bytes or crc != header.meta_crc:
        raise ValueError(
            f'{path}: the checksum of its metadata is {crc:08x}, expected {header.meta_crc:08x}; the file is damaged, '
            f'fetch it again')
    try:
        return dict(json.loads(text))
    except (RecursionError, TypeError, ValueError) as e:
        raise ValueError(f'{path}: its metadata is no JSON object: {e}') from None


def _check_steps(path: str) -> None:
    """Raise ValueError unless the native library, where there is one, takes the table and each of its steps."""
    lib = native.library()
    if lib is None:
        return
    error = ctypes.create_string_buffer(ERROR_BYTES)
    address = lib.el_open(os.fsencode(path), 0, error, ERROR_BYTES)
    if not address:
        raise ValueError(f'{path}: {error.value.decode()}')
    lib.el_close(address)


def _parse(path: str, memory: memoryview, header: _Header) -> tuple[Program, list[tuple[str, Any, int]]]:
    """Return the program of a file, and the checksums that are still to be checked."""
    rows = _Rows(bytes(memory[:header.table_bytes]))
    inputs = rows.take(INPUT, header.n_inputs)
    if len(inputs) != 1:
        raise ValueError(f'found {len(inputs)} inputs, expected one')
    outputs = [Output(value, Form(form)) for value, form, *_ in rows.take(OUTPUT, header.n_outputs)]
    records, wires = rows.take(STEP, header.n_steps), [w for w, in rows.take(WIRE, header.n_wires)]
    rows.align()
    tensors, checks = _tensors(memory, rows.take(TENSOR, header.n_tensors))
    if rows.at != header.table_bytes:
        raise ValueError(f'found {header.table_bytes} bytes, expected {rows.at} for its records')
    steps = [
        _step(path, i, len(inputs) + i, record, wires, tensors) for i, record in enumerate(records)]
    for out in outputs:
        if not 0 <= out.value < len(inputs) + len(steps):
            raise ValueError(f'an output is value {out.value}, expected one of {len(inputs) + len(steps)}')
    channels, height, width, _ = inputs[0]
    program = Program(steps, outputs, [c for c, *_ in inputs], (height, width) if height else None, path)
    return program, checks


class _Rows:
    """Records of a table, one after the other."""

    def __init__(self, table: bytes) -> None:
        self._table, self.at = table, HEADER.size

    def take(self, record: struct.Struct, n: int) -> list[tuple[Any, ...]]:
        """Return the next n records."""
        rows = [record.unpack_from(self._table, self.at + i * record.size) for i in range(n)]
        self.at += n * record.size
        return rows

    def align(self) -> None:
        """Go on to the next multiple of 8 bytes."""
        self.at += -self.at % 8


def _tensors(memory: memoryview, records: Sequence[tuple[int, int, int, int]]) -> tuple[list, list]:
    dtypes = {code: dtype for dtype, code in TENSOR_TYPES.items()}
    tensors, checks = [], []
    for i, (code, crc, offset, size) in enumerate(records):
        if code not in dtypes:
            raise ValueError(f'tensor {i} is of type {code}, expected one of {sorted(dtypes)}')
        if offset % ALIGNMENT or offset + size > len(memory) or size % dtypes[code].itemsize:
            raise ValueError(f'tensor {i} is at {offset}, {size} bytes, in a file of {len(memory)} bytes')
        block = memory[offset:offset + size]
        tensors.append(torch.frombuffer(block, dtype=dtypes[code]) if size else torch.empty(0, dtype=dtypes[code]))
        checks.append((f'tensor {i}', block, crc))
    return tensors, checks


def _step(
        path: str, i: int, value: int, record: tuple, wires: Sequence[int], tensors: Sequence[torch.Tensor]) -> Step:
    """Return step i, which gives a value of this number."""
    kind, first, count, *rest = record
    if kind not in Kind.__members__.values():
        raise ValueError(f'step {i} is of kind {kind}, expected one of 0 to {max(Kind)}; update timm_el')
    indices, ints, constants = rest[:4], rest[4:34], rest[34:38]
    sources = wires[first:first + count] if 0 <= first <= first + count <= len(wires) else [value]
    if max(sources, default=-1) >= value or max(indices) >= len(tensors):
        raise ValueError(f'step {i} names a value or tensor that is not there')
    n_ints, n_constants, n_tensors = LENGTHS[Kind(kind)]
    step = Step(
        Kind(kind), tuple(None if w < 0 else w for w in sources),
        tuple(None if t < 0 else tensors[t] for t in indices[:n_tensors]), tuple(ints[:n_ints]),
        tuple(constants[:n_constants]), f'{path}: step {i}')
    return _shaped(step) if kind == Kind.CONV else step


def _shaped(step: Step) -> Step:
    """Return a convolution whose constants have their shapes, which a file does not tell, but the spec does."""
    spec = conv_spec(step)
    weight, table, *rest = step.tensors
    try:
        weight = weight.view(stored_shape(spec, weight.dtype))
        table = table.view(len(spec.rows), table_stride(spec.c_out))
    except RuntimeError:
        raise ValueError(
            f'found {weight.numel()} weights and {table.numel()} constants, expected those of {spec}') from None
    return Step(step.kind, step.sources, (weight, table, *rest), step.ints, step.constants, step.path)
