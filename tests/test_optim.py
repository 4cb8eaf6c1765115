"""Optimisers as parts: the protocol, dtypes, chains, clipping, masks, averages, plateaus."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim

ALL = {
    "sgd": optim.sgd(0.1),
    "momentum": optim.sgd(0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "adam": optim.adam(0.1, weight_decay=0.1),
    "adamw": optim.adamw(optim.cosine(0.1, 2, 9)),
    "amsgrad": optim.amsgrad(0.1),
    "nadam": optim.nadam(0.1, momentum_decay=4e-3),
    "rmsprop": optim.rmsprop(0.1, centered=True, momentum=0.9),
    "adagrad": optim.adagrad(0.1),
    "lion": optim.lion(0.1),
    "lamb": optim.lamb(0.1, weight_decay=0.1),
    "adafactor": optim.adafactor(min_dim_size_to_factor=2, momentum=0.9),
    "muon": optim.muon(0.1),
    "soap": optim.soap(0.1),
    "clipped": optim.chain(
        optim.clip_by_global_norm(1.0), optim.clip_by_leaf_norm(1.0), optim.clip_by_value(0.5),
        optim.scale(2.0), optim.sgd(0.1), optim.average_params(0.9, warmup=True),
    ),
    "by path": optim.by_path({"b": optim.sgd(0.1), "*": optim.adam(0.1)}),
    "frozen": optim.freeze(optim.adam(0.1), "b"),
}
PARAMS = {"w": np.arange(6.0).reshape(2, 3) - 2, "b": np.ones(3), "none": None}


def cast(dtype, tree=PARAMS):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name, x.weak_type), tree)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_types_are_stable(name, dtype):
    """Updates have the parameters' dtype, moments float32, and the state's type never changes."""
    optimizer, params = ALL[name], jax.eval_shape(lambda: cast(dtype))
    state = jax.eval_shape(optimizer.init, params)
    updates, new = jax.eval_shape(optimizer.update, params, state, params)
    assert types(updates) == types(params)
    assert types(new) == types(state)
    assert {x.dtype.name for x in jax.tree.leaves(new)} <= {"float32", "int32"}
    assert types(jax.eval_shape(optim.apply_updates, params, updates)) == types(params)


@pytest.mark.parametrize("name", ALL)
def test_types_are_stable_with_x64_enabled(name, x64):
    for dtype in ("float64", "float32"):
        optimizer, params = ALL[name], jax.eval_shape(lambda: cast(dtype))
        state = jax.eval_shape(optimizer.init, params)
        updates, new = jax.eval_shape(optimizer.update, params, state, params)
        assert types(updates) == types(params)
        assert types(new) == types(state)


def three_steps(optimizer, update):
    params = cast(jnp.float32)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = update(jax.tree.map(jnp.cos, params), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", ALL)
def test_scanned_is_jitted(name):
    optimizer, params = ALL[name], cast(jnp.float32)

    def one(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(jnp.cos, params), state, params)
        return (optim.apply_updates(params, updates), state), None

    scanned, _ = jax.lax.scan(one, (params, optimizer.init(params)), length=3)
    jitted = three_steps(optimizer, jax.jit(optimizer.update))
    chex.assert_trees_all_close(jitted, scanned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adafactor", "by path"])
def test_eager_is_jitted(name):
    optimizer = ALL[name]
    eager = three_steps(optimizer, optimizer.update)
    jitted = three_steps(optimizer, jax.jit(optimizer.update))
    chex.assert_trees_all_close(eager, jitted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sixteen_bit_updates_are_the_float32_ones_rounded_once(dtype):
    optimizer = optim.adamw(1e-3, weight_decay=0.1)
    low = cast(dtype)
    high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    for _ in range(3):
        got, _ = optimizer.update(low, optimizer.init(low), low)
        expected, _ = optimizer.update(high, optimizer.init(high), high)
        chex.assert_trees_all_equal(got, cast(dtype, expected))


def test_float32_masters_with_sixteen_bit_gradients():
    params, grads = cast(jnp.float32), cast(jnp.bfloat16)
    optimizer = optim.adam(0.1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)


def test_without_params_updates_have_the_dtype_of_the_gradients():
    grads = cast(jnp.bfloat16)
    updates, _ = optim.adam(0.1).update(grads, optim.adam(0.1).init(grads))
    chex.assert_trees_all_equal_dtypes(updates, grads)


def test_complex_parameters_move_by_their_modulus(x64):
    """Adam's v is |g|², real: a rotation of the gradient rotates the update."""
    optimizer, g = optim.adam(0.1), jnp.array([1.0 + 2.0j, -3.0j])
    turn = jnp.exp(0.7j)
    first, turned = (optimizer.update(x, optimizer.init(x), x)[0] for x in (g, g * turn))
    np.testing.assert_allclose(first * turn, turned, rtol=1e-12)
    np.testing.assert_allclose(jnp.abs(first), 0.1, rtol=1e-7)


