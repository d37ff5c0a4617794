"""The vocabulary of recipes: what can stand in a model's pattern.

    pattern = (Window(128), Block(mixer=Attention(), ffn=ProductKeyMemory()))

In a recipe a layer's name means its description; `build` makes the module.
"""

from memtrain.memory.attention import AttentionConfig as Attention
from memtrain.memory.bank import BankMemoryConfig as BankMemory
from memtrain.memory.linear_recurrence import LinearRecurrenceConfig as LinearRecurrence
from memtrain.memory.ngram import NGramMemoryConfig as NGramMemory
from memtrain.memory.product_key import ProductKeyMemoryConfig as ProductKeyMemory
from memtrain.memory.short_conv import ShortConvConfig as ShortConv
from memtrain.model.config import Block as Block
from memtrain.model.config import ModelConfig as ModelConfig
from memtrain.model.feed_forward import SwiGLUConfig as SwiGLU
from memtrain.schema import register


def Window(window: int, **more) -> Attention:
    """Sliding-window attention: a token sees `window` positions, its own included."""
    return Attention(window=window, **more)


register(Attention, "Attention")
register(BankMemory, "BankMemory")
register(LinearRecurrence, "LinearRecurrence")
register(NGramMemory, "NGramMemory")
register(ProductKeyMemory, "ProductKeyMemory")
register(ShortConv, "ShortConv")
register(SwiGLU, "SwiGLU")
register(Block, "Block")
