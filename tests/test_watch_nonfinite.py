"""`watch.first_nonfinite`: the operation that made a nan, right where debuggers are not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fbprop
from fbprop import watch

X = np.array([-1.0, 0.5, 2.0], "float32")


def scope(name, fun):
    def scoped(*args):
        with jax.named_scope(name):
            return fun(*args)

    return scoped


def masked_forward(x):
    """log(-1) is masked, and its slope is finite; the nan is made by what follows."""
    y = scope("masked", lambda x: jnp.where(x > 0, jnp.log(x), 1.0))(x)
    return jnp.sum(scope("made", lambda y: (y - y) / (y - y))(y))


def masked_backward(x):
    """A nan cotangent is selected away; another one is not."""
    safe = scope("masked", lambda x: jnp.where(x > 0, x, 0.0))(x)
    rooted = scope("also", jnp.sqrt)(jnp.where(safe > 0, safe, 4.0))
    return jnp.sum(rooted) + jnp.sum(scope("made", jnp.sqrt)(jnp.abs(x - 0.5)) * 0.0)


def root_under_where(x):
    """sqrt(-1) is masked, and comes back as nan * 0."""
    return jnp.sum(jnp.where(x > 0, scope("root", jnp.sqrt)(x), 0.0))


def loop(x):
    def step(c, t):
        return scope("cell", lambda c: jnp.exp(c))(c), c * t

    _, ys = scope("rnn", lambda x: lax.scan(step, x, jnp.arange(5.0)))(x)
    return jnp.sum(ys)


def loop_backward(x):
    """Step 1 of 0..3 takes the root of 0 (of its carry), run in reverse."""
    def step(c, t):
        return c + scope("root", jnp.sqrt)(jnp.abs(jnp.sum(c) * t)), None

    c, _ = lax.scan(step, x[1], jnp.array([1.0, 0.0, 1.0, 1.0]), reverse=True)
    return c


def constant_of_a_loop(w):
    """A weight used in every step, whose pullback is infinite in step 2."""
    def step(c, t):
        return c + jnp.sum(scope("root", jnp.sqrt)(t * w * w)), None

    return lax.scan(step, 0.0, jnp.array([1.0, 1.0, 0.0]))[0]


def branches(x):
    taken = scope("taken", lambda x: jnp.log(x * 0.0))
    return jnp.sum(lax.cond(x[0] < 0, taken, lambda x: x / 0.0, x))


def attention_of_nothing(x):
    """A row of nothing but -inf, which was meant, makes softmax nan."""
    masked = scope("mask", lambda x: jnp.where(x > 9, x, -jnp.inf))(x)
    return jnp.sum(scope("scores", jax.nn.softmax)(masked))


def overflow_before_nan(x):
    """inf - inf: who overflowed is to blame."""
    big = scope("grows", lambda x: jnp.exp(x * 100.0))(x)
    return jnp.sum(scope("differs", lambda y: y - y)(big))


def overflow_that_vanishes(x):
    """1 / inf = 0 forward; backward nan. The overflow came first."""
    big = scope("grows", lambda x: jnp.exp(x * 100.0))(x)
    return jnp.sum(1.0 / big)


def half(x):
    """The first to leave float16's range, in a network that ends in float32."""
    h = x.astype("float16") * jnp.float16(200)
    h = scope("squares", lambda h: h * h)(h)
    return jnp.sum(h.astype("float32"))


@jax.custom_jvp
def wrong(x):
    return x * 2


@wrong.defjvp
def _(primals, tangents):
    return wrong(*primals), tangents[0] * (primals[0] / 0.0)


@jax.custom_vjp
def broken(x):
    return jnp.sin(x)


broken.defvjp(lambda x: (jnp.sin(x), x), lambda x, dy: (dy * jnp.nan,))


def rematerialised(x):
    f = jax.checkpoint(lambda x: scope("inside", jnp.sqrt)(jnp.sin(x) ** 2))
    return jnp.sum(f(x * jnp.array([0.0, 1.0, 1.0])))


