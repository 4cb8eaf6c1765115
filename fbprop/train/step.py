"""The training step and the epoch: forward, loss, backward, update in one dispatch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_map

from fbprop.core.factored import dense
from fbprop.core.table import Table
from fbprop.data.batching import count_examples
from fbprop.learning.alignment import compared
from fbprop.learning.method import Method
from fbprop.optim.chain import apply_updates, check_optimizer, hold, is_freezing, with_extra
from fbprop.optim.transform import increment, scaled, takes_factored
from fbprop.train.gradients import check_pieces, filled, gradients_of, scaled_sum_of
from fbprop.train.learned import check_learning, learned
from fbprop.train.placement import placement
from fbprop.train.precision import all_finite, check_compute_dtype, check_scaled, keep_if_finite
from fbprop.train.state import State, check_is_state


def step(loss: Callable, optimizer, *, accumulate: int = 1, compute_dtype=None,
         rules: Table | None = None, fallback: str | None = "registered", mesh=None,
         layout=None, learning: Method | None = None, alignment: bool = False) -> Callable:
    """One jitted training step, ``(state, batch) -> (state, metrics)``.

    The gradient is `fbprop.value_and_grad`'s. The old state's buffers are donated: its arrays are
    gone after the call, and the new ones take their memory.

    Args:
      loss: ``(params, batch, key) -> scalar`` or ``(scalar, metrics)``, metrics a dict of arrays;
        ``key`` is this step's own. A mean over tokens is returned as `Weighted` instead of a
        scalar; so may be metrics. Of a state with ``model_state``, such as running statistics:
        ``(params, batch, key, model_state) -> (scalar, metrics, model_state)``.
      optimizer: fbprop's or Optax's. Parameters it freezes (`fbprop.optim.freeze`) are not
        differentiated at all. One that asks for them gets ``value``, ``grad`` and ``value_fn``,
        the loss of this batch as a function of the parameters: `optax.lbfgs`, say; and
        ``of_batch``, ``fun -> fun(params, batch, key)`` of this step: `fbprop.optim.kfac`.
      accumulate: in how many pieces, cut along the first axis, the batch is worked through, for
        that many times less memory. The gradient is that of the whole batch for a loss that is a
        mean over examples, or `Weighted`; keys differ from piece to piece, metrics are means over
        them, and the model state passes from one to the next.
      compute_dtype: `jnp.bfloat16` or `jnp.float16`: parameters and batch are cast to it for the
        loss; parameters, gradients and updates themselves stay as they are, float32. float16
        needs a state with a `loss_scale`. None: no cast.
      rules, fallback: as for `fbprop.vjp`.
      mesh, layout: those that `init` made the state with. The batch is split over the layout's
        axes for it; `fbprop.mesh.feed` sends each part to its device beforehand. Losses, metrics
        and batch statistics are those of the whole batch.
      learning: a learning rule (`fbprop.learning`), whose direction takes the gradient's place; the
        state holds its memory. None: backpropagation.
      alignment: whether metrics have ``"alignment"``, the cosine of that direction to the gradient,
        which is then computed as well.

    Returns:
      The function. ``metrics`` is the dict that ``loss`` returned, and ``"loss"``, the loss before
      the update; with a loss scale also ``"loss_scale"`` and ``"skipped"``, whether the gradients
      overflowed and the step changed nothing else.

    Raises:
      TypeError: ``optimizer`` is no optimiser; ``loss`` returns something else.
      ValueError: ``loss`` calls one of its metrics "loss"; a batch that ``accumulate`` or the mesh
        does not divide; float16 without a loss scale; a model state that changes its form.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim, train
      >>> def loss(params, batch, key):
      ...     x, y = batch
      ...     return jnp.mean((x @ params["w"] - y) ** 2)
      >>> optimizer = optim.adam(0.1)
      >>> state = train.init({"w": jnp.zeros(2)}, optimizer)
      >>> step = train.step(loss, optimizer)
      >>> batch = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, -1.0])
      >>> for _ in range(100):
      ...     state, metrics = step(state, batch)
      >>> int(state.step), bool(metrics["loss"] < 1e-3)
      (100, True)
    """
    place = placement(mesh, layout)
    one = _one_step(
        loss, optimizer, accumulate, compute_dtype, place, learning, alignment, rules=rules,
        fallback=fallback,
    )
    return jax.jit(place.program(one), donate_argnums=0)


def epoch(loss: Callable, optimizer, *, accumulate: int = 1, compute_dtype=None,
          rules: Table | None = None, fallback: str | None = "registered", mesh=None,
          layout=None, learning: Method | None = None, alignment: bool = False) -> Callable:
    """Many training steps in one dispatch, ``(state, data, indices) -> (state, metrics)``.

    A `jax.lax.scan` over ``indices``: each step gathers its batch from data that stay on the
    device, so nothing returns to Python in between. As `step` otherwise.

    Args:
      loss, optimizer and the keywords: see `step`.

    Returns:
      A jitted function of ``state`` (donated), ``data``, a pytree of arrays with examples along
      their first axis, and ``indices``, integers [steps, batch] (or [steps], for ``data`` that is
      batched already); it returns the state and the metrics of every step, stacked.

    Raises:
      ValueError: ``indices`` or ``data`` of another form.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import optim, train
      >>> def loss(params, batch, key):
      ...     return jnp.mean((params["mean"] - batch) ** 2)
      >>> optimizer = optim.sgd(0.1)
      >>> state = train.init({"mean": jnp.zeros(())}, optimizer)
      >>> data = jnp.arange(12.0)
      >>> indices = jax.random.permutation(jax.random.key(1), 12).reshape(4, 3)
      >>> state, metrics = train.epoch(loss, optimizer)(state, data, indices)
      >>> metrics["loss"].shape
      (4,)
    """
    place = placement(mesh, layout)
    one = _one_step(
        loss, optimizer, accumulate, compute_dtype, place, learning, alignment, rules=rules,
        fallback=fallback,
    )

    def run(state, data, indices):
        _check_data(data, indices)
        body = lambda s, rows: one(s, tree_map(lambda x: x[rows], data))
        # Said again of the loop's results: XLA may lay them out in another way than each step's.
        return place.result(*lax.scan(body, state, indices))

    return jax.jit(place.program(run), donate_argnums=0)


def _one_step(loss, optimizer, accumulate, compute_dtype, place, learning, alignment, **engine):
    check_optimizer(optimizer)
    check_pieces(accumulate)
    check_compute_dtype(compute_dtype)
    update_of = with_extra(optimizer)
    rows = takes_factored(optimizer)
    gradients = gradients_of(loss, accumulate, compute_dtype, rows, place, learning, **engine)
    true = gradients_of(loss, accumulate, compute_dtype, False, place, **engine)

    def one(state: State, batch):
        check_is_state(state)
        check_learning(learning, state)
        check_scaled(compute_dtype, state.loss_scale)
        key = jax.random.fold_in(state.key, state.step)
        held = trainable(optimizer, state.params)
        scale = None if state.loss_scale is None else state.loss_scale.scale
        given = state.params, batch, key, state.model_state, scale, state.learning
        got = gradients(held, *given)
        updates, opt_state = update_of(
            got.grads, state.opt_state, held, value=got.value, grad=dense(got.grads),
            value_fn=_value_of(lambda p: gradients(p, *given)),
            of_batch=lambda fun: fun(state.params, place.batch(batch), key),
        )
        updates, memory = learned(learning, updates, state.params, got.learning)
        new = State(
            apply_updates(state.params, updates), opt_state, increment(state.step), state.key,
            got.model_state, state.loss_scale, memory,
        )
        metrics = {"loss": got.value, **got.metrics}
        if alignment:
            metrics["alignment"] = compared(dense(got.grads), true(held, *given).grads).total
        if scale is not None:
            finite = all_finite(got.grads)
            new = keep_if_finite(finite, new, state)
            metrics |= {"loss_scale": scale, "skipped": ~finite}
        return place.result(new, metrics)

    return one


def _value_of(gradients: Callable) -> Callable:
    """The loss of this batch as a function of the parameters, for line searches.

    Its gradient is that of the step, with its rules, precision and pieces.
    """
    @jax.custom_vjp
    def value(params):
        return gradients(params).value

    def forward(params):
        got = gradients(params)
        return got.value, dense(got.grads)

    def backward(grads, dvalue):
        return (tree_map(lambda g: scaled(g, dvalue).astype(g.dtype), grads),)

    value.defvjp(forward, backward)
    return value


def loss_at(loss, optimizer, place, dtype) -> Callable:
    """``(state, key) -> (fun, params)``: what a step differentiates, as a function of the
    trainable parameters and the batch, and these parameters.
    """
    scaled_sum = scaled_sum_of(loss, dtype)

    def at(state, key):
        scale = None if state.loss_scale is None else state.loss_scale.scale

        def loss_of(params, batch):
            whole, batch = filled(params, state.params), place.batch(batch)
            return scaled_sum(whole, batch, key, state.model_state, scale)

        return loss_of, trainable(optimizer, state.params)

    return at


def trainable(optimizer, params):
    """The parameters with None in place of the frozen ones."""
    if not is_freezing(optimizer):
        return params
    return hold(optimizer.trainable(params), params)


def _check_data(data, indices):
    if not hasattr(indices, "ndim"):
        raise TypeError(
            f"indices are one array [steps, batch], got {type(indices).__name__} expected e.g. "
            "fbprop.data.batches(n, batch_size)."
        )
    if indices.ndim not in (1, 2) or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"indices are integers [steps, batch], got {jax.typeof(indices).str_short()}; "
            "expected e.g. jax.random.permutation(key, n)[:steps * batch].reshape(steps, batch)."
        )
    count_examples("data", data)
