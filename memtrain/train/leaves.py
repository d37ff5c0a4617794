"""Names for the leaves of a tree, so that a checkpoint knows no Python classes.

A leaf is named by its path: dictionary keys, field names and positions joined by "/", as in
`optimizer/0/mu/blocks/2/query` ("/" and "%" within a key are written %2F and %25). A NamedTuple and
a dictionary with the same keys give the same names: restoring needs the names, shapes and dtypes to
agree, never the types of the containers.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import jax
import jax.numpy as jnp

from memtrain.errors import CheckpointError


PyTree = Any
_SHOWN = 8


class LeafInfo(NamedTuple):
    """Shape and dtype name of a saved leaf; a PRNG key has its own dtype, such as `key<fry>`."""

    shape: tuple[int, ...]
    dtype: str


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by name, in tree order; ValueError if two leaves would share a name."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(_segment(key) for key in path)
        if not name:
            raise ValueError("a checkpoint holds a tree with named leaves, not one bare array")
        if name in named:
            raise ValueError(f"two leaves are named {name!r}: a key 0 beside a key '0'?")
        named[name] = leaf
    return named


def info(leaf: Any) -> LeafInfo:
    """Shape and dtype of an array or a ShapeDtypeStruct."""
    return LeafInfo(tuple(leaf.shape), str(leaf.dtype))


def is_key(leaf: Any) -> bool:
    """Whether the leaf holds typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def check_fit(
    where: str,
    saved: Mapping[str, LeafInfo],
    wanted: Mapping[str, LeafInfo],
    *,
    partial: bool = False,
) -> None:
    """CheckpointError naming missing and unexpected leaves, and shapes and dtypes that differ.

    With `partial`, leaves that are saved but not wanted are fine. Nothing is ever cast or padded.
    """
    both = [name for name in wanted if name in saved]
    problems = [
        _list("missing from the checkpoint", (name for name in wanted if name not in saved)),
        _list(
            "in the checkpoint but not in this run",
            () if partial else (name for name in saved if name not in wanted),
        ),
        _list(
            "of another shape",
            (
                f"{name} {list(saved[name].shape)} saved, {list(wanted[name].shape)} wanted"
                for name in both
                if saved[name].shape != wanted[name].shape
            ),
        ),
        _list(
            "of another dtype",
            (
                f"{name} {saved[name].dtype} saved, {wanted[name].dtype} wanted"
                for name in both
                if saved[name].dtype != wanted[name].dtype
            ),
        ),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise CheckpointError(f"{where} does not fit this run: {'; '.join(found)}")


def _segment(key: Any) -> str:
    # Every key class of jax.tree_util has one of these fields.
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            text = str(getattr(key, field))
            break
    else:
        text = str(key)
    if not text:
        raise ValueError("a leaf of a checkpoint has an empty key in its path")
    return text.replace("%", "%25").replace("/", "%2F")


def stored_name(name: str) -> str:
    """The name on disk: parts joined by dots, and in them nothing but letters, digits and "_-~%".

    So no key can be taken for a path, ".." least of all.
    """
    return ".".join(quote(part, safe="").replace(".", "%2E") for part in name.split("/"))


def _list(what: str, names: Iterable[str]) -> str:
    every = list(names)
    if not every:
        return ""
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return f"{len(every)} {what}: {', '.join(every[:_SHOWN])}{more}"
