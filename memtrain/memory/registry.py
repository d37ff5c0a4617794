"""Every memory by name, as a small instance that the laws are run on.

`tests/laws` runs `memtrain.testing.check_laws` over this. A new mechanism is done when it is here
and the laws hold.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from memtrain.description import BuildContext, Dtypes, LayerDescription
from memtrain.memory.attention import AttentionConfig
from memtrain.memory.bank import BankMemoryConfig
from memtrain.memory.gated_delta import GatedDeltaConfig
from memtrain.memory.linear_recurrence import LinearRecurrenceConfig
from memtrain.memory.mamba1 import Mamba1, Mamba1Config
from memtrain.memory.mamba2 import Mamba2Config
from memtrain.memory.ngram import NGramMemory, NGramMemoryConfig
from memtrain.memory.product_key import ProductKeyMemoryConfig
from memtrain.memory.protocol import Memory
from memtrain.memory.short_conv import ShortConvConfig


MakeMemory = Callable[[Dtypes, nnx.Rngs], Memory]
REGISTRY: dict[str, MakeMemory] = {}


def register(
    name: str,
    description: LayerDescription,
    *,
    dim: int = 16,
    prepare: Callable[[Memory], None] | None = None,
) -> None:
    """Enters a small instance of a memory under a name.

    prepare: changes what is built, where a memory begins with parts that do nothing yet.
    """
    if name in REGISTRY:
        raise ValueError(f"a memory named {name!r} is registered already")

    def make(dtypes: Dtypes, rngs: nnx.Rngs) -> Memory:
        memory = description.build(BuildContext(dim=dim, dtypes=dtypes), rngs=rngs)
        if prepare is not None:
            prepare(memory)
        return memory

    REGISTRY[name] = make


register("attention", AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8))
register(
    "window",
    AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=5, sink_tokens=2, soft_cap=8.0),
)
register(
    "attention_key_conv",
    AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=None,
        qk_norm=False,
        key_conv=3,
        induction_init=True,
    ),
)
register(
    "bank",
    BankMemoryConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=3, bank_size=7, top_k=3),
)
register(
    "bank_softmax",
    BankMemoryConfig(
        num_heads=2,
        head_dim=8,
        window=2,
        bank_size=8,
        top_k=4,
        join="softmax",
        gradient_tokens=4,
        sink_tokens=1,
    ),
)
register(
    "product_key",
    ProductKeyMemoryConfig(num_slots=64, num_heads=2, top_k=3, key_dim=8, value_dim=12),
)
register("short_conv", ShortConvConfig(size=4))
register("gated_delta", GatedDeltaConfig(num_heads=2, num_key_heads=1, head_dim=8, value_dim=12))
register(
    "gated_delta_channel",
    GatedDeltaConfig(
        num_heads=2, head_dim=8, decay="channel", erase="channel", write="channel", negative=True
    ),
)


def _loud(memory: Memory) -> None:
    """What it carries is a small part of its output to begin with: the skip is the rest."""
    assert isinstance(memory, Mamba1)
    memory.output.weight.set_value(3 * memory.output.weight[...])


register("mamba1", Mamba1Config(state_dim=4, step_rank=3, inner_norm=True), prepare=_loud)
register("mamba2", Mamba2Config(head_dim=16, state_dim=8))
register("linear_recurrence", LinearRecurrenceConfig(state_dim=12, min_decay=0.2, max_decay=0.95))


def _draw_taps(memory: Memory) -> None:
    """The convolution begins as zero: its norm and its tail would be felt by nobody."""
    assert isinstance(memory, NGramMemory)
    taps = memory.conv.taps
    taps.set_value(jax.random.normal(jax.random.key(0), taps.shape).astype(taps.dtype))


register(
    "ngram",
    NGramMemoryConfig(num_slots=13, num_heads=2, head_dim=6, conv=3, vocab_size=97),
    prepare=_draw_taps,
)
