"""`memtrain report`: one page that shows what a run remembers and how it was trained."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memtrain.evaluate import figures, plots
from memtrain.evaluate.measure import ALL, Budget, Measured, measure
from memtrain.evaluate.page import Markup, Page, escape, said, slot_rows
from memtrain.evaluate.subject import Subject
from memtrain.files import write_whole
from memtrain.train import metrics, records


REPORT = "report.html"
FIGURES = "figures"
PROMPT_TAIL = 700
"""Characters of a prompt that are shown."""


def report(
    run: Path | str, *, budget: Budget | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Writes RUN/report.html and RUN/figures/*.png, and returns their paths and all numbers.

    Measures the newest valid checkpoint. Raises BadInput where `run` is no run, has no checkpoint,
    or matplotlib (the `report` extra) is missing; then nothing is written.
    """
    begin = time.perf_counter()
    run = Path(run)
    records.need_experiment(run)
    plots.need_matplotlib()
    subject = Subject.open(run)
    lines = metrics.read_lines(run / metrics.FILE_NAME)
    measured = measure(subject, budget=budget or Budget(), say=say)

    say("drawing")
    bits_per_nat = None
    if measured.bits:
        bits_per_nat = measured.tokens_scored / measured.bytes_scored / math.log(2)
    drawn = {
        "remembering": figures.remembering(measured),
        "learning": figures.learning(lines, measured, bits_per_nat),
        "positions": figures.positions(measured),
        "slots": figures.table_use(lines, measured),
        "experts": figures.expert_use(lines),
        "throughput": figures.throughput(lines),
    }
    images = {name: plots.as_png(found) for name, found in drawn.items() if found is not None}
    page = _page(run, measured, lines, images)

    folder = run / FIGURES
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        write_whole(folder / f"{name}.png", image)
    write_whole(run / REPORT, page.render().encode("utf-8"))
    return {
        **numbers(measured),
        "experts": experts_of(lines),
        "report": str(run / REPORT),
        "figures": {name: str(folder / f"{name}.png") for name in images},
        "seconds": time.perf_counter() - begin,
    }


def numbers(measured: Measured) -> dict[str, Any]:
    """Every headline number, as JSON. Settings are "all" and "without_NAME"."""

    def settings(values: dict[str, Any]) -> dict[str, Any]:
        return {n if n == ALL else f"without_{n}": value for n, value in values.items()}

    reread = {
        name: {"first": float(found.first.mean()), "second": float(found.second.mean())}
        for name, found in measured.reread.items()
    }
    return {
        "step": measured.subject.step,
        "parameters": measured.num_parameters,
        "bits_per_byte": settings(measured.bits),
        "tokens_scored": measured.tokens_scored,
        "bits_per_byte_by_position": settings(measured.by_position),
        "reread": settings(reread),
        "recall": {
            "chance": measured.chance,
            "trained_on": measured.trained_on_recall,
            "by_distance": settings(measured.distance),
        },
        "kinds": measured.kinds,
        "baselines": {row["model"]: row["bits_per_byte"] for row in measured.baselines},
        "beats": beaten(measured),
        "slots_used": {
            reads.table: float((reads.mass > 0).mean()) for reads, _, _ in measured.tables
        },
        "answers": [
            {"fact": a.fact, "distance": a.distance, **settings(a.answers)}
            for a in measured.answers
        ],
        "sample": measured.sample.text if measured.sample else None,
        "notes": measured.notes,
    }


def beaten(measured: Measured) -> dict[str, bool]:
    """Whether the model needs fewer bits than each baseline."""
    if not measured.baselines:
        return {}
    ours, *others = measured.baselines
    return {row["model"]: ours["bits_per_byte"] < row["bits_per_byte"] for row in others}


def _page(run: Path, measured: Measured, lines: list[dict], images: dict[str, bytes]) -> Page:
    experiment = measured.subject.experiment
    page = Page(f"memtrain: {experiment.name}")
    page.add(f"<h1>What {escape(experiment.name)} remembers</h1>")
    page.paragraph(
        f"{measured.num_parameters / 1e6:.2f}M parameters, step {measured.subject.step:,}. "
        "All but the training curves was measured through the decode path, on text that was not "
        "trained on.",
        faint=True,
    )
    page.facts(_facts(measured))
    _remembering(page, measured, images)
    _learning(page, measured, images)
    _tables(page, measured, images, lines)
    _experts(page, images, lines)
    if "throughput" in images:
        page.section("Speed")
        page.image(images["throughput"], "Tokens a second and goodput over training")
    _baselines(page, measured)
    if measured.sample:
        sample = measured.sample
        page.section(
            "A sample",
            f"The begin of {sample.name} (marked), and how the model goes on at temperature "
            f"{sample.temperature}, seed {sample.seed}.",
        )
        page.add(f"<pre><mark>{escape(sample.prompt)}</mark>{escape(sample.text)}</pre>")
    _setup(page, run, measured, lines)
    return page


