"""Tables sharded over devices: the sums and gradients of NumPy, whatever the split and the skew."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import lookup_oracle as oracle
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memtrain_kernels import (
    gather_costs,
    partitioned,
    partitioned_product_key_lookup,
    partitioned_weighted_gather,
    product_key_lookup,
    sharded_weighted_gather,
    tables_over,
    weighted_gather,
)
from memtrain_kernels.lookup.gather_costs import plan_chunks


pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

ROUTES = (("columns", "gather"), ("rows", "gather"), ("rows", "all_to_all"))
PAIR = ("fsdp", "context")


def mesh_of(**sizes: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(*sizes.values()), tuple(sizes))


def gathers(mesh: Mesh, axis, split: str, exchange: str, check_vma: bool, **options):
    """The sharded gather of tokens that are sharded over the whole mesh."""
    return jax.shard_map(
        functools.partial(
            sharded_weighted_gather, axis=axis, split=split, exchange=exchange, **options
        ),
        mesh=mesh,
        in_specs=(P(axis) if split == "rows" else P(None, axis), *(P(mesh.axis_names),) * 2),
        out_specs=P(mesh.axis_names),
        check_vma=check_vma,
    )


def with_gradients(gather):
    """(y, d_table, d_weights) from table, slots, weights, dy."""

    def run(table, slots, weights, dy):
        y, pull = jax.vjp(lambda t, w: gather(t, slots, w), table, weights)
        return y, *pull(dy)

    return jax.jit(run)


def draw(M: int, N: int, V: int, K: int, kind: str, rows: int = 0):
    """Slots that are spread, all one row, all of the second device's `rows`, or the same twice."""
    rng = np.random.default_rng(0)
    slots = rng.integers(-1, N, (M, K))
    if kind == "one row":
        slots[:] = N - 1
    elif kind == "one device":
        slots = rng.integers(rows, 2 * rows, (M, K))
    elif kind == "duplicates":
        slots[:, 1::2] = slots[:, : K // 2]
    table, weights, dy = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((N, V), (M, K), (M, V))
    )
    weights[rng.random((M, K)) < 0.2] = 0
    return table, slots.astype(np.int32), weights, dy


def check(found, table, slots, weights, dy, tolerance=1e-6) -> None:
    y, d_table, d_weights = found
    want = np.einsum("md,mkd->mk", np.float64(dy), np.float64(table)[slots])
    oracle.close(y, oracle.bag(table, slots, weights), tolerance)
    oracle.close(d_table, oracle.table_gradient(slots, weights, dy, len(table)), tolerance)
    oracle.close(d_weights, np.where(slots < 0, 0, want), tolerance)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("split", "exchange"), ROUTES)
def test_sums_and_gradients_over_two_axes_as_one(split, exchange, check_vma):
    """The table is replicated over data, whose devices' gradients must be added up."""
    mesh = mesh_of(data=2, fsdp=2, context=2)
    M, N, V, K = 8 * 13, 4 * 15, 4 * 3, 5
    gather = gathers(mesh, PAIR, split, exchange, check_vma, chunk_tokens=5)  # 3 chunks, one short
    run = with_gradients(gather)
    for kind in ("spread", "one row", "one device", "duplicates"):
        arrays = draw(M, N, V, K, kind, rows=15)
        found = run(*arrays)
        check(found, *arrays)
        for ours, again in zip(found, run(*arrays), strict=True):
            np.testing.assert_array_equal(ours, again)
    assert found[1].sharding.is_equivalent_to(
        NamedSharding(mesh, P(PAIR) if split == "rows" else P(None, PAIR)), 2
    )


@pytest.mark.parametrize(("split", "exchange"), ROUTES)
def test_one_read_a_token_over_eight_devices(split, exchange):
    run = with_gradients(gathers(mesh_of(fsdp=8), "fsdp", split, exchange, check_vma=True))
    for kind in ("spread", "one row"):
        arrays = draw(8 * 40, 8 * 3, 8 * 2, 1, kind)
        check(run(*arrays), *arrays)


