"""Tables of speed by class of processors, made of recorded measurements."""
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.telemetry import JsonLines
from .processor_classes import CAPS, CLASSES

# Column -> contestants of `measure_inference`, of which the fastest is shown.
CONTESTANTS = {
    'deployed': ('deployed',),
    'deployed, int8 float parts': ('deployed int8',),
    'deployed, `bireal`': ('deployed bireal',),
    'torch float32, best': ('host', 'host channels_last', 'torch-compiled', 'torch-frozen'),
    'OpenVINO int8': ('openvino-int8',),
    'OpenVINO, same network': ('openvino-binary',),
}
NOT_MEASURED = 'not measured'
LAYERS = ('layers', 'kinds', 'whole_ms', 'binary')  # of a result: what no table of classes shows

Record = dict[str, Any]  # a result of `measure_inference` without `LAYERS`


def append_record(path: Path, result: dict[str, Any]) -> None:
    """Append a result of `measure_inference` to a file, as a line of JSON without the times of layers."""
    record = {key: value for key, value in result.items() if key not in LAYERS}
    JsonLines.append(path, record)


def read_records(path: Path) -> list[Record]:
    """Return the records of a file that `append_record` wrote.

    Raises:
        ValueError: A line is none, or was measured under caps that are those of no class.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
        try:
            record = json.loads(line)
            caps = [name for name in CAPS if name in record['machine']['settings']]
            emulated = record['emulated']
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f'{path}: found no record on line {number} ({type(e).__name__}: {e}), expected a line that '
                f'`bench infer --record` wrote; delete it') from None
        if caps and not emulated:
            raise ValueError(
                f'{path}: found a measurement under {", ".join(caps)} on line {number}, expected one of a class of '
                f'processors; delete it and measure with --processor-class')
        records.append(record)
    return records


def tables(records: Sequence[Record], base: str = 'deployed') -> str:
    """Return Markdown: a table for each network, batch, size and number of threads, with a row for each class.

    Args:
        records: Measurements; a later one of the same row replaces an earlier one.
        base: Contestant that ratios are to.

    Raises:
        ValueError: There are no ratios to the base.
    """
    bases = {name for record in records for row in record['contestants'] for name in row['ratios']}
    if records and base not in bases:
        raise ValueError(f'base: found {base!r}, expected one that was recorded, {", ".join(sorted(bases))}')
    found: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        key = (*(record[name] for name in ('model', 'recipe', 'host', 'batch')), tuple(record['size']),
               record['machine']['threads'])
        found.setdefault(key, {})[record['emulated'] or record['machine']['class']] = record
    return '\n\n'.join(f'{_title(*key)}\n\n{_table(rows, base)}' for key, rows in found.items())


def _title(model: str, recipe: str | None, host: str, batch: int, size: tuple[int, int], threads: int) -> str:
    name = f'`{model}`' if recipe is None else f'`{model}`, recipe `{recipe}`'
    return f'{name} beside `{host}`, {_count(batch, "image")} of {size[0]}x{size[1]} px, {_count(threads, "thread")}:'


def _count(n: int, noun: str) -> str:
    return f'{n} {noun}' + 's' * (n > 1)


def _table(rows: dict[str, Record], base: str) -> str:
    head = ('class', 'processor', 'instruction set', *CONTESTANTS)
    blank = (NOT_MEASURED, *[''] * (len(head) - 2))
    cells = {row.name: _cells_of(rows[row.name], base) if row.name in rows else blank for row in CLASSES}
    lines = [head, ('---',) * len(head), *((f'`{name}`', *row) for name, row in cells.items())]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _cells_of(record: Record, base: str) -> list[str]:
    """Return the processor, the instruction set of this package, and a cell for each of `CONTESTANTS`."""
    ran = {row['name']: row for row in record['contestants']}
    processor = record['machine']['cpu'] + ', emulated' * bool(record['emulated'])
    cells = [processor, f'`{record["engine"]["body"]}`']
    for names in CONTESTANTS.values():
        rows = sorted((ran[name] for name in names if name in ran), key=lambda row: row['ms']['median'])
        absent = 'did not run' if set(names) & set(record['absent']) else ''
        cells.append(_time(rows[0], record['batch'], base) if rows else absent)
    return cells


def _time(row: dict[str, Any], batch: int, base: str) -> str:
    """Return the time of one image, or the images per second of several, and the ratio of times to the base."""
    time = f'{row["ms"]["median"]:.2f} ms' if batch == 1 else f'{row["images_per_s"]:.0f} / s'
    ratio = f' ({row["ratios"][base]["median"]:.2f})' if base in row['ratios'] and row['name'] != base else ''
    return time + ratio + ', not capped' * (row['capped'] is False)
