"""Multi-query associative recall: what full attention, a window, and a window with a bank can do.

    memtrain train experiments/mqar.py:full                  # window, window_and_bank
    memtrain evaluate runs/mqar-window-and-bank --task mqar

    python experiments/mqar.py --cells 64,4 128,8            # the study of docs/results/mqar.md
    python experiments/mqar.py --cells all --vocab 8192      # Zoology's grid: where there is a GPU

Two layers of width 64 with one head and nothing else, in the cells (N tokens, D pairs) of Zoology.
`full` attends to the whole row in both layers; `window` to 16 positions in both; in
`window_and_bank` the second layer looks up 8 of the keys before its window. All have convolved keys
and start as induction heads, so that what is compared is what they can see, not how soon they learn
to look. Without that start full attention does not learn these cells from as few examples.
"""

from collections.abc import Callable
from typing import Any

from memtrain.config import Experiment, override
from memtrain.data.config import DataConfig, MqarTask
from memtrain.layers import Attention, BankMemory, Block, ModelConfig
from memtrain.train.config import OptimizerConfig, TrainConfig


WINDOW = 16
"""Narrower than the shortest cell: half of its questions ask for what is further back."""
ALIKE: dict[str, Any] = {
    "num_heads": 1,
    "rope_theta": None,
    "key_conv": 2,
    "induction_init": True,
}
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)


def recipe() -> Experiment:
    return window_and_bank()


def full() -> Experiment:
    return _model("full", Attention(**ALIKE), Attention(**ALIKE))


def window() -> Experiment:
    near = Attention(window=WINDOW, **ALIKE)
    return _model("window", near, near)


def window_and_bank() -> Experiment:
    near = Attention(window=WINDOW, **ALIKE)
    bank = BankMemory(window=WINDOW, bank_size=512, top_k=8, **ALIKE)
    return _model("window-and-bank", near, bank)


def _model(name: str, *mixers: Attention) -> Experiment:
    return Experiment(
        name=f"mqar-{name}",
        model=ModelConfig(dim=64, pattern=tuple(Block(mixer=mixer) for mixer in mixers)),
        data=DataConfig(
            mqar=MqarTask(vocab_size=1024, num_pairs=4, num_train=20_000, num_validation=1_024)
        ),
        train=TrainConfig(
            num_steps=200,
            batch_size=64,
            seq_len=64,
            checkpoint_every_steps=1_000,
            evaluate_every_steps=50,
            evaluate_batches=16,
            log_every_steps=50,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    )


def _cell(base: Experiment, length: int, pairs: int, vocab: int, rate: float) -> Experiment:
    return override(
        base,
        [
            f"train.seq_len={length}",
            f"data.mqar.num_pairs={pairs}",
            f"data.mqar.vocab_size={vocab}",
            f"optimizer.learning_rate={rate}",
        ],
    )


ARMS: dict[str, Callable[[], Experiment]] = {
    "full": full,
    "window": window,
    "window and bank": window_and_bank,
}


def _main() -> None:
    from memtrain.data.tasks.mqar import ZOOLOGY
    from memtrain.evaluate.study import size_of
    from memtrain.evaluate.study_command import Study, draw_curves, table_row

    options = {
        "--cells": {"nargs": "+", "default": ["64,4", "128,8"], "metavar": "N,D"},
        "--vocab": {"type": int, "default": 1024},
    }
    study = Study("mqar", arms=list(ARMS), seeds=SEEDS, options=options)
    cells, vocab = study.given.cells, study.given.vocab
    found: list[dict[str, Any]] = []
    panels: dict[str, list[Any]] = {}
    for length, pairs in ZOOLOGY if cells == ["all"] else [map(int, c.split(",")) for c in cells]:
        for name in study.arms:
            candidates = {
                f"{rate:g}": _cell(ARMS[name](), length, pairs, vocab, rate)
                for rate in LEARNING_RATES
            }
            arm = study.arm(name, candidates, folder=f"{length}-{pairs}-{vocab}")
            size = size_of(candidates[arm.chosen], vocab)
            figures = (arm.spread, arm.chosen, arm.candidates, size["state_bytes"])
            print(table_row(f"({length}, {pairs})", name, *figures, digits=4))
            found.append({"tokens": length, "pairs": pairs, "arm": name, **size, **arm.as_dict()})
            panels.setdefault(f"{length} tokens, {pairs} pairs", []).append((arm, 1))
    study.keep(
        found,
        lambda figure: draw_curves(figure, panels, x="step", y="questions answered right"),
        (4.6 * len(panels), 3.6),
    )


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
