"""Training on 8 simulated devices: as on one, with every part where its layout says."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fbprop
from benchmarks.sharded.collectives import collectives
from fbprop import mesh, nn, optim, train
from fbprop.mesh.feed import Feed
from fbprop.mesh.layouts import automatic

RANDOM = np.random.RandomState(0)
X = RANDOM.normal(size=(48, 12)).astype(np.float32)
DATA = {"x": X, "y": np.sin(X[:, :4] * 2), "id": np.arange(48)}
# No bias before batch norm: its gradient is 0 but for rounding, of which Adam makes whole steps.
NET = nn.sequential(nn.dense(16, bias=False), nn.batch_norm(), nn.relu(), nn.dropout(0.3),
                    nn.dense(4))
INPUT = jax.ShapeDtypeStruct((1, 12), "float32")
TOKENS = RANDOM.randint(0, 16, (8, 9)).astype(np.int32)
GPT = nn.gpt(16, layers=1, heads=2, features=16, context=8)


def devices():
    return jax.make_mesh((4, 2), ("data", "model"))


def make():
    return NET.init(jax.random.key(0), INPUT)


def loss(params, batch, key, state):
    y, state = NET.apply(params, batch["x"], key=key, train=True, state=state)
    error = jnp.mean((y - batch["y"].astype(y.dtype)) ** 2)
    return error, {"first": batch["id"][0], "ids": batch["id"]}, state


def begin(optimizer, where, params=make, **more):
    return train.init(params, optimizer, jax.random.key(3), model_state=NET.init_state(INPUT),
                      mesh=where and devices(), layout=where, **more)


def losses(where, steps=3, batch=None, optimizer=None, **options):
    """Losses and the last state, on one device for no layout."""
    optimizer = optimizer or optim.adam(0.01)
    scale = train.loss_scale() if options.get("compute_dtype") == jnp.float16 else None
    state = begin(optimizer, where, loss_scale=scale)
    traced = []

    def counted(*args):
        traced.append(None)
        return loss(*args)

    one = train.step(counted, optimizer, mesh=where and devices(), layout=where, **options)
    batch = jax.tree.map(lambda x: x[:16], DATA)
    batch = batch if where is None else mesh.feed(batch, devices(), where)
    found = []
    for _ in range(steps):
        old = state
        state, metrics = one(state, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(old.params))
        found.append(float(metrics["loss"]))
    assert len(traced) == 1
    return np.array(found), state, metrics


def within_explicit_axes(yes=True):
    """As JAX's own guides have it, with axes of the type that `jax.make_mesh` makes."""
    return jax.set_mesh(devices()) if yes else contextlib.nullcontext()


FULLY = mesh.fully_sharded(("data", "model"))
TENSOR = mesh.tensor_parallel(NET)
BOTH = mesh.fully_sharded("data", within=TENSOR)


@pytest.fixture(scope="module")
def alone():
    return losses(None)


@pytest.mark.parametrize("where", [mesh.replicated(), FULLY, TENSOR, BOTH],
                         ids=["replicated", "fully sharded", "tensor parallel", "both"])
def test_losses_are_those_of_one_device(where, alone):
    with within_explicit_axes(where is BOTH):
        found, state, metrics = losses(where)
    np.testing.assert_allclose(found, alone[0], rtol=1e-5)
    # Statistics of the global batch; dropout drops the same.
    for a, b in zip(jax.tree.leaves(state.model_state), jax.tree.leaves(alone[1].model_state)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(metrics["ids"], np.arange(16))
    expected = where.shardings(devices(), state.params)
    moments = state.opt_state[0].slots
    for tree in (state.params, *moments.values()):
        jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or 1 / 0, tree, expected)


