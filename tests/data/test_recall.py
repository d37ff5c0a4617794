import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memtrain.data.config import DataConfig, RecallTask
from memtrain.data.corpus import Documents
from memtrain.data.pipeline import TextPipeline, build_pipeline
from memtrain.data.tasks.recall import RecallRows, check_recall, make_facts, recall_examples
from memtrain.data.tokenizer import ByteTokenizer
from memtrain.errors import BadInput


TASK = RecallTask(share=0.5, num_facts=6, num_queries=4)
LINE = re.compile(rb"@([a-z]{2})=([A-Z]{3})\n")


@pytest.fixture
def pipeline(texts: Callable[..., str]) -> TextPipeline:
    """Three novels of numbered lines, in which no line is like another."""
    novels = {
        name: "".join(f"{name} line {i}: {'word ' * (i % 9)}end.\n" for i in range(400))
        for name in ("anna", "bleak", "candide")
    }
    config = DataConfig(path=(texts(**novels),), recall=TASK, validation_fraction=0.3)
    made = build_pipeline(config, seq_len=512, batch_size=4, seed=0)
    assert isinstance(made, TextPipeline)
    return made


def recall_rows(pipeline: TextPipeline, task: RecallTask = TASK, seq_len: int = 512) -> RecallRows:
    return RecallRows(task, ByteTokenizer(), pipeline.train_documents(), seq_len, 7)


def check_told_and_asked(row, num_facts: int, num_queries: int) -> list[int]:
    """The lines of a row: each asked fact was told before, alike; only its answer has weight 1."""
    text = bytes(row.tokens.tolist()) + bytes([row.targets[-1]])
    told: dict[bytes, tuple[bytes, int]] = {}
    distances = []
    for match in LINE.finditer(text):
        name, value = match.groups()
        weights = row.loss_weights[match.start() - 1 : match.end() - 1].tolist()
        if name in told:
            assert told[name][0] == value
            assert weights == [0, 0, 0, 0, 1, 1, 1, 0]
            distances.append(match.start() - told[name][1])
        else:
            told[name] = (value, match.start())
            assert weights[match.start() == 0 :] == [0] * (8 - (match.start() == 0))
    assert len(told) == num_facts and len(distances) == num_queries
    return distances


def test_rows_tell_and_then_ask(pipeline: TextPipeline):
    rows = recall_rows(pipeline)
    documents = pipeline.train_documents()
    stream = b"".join(
        documents.tokens[a:b].tobytes()
        for a, b in zip(documents.begins, documents.ends, strict=True)
    )
    backwards = stream[documents.ends[0] - documents.begins[0] :] + stream[: documents.ends[0]]
    distances = []
    for index in range(200):
        row = rows.row(index)
        assert row.tokens.shape == (512,) and row.valid.all()
        assert np.array_equal(row.targets[:-1], row.tokens[1:])
        assert row.positions.tolist() == list(range(512)) and np.flatnonzero(
            row.starts
        ).tolist() == [0]
        distances += check_told_and_asked(row, 6, 4)
        # Without the task's lines it is the corpus's text, and all of that has weight 1.
        text = bytes(row.tokens.tolist()) + bytes([row.targets[-1]])
        plain = LINE.sub(b"", text)
        assert plain in stream or plain in backwards
        assert len(plain) == 513 - 8 * 10
        in_line = np.zeros(513, bool)
        for match in LINE.finditer(text):
            in_line[match.start() : match.end()] = True
        counted = row.loss_weights[~in_line[1:]]
        assert (counted == 0).sum() <= 1  # where one document ends and another begins
    assert min(distances) == 8 and max(distances) > 400


def test_facts_are_asked_in_turn_when_there_are_more_questions(pipeline: TextPipeline):
    rows = recall_rows(pipeline, RecallTask(num_facts=3, num_queries=8))
    for index in range(50):
        row = rows.row(index)
        check_told_and_asked(row, 3, 8)
        text = bytes(row.tokens.tolist()) + bytes([row.targets[-1]])
        lines = Counter(match.group(1) for match in LINE.finditer(text))
        assert sorted(lines.values()) == [3, 4, 4]


def test_the_order_of_the_questions_says_nothing_of_the_answers():
    """Even where every line goes to one place, what is asked for may be told anywhere before."""
    # A window of 65 bytes has its one line end somewhere, as lines are 65 long.
    text = b"0123456789" * 6 + b"abcd\n"
    documents = Documents(np.frombuffer(text * 9, np.uint8), np.array([0]), np.array([9 * 65]))
    task = RecallTask(num_facts=4, num_queries=4)
    rows = RecallRows(task, ByteTokenizer(), documents, 128, 3)
    ranks = np.zeros((4, 4))
    for index in range(400):
        row = rows.row(index)
        text = bytes(row.tokens.tolist()) + bytes([row.targets[-1]])
        names = [match.group(1) for match in LINE.finditer(text)]
        if re.search(rb"(@[a-z]{2}=[A-Z]{3}\n){8}", text):
            for turn, name in enumerate(names[4:]):
                ranks[turn, names[:4].index(name)] += 1
    expected = ranks.sum() / 16
    assert expected > 80
    assert ((ranks - expected) ** 2 / expected).sum() < 9 + 5 * np.sqrt(18)


def test_rows_are_functions_of_their_number(pipeline: TextPipeline):
    rows, again = recall_rows(pipeline), recall_rows(pipeline)
    read = [rows.row(i).tokens.tobytes() for i in range(50)]
    assert [again.row(i).tokens.tobytes() for i in reversed(range(50))] == read[::-1]
    assert len(set(read)) == 50


