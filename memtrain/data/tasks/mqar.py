"""Multi-query associative recall in the settings of Zoology (Arora et al. 2023, arXiv:2312.04927).

A row of N tokens begins with D pairs, key then value. Each key comes again once, later, with a gap
drawn from a power law; there the target is its value. All else is token 0 or, by
`random_non_queries`, any token, and only the answers are in the loss. As in the paper the value is
not written after the key that asks for it, so that an answer is never read off another one.
"""

import numpy as np

from memtrain.data.batch import Batch
from memtrain.data.config import MqarTask
from memtrain.data.seeded import (
    Permutation,
    derive,
    distinct_integers,
    random_integers,
    random_uniform,
)
from memtrain.data.tasks.generated import Asked, asked_row, stack_asked
from memtrain.errors import BadInput


ZOOLOGY = ((64, 4), (128, 8), (256, 16), (512, 64))
"""Cells (N tokens, D pairs) of Zoology's Figure 2."""
BASED_TRAIN = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
BASED_TEST = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
"""Cells of Based (Arora et al. 2024, arXiv:2402.18668): trained on the first, asked the second."""


def check_mqar(task: MqarTask, seq_len: int) -> None:
    """Refuse settings that have no room for their pairs and queries.

    Raises:
        BadInput: naming the setting, with what would be right.
    """
    if task.num_pairs < 1:
        raise BadInput(f"data.mqar.num_pairs={task.num_pairs}: it takes 1 or more")
    if seq_len % 2 or seq_len < 4 * task.num_pairs:
        raise BadInput(
            f"train.seq_len={seq_len}: data.mqar.num_pairs={task.num_pairs} takes an even number"
            f" of at least {4 * task.num_pairs} tokens"
        )
    if task.vocab_size < 2 * (task.num_pairs + 1):
        raise BadInput(
            f"data.mqar.vocab_size={task.vocab_size}: {task.num_pairs} pairs take"
            f" {2 * (task.num_pairs + 1)} or more"
        )
    if task.power <= 0:
        raise BadInput(f"data.mqar.power={task.power}: it takes a number above 0")
    if task.num_train < 1 or task.num_validation < 1:
        raise BadInput("data.mqar.num_train and num_validation take 1 or more")


def mqar_rows(
    task: MqarTask, indices: np.ndarray, *, seq_len: int, key: int, split: str = "train"
) -> Asked:
    """The rows with these numbers, [len(indices), seq_len]; a row is a function of its number.

    Keys are drawn from 1 .. V/2 - 1 and values from V/2 .. V - 1, without replacement in a row.
    `key` seeds the set and `split` names it ("train" or "validation").
    """
    check_mqar(task, seq_len)
    set_key = derive(key, "mqar", split)
    return stack_asked([_row(task, int(index), seq_len, set_key) for index in indices])


def _row(task: MqarTask, index: int, seq_len: int, set_key: int) -> Asked:
    count, half = task.num_pairs, task.vocab_size // 2
    key = derive(set_key, index)
    keys = 1 + distinct_integers(derive(key, "keys"), count, half - 1)
    values = half + distinct_integers(derive(key, "values"), count, task.vocab_size - half)
    slots = (seq_len - 2 * count) // 2
    gaps = _gaps(derive(key, "gaps"), count, slots, task.power)
    asked = 2 * count + 2 * gaps
    told = 2 * np.arange(count)

    tokens = np.zeros(seq_len, np.int32)
    if task.random_non_queries:
        tokens[:] = random_integers(derive(key, "others"), seq_len, task.vocab_size)
    tokens[told] = keys
    tokens[told + 1] = values
    tokens[asked] = keys
    return asked_row(tokens, values, asked - told, asked)


def _gaps(key: int, count: int, slots: int, power: float) -> np.ndarray:
    """[count] distinct slots, drawn one after the other with probability ~ (slot + 1)^(power - 1).

    By exponential clocks: the slots whose clocks ring first are a weighted sample without
    replacement, in the order drawn (Efraimidis and Spirakis 2006).
    """
    weights = np.arange(1, slots + 1, dtype=np.float64) ** (power - 1)
    clocks = -np.log(random_uniform(key, slots)) / weights
    return np.argsort(clocks, kind="stable")[:count]


class MqarRows:
    """The fixed training set, read in a new seeded order every epoch, and the fixed held-out one.

    `row` and `held_out` as `memtrain.data.tasks.generated.GeneratedRows` has them.
    """

    def __init__(self, task: MqarTask, seq_len: int, *, set_key: int, order_key: int) -> None:
        check_mqar(task, seq_len)
        self._task = task
        self._seq_len = seq_len
        self._train_key = derive(set_key, "mqar", "train")
        self._held_out_key = derive(set_key, "mqar", "validation")
        self._order_key = order_key
        self.rows_per_epoch = task.num_train
        self.num_held_out = task.num_validation

    def row(self, index: int) -> Batch:
        epoch, index = divmod(index, self.rows_per_epoch)
        place = Permutation(self.rows_per_epoch, derive(self._order_key, "rows", epoch))(index)
        return _row(self._task, place, self._seq_len, self._train_key).batch

    def held_out(self, index: int) -> Asked:
        return _row(self._task, index, self._seq_len, self._held_out_key)
