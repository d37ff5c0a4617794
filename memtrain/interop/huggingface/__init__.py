"""Weights and configs of Hugging Face `transformers`, in both directions, for seven architectures.

    config, vocab_size, parameters = load("path/to/folder")
    model = Skeleton.of(config, vocab_size).merge(parameters)
    save("path/to/other", config, parameters)

Needs neither torch nor transformers. `docs/huggingface.md` says what is read and what is refused.
"""

from memtrain.interop.huggingface.convert import ARCHITECTURES as ARCHITECTURES
from memtrain.interop.huggingface.convert import config_from_huggingface as config_from_huggingface
from memtrain.interop.huggingface.convert import config_to_huggingface as config_to_huggingface
from memtrain.interop.huggingface.convert import load as load
from memtrain.interop.huggingface.convert import save as save
