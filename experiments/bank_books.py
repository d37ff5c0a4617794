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
from typing import TYPE_CHECKING, Any

from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.description import LayerDescription
from memtrain.layers import Attention, BankMemory, Block, ModelConfig, ShortConv, SwiGLU
from memtrain.train.config import OptimizerConfig, TrainConfig


if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    from memtrain.evaluate.study import BITS_PER_BYTE, at_rates, measured, size_of
    from memtrain.evaluate.study_command import Study, positions_mean, table_row

    data = {"default": "stdlib", "help": "a folder of long texts"}
    study = Study("bank-books", arms=list(ARMS), seeds=SEEDS, options={"--data": data})
    found: list[dict[str, Any]] = []
    for name in study.arms:
        candidates = at_rates(ARMS[name](), RATES, [f"data.path={study.given.data}"])
        arm = study.arm(name, candidates, score=BITS_PER_BYTE)
        size = size_of(candidates[arm.chosen], vocab_size=256)
        positions = [
            measured(run, "by-position", _by_position)["by_position"] for run in arm.runs.values()
        ]
        seeds = ", ".join(f"{curve.last:.4f}" for curve in arm.curves.values())
        cells = (arm.spread, arm.chosen, arm.candidates, size["state_bytes"], seeds)
        print(table_row(name, *cells, digits=4))
        ends, bits = positions_mean(positions, "bits_per_byte")
        print(*(f"{at}: {value:.3f}" for at, value in zip(ends, bits, strict=True)))
        found.append({"arm": name, **size, **arm.as_dict(), "by_position": positions})
    study.keep(found, lambda figure: _draw(figure, found))


def _draw(figure: "Figure", found: list[dict[str, Any]]) -> None:
    """Bits per byte by the bytes of the document that were read before."""
    from memtrain.evaluate.plots import PALETTE
    from memtrain.evaluate.study_command import positions_mean

    axes = figure.subplots()
    for row in found:
        curve = positions_mean(row["by_position"], "bits_per_byte")
        axes.plot(*curve, color=PALETTE[list(ARMS).index(row["arm"])], label=row["arm"])
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes read before")
    axes.set_ylabel("bits per byte")
    axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
