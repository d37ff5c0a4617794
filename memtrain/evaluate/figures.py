"""The figures of a report. Each function draws one from what was measured or logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memtrain.evaluate.measure import ALL, Measured
from memtrain.evaluate.plots import (
    FAINT,
    FIRST,
    INK,
    PALETTE,
    colour_of,
    label_lines,
    new_figure,
    smoothed,
    styled,
    title_of,
)


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX"
MIN_SHARE = 0.005
"""Kinds of tokens rarer than this are too few to be drawn; the numbers have them."""

Line = Mapping[str, Any]
"""One line of metrics.jsonl."""


@styled
def remembering(measured: Measured) -> Figure | None:
    """The picture of remembering: text read twice, facts asked for, what the table adds."""
    settings = list(measured.reread)
    bottom = bool(measured.distance) + bool(measured.kinds)
    if not settings and not bottom:
        return None
    figure = new_figure(12.6, 4.3 * bool(settings) + 4.7 * bool(bottom) + 0.3)
    # Titles of the two rows are figures' own, so that they stand over all their panels.
    rows = figure.subfigures(
        bool(settings) + bool(bottom),
        1,
        height_ratios=[4.3] * bool(settings) + [4.7] * bool(bottom),
        squeeze=False,
    )[:, 0]
    if settings:
        _reread_panels(rows[0], measured, settings)
    if bottom:
        widths = [1.35] * bool(measured.distance) + [1.0] * bool(measured.kinds)
        panels = rows[-1].subplots(1, bottom, width_ratios=widths, squeeze=False)[0]
        if measured.distance:
            _distance_panel(panels[0], measured)
        if measured.kinds:
            _kinds_panel(panels[-1], measured)
    return figure


def _reread_panels(part: Any, measured: Measured, settings: Sequence[str]) -> None:
    length = next(iter(measured.reread.values())).first.shape[1] + 1
    part.suptitle(
        f"Reading {length:,} tokens of an unknown file twice: is the second reading cheaper?",
        x=0.01,
        ha="left",
        fontsize=14.5,
        fontweight="bold",
    )
    panels = part.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    x = np.arange(1, length)
    width = max(5, length // 8)
    upper = [
        np.percentile(smoothed(values, width), 75, axis=0)[length // 16 :].max()
        for name in settings
        for values in (measured.reread[name].first, measured.reread[name].second)
    ]
    top = 1.3 * float(max(upper))
    for panel, name in zip(panels, settings, strict=True):
        found, colour = measured.reread[name], colour_of(measured.settings, name)
        ends = []
        for values, line_colour, style, text in (
            (found.first, FIRST, "--", "first"),
            (found.second, colour, "-", "second"),
        ):
            rows = smoothed(values, width)
            low, high = np.percentile(rows, [25, 75], axis=0)
            panel.fill_between(x, low, high, color=line_colour, alpha=0.16, linewidth=0)
            mean = rows.mean(axis=0)
            panel.plot(x, mean, color=line_colour, linestyle=style)
            ends.append((mean, line_colour, text))
        first, second = float(found.first.mean()), float(found.second.mean())
        panel.set_title(title_of(name), color=colour if name != ALL else INK)
        panel.set_xlabel("position in the file")
        panel.text(
            0.97,
            0.97,
            f"first {first:.2f}\nsecond {second:.2f}",
            transform=panel.transAxes,
            ha="right",
            va="top",
            fontsize=11,
            linespacing=1.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
        )
        # Labels stand where the two lines are furthest apart, above and below them.
        gap = ends[0][0] - ends[1][0]
        middle = slice(length // 3, max(length // 3 + 1, 2 * length // 3))
        at = middle.start + int(np.argmax(np.abs(gap[middle])))
        for (mean, line_colour, text), above in zip(ends, (gap[at] >= 0, gap[at] < 0), strict=True):
            # A line near the bottom leaves no room below itself, and has it above.
            above = above or mean[at] < 0.12 * top
            panel.annotate(
                f"{text} reading",
                (x[at], mean[at]),
                xytext=(0, 14 if above else -14),
                textcoords="offset points",
                ha="center",
                va="center",
                color=line_colour,
                fontsize=10,
                fontweight="bold",
            )
    panels[0].set_ylabel("bits per byte")
    panels[0].set_ylim(0, top)


def _distance_panel(panel: Axes, measured: Measured) -> None:
    """Accuracy against distance, one line a setting, and chance."""
    is_generated = bool(measured.subject.experiment.data.generated)
    seq_len = measured.subject.experiment.train.seq_len
    ends, right = [], 1.0
    for name, rows in measured.distance.items():
        colour = colour_of(measured.settings, name)
        x = [_middle(row) for row in rows]
        y = np.array([row["accuracy"] for row in rows])
        count = np.array([row["questions"] for row in rows])
        spread = np.sqrt(y * (1 - y) / count)
        panel.fill_between(
            x,
            np.clip(y - spread, 0, 1),
            np.clip(y + spread, 0, 1),
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
        # Lines may lie on each other: shapes tell them apart, and the whole model is on top.
        panel.plot(
            x,
            y,
            color=colour,
            marker=MARKERS[measured.settings.index(name) % len(MARKERS)],
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=4 if name == ALL else 3,
            linewidth=1.6 if name == ALL else 2.6,
        )
        ends.append((x[-1], float(y[-1]), title_of(name), colour))
        right = max(right, x[-1])
    panel.axhline(measured.chance, color=FIRST, linestyle=":", linewidth=1.6)
    if not is_generated:
        panel.axvline(seq_len, color=FAINT, linestyle="--", linewidth=1.2)
        panel.text(
            seq_len, 1.045, "longest row of training ", ha="right", color=FAINT, fontsize=9.5
        )
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.set_ylim(-0.03, 1.1)
    panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1])
    panel.set_xlabel("tokens between the fact and the question")
    panel.set_ylabel("answers right")
    panel.set_title("Asked for a fact that was told before", fontsize=14.5)
    chance = f"chance {100 * measured.chance:.2g}%"
    label_lines(panel, [*ends, (right, measured.chance - 1e-6, chance, FIRST)])


def _middle(row: Mapping[str, Any]) -> float:
    return float(np.sqrt(max(row["from"], row["to"] / 2) * row["to"]))


def _kinds_panel(panel: Axes, measured: Measured) -> None:
    """Bits per byte by kind of token, with the table and without it."""
    (without, *_) = measured.table_memories
    rows = [row for row in measured.kinds if row["share"] >= MIN_SHARE]
    rows.sort(key=lambda row: row[without] - row[ALL])
    y = np.arange(len(rows))
    on, off = ([row[name] for row in rows] for name in (ALL, without))
    colour = colour_of(measured.settings, without)
    panel.hlines(y, on, off, color=colour, alpha=0.35, linewidth=6)
    panel.plot(off, y, "o", color=colour, markersize=9)
    panel.plot(on, y, "o", color=PALETTE[0], markersize=9)
    panel.set_yticks(y, [f"{row['kind']}  {100 * row['share']:.0f}%" for row in rows], color=INK)
    low, high = min(*on, *off), max(*on, *off)
    panel.set_xlim(low - 0.06 * (high - low), high + 0.26 * (high - low))
    panel.set_ylim(-0.7, len(rows) + 0.1)
    panel.grid(axis="y", visible=False)
    for place, a, b in zip(y, on, off, strict=True):
        panel.annotate(
            f"{round(b - a, 2) + 0.0:+.2f}",  # no minus before a zero
            (max(a, b), place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
        )
    # The labels stand over the top row, outwards, so that they cannot meet.
    left_first = on[-1] <= off[-1]
    for x, text, text_colour, is_left in (
        (on[-1], "table on", PALETTE[0], left_first),
        (off[-1], "table off", colour, not left_first),
    ):
        panel.annotate(
            text,
            (x, y[-1]),
            xytext=(-4 if is_left else 4, 14),
            textcoords="offset points",
            ha="right" if is_left else "left",
            color=text_colour,
            fontsize=10,
            fontweight="bold",
        )
    panel.set_xlabel(f"bits per byte, {measured.kinds_title}")
    panel.set_title("What the key-value table adds", fontsize=14.5)


@styled
def learning(
    lines: Sequence[Line], measured: Measured, bits_per_nat: float | None
) -> Figure | None:
    """Training loss and held-out bits per byte (loss for MQAR) against tokens."""
    tokens_of = _tokens_by_step(lines)
    train = [(x["tokens"], x["train/loss"]) for x in lines if x.get("train/loss") is not None]
    key = "validation/loss" if bits_per_nat is None else "validation/bits_per_byte"
    held = [(tokens_of(x["step"]), x[key]) for x in lines if x.get(key) is not None]
    if not train:
        return None
    scale = bits_per_nat or 1.0
    figure = new_figure(9.5, 4.4)
    panel = figure.subplots()
    x, y = np.array(train, float).T
    panel.plot(x, scale * y, color="#9ca3af", linewidth=1.2)
    right = max(float(x[-1]), *(float(tokens) for tokens, _ in held), 0.0)
    ends = [(right, float(scale * y[-1]), "training rows", FAINT)]
    if held:
        x2, y2 = np.array(held, float).T
        panel.plot(x2, y2, color=PALETTE[0], marker="o", markersize=5)
        ends.append((right, float(y2[-1]), f"held out: {y2[-1]:.2f}", PALETTE[0]))
    for row in measured.baselines[1:]:
        if row["model"] in ("Markov order 3", "xz -9e, file by file"):
            panel.axhline(row["bits_per_byte"], color=FIRST, linestyle=":", linewidth=1.6)
            label = f"{row['model'].split(',')[0]}: {row['bits_per_byte']:.2f}"
            ends.append((right, row["bits_per_byte"], label, FIRST))
    low = min(e[1] for e in ends)
    high = float(np.percentile(scale * y, 96))
    panel.set_ylim(low - 0.08 * (high - low) - 0.02, high + 0.05 * (high - low) + 0.02)
    panel.set_xlabel("tokens read")
    panel.set_ylabel("nats per token" if bits_per_nat is None else "bits per byte")
    panel.set_title("Learning")
    panel.xaxis.set_major_formatter(_short)
    label_lines(panel, ends)
    return figure


@styled
def positions(measured: Measured) -> Figure | None:
    """Bits per byte by tokens of context, for every setting."""
    if not measured.by_position:
        return None
    figure = new_figure(9.5, 4.4)
    panel = figure.subplots()
    ends = []
    for name, rows in measured.by_position.items():
        colour = colour_of(measured.settings, name)
        edges = [max(rows[0]["from"], rows[0]["to"] / 2), *(row["to"] for row in rows)]
        values = [row["bits_per_byte"] for row in rows]
        panel.stairs(values, edges, color=colour, linewidth=2.2, baseline=None)
        ends.append((edges[-1], values[-1], title_of(name), colour))
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.set_xlabel("tokens of context")
    panel.set_ylabel("bits per byte")
    panel.set_title("What context is worth")
    label_lines(panel, ends)
    return figure


@styled
def table_use(lines: Sequence[Line], measured: Measured) -> Figure | None:
    """Slots read over training, and how unevenly they are read at the end."""
    names = sorted({k for x in lines for k in x if k.endswith(".slots_used")})
    names = [name for name in names if name.startswith("memory/")]
    if not names and not measured.tables:
        return None
    figure = new_figure(11.5, 4.2)
    left, right = figure.subplots(1, 2)
    ends = []
    for index, name in enumerate(names):
        rows = [(x["tokens"], x[name]) for x in lines if x.get(name) is not None and "tokens" in x]
        x, y = np.array(rows, float).T
        colour = PALETTE[index % len(PALETTE)]
        left.plot(x, smoothed(y, 5), color=colour)
        layer = name.removeprefix("memory/").removesuffix(".slots_used")
        ends.append((x[-1], float(smoothed(y, 5)[-1]), f"layer {layer}", colour))
    left.set_ylim(0, 1.02)
    left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    left.xaxis.set_major_formatter(_short)
    left.set_xlabel("tokens read")
    left.set_title("Slots read in a batch")
    label_lines(left, ends)
    ends = []
    for index, (reads, _, _) in enumerate(measured.tables):
        share = np.sort(reads.mass / reads.mass.sum())[::-1]
        used = share[share > 0]
        colour = PALETTE[index % len(PALETTE)]
        right.plot(np.arange(1, len(used) + 1), used, color=colour)
        label = f"table {reads.table!r}:\n{len(used):,} of {reads.num_slots:,}"
        ends.append((len(used), float(np.log10(used[-1])), label, colour))
        right.axhline(1 / reads.num_slots, color=FIRST, linestyle=":", linewidth=1.6)
        right.text(1.2, 1.15 / reads.num_slots, "all alike", color=FIRST, fontsize=9.5)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("slots, the most read first")
    right.set_ylabel("share of the weight read")
    right.set_title("How unevenly slots are read")
    for x, y, text, colour in ends:
        right.annotate(
            text,
            (x, 10**y),
            xytext=(-8, 6),
            textcoords="offset points",
            ha="right",
            color=colour,
            fontsize=10,
        )
    return figure


@styled
def expert_use(lines: Sequence[Line]) -> Figure | None:
    """Over training, how unevenly each layer's experts are used, and how undecided routers are."""
    layers = routed_layers(lines)
    if not layers:
        return None
    figure = new_figure(11.5, 3.8)
    panels = figure.subplots(1, 2)
    titles = {"load_max": "Tokens of the busiest expert", "router_entropy": "Entropy of the router"}
    for panel, (metric, title) in zip(panels, titles.items(), strict=True):
        ends = []
        for index, layer in enumerate(layers):
            name = f"memory/{layer}.{metric}"
            rows = [(x["tokens"], x[name]) for x in lines if x.get(name) is not None]
            if not rows:
                continue
            x, y = np.array(rows, float).T
            colour = PALETTE[index % len(PALETTE)]
            panel.plot(x, smoothed(y, 5), color=colour)
            ends.append((x[-1], float(smoothed(y, 5)[-1]), f"layer {layer}", colour))
        panel.set_title(title)
        panel.set_xlabel("tokens read")
        panel.xaxis.set_major_formatter(_short)
        if metric == "load_max":
            panel.axhline(1.0, color=FIRST, linestyle=":", linewidth=1.6)
            panel.set_ylabel("times an even share")
        else:
            panel.set_ylim(0, None)
            panel.set_ylabel("nats")
        label_lines(panel, ends)
    return figure