def test_state_is_made_in_parts():
    for params in (make, make(), jax.tree.map(np.asarray, make())):
        state = begin(optim.adam(0.1), FULLY, params)
        kernel = state.params["dense_0"]["kernel"]
        assert {s.data.shape for s in kernel.addressable_shards} == {(12, 2)}
        for moment in state.opt_state[0].slots.values():
            shards = moment["dense_0"]["kernel"].addressable_shards
            assert {s.data.shape for s in shards} == {(12, 2)}
        np.testing.assert_array_equal(kernel, make()["dense_0"]["kernel"])
    whole = train.init(make, optim.adam(0.1))  # without a mesh, a function does as well
    np.testing.assert_array_equal(whole.params["dense_0"]["kernel"], kernel)


def test_pieces_of_a_batch(alone):
    expected, *_ = losses(None, accumulate=2)
    found, state, _ = losses(BOTH, accumulate=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(expected, alone[0], rtol=1e-4)
    assert state.params["dense_0"]["kernel"].sharding.spec == P("data", "model")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mixed_precision(dtype):
    expected, *_ = losses(None, compute_dtype=dtype)
    found, state, _ = losses(BOTH, compute_dtype=dtype)
    # Sums of 16-bit products are rounded in another order: the tolerances of the package's tests.
    np.testing.assert_allclose(found, expected, rtol={jnp.bfloat16: 2e-2, jnp.float16: 4e-3}[dtype])
    assert state.params["dense_0"]["kernel"].dtype == jnp.float32


def language_losses(where):
    def of_tokens(params, batch, key):
        return nn.softmax_cross_entropy(GPT.apply(params, batch[:, :-1]), batch[:, 1:])

    optimizer, m = optim.adam(0.01), where and devices()
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    state = train.init(lambda: GPT.init(jax.random.key(0), tokens), optimizer, mesh=m, layout=where)
    many = train.epoch(of_tokens, optimizer, mesh=m, layout=where)
    indices = np.arange(24).reshape(3, 8) % 8
    before = jax.tree.map(lambda x: x.sharding, state)
    state, metrics = many(state, TOKENS, indices)
    assert jax.tree.map(lambda x: x.sharding, state) == before
    return metrics["loss"]


def test_a_language_model_whose_table_gets_rows():
    expected = language_losses(None)
    where = mesh.fully_sharded("data", within=mesh.tensor_parallel(GPT))
    with within_explicit_axes():
        found = language_losses(where)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def norm_of_parts(parts, sharding=None):
    """Value, running statistics and gradient of batch norm by parts, and how much is sent."""
    layer = nn.batch_norm(parts=parts)
    x = jnp.asarray(X[:, :8].reshape(16, 3, 8))
    params, state = layer.init(jax.random.key(0), x), layer.init_state(x)

    def loss(x):
        y, new = layer.apply(params, x, train=True, state=state)
        return jnp.sum(jnp.sin(y)), (y, new)

    run = jax.jit(fbprop.grad(loss, has_aux=True))
    program = run.lower(x if sharding is None else jax.device_put(x, sharding)).compile()
    put = jax.device_put(x, sharding)
    return program(put), collectives(program.as_text())[0].total()


def test_batch_norm_is_the_global_batchs_unless_told_otherwise():
    by_data = NamedSharding(automatic(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])),
                            P("data"))
    (found, sent), (found_by_parts, sent_by_parts) = (norm_of_parts(n, by_data) for n in (1, 4))
    (expected, _), (expected_by_parts, _) = (norm_of_parts(n) for n in (1, 4))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(found_by_parts, expected_by_parts, rtol=1e-5, atol=1e-6)
    # Its running statistics are the only thing that devices tell each other.
    assert sent_by_parts <= 2 < sent
    alone, x = nn.batch_norm(), jnp.asarray(X[:, :8].reshape(16, 3, 8))
    params, state = alone.init(jax.random.key(0), x), alone.init_state(x)
    ys, news = zip(*(alone.apply(params, x[i:i + 4], train=True, state=state)
                     for i in (0, 4, 8, 12)))
    _, (y, new) = expected_by_parts
    chex.assert_trees_all_close(y, jnp.concatenate(ys), rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(new, jax.tree.map(lambda *s: sum(s) / 4, *news), rtol=1e-6)


def runs(where, data=DATA, **options):
    def metric(params, batch, state):
        y, _ = NET.apply(params, batch["x"], state=state)
        return jnp.mean((y - batch["y"]) ** 2)

    optimizer = optim.adam(0.01)
    return train.fit(
        loss, optimizer, begin(optimizer, None), data, epochs=2, metric=metric, every=1,
        mesh=where and devices(), layout=where, **options,
    )


def same(mine, other):
    assert [r["train"]["first"] for r in mine.history] == [
        r["train"]["first"] for r in other.history]  # the same order
    for part in ("train", "held_out"):
        np.testing.assert_allclose(*([r[part]["loss"] for r in f.history] for f in (mine, other)),
                                   rtol=1e-5)
    for a, b in zip(jax.tree.leaves(mine.best.params), jax.tree.leaves(other.best.params)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_runs_on_arrays():
    options = {"batch_size": 16, "held_out": jax.tree.map(lambda x: x[:22], DATA)}
    with within_explicit_axes():
        mine = runs(BOTH, **options)
    same(mine, runs(None, **options))
    assert mine.state.params["dense_0"]["kernel"].sharding.spec == P("data", "model")
    assert mine.best.params["dense_0"]["kernel"].sharding.spec == P("data", "model")


def test_runs_on_batches():
    batches = [jax.tree.map(lambda x: x[i:i + 8], DATA) for i in (0, 8, 16, 24)]
    uneven = [jax.tree.map(lambda x: x[:6], DATA)]
    one = runs(None, batches, held_out=uneven)
    same(runs(mesh.replicated(), batches, held_out=lambda: uneven), one)
    options = {"steps_per_dispatch": 2, "held_out": uneven}
    assert len(train.fit(
        loss, optim.adam(0.01), begin(optim.adam(0.01), FULLY), batches, epochs=1,
        mesh=devices(), layout=FULLY, steps_per_dispatch=2,
    ).history) == 1
    same(runs(mesh.replicated(), batches, **options), one)


@pytest.mark.parametrize(("mistake", "error", "match"), [
    (lambda: losses(FULLY, optimizer=3), TypeError, "optimi"),
    (lambda: train.step(loss, optim.sgd(0.1), mesh=8), TypeError,
     "A layout is for a mesh, got mesh=8 expected a jax.sharding.Mesh"),
    (lambda: train.init(make, optim.sgd(0.1), layout=FULLY), TypeError, "got mesh=None expected"),
    (lambda: train.epoch(loss, optim.sgd(0.1), mesh=devices(), layout=P()), TypeError,
     "a layout's say, got P.* expected what fbprop.mesh.layout"),
    (lambda: runs(FULLY, batch_size=12, held_out=DATA), ValueError,
     r"equally many examples, got a batch of 12 for axes \('data', 'model'\) of 8 devices"),
    (lambda: mesh.feed(X[:3], devices()), ValueError, "a batch of 3 for axes .'data',. of 4 dev"),
    (lambda: norm_of_parts(5), ValueError, "equal parts, got 16 examples expected a multiple of p"),
    (lambda: Feed(devices(), mesh.replicated()).check_part(3, 2), ValueError,
     "equally many examples, got 3 in process 0 for 2 parts, expected a multiple of 2"),
    (lambda: train.step(loss, optim.sgd(0.1), mesh=devices())(
        begin(optim.sgd(0.1), mesh.replicated()), jax.tree.map(lambda x: x[:6], DATA)),
     ValueError, "got a batch of 6 .* expected a multiple of 4: .* leave a shorter last batch out"),
])
def test_mistakes(mistake, error, match):
    with pytest.raises(error, match=match):
        mistake()