def test_first_adam_step_in_float32_has_no_cancellation():
    """1 − 0.999 rounded in float32 is off by 1.3e-5; the first step is α g/|g| whatever g is."""
    optimizer, g = optim.adam(1.0, eps=0.0), jnp.array([3.0, -0.7])
    updates, _ = optimizer.update(g, optimizer.init(g))
    np.testing.assert_allclose(updates, [-1.0, 1.0], rtol=3e-7)


def test_learning_rate_may_be_traced_and_mapped():
    def moved(rate):
        optimizer = optim.adam(rate)
        return optimizer.update(jnp.float32(2), optimizer.init(jnp.float32(0)))[0]

    got = jax.jit(jax.vmap(moved))(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(got, [-0.1, -0.2], rtol=1e-6)


def test_chain_rounds_once_and_passes_extra_arguments_to_who_asks():
    seen = []

    def update(grads, state, params=None, *, value):
        seen.append(value)
        return grads, state

    asking = optim.Optimizer(lambda params: (), update)
    silent = optim.Optimizer(lambda params: (), lambda grads, state, params=None: (grads, state))
    both = optim.chain(asking, silent, optim.sgd(1.0))
    updates, _ = both.update(jnp.ones(2), both.init(jnp.ones(2)), value=3.0, other=4.0)
    assert seen == [3.0]
    assert updates.tolist() == [-1.0, -1.0]


def test_global_norm_clipping():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
    for limit, factor in [(10.0, 1.0), (5.0, 1.0), (1.0, 0.2)]:
        got, _ = optim.clip_by_global_norm(limit).update(grads, ())
        chex.assert_trees_all_close(got, jax.tree.map(lambda g: g * factor, grads), rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, grads)
    chex.assert_trees_all_equal(optim.clip_by_global_norm(1.0).update(zero, ())[0], zero)


def test_global_norm_of_sixteen_bit_gradients_does_not_overflow():
    grads = [jnp.full(3, 300.0, jnp.float16)] * 2
    np.testing.assert_allclose(optim.global_norm(grads), 300 * 6**0.5, rtol=1e-6)
    assert optim.global_norm([]) == 0


def test_leaf_and_value_clipping():
    grads = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([0.1, -0.1])}
    size = 12.5**0.5
    for part, of_a in [
        (optim.clip_by_leaf_norm(1.0), [0.6, -0.8]),
        (optim.clip_by_leaf_rms(1.0), [3 / size, -4 / size]),
        (optim.clip_by_value(3.0), [3.0, -3.0]),
    ]:
        got, _ = part.update(grads, ())
        np.testing.assert_allclose(got["a"], of_a, rtol=1e-6)
        np.testing.assert_allclose(got["b"], grads["b"], rtol=1e-6)


MASKS = {
    "pattern": "w",
    "patterns": ("w", "*/x"),
    "tree": {"w": True, "b": False, "c": {"x": True}},
    "prefix": {"w": True, "b": False, "c": True},
    "function": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2), "c": {"x": jnp.ones((1, 1))}}
    expected = {"w": True, "b": False, "c": {"x": name != "pattern"}}
    assert optim.select(MASKS[name], params) == expected
    optimizer = optim.sgd(1.0, weight_decay=0.5, mask=MASKS[name])
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    want = jax.tree.map(lambda m, p: -0.5 * m * p, expected, params)
    chex.assert_trees_all_close(updates, want)


def test_paths_name_every_kind_of_container():
    tree = {"a": [1.0, (2.0,)], "b": optim.Optimizer(3.0, 4.0)}
    assert jax.tree.leaves(optim.paths(tree)) == ["a/0", "a/1/0", "b/init", "b/update"]


def test_each_group_has_its_own_optimiser_and_state():
    params = {"head": jnp.ones(2), "body": {"w": jnp.ones(2), "b": jnp.ones(2)}, "old": jnp.ones(2)}
    optimizer = optim.by_path({
        "body/b": optim.sgd(1.0), "body/*": optim.sgd(0.1), "old": None, "*": optim.adam(0.01),
    })
    state = optimizer.init(params)
    assert len(jax.tree.leaves(state)) == 3, "the moments of head, and a count"
    updates, state = optimizer.update(params, state, params)
    want = {"head": -0.01, "body": {"w": -0.1, "b": -1.0}, "old": 0.0}
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: np.full(2, x), want), rtol=1e-6)


