"""A run that stops at numbers that are not finite names the operation that made them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim, train
from fbprop.train import culprit

N = 24
X = np.random.RandomState(0).normal(size=(N, 3)).astype(np.float32)
DATA = {"x": X, "y": X @ np.array([1.0, -2.0, 0.5], np.float32)}
START = {"alive": jnp.float32(1.0), "w": jnp.zeros(3)}


def countdown(steps):
    """An optimiser that takes a parameter of 1 to 0 at the given step, and not before."""
    def update(grads, state, params=None):
        fall = jnp.where(state + 1 == steps, -1.0, 0.0)
        return jax.tree.map(lambda g: fall.astype(g.dtype), grads), state + 1

    return optim.Optimizer(lambda params: jnp.float32(0), update)


FALLING = optim.by_path({"alive": countdown(14.0), "w": optim.sgd(0.01)})


def squared(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def dividing(params, batch, key):
    """Infinite from step 15 on, the third of the third round."""
    with jax.named_scope("head"):
        return squared(params, batch) / params["alive"], {}


def rooted(params, batch, key):
    """The gradient is infinite in step 15, the loss nan in step 16."""
    with jax.named_scope("root"):
        return squared(params, batch) + jnp.sqrt(jnp.sum(params["w"] ** 2) * params["alive"]), {}


def failing(loss, **options):
    options = {"data": DATA, "batch_size": 4, "epochs": 9, "params": START} | options
    start, data = options.pop("params"), options.pop("data")
    with pytest.raises(train.NonFiniteLoss) as info:
        train.fit(loss, options.pop("optimizer", FALLING), start, data, **options)
    return info.value


@pytest.mark.parametrize("kept", [True, False], ids=["from a checkpoint", "from the start"])
@pytest.mark.parametrize("most", [1, 4])
def test_the_operation_is_named(kept, most, tmp_path):
    options = {"checkpoints": tmp_path} if kept else {}
    error = failing(dividing, steps_per_dispatch=most, **options)
    assert error.step == 15
    origin = error.operation
    assert (origin.path, origin.primitive, origin.direction) == ("head", "div", "forward")
    assert origin.operands[1] == ("float32[]", 0.0, 0.0)
    assert "made by div going forward (path 'head', at " in str(error)
    assert "test_fit_culprit.py" in str(error)


def test_of_a_gradient_whose_loss_was_finite_yet():
    error = failing(rooted, params=START | {"w": jnp.ones(3)})
    assert error.step == 16
    assert (error.operation.primitive, error.operation.direction) == ("sqrt", "backward")


def test_of_batches_in_pieces_and_what_was_in_them():
    spoilt = [{k: v[i : i + 4].copy() for k, v in DATA.items()} for i in range(0, N, 4)]
    spoilt[4]["x"][3, 1] = np.nan
    error = failing(
        lambda p, batch, key: squared(p, batch), data=spoilt, batch_size=None, accumulate=2,
        params={"w": START["w"]}, optimizer=optim.sgd(0.01),
    )
    assert error.step == 5
    assert "; the first number that is not finite is nan in argument batch['x']; " in str(error)


def test_with_a_loss_scale_frozen_parameters_and_a_model_state():
    def counting(params, batch, key, model_state):
        value, _ = dividing(params, batch, key)
        return value.astype("float32"), {}, model_state + 1

    state = lambda: train.init(
        START, FALLING, model_state=jnp.int32(0), loss_scale=train.loss_scale(4.0)
    )
    kept = failing(counting, params=state(), compute_dtype=jnp.float16)
    assert kept.operation is None  # the state that was given is gone
    frozen = optim.freeze(FALLING, ["w"])
    assert failing(dividing, optimizer=frozen).operation.primitive == "div"


def test_a_state_that_was_given_is_found_again_in_a_checkpoint(tmp_path):
    state = train.init(START, FALLING, loss_scale=train.loss_scale(4.0))
    error = failing(dividing, params=state, checkpoints=tmp_path, compute_dtype=jnp.float16)
    assert error.operation.primitive == "div"
    assert error.operation.operands[1][0] == "float16[]"


def test_on_a_mesh():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    error = failing(dividing, mesh=mesh, steps_per_dispatch=4)
    assert (error.step, error.operation.primitive) == (15, "div")


def test_batches_that_do_not_come_again_are_not_asked_for():
    batches = ({k: v[:4] for k, v in DATA.items()} for _ in range(40))
    error = failing(dividing, data=batches, batch_size=None, epochs=None, steps=40)
    assert (error.step, error.operation) == (15, None)
    assert "expected a finite one; no checkpoint was written" in str(error)


def test_an_optimiser_that_is_to_blame_is_not_called_an_operation():
    exploding = optim.sgd(lambda count: jnp.where(count == 11, jnp.inf, 0.1))
    error = failing(lambda p, batch, key: squared(p, batch), optimizer=exploding, every=12,
                    params={"w": START["w"]})
    assert error.operation is None
    assert "parameters with nan or inf in step 12" in str(error)


def test_a_search_that_fails_says_so_and_leaves_the_error(monkeypatch):
    monkeypatch.setattr(culprit, "_looking", lambda steps: 1 / 0)
    error = failing(dividing)
    assert error.operation is None
    assert any("Looking for the operation that made it failed" in n for n in error.__notes__)
