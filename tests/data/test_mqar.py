import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.data.config import DataConfig, MqarTask
from memtrain.data.pipeline import GeneratedPipeline, build_pipeline
from memtrain.data.tasks.mqar import BASED_TEST, BASED_TRAIN, ZOOLOGY, check_mqar, mqar_rows
from memtrain.errors import BadInput


def check_row(task: MqarTask, tokens, targets, weights, distances, seq_len: int) -> None:
    """A row against the task's definition, by search alone."""
    told = {}
    half = task.vocab_size // 2
    for j in range(0, 2 * task.num_pairs, 2):
        key, value = int(tokens[j]), int(tokens[j + 1])
        assert 1 <= key < half <= value < task.vocab_size
        told[key] = (value, j)
    assert len(told) == len({value for value, _ in told.values()}) == task.num_pairs
    asked = []
    for j in range(2 * task.num_pairs, seq_len):
        if tokens[j] == 0:
            assert weights[j] == distances[j] == 0
            continue
        value, place = told[int(tokens[j])]
        assert (targets[j], weights[j], distances[j]) == (value, 1, j - place)
        assert (j - 2 * task.num_pairs) % 2 == 0
        asked.append(int(tokens[j]))
    assert sorted(asked) == sorted(told)
    assert weights.sum() == task.num_pairs


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    num_pairs=st.integers(1, 12),
    slack=st.integers(0, 20),
    vocab=st.integers(0, 60),
    power=st.sampled_from([0.01, 0.5, 1.0]),
    key=st.integers(0, 2**64 - 1),
)
def test_rows_are_the_task(num_pairs, slack, vocab, power, key):
    task = MqarTask(vocab_size=2 * num_pairs + 2 + vocab, num_pairs=num_pairs, power=power)
    seq_len = 4 * num_pairs + 2 * slack
    made = mqar_rows(task, np.arange(4), seq_len=seq_len, key=key)
    batch = made.batch
    for r in range(4):
        check_row(
            task,
            batch.tokens[r],
            batch.targets[r],
            batch.loss_weights[r],
            made.distances[r],
            seq_len,
        )
    assert batch.valid.all() and batch.positions.tolist() == [list(range(seq_len))] * 4
    assert batch.starts.tolist() == [[True] + [False] * (seq_len - 1)] * 4


@pytest.mark.parametrize(("seq_len", "num_pairs"), [(64, 4), (128, 8), (256, 16), (512, 64)])
def test_the_settings_of_the_paper(seq_len: int, num_pairs: int):
    task = MqarTask(num_pairs=num_pairs)
    made = mqar_rows(task, np.arange(20), seq_len=seq_len, key=1)
    for row in zip(*made.batch[:3], made.distances, strict=True):
        check_row(task, *row, seq_len)
    assert task == MqarTask(vocab_size=8192, num_pairs=num_pairs, power=0.01, num_train=100_000)


def test_what_neither_tells_nor_asks_may_be_any_token():
    plain, noisy = (
        mqar_rows(
            MqarTask(num_pairs=4, vocab_size=64, random_non_queries=random),
            np.arange(300),
            seq_len=64,
            key=1,
        )
        for random in (False, True)
    )
    assert np.array_equal(plain.distances, noisy.distances)
    np.testing.assert_array_equal(plain.batch.targets, noisy.batch.targets)
    matters = plain.distances > 0
    matters[:, :8] = True
    assert np.array_equal(plain.batch.tokens[matters], noisy.batch.tokens[matters])
    assert not plain.batch.tokens[~matters].any()
    counts = np.bincount(noisy.batch.tokens[~matters], minlength=64)
    mean = counts.sum() / 64
    assert len(counts) == 64 and ((counts - mean) ** 2 / mean).sum() < 64 + 5 * np.sqrt(2 * 64)


@pytest.mark.parametrize(("seq_len", "num_pairs"), [*ZOOLOGY, *BASED_TRAIN, *BASED_TEST])
def test_every_cell_of_the_grids_has_room(seq_len: int, num_pairs: int):
    check_mqar(MqarTask(num_pairs=num_pairs), seq_len)