def test_clipping_outside_groups_sees_all_and_inside_its_own():
    params = {"a": jnp.array(3.0), "b": jnp.array(4.0)}
    clip = optim.clip_by_global_norm(1.0)
    groups = {"a": optim.sgd(1.0), "b": optim.sgd(1.0)}
    outside = optim.chain(clip, optim.by_path(groups))
    inside = optim.by_path({k: optim.chain(clip, o) for k, o in groups.items()})
    for optimizer, want in [(outside, {"a": -0.6, "b": -0.8}), (inside, {"a": -1.0, "b": -1.0})]:
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        chex.assert_trees_all_close(updates, want, rtol=1e-6)


def test_frozen_parameters_count_for_nothing_in_a_chain():
    params = {"a": jnp.array(3.0), "b": jnp.array(4.0)}
    optimizer = optim.chain(
        optim.clip_by_global_norm(1.0), optim.freeze(optim.sgd(1.0, momentum=0.9), "b")
    )
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    chex.assert_trees_all_close(updates, {"a": -1.0, "b": 0.0}, rtol=1e-6)
    assert optimizer.trainable(params) == {"a": True, "b": False}


def test_average_follows_the_parameters():
    optimizer = optim.chain(optim.sgd(1.0), optim.average_params(0.75))
    params = jnp.array(8.0, jnp.bfloat16)
    state, expected = optimizer.init(params), 8.0
    for _ in range(3):
        updates, state = optimizer.update(jnp.array(1.0, jnp.bfloat16), state, params)
        params = optim.apply_updates(params, updates)
        expected = 0.75 * expected + 0.25 * float(params)
    got = optim.averaged_params(state, params)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(jax.tree.leaves(state)[-1], expected, rtol=1e-6)
    np.testing.assert_allclose(float(got), expected, rtol=4e-3)


def test_average_warms_up_and_spares_frozen_parameters():
    optimizer = optim.freeze(
        optim.chain(optim.sgd(1.0), optim.average_params(0.5, warmup=True)), "b"
    )
    params = {"a": jnp.array(2.0), "b": jnp.array(5.0)}
    grads = {"a": jnp.array(1.0), "b": jnp.array(1.0)}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    got = optim.averaged_params(state, params)
    chex.assert_trees_all_close(got, {"a": 0.1 * 2 + 0.9 * 1, "b": 5.0}, rtol=1e-6)


def scales(optimizer, values):
    state, seen = optimizer.init(jnp.zeros(())), []
    update = jax.jit(optimizer.update)
    for value in values:
        updates, state = update(jnp.ones(()), state, value=value)
        seen.append(float(updates))
    return seen


