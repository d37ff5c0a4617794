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

import argparse
from pathlib import Path
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


def _main() -> None:
    from memtrain.data.tasks.mqar import ZOOLOGY
    from memtrain.evaluate.study import run_arm, size_of, where_measured, write_study

    parser = argparse.ArgumentParser(description="The study of docs/results/mqar.md.")
    parser.add_argument("--cells", nargs="+", default=["64,4", "128,8"], metavar="N,D")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--runs", type=Path, default=Path("runs/study-mqar"))
    parser.add_argument("--out", type=Path, help="figures as JSON")
    parser.add_argument("--plot", type=Path, help="a picture, .png")
    given = parser.parse_args()
    cells = ZOOLOGY if given.cells == ["all"] else [map(int, c.split(",")) for c in given.cells]
    arms, found = {"full": full(), "window": window(), "window and bank": window_and_bank()}, []
    for length, pairs in cells:
        for name, base in arms.items():
            candidates = {
                f"{rate:g}": _cell(base, length, pairs, given.vocab, rate)
                for rate in LEARNING_RATES
            }
            folder = given.runs / f"{length}-{pairs}-{given.vocab}"
            arm = run_arm(name, candidates, given.seeds, folder)
            size = size_of(candidates[arm.chosen], given.vocab)
            found.append({"tokens": length, "pairs": pairs, "arm": name, **size, **arm.as_dict()})
    for row in found:
        rates = " / ".join(f"{score:.3f}" for score in row["candidates"].values())
        print(
            f"| ({row['tokens']}, {row['pairs']}) | {row['arm']} | {row['mean']:.4f} +- "
            f"{row['stdev']:.4f} | {row['chosen']} | {rates} | {row['state_bytes']:,} |"
        )
    if given.out is not None:
        write_study(given.out, {"results": found, "where": where_measured()})
    if given.plot is not None:
        _plot(found, given.plot)


def _plot(found: list[dict[str, Any]], path: Path) -> None:
    """Accuracy on the way, a panel for each cell: the mean of the seeds, and each of them."""
    import numpy as np

    from memtrain.evaluate.plots import PALETTE, as_png, new_figure, styled

    cells = list(dict.fromkeys((row["tokens"], row["pairs"]) for row in found))
    arms = list(dict.fromkeys(row["arm"] for row in found))

    @styled
    def draw() -> bytes:
        figure = new_figure(4.6 * len(cells), 3.6)
        panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
        for panel, cell in zip(panels, cells, strict=True):
            for row in (row for row in found if (row["tokens"], row["pairs"]) == cell):
                colour = PALETTE[arms.index(row["arm"])]
                curves = list(row["seeds"].values())
                scores = np.array([curve["scores"] for curve in curves])
                for one in scores:
                    panel.plot(curves[0]["steps"], one, color=colour, alpha=0.25, linewidth=1)
                panel.plot(curves[0]["steps"], scores.mean(0), color=colour, label=row["arm"])
            panel.set_title(f"{cell[0]} tokens, {cell[1]} pairs")
            panel.set_xlabel("step")
            panel.set_ylim(0, 1.03)
        panels[0].set_ylabel("questions answered right")
        panels[-1].legend(frameon=False, fontsize=9, loc="lower right")
        return as_png(figure)

    path.write_bytes(draw())


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
