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


ARMS: dict[str, Callable[[str, float], Experiment]] = {"grown": grown, "longer": longer}


def _main() -> None:
    from memtrain.evaluate.run import evaluate
    from memtrain.evaluate.study import BITS_PER_BYTE, at_rates, measured, spreads
    from memtrain.evaluate.study_command import Study, table_row

    def reread(run: Path) -> dict[str, Any]:
        return {"whole": evaluate(run, task="reread")}

    study = Study("bank-reread", arms=list(ARMS), seeds=SEEDS)
    window = at_rates(bank_reread.window(), [BASE_RATE])
    base = study.arm("window", window, score=BITS_PER_BYTE)
    studied = {"window": base}
    for name in study.arms:
        candidates: dict[str, Callable[[int], Experiment]] = {
            f"{rate:g}": lambda seed, n=name, r=rate: ARMS[n](str(base.runs[seed]), r)
            for rate in RATES[name]
        }
        studied[name] = study.arm(name, candidates, score=BITS_PER_BYTE)
    found = []
    for name, arm in studied.items():
        values = [measured(run, "reread", reread)["whole"] for run in arm.runs.values()]
        spread = spreads(values, bank_reread.FIGURES)
        print(table_row(name, arm.spread, *spread.values(), arm.chosen, arm.candidates))
        found.append({"arm": name, **arm.as_dict(), **spread})
    study.keep(found)


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
