"""Records of a program's table: the bytes that the native library and program files share (docs/program.md)."""
import struct
import zlib
from collections.abc import Sequence

import torch

from .steps import Step

__all__ = ['HEADER', 'MAGIC', 'VERSION', 'RECORDS', 'TENSOR_TYPES', 'Tensors', 'encode', 'with_crc']

MAGIC = b'timm_el\x01'
VERSION = 1
# magic; version, bytes of the table, inputs, outputs, steps, wires, tensors, CRC; metadata's offset and bytes, bytes
# of the file; CRC of the metadata, the rest reserved.
HEADER = struct.Struct('<8s8I3Q8I')
INPUT = struct.Struct('<4i')         # channels, height, width (0: any), reserved
OUTPUT = struct.Struct('<4i')        # value, form, reserved
STEP = struct.Struct('<3i4i30i4fi')  # kind, first wire, wires; tensors; ints; constants; reserved
WIRE = struct.Struct('<i')
TENSOR = struct.Struct('<2I2Q')      # dtype, CRC; offset in the file, bytes
RECORDS = {'header': HEADER, 'input': INPUT, 'output': OUTPUT, 'step': STEP, 'wire': WIRE, 'tensor': TENSOR}
CRC_OFFSET = 8 + 7 * 4
TENSOR_TYPES = {torch.float32: 0, torch.uint8: 1, torch.int32: 2, torch.int8: 3}
INTS, CONSTANTS, CONSTANT_TENSORS = 30, 4, 4


class Tensors:
    """The constants of a program's steps, each once, numbered in order of their first use."""

    def __init__(self, steps: Sequence[Step]) -> None:
        found = {id(t): t for step in steps for t in step.tensors if t is not None}
        self.all = list(found.values())
        self._index = {key: i for i, key in enumerate(found)}

    def index(self, tensor: torch.Tensor | None) -> int:
        """Return the number of a tensor, -1 for None."""
        return -1 if tensor is None else self._index[id(tensor)]


def encode(
        inputs: Sequence[tuple[int, int, int]],
        outputs: Sequence[tuple[int, int]],
        steps: Sequence[Step],
        tensors: Tensors,
        places: Sequence[tuple[int, int]] = (),
        metadata: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> bytes:
    """Return the table of a program.

    Args:
        inputs: Channels, height and width of each input, 0 for any.
        outputs: Value and form of each output.
        steps: The steps.
        tensors: Their constants.
        places: CRC-32 and offset of each tensor in the file; none in memory.
        metadata: Its offset, bytes and CRC-32 in the file, and the bytes of the file; zeros in memory.
    """
    wires: list[int] = []
    records = []
    for step in steps:
        indices = [tensors.index(t) for t in step.tensors]
        records.append(STEP.pack(
            step.kind, len(wires), len(step.sources), *_filled(indices, CONSTANT_TENSORS, -1),
            *_filled(step.ints, INTS, 0), *_filled(step.constants, CONSTANTS, 0.), 0))
        wires += [-1 if source is None else source for source in step.sources]
    body = b''.join((
        *(INPUT.pack(*sizes, 0) for sizes in inputs), *(OUTPUT.pack(*facts, 0, 0) for facts in outputs), *records,
        *(WIRE.pack(wire) for wire in wires)))
    body += bytes(-(HEADER.size + len(body)) % 8)
    for i, tensor in enumerate(tensors.all):
        crc, offset = places[i] if places else (0, 0)
        body += TENSOR.pack(TENSOR_TYPES[tensor.dtype], crc, offset, tensor.numel() * tensor.element_size())
    offset, size, crc, total = metadata
    header = HEADER.pack(
        MAGIC, VERSION, HEADER.size + len(body), len(inputs), len(outputs), len(steps), len(wires), len(tensors.all), 0,
        offset, size, total, crc, *[0] * 7)
    return with_crc(header + body)


def with_crc(table: bytes) -> bytes:
    """Return a table with its own CRC-32, which is taken with zeros in its place."""
    bare = table[:CRC_OFFSET] + bytes(4) + table[CRC_OFFSET + 4:]
    return bare[:CRC_OFFSET] + struct.pack('<I', zlib.crc32(bare)) + bare[CRC_OFFSET + 4:]


def _filled(values: Sequence, length: int, filler) -> list:
    return [*values, *[filler] * (length - len(values))]
