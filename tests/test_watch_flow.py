"""`watch.value_and_grad`: the gradient as ever, and what was seen on its way, against slow forms.

The slow form of a cotangent's statistic: a function with zeros added where the value is, whose
gradient the cotangent is; of a loop's steps the loop written out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fbprop
from fbprop import watch

CLOSE = {"rtol": 1e-12, "atol": 1e-14}
NAMES = "norm", "max_abs", "zeros", "finite"
EXACT = {
    "norm": lambda x: np.sqrt(np.sum(np.abs(x) ** 2)),
    "max_abs": lambda x: np.max(np.abs(x)),
    "zeros": lambda x: np.mean(x == 0),
    "finite": lambda x: np.mean(np.isfinite(x)),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def network(p, x, at=None):
    """A scoped layer, a jitted one with a branch, a rematerialised one; ``at``: values to add."""
    add = lambda name, h: h if at is None else h + at[name]

    with jax.named_scope("first"):
        h = add("first/jax.nn.relu", jax.nn.relu(x @ p["w"] + p["b"]))

    @jax.jit
    def second(h):
        with jax.named_scope("second"):
            h = add("second/tanh", jnp.tanh(h @ p["v"]))
        return lax.cond(jnp.sum(x) > 1e9, jnp.exp, lambda h: add("cos", jnp.cos(h)), h)

    @jax.checkpoint
    def third(h):
        with jax.named_scope("third"):
            return add("third/sin", jnp.sin(h @ p["v"]))

    return add("reduce_sum", jnp.sum(third(second(h)) ** 2))


def cell(p, c, x, at=0.0):
    with jax.named_scope("cell"):
        c = jnp.tanh(c @ p["w"] + x) + at
    return c, jnp.sum(c)


def recurrent(p, xs):
    with jax.named_scope("loop"):
        c, ys = lax.scan(lambda c, x: cell(p, c, x), jnp.zeros(3), xs, reverse=True)
    return jnp.sum(c ** 2) + jnp.sum(jnp.sin(ys))


def written_out(p, xs, at):
    c, total = jnp.zeros(3), 0.0
    for i in reversed(range(len(xs))):
        c, y = cell(p, c, xs[i], at[i])
        total = total + jnp.sin(y)
    return jnp.sum(c ** 2) + total


def problem():
    p = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 4, 4)}
    return p, normal(3, 5, 3)


def by_name(report):
    return {f"{r['path']}/{r['primitive']}".strip("/"): r for r in report.rows()}


def assert_trees_equal(a, b, **close):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **close), a, b)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_statistics_of_values_and_cotangents(wrap, x64):
    p, x = problem()
    (value, gradient), report = wrap(watch.value_and_grad(network))(p, x)
    assert_trees_equal((value, gradient), fbprop.value_and_grad(network)(p, x), **CLOSE)
    seen = {}

    def values(p, at):  # every value, and its cotangent as the gradient in what is added to it
        class Recorded(dict):
            def __getitem__(self, name):
                return at[name]

        return network(p, x, Recorded())

    h = jax.nn.relu(x @ p["w"] + p["b"])
    seen["first/jax.nn.relu"] = h
    seen["second/tanh"] = h = jnp.tanh(h @ p["v"])
    seen["cos"] = h = jnp.cos(h)
    seen["third/sin"] = h = jnp.sin(h @ p["v"])
    seen["reduce_sum"] = jnp.sum(h ** 2)
    cotangents = jax.jit(jax.grad(values, 1))(p, jax.tree.map(jnp.zeros_like, seen))
    rows = by_name(report)
    assert set(rows) == {*seen, "exp"}
    for name, array in seen.items():
        for of in NAMES:
            expected = EXACT[of](np.asarray(array)), EXACT[of](np.asarray(cotangents[name]))
            found = rows[name]["value"][of], rows[name]["cotangent"][of]
            np.testing.assert_allclose(found, expected, rtol=1e-6 if of in NAMES[2:] else 1e-12)
    assert rows["exp"]["value"] == rows["exp"]["cotangent"] == dict.fromkeys(NAMES)  # not taken
    assert "test_watch_flow.py" in rows["second/tanh"]["line"]
    assert rows["second/tanh"]["type"] == "float64[5,4]"


def test_a_loop_is_seen_step_by_step(x64):
    p, xs = {"w": normal(0, 3, 3)}, normal(1, 4, 3)
    (value, gradient), report = jax.jit(watch.value_and_grad(recurrent))(p, xs)
    plain = jax.jit(jax.value_and_grad(written_out, (0, 2)))
    expected, (by_p, by_at) = plain(p, xs, jnp.zeros((4, 3)))
    assert_trees_equal((value, gradient), (expected, by_p), **CLOSE)
    row = by_name(report)["loop/cell/add"]
    assert row["steps"] == [4]
    np.testing.assert_allclose(row["cotangent"]["norm"], np.linalg.norm(by_at, axis=1), rtol=1e-12)
    cs, c = [None] * 4, jnp.zeros(3)
    for i in reversed(range(4)):
        cs[i] = c = cell(p, c, xs[i])[0]
    np.testing.assert_allclose(row["value"]["max_abs"], np.max(np.abs(cs), 1), rtol=1e-12)
    assert "4 x float64[3]" in report.table()
    assert ".." in report.table()


def test_loops_in_loops_and_branches_in_loops(x64):
    def inner(c, x):
        return lax.cond(x > 0, lambda c: jnp.sin(c), lambda c: jnp.exp(-c), c), None

    def loss(c, xs):
        return jnp.sum(lax.scan(lambda c, x: lax.scan(inner, c, x), c, xs)[0] ** 2)

    xs = jnp.array([[1.0, -1.0, 2.0], [-3.0, 1.0, -1.0]])
    (_, gradient), report = watch.value_and_grad(loss, of=[watch.norm])(normal(0, 3), xs)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(loss))(normal(0, 3), xs), **CLOSE)
    rows = by_name(report)
    assert rows["sin"]["steps"] == [2, 3]
    for name, taken in (("sin", xs > 0), ("exp", xs <= 0)):
        there = [[v is not None for v in step] for step in rows[name]["cotangent"]["norm"]]
        np.testing.assert_array_equal(there, taken)


def test_under_vmap_and_averaged(x64):
    p, x = problem()
    examples = jnp.stack([x, 2 * x])
    watched = watch.value_and_grad(network, of=[watch.norm])
    both, report = jax.jit(jax.vmap(watched, (None, 0)))(p, examples)
    for i in range(2):
        one = jax.tree.map(lambda a: a[i], (both, report))
        assert_trees_equal(one, watched(p, examples[i]), **CLOSE)
    assert len(report.rows()[0]["value"]["norm"]) == 2
    mean = jax.tree.map(lambda a: jnp.mean(a, 0), report)
    np.testing.assert_allclose(
        mean.rows()[0]["value"]["norm"], np.mean(report.rows()[0]["value"]["norm"])
    )


def test_over_eight_devices():
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    p = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 4, 4)}
    x = normal(3, 16, 3)
    watched = jax.jit(watch.value_and_grad(network))
    shared = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    assert_trees_equal(watched(p, shared), watched(p, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tracked", [True, False])
def test_inside_shard_map(tracked):
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    w, x = normal(0, 3, 4), normal(1, 16, 3)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("batch")),
        out_specs=PartitionSpec(), check_vma=tracked,
    )
    def loss(w, x):
        return lax.pmean(jnp.mean(jnp.tanh(x @ w) ** 2), "batch")

    (_, gradient), report = jax.jit(watch.value_and_grad(loss, where="*tanh"))(w, x)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(loss))(w, x), rtol=1e-5)
    (row,) = report.rows()
    assert (row["steps"], row["type"]) == ([8], "float32[2,4]")
    parts = np.split(np.tanh(x @ w), 8)
    for which, expected in (("value", parts), ("cotangent", [2 * p / 64 for p in parts])):
        norms = [np.linalg.norm(p) for p in expected]
        np.testing.assert_allclose(row[which]["norm"], norms, rtol=1e-5)


def test_arguments_as_of_value_and_grad():
    def loss(a, b, *, scale):
        return jnp.sum(jnp.sin(a) * b) * scale, {"a": a, "n": 3, "text": "as it is"}

    watched = watch.value_and_grad(loss, argnums=(1, 0), has_aux=True)
    ((value, aux), gradient), _ = watched(jnp.ones(2), jnp.ones(2), scale=2.0)
    assert aux["text"] == "as it is"
    assert aux["n"] == 3
    expected, by_both = fbprop.value_and_grad(loss, (1, 0), has_aux=True)(
        jnp.ones(2), jnp.ones(2), scale=2.0
    )
    assert_trees_equal((value, gradient), (expected[0], by_both))
    assert isinstance(gradient, tuple)
    second = jax.grad(lambda x: watch.value_and_grad(lambda x: jnp.sin(x))(x)[0][1])(1.0)
    np.testing.assert_allclose(second, -np.sin(1.0), rtol=1e-6)


def test_patterns_and_statistics_of_ones_own(x64):
    def largest_two(x):
        return lax.top_k(jnp.abs(x).reshape(-1), 2)[0]

    def count(x):
        return jnp.sum(x > 0)

    p, x = problem()
    only = watch.value_and_grad(network, where="second/*", of=[largest_two, count])
    _, report = jax.jit(only)(p, x)
    (row,) = report.rows()
    assert (row["path"], row["primitive"]) == ("second", "tanh")
    h = np.tanh(np.maximum(x @ p["w"] + p["b"], 0) @ p["v"])
    np.testing.assert_allclose(
        row["value"]["largest_two"], np.sort(np.abs(h).ravel())[:-3:-1], rtol=1e-12
    )
    assert row["value"]["count"] == np.sum(h > 0)
    _, report = watch.value_and_grad(network, where="*dot_general")(p, x)
    assert [r["primitive"] for r in report.rows()] == ["dot_general"] * 3
    _, report = watch.value_and_grad(network, where="*relu")(p, x)
    assert [r["primitive"] for r in report.rows()] == ["jax.nn.relu"]


def test_overrides_hold_and_an_own_rule_is_seen():
    feedback = fbprop.rule("tanh", "x̄ = 3 ȳ", x=lambda dy: 3 * dy)
    table = fbprop.table.override(feedback, where="second/*")
    p, x = problem()
    both, report = watch.value_and_grad(network, rules=table)(p, x)
    assert_trees_equal(both, fbprop.value_and_grad(network, rules=table)(p, x), rtol=1e-6)
    assert "second/tanh" in by_name(report)


def test_what_goes_wrong_is_said_in_a_sentence():
    p, x = problem()
    with pytest.raises(ValueError, match=r"where is a pattern.*got 'secnd/tanh'.*'second/tanh'"):
        watch.value_and_grad(network, where="secnd/tanh")(p, x)
    with pytest.raises(TypeError, match="Statistics are named functions.*got 'norm'"):
        watch.value_and_grad(network, of=["norm"])
    with pytest.raises(ValueError, match=r"told apart by their names, got \['norm', 'norm'\]"):
        watch.value_and_grad(network, of=[watch.norm, watch.norm])
    with pytest.raises(TypeError, match="With has_aux=True the function returns a pair"):
        watch.value_and_grad(network, has_aux=True)(p, x)
    with pytest.raises(TypeError, match="scalar-output functions"):
        watch.value_and_grad(lambda x: x)(x)


def test_derivatives_inside_the_function():
    def loss(w):
        return jax.grad(lambda x: jnp.sin(w * x))(2.0) ** 2

    _, report = watch.value_and_grad(loss)(1.0)
    assert [r["primitive"] for r in report.rows()] == ["integer_pow"]
    _, report = watch.value_and_grad(loss, where="*cos")(1.0)
    assert [r["primitive"] for r in report.rows()] == ["cos"]


def deep(ws, x):
    def block(x, w):
        return x + jax.nn.gelu(x @ w), None

    for w in ws:
        x = jax.checkpoint(lambda x, w: block(jax.nn.relu(block(x, w)[0]) * 2.0, w)[0])(x, w)
    return jnp.sum(x ** 2)


def plain(ws, x):
    for w in ws:
        h = x @ w
        h = (h - jnp.mean(h, -1, keepdims=True)) * 3.0
        x = jax.nn.relu(h * jnp.exp(h))
    return jnp.sum(x ** 2)


@pytest.mark.parametrize("loss", [deep, plain])
def test_memory_is_that_of_the_gradient(loss):
    args = jnp.ones((6, 16, 16)) / 16, jnp.ones((512, 16))
    ours = jax.jit(watch.value_and_grad(loss, of=[watch.norm]))
    ours, other = (
        jax.jit(f).lower(*args).compile(compiler_options={"xla_backend_optimization_level": 1})
        for f in (ours, fbprop.value_and_grad(loss))
    )
    sizes = [f.memory_analysis().temp_size_in_bytes for f in (ours, other)]
    assert sizes[0] <= 1.05 * sizes[1], sizes
