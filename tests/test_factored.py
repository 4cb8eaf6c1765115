"""Cotangents carried unevaluated: what they are worth, and what loops do with them."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fbprop
from fbprop.core import factored


def draw(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape, "float32"))


PRODUCTS = {
    "matrix": ("bi,ij->bj", (5, 2), (2, 3)),
    "rank 3": ("bti,ij->btj", (2, 3, 5), (5, 2)),
    "batch": ("nij,njk->nik", (2, 3, 5), (2, 5, 7)),
    "order": ("bi,jik->kbj", (5, 2), (3, 2, 7)),
    "scalar": ("i,i->", (5,), (5,)),
}


@pytest.mark.parametrize(("numbers", "x", "w"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_gives_its_factors(numbers, x, w):
    x, w = draw(0, *x), draw(1, *w)

    def loss(x, w):
        return jnp.sum(jnp.sin(jnp.einsum(numbers, x, w)))

    gradient = jax.jit(fbprop.grad(loss, (0, 1), factored=True))(x, w)
    assert [type(d) for d in gradient] == [fbprop.Contraction] * 2
    assert [(d.shape, d.dtype) for d in gradient] == [(a.shape, a.dtype) for a in (x, w)]
    chex.assert_trees_all_close(
        tuple(d.dense() for d in gradient), jax.jit(jax.grad(loss, (0, 1)))(x, w),
        rtol=1e-5, atol=1e-6)


def test_looked_up_rows_come_as_rows():
    table, at = draw(0, 7, 3), jnp.array([2, 5, 2])
    gradient = fbprop.grad(lambda t: jnp.sum(t[at] ** 2), factored=True)(table)
    assert type(gradient) is fbprop.Rows
    assert gradient.values.shape == (3, 3)
    expected = jax.jit(jax.grad(lambda t: jnp.sum(t[at] ** 2)))(table)
    chex.assert_trees_all_close(gradient.dense(), expected, rtol=1e-6)
    chex.assert_trees_all_close(gradient.add_to(table), table + expected, rtol=1e-6)
    assert repr(gradient) == "<Rows float32[7, 3]>"


def test_sums_and_other_cotangents_are_arrays():
    w, at = draw(0, 3, 3), jnp.array([0, 2])
    both = fbprop.grad(lambda w: jnp.sum(w[at] @ w), factored=True)(w)
    chex.assert_trees_all_close(both, jax.jit(jax.grad(lambda w: jnp.sum(w[at] @ w)))(w), rtol=1e-6)
    assert isinstance(fbprop.grad(lambda w: jnp.sum(jnp.sin(w)), factored=True)(w), jax.Array)


def test_arrays_by_default():
    assert isinstance(fbprop.grad(lambda w: jnp.sum(w @ w))(draw(0, 3, 3)), jax.Array)


# Loops, of x and h -> h, y: what each of their products is made of.
def recurrent(p, h, x):
    h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
    return h, h


def twice(p, h, x):
    h = jnp.tanh(h @ p["u"] + jnp.sin(x @ p["w"]) @ p["u"])
    return h, h


def transposed(p, h, x):
    h = jnp.tanh(jnp.einsum("ij,bj->bi", p["u"], h) + x @ p["w"])
    return h, x


def looked_up(p, h, x):
    row = p["w"][jnp.argmax(x, -1)]  # as many rows as x has entries
    h = jnp.tanh(row + h @ p["u"])
    return h, h * row


def scaled(p, h, x):
    weights = (p["u"] * 0.5).astype(h.dtype)
    return jnp.tanh(h @ weights + x @ p["w"]), jnp.sum(x @ p["w"])


def without_carry(p, h, x):
    return h, jnp.sin(x @ p["w"]) * (x @ x.T)[:, :1]


LOOPS = [recurrent, twice, transposed, looked_up, scaled, without_carry]


def over_time(step, p, h, xs, **options):
    h, ys = lax.scan(lambda h, x: step(p, h, x), h, xs, **options)
    return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.cos(ys))


@pytest.mark.parametrize("length", [1, 16, 19, 24])
@pytest.mark.parametrize("step", LOOPS)
def test_loops_in_chunks(step, length):
    p = {"w": draw(0, 3, 5), "u": draw(1, 5, 5) / 2, "b": draw(2, 5)}
    h, xs = draw(3, 2, 5), draw(4, length, 2, 3)
    args = (p, h, xs)

    def loss(*args):
        return over_time(step, *args, reverse=length == 19, unroll=2 if length == 24 else 1)

    both = lambda *args: [ad.grad(loss, (0, 1, 2))(*args) for ad in (fbprop, jax)]
    chex.assert_trees_all_close(*jax.jit(both)(*args), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("step", [recurrent, looked_up])
def test_a_loop_sums_products_not_steps(step):
    """Nothing of the weight's size is added up, or filled with zeros, in the steps themselves."""
    p = {"w": draw(0, 3, 5), "u": draw(1, 5, 5), "b": draw(2, 5)}
    h, xs = draw(3, 2, 5), draw(4, 32, 2, 3)
    jaxpr = jax.make_jaxpr(fbprop.grad(lambda p: over_time(step, p, h, xs)))(p)
    chunks = [e for e in loops(jaxpr.jaxpr) if e.params["length"] == 4]
    assert len(chunks) == 1
    (steps,) = loops(chunks[0].params["jaxpr"])
    assert not {(3, 5), (5, 5)} & {v.aval.shape for v in steps.outvars}


