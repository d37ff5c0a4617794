"""Targets, meshes, layouts: what is understood, and what is refused in one line."""

import dataclasses

import pytest

from memtrain.config import Experiment
from memtrain.description import Dtypes
from memtrain.errors import BadInput
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory
from memtrain.memory.attention import AttentionConfig
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.tokens import TokenSharding
from memtrain.plan.compile import _as_on_target
from memtrain.plan.layout import hops_of, tokens_of
from memtrain.plan.target import check_mesh, parse_target
from memtrain.train.config import TrainConfig


def experiment(*pattern, seq_len: int = 1024, batch_size: int = 1, **mesh) -> Experiment:
    pattern = pattern or (Attention(num_heads=8, num_kv_heads=4),)
    return Experiment(
        name="x",
        model=ModelConfig(dim=64, pattern=pattern),
        train=TrainConfig(batch_size=batch_size, seq_len=seq_len),
        mesh=MeshConfig(**mesh),
    )


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [
        ("v5e:4x4", "v5e", 16),
        ("v5p:4x4x4", "v5p", 64),
        ("v6e:16x16", "v6e", 256),
        ("h200x8", "h200", 8),
        ("h100x16", "h100", 16),
        ("cpux8", "cpu", 8),
    ],
)
def test_targets_are_read(text: str, kind: str, count: int):
    target = parse_target(text)
    assert (target.device.kind, target.num_devices) == (kind, count)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v7:4x4", "--target 'v7:4x4' is not known: there are v5e:AxB, v5p:AxBxC, v6e:AxB, h100xN"),
        ("h200", "is not known"),
        ("v5p:4x4", "a TPU v5p slice has 3 axes, as in v5p:4x4x4"),
        ("v5e:4x4x4", "a TPU v5e slice has 2 axes, as in v5e:4x4"),
        ("cpux0", "every number is at least 1"),
    ],
)
def test_unknown_targets_are_refused(text: str, said: str):
    with pytest.raises(BadInput) as error:
        parse_target(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mesh_of_another_size_names_both_and_what_would_fit():
    with pytest.raises(BadInput) as error:
        check_mesh(MeshConfig(fsdp=2, context=4), parse_target("v5p:4x4x4"))
    assert "takes 8 devices and --target v5p:4x4x4 has 64; mesh.fsdp=16 makes it" in str(
        error.value
    )
    with pytest.raises(BadInput, match=r"takes 3 devices and --target cpux8 has 8$"):
        check_mesh(MeshConfig(tensor=3), parse_target("cpux8"))
    # One row cannot be split over fsdp: it is laid over more devices.
    with pytest.raises(BadInput, match=r"; mesh\.context=128 makes it"):
        check_mesh(MeshConfig(context=64), parse_target("v5p:4x4x8"), rows=1)
    with pytest.raises(BadInput, match=r"; mesh\.fsdp=2 makes it"):
        check_mesh(MeshConfig(context=64), parse_target("v5p:4x4x8"), rows=6)


@pytest.mark.parametrize(
    ("layout", "seq_len", "near"),
    [
        ("contiguous", 1001, "contiguous layout takes multiples of 4; nearest 1000 or 1004"),
        ("striped", 1002, "striped layout takes multiples of 4; nearest 1000 or 1004"),
        ("zigzag", 1004, "zigzag layout takes multiples of 8; nearest 1000 or 1008"),
        ("auto", 1004, "zigzag layout takes multiples of 8"),
        ("zigzag", 5, "nearest 8"),
    ],
)
def test_a_sequence_that_cannot_be_split_is_told_the_nearest(layout: str, seq_len: int, near: str):
    with pytest.raises(BadInput) as error:
        tokens_of(experiment(seq_len=seq_len, context=4, context_layout=layout))
    assert str(error.value).startswith(
        f"train.seq_len={seq_len} cannot be split over mesh.context=4"
    )
    assert near in str(error.value)


def test_heads_that_ulysses_cannot_divide():
    with pytest.raises(BadInput, match=r"cannot divide 8 query and 4 key heads.*usp"):
        tokens_of(experiment(context=8, context_strategy="ulysses"))
    tokens_of(experiment(context=4, context_strategy="ulysses"))
    tokens_of(experiment(context=16, context_strategy="usp"))


@pytest.mark.parametrize(
    ("window", "layout", "hops", "chunks"),
    [
        (None, "zigzag", 7, 7.0),
        (None, "contiguous", 7, 7.0),
        (129, "contiguous", 1, 1.0),  # chunks of 128: the one before, and no more
        (130, "contiguous", 2, 2.0),
        (1, "contiguous", 0, 0.0),
        (5000, "contiguous", 7, 7.0),
        (129, "striped", 7, 7.0),
        # Half-chunks of 64: each needs the one before it, which for early stretches is on the
        # device before, for late ones on the device after. One stretch travels each way.
        (65, "zigzag", 2, 1.0),
    ],
)
def test_hops_of_a_window(window: int | None, layout: str, hops: int, chunks: float):
    """1,024 tokens on 8 devices: the first query of a chunk sees window - 1 tokens before it."""
    layer = Attention(num_heads=8, window=window)
    assert hops_of(layer, experiment(layer, context=8, context_layout=layout)) == (hops, chunks)


def test_hops_of_a_window_on_many_devices_are_those_on_few():
    layer = Attention(num_heads=8, window=1000)
    few = experiment(layer, seq_len=16 * 512, context=16, context_layout="contiguous")
    many = experiment(layer, seq_len=512 * 512, context=512, context_layout="contiguous")
    assert hops_of(layer, few) == hops_of(layer, many) == (2, 2.0)


def test_blocks_without_attention_need_no_hops():
    tokens_of(experiment(Block(ffn=ProductKeyMemory(num_slots=16, top_k=2)), context=8))


V5E = "TPU v5 lite"


@pytest.mark.parametrize(
    ("layer", "mesh", "kind", "strategy"),
    [
        (Attention(num_heads=8), MeshConfig(context=32), V5E, "usp"),
        (Attention(num_heads=8), MeshConfig(fsdp=4, context=8), V5E, "usp"),
        (Attention(num_heads=8), MeshConfig(context=16), V5E, "ring"),
        (Attention(num_heads=8), MeshConfig(context=512), "TPU v5", "ring"),
        (Attention(num_heads=8), MeshConfig(fsdp=64), V5E, "ring"),
        # A window's few hops cost less than an exchange of all heads.
        (Attention(num_heads=8, window=100), MeshConfig(context=32), V5E, "ring"),
        # What is asked for is done.
        (Attention(num_heads=8), MeshConfig(context=32, context_strategy="ring"), V5E, "ring"),
    ],
)
def test_where_a_ring_cannot_hide_heads_are_exchanged(
    layer: AttentionConfig, mesh: MeshConfig, kind: str, strategy: str
):
    found = TokenSharding.of(mesh, [layer], 64 * mesh.context, kind)
    assert found.strategy == strategy
    assert ("mesh.context_strategy=usp" in found.why) == (strategy == "usp")


@pytest.mark.parametrize(
    ("target", "compute", "backend"),
    [("h200x1", "float32", "xla"), ("h200x1", "bfloat16", "hopper"), ("v5e:2x2", "float32", "tpu")],
)
def test_attention_is_planned_with_what_serves_its_dtype(target, compute, backend):
    shape = experiment()
    model = dataclasses.replace(shape.model, dtypes=Dtypes(compute=compute))
    placed = _as_on_target(dataclasses.replace(shape, model=model), parse_target(target))
    (block,) = placed.model.pattern
    assert isinstance(block, Block) and block.mixer is not None
    assert block.mixer.backend == backend  # type: ignore[attr-defined]
