"""What each memory of the golden path's model is worth: switched off, and never had.

    python experiments/golden_ablation.py             # the study of docs/results/golden-ablation.md

    memtrain train experiments/golden_ablation.py --run-dir runs/golden-whole
    memtrain evaluate runs/golden-whole --task recall --without bank

The golden path's model (a window, a bank, full attention and a product-key memory, twice; a short
convolution stands where the path has its recurrent memory) is trained for longer than the path
takes. Each of its memories is then left out in
two ways: switched off in the model that was trained with it, which shows what that model relies on;
and left out of a model that is trained without it, which shows what the others make up for. The
feed-forward layers stay. Two tasks are mixed into the text, facts told and asked for and passages
read twice, so that there is something to remember.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import golden

from memtrain.config import Experiment, override
from memtrain.description import LayerDescription
from memtrain.layers import GatedDelta, ShortConv
from memtrain.parallel.config import MeshConfig
from memtrain.recipe import with_layers


if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)
RATES = (3e-3, 1e-2)
MEMORIES = ("window", "short_conv", "bank", "attention", "product_key")


def recipe() -> Experiment:
    return whole()


def whole() -> Experiment:
    """Of 192 bytes a row, so that the bank has what a window no longer sees; on one device."""
    base = override(
        golden.recipe(),
        [
            "train.num_steps=300",
            "train.batch_size=8",
            "train.seq_len=192",
            "train.checkpoint_every_steps=300",
            "train.evaluate_every_steps=150",
            "train.evaluate_batches=32",
            "train.log_every_steps=100",
            "optimizer.warmup_steps=50",
        ],
    )

    def change(layer: LayerDescription) -> LayerDescription:
        return ShortConv(3) if isinstance(layer, GatedDelta) else layer

    base = dataclasses.replace(base, mesh=MeshConfig())
    return with_layers(base, change, name="golden-whole")


def without(memory: str) -> Experiment:
    """The same, and one memory is left out wherever it stands; layers beside it stay."""
    from memtrain.model.ablation import layer_label
    from memtrain.model.language_model import full_pattern

    base = whole()
    model = dataclasses.replace(base.model, pattern=full_pattern(base.model))

    def change(layer: LayerDescription) -> LayerDescription | None:
        return None if layer_label(layer) == memory else layer

    return with_layers(
        dataclasses.replace(base, model=model), change, name=f"golden-without-{memory}"
    )


ARMS: dict[str, Callable[[], Experiment]] = {
    "every memory": whole,
    **{f"never had {memory}": lambda m=memory: without(m) for memory in MEMORIES},
}
FIGURES = ("bits_per_byte", "recall", "second_over_first")


def _figures(run: Path, off: tuple[str, ...] = ()) -> dict[str, float]:
    from memtrain.evaluate.run import evaluate

    tokens = 1 << 15
    return {
        "bits_per_byte": evaluate(run, task="bpb", without=off, max_tokens=tokens)["bits_per_byte"],
        "recall": evaluate(run, task="recall", without=off, max_tokens=tokens)["accuracy"],
        "second_over_first": evaluate(run, task="reread", without=off, max_tokens=tokens)[
            "second_over_first"
        ],
    }


def _main() -> None:
    from memtrain.evaluate.study import BITS_PER_BYTE, at_rates, measured, size_of, spreads
    from memtrain.evaluate.study_command import Study, table_row

    study = Study("golden-ablation", arms=list(ARMS), seeds=SEEDS)
    found: list[dict[str, Any]] = []
    for name in study.arms:
        candidates = at_rates(ARMS[name](), RATES)
        arm = study.arm(name, candidates, score=BITS_PER_BYTE)
        size = size_of(candidates[arm.chosen], vocab_size=256)
        settings: dict[str, tuple[str, ...]] = {name: ()}
        if name == "every memory":
            settings |= {f"{memory} switched off": (memory,) for memory in MEMORIES}
        for label, off in settings.items():
            file = "-without-".join(("figures", *off))
            values = [
                measured(run, file, lambda run, off=off: _figures(run, off))
                for run in arm.runs.values()
            ]
            spread = spreads(values, FIGURES)
            cells = (size["parameters"], arm.chosen, arm.candidates, size["state_bytes"])
            print(table_row(label, *spread.values(), *cells))
            found.append({"arm": label, **size, **arm.as_dict(), **spread})
    study.keep(found, lambda figure: _draw(figure, found), (9.0, 3.8))


def _draw(figure: "Figure", found: list[dict[str, Any]]) -> None:
    """Bits per byte and second reading of every setting, as bars."""
    from memtrain.evaluate.plots import PALETTE

    rows = list(reversed(found))
    for panel, key in zip(figure.subplots(1, len(FIGURES), sharey=True), FIGURES, strict=True):
        panel.barh(
            [row["arm"] for row in rows],
            [row[key][0] for row in rows],
            xerr=[row[key][1] for row in rows],
            color=[PALETTE["switched off" in row["arm"]] for row in rows],
        )
        panel.set_xlabel(key.replace("_", " "))


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
