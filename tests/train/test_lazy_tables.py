"""The train step with a gradient of the rows that were read, beside one of the whole table."""

import dataclasses

import jax
import numpy as np
import pytest

from memtrain.errors import BadInput
from memtrain.layers import Block, ProductKeyMemory, Window
from memtrain.memory import ProductKeyMemory as ProductKeyMemoryModule
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.sharding import batch_sharding
from memtrain.train.config import OptimizerConfig
from memtrain.train.step import make_train_step
from tests.helpers import tiny


NAME = "tables.memory"
STEPS = 3


def experiment(
    mesh=None, repeats=2, scan_unroll=None, accumulation=1, slots=1024, tables=None, **optimizer
):
    """Two layers that share a table and read it by different numbers of rows, repeated."""
    base = tiny.experiment(mesh=mesh, accumulation_steps=accumulation)
    wide = ProductKeyMemory(num_slots=slots, num_heads=2, top_k=3, key_dim=8, value_dim=16)
    narrow = dataclasses.replace(wide, num_heads=1, top_k=2)
    model = dataclasses.replace(
        base.model,
        pattern=(
            Block(mixer=Window(5, num_heads=2, sink_tokens=1), ffn=wide),
            Block(mixer=None, ffn=narrow),
        ),
        repeats=repeats,
        scan_unroll=scan_unroll,
        dtypes=dataclasses.replace(base.model.dtypes, tables=tables),
    )
    config = dataclasses.replace(
        base.optimizer, table_learning_rate=3e-2, table_clip_norm=0.5, **optimizer
    )
    return dataclasses.replace(base, model=model, optimizer=config)


def after_steps(config):
    """The plan; the table before; metrics and the table's moments of each step; the table after."""
    plan = tiny.plan_of(config)
    step, state = make_train_step(plan), plan.init()
    table, reports = np.asarray(state.parameters[NAME]), []
    for seed in range(STEPS):
        batch = jax.device_put(tiny.batch(seed), batch_sharding(plan.mesh))
        state, metrics = step(state, batch)
        reports.append(jax.tree.map(np.asarray, (metrics, state.optimizer.tables[NAME])))
    return plan, table, reports, np.asarray(state.parameters[NAME])


@pytest.fixture(scope="module")
def of_whole_tables():
    return after_steps(experiment(table_gradient="dense"))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({}, id="one_device"),
        pytest.param(
            {"scan_unroll": 1, "accumulation": 2}, id="scanned_in_parts", marks=pytest.mark.full
        ),
        pytest.param(
            {"mesh": MeshConfig(fsdp=2, context=2, tensor=2)},
            id="rows_and_columns_over_devices",
            marks=pytest.mark.full,
        ),
        pytest.param(
            {"mesh": MeshConfig(data=4, tensor=2), "accumulation": 2},
            id="columns_over_devices",
            marks=pytest.mark.full,
        ),
    ],
)
def test_both_gradients_give_the_same_tables(of_whole_tables, changed):
    _, before, wanted, want = of_whole_tables
    plan, _, reports, found = after_steps(experiment(table_gradient="rows", **changed))
    assert plan.tables.by_rows == {NAME}
    for (ours, own), (theirs, other) in zip(reports, wanted, strict=True):
        np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=1e-4)
        norm = "train/table_grad_norm"
        np.testing.assert_allclose(ours[norm], theirs[norm], rtol=1e-3)
        np.testing.assert_array_equal(own.updates, other.updates)
        np.testing.assert_array_equal(own.last_step, other.last_step)
    # The first moments of the first step are its gradient; later ones follow other trajectories.
    first, mean = reports[0][1].mean, wanted[0][1].mean
    np.testing.assert_allclose(first, mean, atol=1e-4 * np.abs(mean).max())
    moved = np.abs(want - before).max()
    assert moved > 0.01
    np.testing.assert_allclose(found, want, atol=1e-2 * moved)


def test_rows_that_no_token_read_do_not_move():
    """Asked of the reads themselves: every layer reports its slots."""
    config = experiment(table_gradient="auto", slots=4096)
    plan = tiny.plan_of(config)
    assert plan.tables.by_rows == {NAME}
    state = plan.init()
    model = plan.skeleton.merge(state.parameters)
    batch = tiny.batch(5)
    from memtrain.train.step import context_of

    _, _, aux = jax.jit(lambda m, b: m(b.tokens, None, context_of(b, want_reads=True)))(
        model, jax.tree.map(np.asarray, batch)
    )
    slots = [np.asarray(p["ffn"].reads["slots"]).reshape(-1) for p in aux]
    unread = np.setdiff1d(np.arange(4096), np.concatenate(slots))
    assert 0 < len(unread) < 4096
    before = jax.tree.map(np.asarray, (state.parameters[NAME], state.optimizer.tables[NAME]))
    after, metrics = make_train_step(plan)(state, batch)
    now = jax.tree.map(np.asarray, (after.parameters[NAME], after.optimizer.tables[NAME]))
    for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a[unread], b[unread])
    assert np.any(now[0] != before[0])
    share = 1 - len(unread) / 4096
    np.testing.assert_allclose(metrics[f"memory/{NAME}.slots_used"], share, rtol=1e-6)


def test_which_gradient_auto_takes():
    # 96 tokens read 6 and 2 rows, twice: 1,536 of a table on one device, of which two have half.
    by_rows = lambda **more: tiny.plan_of(experiment(**more)).tables.by_rows  # noqa: E731
    assert by_rows(slots=1600) == {NAME} and by_rows(slots=1444) == set()
    assert by_rows(slots=1600, mesh=MeshConfig(fsdp=2)) == set()
    assert tiny.plan_of(experiment(table_update="dense")).tables.names == ()


