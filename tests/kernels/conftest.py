"""What `tools/test --fast` leaves out: kernels for devices that are not here, and long proofs."""

from pathlib import Path

import pytest


_FULL_FOLDERS = {"attention_tpu", "attention_hopper", "decode", "decode_hopper"}
_FULL_FILES = {
    "test_tpu.py",
    "test_memory_topk.py",
    "test_sharded_topk.py",
    "test_topk_gradients.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        if item.path.parent.name in _FULL_FOLDERS or item.path.name in _FULL_FILES:
            item.add_marker(pytest.mark.full)
