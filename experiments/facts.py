"""Facts recalled against compute: a memory layer beside dense layers of its FLOPs and of its size.

    memtrain train experiments/facts.py:memory               # dense, dense_same_parameters
    memtrain evaluate runs/facts-memory --task facts

    python experiments/facts.py --facts 1000 10000           # the study of docs/results/facts.md
    python experiments/facts.py --facts 100000 1000000       # where there is a GPU

After Memory Layers at Scale (Berges et al. 2024, arXiv 2412.09764). A table of facts, (entity,
relation) -> one of 256 values, is learned by heart. The models are alike but for the feed-forward
place of their second block: a product-key memory of 128 x 128 slots, a SwiGLU of the same FLOPs, or
a SwiGLU of the same number of parameters, which computes 16 times as much for every token.
"""

from collections.abc import Callable
from typing import Any

from memtrain.config import Experiment, override
from memtrain.data.config import DataConfig, FactsTask
from memtrain.description import LayerDescription
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, SwiGLU
from memtrain.train.config import OptimizerConfig, TrainConfig


ROWS, FACTS_OF_A_ROW = 16, 16
"""Of a step: 256 facts, each a document of its own."""
SEEDS = (0, 1, 2)
RATES = {
    "product-key memory": ((3e-3, 1e-1), (3e-3, 3e-1), (1e-2, 3e-1)),
    "dense, same FLOPs": ((3e-3, 0.0), (1e-2, 0.0), (2e-2, 0.0)),
    "dense, same parameters": ((1e-3, 0.0), (3e-3, 0.0), (1e-2, 0.0)),
}
"""Candidates of each arm: learning rates of its parameters and of its table, if it has one."""
STEPS = {1_000: 400, 10_000: 2_000}


def recipe() -> Experiment:
    return memory()


def memory() -> Experiment:
    # Per token: query 32 x 64, half-scores 4 x 128 x 16, gate and output 32 x 64, 16 rows of 32.
    table = ProductKeyMemory(num_slots=128**2, num_heads=4, top_k=4, key_dim=16, value_dim=32)
    return _model("memory", table)


def dense() -> Experiment:
    # As many multiply-adds in three matrices of 32 x 130.
    return _model("dense", SwiGLU(hidden=130))


def dense_same_parameters() -> Experiment:
    # The table's 128^2 rows of 32 values, half-keys and projections, in three of 32 x 5590.
    return _model("dense-same-parameters", SwiGLU(hidden=5590))


def _model(name: str, ffn: LayerDescription) -> Experiment:
    task = FactsTask(num_facts=10_000, name_len=2)
    return Experiment(
        name=f"facts-{name}",
        model=ModelConfig(
            dim=32,
            pattern=(Block(mixer=Attention(num_heads=2), ffn=SwiGLU(hidden=64)), Block(ffn=ffn)),
        ),
        data=DataConfig(facts=task, prefetch=0),
        train=TrainConfig(
            num_steps=STEPS[task.num_facts],
            batch_size=ROWS,
            seq_len=FACTS_OF_A_ROW * task.fact_len,
            checkpoint_every_steps=10_000,
            evaluate_every_steps=STEPS[task.num_facts] // 8,
            evaluate_batches=4_000,
            log_every_steps=100,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-2, table_learning_rate=1e-1, warmup_steps=50, weight_decay=0.0
        ),
    )


def _sized(base: Experiment, num_facts: int, rate: float, table_rate: float) -> Experiment:
    """The experiment with so many facts, and the epochs of the nearest table in `STEPS`."""
    task = base.data.facts
    assert task is not None
    entities = -(-num_facts // task.num_relations)
    name_len = task.name_len if entities <= task.name_tokens**task.name_len else 3
    known = min(STEPS, key=lambda size: abs(size - num_facts))
    steps = round(STEPS[known] * max(1, num_facts / known))
    return override(
        base,
        [
            f"data.facts.num_facts={num_facts}",
            f"data.facts.name_len={name_len}",
            f"train.seq_len={FACTS_OF_A_ROW * (name_len + 1)}",
            f"train.num_steps={steps}",
            f"train.evaluate_every_steps={-(-steps // 8)}",
            f"optimizer.learning_rate={rate}",
            f"optimizer.table_learning_rate={table_rate}",
        ],
    )


def _candidates(arm: str, num_facts: int) -> dict[str, Experiment]:
    return {
        f"{rate:g}" + f", table {table:g}" * (table > 0): _sized(
            ARMS[arm](), num_facts, rate, table
        )
        for rate, table in RATES[arm]
    }


ARMS: dict[str, Callable[[], Experiment]] = {
    "product-key memory": memory,
    "dense, same FLOPs": dense,
    "dense, same parameters": dense_same_parameters,
}


def _main() -> None:
    from memtrain.evaluate.study import size_of
    from memtrain.evaluate.study_command import Study, draw_curves, table_row

    tables = {"type": int, "nargs": "+", "default": list(STEPS)}
    study = Study("facts", arms=list(ARMS), seeds=SEEDS, options={"--facts": tables})
    found: list[dict[str, Any]] = []
    panels: dict[str, list[Any]] = {}
    for num_facts in study.given.facts:
        for name in study.arms:
            candidates = _candidates(name, num_facts)
            arm = study.arm(name, candidates, folder=str(num_facts))
            experiment = candidates[arm.chosen]
            assert experiment.data.facts is not None
            size = size_of(experiment, experiment.data.facts.vocab_size)
            tokens_per_step = ROWS * experiment.train.seq_len
            flops = size["forward_flops_per_token"]
            size["training_flops_per_step"] = 3 * flops * tokens_per_step
            cells = (size["parameters"], round(flops), arm.spread, arm.chosen, arm.candidates)
            print(table_row(num_facts, name, *cells, digits=4))
            found.append({"facts": num_facts, "arm": name, **size, **arm.as_dict()})
            panel = panels.setdefault(f"{num_facts:,} facts", [])
            panel.append((arm, size["training_flops_per_step"]))
    study.keep(
        found,
        lambda figure: draw_curves(
            figure, panels, x="FLOPs trained", y="facts recalled", log_x=True
        ),
        (4.6 * len(panels), 3.6),
    )


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