def _facts(measured: Measured) -> list[tuple[str, str]]:
    found = []
    if measured.bits:
        found.append((f"{measured.bits[ALL]:.3f}", "bits per byte, held out"))
    if ALL in measured.reread:
        gain = measured.reread[ALL]
        saved = 1 - gain.second.mean() / gain.first.mean()
        found.append((f"{100 * saved:.0f}%", "fewer bits when a text is read again"))
    if ALL in measured.distance:
        rows = measured.distance[ALL]
        seq_len = measured.subject.experiment.train.seq_len
        inside = [row for row in rows if row["to"] <= seq_len]
        total = sum(row["questions"] for row in inside)
        right = sum(row["accuracy"] * row["questions"] for row in inside) / max(total, 1)
        found.append((f"{100 * right:.0f}%", "of facts told before given back"))
    for reads, _, _ in measured.tables:
        used = int((reads.mass > 0).sum())
        found.append((f"{used:,}", f"of {reads.num_slots:,} slots of {reads.table!r} read"))
    return found


def _remembering(page: Page, measured: Measured, images: dict[str, bytes]) -> None:
    page.section("The picture of remembering")
    if "remembering" in images:
        page.image(
            images["remembering"],
            "Bits per byte of a text read twice, accuracy of recall by distance, and what the "
            "key-value table adds, with every memory on and each one switched off",
        )
    if measured.reread:
        count, length = next(iter(measured.reread.values())).first.shape
        page.paragraph(
            f"Above: {count} pieces of {length + 1} tokens, from all over the held-out files, each "
            "read twice in a row from an empty memory. Lines are means along the piece, smoothed; "
            "the shade holds the middle half of the pieces. What the second reading costs less "
            "is what was remembered of the first.",
            faint=True,
        )
    if measured.distance and measured.subject.tokenizer is not None:
        trained = "" if measured.trained_on_recall else "The training data held no such lines. "
        page.paragraph(
            "Below: lines such as @kq=XWB are told somewhere in held-out text and asked for later; "
            "an answer counts if greedy decoding gives all of it. The shade is one standard error. "
            f"{trained}Switching off a memory of a finished model shows what the model has "
            "come to rely on; a model trained without it would have learned to do otherwise.",
            faint=True,
        )
    if measured.answers:
        page.heading("One prompt, answered with every memory and with each one off")
        shown = measured.answers[min(1, len(measured.answers) - 1)]
        tail = shown.prompt[-PROMPT_TAIL:]
        at = tail.rfind(shown.fact)
        dots = "\u2026" if len(tail) < len(shown.prompt) else ""
        if at >= 0:
            end = at + len(shown.fact)
            text = f"{escape(tail[:at])}<mark>{escape(shown.fact)}</mark>{escape(tail[end:])}"
        else:
            text = escape(tail)
        page.add(f'<pre class="scroll">{dots}{text}<b>?</b></pre>')
        names = list(shown.answers)
        page.table(
            ["told", "tokens before", *(plots.title_of(name) for name in names)],
            [
                [
                    Markup(f"<code>{escape(found.fact)}</code>"),
                    found.distance,
                    *(said(found.answers[name], found.wanted) for name in names),
                ]
                for found in measured.answers
            ],
            numbers=(1,),
        )
        page.paragraph(
            "The prompt above, and questions at other distances: the first ones drawn, not chosen.",
            faint=True,
        )
    for note in measured.notes:
        page.paragraph(f"Note: {note}.", faint=True)


def _learning(page: Page, measured: Measured, images: dict[str, bytes]) -> None:
    if "learning" in images:
        page.section("Learning")
        page.image(images["learning"], "Training loss and held-out bits per byte by tokens read")
    if "positions" in images:
        page.section(
            "What context is worth",
            "Bits per byte of a token by how many tokens were read before it.",
        )
        page.image(images["positions"], "Bits per byte by tokens of context")


