"""Pictures, one module each. matplotlib is imported when one is drawn."""
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(rows: int, columns: int, size: tuple[float, float], **kwargs: Any) -> 'tuple[Figure, Any]':
    """Return a figure that no window or global state knows, and its axes (rows, columns)."""
    from matplotlib.figure import Figure
    figure = Figure(size, layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)