CASES = {
    "masked forward": (masked_forward, "made", "div", "forward", "nan", ()),
    "masked backward": (masked_backward, "made", "sqrt", "backward", "nan", ()),
    "root under where": (root_under_where, "root", "sqrt", "forward", "nan", ()),
    "loop": (loop, "rnn/cell", "exp", "forward", "inf", (4,)),
    "loop backward": (loop_backward, "root", "sqrt", "backward", "inf", (1,)),
    "constant of a loop": (constant_of_a_loop, "root", "sqrt", "backward", "inf", (2,)),
    "branches": (branches, "taken", "log", "forward", "inf", ()),
    "attention of nothing": (attention_of_nothing, "scores", "jax.nn.softmax", "forward", "nan",
                             ()),
    "overflow before nan": (overflow_before_nan, "grows", "exp", "forward", "inf", ()),
    "overflow that vanishes": (overflow_that_vanishes, "grows", "exp", "forward", "inf", ()),
    "half": (half, "squares", "mul", "forward", "inf", ()),
    "custom jvp": (lambda x: jnp.sum(scope("own", wrong)(x)), "own", "custom_jvp_call wrong",
                   "backward", "inf", ()),
    "custom vjp": (lambda x: jnp.sum(scope("own", broken)(x)), "own", "custom_vjp_call",
                   "backward", "nan", ()),
    "rematerialised": (rematerialised, "inside", "sqrt", "backward", "inf", ()),
    "jitted": (jax.jit(lambda x: jnp.sum(scope("inside", lambda x: x / 0.0)(x))), "inside", "div",
               "forward", "inf", ()),
}
AT = {"loop": np.full(3, 0.1, "float32"), "constant of a loop": np.full(3, 1.0, "float32")}


@pytest.mark.parametrize("name", CASES)
def test_the_operation_that_made_it(name):
    fun, path, primitive, direction, kind, steps = CASES[name]
    _, found = jax.jit(watch.first_nonfinite(fun))(jnp.asarray(AT.get(name, X)))
    origin = found.first()
    assert origin is not None
    got = origin.path, origin.primitive, origin.direction, origin.kind, origin.steps
    assert got == (path, primitive, direction, kind, steps)
    assert "test_watch_nonfinite.py" in origin.line


def test_ranges_and_the_sentence():
    (value, gradient), found = watch.first_nonfinite(root_under_where)(X)
    np.testing.assert_allclose(value, np.sqrt(0.5) + np.sqrt(2), rtol=1e-6)
    assert np.isnan(gradient[0])
    assert found
    assert found.first().operands == (("float32[3]", -1.0, 2.0),)
    assert str(found).startswith(
        "the first number that is not finite is nan, made by sqrt going forward (path 'root', at "
    )
    assert str(found).endswith("of float32[3] from -1 to 2")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_what_is_finite_is_the_gradient_as_ever(wrap, x64):
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"]) ** 2), "aux"

    def only(f):
        return lambda *args: jax.tree.map(lambda x: None if x == "aux" else x, f(*args))

    p, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    watched = only(watch.first_nonfinite(loss, has_aux=True))
    both, found = wrap(watched)(p, x)
    expected = only(fbprop.value_and_grad(loss, has_aux=True))(p, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), both, expected)
    assert not found
    assert found.first() is None
    assert str(found) == "all numbers are finite"


def test_what_is_given_is_named():
    def loss(p, batch, *, scale):
        return jnp.sum(p["w"] * batch["x"]) * scale + jnp.sum(batch["n"])

    watched = watch.first_nonfinite(loss)
    good = {"w": X}, {"x": X, "n": np.arange(3.0, dtype="float32")}
    bad = {"x": X * np.array([1, np.nan, 1], "float32"), "n": good[1]["n"]}
    _, found = watched(good[0], bad, scale=jnp.float32(1.0))
    assert (found.first().direction, found.first().primitive) == ("given", "argument batch['x']")
    assert str(found) == "the first number that is not finite is nan in argument batch['x']"
    _, found = watched({"w": X * np.float32(np.inf)}, good[1], scale=jnp.float32(1.0))
    assert str(found) == "the first number that is not finite is inf in argument p['w']"
    _, found = watched(*good, scale=jnp.float32(np.inf))
    assert str(found) == "the first number that is not finite is inf in argument scale"
    _, found = watch.first_nonfinite(lambda x: jnp.sum(x * jnp.array([1.0, np.inf, 1.0])))(X)
    assert str(found) == "the first number that is not finite is inf in a constant"


def test_under_vmap_each_example_has_its_own():
    def loss(x):
        return scope("a", jnp.log)(x) + scope("b", jnp.sqrt)(x - 1.0)

    _, found = jax.jit(jax.vmap(watch.first_nonfinite(loss)))(jnp.array([0.0, 1.0, 2.0]))
    each = [jax.tree.map(lambda a, i=i: a[i], found).first() for i in range(3)]
    assert [o and (o.path, o.direction) for o in each] == [
        ("b", "forward"), ("b", "backward"), None,
    ]