def routed_layers(lines: Sequence[Line]) -> list[str]:
    """`LAYER.PLACE` of the mixtures of experts that a run's lines tell of, in order of depth."""
    begin, end = "memory/", ".router_entropy"
    # Evaluations report the same under "validation/".
    names = {n for line in lines for n in line if n.startswith(begin) and n.endswith(end)}
    layers = [name.removeprefix(begin).removesuffix(end) for name in names]
    return sorted(layers, key=lambda layer: int(layer.split(".")[0]))


@styled
def throughput(lines: Sequence[Line]) -> Figure | None:
    """Tokens a second of each logging interval, and the share of time spent training."""
    rows = [x for x in lines if x.get("tokens_per_second") is not None]
    if not rows:
        return None
    figure = new_figure(11.5, 3.6)
    left, right = figure.subplots(1, 2)
    x = np.array([row["tokens"] for row in rows], float)
    left.plot(x, [row["tokens_per_second"] for row in rows], color=PALETTE[0], linewidth=1.6)
    left.set_ylim(0, None)
    left.yaxis.set_major_formatter(_short)
    left.set_title("Tokens a second")
    right.plot(x, [row["goodput"] for row in rows], color=PALETTE[2])
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    right.set_title("Goodput: share of the time spent on steps")
    for panel in (left, right):
        panel.set_xlabel("tokens read")
        panel.xaxis.set_major_formatter(_short)
    return figure


def _tokens_by_step(lines: Sequence[Line]):
    """Tokens read by a step, from the lines that say both."""
    known = [(x["step"], x["tokens"]) for x in lines if "tokens" in x and x["step"] > 0]
    per_step = known[-1][1] / known[-1][0] if known else 1.0
    return lambda step: step * per_step


def _short(value: float, _: Any = None) -> str:
    """12,000 as 12K."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
