"""A table of facts to be learned by heart: (entity, relation) -> value, of any size.

A fact is a document of its own, the entity's name and then the relation, and asks for its value at
the last token: nothing in the row tells it, so it is answered from the weights or not at all. An
epoch tells every fact once, in a new order. Values are drawn apart from names, log2(num_values)
bits each, so the table has no rule to be found, and what a model recalls is what it has stored. As
in the studies of how much a model can know (Allen-Zhu and Li 2024, arXiv 2404.05405; the synthetic
facts of UltraMem, Huang et al. 2024, arXiv 2411.12364).
"""

import numpy as np

from memtrain.data.batch import Batch, padded_row
from memtrain.data.config import FactsTask
from memtrain.data.seeded import Permutation, derive, distinct_integers, random_integers
from memtrain.data.tasks.generated import Asked
from memtrain.errors import BadInput


_MOST_NAMES = 1 << 32


def check_facts(task: FactsTask, seq_len: int) -> None:
    """Refuse a table that has no room for its names, and rows that have none for a fact.

    Raises:
        BadInput: naming the setting, with what would be right.
    """
    for name in ("num_facts", "num_relations", "name_len"):
        if getattr(task, name) < 1:
            raise BadInput(f"data.facts.{name}={getattr(task, name)}: it takes 1 or more")
    for name in ("num_values", "name_tokens"):
        if getattr(task, name) < 2:
            raise BadInput(f"data.facts.{name}={getattr(task, name)}: it takes 2 or more")
    if task.first_fact < 0:
        raise BadInput(f"data.facts.first_fact={task.first_fact}: it takes 0 or more")
    names = task.name_tokens**task.name_len
    if task.first_fact and 4 * task.num_entities >= names:
        # So many names are drawn as an order of all of them, of which fewer are no beginning.
        raise BadInput(
            f"data.facts.first_fact={task.first_fact}: {task.num_entities} entities are a quarter "
            f"of the {names} names or more, and a longer table would not go on as the shorter one; "
            f"take name_len={task.name_len + 1} in both runs"
        )
    if names < task.num_entities:
        raise BadInput(
            f"data.facts.num_facts={task.num_facts}: with num_relations={task.num_relations} it has"
            f" {task.num_entities} entities, and there are {names} names of name_len="
            f"{task.name_len}; take name_len={_fitting_len(task)} or more relations"
        )
    if names > _MOST_NAMES:
        raise BadInput(
            f"data.facts.name_len={task.name_len}: {task.name_tokens} ** {task.name_len} names are"
            f" more than 2 ** 32; {_fitting_len(task)} is enough for {task.num_entities} entities"
        )
    if seq_len < task.fact_len:
        raise BadInput(
            f"train.seq_len={seq_len}: a fact of data.facts has {task.fact_len} tokens; take a"
            " multiple of it"
        )


def _fitting_len(task: FactsTask) -> int:
    length = 1
    while task.name_tokens**length < task.num_entities:
        length += 1
    return length


class FactTable:
    """Every fact up to the task's last, by its number in the table.

    A function of the task and `key` alone. A longer table begins as a shorter one does.
    """

    def __init__(self, task: FactsTask, key: int) -> None:
        self.task = task
        names = task.name_tokens**task.name_len
        self._names = distinct_integers(derive(key, "names"), task.num_entities, names)
        last = task.first_fact + task.num_facts
        self._values = random_integers(derive(key, "values"), last, task.num_values)

    def told(self, facts: np.ndarray) -> np.ndarray:
        """[F, name_len + 1] tokens that name the facts: the entity's name, then the relation."""
        task = self.task
        entity, relation = np.divmod(np.asarray(facts, np.int64), task.num_relations)
        powers = task.name_tokens ** np.arange(task.name_len, dtype=np.int64)
        name = self._names[entity][:, None] // powers % task.name_tokens
        return np.concatenate([name, task.name_tokens + relation[:, None]], axis=1)

    def values(self, facts: np.ndarray) -> np.ndarray:
        """[F] the token that answers each fact."""
        return self.task.name_tokens + self.task.num_relations + self._values[facts]


class FactRows:
    """Rows of as many facts as fit, in a new order every epoch; all are asked when held out.

    Held-out rows are the same facts in order: what is measured is what was taught and is recalled.
    """

    def __init__(self, task: FactsTask, seq_len: int, *, set_key: int, order_key: int) -> None:
        check_facts(task, seq_len)
        self.table = FactTable(task, set_key)
        self._seq_len = seq_len
        self._order_key = order_key
        self._per_row = seq_len // task.fact_len
        self.rows_per_epoch = self.num_held_out = -(-task.num_facts // self._per_row)

    def _facts(self, row: int) -> np.ndarray:
        begin = row * self._per_row
        return np.arange(begin, min(begin + self._per_row, self.table.task.num_facts))

    def row(self, index: int) -> Batch:
        epoch, index = divmod(index, self.rows_per_epoch)
        order = Permutation(self.table.task.num_facts, derive(self._order_key, "facts", epoch))
        return self._row(order.of(self._facts(index)))

    def held_out(self, index: int) -> Asked:
        batch = self._row(self._facts(index))
        return Asked(batch, np.zeros(self._seq_len, np.int32))

    def _row(self, facts: np.ndarray) -> Batch:
        facts = facts + self.table.task.first_fact
        tokens = self.table.told(facts)
        length = tokens.shape[1]
        places = np.tile(np.arange(length), len(facts))
        last = places == length - 1
        targets = np.where(last, np.repeat(self.table.values(facts), length), 0)
        return padded_row(tokens.ravel(), targets, last, places, places == 0, self._seq_len)