def test_skew_takes_more_rounds_than_one():
    """The tests above would not see a dropped request otherwise."""
    for M, V, K, n, chunk in ((13, 12, 5, 4, 5), (40, 16, 1, 8, None)):
        chunks = plan_chunks("rows_all_to_all", M, 0, V, K, n, chunk)
        assert chunks.count * chunks.tokens >= M
        # All reads with one device: -(-K // lanes) requests a token.
        assert chunks.tokens * -(-K // chunks.lanes) > chunks.capacity


@pytest.mark.parametrize(("split", "exchange"), ROUTES)
def test_one_device_is_the_plain_gather(split, exchange):
    mesh = mesh_of(data=8, memory=1)
    arrays = draw(16, 6, 4, 3, "spread")
    run = with_gradients(gathers(mesh, "memory", split, exchange, check_vma=True))
    check(run(*arrays), *arrays)


@pytest.mark.parametrize(("split", "exchange"), ROUTES)
def test_dtypes_are_kept_and_sums_are_float32(split, exchange):
    table, slots, weights, dy = draw(8 * 4, 8 * 3, 8 * 2, 6, "spread")
    narrow = jnp.asarray(table, jnp.bfloat16)
    run = with_gradients(gathers(mesh_of(fsdp=8), "fsdp", split, exchange, check_vma=False))
    found = run(narrow, slots, jnp.asarray(weights), jnp.asarray(dy, jnp.bfloat16))
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    exact = np.asarray(narrow, np.float64)
    # One rounding to 8 bits, at the end.
    np.testing.assert_allclose(
        np.float64(found[0]), oracle.bag(exact, slots, weights), rtol=2**-8, atol=1e-5
    )
    dy = np.asarray(jnp.asarray(dy, jnp.bfloat16), np.float64)
    want = oracle.table_gradient(slots, weights, dy, len(table))
    np.testing.assert_allclose(np.float64(found[1]), want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(("split", "exchange"), ROUTES)
def test_memory_does_not_grow_with_the_tokens_of_all_devices(split, exchange):
    M, N, V, K = 2**18, 8 * 1024, 64, 4
    run = with_gradients(
        gathers(mesh_of(fsdp=8), "fsdp", split, exchange, check_vma=False, chunk_tokens=512)
    )
    shapes = (
        ((N, V), jnp.float32),
        ((M, K), jnp.int32),
        ((M, K), jnp.float32),
        ((M, V), jnp.float32),
    )
    compiled = run.lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()
    used = compiled.memory_analysis()
    assert used is not None
    own = M // 8 * V * 4
    # y and dy in chunks are two arrays of a device's own tokens; those of all would be eight each.
    assert used.temp_size_in_bytes < 4 * own


def sent(run, *arrays) -> int:
    """Bytes that a device sends in a program, counted from its collectives; loops go once."""

    def count(jaxpr) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            size = lambda v: v.aval.size * v.aval.dtype.itemsize  # noqa: E731
            if eqn.primitive.name == "all_gather":
                total += size(eqn.outvars[0]) * 7 // 8
            elif eqn.primitive.name in ("all_to_all", "reduce_scatter"):
                total += size(eqn.invars[0]) * 7 // 8
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                total += count(inner) if hasattr(inner, "eqns") else 0
        return total

    return count(jax.make_jaxpr(run)(*arrays).jaxpr)


@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize(("split", "exchange"), ROUTES)
def test_costs_are_the_bytes_that_programs_send(split, exchange, itemsize):
    M, N, V, K = 64, 800, 32, 6
    mesh = mesh_of(fsdp=8)
    gather = gathers(mesh, "fsdp", split, exchange, check_vma=False)
    table, slots, weights, dy = draw(8 * M, N, V, K, "spread")
    dtype = jnp.float32 if itemsize == 4 else jnp.bfloat16
    table, dy = jnp.asarray(table, dtype), jnp.asarray(dy, dtype)
    forward = sent(gather, table, slots, weights)
    both = sent(with_gradients(gather), table, slots, weights, dy)
    costs = gather_costs(M, N, V, K, 8, itemsize)
    cost = costs["columns" if split == "columns" else f"rows_{exchange}"]
    assert (forward, both - forward) == cost


def test_costs_by_hand():
    """1,000 tokens that read 8 rows of 64 float32 over 4 devices."""
    costs = gather_costs(1000, 4096, 64, 8, 4, 4)
    indices = 3 * 1000 * 8 * (4 + 4)
    assert costs["columns"] == (indices + 3 * 1000 * 64, indices + 3 * 1000 * 64 + 3 * 1000 * 32)
    assert costs["rows_gather"].forward == indices + 3 * 1000 * 64 * 4
    assert costs["table"].forward == 3 * 4096 * 64
    # 2 reads of 64 devices are about 2 requests, a row each: beside those, room for uneven draws.
    few = gather_costs(100_000, 4096, 1024, 2, 64, 4)["rows_all_to_all"].forward
    least = 63 / 64 * 100_000 * 2 * (1024 * 4 + 4 + 4)
    assert least < few < 1.5 * least


@pytest.mark.parametrize(("V", "K", "taken"), [(512, 32, "reduce_scatter"), (64, 2, "all_to_all")])
def test_auto_takes_what_sends_less(V, K, taken):
    costs = gather_costs(64, 800, V, K, 8, 4)
    cheaper = sum(costs["rows_gather"]) < sum(costs["rows_all_to_all"])
    assert cheaper == (taken == "reduce_scatter")
    gather = gathers(mesh_of(fsdp=8), "fsdp", "rows", "auto", check_vma=False)
    program = str(jax.make_jaxpr(gather)(*draw(8 * 64, 800, V, K, "spread")[:3]))
    assert [name for name in ("reduce_scatter", "all_to_all") if f"{name}[" in program] == [taken]


FOUR = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("B", "tables", "columns"),
    [
        (2, {"rows": PAIR, "columns": ("tensor",)}, "tensor"),  # both splits at once
        (3, {"rows": PAIR, "exchange": "gather"}, None),  # rows of 3: tokens replicated over fsdp
        (2, {"columns": ("context", "tensor")}, "tensor"),  # one exchanged, one kept
        (2, {}, None),  # whole tables, tokens where they are
    ],
)
def test_told_how_the_program_is_sharded(B, tables, columns):
    mesh = mesh_of(**FOUR)
    T, N, V, K = 6, 28, 12, 3

    def run(table, slots, weights, dy):
        told = partitioned(mesh, batch=("data", "fsdp"), heads=("tensor",), sequence="context")
        with told, tables_over(**tables):
            y, pull = jax.vjp(lambda t, w: partitioned_weighted_gather(t, slots, w), table, weights)
            return y, *pull(dy)

    table, slots, weights, dy = draw(B * T, N, V, K, "spread")
    by_tokens = [x.reshape(B, T, -1) for x in (slots, weights, dy)]
    y, d_table, d_weights = jax.jit(run)(table, *by_tokens)
    check((y.reshape(-1, V), d_table, d_weights.reshape(-1, K)), table, slots, weights, dy)
    rows = "fsdp" if B % 2 == 0 else None
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(rows, "context", columns)), 3)


