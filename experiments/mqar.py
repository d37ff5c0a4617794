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
    from memtrain.evaluate.study import (
        draw_study,
        run_arm,
        size_of,
        study_arguments,
        where_measured,
        write_study,
    )

    parser = study_arguments(
        "The study of docs/results/mqar.md.", runs="runs/study-mqar", seeds=SEEDS, arms=list(ARMS)
    )
    parser.add_argument("--cells", nargs="+", default=["64,4", "128,8"], metavar="N,D")
    parser.add_argument("--vocab", type=int, default=1024)
    given = parser.parse_args()
    cells = ZOOLOGY if given.cells == ["all"] else [map(int, c.split(",")) for c in given.cells]
    found: list[dict[str, Any]] = []
    panels: dict[str, list[Any]] = {}
    for length, pairs in cells:
        for name in given.arms:
            candidates = {
                f"{rate:g}": _cell(ARMS[name](), length, pairs, given.vocab, rate)
                for rate in LEARNING_RATES
            }
            folder = given.runs / f"{length}-{pairs}-{given.vocab}"
            arm = run_arm(name, candidates, given.seeds, folder)
            size = size_of(candidates[arm.chosen], given.vocab)
            found.append({"tokens": length, "pairs": pairs, "arm": name, **size, **arm.as_dict()})
            panels.setdefault(f"{length} tokens, {pairs} pairs", []).append((arm, 1))
    for row in found:
        rates = " / ".join(f"{score:.3f}" for score in row["candidates"].values())
        print(
            f"| ({row['tokens']}, {row['pairs']}) | {row['arm']} | {row['mean']:.4f} +- "
            f"{row['stdev']:.4f} | {row['chosen']} | {rates} | {row['state_bytes']:,} |"
        )
    if given.out is not None:
        write_study(given.out, {"results": found, "where": where_measured()})
    if given.plot is not None:
        draw_study(given.plot, panels, x="step", y="questions answered right")


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
