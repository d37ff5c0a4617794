"""How figures look: one palette that colour-blind people can tell apart, labels at the lines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memtrain.errors import BadInput
from memtrain.evaluate.measure import ALL


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#1b1f24", "#6b7280", "#e5e7eb"
FIRST = "#767676"
"""The first reading, baselines, chance: what is compared with."""
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#000000")
"""Okabe and Ito (2008), the yellow darkened so that it can be read on white."""
DPI = 140

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.2,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "text.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # The font that comes with matplotlib: the same picture on every machine.
    "font.sans-serif": ["DejaVu Sans"],
    "svg.hashsalt": "memtrain",
}


def need_matplotlib() -> None:
    """Raises BadInput that names the extra where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInput(
            "memtrain report needs the `report` extra: pip install 'memtrain[report]'"
        ) from None


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches, in our style. No window and no global state."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
    return figure


def styled(draw):
    """A function that draws, under our style: matplotlib reads it when an artist is made."""
    from functools import wraps

    @wraps(draw)
    def drawn(*args: Any, **more: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **more)

    return drawn


@styled
def as_png(figure: Figure) -> bytes:
    """The figure as a PNG. The same bytes for the same figure and version of matplotlib."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def colour_of(settings: Sequence[str], name: str) -> str:
    return PALETTE[list(settings).index(name) % len(PALETTE)]


def title_of(setting: str) -> str:
    return "every memory on" if setting == ALL else f"without {setting}"


def label_lines(axes: Axes, lines: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels (x, y, text, colour) right of the ends of lines, moved apart where they would overlap.

    Call it last: it needs the limits of the axes.
    """
    low, high = axes.get_ylim()
    order = sorted(range(len(lines)), key=lambda i: lines[i][1])
    places = spread([lines[i][1] for i in order], 0.075 * (high - low), low, high)
    for i, y in zip(order, places, strict=True):
        x, _, text, colour = lines[i]
        axes.annotate(
            text,
            (x, y),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=10,
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places `gap` apart from each other or more, near to the wanted ones, which ascend.

    Neighbours that would overlap become a group around the mean of what its members want. All are
    between `low` and `high` as long as they find room there.
    """
    groups: list[list[float]] = []
    for place in wanted:
        groups.append([place])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            last = groups.pop()
            groups[-1] += last
    places = []
    for group in groups:
        places += [_bottom(group, gap) + i * gap for i in range(len(group))]
    for i, place in enumerate(places):
        places[i] = max(place, low + i * gap)
    for i in range(len(places)):
        places[-1 - i] = min(places[-1 - i], high - i * gap)
    return places


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - (len(group) - 1) * gap / 2


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + (len(group) - 1) * gap


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Means over a window around each value, shorter at the ends. Rows are smoothed one by one."""
    width = max(1, min(width, values.shape[-1]))
    padded = np.cumsum(np.pad(values, [(0, 0)] * (values.ndim - 1) + [(1, 0)]), axis=-1)
    index = np.arange(values.shape[-1])
    begin = np.maximum(index - width // 2, 0)
    end = np.minimum(index + (width + 1) // 2, values.shape[-1])
    return (padded[..., end] - padded[..., begin]) / (end - begin)
