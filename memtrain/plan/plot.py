"""A sweep as a picture: memory of a device, by part, and the time of a step."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from memtrain.errors import BadInput
from memtrain.evaluate.plots import DPI, FAINT, INK, PALETTE, new_figure, styled
from memtrain.files import write_whole


FORMATS = (".png", ".svg")
COLOURS = {
    "parameters": PALETTE[0],
    "optimizer": PALETTE[5],
    "gradients": PALETTE[2],
    "carry": "#7f3c8d",
    "batch": PALETTE[3],
    "activations": PALETTE[4],
    "recomputed": PALETTE[1],
    "working": FAINT,
    "logits": "#b5651d",
    "gathered_weights": "#a3a3a3",
    "ring": "#d4d4d4",
}
"""Of each part, in all pictures alike."""
_DECADES = 20
"""Times that lie further apart are drawn on a logarithmic axis."""


def check_plot(path: Path) -> None:
    """Raises BadInput where it cannot be drawn, before anything is estimated."""
    if path.suffix not in FORMATS:
        raise BadInput(f"--plot {path}: give a file that ends in {' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"--plot {path}: there is no folder {path.absolute().parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInput("--plot needs the `report` extra: pip install 'memtrain[report]'") from None


@styled
def draw(result: dict[str, Any], key: str, path: Path) -> None:
    """Bars stacked by part, with the device's memory as a line, and step time beside them."""
    rows = result["sweep"]
    timed = [row for row in rows if "seconds" in row]
    figure = new_figure(12.0 if timed else 7.5, 4.2)
    panels = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    _memory(panels[0], rows, key, result["device_bytes"])
    if timed:
        _time(panels[1], timed, key)
    stream = io.BytesIO()
    metadata = {"Software": None} if path.suffix == ".png" else {"Date": None}
    figure.savefig(stream, format=path.suffix[1:], dpi=DPI, metadata=metadata)
    write_whole(path, stream.getvalue())


def _memory(axes: Any, rows: list[dict[str, Any]], key: str, limit: float | None) -> None:
    found = {part for row in rows for part in row["parts"]}
    parts = [part for part in COLOURS if part in found] + sorted(found - set(COLOURS))
    base = [0.0] * len(rows)
    for part in parts:
        heights = [row["parts"].get(part, 0) / 2**30 for row in rows]
        label = part.replace("_", " ")
        colour = COLOURS.get(part, INK)
        axes.bar(range(len(rows)), heights, bottom=base, label=label, color=colour, width=0.7)
        base = [b + h for b, h in zip(base, heights, strict=True)]
    if limit is not None:
        label = f"a device has {limit / 2**30:.4g}"
        axes.axhline(limit / 2**30, color=INK, linewidth=1.2, linestyle="--", label=label)
    _ticks(axes, rows, key)
    axes.set_title("Memory of a device, GiB")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _time(axes: Any, rows: list[dict[str, Any]], key: str) -> None:
    seconds = [row["seconds"] for row in rows]
    axes.plot(range(len(rows)), seconds, color=PALETTE[0], marker="o")
    before = None
    for i, row in enumerate(rows):
        # Said where it changes: beside every point, words would lie on each other.
        if row["bound"] != before:
            where = {"xytext": (9, -9), "textcoords": "offset points", "ha": "left"}
            axes.annotate(row["bound"], (i, row["seconds"]), fontsize=9, color=FAINT, **where)
        before = row["bound"]
    if max(seconds) > _DECADES * min(seconds):
        axes.set_yscale("log")
        axes.set_ylim(min(seconds) / 2, 3 * max(seconds))
    else:
        axes.set_ylim(0, 1.2 * max(seconds))
    _ticks(axes, rows, key)
    axes.set_title("Time of a step, s (and what bounds it)")


def _ticks(axes: Any, rows: list[dict[str, Any]], key: str) -> None:
    axes.set_xticks(range(len(rows)), [short(row[key]) for row in rows])
    axes.set_xlabel(key)


def short(value: str) -> str:
    """Whole numbers of 1,024 and 1,048,576 as 8K and 1M: those of long rows lie on each other."""
    if not value.isdecimal() or int(value) == 0:
        return value
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if int(value) % unit == 0:
            return f"{int(value) // unit}{name}"
    return value
