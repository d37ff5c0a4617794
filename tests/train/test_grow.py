"""A memory put into a trained model: it begins as that model, and only the new layer learns."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from memtrain.config import Experiment, override
from memtrain.data.config import DataConfig
from memtrain.errors import BadInput
from memtrain.layers import Attention, BankMemory, Block, ProductKeyMemory
from memtrain.model.parameters import match_names, parameters_of
from memtrain.train.config import TrainConfig
from memtrain.train.load import load_model
from memtrain.train.run import train
from tests.helpers import tiny


BANK = BankMemory(num_heads=2, window=4, bank_size=8, top_k=2)
OTHER = ProductKeyMemory(num_slots=64, num_heads=1, top_k=2, key_dim=8, value_dim=8, table="more")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"{name} good dog and a bad cat\n" * 40)
    return folder


def base(text: Path) -> Experiment:
    config = tiny.experiment(num_steps=2, seq_len=24, batch_size=2, evaluate_batches=2)
    data = DataConfig(path=(str(text),), validation_fraction=0.4)
    return dataclasses.replace(config, data=data)


@pytest.fixture(scope="module")
def source(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grow") / "source"
    train(base(text), folder, progress=lambda line: None)
    return folder


def grown(text: Path, source: Path) -> Experiment:
    """A block with a bank and a table of its own between the two of the source."""
    config = base(text)
    first, second = config.model.pattern
    block = Block(mixer=BANK, ffn=OTHER, residual_gate=True)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, pattern=(first, block, second)),
        train=TrainConfig(
            num_steps=3,
            seq_len=24,
            batch_size=2,
            evaluate_every_steps=1,
            evaluate_batches=2,
            init_from=str(source),
            init_rename=("blocks.2.=blocks.1.",),
            freeze=("*", "!blocks.1.*", "!tables.more"),
        ),
    )


@pytest.mark.full
def test_a_grown_model_begins_as_its_source_and_only_the_new_block_learns(text, source, tmp_path):
    said: list[str] = []
    still = ["optimizer.learning_rate=0", "optimizer.table_learning_rate=0", "train.num_steps=1"]
    found = train(override(grown(text, source), still), tmp_path / "still", progress=said.append)
    was = train(base(text), source, progress=lambda line: None)
    assert found["validation/loss"] == pytest.approx(was["validation/loss"], rel=1e-6)
    fresh = next(line for line in said if "fresh" in line)
    assert "blocks.1.mixer.gate" in fresh and "tables.more" in fresh
    assert "blocks.0" not in fresh and "blocks.2" not in fresh
    assert not [line for line in said if "unused" in line]

    train(grown(text, source), tmp_path / "run", progress=lambda line: None)
    before, after = (parameters_of(load_model(p).model) for p in (source, tmp_path / "run"))
    for name, array in after.items():
        old = name.replace("blocks.2.", "blocks.1.")
        if name.startswith("blocks.1.") or name == "tables.more":
            continue
        np.testing.assert_array_equal(array, before[old], err_msg=name)
    start = parameters_of(load_model(tmp_path / "still").model)
    learned = {name for name in after if not np.array_equal(start[name], after[name])}
    assert {"tables.more", "blocks.1.mixer.gate", "blocks.1.ffn.gate"} <= learned
    assert "blocks.1.mixer.layer.query.weight" in learned
    assert learned <= {n for n in after if n.startswith("blocks.1.") or n == "tables.more"}


def test_renaming_what_is_not_there_is_refused(text, source, tmp_path):
    for entry, message in (
        ("blocks.7.=blocks.1.", "no parameter of this model begins with 'blocks.7.'"),
        ("blocks.2.=blocks.9.", "no parameter of the source begins with 'blocks.9.'"),
    ):
        config = override(grown(text, source), [f"train.init_rename={entry}"])
        with pytest.raises(BadInput, match=message):
            train(config, tmp_path / "run", progress=print)
        assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="NEW=OLD"):
        override(grown(text, source), ["train.init_rename=blocks.2."])
    with pytest.raises(BadInput, match=r"needs train\.init_from"):
        override(base(text), ["train.init_rename=a=b"])


def test_patterns_are_read_in_order():
    names = ["a.x", "a.y", "b.x"]
    assert match_names(["*", "!a.*"], names, "k") == {"b.x"}
    assert match_names(["*", "!a.*", "a.y"], names, "k") == {"a.y", "b.x"}
    with pytest.raises(BadInput, match=r'begin with "\*"'):
        match_names(["!a.*", "*"], names, "k")
    with pytest.raises(BadInput, match="'!c'"):
        match_names(["*", "!c"], names, "k")


def test_a_gated_place_is_its_layer_times_the_tangent():
    from flax import nnx

    from memtrain.description import BuildContext, Dtypes
    from memtrain.memory.protocol import Context
    from memtrain.model.block import Block as Built

    context = BuildContext(dim=16, dtypes=Dtypes())
    layer = Attention(num_heads=2)
    plain = Built(Block(mixer=layer), context, rngs=nnx.Rngs(0))
    gated = Built(Block(mixer=layer, residual_gate=True), context, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 16))
    ctx = Context.of_documents(1, 5)
    moved = plain(x, None, ctx)[0] - x
    np.testing.assert_array_equal(gated(x, None, ctx)[0], x)
    assert gated.mixer is not None and abs(moved).max() > 0.1
    gated.mixer.gate[...] = np.float32(0.5)
    np.testing.assert_allclose(gated(x, None, ctx)[0], x + np.tanh(0.5) * moved, atol=1e-6)
