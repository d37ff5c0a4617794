r"""Recall in text: facts told somewhere in real text and asked for again later.

A fact is a line of its own, `@kq=XWB` and a line feed: two lower-case letters name it, three
capitals, drawn apart from the name, are what to remember. It is asked for by the same line again,
and only the capitals of the second telling are in the loss as answers, so that whoever has not kept
the first one can only guess: 14.1 bits an answer. Telling and asking look alike on purpose. A model
needs one skill for this: to find what followed `@kq=` before and say it again (induction: Olsson et
al. 2022). That is slow to learn: models of two layers and width 128 had narrowed the answers to
letters told in the row, but did not tell the names apart, after 1.6M tokens. `num_queries` above
`num_facts` asks for each fact several times, which gives more to learn from in each row.

The text around them is the corpus's own and counts as text unless `count_text` is off. What cannot
be known (the facts' lines when told, the names when asked) has loss weight 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memtrain.data.batch import Batch, stack_rows
from memtrain.data.config import RecallTask
from memtrain.data.corpus import Documents
from memtrain.data.rows import Stream, one_document
from memtrain.data.seeded import (
    derive,
    distinct_integers,
    random_bits,
    random_integers,
    random_uniform,
)
from memtrain.data.tokenizer import Tokenizer
from memtrain.errors import BadInput


MARK = "@"
"""Begins every line that tells or asks."""

_NAMES = "abcdefghijklmnopqrstuvwxyz"
_VALUES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_END = "\n"
_MAX_FILLER = 1 << 22
"""Tokens of text that are held in memory for `recall_examples`."""


class Fact(NamedTuple):
    """A fact as text and tokens. The parts are tokenized apart, so they are always the same."""

    text: str
    """Such as "@kq=XWB"."""
    prefix: np.ndarray
    value: np.ndarray
    end: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """The whole line, told or asked."""
        return np.concatenate([self.prefix, self.value, self.end])

    def weights(self, answer_weight: float) -> np.ndarray:
        """Loss weight of each of `tokens` as a target, `answer_weight` on the value alone."""
        parts = [(self.prefix, 0.0), (self.value, answer_weight), (self.end, 0.0)]
        return np.concatenate([np.full(len(part), weight, np.float32) for part, weight in parts])


def line_bytes(task: RecallTask) -> int:
    """Length of a line that tells or asks."""
    return 1 + task.name_len + 1 + task.value_len + len(_END)


def check_recall(task: RecallTask, tokenizer: Tokenizer, seq_len: int) -> None:
    """Refuse settings under which nothing could be told, asked or learned.

    Raises:
        BadInput: naming the setting, with what would be right.
    """
    if not 0 <= task.share < 1:
        raise BadInput(f"data.recall.share={task.share}: it takes 0 up to, but not, 1")
    if task.num_facts < 1 or task.num_queries < 1:
        raise BadInput(
            f"data.recall.num_facts={task.num_facts}, num_queries={task.num_queries}: both take 1"
            " or more"
        )
    if not (1 <= task.name_len <= 6 and 1 <= task.value_len <= 6):
        raise BadInput(
            f"data.recall.name_len={task.name_len}, value_len={task.value_len}: both take 1 to 6"
        )
    if len(_NAMES) ** task.name_len < task.num_facts:
        raise BadInput(
            f"data.recall.num_facts={task.num_facts}: there are only"
            f" {len(_NAMES) ** task.name_len} names of data.recall.name_len={task.name_len}"
        )
    if task.answer_weight <= 0:
        raise BadInput(f"data.recall.answer_weight={task.answer_weight}: it takes more than 0")
    need = (task.num_facts + task.num_queries) * line_bytes(task)
    if need > 3 * seq_len // 4:
        raise BadInput(
            f"train.seq_len={seq_len}: {task.num_facts} facts and {task.num_queries} queries of"
            f" data.recall take {need} bytes, and text should fill a quarter of the row; make it"
            f" {-(-4 * need // 3)} or ask less"
        )
    sample = MARK + _NAMES + "=" + _VALUES + _END
    if tokenizer.decode(tokenizer.encode(sample)) != sample:
        raise BadInput(
            f"data.tokenizer={tokenizer.name!r} does not give back {sample!r}, which data.recall"
            " needs; take another tokenizer or leave the task out"
        )


def make_facts(task: RecallTask, tokenizer: Tokenizer, key: int) -> list[Fact]:
    """`num_facts` facts with different names; values are independent of names and each other."""
    count = task.num_facts
    names = distinct_integers(derive(key, "names"), count, len(_NAMES) ** task.name_len)
    values = random_integers(derive(key, "values"), count, len(_VALUES) ** task.value_len)
    facts = []
    for name_number, value_number in zip(names.tolist(), values.tolist(), strict=True):
        prefix = f"{MARK}{_spell(name_number, _NAMES, task.name_len)}="
        value = _spell(value_number, _VALUES, task.value_len)
        parts = (tokenizer.encode(part) for part in (prefix, value, _END))
        facts.append(Fact(prefix + value, *parts))
    return facts


def _spell(number: int, alphabet: str, length: int) -> str:
    letters = []
    for _ in range(length):
        number, digit = divmod(number, len(alphabet))
        letters.append(alphabet[digit])
    return "".join(letters)


class RecallRows:
    """Rows of real text with facts and questions in it; sample i is a pure function of i.

    Facts are asked for in turn, `num_queries` times in all. The places of a fact are drawn from the
    begins of lines, so short distances are the most frequent and the longest nearly span the row.
    """

    def __init__(
        self, task: RecallTask, tokenizer: Tokenizer, documents: Documents, seq_len: int, key: int
    ) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._text = Stream(documents, key)
        self._seq_len = seq_len
        self._key = key

    def row(self, index: int) -> Batch:
        key = derive(self._key, "row", index)
        task = self._task
        facts = make_facts(task, self._tokenizer, key)
        times_asked = [len(range(i, task.num_queries, len(facts))) for i in range(len(facts))]
        length = self._seq_len + 1
        num_text = length - sum(
            (1 + times) * len(fact.tokens) for fact, times in zip(facts, times_asked, strict=True)
        )
        assert num_text > 0
        spare = self._text.num_tokens - num_text + 1
        begin = int(random_integers(derive(key, "text"), 1, spare)[0])
        text, offsets = self._text.read(0, begin, begin + num_text)

        slots = _line_begins(text, self._tokenizer)
        count = task.num_facts + task.num_queries
        places = slots[random_integers(derive(key, "places"), count, len(slots))]
        ties = random_bits(derive(key, "ties"), count).tolist()
        lines = []
        for fact, times in zip(facts, times_asked, strict=True):
            own, places = np.sort(places[: 1 + times]).tolist(), places[1 + times :]
            lines += [(place, turn, ties.pop(), fact) for turn, place in enumerate(own)]
        tokens, weights, at = [], [], 0
        text_weights = np.where(offsets == 0, 0.0, float(task.count_text)).astype(np.float32)
        # Where lines share a place, telling goes before asking, and the order is not that of the
        # facts: a model could learn to count lines back instead of looking for the name.
        for place, turn, _, fact in sorted(lines, key=lambda line: line[:3]):
            answer_weight = task.answer_weight if turn else 0.0
            tokens += [text[at:place], fact.tokens]
            weights += [text_weights[at:place], fact.weights(answer_weight)]
            at = place
        row = np.concatenate([*tokens, text[at:]])
        weight = np.concatenate([*weights, text_weights[at:]])
        return one_document(row, weight, self._seq_len)


def _line_begins(text: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Places in the text where a line begins; any place where it has no line ends."""
    begins = 1 + np.flatnonzero(tokenizer.ends_line[text[:-1]])
    return begins if len(begins) else np.arange(len(text))


