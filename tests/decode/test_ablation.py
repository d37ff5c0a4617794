"""Names of memories."""

from dataclasses import dataclass

import pytest

from memtrain.errors import BadInput
from memtrain.layers import ModelConfig, Window
from memtrain.memory.product_key import ProductKeyMemoryConfig
from memtrain.model.ablation import layer_label, memory_names, resolve_without

from .conftest import CONFIG


def test_labels_name_all_layers_of_a_kind():
    assert memory_names(CONFIG) == {
        "window": [(0, "mixer"), (2, "mixer")],
        "attention": [(1, "mixer"), (3, "mixer")],
        "product_key": [(1, "ffn"), (3, "ffn")],
    }


def test_places_and_labels_resolve_to_sorted_places():
    assert resolve_without(CONFIG, ()) == ()
    assert resolve_without(CONFIG, ("3.ffn", "window", "0.mixer")) == (
        (0, "mixer"),
        (2, "mixer"),
        (3, "ffn"),
    )


def test_a_feed_forward_layer_is_a_place_but_no_memory():
    config = ModelConfig(dim=16, pattern=(Window(4, num_heads=2),))
    assert memory_names(config) == {"window": [(0, "mixer")]}
    assert resolve_without(config, ("0.ffn",)) == ((0, "ffn"),)


@pytest.mark.parametrize("name", ["bank", "4.mixer", "0.ffn", "windows", ""])
def test_an_unknown_name_lists_the_choices(name):
    with pytest.raises(
        BadInput, match=r"it has window, attention, product_key, 0\.mixer, 1\.mixer"
    ):
        resolve_without(CONFIG, (name,))


def test_a_users_memory_is_called_by_its_type():
    @dataclass(frozen=True)
    class NGramRecallMemory(ProductKeyMemoryConfig):
        pass

    assert layer_label(NGramRecallMemory()) == "ngram_recall"
