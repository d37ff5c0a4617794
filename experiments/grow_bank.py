"""A bank for a model that was trained without one: put in, and trained alone.

    python experiments/grow_bank.py                   # of docs/results/bank-reread.md

    memtrain train experiments/bank_reread.py:window
    memtrain train experiments/grow_bank.py --set train.init_from=runs/bank-reread-window
    memtrain evaluate runs/grow-bank --task reread

The model with a window alone of `bank_reread.py` gets one block more, a bank whose place is gated
and begins without effect. `grown` trains that block and nothing else; `longer` trains the model
without it for as many steps more, all of its parameters.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bank_reread

from memtrain.config import Experiment, override
from memtrain.layers import BankMemory, Block


SEEDS = (0, 1, 2)
BASE_RATE = 5e-3
STEPS = 150
RATES = {"grown": (5e-3, 2e-2), "longer": (1e-3, 2e-3, 5e-3)}


def recipe() -> Experiment:
    return grown("runs/bank-reread-window")


def grown(base: str, rate: float = 2e-2) -> Experiment:
    window = bank_reread.window()
    bank = BankMemory(**bank_reread.ALIKE, **bank_reread.BANK)
    pattern = (*window.model.pattern, Block(mixer=bank, residual_gate=True))
    found = dataclasses.replace(window, model=dataclasses.replace(window.model, pattern=pattern))
    new = len(pattern) - 1
    return _further(found, base, rate, "grow-bank", [f"train.freeze=*,!blocks.{new}.*"])


def longer(base: str, rate: float = 5e-3) -> Experiment:
    return _further(bank_reread.window(), base, rate, "grow-bank-longer", [])


def _further(
    experiment: Experiment, base: str, rate: float, name: str, settings: list[str]
) -> Experiment:
    return override(
        experiment,
        [
            f"name={name}",
            f"train.init_from={base}",
            f"train.num_steps={STEPS}",
            f"train.checkpoint_every_steps={STEPS}",
            f"train.evaluate_every_steps={STEPS}",
            f"optimizer.learning_rate={rate}",
            "optimizer.warmup_steps=10",
            # The same text in another order, not that which the model began with.
            "data.seed=1",
            *settings,
        ],
    )


def _main() -> None:
    from memtrain.evaluate.run import evaluate
    from memtrain.evaluate.study import (
        mean_and_spread,
        measured,
        run_arm,
        study_arguments,
        where_measured,
        write_study,
    )

    def reread(run: Path) -> dict[str, Any]:
        return {"whole": evaluate(run, task="reread")}

    arms: dict[str, Callable[..., Experiment]] = {"grown": grown, "longer": longer}
    parser = study_arguments(
        "The grown model of docs/results/bank-reread.md.",
        runs="runs/study-bank-reread",
        seeds=SEEDS,
        arms=list(arms),
    )
    given = parser.parse_args()
    base_rate = f"{BASE_RATE:g}"
    window = override(bank_reread.window(), [f"optimizer.learning_rate={base_rate}"])
    score = "validation/bits_per_byte"
    base = run_arm(
        "window", {base_rate: window}, given.seeds, given.runs, score=score, best="least"
    )
    studied = {"window": base}
    for name in given.arms:
        candidates: dict[str, Callable[[int], Experiment]] = {
            f"{rate:g}": lambda seed, n=name, r=rate: arms[n](str(base.runs[seed]), r)
            for rate in RATES[name]
        }
        studied[name] = run_arm(
            name, candidates, given.seeds, given.runs, score=score, best="least"
        )
    found = []
    for name, arm in studied.items():
        values = [measured(run, "reread", reread)["whole"] for run in arm.runs.values()]
        keys = ("bits_per_byte_first", "bits_per_byte_second", "second_over_first")
        spread = {key: mean_and_spread([value[key] for value in values]) for key in keys}
        found.append({"arm": name, **arm.as_dict(), **spread})
        shown = " | ".join(f"{mean:.3f} +- {stdev:.3f}" for mean, stdev in spread.values())
        rates = " / ".join(f"{score:.3f}" for score in arm.candidates.values())
        print(f"| {name} | {arm.mean:.3f} +- {arm.stdev:.3f} | {shown} | {arm.chosen} | {rates} |")
    if given.out is not None:
        write_study(given.out, {"results": found, "where": where_measured()})


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
