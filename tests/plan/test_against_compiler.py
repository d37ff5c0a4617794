"""The estimate against the compiler's own figures."""

import pytest
from plan_shapes import (
    DELTA,
    DENSE,
    EXPERTS,
    LARGE_TABLE,
    MAMBA1,
    MEMORY,
    NEAR,
    TABLE,
    VOCAB,
    WIDE,
    compiled,
    experiment,
    in_segments,
)

from memtrain.layers import Attention, SwiGLU
from memtrain.model.config import Block
from memtrain.model.flops import Flops
from memtrain.parallel.config import MeshConfig
from memtrain.plan.layers import kinds_of_layers
from memtrain.plan.memory import estimate_memory


SHAPES = {
    "dense": lambda: experiment(DENSE),
    "dense, recomputed": lambda: experiment(DENSE, remat="full"),
    "dense, scanned": lambda: experiment(DENSE, repeats=6, scan_unroll=1),
    "dense, wide": lambda: experiment(WIDE, rows=4, seq_len=256, dim=1024, repeats=3),
    "window, attention and a table": lambda: experiment(*MEMORY),
    "dense, 8 replicas": lambda: experiment(DENSE, rows=16, mesh=MeshConfig(data=8)),
    "wide, sharded over 8": lambda: experiment(
        WIDE, rows=16, seq_len=256, dim=1024, repeats=3, mesh=MeshConfig(fsdp=8)
    ),
    "a large table, by rows": lambda: experiment(*LARGE_TABLE),
    # 458,752 rows are read, and updated in blocks of 131,072.
    "a large table, by rows, in blocks": lambda: experiment(
        *LARGE_TABLE, rows=56, dim=64, repeats=1, remat="full"
    ),
    "a large table, by rows, 4 replicas": lambda: experiment(
        *LARGE_TABLE, rows=8, mesh=MeshConfig(data=4)
    ),
    # With a window: nothing else reads positions, and what is not read is no argument.
    "a delta rule, in segments": lambda: in_segments(
        experiment(DELTA, NEAR, rows=4, seq_len=2048, repeats=1), 8
    ),
    "a selective scan": lambda: experiment(MAMBA1, NEAR, repeats=1),
    "experts": lambda: experiment(EXPERTS),
    "experts, on two axes": lambda: experiment(EXPERTS, rows=16, mesh=MeshConfig(fsdp=2, tensor=4)),
    "wide, on three axes": lambda: experiment(
        WIDE, rows=4, dim=512, mesh=MeshConfig(fsdp=2, context=2, tensor=2)
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_within_15_percent(name: str):
    """Arguments, temporaries and new outputs of one device, on 1 and 8 devices."""
    shape = SHAPES[name]()
    estimate = estimate_memory(shape, VOCAB, "cpu")
    found = compiled(shape)
    assert estimate.total == pytest.approx(found.total, rel=0.15)
    # What lives from step to step is exact, but for a few counters.
    held = ("parameters", "optimizer", "batch", "carry")
    lives = sum(estimate.peak.get(part, 0) for part in held)
    assert lives == pytest.approx(found.arguments, abs=512)


@pytest.mark.parametrize(
    "block",
    [
        Block(
            mixer=Attention(num_heads=4, head_dim=128, backend="reference"),
            ffn=SwiGLU(hidden=1024),
        ),
        Block(
            mixer=Attention(num_heads=4, num_kv_heads=2, head_dim=128, backend="reference"),
            ffn=TABLE,
        ),
    ],
    ids=["dense", "memory"],
)
def test_flops_are_within_2_percent(block: Block):
    """Where the compiler can count: no loop, no kernel, the loss in one chunk.

    Plain attention computes the whole square, of which the formula counts what is seen; the
    compiler counts pointwise arithmetic too.
    """
    seq_len = 256
    shape = experiment(block, rows=4, seq_len=seq_len, dim=512, loss_chunk_tokens=4096)
    kinds = kinds_of_layers(shape.model, VOCAB, seq_len)
    flops = sum((kind.flops for kind in kinds), Flops(0.0, 0.0, 0.0))
    square = seq_len / ((seq_len + 1) / 2)
    expected = 3 * 4 * seq_len * (flops.matmul + square * flops.attention + flops.memory)
    assert compiled(shape).flops == pytest.approx(expected, rel=0.02)