def test_runs_begun_before_a_field_came_go_on():
    """A fingerprint tells of `random_non_queries` only where it changes what is read."""
    config = DataConfig(mqar=MqarTask())
    before = build_pipeline(config, seq_len=64, batch_size=2).fingerprint()["data.mqar"]
    fields = ["num_pairs", "num_train", "num_validation", "power", "vocab_size"]
    assert sorted(before) == fields
    noisy = DataConfig(mqar=MqarTask(random_non_queries=True))
    assert build_pipeline(noisy, seq_len=64, batch_size=2).fingerprint()["data.mqar"] != before


def test_gaps_follow_the_power_law():
    """The first key's gap has exactly the law; the second's is drawn from what is left."""
    task = MqarTask(num_pairs=2)
    seq_len, count = 24, 8000
    made = mqar_rows(task, np.arange(count), seq_len=seq_len, key=3)
    slots = (seq_len - 4) // 2
    law = 0.01 * np.arange(1, slots + 1) ** (0.01 - 1)
    law /= law.sum()
    second = np.array(
        [sum(law[o] * law[s] / (1 - law[o]) for o in range(slots) if o != s) for s in range(slots)]
    )
    first_key, second_key = made.batch.tokens[:, 0], made.batch.tokens[:, 2]
    for key, expected in ((first_key, law), (second_key, second)):
        place = np.argmax(made.batch.tokens[:, 4:] == key[:, None], axis=1)
        counts = np.bincount(place // 2, minlength=slots)
        statistic = ((counts - count * expected) ** 2 / (count * expected)).sum()
        assert statistic < slots + 5 * np.sqrt(2 * slots)


def pipeline(seed: int = 0, data_seed: int = 0, num_train: int = 50) -> GeneratedPipeline:
    task = MqarTask(num_train=num_train, num_validation=30)
    config = DataConfig(mqar=task, seed=data_seed)
    made = build_pipeline(config, seq_len=64, batch_size=10, seed=seed)
    assert isinstance(made, GeneratedPipeline)
    return made


def test_a_fixed_training_set_in_a_new_order_every_epoch():
    batches = pipeline().batches(0)
    epochs = [[r.tobytes() for _ in range(5) for r in next(batches).tokens] for _ in range(3)]
    assert len(set(epochs[0])) == 50
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = pipeline(seed=1).batches(0)
    order = [r.tobytes() for _ in range(5) for r in next(other).tokens]
    assert set(order) == set(epochs[0]) and order != epochs[0]
    fresh = next(pipeline(data_seed=1).batches(0)).tokens
    assert not {r.tobytes() for r in fresh} & set(epochs[0])


def test_a_fixed_validation_set_apart_from_training():
    made = pipeline(num_train=2000)
    held_out = made.validation_batches(100)
    assert sum(len(b.tokens) for b in held_out) == 30
    rows = {r.tobytes() for b in held_out for r in b.tokens}
    batches = made.batches(0)
    assert len(rows) == 30 and not rows & {
        r.tobytes() for _ in range(200) for r in next(batches).tokens
    }
    again = pipeline(seed=5).validation_batches(100)
    assert [b.tokens.tobytes() for b in again] == [b.tokens.tobytes() for b in held_out]
    with_distances = made.questions(10, 1000)
    assert len(with_distances.distances) == 20
    assert np.array_equal(with_distances.batch.tokens[:10], held_out[1].tokens)


BAD = {
    "takes an even number of at least 16 tokens": ({}, 14),
    "takes an even number of": ({}, 65),
    "data.mqar.num_pairs=0": ({"num_pairs": 0}, 64),
    "data.mqar.vocab_size=9": ({"vocab_size": 9}, 64),
    "data.mqar.power=0": ({"power": 0}, 64),
    "num_train and num_validation": ({"num_train": 0}, 64),
}


@pytest.mark.parametrize("message", BAD)
def test_settings_without_room_are_refused(message: str):
    fields, seq_len = BAD[message]
    with pytest.raises(BadInput) as raised:
        build_pipeline(DataConfig(mqar=MqarTask(**fields)), seq_len=seq_len, batch_size=2)
    assert message in str(raised.value) and "\n" not in str(raised.value)
