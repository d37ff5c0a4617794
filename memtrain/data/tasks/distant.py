"""Recall at a distance: a passage to be copied, or pairs to be looked up, after that much noise.

How far back the answer lies is drawn between two bounds, alike for all distances, so that what a
memory reaches can be read off (MQAR's power law asks mostly for what is near). Noise is made of
tokens of its own, never of those that matter. `copy`: a mark, a passage, noise, the mark again, and
the passage once more, to be said token by token (Graves et al. 2014, arXiv 1410.5401; at a distance
as in Arjovsky et al. 2016, arXiv 1511.06464). `associative`: pairs of key and value, then noise in
which each key comes once more and asks for its value (Ba et al. 2016, arXiv 1610.06258).
"""

from abc import ABC, abstractmethod

import numpy as np

from memtrain.data.batch import Batch
from memtrain.data.config import AssociativeTask, CopyTask
from memtrain.data.seeded import (
    Permutation,
    derive,
    distinct_integers,
    random_integers,
    random_order,
)
from memtrain.data.tasks.generated import Asked, asked_row
from memtrain.errors import BadInput


MARK = 0
"""Begins the passage of `copy`, told and asked. Noise has the ids after it, the rest matter."""


def _check_common(name: str, task: CopyTask | AssociativeTask, least: int) -> None:
    if not least <= task.min_distance <= task.max_distance:
        raise BadInput(
            f"data.{name}.min_distance={task.min_distance}, max_distance={task.max_distance}: it"
            f" takes {least} or more, and the second no less than the first"
        )
    if task.noise_tokens < 1:
        raise BadInput(f"data.{name}.noise_tokens={task.noise_tokens}: it takes 1 or more")
    if task.num_train < 1 or task.num_validation < 1:
        raise BadInput(f"data.{name}.num_train and num_validation take 1 or more")


def _check_room(name: str, what: str, need: int, seq_len: int) -> None:
    if seq_len < need:
        raise BadInput(f"train.seq_len={seq_len}: data.{name} with {what} takes {need} or more")


def check_copy(task: CopyTask, seq_len: int) -> None:
    """Refuse passages, distances and vocabularies that cannot be.

    Raises:
        BadInput: naming the setting, with what would be right.
    """
    if task.copy_len < 1:
        raise BadInput(f"data.copy.copy_len={task.copy_len}: it takes 1 or more")
    _check_common("copy", task, task.copy_len + 1)
    if (least := task.noise_tokens + 3) > task.vocab_size:
        raise BadInput(
            f"data.copy.vocab_size={task.vocab_size}: a mark, noise_tokens={task.noise_tokens} and"
            f" two tokens to copy take {least} or more"
        )
    what = f"copy_len={task.copy_len} and max_distance={task.max_distance}"
    _check_room("copy", what, task.copy_len + task.max_distance, seq_len)


def check_associative(task: AssociativeTask, seq_len: int) -> None:
    """Refuse pairs, distances and vocabularies that cannot be.

    Raises:
        BadInput: naming the setting, with what would be right.
    """
    if task.num_pairs < 1:
        raise BadInput(f"data.associative.num_pairs={task.num_pairs}: it takes 1 or more")
    _check_common("associative", task, 2 * task.num_pairs)
    if task.max_distance - task.min_distance + 1 < task.num_pairs:
        raise BadInput(
            f"data.associative.max_distance={task.max_distance}: num_pairs={task.num_pairs} ask at"
            f" places of their own; {task.min_distance + task.num_pairs - 1} or more gives them one"
        )
    if (least := 1 + task.noise_tokens + 2 * task.num_pairs) > task.vocab_size:
        raise BadInput(
            f"data.associative.vocab_size={task.vocab_size}: num_pairs={task.num_pairs} and"
            f" noise_tokens={task.noise_tokens} take {least} or more"
        )
    what = f"num_pairs={task.num_pairs} and max_distance={task.max_distance}"
    _check_room("associative", what, 2 * task.num_pairs - 1 + task.max_distance, seq_len)


class _Rows(ABC):
    """A fixed training set in a new order every epoch, and a fixed held-out one."""

    name: str

    def __init__(
        self, task: CopyTask | AssociativeTask, seq_len: int, *, set_key: int, order_key: int
    ) -> None:
        self._seq_len = seq_len
        self._set_key, self._order_key = set_key, order_key
        self.rows_per_epoch = task.num_train
        self.num_held_out = task.num_validation

    def row(self, index: int) -> Batch:
        epoch, index = divmod(index, self.rows_per_epoch)
        place = Permutation(self.rows_per_epoch, derive(self._order_key, "rows", epoch))(index)
        return self._made(derive(self._set_key, "train", place)).batch

    def held_out(self, index: int) -> Asked:
        return self._made(derive(self._set_key, "validation", index))

    @abstractmethod
    def _made(self, key: int) -> Asked:
        """The row that a key draws."""


class CopyRows(_Rows):
    """Rows of `copy`, see `memtrain.data.tasks.generated.GeneratedRows`."""

    def __init__(self, task: CopyTask, seq_len: int, **keys: int) -> None:
        check_copy(task, seq_len)
        super().__init__(task, seq_len, **keys)
        self._task = task

    def _made(self, key: int) -> Asked:
        task, length = self._task, self._task.copy_len
        draw = lambda name, count, high: random_integers(derive(key, name), count, high)  # noqa: E731
        distance = task.min_distance + int(
            draw("distance", 1, task.max_distance - task.min_distance + 1)[0]
        )
        # The mark's column, so that the last answer is asked for by the row's last token at most.
        mark = int(draw("begin", 1, self._seq_len - length - distance + 1)[0])
        passage = draw("passage", length, task.vocab_size - 1 - task.noise_tokens)
        passage = 1 + task.noise_tokens + passage
        tokens = np.append(1 + draw("noise", self._seq_len, task.noise_tokens), 0)
        for begin in (mark, mark + distance):
            tokens[begin] = MARK
            told = tokens[begin + 1 : begin + 1 + length]
            told[:] = passage[: len(told)]
        columns = mark + distance + np.arange(length)
        return asked_row(tokens[:-1], passage, np.full(length, distance), columns)


class AssociativeRows(_Rows):
    """Rows of `associative`, see `memtrain.data.tasks.generated.GeneratedRows`."""

    def __init__(self, task: AssociativeTask, seq_len: int, **keys: int) -> None:
        check_associative(task, seq_len)
        super().__init__(task, seq_len, **keys)
        self._task = task

    def _made(self, key: int) -> Asked:
        task, count = self._task, self._task.num_pairs
        first = 1 + task.noise_tokens
        num_keys = (task.vocab_size - first) // 2
        keys = first + distinct_integers(derive(key, "keys"), count, num_keys)
        num_values = task.vocab_size - first - num_keys
        values = first + num_keys + random_integers(derive(key, "values"), count, num_values)
        told = 2 * np.arange(count)
        asked = np.zeros(count, np.int64)
        free = np.ones(self._seq_len, np.bool_)
        # Each pair in turn takes one of the places still free, in an order of chance.
        for pair in random_order(derive(key, "order"), count).tolist():
            near, far = told[pair] + task.min_distance, told[pair] + task.max_distance
            places = near + np.flatnonzero(free[near : far + 1])
            asked[pair] = places[random_integers(derive(key, "place", pair), 1, len(places))[0]]
            free[asked[pair]] = False
        tokens = 1 + random_integers(derive(key, "noise"), self._seq_len, task.noise_tokens)
        tokens[told], tokens[told + 1], tokens[asked] = keys, values, keys
        return asked_row(tokens, values, asked - told, asked)
