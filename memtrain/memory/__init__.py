"""The Memory protocol and the mechanisms that speak it, one file each."""

from memtrain.memory.attention import Attention as Attention
from memtrain.memory.attention import AttentionConfig as AttentionConfig
from memtrain.memory.bank import BankMemory as BankMemory
from memtrain.memory.bank import BankMemoryConfig as BankMemoryConfig
from memtrain.memory.gated_delta import GatedDelta as GatedDelta
from memtrain.memory.gated_delta import GatedDeltaConfig as GatedDeltaConfig
from memtrain.memory.linear_recurrence import LinearRecurrence as LinearRecurrence
from memtrain.memory.linear_recurrence import LinearRecurrenceConfig as LinearRecurrenceConfig
from memtrain.memory.mamba2 import Mamba2 as Mamba2
from memtrain.memory.mamba2 import Mamba2Config as Mamba2Config
from memtrain.memory.ngram import NGramMemory as NGramMemory
from memtrain.memory.ngram import NGramMemoryConfig as NGramMemoryConfig
from memtrain.memory.product_key import ProductKeyMemory as ProductKeyMemory
from memtrain.memory.product_key import ProductKeyMemoryConfig as ProductKeyMemoryConfig
from memtrain.memory.protocol import Aux as Aux
from memtrain.memory.protocol import Context as Context
from memtrain.memory.protocol import LeafSpec as LeafSpec
from memtrain.memory.protocol import Memory as Memory
from memtrain.memory.protocol import MemoryTable as MemoryTable
from memtrain.memory.protocol import State as State
from memtrain.memory.protocol import Statistic as Statistic
from memtrain.memory.protocol import spec_bytes as spec_bytes
from memtrain.memory.registry import REGISTRY as REGISTRY
from memtrain.memory.registry import register as register
from memtrain.memory.short_conv import ShortConv as ShortConv
from memtrain.memory.short_conv import ShortConvConfig as ShortConvConfig
