"""What a carried window, a bank and a larger bank are worth on long books: a ladder.

    python experiments/bank_books.py --data path/to/books       # the study of docs/results

    memtrain train experiments/bank_books.py:bank_carried --set data.path=path/to/books
    memtrain evaluate runs/bank-books-bank-carried --task bpb

After Memorizing Transformers (Wu et al. 2022, arXiv 2203.08913), Table 4. Every arm reads whole
documents in order, rows of 512 bytes one after the other, with a window of 128 in both of its
attention layers; one layer may have a bank too. Without carry every row begins with empty memories;
carried, the windows see on across the rows' edges (as Transformer-XL does), and a bank reaches back
as far as it is large. (Their "memory without XL" cuts local attention at each segment and carries
the memory all the same; here what a token sees is a matter of positions, so carry is of both.)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from memtrain.config import Experiment, override
from memtrain.data.config import DataConfig
from memtrain.description import LayerDescription
from memtrain.layers import Attention, BankMemory, Block, ModelConfig, ShortConv, SwiGLU
from memtrain.train.config import OptimizerConfig, TrainConfig


SEEDS = (0, 1, 2)
RATES = (3e-3, 8e-3)
ALIKE: dict[str, Any] = {
    "num_heads": 2,
    "window": 128,
    "rope_theta": None,
    "key_conv": 2,
    "induction_init": True,
}


def recipe() -> Experiment:
    return bank_carried()


def window() -> Experiment:
    return _model("window", Attention(**ALIKE), carry=False)


def window_carried() -> Experiment:
    return _model("window-carried", Attention(**ALIKE), carry=True)


def bank() -> Experiment:
    return _model("bank", BankMemory(bank_size=2_048, top_k=8, **ALIKE), carry=False)


def bank_carried() -> Experiment:
    return _model("bank-carried", BankMemory(bank_size=2_048, top_k=8, **ALIKE), carry=True)


def larger_bank_carried() -> Experiment:
    layer = BankMemory(bank_size=16_384, top_k=8, **ALIKE)
    return _model("larger-bank-carried", layer, carry=True)


def _model(name: str, layer: LayerDescription, *, carry: bool) -> Experiment:
    mix, plain = Block(mixer=ShortConv(4)), SwiGLU(hidden=384)
    local = Block(mixer=Attention(num_heads=2, window=128), ffn=plain)
    return Experiment(
        name=f"bank-books-{name}",
        model=ModelConfig(dim=128, pattern=(mix, local, mix, Block(mixer=layer, ffn=plain))),
        data=DataConfig(path=("stdlib",), order="document", validation_fraction=0.1),
        train=TrainConfig(
            num_steps=400,
            batch_size=4,
            seq_len=512,
            carry="stop" if carry else "none",
            checkpoint_every_steps=400,
            evaluate_every_steps=200,
            evaluate_batches=64,
            log_every_steps=50,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    )


ARMS: dict[str, Callable[[], Experiment]] = {
    "no memory": window,
    "window carried": window_carried,
    "bank": bank,
    "bank and window carried": bank_carried,
    "larger bank, carried": larger_bank_carried,
}


def _by_position(run: Path) -> dict[str, Any]:
    from memtrain.evaluate.run import evaluate

    return evaluate(run, task="bpb", max_tokens=1 << 16)


def _main() -> None:
    from memtrain.evaluate.study import (
        measured,
        run_arm,
        size_of,
        study_arguments,
        where_measured,
        write_study,
    )

    parser = study_arguments(
        "The study of docs/results/bank-books.md.",
        runs="runs/study-bank-books",
        seeds=SEEDS,
        arms=list(ARMS),
    )
    parser.add_argument("--data", default="stdlib", help="a folder of long texts")
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name in given.arms:
        candidates = {
            f"{rate:g}": override(
                ARMS[name](), [f"optimizer.learning_rate={rate}", f"data.path={given.data}"]
            )
            for rate in RATES
        }
        arm = run_arm(
            name,
            candidates,
            given.seeds,
            given.runs,
            score="validation/bits_per_byte",
            best="least",
        )
        positions = [measured(run, "by-position", _by_position) for run in arm.runs.values()]
        found.append(
            {
                "arm": name,
                **size_of(candidates[arm.chosen], vocab_size=256),
                **arm.as_dict(),
                "by_position": [at["by_position"] for at in positions],
            }
        )
    for row in found:
        rates = " / ".join(f"{score:.3f}" for score in row["candidates"].values())
        seeds = [curve["scores"][-1] for curve in row["seeds"].values()]
        print(
            f"| {row['arm']} | {row['mean']:.4f} +- {row['stdev']:.4f} | {row['chosen']} | {rates} "
            f"| {row['state_bytes']:,} | {', '.join(f'{score:.4f}' for score in seeds)} |"
        )
    for row in found:
        print(row["arm"], *(f"{at}: {bits:.3f}" for at, bits in _mean_by_position(row)))
    if given.out is not None:
        write_study(given.out, {"results": found, "where": where_measured()})
    if given.plot is not None:
        _draw(given.plot, found)


def _mean_by_position(row: dict[str, Any]) -> list[tuple[int, float]]:
    """Bits per byte by the bytes of the document that were read before, seeds averaged."""
    import numpy as np

    ends = [part["to"] for part in row["by_position"][0]]
    bits = [[part["bits_per_byte"] for part in seed] for seed in row["by_position"]]
    return list(zip(ends, np.mean(bits, axis=0).tolist(), strict=True))


def _draw(path: Path, found: list[dict[str, Any]]) -> None:
    from memtrain.evaluate.plots import PALETTE, as_png, new_figure, styled

    @styled
    def draw() -> bytes:
        figure = new_figure(6.4, 3.8)
        axes = figure.subplots()
        for row in found:
            at, bits = zip(*_mean_by_position(row), strict=True)
            axes.plot(at, bits, color=PALETTE[list(ARMS).index(row["arm"])], label=row["arm"])
        axes.set_xscale("log", base=2)
        axes.set_xlabel("bytes read before")
        axes.set_ylabel("bits per byte")
        axes.legend(frameon=False, fontsize=9)
        return as_png(figure)

    path.write_bytes(draw())


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
