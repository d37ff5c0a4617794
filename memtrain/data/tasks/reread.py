"""Reading again: a passage of text that comes a second time later in the row.

What a passage costs when it comes again is what was not remembered of it. Every token of the second
reading can be copied from the first, so a row teaches the one skill of recall, to find where this
stood before and what followed, from hundreds of tokens instead of a few answers. It is the training
form of what `memtrain evaluate` and the report measure by reading held-out text twice.
"""

from __future__ import annotations

import numpy as np

from memtrain.data.batch import Batch
from memtrain.data.config import RereadTask
from memtrain.data.corpus import Documents
from memtrain.data.rows import Stream, one_document
from memtrain.data.seeded import derive, random_integers
from memtrain.errors import BadInput


def check_reread(task: RereadTask, seq_len: int) -> None:
    """Refuse settings under which no passage could come again.

    Raises:
        BadInput: naming the setting, with what would be right.
    """
    if not 0 < task.share < 1:
        raise BadInput(f"data.reread.share={task.share}: it takes more than 0 and less than 1")
    longest = (seq_len + 1) // 2
    if not 1 <= task.min_len <= longest:
        raise BadInput(
            f"data.reread.min_len={task.min_len}: it takes 1 to {longest}, half of a row of"
            f" train.seq_len={seq_len}"
        )


class RereadRows:
    """Rows of text in which a passage comes twice; sample i is a pure function of i.

    The row is one piece of the stream with a copy of some passage put in at a later place, both
    drawn at random; a passage has `min_len` to half a row of tokens. The first token of the copy
    and the first after it cannot be known and have loss weight 0, like the begins of documents. A
    row is one document to the model: its memory must reach across.
    """

    def __init__(self, task: RereadTask, documents: Documents, seq_len: int, key: int) -> None:
        self._task = task
        self._stream = Stream(documents, key)
        self._seq_len = seq_len
        self._key = key

    def row(self, index: int) -> Batch:
        key = derive(self._key, "row", index)
        shortest, longest = self._task.min_len, (self._seq_len + 1) // 2
        draw = lambda name, high: int(random_integers(derive(key, name), 1, high)[0])  # noqa: E731
        length = shortest + draw("length", longest - shortest + 1)
        num_text = self._seq_len + 1 - length
        begin = draw("text", self._stream.num_tokens - num_text + 1)
        text, offsets = self._stream.read(0, begin, begin + num_text)
        first = draw("first", num_text - length + 1)
        again = first + length + draw("again", num_text - first - length + 1)
        weights = (offsets != 0).astype(np.float32)

        tokens = np.insert(text, again, text[first : first + length])
        weights = np.insert(weights, again, weights[first : first + length])
        weights[again] = 0.0
        weights[again + length : again + length + 1] = 0.0
        return one_document(tokens, weights, self._seq_len)