def test_what_does_not_divide_is_left_whole_and_said_once(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("memtrain_kernels"), "propagate", True)
    table, slots, weights, _ = draw(4 * 2, 26, 5, 3, "spread")  # 26 rows over 2 x 2, 5 columns
    by_tokens = [x.reshape(4, 2, -1) for x in (slots, weights)]
    with caplog.at_level(logging.INFO, "memtrain_kernels"):
        for _ in range(2):
            with (
                partitioned(mesh_of(**FOUR), batch=("fsdp",)),
                tables_over(rows=PAIR, columns=("tensor",)),
            ):
                y = jax.jit(lambda *a: partitioned_weighted_gather(*a))(table, *by_tokens)
    oracle.close(y.reshape(8, 5), oracle.bag(table, slots, weights), 1e-6)
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(line for line in lines if "memory table" in line) == [
        "memory table: 26 rows are not a multiple of fsdp=2 x context=2: not split over context",
        "memory table: 5 columns are not a multiple of tensor=2: not split over tensor",
    ]


def test_the_lookup_stays_with_its_tokens():
    """XLA alone would gather the scores of all tokens."""
    mesh = mesh_of(**FOUR)
    rng = np.random.default_rng(1)
    queries, keys, weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 4, 2, 2, 5), (2, 2, 9, 5), (2, 4, 2, 3))
    )

    def told(queries, keys):
        with partitioned(mesh, batch=("data", "fsdp"), heads=("tensor",), sequence="context"):
            return partitioned_product_key_lookup(queries, keys, 3)

    def gradients(lookup):
        return jax.grad(lambda q, k: jnp.sum(lookup(q, k)[0] * weights), (0, 1))

    shares = (
        jax.device_put(queries, NamedSharding(mesh, P("fsdp", "context", "tensor"))),
        jax.device_put(keys, NamedSharding(mesh, P(None, "tensor"))),
    )
    compiled = jax.jit(told).lower(*shares).compile()
    text = compiled.as_text()
    assert text is not None and "all-gather" not in text
    plain = lambda q, k: product_key_lookup(q, k, 3)  # noqa: E731
    for ours, theirs in zip(compiled(*shares), jax.jit(plain)(queries, keys), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    found, want = jax.jit(gradients(told))(*shares), jax.jit(gradients(plain))(queries, keys)
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_untold_it_is_the_plain_gather():
    table, slots, weights, _ = draw(6, 5, 4, 3, "spread")
    y = partitioned_weighted_gather(table, slots.reshape(2, 3, 3), weights.reshape(2, 3, 3))
    np.testing.assert_array_equal(y.reshape(6, 4), weighted_gather(table, slots, weights))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "slots"}, "split='slots': give one of rows, columns"),
        ({"exchange": "ring"}, "exchange='ring': give one of auto, all_to_all, gather"),
        ({"split": "columns", "exchange": "all_to_all"}, "is for rows"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
    ],
)
def test_bad_choices_are_refused(options, message):
    options = {"split": "rows", "exchange": "auto"} | options
    gather = gathers(mesh_of(fsdp=8), "fsdp", check_vma=True, **options)
    with pytest.raises(ValueError, match=message):
        gather(*draw(8, 8, 8, 2, "spread")[:3])


def test_bad_axes_are_refused():
    refused: list[tuple[dict[str, Any], str]] = [
        ({"rows": ("fsdp",), "columns": ("fsdp",)}, "'fsdp' splits rows and columns"),
        ({"exchange": "ring"}, "exchange='ring': give one of"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message), tables_over(**options):
            pass
    table, slots, weights, _ = draw(4, 8, 8, 2, "spread")
    by_tokens = [x.reshape(2, 2, 2) for x in (slots, weights)]
    refused = [
        ({"rows": ("slots",)}, "mesh axis 'slots': the mesh has data, fsdp, context, tensor"),
        ({"rows": ("context",), "columns": ("fsdp",)}, "split over fsdp as tokens are"),
    ]
    for tables, message in refused:
        told = partitioned(mesh_of(**FOUR), batch=("fsdp",))
        with told, tables_over(**tables), pytest.raises(ValueError, match=message):
            partitioned_weighted_gather(table, *by_tokens)
    with pytest.raises(ValueError, match=r"give both \[B, T, K\]"):
        partitioned_weighted_gather(table, slots, weights)
    with pytest.raises(ValueError, match="num_devices=0 must be at least 1"):
        gather_costs(8, 8, 8, 2, 0, 4)