@dataclass(frozen=True)
class RecallExamples:
    """Questions whose answers were told a known number of tokens before."""

    prompts: np.ndarray
    """[N, P] int32: text with facts in it, and at its end the begin of a line that asks for one."""
    answers: np.ndarray
    """[N, A] int32: what follows; -1 where an answer has fewer tokens (never under "bytes")."""
    distances: np.ndarray
    """[N] int32: tokens from the begin of the value where told to the begin of the answer."""
    facts: tuple[str, ...]
    """[N] what is asked for, such as "@kq=XWB"."""

    def batch(self) -> Batch:
        """Prompts with their answers as one batch, [N, P + A - 1]; only answers are in the loss."""
        seq_len = self.prompts.shape[1] + self.answers.shape[1] - 1
        rows = []
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            answer = answer[answer >= 0]
            weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(answer))])
            tokens = np.concatenate([prompt, answer])
            rows.append(one_document(tokens, weights.astype(np.float32), seq_len))
        return stack_rows(rows)


def recall_examples(
    task: RecallTask,
    tokenizer: Tokenizer,
    documents: Documents,
    *,
    distances: Sequence[int],
    examples_per_distance: int,
    prompt_len: int | None = None,
    seed: int = 0,
) -> RecallExamples:
    """Questions at given distances, to measure what a model remembers and for how long.

    Each prompt tells `num_facts` facts at random places and asks for one of them at its end. All
    prompts have one length, so that only the distance differs.

    Args:
        documents: the text around the facts; held-out text, to be fair.
        distances: see `RecallExamples.distances`.
        prompt_len: tokens of a prompt; by default enough for the longest distance and all facts.
    Raises:
        BadInput: a distance shorter than a line, a prompt too short for its distance or its facts,
            a text too short for the prompt.
    """
    room = (task.num_facts + 1) * line_bytes(task)
    length = prompt_len if prompt_len is not None else max(distances) + room
    text = Stream(documents, derive("recall text"))
    if text.num_tokens < length:
        raise BadInput(
            f"the text has {text.num_tokens} tokens and a recall prompt {length}; give more text"
            " or shorter distances"
        )
    tokens, _ = text.read(0, 0, min(text.num_tokens, max(_MAX_FILLER, 4 * length)))
    lines = _line_begins(tokens, tokenizer)
    prompts, answers, asked = [], [], []
    for distance in distances:
        for number in range(examples_per_distance):
            key = derive(seed, "recall example", distance, number)
            facts = make_facts(task, tokenizer, key)
            prompts.append(_prompt(tokens, lines, facts, distance, length, key))
            answers.append(facts[0].value)
            asked.append(facts[0].text)
    padded = np.full((len(answers), max(map(len, answers))), -1, np.int32)
    for row, answer in zip(padded, answers, strict=True):
        row[: len(answer)] = answer
    return RecallExamples(
        np.stack(prompts),
        padded,
        np.repeat(np.array(distances, np.int32), examples_per_distance),
        tuple(asked),
    )


