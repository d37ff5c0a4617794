"""What the backward keeps of the forward, read from the traced layers themselves.

A layer is traced at one device's share of rows, tokens, heads and hidden units; what `jax.vjp`
hands from the forward to the backward, under the model's remat policy, is what stays in memory.
Nothing is computed or allocated, and any memory is counted without a formula of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memtrain.description import BuildContext, LayerDescription
from memtrain.memory.protocol import Context
from memtrain.model.block import Block
from memtrain.model.config import Block as BlockConfig
from memtrain.model.config import ModelConfig, RematPolicy
from memtrain.model.language_model import full_pattern, table_specs
from memtrain.model.repeats import _rematerialised


# Rows longer than this are counted from two shorter ones: residuals are affine in the tokens.
_LONGEST_TRACE = 4096


@dataclasses.dataclass(frozen=True)
class Unit:
    """Blocks that are run, and recomputed, as one.

    Bytes on one device. kept: from the forward to the backward. working: everything that the unit's
    own backward reads, recomputed or kept. widest: the largest array among them.
    """

    blocks: tuple[int, ...]
    kept: int
    working: int
    widest: int


def units(
    config: ModelConfig, rows: int, tokens: int, *, tensor: int, scanned: bool, platform: str
) -> list[Unit]:
    """The units of one repeat of the pattern, in order of depth, on one device.

    rows, tokens: of one device. tensor: devices that share heads and hidden units. platform:
    compilers of accelerators make more in the backward anew than the one for CPUs.
    """
    return [
        _unit(config, (i,), rows, tokens, tensor, platform, scanned)
        for i in range(len(full_pattern(config)))
    ]


def _unit(
    config: ModelConfig,
    blocks: tuple[int, ...],
    rows: int,
    tokens: int,
    tensor: int,
    platform: str,
    scanned: bool,
) -> Unit:
    def at(length: int) -> tuple[int, int, int]:
        return _traced(config, blocks, rows, length, tensor, platform, scanned)

    if tokens <= 2 * _LONGEST_TRACE:
        return Unit(blocks, *at(tokens))
    short, long = at(_LONGEST_TRACE), at(2 * _LONGEST_TRACE)
    more = tokens - _LONGEST_TRACE
    return Unit(
        blocks, *(a + (b - a) * more // _LONGEST_TRACE for a, b in zip(short, long, strict=True))
    )


@functools.lru_cache(maxsize=256)
def _traced(
    config: ModelConfig,
    blocks: tuple[int, ...],
    rows: int,
    tokens: int,
    tensor: int,
    platform: str,
    scanned: bool,
) -> tuple[int, int, int]:
    pattern = [_share(block, tensor) for block in full_pattern(config)]
    chosen = [pattern[i] for i in blocks]
    working, widest = _residual_bytes(config, chosen, rows, tokens, "none", platform, scanned=False)
    # What a loop hands to the loop of the backward is arrays: no fusion reaches from one into the
    # other.
    kept, _ = _residual_bytes(config, chosen, rows, tokens, config.remat, platform, scanned=scanned)
    return kept, max(kept, working), widest


def _share(block: BlockConfig, tensor: int) -> BlockConfig:
    """The block as one of `tensor` devices runs it: its share of the heads and hidden units."""
    return dataclasses.replace(
        block,
        **{
            place: _share_of_layer(layer, tensor)
            for place in ("mixer", "ffn")
            if (layer := getattr(block, place)) is not None
        },
    )


def _share_of_layer(layer: LayerDescription, tensor: int) -> LayerDescription:
    changes: dict[str, Any] = {}
    if hasattr(layer, "backend"):  # The kernel of another machine cannot be traced here.
        changes["backend"] = None
    if tensor > 1:
        for name in layer.split:
            size = getattr(layer, name)
            if isinstance(size, int) and size % tensor == 0:
                changes[name] = size // tensor
    return dataclasses.replace(layer, **changes) if changes else layer


def _residual_bytes(
    config: ModelConfig,
    pattern: Sequence[BlockConfig],
    rows: int,
    tokens: int,
    remat: RematPolicy,
    platform: str,
    *,
    scanned: bool,
) -> tuple[int, int]:
    """Bytes of all that is kept, and of the largest array."""
    context = BuildContext(dim=config.dim, depth=1, dtypes=config.dtypes)
    blocks = nnx.eval_shape(
        lambda: [Block(block, context, rngs=nnx.Rngs(i)) for i, block in enumerate(pattern)]
    )
    shape = jax.ShapeDtypeStruct
    tables = {
        name: shape((spec.num_slots, spec.value_dim), config.dtypes.of_tables)
        for name, spec in table_specs(pattern).items()
    }
    x = shape((rows, tokens, config.dim), config.dtypes.compute)
    index, flag = shape((rows, tokens), "int32"), shape((rows, tokens), "bool")

    def run(blocks: list[Block], x, tables, positions, starts, valid):
        ctx = Context(
            positions=positions,
            starts=starts,
            valid=valid,
            token_ids=positions,
            tables=tables,
            want_metrics=True,
        )
        for block in blocks:
            x, _, _ = block(x, None, ctx)
        return x

    run = _rematerialised(run, remat)

    def forward(blocks, x, tables, *rest):
        y, backward = jax.vjp(lambda *a: run(*a, *rest), blocks, x, tables)
        return y, jax.tree.leaves(backward)

    with _unannounced():
        jaxpr = jax.make_jaxpr(forward)(blocks, x, tables, index, flag, flag).jaxpr
    # x is kept too, and nobody else counts it: it is the output of the block before.
    sizes = [value.bytes_on(platform) for value in _kept(jaxpr, platform, scanned)]
    sizes.append(x.size * jnp.dtype(x.dtype).itemsize)
    return sum(sizes), max(sizes)


@contextlib.contextmanager
def _unannounced() -> Iterator[None]:
    """The kernels that are traced here say nothing of those that will run."""
    logger = logging.getLogger("memtrain_kernels")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


_SAME_BYTES = {"reshape", "squeeze", "expand_dims", "copy", "transpose", "stop_gradient", "name"}
_CHEAP = {"add", "sub", "mul", "neg", "integer_pow", "select_n", "convert_element_type"}
_CHEAP |= {"broadcast_in_dim", "iota", "and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge"}
_POINTWISE = _CHEAP | {"div", "exp", "log", "logistic", "tanh", "rsqrt", "sqrt", "max", "min"}
_POINTWISE |= {"sin", "cos", "abs", "sign", "square", "exp2", "concatenate", "slice", "pad", "rem"}
_CALLS = {"pjit": "jaxpr", "jit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
_KERNELS = {"scan", "while", "cond", "pallas_call", "shard_map"}
_MOVES = {"slice", "dynamic_slice", "pad"}


@dataclasses.dataclass(eq=False)
class _Value:
    """What one operation of the forward makes. An argument is made by nothing."""

    shape: tuple[int, ...] = ()
    itemsize: int = 0
    made_by: str = ""
    made_of: Sequence[_Value] = ()
    uses: int = 0
    pinned: bool = False
    """A kernel reads or writes it, forward and backward: no fusion can stand for it."""

    def bytes_on(self, platform: str) -> int:
        """On TPU, kernels take their last dimension in lanes of 128."""
        shape = self.shape
        if platform == "tpu" and self.pinned and shape and shape[-1] > 1:
            shape = (*shape[:-1], -(-shape[-1] // 128) * 128)
        return math.prod(shape) * self.itemsize


def _kept(jaxpr: Any, platform: str, scanned: bool) -> set[_Value]:
    """The values that outlive the forward, arguments left out.

    Reshapes are one with what they show. What is made pointwise is made in the backward again, and
    what it is made of stays in its place: on accelerators always, since products take such operands
    as they are made; on CPU if it is cheap and the forward itself never looks at it.
    """
    values: dict[Any, _Value] = {v: _Value() for v in [*jaxpr.invars, *jaxpr.constvars]}
    _walk(jaxpr, values)
    todo = [value for var in jaxpr.outvars[1:] if (value := _of(var, values)) is not None]
    kept: set[_Value] = set()
    seen: set[_Value] = set()
    while todo:
        value = todo.pop()
        if not value.made_by or value in seen:
            continue
        seen.add(value)
        sinks = value.made_by in _CHEAP and value.uses == 0
        if platform != "cpu":
            sinks = value.made_by in _POINTWISE and not value.pinned
        if sinks and not scanned:
            todo.extend(value.made_of)
        else:
            kept.add(value)
    return kept


def _of(var: Any, values: dict[Any, _Value]) -> _Value | None:
    return None if hasattr(var, "val") else values[var]


def _walk(jaxpr: Any, values: dict[Any, _Value]) -> None:
    """Enters the value of every variable, nested jits written out."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        read = [value for var in eqn.invars if (value := _of(var, values)) is not None]
        if name in _CALLS:
            inner = eqn.params[_CALLS[name]].jaxpr
            own = {var: _Value() for var in inner.constvars}
            for outer, var in zip(eqn.invars, inner.invars, strict=True):
                own[var] = _of(outer, values) or _Value()
            _walk(inner, own)
            for outer, var in zip(eqn.outvars, inner.outvars, strict=True):
                values[outer] = _of(var, own) or _Value()
        elif name in _SAME_BYTES:
            values[eqn.outvars[0]] = read[0] if read else _Value()
        else:
            is_kernel = name in _KERNELS or (name == "custom_vjp_call" and not _is_product(eqn))
            for value in read:
                value.uses += 1
                if is_kernel or name == "dot_general":
                    _pin(value)
            for var in eqn.outvars:
                shape, itemsize = tuple(var.aval.shape), var.aval.dtype.itemsize
                values[var] = _Value(shape, itemsize, name, read, pinned=is_kernel)


def _pin(value: _Value) -> None:
    value.pinned = True
    if value.made_by in _MOVES:
        for source in value.made_of:
            _pin(source)


def _is_product(eqn: Any) -> bool:
    """Whether a custom rule wraps one matrix product, as `memory.primitives.dense` does."""
    names = [inner.primitive.name for inner in eqn.params["call_jaxpr"].jaxpr.eqns]
    return names.count("dot_general") == 1 and set(names) <= _CHEAP | _SAME_BYTES | {"dot_general"}
