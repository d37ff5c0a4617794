"""Facts added to a trained model: by writing a few rows of its table, and by finetuning.

    python experiments/edit_facts.py                  # the study of docs/results/edit-facts.md

    memtrain train experiments/facts.py:memory --run-dir runs/known --set data.facts.num_facts=1000
    memtrain train experiments/edit_facts.py --set train.init_from=runs/known
    memtrain evaluate runs/edit-facts --task facts
    memtrain evaluate runs/edit-facts --task facts --set data.facts.first_fact=0 \\
        --set data.facts.num_facts=1000               # of the old ones, what is left

A model with a product-key memory knows 1,000 facts by heart, and is taught 100 more. `chosen rows`
writes only rows that the new facts read and the old ones do not (sparse memory finetuning, Lin et
al. 2025, arXiv 2510.15103); `whole table` trains every row that is read, the rest of the model
frozen; `full finetuning` trains all parameters. Each arm has the same steps and data and its own
choice of rates: of those that teach 95 % of the new facts, the one that loses fewest of the old.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import facts

from memtrain.config import Experiment, override
from memtrain.data.config import FactsTask
from memtrain.train.config import RowEdit


if TYPE_CHECKING:
    from matplotlib.figure import Figure

OLD, NEW = 1_000, 100
SEEDS = (0, 1, 2)
BASE = "known"
ENOUGH = 0.95
"""Of the new facts: a candidate that recalls so many is judged by what it left of the old."""


def recipe() -> Experiment:
    return _edit("runs/known", rows=1_000, table=3e-2)


def known() -> Experiment:
    """The model that knows the old facts."""
    return override(
        facts.memory(), [f"data.facts.num_facts={OLD}", "train.num_steps=400", "name=known"]
    )


def _finetune(base: str, *, rate: float, table: float, freeze: tuple[str, ...] = ()) -> Experiment:
    """All the new facts in every step."""
    known_facts = known()
    task = FactsTask(num_facts=NEW, first_fact=OLD, name_len=2)
    rows = -(-NEW * task.fact_len // known_facts.train.seq_len)
    return dataclasses.replace(
        known_facts,
        name="edit-facts",
        data=dataclasses.replace(known_facts.data, facts=task),
        train=dataclasses.replace(
            known_facts.train,
            num_steps=200,
            batch_size=rows,
            evaluate_every_steps=25,
            init_from=base,
            freeze=freeze,
        ),
        optimizer=dataclasses.replace(
            known_facts.optimizer,
            learning_rate=rate,
            table_learning_rate=table,
            schedule="constant",
            warmup_steps=1,
        ),
    )


def _edit(base: str, *, rows: int, table: float) -> Experiment:
    whole = _finetune(base, rate=0.0, table=table)
    edit = RowEdit(rows=rows, background_batches=1_000)
    return dataclasses.replace(whole, train=dataclasses.replace(whole.train, edit=edit))


def _chosen_rows(base: Callable[[int], str]) -> dict[str, Callable[[int], Experiment]]:
    return {
        f"{rows} rows, table {rate:g}": lambda seed, n=rows, r=rate: _edit(
            base(seed), rows=n, table=r
        )
        for rows in (500, 1_000, 2_000)
        for rate in (1e-2, 3e-2, 1e-1)
    }


def _whole_table(base: Callable[[int], str]) -> dict[str, Callable[[int], Experiment]]:
    return {
        f"table {rate:g}": lambda seed, r=rate: _finetune(
            base(seed), rate=0.0, table=r, freeze=("*", "!tables.*")
        )
        for rate in (3e-3, 1e-2, 3e-2, 1e-1)
    }


def _full(base: Callable[[int], str]) -> dict[str, Callable[[int], Experiment]]:
    rates = [(rate, 10 * rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3)]
    return {
        f"{rate:g}, table {table:g}": lambda seed, r=rate, t=table: _finetune(
            base(seed), rate=r, table=t
        )
        for rate, table in [*rates, (3e-5, 1e-2), (1e-4, 1e-2)]
    }


ARMS = {"chosen rows": _chosen_rows, "whole table": _whole_table, "full finetuning": _full}


def _recalled(run: Path) -> dict[str, float]:
    from memtrain.evaluate.run import evaluate

    old = ["data.facts.first_fact=0", f"data.facts.num_facts={OLD}"]
    return {
        "new": evaluate(run, task="facts")["accuracy"],
        "old": evaluate(run, task="facts", settings=old)["accuracy"],
    }


def _main() -> None:
    from memtrain.evaluate.study import mean_and_spread, measured, spreads
    from memtrain.evaluate.study_command import Study, table_row

    study = Study("edit-facts", arms=list(ARMS), seeds=SEEDS)
    base = study.arm(BASE, {BASE: known()})
    print(table_row(f"known before, of {OLD:,}", base.spread))

    def recalled(run: Path) -> dict[str, float]:
        return measured(run, "recalled", _recalled)

    def judge(run: Path) -> float:
        share = recalled(run)
        return 1 + share["old"] if share["new"] >= ENOUGH else share["new"]

    found: list[dict[str, Any]] = []
    for name in study.arms:
        candidates = ARMS[name](lambda seed: str(base.runs[seed]))
        arm = study.arm(name, candidates, judge=judge)
        after = {seed: recalled(run) for seed, run in arm.runs.items()}
        before = {seed: curve.last for seed, curve in base.curves.items()}
        new = spreads(list(after.values()), ["new"])
        lost = mean_and_spread([1 - share["old"] / before[seed] for seed, share in after.items()])
        first = f"seed-{study.given.seeds[0]}"
        tried = {label: recalled(study.runs / name / label / first) for label in candidates}
        print(table_row(name, *new.values(), lost, arm.chosen))
        for label, share in tried.items():
            print(f"    {label}: new {share['new']:.3f}, old {share['old']:.3f}")
        found.append({"arm": name, **arm.as_dict(), **new, "lost": lost, "tried": tried})
    study.keep(found, lambda figure: _draw(figure, found), (5.4, 3.8))


def _draw(figure: "Figure", found: list[dict[str, Any]]) -> None:
    """What every candidate of the first seed recalls of the new facts, and what is left of the
    old."""
    from memtrain.evaluate.plots import PALETTE

    axes = figure.subplots()
    for colour, row in zip(PALETTE, found, strict=False):
        tried = sorted(row["tried"].values(), key=lambda share: share["new"])
        axes.plot(
            [share["new"] for share in tried],
            [share["old"] for share in tried],
            "o",
            color=colour,
            label=row["arm"],
        )
    axes.axvline(ENOUGH, color="0.8", linewidth=1)
    axes.axhline(0.98, color="0.8", linewidth=1)
    axes.set_xlabel("new facts recalled")
    axes.set_ylabel("old facts still recalled")
    axes.legend(frameon=False, fontsize=9, loc="lower left")


if __name__ == "__main__":
    from memtrain import runtime

    runtime.prepare(1)
    _main()