def test_what_is_of_lazy_updates_is_refused_without_them():
    with pytest.raises(ValueError, match=r'table_rounding=master: .* set table_update="lazy"'):
        OptimizerConfig(table_update="dense", table_rounding="master")
    with pytest.raises(ValueError, match="table_gradient=rows"):
        OptimizerConfig(table_update="dense", table_gradient="rows")


def test_shares_of_rows_that_nothing_reaches_by_hand():
    import jax.numpy as jnp

    from memtrain.train.row_adam import TableMoments
    from memtrain.train.tables import usage

    zeros = jnp.zeros((4, 1))
    moments = TableMoments(zeros, zeros, jnp.asarray([0, 3, 1, 9]), jnp.asarray([-1, 5, 999, 1500]))
    found = usage({NAME: moments}, 1500)
    assert float(found[f"memory/{NAME}.never_updated"]) == 0.25
    assert float(found[f"memory/{NAME}.idle"]) == 0.5
    assert float(usage({NAME: moments}, 900)[f"memory/{NAME}.idle"]) == 0


def test_the_float32_copy_is_of_what_the_run_starts_from():
    import jax.numpy as jnp

    from memtrain.train.init_from import Source

    plan = tiny.plan_of(experiment(tables="bfloat16", table_rounding="master", slots=64))
    state = plan.init()
    table = np.asarray(state.parameters[NAME]) + 1
    source = Source(
        "x", plan.experiment, {}, {NAME: NAME}, {NAME}, lambda names: {NAME: jnp.asarray(table)}
    )
    begun = source.into(state, plan, lambda line: None)
    np.testing.assert_array_equal(begun.parameters[NAME], table)
    np.testing.assert_array_equal(begun.optimizer.tables[NAME].master, table)


def test_a_row_moves_as_a_whole_where_its_columns_lie_on_several_devices():
    """Half of a row may have no gradient: its counts are one, on the devices of both halves."""
    from jax.sharding import NamedSharding

    from memtrain.train.row_adam import Now
    from memtrain.train.table_gradients import row_gradients_spec
    from memtrain_kernels import RowGradients

    plan = tiny.plan_of(experiment(mesh=MeshConfig(tensor=2), table_gradient="rows", slots=64))
    tables, state = plan.tables, plan.init()
    rows = np.ones((3, 16), np.float32)
    rows[0, 8:] = rows[1] = 0
    found = RowGradients(np.int32([4, 9, 30]), rows, np.int32([3]))
    place = lambda x, spec: jax.device_put(x, NamedSharding(plan.mesh, spec))  # noqa: E731
    found = jax.tree.map(place, found, row_gradients_spec(tables.spec(NAME)))
    now = Now(np.float32(0.1), np.int32(7), np.uint32(1), np.bool_(True))
    before = np.asarray(state.parameters[NAME])
    after, moments = jax.jit(tables.update)(
        {NAME: state.parameters[NAME]}, state.optimizer.tables, {NAME: found}, now
    )
    for counts in (moments[NAME].updates, moments[NAME].last_step):
        first, second = (np.asarray(shard.data) for shard in counts.addressable_shards)
        np.testing.assert_array_equal(first, second)
    assert np.flatnonzero(np.asarray(moments[NAME].updates)).tolist() == [4, 30]
    moved = np.asarray(after[NAME]) != before
    assert np.flatnonzero(moved.any(1)).tolist() == [4, 30]
    assert moved[4, :8].all() and not moved[4, 8:].any() and moved[30].all()


@pytest.mark.full
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
def test_a_table_in_bfloat16_learns_by_rows_and_whole_alike(rounding):
    """By chance too: what a number is rounded to depends on the step and its place alone."""
    by = [
        after_steps(experiment(tables="bfloat16", table_rounding=rounding, table_gradient=gradient))
        for gradient in ("rows", "dense")
    ]
    (plan, before, _, rows), (_, _, _, whole) = by
    assert rows.dtype == whole.dtype == "bfloat16"
    assert plan.skeleton.shapes["embedding"].dtype == np.float32
    rows, whole, before = (x.astype(np.float32) for x in (rows, whole, before))
    moved = np.abs(whole - before).max()
    assert moved > 0.01
    # A whole gradient of each layer is in bfloat16, one of rows in float32: where it is next to
    # nothing its sign may differ, and Adam goes by signs at first.
    differ = np.abs(rows - whole) > 1e-2 * moved + 2.0**-7 * np.abs(whole)
    assert np.mean(differ) < 1e-3


def test_float32_tables_are_not_rounded():
    with pytest.raises(BadInput, match=r"rounding=stochastic: .* model\.dtypes\.tables=bfloat16"):
        tiny.plan_of(experiment(table_rounding="stochastic"))


class ReadsByItself(ProductKeyMemoryModule):
    """Reads its table without saying so, as a layer could before there was anything to say."""

    def __call__(self, x, state, ctx):
        y, state, aux = super().__call__(x, state, dataclasses.replace(ctx, taps=None))
        return y, state, aux


def test_a_layer_that_does_not_report_its_reads_gets_a_whole_gradient(monkeypatch):
    import memtrain.memory.product_key as module

    monkeypatch.setattr(module, "ProductKeyMemory", ReadsByItself)
    tables = tiny.plan_of(experiment(slots=4096)).tables
    assert tables.names == (NAME,) and not tables.by_rows
    assert tables.why == (
        "table 'memory' gets a gradient of its size: ReadsByItself does not report what it reads "
        "of it (memtrain.memory.table.read_table does)",
    )
    with pytest.raises(BadInput, match="table_gradient=rows: table 'memory': ReadsByItself"):
        tiny.plan_of(experiment(slots=4096, table_gradient="rows"))
