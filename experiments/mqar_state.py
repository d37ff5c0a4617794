"""Multi-query associative recall against the bytes of a model's state.

    memtrain train experiments/mqar_state.py:gated_delta     # full, window, mamba2, delta, hybrid
    python experiments/mqar_state.py                         # the study

Two layers of width 64 and nothing else read 64 tokens: 16 pairs, then questions (Zoology, Arora et
al. 2023, arXiv 2312.04927). What a layer keeps is what it can answer from: `full` attention keeps
everything, `window` 16 positions, and the state of `mamba2`, `delta` (DeltaNet) and `gated_delta`
(Gated DeltaNet) is a matrix a head, here of two sizes each; `hybrid` is a Gated DeltaNet before a
window. All mix neighbouring tokens with a short convolution, and none knows beforehand where keys
and values are: unlike in `mqar.py`, every arm must learn to look.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memtrain.config import Experiment
from memtrain.data.config import DataConfig, MqarTask
from memtrain.description import LayerDescription
from memtrain.layers import Attention, Block, DeltaNet, GatedDeltaNet, Mamba2, ModelConfig
from memtrain.train.config import OptimizerConfig, TrainConfig


if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTH, PAIRS, VOCAB = 64, 16, 256
LEARNING_RATES = (3e-3, 1e-2)
SEEDS = (0, 1, 2)
HEADS = 2


def recipe() -> Experiment:
    return gated_delta()


def full() -> Experiment:
    return _model("full", _attention(None), _attention(None))


def window() -> Experiment:
    return _model("window", _attention(16), _attention(16))


def mamba2(state_dim: int = 32) -> Experiment:
    layer = Mamba2(head_dim=32, state_dim=state_dim)
    return _model(f"mamba2-{state_dim}", layer, layer)


def delta(head_dim: int = 16) -> Experiment:
    layer = DeltaNet(num_heads=HEADS, head_dim=head_dim)
    return _model(f"delta-{head_dim}", layer, layer)


def gated_delta(head_dim: int = 16) -> Experiment:
    layer = GatedDeltaNet(num_heads=HEADS, head_dim=head_dim)
    return _model(f"gated-delta-{head_dim}", layer, layer)


def hybrid(head_dim: int = 8) -> Experiment:
    layer = GatedDeltaNet(num_heads=HEADS, head_dim=head_dim)
    return _model(f"hybrid-{head_dim}", layer, _attention(16))


def _attention(window: int | None) -> Attention:
    return Attention(num_heads=HEADS, window=window, rope_theta=None, key_conv=4)


def _model(name: str, *mixers: LayerDescription) -> Experiment:
    return Experiment(
        name=f"mqar-state-{name}",
        model=ModelConfig(dim=64, pattern=tuple(Block(mixer=mixer) for mixer in mixers)),
        data=DataConfig(
            mqar=MqarTask(vocab_size=VOCAB, num_pairs=PAIRS, num_train=50_000, num_validation=512)
        ),
        train=TrainConfig(
            num_steps=600,
            batch_size=64,
            seq_len=LENGTH,
            checkpoint_every_steps=1_000,
            evaluate_every_steps=100,
            evaluate_batches=8,
            log_every_steps=100,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=50, schedule="cosine"),
    )


ARMS: dict[str, Callable[[], Experiment]] = {
    "full attention": full,
    "window of 16": window,
    "Mamba-2, state 8": lambda: mamba2(8),
    "Mamba-2, state 32": lambda: mamba2(32),
    "DeltaNet, 8": lambda: delta(8),
    "DeltaNet, 16": lambda: delta(16),
    "Gated DeltaNet, 8": lambda: gated_delta(8),
    "Gated DeltaNet, 16": lambda: gated_delta(16),
    "Gated DeltaNet, 8, and window": hybrid,
}


def _main() -> None:
    from memtrain.evaluate.study import at_rates, size_of
    from memtrain.evaluate.study_command import Study, table_row

    study = Study("mqar-state", arms=list(ARMS), seeds=SEEDS)
    found: list[dict[str, Any]] = []
    for name in study.arms:
        candidates = at_rates(ARMS[name](), LEARNING_RATES)
        arm = study.arm(name, candidates)
        size = size_of(candidates[arm.chosen], VOCAB)
        figures = (size["state_bytes"], arm.spread, arm.chosen, arm.candidates)
        print(table_row(name, *figures))
        found.append({"arm": name, **size, **arm.as_dict()})
    study.keep(found, lambda figure: _draw(figure, found), (7.4, 4.2))


def _draw(figure: "Figure", found: list[dict[str, Any]]) -> None:
    """Answers by bytes: one point an arm, a line through the sizes of one kind."""
    from memtrain.evaluate.plots import PALETTE

    panel = figure.subplots()
    kinds: dict[str, list[tuple[float, float, float]]] = {}
    for row in found:
        kind = row["arm"] if "window" in row["arm"] else row["arm"].partition(",")[0]
        kinds.setdefault(kind, []).append((row["state_bytes"], row["mean"], row["stdev"]))
    for index, (kind, points) in enumerate(kinds.items()):
        x, y, error = zip(*points, strict=True)
        colour = PALETTE[index % len(PALETTE)]
        panel.errorbar(x, y, error, color=colour, marker="o", capsize=3, label=kind)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K")
    panel.set_xlabel("state of a sequence, bytes")
    panel.set_ylabel("questions answered right")
    panel.set_ylim(0, 1.03)
    panel.legend(frameon=False, fontsize=9, loc="lower right")


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