def loops(jaxpr):
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        elif "jaxpr" in eqn.params:
            yield from loops(eqn.params["jaxpr"])


def test_second_derivatives_of_a_loop_in_chunks():
    p = {"w": draw(0, 3, 5), "u": draw(1, 5, 5) / 2, "b": draw(2, 5)}
    h, xs = draw(3, 2, 5), draw(4, 16, 2, 3)

    def of(grad):
        def along(p):
            return sum(jnp.vdot(d, jnp.cos(d)) for d in jax.tree.leaves(
                grad(lambda p: over_time(recurrent, p, h, xs))(p)))

        return jax.jit(grad(along))(p)

    chex.assert_trees_all_close(of(fbprop.grad), of(jax.grad), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_loop_in_chunks_on_every_device(check_vma):
    p = {"w": draw(0, 3, 5), "u": draw(1, 5, 5) / 2, "b": draw(2, 5)}
    xs, h = draw(4, 16, 8, 3), jnp.zeros((8, 5))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    share = P(None, "data")

    def over_devices(p, xs):
        def each(p, h, xs):
            return lax.psum(over_time(looked_up, p, h, xs), "data")

        return jax.shard_map(each, mesh=mesh, in_specs=(P(), P("data"), share), out_specs=P(),
                             check_vma=check_vma)(p, h, xs)

    expected = jax.jit(jax.grad(lambda p, xs: over_time(looked_up, p, h, xs), (0, 1)))(p, xs)
    got = jax.jit(fbprop.grad(over_devices, (0, 1)))(p, xs)
    chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("axes", [(0, None), (None, 2)])
def test_a_batch_of_loops_in_chunks(axes):
    p = {"w": draw(0, 3, 5), "u": draw(1, 5, 5) / 2, "b": draw(2, 5)}
    xs, h = draw(4, 16, 2, 3), jnp.zeros((2, 5))
    p = p if axes[0] is None else jax.tree.map(lambda x: jnp.stack([x, 2 * x]), p)
    xs = xs if axes[1] is None else jnp.stack([xs, 2 * xs], 2)

    def gradients(grad):
        one = lambda p, xs: grad(lambda p: over_time(looked_up, p, h, xs))(p)
        return jax.jit(jax.vmap(one, axes))(p, xs)

    chex.assert_trees_all_close(gradients(fbprop.grad), gradients(jax.grad), rtol=2e-5, atol=2e-6)


def test_a_constant_of_a_gate_is_not_kept_twice():
    def step(h, x):
        z = jax.nn.sigmoid(x)
        return (1 - z) * h + z * jnp.tanh(x), None

    _, pullback = fbprop.vjp(lambda x: lax.scan(step, jnp.zeros(1024), x)[0], draw(0, 16, 1024))
    # Per step z, h and tanh x, but not 1 − z.
    assert sum(x.size for x in jax.tree.leaves(pullback)) == 3 * 16 * 1024


def picked(log_p, labels):
    return jnp.take_along_axis(log_p, labels[..., None], axis=-1)


def indexed(log_p, labels):
    return log_p[jnp.arange(len(labels)), labels]


def one_row(log_p, labels):
    return log_p[labels[0]] ** 2


def clipped(log_p, labels):
    return jnp.take_along_axis(log_p, labels[:, None] + 5, axis=-1, mode="clip")


def outside(log_p, labels):
    return jnp.take_along_axis(log_p, labels[:, None] + 5, axis=-1, mode="fill", fill_value=0)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("pick", [picked, indexed, one_row, clipped, outside])
def test_log_softmax_of_a_few_elements(pick, axis):
    x, labels = draw(0, 3, 7), jnp.array([2, 0, 2])

    def loss(x):
        return jnp.mean(jnp.sin(pick(jax.nn.log_softmax(x, axis=axis), labels)))

    chex.assert_trees_all_close(
        jax.jit(fbprop.grad(loss))(x), jax.grad(loss)(x), rtol=1e-5, atol=1e-6
    )


def test_a_loss_by_labels_needs_no_dense_scatter_and_no_log_probabilities(monkeypatch):
    monkeypatch.setattr(factored, "at_lowering", lambda *xs, cpu, **_: cpu(*xs))
    x, labels = draw(0, 3, 7), jnp.array([2, 0, 2])
    _, pullback = fbprop.vjp(lambda x: jnp.mean(picked(jax.nn.log_softmax(x), labels)), x)
    assert [y.size for y in jax.tree.leaves(pullback) if y.size == x.size] == [x.size]  # x itself
    whole = [e for e in equations(jax.make_jaxpr(pullback)(1.0)) if e.outvars[0].aval.size == 21]
    assert [e.primitive.name for e in whole].count("scatter-add") == 1
    assert "broadcast_in_dim" not in [e.primitive.name for e in whole]


def test_elsewhere_than_on_cpus(monkeypatch):
    """One element of each row is chosen; rows twice are two arrays, of which XLA makes one."""
    x, table, labels = draw(0, 3, 7), draw(1, 5, 2), jnp.array([2, 0, 2])
    losses = {
        "labels": (lambda x: jnp.sum(picked(jax.nn.log_softmax(x), labels)), x, False),
        "labels, and more": (lambda x: jnp.sum(picked(x, labels) ** 2) + jnp.sum(x**2), x, False),
        "table twice": (lambda t: jnp.sum(t[labels] * t[labels + 1]), table, True),
    }
    for loss, x, scatters in losses.values():
        gradient = jax.jit(fbprop.grad(loss, factored=fbprop.Rows))
        expected = jax.jit(jax.grad(loss))(x)
        chex.assert_trees_all_close(gradient(x), expected, rtol=1e-5, atol=1e-6)
        for platform in "cuda", "tpu":
            text = gradient.trace(x).lower(lowering_platforms=(platform,)).as_text()
            assert ('stablehlo.scatter"' in text) == scatters
        with monkeypatch.context() as patch:
            for choice in "by_platform", "at_lowering":
                patch.setattr(factored, choice, lambda *xs, default, **_: default(*xs))
            there = jax.jit(fbprop.grad(loss, factored=fbprop.Rows))(x)
        chex.assert_trees_all_close(there, expected, rtol=1e-5, atol=1e-6)


def equations(jaxpr):
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        if "jaxpr" in eqn.params:
            yield from equations(eqn.params["jaxpr"])
        if "branches" in eqn.params:  # the form for one device
            yield from equations(eqn.params["branches"][-1])


TALL = {
    "weight": lambda x, w: jnp.sin(x @ w) @ jnp.ones((6, 3)),
    "transposed weight": lambda x, w: x @ jnp.swapaxes(jnp.swapaxes(w, 0, 1), 0, 1),
    "table as head": lambda x, w: jnp.sin(x[..., :6]) @ w.T,
    "several dimensions": lambda x, w: jnp.einsum("bti,ihd->bthd", x, w.reshape(24, 2, 3)),
    "in a call": lambda x, w: jax.jit(jnp.matmul)(x, w),
}


@pytest.mark.parametrize("fun", TALL.values(), ids=TALL)
@pytest.mark.parametrize("jitted", [True, False])
def test_tall_products_are_turned(fun, jitted):
    """Of 1,024 terms or more: the same numbers, however they are computed."""
    x, w = draw(0, 4, 256, 24) / 8, draw(1, 24, 6)

    def loss(x, w):
        return jnp.sum(jnp.sin(fun(x, w)))

    gradient = fbprop.grad(loss, (0, 1))
    assert "platform_index" in str(jax.make_jaxpr(gradient)(x, w))
    got = (jax.jit(gradient) if jitted else gradient)(x, w)
    chex.assert_trees_all_close(got, jax.jit(jax.grad(loss, (0, 1)))(x, w), rtol=1e-4, atol=1e-4)


def test_xla_computes_the_wide_product():
    x, dy = draw(0, 1024, 24), draw(1, 1024, 6)

    def weight_gradient(x, dy):
        return fbprop.vjp(lambda w: x @ w, jnp.zeros((24, 6)))[1](dy)

    def products(platform):
        lowered = jax.jit(weight_gradient).trace(x, dy).lower(lowering_platforms=(platform,))
        return [line for line in lowered.as_text().splitlines() if "dot_general" in line]

    compiled = jax.jit(weight_gradient).lower(x, dy).compile().as_text()
    assert "f32[6,24]" in compiled
    assert "-> tensor<6x24xf32>" in "".join(products("cpu"))
    assert "-> tensor<24x6xf32>" in "".join(products("cuda"))


@pytest.mark.parametrize(("x", "w"), [
    ((512, 24), (24, 6)), ((1024, 6), (6, 24)), ((1024, 6), (6, 6))
])
def test_other_products_are_not_turned(x, w):
    explained = fbprop.explain(lambda w: jnp.sum(jnp.sin(draw(0, *x) @ w)), draw(1, *w))
    assert "turned" not in str(explained)


def test_turning_is_explained():
    fun = lambda w: jnp.sum(jnp.sin(draw(0, 4, 256, 24) @ w))
    assert fbprop.explain(fun, draw(1, 24, 6)).lines[0].formulation == "b̄ turned on CPUs"


def test_a_transposed_weight_gives_its_factors():
    x, w = draw(0, 7, 5), draw(1, 3, 5)
    (dw,) = fbprop.vjp(lambda w: x @ w.T, w, factored=True)[1](jnp.ones((7, 3)))
    assert isinstance(dw, fbprop.Contraction)
    assert dw.shape == w.shape
    chex.assert_trees_all_close(dw.dense(), jnp.ones((7, 3)).T @ x, rtol=1e-5)


@pytest.mark.parametrize(("form", "types"), [
    (fbprop.Rows, (fbprop.Rows, jax.Array)), (fbprop.Contraction, (jax.Array, fbprop.Contraction)),
    (True, (fbprop.Rows, fbprop.Contraction)), (False, (jax.Array, jax.Array)),
])
def test_one_form_only(form, types):
    def loss(table, w):
        return jnp.sum(jax.jit(lambda t, w: t[jnp.array([1, 1])] @ w)(table, w))

    args = draw(0, 7, 5), draw(1, 5, 3)
    got = fbprop.grad(loss, (0, 1), factored=form)(*args)
    assert all(map(isinstance, got, types))
    chex.assert_trees_all_close(
        tuple(g if isinstance(g, jax.Array) else g.dense() for g in got),
        jax.jit(jax.grad(loss, (0, 1)))(*args), rtol=1e-5,
    )


def test_an_unknown_form():
    with pytest.raises(TypeError, match=r"got 'rows' expected True, False, fbprop\.Rows"):
        fbprop.grad(jnp.sum, factored="rows")(jnp.ones(3))


@pytest.mark.parametrize(("platform", "merged"), [("cpu", True), ("cuda", True), ("tpu", False)])
def test_dimensions_summed_over_are_merged_but_for_a_tpu(platform, merged):
    loss = lambda w, x: jnp.sum(jnp.sin(x @ w))
    traced = jax.jit(fbprop.grad(loss)).trace(jnp.ones((5, 7)), jnp.ones((2, 3, 5)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    constants = set(re.findall(r"constant dense<(true|false)> : tensor<i1>", text))
    assert constants == {"true" if merged else "false"}
