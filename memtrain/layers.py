"""The vocabulary of recipes: what can stand in a model's pattern.

    pattern = (Window(128), Block(mixer=Attention(), ffn=ProductKeyMemory()))

In a recipe a layer's name means its description; `build` makes the module.
"""

from memtrain.memory.attention import AttentionConfig as Attention
from memtrain.memory.bank import BankMemoryConfig as BankMemory
from memtrain.memory.gated_delta import GatedDeltaConfig as GatedDelta
from memtrain.memory.linear_recurrence import LinearRecurrenceConfig as LinearRecurrence
from memtrain.memory.mamba1 import Mamba1Config as Mamba1
from memtrain.memory.mamba2 import Mamba2Config as Mamba2
from memtrain.memory.ngram import NGramMemoryConfig as NGramMemory
from memtrain.memory.product_key import ProductKeyMemoryConfig as ProductKeyMemory
from memtrain.memory.short_conv import ShortConvConfig as ShortConv
from memtrain.model.config import Block as Block
from memtrain.model.config import ModelConfig as ModelConfig
from memtrain.model.feed_forward import SwiGLUConfig as SwiGLU
from memtrain.model.moe import MoEConfig as MoE
from memtrain.schema import register


def Window(window: int, **more) -> Attention:
    """Sliding-window attention: a token sees `window` positions, its own included."""
    return Attention(window=window, **more)


def GatedDeltaNet(**more) -> GatedDelta:
    """Gated DeltaNet (arXiv 2412.06464): one decay a head, which erases as much as it writes."""
    return GatedDelta(**more)


def KimiDelta(**more) -> GatedDelta:
    """Kimi Delta Attention (arXiv 2510.26692): Gated DeltaNet with a decay for every channel."""
    return GatedDelta(decay="channel", gate="sigmoid", **more)


def DeltaNet(**more) -> GatedDelta:
    """DeltaNet (arXiv 2406.06484): nothing decays, and the output has no gate."""
    return GatedDelta(decay=None, gate=None, **more)


def GatedDeltaNet2(**more) -> GatedDelta:
    """Gated DeltaNet 2 (arXiv 2605.22791): decay, erasing and writing by channel."""
    return GatedDelta(decay="channel", erase="channel", write="channel", **more)


def GatedLinearAttention(**more) -> GatedDelta:
    """Gated linear attention (arXiv 2312.06635): a decay for every channel, and nothing erased."""
    return GatedDelta(decay="channel", erase=None, write=None, conv=None, **more)


register(Attention, "Attention")
register(BankMemory, "BankMemory")
register(GatedDelta, "GatedDelta")
register(LinearRecurrence, "LinearRecurrence")
register(Mamba1, "Mamba1")
register(Mamba2, "Mamba2")
register(MoE, "MoE")
register(NGramMemory, "NGramMemory")
register(ProductKeyMemory, "ProductKeyMemory")
register(ShortConv, "ShortConv")
register(SwiGLU, "SwiGLU")
register(Block, "Block")