def _prompt(
    text: np.ndarray, lines: np.ndarray, facts: list[Fact], distance: int, length: int, key: int
) -> np.ndarray:
    """A prompt of `length` that asks for facts[0], told `distance` before; the others at random."""
    fact, others = facts[0], facts[1:]
    shortest = len(fact.value) + len(fact.end) + len(fact.prefix)
    between = distance - shortest
    if between < 0:
        raise BadInput(f"a recall distance of {distance} tokens: it takes {shortest} or more")
    before = length - distance - len(fact.prefix)
    if before < 0:
        raise BadInput(
            f"a recall prompt of {length} tokens: a distance of {distance} takes"
            f" {distance + len(fact.prefix)} or more"
        )
    inside, outside = [], []
    chances = random_uniform(derive(key, "sides"), len(others))
    for other, chance in zip(others, chances, strict=True):
        size = len(other.tokens)
        fits_inside = size <= between - sum(len(o.tokens) for o in inside)
        fits_outside = size <= before - sum(len(o.tokens) for o in outside)
        if not (fits_inside or fits_outside):
            raise BadInput(f"a recall prompt of {length} tokens has no room for {len(facts)} facts")
        goes_inside = fits_inside and (chance * (before + between) < between or not fits_outside)
        (inside if goes_inside else outside).append(other)
    before -= sum(len(other.tokens) for other in outside)
    between -= sum(len(other.tokens) for other in inside)

    # The fact goes where a line begins, and so does the question: where no lines of the text are
    # just that far apart, the last one is cut short.
    fits = lines[(lines >= before) & (lines + between <= len(text))]
    fits = fits if len(fits) else np.arange(before, len(text) - between + 1)
    both = fits[np.isin(fits + between, lines)] if between else fits
    choices = both if len(both) else fits
    at = int(choices[random_integers(derive(key, "at"), 1, len(choices))[0]])
    gap = text[at : at + between]
    if not len(both):
        gap = np.concatenate([gap[: between - len(fact.end)], fact.end[:between]])
    return np.concatenate(
        [
            _with_facts(text[at - before : at], outside, lines - (at - before), derive(key, 0)),
            fact.tokens,
            _with_facts(gap, inside, lines - at, derive(key, 1)),
            fact.prefix,
        ]
    ).astype(np.int32)


def _with_facts(text: np.ndarray, facts: list[Fact], lines: np.ndarray, key: int) -> np.ndarray:
    """The text with the facts put in at random begins of lines (`lines` counts from its begin)."""
    slots = lines[(lines >= 0) & (lines <= len(text))]
    slots = slots if len(slots) else np.array([0])
    places = np.sort(slots[random_integers(key, len(facts), len(slots))]) if facts else []
    parts, at = [], 0
    for place, fact in zip(places, facts, strict=True):
        parts += [text[at:place], fact.tokens]
        at = place
    return np.concatenate([*parts, text[at:]])
