"""A single needle at up to 16 times the length of training: what forgets, remembers, and filters.

    memtrain train experiments/needles.py:gated_delta        # mamba2, delta, window, hybrid
    memtrain evaluate runs/needles-gated-delta --task associative --context 2048 \\
        --set data.associative.min_distance=1024 --set data.associative.max_distance=2046
    python experiments/needles.py                            # the study
    python experiments/needles.py --noise 8                  # and of noise that says little

One pair of key and value stands at the beginning of a row, noise follows, and in it the key comes
again and asks for its value: the smallest form of RULER's single needles (Hsieh et al. 2024, arXiv
2404.06654), after Gated DeltaNet's Table 2 (arXiv 2412.06464). There a decay forgets needles that
are far, the delta rule remembers them while the noise is plain, and gating keeps noise of many
words out of the state. Rows of training have 128 tokens; what is asked for lies up to 16 times as
far back.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtrain.config import Experiment, override
from memtrain.data.config import AssociativeTask, DataConfig
from memtrain.description import LayerDescription
from memtrain.layers import Attention, Block, DeltaNet, GatedDeltaNet, Mamba2, ModelConfig
from memtrain.train.config import OptimizerConfig, TrainConfig


if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTH = 128
TIMES = (1, 2, 4, 8, 16)
NOISE = 128
"""Different tokens of noise, of 256 in all: a haystack of many words."""
LEARNING_RATES = (3e-3, 1e-2)
SEEDS = (0, 1, 2)
ASKED = 256
"""Rows that are asked at each length."""


def recipe() -> Experiment:
    return gated_delta()


def mamba2() -> Experiment:
    layer = Mamba2(head_dim=32, state_dim=32)
    return _model("mamba2", layer, layer)


def delta() -> Experiment:
    layer = DeltaNet(num_heads=2, head_dim=16, value_dim=32)
    return _model("delta", layer, layer)


def gated_delta() -> Experiment:
    layer = GatedDeltaNet(num_heads=2, head_dim=16, value_dim=32)
    return _model("gated-delta", layer, layer)


def window() -> Experiment:
    return _model("window", _window(), _window())


def hybrid() -> Experiment:
    return _model("hybrid", GatedDeltaNet(num_heads=2, head_dim=16, value_dim=32), _window())


def _window() -> Attention:
    return Attention(num_heads=2, window=64, rope_theta=None, key_conv=4)


def _model(name: str, *mixers: LayerDescription) -> Experiment:
    task = AssociativeTask(
        vocab_size=256,
        noise_tokens=NOISE,
        num_pairs=1,
        min_distance=2,
        max_distance=LENGTH - 2,
        num_train=50_000,
        num_validation=512,
    )
    return Experiment(
        name=f"needles-{name}",
        model=ModelConfig(dim=64, pattern=tuple(Block(mixer=mixer) for mixer in mixers)),
        data=DataConfig(associative=task),
        train=TrainConfig(
            num_steps=600,
            batch_size=32,
            seq_len=LENGTH,
            checkpoint_every_steps=300,
            evaluate_every_steps=100,
            evaluate_batches=16,
            log_every_steps=100,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=50, schedule="cosine"),
    )


ARMS: dict[str, Callable[[], Experiment]] = {
    "Mamba-2": mamba2,
    "DeltaNet": delta,
    "Gated DeltaNet": gated_delta,
    "window": window,
    "Gated DeltaNet and window": hybrid,
}


def _asked_from_afar(run: Path) -> dict[str, float]:
    """Share of needles found in rows of each length, in whose last half they are asked for."""
    from memtrain.evaluate.run import evaluate

    return {
        str(LENGTH * times): evaluate(
            run,
            task="associative",
            context=LENGTH * times,
            max_tokens=ASKED * LENGTH * times,
            settings=[
                f"data.associative.max_distance={LENGTH * times - 2}",
                f"data.associative.min_distance={LENGTH * times // 2}",
            ],
        )["accuracy"]
        for times in TIMES
    }


def _main() -> None:
    from memtrain.evaluate.study import at_rates, measured, spreads
    from memtrain.evaluate.study_command import Study, table_row

    options = {"--noise": {"type": int, "default": NOISE}}
    study = Study("needles", arms=list(ARMS), seeds=SEEDS, options=options)
    noise, found = study.given.noise, []
    for name in study.arms:
        experiment = override(ARMS[name](), [f"data.associative.noise_tokens={noise}"])
        arm = study.arm(name, at_rates(experiment, LEARNING_RATES), folder=f"noise-{noise}")
        far = [measured(run, "needles", _asked_from_afar) for run in arm.runs.values()]
        lengths = [str(LENGTH * times) for times in TIMES]
        spread = spreads(far, lengths)
        print(table_row(name, *(spread[n] for n in lengths), arm.chosen, arm.candidates, digits=2))
        found.append({"arm": name, "noise": noise, "found": far, **arm.as_dict()})
    study.keep(found, lambda figure: _draw(figure, found))


def _draw(figure: "Figure", found: list[dict[str, Any]]) -> None:
    from memtrain.evaluate.plots import PALETTE

    panel = figure.subplots()
    lengths = [LENGTH * times for times in TIMES]
    for index, row in enumerate(found):
        seeds = [[seed[str(n)] for n in lengths] for seed in row["found"]]
        mean = [sum(values) / len(values) for values in zip(*seeds, strict=True)]
        colour = PALETTE[index % len(PALETTE)]
        for one in seeds:
            panel.plot(lengths, one, color=colour, alpha=0.25, linewidth=1)
        panel.plot(lengths, mean, color=colour, marker="o", label=row["arm"])
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.set_xlabel(f"tokens of a row (trained on {LENGTH})")
    panel.set_ylabel("needles found")
    panel.set_ylim(0, 1.03)
    panel.legend(frameon=False, fontsize=9, loc="lower left")


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
