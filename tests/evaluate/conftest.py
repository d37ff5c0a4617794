"""A run of a few steps on real source files, an MQAR run, and a forward pass to compare with."""

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from memtrain.config import Experiment
from memtrain.data.config import DataConfig, FactsTask, MqarTask, RecallTask
from memtrain.data.pipeline import build_pipeline
from memtrain.evaluate.subject import Subject
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, SwiGLU
from memtrain.memory.protocol import Context
from memtrain.model.parameters import Skeleton
from memtrain.train import records
from memtrain.train.checkpoint import CheckpointStore
from memtrain.train.config import OptimizerConfig, TrainConfig
from memtrain.train.load import load_model
from memtrain.train.run import train


SEQ_LEN = 64
STEPS = 16
MODULES = ("argparse", "ast", "bisect", "calendar", "cmd", "copy", "csv", "dataclasses", "heapq")


def model_config() -> ModelConfig:
    table = ProductKeyMemory(num_slots=64, num_heads=2, top_k=3, key_dim=8, value_dim=16)
    return ModelConfig(dim=16, pattern=(Block(mixer=Attention(num_heads=2), ffn=table),))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Corpora are cached in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """The first 3,000 bytes of some modules of this Python."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in MODULES:
        source = inspect.getsource(__import__(name)).encode()[:3000]
        (folder / f"{name}.py").write_bytes(source[: source.rindex(b"\n") + 1])
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, corpus, cache) -> Path:
    """A byte model with attention and a table, trained on text with recall in it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    recall = RecallTask(share=0.25, num_facts=2, num_queries=2)
    experiment = Experiment(
        name="tiny",
        model=model_config(),
        data=DataConfig(path=(str(corpus),), validation_fraction=0.3, recall=recall),
        train=TrainConfig(
            num_steps=STEPS,
            batch_size=8,
            seq_len=SEQ_LEN,
            checkpoint_every_steps=STEPS // 2,
            evaluate_every_steps=STEPS // 2,
            evaluate_batches=1,
            log_every_steps=4,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    )
    train(experiment, folder, progress=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def mqar_run(tmp_path_factory, cache) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mqar"
    experiment = Experiment(
        name="mqar",
        model=ModelConfig(
            dim=16, pattern=(Block(mixer=Attention(num_heads=2), ffn=SwiGLU(hidden=16)),)
        ),
        data=DataConfig(mqar=MqarTask(vocab_size=64, num_pairs=2, num_train=64, num_validation=20)),
        train=TrainConfig(num_steps=2, batch_size=4, seq_len=16),
    )
    write_run(folder, experiment, vocab_size=64)
    return folder


@pytest.fixture(scope="session")
def facts_run(tmp_path_factory, cache) -> Path:
    """Rows of 7 hold two facts and a token of padding."""
    folder = tmp_path_factory.mktemp("runs") / "facts"
    task = FactsTask(num_facts=37, num_relations=2, num_values=4, name_len=2, name_tokens=8)
    experiment = Experiment(
        name="facts",
        model=ModelConfig(
            dim=16, pattern=(Block(mixer=Attention(num_heads=2), ffn=SwiGLU(hidden=16)),)
        ),
        data=DataConfig(facts=task),
        train=TrainConfig(num_steps=2, batch_size=4, seq_len=7),
    )
    write_run(folder, experiment, vocab_size=task.vocab_size)
    return folder


def write_run(folder: Path, experiment: Experiment, vocab_size: int) -> None:
    """A run as it is after its first step, had that step learned nothing."""
    parameters = Skeleton.of(experiment.model, vocab_size).init(jax.random.key(0))
    train = experiment.train
    pipeline = build_pipeline(
        experiment.data, seq_len=train.seq_len, batch_size=train.batch_size, seed=train.seed
    )
    fingerprint = pipeline.fingerprint()
    records.write_records(folder, experiment, recipe="", fingerprint=fingerprint)
    with CheckpointStore(folder / records.CHECKPOINTS) as store:
        store.save(1, {"parameters": parameters}, {"vocab_size": vocab_size}, wait=True)


@pytest.fixture(scope="session")
def subject(run) -> Subject:
    return Subject.open(run)


@functools.cache
def _forward(run: Path, without: tuple[tuple[int, str], ...], reads: bool):
    model = load_model(run).model

    def forward(tokens):
        context = Context.of_documents(*tokens.shape, want_reads=reads)
        hidden, _, aux = model(tokens, None, context, without=without)
        return aux[0]["ffn"].reads if reads else model.logits(hidden)

    return jax.jit(forward)


def direct_logits(
    run: Path, tokens: np.ndarray, without: Sequence[tuple[int, str]] = (), reads: bool = False
):
    """float64 log-probabilities [B, T, V] of the training path, whole rows and no state; or the
    reads of layer 0's table."""
    forward = _forward(run, tuple(without), reads)
    # In groups of 16 rows, so that one program serves all.
    tokens = np.asarray(tokens, np.int32)
    padded = np.pad(tokens, ((0, -len(tokens) % 16), (0, 0)))
    groups = [jax.device_get(forward(group)) for group in padded.reshape(-1, 16, tokens.shape[1])]
    found = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(tokens)], *groups)
    if reads:
        return found
    logits = found.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