def test_weights_can_be_chosen(pipeline: TextPipeline):
    task = RecallTask(num_facts=3, num_queries=2, answer_weight=5, count_text=False)
    row = recall_rows(pipeline, task).row(0)
    assert sorted(set(row.loss_weights.tolist())) == [0, 5]
    assert (row.loss_weights == 5).sum() == 2 * 3


def test_text_without_lines_takes_facts_anywhere(texts: Callable[..., str]):
    config = DataConfig(path=(texts(a="no line ends here. " * 200),))
    made = build_pipeline(config, seq_len=256, batch_size=2)
    assert isinstance(made, TextPipeline)
    row = recall_rows(made, RecallTask(num_facts=3, num_queries=3), 256).row(1)
    check_told_and_asked(row, 3, 3)


def test_values_tell_nothing_of_names():
    """Over many facts no letter of a value depends on a letter of the name, or on its place."""
    facts = [f for k in range(3000) for f in make_facts(TASK, ByteTokenizer(), k)]
    letters = np.array([[ord(c) for c in f.text if c not in "@="] for f in facts])
    letters -= letters.min(axis=0)
    for value in (2, 3, 4):
        for other in {0, 1, 2, 3, 4} - {value}:
            table = np.zeros((26, 26))
            np.add.at(table, (letters[:, other], letters[:, value]), 1)
            expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / len(facts)
            statistic = ((table - expected) ** 2 / expected).sum()
            assert statistic < 625 + 5 * np.sqrt(2 * 625)


@pytest.mark.parametrize("prompt_len", [None, 700])
def test_examples_have_their_distances(pipeline: TextPipeline, prompt_len: int | None):
    distances = [8, 9, 16, 50, 333, 600]
    examples = recall_examples(
        TASK,
        ByteTokenizer(),
        pipeline.held_out_documents(),
        distances=distances,
        examples_per_distance=10,
        prompt_len=prompt_len,
    )
    held_out = b"".join(
        tokens.astype(np.uint8).tobytes() for _, tokens in pipeline.validation_documents()
    )
    assert examples.prompts.shape == (60, prompt_len or 600 + 7 * 8)
    assert examples.answers.shape == (60, 3)
    assert examples.distances.tolist() == [d for d in distances for _ in range(10)]
    whole_lines = 0
    for prompt, answer, distance, fact in zip(
        examples.prompts, examples.answers, examples.distances, examples.facts, strict=True
    ):
        text = bytes(prompt.tolist())
        line = fact.encode()
        assert line.endswith(bytes(answer.tolist())) and text.endswith(line[:4])
        assert text.count(line) == 1 and text.count(line[:4]) == 2
        assert len(text) - (text.index(line) + 4) == distance
        lines = LINE.findall(text)
        assert len(lines) == 6 and len({name for name, _ in lines}) == 6
        # Told and asked at the begin of a line; to that end a line may have been cut short.
        assert re.search(rb"(^|\n)" + line + rb"\n", text) and text[-5:-4] == b"\n"
        before, gap = (LINE.sub(b"", part) for part in text[:-4].split(line + b"\n"))
        assert before + gap[:-1] in held_out
        whole_lines += before + gap in held_out
    assert 10 <= whole_lines < 60
    assert len(set(examples.facts)) > 50


def test_examples_as_a_batch(pipeline: TextPipeline):
    examples = recall_examples(
        TASK,
        ByteTokenizer(),
        pipeline.held_out_documents(),
        distances=[100],
        examples_per_distance=3,
    )
    batch = examples.batch()
    length = examples.prompts.shape[1]
    assert batch.tokens.shape == (3, length + 2)
    assert np.array_equal(batch.tokens[:, :length], examples.prompts)
    assert np.array_equal(batch.targets[:, length - 1 :], examples.answers)
    assert batch.loss_weights.sum(axis=0).tolist() == [0] * (length - 1) + [3] * 3


def test_examples_that_cannot_be(pipeline: TextPipeline):
    def ask(distances, prompt_len=None, task=TASK) -> str:
        with pytest.raises(BadInput) as raised:
            recall_examples(
                task,
                ByteTokenizer(),
                pipeline.held_out_documents(),
                distances=distances,
                examples_per_distance=2,
                prompt_len=prompt_len,
            )
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "a recall distance of 7 tokens: it takes 8 or more" in ask([7])
    assert "a distance of 100 takes 104 or more" in ask([100], 103)
    assert "has no room for 6 facts" in ask([30], 36)
    assert "give more text or shorter distances" in ask([10**6])


BAD: dict[str, dict[str, Any]] = {
    "data.recall.share=1": {"share": 1},
    "data.recall.num_facts=0": {"num_facts": 0},
    "num_queries=0": {"num_queries": 0},
    "name_len=0": {"name_len": 0},
    "value_len=7": {"value_len": 7},
    "there are only 26 names": {"num_facts": 27, "name_len": 1},
    "data.recall.answer_weight=0": {"answer_weight": 0},
    "make it 342 or ask less": {"num_facts": 16, "num_queries": 16},
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_cannot_be_are_refused(message: str):
    with pytest.raises(BadInput) as raised:
        check_recall(RecallTask(**BAD[message]), ByteTokenizer(), 256)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    check_recall(RecallTask(num_facts=16, num_queries=16), ByteTokenizer(), 342)


def test_a_tokenizer_that_loses_letters_is_refused(tmp_path: Path):
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
    inner.save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("word " * 100)
    config = DataConfig(
        path=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path / "t.json"), recall=TASK
    )
    with pytest.raises(BadInput, match=r"does not give back '@abcdefghij"):
        build_pipeline(config, seq_len=512, batch_size=2)
