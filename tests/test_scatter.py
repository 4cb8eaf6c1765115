"""Rows added in the order of their indices: the same sums, and where that is chosen."""

import chex
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fbprop
from fbprop.core import jaxcompat, scatter
from fbprop.rules import indexing

CHOICE = "rows sorted on NVIDIA GPUs"
MODES = {"clip": lax.GatherScatterMode.CLIP, "drop": lax.GatherScatterMode.FILL_OR_DROP,
         "promise_in_bounds": lax.GatherScatterMode.PROMISE_IN_BOUNDS}
ANYWHERE = [3, -1, 3, 6, 0, 7, 3, 0, -9, 99, 6]
INSIDE = [3, 1, 3, 6, 0, 6, 3, 0, 2, 2, 6]

# Shapes of table and updates, index columns, dimension numbers.
WINDOWS = {
    "rows": ((7, 3), (11, 3), 1, ((1,), (0,), (0,))),
    "columns": ((3, 7), (3, 11), 1, ((0,), (1,), (1,))),
    "rows of rank 2": ((7, 3, 2), (3, 11, 2), 1, ((0, 2), (0,), (0,))),
    "two columns": ((7, 2, 5), (11, 2), 2, ((1,), (0, 2), (2, 0))),
    "elements": ((7,), (11,), 1, ((), (0,), (0,))),
}


@pytest.fixture
def everywhere(monkeypatch):
    """Every dtype as if it were slow to add."""
    monkeypatch.setattr(scatter, "adds_by_compare_and_swap", lambda dtype: True)


def draw(i, shape):
    return jax.device_put(np.random.default_rng(i).standard_normal(shape))


