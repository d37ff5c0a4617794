"""What is a bank worth when a text comes again, far beyond the window?

    memtrain train experiments/bank_reread.py:bank           # one_softmax, window, full
    memtrain evaluate runs/bank-reread-bank --task reread

    python experiments/bank_reread.py                        # the study of docs/results

`bank` looks up 8 of the 4,096 positions before a window of 64 and joins them by a gate;
`one_softmax` joins them with the window under one softmax; `window` has the window alone; `full`
attends to everything. All have the same projections, convolved keys and start, data and steps. A
tenth of the training rows holds a passage twice; what is measured is held-out text, 512 bytes read
twice in a row: the second reading begins eight windows after the first.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtrain.config import Experiment
from memtrain.data.config import DataConfig, RereadTask
from memtrain.description import LayerDescription
from memtrain.layers import Attention, BankMemory, Block, ModelConfig, ShortConv, SwiGLU, Window
from memtrain.train.config import OptimizerConfig, TrainConfig


if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALIKE: dict[str, Any] = {
    "num_heads": 2,
    "window": 64,
    "rope_theta": None,
    "key_conv": 2,
    "induction_init": True,
}
BANK: dict[str, Any] = {"bank_size": 4096, "top_k": 8}
SEEDS = (0, 1, 2)
RATES = (2e-3, 5e-3, 1e-2)


def recipe() -> Experiment:
    return bank()


def bank() -> Experiment:
    return _model("bank", BankMemory(**ALIKE, **BANK))


def one_softmax() -> Experiment:
    return _model("one-softmax", BankMemory(**ALIKE, **BANK, join="softmax"))


def window() -> Experiment:
    return _model("window", Attention(**ALIKE))


def full() -> Experiment:
    return _model("full", dataclasses.replace(Attention(**ALIKE), window=None))


def _model(name: str, layer: LayerDescription) -> Experiment:
    mix, plain = Block(mixer=ShortConv(4)), SwiGLU(hidden=384)
    local = Block(mixer=Window(64, num_heads=2), ffn=plain)
    return Experiment(
        name=f"bank-reread-{name}",
        model=ModelConfig(dim=128, pattern=(mix, local, mix, Block(mixer=layer, ffn=plain))),
        data=DataConfig(path=("stdlib",), reread=RereadTask(share=0.1)),
        train=TrainConfig(
            num_steps=400,
            batch_size=2,
            seq_len=1024,
            checkpoint_every_steps=400,
            evaluate_every_steps=100,
            evaluate_batches=16,
            log_every_steps=50,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=50),
    )


ARMS: dict[str, Callable[[], Experiment]] = {
    "window and bank, gate": bank,
    "window and bank, one softmax": one_softmax,
    "window": window,
    "full attention": full,
}


def _read_twice(run: Path) -> dict[str, Any]:
    """What held-out text costs when it is read again, with all memories and without the bank."""
    from memtrain.evaluate.run import evaluate
    from memtrain.evaluate.subject import Subject

    found = {"whole": evaluate(run, task="reread")}
    if "bank" in Subject.open(run).memories:
        found["without bank"] = evaluate(run, task="reread", without=["bank"])
    return found


FIGURES = ("bits_per_byte_first", "bits_per_byte_second", "second_over_first")


def _main() -> None:
    from memtrain.evaluate.study import BITS_PER_BYTE, at_rates, measured, size_of, spreads
    from memtrain.evaluate.study_command import Study, table_row

    study = Study("bank-reread", arms=list(ARMS), seeds=SEEDS)
    found: list[dict[str, Any]] = []
    for name in study.arms:
        candidates = at_rates(ARMS[name](), RATES)
        arm = study.arm(name, candidates, score=BITS_PER_BYTE)
        size = size_of(candidates[arm.chosen], vocab_size=256)
        readings = [measured(run, "reread", _read_twice) for run in arm.runs.values()]
        for setting in readings[0]:
            values = [reading[setting] for reading in readings]
            label = name if setting == "whole" else f"{name}, {setting}"
            spread = spreads(values, FIGURES)
            cells = (*spread.values(), arm.chosen, arm.candidates, size["state_bytes"])
            print(table_row(label, arm.spread, *cells))
            by_position = [value["by_position"] for value in values]
            found.append(
                {"arm": label, **size, **arm.as_dict(), **spread, "by_position": by_position}
            )
    study.keep(found, lambda figure: _draw(figure, found), (7.0, 3.8))


def _draw(figure: "Figure", found: list[dict[str, Any]]) -> None:
    """Bits per byte of both readings along the piece, seeds averaged."""
    from memtrain.evaluate.plots import PALETTE
    from memtrain.evaluate.study_command import positions_mean

    axes = figure.subplots()
    for row in found:
        if row["arm"] not in ARMS:
            continue
        colour = PALETTE[list(ARMS).index(row["arm"])]
        for reading, line in (("first", "--"), ("second", "-")):
            label = row["arm"] if reading == "second" else None
            axes.plot(*positions_mean(row["by_position"], reading), line, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes of the piece read so far (dashed: first reading)")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