def test_over_eight_devices():
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    shared = NamedSharding(mesh, PartitionSpec("batch"))
    x = jax.device_put(np.arange(16.0, dtype="float32"), shared)
    loss = lambda w, x: jnp.sum(scope("root", jnp.sqrt)(w * x))
    _, found = jax.jit(watch.first_nonfinite(loss))(jnp.float32(1.0), x)
    origin = found.first()
    assert (origin.path, origin.primitive, origin.direction) == ("root", "sqrt", "backward")


def test_a_loop_of_two_levels_and_a_branch():
    def inner(c, t):
        grow = lambda c: scope("grow", jnp.exp)(c)
        return lax.cond(t > 0, grow, lambda c: c * 0.5, c), None

    def loss(c, ts):
        return lax.scan(lambda c, t: lax.scan(inner, c, t), c, ts)[0]

    ts = jnp.array([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    _, found = jax.jit(watch.first_nonfinite(loss))(jnp.float32(3.0), ts)
    c, steps = 3.0, []
    for i in range(3):
        for j in range(3):
            with np.errstate(over="ignore"):
                c = np.float32(np.exp(np.float32(c))) if ts[i, j] > 0 else c / 2
            steps += [(i, j)] * bool(np.isinf(c))
    assert (found.first().path, found.first().steps) == ("grow", steps[0])


def test_gradients_that_are_huge_are_finite():
    (_, gradient), found = watch.first_nonfinite(lambda x: jnp.sum(x * 1e30))(X)
    assert np.isfinite(gradient).all()
    assert found.first() is None


def test_a_deep_loop_is_followed_to_its_start():
    """600 steps back from where it is seen: by going, not by recursion."""
    def loss(x):
        first = scope("first", jnp.log)(x)
        return lax.scan(lambda c, _: (c + 1.0, None), first, length=600)[0]

    _, found = jax.jit(functools.partial(watch.first_nonfinite(loss)))(jnp.float32(0.0))
    assert (found.first().path, found.first().kind) == ("first", "inf")


def test_a_long_function_goes_back_in_pieces():
    """With every value looked at it takes no more memory than the gradient; what is found stays."""
    def loss(w, x):
        for _ in range(13):
            x = jnp.sin(jnp.tanh(x) * w)
        x = scope("root", jnp.sqrt)(x - w + 1.0)
        for _ in range(4):
            x = x + jnp.tanh(x)
        return jnp.mean(x)

    w, x = jnp.ones(512), jnp.ones((128, 512))  # XLA's least number of so many passes over nan
    plain = jax.jit(fbprop.value_and_grad(loss)).lower(w, x).compile()
    compiled = jax.jit(watch.first_nonfinite(loss)).lower(w, x).compile()
    memory, least = (c.memory_analysis().temp_size_in_bytes for c in (compiled, plain))
    assert memory <= 1.05 * least
    _, found = compiled(w.at[3].set(5.0), x)
    origin = found.first()
    assert (origin.kind, origin.direction, origin.path) == ("nan", "forward", "root")
    assert np.isnan(watch.max_abs(x.at[3, 5].set(jnp.nan)))


def test_finite_parts_of_an_infinite_sum():
    def loss(x):
        return 2e38 * x + 2e38 * x * jnp.cos(jnp.zeros(()))

    _, found = watch.first_nonfinite(loss)(jnp.float32(0.0))
    assert str(found) == (
        "the first number that is not finite is inf, made by the sum of what uses of argument x "
        "give it going backward"
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_a_table(dtype):
    """Rows that are finite each, and not together; and a row that is not."""
    def loss(table, at, scale):
        return jnp.sum(scope("take", lambda t: t[at])(table) * scale)

    watched = jax.jit(watch.first_nonfinite(loss))
    top = jnp.finfo(dtype).max
    table, at = jnp.zeros((50, 2), dtype), jnp.array([3, 7, 3])
    (_, gradient), found = watched(table, at, jnp.full((3, 2), top * jnp.asarray(0.9, dtype)))
    assert np.isinf(gradient[3]).all()
    assert found
    (_, gradient), found = watched(table, at, jnp.full((3, 2), top * jnp.asarray(0.4, dtype)))
    assert np.isfinite(gradient).all()
    assert not found
    assert gradient.shape == (50, 2)


def test_a_shard_map_is_named_as_a_whole():
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    spec = PartitionSpec("batch")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def roots(x):
        return jnp.sqrt(x)

    _, found = watch.first_nonfinite(lambda x: jnp.sum(scope("all", roots)(x)))(jnp.arange(8.0))
    origin = found.first()
    assert (origin.path, origin.primitive, origin.direction) == ("all", "shard_map", "backward")