def lookup(table, ids):
    return jnp.sum(jnp.sin(table[ids]) ** 2)


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint32"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", WINDOWS)
def test_same_sums(window, mode, dtype, x64):
    table, updates, columns, numbers = WINDOWS[window]
    numbers = lax.ScatterDimensionNumbers(*numbers)
    each = np.array(INSIDE if mode == "promise_in_bounds" else ANYWHERE)
    indices = np.stack([each, each[::-1] // 2][:columns], -1)
    if mode == "promise_in_bounds":
        indices = np.minimum(indices, [table[d] - 1 for d in numbers.scatter_dims_to_operand_dims])
    args = draw(0, table), jax.device_put(indices.astype(dtype)), draw(1, updates)

    @jax.jit
    def both(*args):
        mine = scatter.add_sorted(*args, numbers, MODES[mode])
        return mine, lax.scatter_add(*args, numbers, mode=MODES[mode])

    np.testing.assert_allclose(*both(*args), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["int8", "uint32"])
@pytest.mark.parametrize("mode", MODES)
def test_one_element_of_each_row(mode, dtype):
    numbers = lax.ScatterDimensionNumbers((), (1,), (1,), (0, 2), (0, 1))
    at = [[0, 3], [127, 1], [2, 127]]
    at = at if mode == "promise_in_bounds" else [[3, -1], [127, 0], [-9, 3]]
    indices = jnp.asarray(np.array(at)[..., None].astype(dtype))
    assert scatter.is_one_each((3, 150, 2), jax.typeof(indices), numbers)
    assert not scatter.is_one_each((3, 150, 4), jax.typeof(indices), numbers)
    values, expected = draw(1, (3, 2)), np.zeros((3, 150, 2))
    table, picked = draw(2, (3, 150, 2)), np.full((3, 2), np.nan)
    for (i, j), column in np.ndenumerate(np.asarray(indices, np.int64)[..., 0]):
        column = np.clip(column, 0, 149) if mode == "clip" else column
        if 0 <= column < 150:
            expected[i, column, j] = values[i, j]
            picked[i, j] = table[i, column, j]
    got = scatter.one_each((3, 150, 2), indices, values, numbers, MODES[mode])
    np.testing.assert_array_equal(got, expected)
    got = scatter.picked(table, indices, numbers, MODES[mode], None)
    np.testing.assert_array_equal(got, picked)


def test_picking_of_logits_on_a_tpu(monkeypatch, x64):
    x, labels = draw(2, (3, 4, 19)), jnp.array([[2, -1, 18, 0]] * 3)[..., None]
    chosen = lambda mode, labels=labels: lambda x: jnp.sum(
        jnp.sin(jnp.take_along_axis(jax.nn.log_softmax(x), labels, -1, mode=mode)))
    gradient = lambda fun: jax.jit(fbprop.value_and_grad(fun)).trace(x)
    text = lambda fun, platform: gradient(fun).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.gather" in text(chosen("clip"), "tpu")  # so few are not worth it
    monkeypatch.setattr(indexing, "WRITTEN", 0)
    anew = chosen("fill")
    assert "stablehlo.gather" not in text(anew, "tpu")
    assert "sum of what is picked" in str(fbprop.explain(anew, x, platform="tpu"))
    over = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    laid_out = jax.device_put(x, NamedSharding(over, P(None, "data")))
    several = jax.jit(fbprop.grad(chosen("fill"))).trace(laid_out)
    for platform in ("tpu", "cpu"):
        lowered = several.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.gather" in lowered) == (platform == "cpu")
    monkeypatch.setattr(indexing, "at_lowering", lambda *xs, tpu, **_: tpu(*xs))
    x = x[:, :, 1:]  # another shape, which nothing remembers
    funs = [chosen(mode, at) for mode, at in (("clip", labels), ("fill", labels % 18),
                                              ("fill", labels))]
    all_of = lambda ad: jax.jit(lambda x: [ad.value_and_grad(fun)(x) for fun in funs])(x)
    for got, expected in zip(jax.tree.leaves(all_of(fbprop)), jax.tree.leaves(all_of(jax))):
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-15)


def test_no_rows(everywhere):
    numbers, options = lax.ScatterDimensionNumbers((1,), (0,), (0,)), {
        "indices_are_sorted": False, "unique_indices": False, "mode": MODES["clip"]
    }
    nothing = jnp.zeros((0, 1), jnp.int32), jnp.zeros((0, 3))
    got = scatter.scatter_add(jnp.ones((5, 3)), *nothing, numbers, options)
    np.testing.assert_array_equal(got, jnp.ones((5, 3)))


@pytest.mark.parametrize("runs", [[13], [1] * 13, [1, 5, 2, 4, 1], [8, 5], [4, 9]])
def test_runs_of_any_length_keep_to_themselves(runs):
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(runs)), runs))
    values = jnp.where(ids == 0, jnp.nan, 1.0)
    numbers = lax.ScatterDimensionNumbers((), (0,), (0,))
    got = scatter.add_sorted(
        jnp.zeros(len(runs)), jnp.asarray(ids[:, None]), values, numbers, MODES["drop"]
    )
    np.testing.assert_array_equal(got, [np.nan, *runs[1:]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_summed_in_32(dtype):
    ones, numbers = jnp.ones((3001, 2), dtype), lax.ScatterDimensionNumbers((1,), (0,), (0,))
    ids = jnp.ones((3001, 1), jnp.int32)
    got = scatter.add_sorted(jnp.zeros((3, 2), dtype), ids, ones, numbers, MODES["clip"])
    assert got.dtype == dtype
    np.testing.assert_array_equal(got[1], jnp.asarray(3001.0, dtype))


def test_transformations_of_the_sorted_form(x64):
    numbers = lax.ScatterDimensionNumbers((1,), (0,), (0,))
    args = draw(0, (2, 7, 3)), jnp.asarray(ANYWHERE, "int32")[:, None], draw(1, (2, 11, 3))

    def gradients(add):
        scalar = lambda t, i, u: jnp.sum(jnp.sin(add(t, i, u)))
        return jax.jit(jax.vmap(jax.grad(scalar, (0, 2)), (0, None, 0)))(*args)

    expected = gradients(lambda t, i, u: lax.scatter_add(t, i, u, numbers, mode="clip"))
    got = gradients(lambda t, i, u: scatter.add_sorted(t, i, u, numbers, MODES["clip"]))
    chex.assert_trees_all_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("varies", [P("data"), P()])
def test_the_sorted_form_on_every_device(varies):
    numbers = lax.ScatterDimensionNumbers((1,), (0,), (0,))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def each(indices, updates):
        total = scatter.add_sorted(jnp.zeros((5, 3)), indices, updates, numbers, MODES["clip"])
        return lax.psum(total, "data")

    indices, updates = jnp.arange(24)[:, None] % 7, draw(0, (24 if len(varies) else 3, 3))
    got = jax.shard_map(each, mesh=mesh, in_specs=(P("data"), varies), out_specs=P())(
        indices, updates
    )
    updates = updates if len(varies) else jnp.tile(updates, (8, 1))
    expected = lax.scatter_add(jnp.zeros((5, 3)), indices, updates, numbers, mode="clip")
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def scatters(fun, platform, *args):
    """How many scatters, scatters to places of their own, and sorts a program has."""
    text = jax.export.export(jax.jit(fun), platforms=[platform])(*args).mlir_module()
    return [text.count(s) for s in ('stablehlo.scatter"', "unique_indices = true", ".sort\"")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_rows_meet_on_nvidia_gpus_and_nothing_is_sorted_elsewhere(dtype, everywhere):
    table, ids = jnp.ones((7, 3), dtype), jnp.asarray(INSIDE, jnp.int32)
    fun = lambda table: fbprop.grad(lookup)(table, ids)
    # The form for several devices, where rows are added as they come, is there as well.
    assert scatters(fun, "cuda", table) == [2, 1, 1]
    for platform in ("cpu", "tpu"):
        assert scatters(fun, platform, table) == [1, 0, 0]


@pytest.mark.parametrize("ids", [INSIDE, ANYWHERE, [[3, 3], [0, 3]]])
def test_gradients_by_platform(ids, everywhere, x64):
    table, ids = draw(0, (7, 5)), jnp.asarray(ids, jnp.int32)

    def results(grad):
        first = lambda table: grad(lookup)(table, ids)
        second = lambda table: jax.grad(lambda t: jnp.sum(jnp.cos(first(t))))(table)
        twice = grad(lambda t: jnp.sum(jnp.cos(first(t))))
        tables = jnp.stack([table, 2 * table])
        return [first(table), jax.jit(second)(table), twice(table), jax.vmap(first)(tables)]

    chex.assert_trees_all_close(results(fbprop.grad), results(jax.grad), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda x: x[jnp.array([1, 1])], CHOICE),
        (lambda x: x[:, jnp.array([[1, 1]])], CHOICE),
        (lambda x: x[:, 0][jnp.arange(9) % 2], CHOICE),  # more elements than places
        (lambda x: jnp.take_along_axis(x, jnp.array([[1], [0], [1]]), 1), ""),
        (lambda x: x[jnp.array([1, 0, 2]), jnp.array([1, 0, 1])], ""),
        (lambda x: x[jnp.array([1])], ""),
        (lambda x: x.at[jnp.array([2, 1])].get(unique_indices=True), ""),
        (lambda x: lax.gather(x, jnp.array([[0], [1]]), lax.GatherDimensionNumbers(
            (1, 2), (), (0,)), (2, 5)), ""),  # windows that overlap
        (lambda x: jax.vmap(lambda x, i: x[i])(x, jnp.array([[1, 1], [0, 2], [1, 1]])), ""),
    ],
)
def test_explained(read, expected):
    types = {t: jax.ShapeDtypeStruct((3, 5), t) for t in ("bfloat16", "float16")}
    taken = {
        t: [line.formulation for line in fbprop.explain(read, x).lines if line.rule == "gather"]
        for t, x in types.items()
    }
    assert taken == {"bfloat16": [expected], "float16": [""]}


@pytest.mark.parametrize(
    ("version", "slow"),
    [("0.10.1", False), ("0.10.2", True), ("0.11.0", True), ("0.11.1", False), ("0.12.0.1", False)],
)
def test_float32_is_slow_in_two_releases(version, slow, monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", version)
    test = jaxcompat.adds_by_compare_and_swap.__wrapped__
    found = [test(jnp.dtype(t)) for t in ("float32", "bfloat16", "float16", "float64")]
    assert found == [slow, True, False, False]