def _tables(page: Page, measured: Measured, images: dict[str, bytes], lines: list[dict]) -> None:
    if "slots" in images:
        page.section("The key-value table")
        page.image(images["slots"], "Slots used over training and distribution of slot usage")
    for line in _dead_rows(lines):
        page.paragraph(line)
    columns = ["slot", "share of weight", "specific", "where it fires (the token read is marked)"]
    for reads, top, specific in measured.tables:
        for title, found in (("most read", top), ("most specific", specific)):
            if found:
                page.heading(f"Table {reads.table!r}: the {title} slots and the text they fire on")
                page.table(columns, slot_rows(found), numbers=(0, 1, 2))
        page.paragraph(
            "Specific: the share of a slot's weight that falls on its most frequent context of "
            "three tokens. Only slots read at least as much as the average one are listed.",
            faint=True,
        )


def _experts(page: Page, images: dict[str, bytes], lines: list[dict]) -> None:
    if "experts" not in images:
        return
    page.section(
        "The experts",
        "Of each mixture of experts in training: the tokens of its busiest expert, where 1 is an "
        "even share, and how undecided its router is about a token.",
    )
    page.image(images["experts"], "Load of the busiest expert and entropy of the router")
    columns = ["layer", "busiest expert", "experts used", "balance loss", "router entropy"]
    formats = {"load_max": ".2f", "experts_used": ".0%", "balance": ".3f", "router_entropy": ".2f"}
    rows = [
        [layer, *(format(found[n], style) if n in found else "-" for n, style in formats.items())]
        for layer, found in experts_of(lines).items()
    ]
    page.table(columns, rows, numbers=(1, 2, 3, 4))


def experts_of(lines: list[dict]) -> dict[str, dict[str, float]]:
    """The newest numbers of each mixture of experts in a run's lines; see `memtrain.model.moe`."""
    newest = {n: value for line in lines for n, value in line.items() if value is not None}
    metrics = ("load_max", "experts_used", "balance", "router_entropy")
    return {
        layer: {m: newest[name] for m in metrics if (name := f"memory/{layer}.{m}") in newest}
        for layer in figures.routed_layers(lines)
    }


def _dead_rows(lines: list[dict]) -> list[str]:
    """What the newest counts of the optimizer say of rows that nothing reaches."""
    newest = {name: value for line in lines for name, value in line.items()}
    return [
        f"Table {name.removeprefix('memory/tables.').removesuffix(end)!r}: {value:.1%} of the rows "
        f"were never updated, {newest[name.removesuffix(end) + '.idle']:.1%} not in the last "
        "1,000 steps."
        for name, value in sorted(newest.items())
        if name.endswith(end := ".never_updated")
    ]


def _baselines(page: Page, measured: Measured) -> None:
    if not measured.baselines:
        return
    page.section(
        "Against simple models",
        "Markov models of bytes, interpolated with Witten-Bell smoothing and counted on the text "
        "that the model read; xz compresses each held-out file on its own.",
    )
    won = beaten(measured)
    best = min(row["bits_per_byte"] for row in measured.baselines)
    rows = []
    for row in sorted(measured.baselines, key=lambda row: row["bits_per_byte"]):
        name = row["model"]
        verdict = "" if name not in won else ("the model wins" if won[name] else "the model loses")
        rows.append(
            [
                name,
                f"{row['bits_per_byte']:.3f}" + (" *" if row["bits_per_byte"] == best else ""),
                verdict,
                f"{row['parameters']:,}" if row["parameters"] else "-",
                f"{row['read_bytes']:,}" if row["read_bytes"] else "-",
                f"{row['scored_bytes']:,}",
            ]
        )
    ours = next(i for i, row in enumerate(rows) if row[0] == "this model")
    page.table(
        ["", "bits per byte", "", "parameters or n-grams", "bytes of text read", "bytes measured"],
        rows,
        numbers=(1, 3, 4, 5),
        ours=ours,
    )
    page.paragraph(
        "The model begins each piece of its context length with an empty memory; the Markov models "
        "see across the pieces of a file, and xz sees whole files, its headers included.",
        faint=True,
    )


def _setup(page: Page, run: Path, measured: Measured, lines: list[dict]) -> None:
    page.section("How it was made")
    known = records.read_run(run)
    rows = [
        ("command", f"memtrain train {known.get('recipe') or '(from Python)'} --run-dir {run}"),
        ("trained on", f"{', '.join(known.get('devices', []))} x {known.get('num_devices', '?')}"),
        ("measured on", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"),
    ]
    seconds = [line["seconds"] for line in lines if line.get("seconds")]
    if seconds:
        rows.append(("seconds of training since it last began", f"{seconds[-1]:,.0f}"))
    versions = known.get("versions", {})
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    page.table(["", ""], rows)
    config = json.dumps(records.to_dict(measured.subject.experiment), indent=2)
    page.folded("configuration", config)
    page.folded("numbers", json.dumps(numbers(measured), indent=2, default=_plain))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
