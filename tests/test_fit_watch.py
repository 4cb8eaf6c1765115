"""`train.fit(..., watch=)`: what flows, every so many steps, in the log; the run is the same."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim, train, watch
from fbprop.data import batches

N = 24
X = np.random.RandomState(0).normal(size=(N, 3)).astype(np.float32)
DATA = {"x": X, "y": X @ np.array([1.0, -2.0, 0.5], np.float32)}
START = {"w": jnp.ones((3, 4)), "v": jnp.ones(4)}


def loss(params, batch, key):
    with jax.named_scope("hidden"):
        h = jnp.tanh(batch["x"] @ params["w"])
    return jnp.mean((h @ params["v"] - batch["y"]) ** 2)


def fit(**options):
    options = {"epochs": 3, "batch_size": 4, "data": DATA} | options
    return train.fit(loss, optim.sgd(0.1), START, options.pop("data"), **options)


def test_looks_stand_in_the_log(tmp_path):
    plan = watch.every(4, of=[watch.norm, watch.finite], rate=lambda step: 0.5 / step)
    done = fit(watch=plan, log=tmp_path / "log.jsonl")
    rows = train.read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [6, 12, 18]
    assert [[s["step"] for s in row["watch"]["seen"]] for row in rows] == [[4], [10, 12], [16]]
    assert ["network" in row["watch"] for row in rows] == [True, False, False]
    network = rows[0]["watch"]["network"]
    assert [(p["path"], p["primitive"]) for p in network["points"]] == [
        ("hidden", "tanh"), ("", "div"),
    ]
    assert network["rules"]["tanh"].startswith("y = tanh x")
    assert [p["kept"] for p in network["points"]] == [4 * 4 * 4, 4 * 4]  # tanh; what is squared
    seen = rows[1]["watch"]["seen"][1]
    assert seen["rate"] == 0.5 / 12
    # The look at step 12 is of the batch of step 12 at the parameters after it.
    plain = fit(epochs=2)
    order = jax.random.fold_in(jax.random.fold_in(plain.state.key, 2**32 - 1), 1)
    batch = jax.tree.map(lambda x: x[batches(N, 4, key=order)[-1]], DATA)
    _, report = watch.value_and_grad(lambda p: loss(p, batch, None))(plain.state.params)
    expected = report.rows()[0]
    for part, close in (("value", 1e-5), ("cotangent", 1e-4)):
        np.testing.assert_allclose(seen[part][0]["norm"], expected[part]["norm"], rtol=close)
    chex.assert_trees_all_close(done.state.params, fit().state.params, rtol=1e-6)


def test_batches_in_pieces_stacked_dispatches_and_a_loss_scale():
    state = train.init(START, optim.sgd(0.1), loss_scale=train.loss_scale(8.0))
    done = train.fit(
        loss, optim.sgd(0.1), state, [jax.tree.map(lambda x: x[:8], DATA)] * 9, epochs=1, watch=3,
        steps_per_dispatch=2, accumulate=2, compute_dtype=jnp.float16,
    )
    (row,) = done.history
    assert [s["step"] for s in row["watch"]["seen"]] == [4, 6, 9]
    assert row["watch"]["network"]["points"][0]["dtype"] == "float16"
    assert row["watch"]["network"]["points"][0]["shape"] == [4, 4]


def test_on_a_mesh():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    looks = [
        fit(epochs=1, watch=watch.every(3, of=[watch.norm]), **where).history[0]["watch"]["seen"]
        for where in ({}, {"mesh": mesh})
    ]
    assert [look["step"] for look in looks[1]] == [3, 6]
    for a, b in zip(*looks):
        for part in ("value", "cotangent"):
            norms = [[point["norm"] for point in look[part]] for look in (a, b)]
            np.testing.assert_allclose(*norms, rtol=1e-4)


def test_an_infinite_statistic_is_written_as_none(tmp_path):
    def huge(x):
        return jnp.where(jnp.sum(x) > 1e9, 0.0, jnp.inf)

    fit(watch=watch.every(6, of=[huge]), log=tmp_path / "log.jsonl", epochs=1)
    (row,) = train.read_log(tmp_path / "log.jsonl")
    assert row["watch"]["seen"][0]["value"][0] == {"huge": None}


def test_a_resumed_run_looks_on(tmp_path):
    options = {"watch": 6, "checkpoints": tmp_path, "log": tmp_path / "log.jsonl"}
    fit(epochs=1, **options)
    fit(epochs=2, **options)
    rows = train.read_log(tmp_path / "log.jsonl")
    assert [row["watch"]["seen"][0]["step"] for row in rows] == [6, 12]


@pytest.mark.parametrize(("wrong", "error", "match"), [
    (lambda: fit(watch="all"), TypeError, "watch says how often.*got 'all' expected a number of"),
    (lambda: fit(watch=0), ValueError, "Steps between two looks are 1 or more, got 0"),
    (lambda: watch.every(5, where=3), TypeError, "where is a pattern on the path, got 3"),
    (lambda: watch.every(5, of=[]), ValueError, "told apart by their names, got"),
])
def test_what_is_no_plan(wrong, error, match):
    with pytest.raises(error, match=match):
        wrong()