def test_plateau_reduces_after_patience_and_rests():
    part = optim.reduce_on_plateau(0.5, patience=2, cooldown=2, min_scale=0.2)
    values = [5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0]
    want = [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    np.testing.assert_allclose(scales(part, values), want, rtol=1e-6)
    np.testing.assert_allclose(scales(part, [1.0] * 40)[-1], 0.2, rtol=1e-6)


def test_plateau_of_averaged_values_and_thresholds():
    windows = optim.reduce_on_plateau(0.5, patience=1, accumulation_size=2)
    np.testing.assert_allclose(scales(windows, [4, 2, 9, 1, 3, 1]), [1, 1, 1, 0.5, 0.5, 0.5])
    absolute = optim.reduce_on_plateau(0.5, patience=1, rtol=0.0, atol=0.5)
    np.testing.assert_allclose(scales(absolute, [4.0, 3.6, 3.4]), [1, 0.5, 0.5])


def test_orthogonalize_gives_the_polar_factor_when_iterated():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    u, _, vt = np.linalg.svd(np.asarray(x), full_matrices=False)
    got = optim.orthogonalize(x, steps=30, coefficients=(2.0, -1.5, 0.5))
    np.testing.assert_allclose(got, u @ vt, atol=1e-5)


def test_muon_takes_a_convolution_as_a_matrix_when_told():
    kernel = jax.random.normal(jax.random.key(0), (2, 2, 3, 5))
    folded = kernel.reshape(12, 5)
    optimizer = optim.muon(0.1, matrices="*")
    got, expected = (
        optimizer.update({"k": k}, optimizer.init({"k": k}), {"k": k})[0]["k"]
        for k in (kernel, folded)
    )
    np.testing.assert_allclose(got.reshape(12, 5), expected, rtol=1e-5, atol=1e-7)


def initialised(optimizer, params=None, **arguments):
    params = {"w": jnp.ones((2, 2))} if params is None else params
    return optimizer.update(params, optimizer.init(params), **arguments)


ERRORS = {
    "rate": (lambda: optim.sgd(-0.1), ValueError, "got -0.1 expected a number >= 0"),
    "momentum": (lambda: optim.sgd(0.1, momentum=1.0), ValueError, "got momentum=1.0"),
    "nesterov": (
        lambda: optim.sgd(0.1, nesterov=True), ValueError, "expected momentum > 0 and dampening = 0"
    ),
    "nesterov, dampened": (
        lambda: optim.sgd(0.1, 0.9, nesterov=True, dampening=0.1), ValueError, "dampening=0.1"
    ),
    "b1": (lambda: optim.adam(0.1, b1=1.0), ValueError, "b1 .* got 1.0 expected 0 <= b1 < 1"),
    "b2": (lambda: optim.adamw(0.1, b2=-0.1), ValueError, "b2 .* got -0.1"),
    "amsgrad": (lambda: optim.amsgrad(0.1, b2=1.0), ValueError, "b2 .* got 1.0"),
    "nadam": (lambda: optim.nadam(0.1, b1=1.0, momentum_decay=0.1), ValueError, "b1 .* got 1.0"),
    "rmsprop": (lambda: optim.rmsprop(0.1, decay=1.5), ValueError, "decay .* got 1.5"),
    "adagrad": (lambda: optim.adagrad(0.1, -1.0), ValueError, "initial_accumulator_value=-1.0"),
    "lion": (lambda: optim.lion(0.1, b2=1.0), ValueError, "b2 .* got 1.0"),
    "adafactor": (lambda: optim.adafactor(decay_rate=0.0), ValueError, "got decay_rate=0.0"),
    "adafactor's momentum": (
        lambda: optim.adafactor(momentum=1.0), ValueError, "momentum .* got 1.0"
    ),
    "muon": (lambda: optim.muon(0.1, momentum=1.0), ValueError, "momentum .* got 1.0"),
    "muon's steps": (lambda: optim.muon(0.1, steps=0), ValueError, "got steps=0"),
    "muon of a vector": (
        lambda: initialised(optim.muon(0.1, matrices="*"), {"b": jnp.ones(3)}), ValueError,
        r"got a parameter of shape \(3,\) expected at least two axes",
    ),
    "soap": (lambda: optim.soap(0.1, decay=1.0), ValueError, "decay .* got 1.0"),
    "soap's turns": (lambda: optim.soap(0.1, every=0), ValueError, "got every=0"),
    "soap of a vector": (
        lambda: initialised(optim.soap(0.1, matrices="*"), {"b": jnp.ones(3)}), ValueError,
        "SOAP's step is for matrices",
    ),
    "decay": (lambda: optim.adamw(0.1, weight_decay=-1.0), ValueError, "got weight_decay=-1.0"),
    "clip": (lambda: optim.clip_by_global_norm(0.0), ValueError, "got max_norm=0.0 expected"),
    "clip leaves": (lambda: optim.clip_by_leaf_norm(-1.0), ValueError, "got max_norm=-1.0"),
    "clip rms": (lambda: optim.clip_by_leaf_rms(0.0), ValueError, "got max_rms=0.0"),
    "clip values": (lambda: optim.clip_by_value(0.0), ValueError, "got limit=0.0"),
    "average": (lambda: optim.average_params(1.0), ValueError, "decay .* got 1.0"),
    "no average": (lambda: optim.averaged_params((), 1.0), ValueError, "got 0 in opt_state"),
    "plateau factor": (lambda: optim.reduce_on_plateau(1.0), ValueError, "got factor=1.0"),
    "plateau patience": (lambda: optim.reduce_on_plateau(patience=0), ValueError, "patience=0"),
    "plateau threshold": (
        lambda: optim.reduce_on_plateau(rtol=0.0), ValueError, "one of them positive"
    ),
    "plateau without loss": (
        lambda: initialised(optim.reduce_on_plateau()), ValueError, "got no value; expected"
    ),
    "decay without params": (
        lambda: initialised(optim.adamw(0.1)), ValueError,
        "add_weight_decay reads the parameters, got params=None",
    ),
    "lamb without params": (
        lambda: initialised(optim.lamb(0.1)), ValueError, "scale_by_trust_ratio reads the param"
    ),
    "average without params": (
        lambda: initialised(optim.average_params()), ValueError, "average_params reads the param"
    ),
    "chain": (lambda: optim.chain(0.1), TypeError, r"pair \(init, update\), got float"),
    "chain's state": (
        lambda: optim.adam(0.1).update(1.0, ()), ValueError, "got 0 expected 2: use the state"
    ),
    "freeze": (lambda: optim.freeze(None, "*"), TypeError, "got NoneType"),
    "pattern": (
        lambda: optim.select("bias", {"w": 1.0}), ValueError,
        r"got 'bias', which matches none; expected it to match one of \['w'\]",
    ),
    "no group": (
        lambda: optim.by_path({"w": optim.sgd(0.1)}).init({"w": 1.0, "b": 1.0}), ValueError,
        "Every parameter belongs to a group, got 'b'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_expected(name):
    call, error, text = ERRORS[name]
    with pytest.raises(error, match=text):
        call()
