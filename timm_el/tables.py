"""Text tables with columns as wide as their cells."""
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str = '') -> str:
    """Return lines of text, one a row, under a head.

    Args:
        head: Names of the columns.
        rows: Cells; they are printed by `str`, None as '-'.
        align: '<' or '>' for each column; the rest are like the last one, and left without any.
    """
    cells = [tuple(head), *(tuple('-' if cell is None else str(cell) for cell in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    sides = (align or '<').ljust(len(head), (align or '<')[-1])
    return '\n'.join(
        '  '.join(f'{cell:{side}{width}}' for cell, side, width in zip(row, sides, widths)).rstrip() for row in cells)
