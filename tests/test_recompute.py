"""Values that are made again in the backward sweep: same numbers, fewer bytes, on every route."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fbprop
from fbprop.core import engine, halves, recompute
from fbprop.core.rule import Step

KEYS = jax.random.split(jax.random.key(0), 3)


@pytest.fixture
def even_few(monkeypatch):
    """Values are made again of functions that have no others."""
    monkeypatch.setattr(recompute, "FEWEST", 0)


@pytest.fixture
def even_small(monkeypatch, even_few):
    """Values of any size are made again."""
    caches = engine._plan, halves._halves
    monkeypatch.setattr(recompute, "SMALLEST", 1)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def draw(i, *shape, dtype=None):
    return jax.random.normal(KEYS[i], shape, dtype or jnp.result_type(float))


def normalised(p, x):
    """Batch norm, ReLU, a residual: what is centred is kept, what follows is made again."""
    centred = x - x.mean(0)
    y = centred * lax.rsqrt((centred**2).mean(0) + 1e-5) * p["scale"] + p["shift"]
    return jnp.maximum(y, 0) * y + x


def looped(p, x):
    return lax.scan(lambda c, _: (normalised(p, c), None), x, None, length=3)[0]


def looked_up(p, x):
    """A row twice as long as the two it is made from."""
    rows = jnp.concatenate([x[jnp.array([1, -1, 1])], x[jnp.array([0, 2, 2])]], -1)
    return jnp.sin(rows) * rows * jnp.tile(p["scale"], 2)


def converted(p, x):
    """A mask of numbers."""
    y = jnp.exp(x * p["scale"])
    return (y > 1).astype(x.dtype) * jnp.sin(y) * y


def branched(p, x):
    return lax.cond(x[0, 0] > 0, normalised, lambda p, x: x * p["scale"], p, x)


def called(p, x):
    y = jnp.where(x > 0, x * p["scale"], jnp.clip(x, -1, 1))
    return jax.nn.relu(y) * jnp.where(y > 1, y, p["shift"])


def spoken(p, x):
    y = lax.complex(x, x * p["scale"])
    return jnp.real(y * jnp.conj(y) * y)


FUNCTIONS = [normalised, looped, looked_up, converted, branched, called, spoken]


def operands(n=3, d=5):
    return {"scale": draw(1, d), "shift": draw(2, d)}, draw(0, n, d)


def loss(fun, p, x):
    return jnp.sum(jnp.sin(fun(p, x)))


@pytest.mark.usefixtures("even_small", "x64")
@pytest.mark.parametrize("fun", FUNCTIONS)
def test_the_gradient_is_the_same_on_every_route(fun):
    f = functools.partial(loss, fun)

    def squares(grad, p, x):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(grad(f, (0, 1))(p, x)))

    def routes(outer, inner):
        """First derivatives, of a batch, second, and forward over reverse."""
        def run(p, x):
            first, tangent = inner(f, (0, 1)), jax.tree.map(jnp.ones_like, (p, x))
            return {
                "first": first(p, x), "vmap": jax.vmap(first, (None, 0))(p, jnp.stack([x, -x])),
                "second": outer(functools.partial(squares, inner), (0, 1))(p, x),
                "forward": jax.jvp(first, (p, x), tangent)[1],
            }

        return jax.jit(run)(*operands())

    expected = routes(jax.grad, jax.grad)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-12, atol=1e-14)
    close(fbprop.grad(f, (0, 1))(*operands()), expected["first"])
    close(routes(fbprop.grad, fbprop.grad), expected)
    close(routes(jax.grad, fbprop.grad), expected)


@pytest.mark.usefixtures("even_small")
@pytest.mark.parametrize("fun", FUNCTIONS)
def test_never_more_is_kept(fun, monkeypatch):
    p, x = operands()

    def kept():
        engine._plan.cache_clear()
        halves._halves.cache_clear()
        return fbprop.explain(functools.partial(loss, fun), p, x, argnums=(0, 1)).kept

    less = kept()
    monkeypatch.setattr(recompute, "CHEAP", frozenset())
    recompute._is_made_of_inside.cache_clear()
    assert less < kept()
    recompute._is_made_of_inside.cache_clear()


def shapes(fun, *args):
    return sorted(v.shape for v in fbprop.vjp(fun, *args)[1].kept.values)


def test_one_array_of_a_normalised_activation_is_kept(even_few):
    p, x = operands(8, 512)
    assert shapes(lambda x: normalised(p, x), x).count((8, 512)) == 1


def test_what_is_smaller_is_kept_in_its_place(even_few):
    table = draw(0, 8, 512)
    at = jnp.arange(64) % 8

    def fun(w):
        rows = jnp.exp(table * w)[at]  # exp keeps its result, of which the rows are copies
        return jnp.sum(rows * rows)

    assert (8, 512) in shapes(fun, 2.0)
    assert (64, 512) not in shapes(fun, 2.0)


def test_of_an_operation_alone_nothing_is_made_again():
    p, x = operands(8, 512)

    def norm(p, x):
        centred = x - x.mean(0)
        return centred * lax.rsqrt((centred**2).mean(0)) * p["scale"] + p["shift"]

    # Centred, and centred over its deviation; of three norms in turn, at most one array each.
    assert shapes(norm, p, x).count((8, 512)) == 2
    assert shapes(lambda p, x: norm(p, norm(p, norm(p, x))), p, x).count((8, 512)) <= 3


def test_little_is_kept_as_it_is(even_few):
    assert shapes(lambda x: jnp.sin(x * 2.0), jnp.ones(7)) == [(7,)]


def test_a_short_way_only(even_few):
    def fun(x, n):
        y = jnp.exp(x)
        for _ in range(n):
            y = y * 1.5 + 1.0
        return y * jnp.sin(y)

    x = jnp.ones(2048)
    # Either way the results of exp and sin; y besides, if it is far from exp's.
    assert [len(shapes(functools.partial(fun, n=n), x)) for n in (2, 9)] == [2, 3]


@pytest.mark.parametrize("jitted", [True, False])
def test_a_rules_own_forward_is_not_replaced(jitted):
    """The value that an override gave is used by the rules after it."""
    def forward(kept, extra, douts):
        return [3 * douts[0]]

    class Tripled(fbprop.Rule):
        def prepare(self, site):
            return Step((), forward, lambda x: ([3 * x], ()))

    def inner(x):
        return jax.nn.relu(jnp.exp(x))

    fun = jax.jit(inner) if jitted else inner
    table = fbprop.table.override(Tripled("jax.nn.relu", "y = 3 x"))
    x = draw(0, 2048)
    y, pullback = fbprop.vjp(lambda x: jnp.sin(fun(x)), x, rules=table)
    (dx,) = pullback(jnp.ones_like(x))
    chex.assert_trees_all_close(y, jnp.sin(3 * jnp.exp(x)), rtol=1e-5)
    chex.assert_trees_all_close(dx, jnp.cos(3 * jnp.exp(x)) * 3 * jnp.exp(x), rtol=1e-4, atol=1e-5)


def test_xla_does_not_undo_it():
    """Twelve layers compiled with their gradient: what is made again is not kept after all."""
    weights = [draw(i % 3, 64, 64) / 8 for i in range(12)]
    p, x = operands(1024, 64)

    def net(weights, p, x):
        for w in weights:
            centred = x @ w - (x @ w).mean(0)
            scale = lax.rsqrt((centred**2).mean(0) + 1e-5) * p["scale"]
            x = jax.nn.relu(centred * scale + p["shift"])
        return jnp.sum(x)

    ours, theirs = (
        jax.jit(ad.grad(net)).lower(weights, p, x).compile().memory_analysis().temp_size_in_bytes
        for ad in (fbprop, jax)
    )
    assert ours < 0.7 * theirs


@pytest.mark.usefixtures("even_small")
@pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto])
def test_on_several_devices(mode):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(mode,))
    p, x = operands(8)
    f = functools.partial(loss, normalised)
    expected = jax.jit(jax.grad(f, (0, 1)))(p, x)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
        got = jax.jit(fbprop.grad(f, (0, 1)))(p, sharded)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("even_small")
def test_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    p, x = operands(8)

    def local(p, x):
        return lax.psum(loss(called, p, x), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    got = jax.jit(fbprop.grad(mapped, (0, 1)))(p, x)
    expected = jax.jit(jax.grad(functools.partial(loss, called), (0, 1)))(p, x)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_other_types(dtype):
    p, x = jax.tree.map(lambda v: v.astype(dtype), operands(64, 64))
    f = functools.partial(loss, called)
    ours, theirs = (jax.jit(ad.grad(f, (0, 1)))(p, x) for ad in (fbprop, jax))
    chex.assert_trees_all_equal_dtypes(ours, theirs)
    chex.assert_trees_all_close(
        *(jax.tree.map(lambda v: v.astype(jnp.float32), g) for g in (ours, theirs)),
        rtol=0.05, atol=0.05,
    )


def test_what_batch_norm_gives_is_made_again():
    """Of two layers and ReLUs x alone is kept, under jit and where the pullback crosses it."""
    def network(x):
        for _ in range(2):
            x = jax.nn.relu(fbprop.ops.batch_norm(jnp.sin(x))[0]) * x
        return x

    x = draw(0, 97, 23)
    explained = fbprop.explain(network, x)
    assert explained.kept < 5 * x.nbytes  # x, twice sin x; y and ReLU made again
    assert sum(line.again for line in explained.lines) >= 3 * x.nbytes
    y, pullback = jax.jit(lambda x: fbprop.vjp(network, x))(x)
    expected = jax.jit(lambda x: (lambda y, pull: (y, *pull(y)))(*jax.vjp(network, x)))(x)
    chex.assert_trees_all_close((y, *pullback(y)), expected, rtol=1e-5, atol=1e-5)
    both = jax.jit(lambda x: (lambda y, pull: (y, *pull(y)))(*fbprop.vjp(network, x)))(x)
    chex.assert_trees_all_close(both, expected, rtol=1e-5, atol=1e-5)
