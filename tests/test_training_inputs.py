"""What optimisers, training and data say about arguments that do not fit; nothing is lost by it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import data, optim, train

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
INTEGERS = {"w": jnp.ones(3), "n": jnp.arange(3)}
START = {"w": jnp.ones(3)}
DATA = {"x": np.ones((8, 3), np.float32), "y": np.ones(8, np.float32)}
ADAM = optim.adam(0.1)
IMAGES = jnp.ones((2, 2, 2, 1))
KEY = jax.random.key(0)


def loss(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def fit(loss=loss, batches=DATA, optimizer=None, start=START, **options):
    options = {"epochs": 1, "batch_size": 4} | options
    return train.fit(loss, optimizer or optim.sgd(0.1), start, batches, **options)


def listed(batches, **options):
    return fit(batches=batches, batch_size=None, **options)


def update(optimizer, grads=PARAMS, state=None, params=PARAMS):
    state = optimizer.init(PARAMS) if state is None else state
    return optimizer.update(grads, state, params)


def step(state, batch=DATA, **options):
    return train.step(loss, optim.sgd(0.1), **options)(state, batch)


MOVE = "Optimisers move real and complex numbers, got "
FORM = "Gradients have the form of the parameters"
OWN = "goes on from its own state, got "
BATCHES = "data is an iterable of batches, got "
OPTIMISERS = {
    "integers": (lambda: ADAM.init(INTEGERS), TypeError, MOVE + r"a parameter 'n' of int32\[3\]"),
    "integers, no slots": (lambda: optim.sgd(0.1).init(INTEGERS), TypeError, MOVE),
    "integers in training": (lambda: fit(start=INTEGERS, optimizer=ADAM), TypeError, "freeze"),
    "text": (lambda: ADAM.init({"w": "a"}), TypeError, MOVE + "a parameter 'w' of str"),
    "key": (lambda: ADAM.init({"k": KEY}), TypeError, MOVE),
    "integer gradients": (
        lambda: update(ADAM, {"w": jnp.ones((2, 3), int), "b": PARAMS["b"]}), TypeError,
        "got a gradient 'w'",
    ),
    "swapped": (lambda: ADAM.update(ADAM.init(PARAMS), PARAMS), TypeError, r"call init\(params\)"),
    "other tree": (
        lambda: update(ADAM, {"w": PARAMS["w"], "c": PARAMS["b"]}), ValueError,
        FORM + r", got 'c' of float32\[3\] expected nothing at 'c'",
    ),
    "broadcast": (
        lambda: update(ADAM, {"w": PARAMS["w"], "b": jnp.ones(1)}), ValueError,
        FORM + r", got 'b' of float32\[1\] expected 'b' of float32\[3\]",
    ),
    "complex": (
        lambda: update(ADAM, {"w": PARAMS["w"], "b": PARAMS["b"].astype(complex)}), ValueError,
        FORM + r", got 'b' of complex64\[3\]",
    ),
    "container": (
        lambda: ADAM.update([jnp.ones(1)], ADAM.init([jnp.ones(1)]), (jnp.ones(1),)), ValueError,
        FORM + ", got PyTreeDef",
    ),
    "other tree, no params": (
        lambda: ADAM.update({"w": PARAMS["w"]}, ADAM.init(PARAMS)), ValueError,
        "that init saw, got nothing at 'b'",
    ),
    "other shape, no params": (
        lambda: ADAM.update({"w": PARAMS["w"], "b": jnp.ones(4)}, ADAM.init(PARAMS)), ValueError,
        r"that init saw, got 'b' of shape \(4,\)",
    ),
    "other groups": (
        lambda: update(optim.freeze(ADAM, "b"), {"w": PARAMS["w"], "b": jnp.ones(1)}), ValueError,
        FORM,
    ),
    "other state": (
        lambda: update(ADAM, state=optim.sgd(0.1, momentum=0.9).init(PARAMS)), ValueError,
        r"got one that keeps \['momentum'\] expected \['mu', 'nu'\]",
    ),
    "no state": (lambda: update(ADAM, state="x"), ValueError, OWN + "str"),
    "average's state": (
        lambda: update(optim.average_params(), state=()), ValueError, OWN + "tuple"
    ),
    "schedule's state": (
        lambda: update(optim.scale_by_learning_rate(optim.constant(1.0)), state=()), ValueError, OWN
    ),
    "updates": (
        lambda: optim.apply_updates(PARAMS, {"w": PARAMS["w"]}), ValueError,
        "Updates have the form of the parameters, got nothing at 'b'",
    ),
    "rate": (lambda: optim.sgd("a"), TypeError, "A learning rate is a number, got 'a'"),
    "nan rate": (lambda: optim.sgd(np.float32("nan")), ValueError, "got nan expected a number"),
    "array of rates": (lambda: ADAM and optim.adam(jnp.ones(2)), TypeError, "learning rate is a n"),
    "eps": (lambda: optim.lamb(0.1, eps=-1.0), ValueError, "got eps=-1.0 expected it >= 0"),
    "eps of rmsprop": (lambda: optim.rmsprop(0.1, eps=None), TypeError, "eps is a number, got N"),
    "root": (lambda: optim.nadam(0.1, eps_root=np.nan), ValueError, "got eps_root=nan"),
    "nadam": (lambda: optim.nadam(0.1, momentum_decay=-1), ValueError, "got momentum_decay=-1"),
    "decay": (lambda: optim.adamw(0.1, weight_decay=np.nan), ValueError, "weight_decay=nan"),
    "clip": (lambda: optim.clip_by_value("a"), TypeError, "limit is a number, got 'a'"),
    "factor": (lambda: optim.scale(np.inf), ValueError, "got factor=inf"),
    "complex by value": (
        lambda: optim.clip_by_value(1.0).update(jnp.ones(1, complex), ()), TypeError,
        "orders numbers, got a gradient of complex64",
    ),
    "adafactor": (
        lambda: optim.adafactor(min_dim_size_to_factor=0), ValueError, "min_dim_size_to_factor=0"
    ),
    "adafactor's scale": (lambda: optim.adafactor(min_scale=-1), ValueError, "got min_scale=-1"),
    "coefficients": (
        lambda: optim.muon(0.1, coefficients=(1, 2)), ValueError, "expected three numbers"
    ),
    "vector": (lambda: optim.orthogonalize(jnp.ones(3)), ValueError, r"got x of shape \(3,\)"),
    "integer matrix": (lambda: optim.orthogonalize(jnp.ones((2, 2), int)), TypeError, "a matrix"),
    "plateau": (lambda: optim.reduce_on_plateau(cooldown=-1), ValueError, "got cooldown=-1"),
    "mask": (
        lambda: update(optim.adamw(0.1, mask={"w": True})), ValueError,
        r"patterns on paths or a tree of bools, got {'w': True} expected one for .*\['b', 'w'\]",
    ),
    "mask of numbers": (lambda: optim.select({"w": 1, "b": 0}, PARAMS), ValueError, "tree of bool"),
    "groups": (lambda: optim.by_path([1]), TypeError, r"a dict from pattern to optimiser, got \[1"),
    "no groups": (lambda: optim.by_path({}), TypeError, "got {} expected"),
    "range test's optimiser": (
        lambda: optim.find_learning_rate(loss, START, DATA, optimizer=ADAM), TypeError,
        "expected a function from learning rate to optimiser",
    ),
    "range test's batch": (
        lambda: optim.find_learning_rate(loss, START, DATA, batch_size=0), ValueError,
        "got batch_size=0",
    ),
    "range test's data": (
        lambda: optim.find_learning_rate(loss, START, {}), ValueError,
        r"got lengths \[\] expected one length >= 1",
    ),
}
TRAINING = {
    "no key": (
        lambda: fit(lambda params, batch: 0.0), TypeError,
        r"called as loss\(params, batch, key\), got one of the form \(params, batch\)",
    ),
    "no function": (lambda: fit(3), TypeError, "A loss is called as .* got int expected"),
    "vector": (lambda: fit(lambda p, b, k: p["w"]), TypeError, r"one real number, got float32\[3"),
    "integer": (lambda: fit(lambda p, b, k: 1), TypeError, r"one real number, got int32\[\]"),
    "nothing": (lambda: fit(lambda p, b, k: None), TypeError, "A loss returns .* got NoneType"),
    "weighted vector": (
        lambda: fit(lambda p, b, k: train.Weighted(p["w"], 1.0)), TypeError, "one real number"
    ),
    "metrics": (
        lambda: fit(lambda p, b, k: (p["w"].sum(), {"a": "x"})), TypeError, "Metrics are arrays"
    ),
    "numbers as batches": (
        lambda: listed([1, 2, 3]), TypeError,
        r"A loss reads the batches that the data are made of, got a batch int32\[\]",
    ),
    "None as batches": (lambda: listed([None]), TypeError, "got a batch None"),
    "words as batches": (lambda: listed(["a"]), TypeError, "arrays of numbers, got one that holds"),
    "words": (
        lambda: fit(batches={"x": np.array(["a"] * 8)}), TypeError, "holds a ndarray of <U1"
    ),
    "no data": (lambda: listed(None), ValueError, BATCHES + "NoneType"),
    "a number as data": (lambda: listed(3), ValueError, BATCHES + "int"),
    "text as data": (lambda: listed("abc"), ValueError, BATCHES + "str"),
    "a pass of nothing": (lambda: listed(lambda epoch: None), ValueError, "data of a pass is an"),
    "no batches": (lambda: listed(iter(())), ValueError, "got none in pass 1 after 0 of them"),
    "another batch": (lambda: listed([DATA, {"x": DATA["x"]}]), KeyError, "with a batch of the f"),
    "half a batch": (lambda: fit(batch_size=2.5), ValueError, "got batch_size=2.5 expected 1 to"),
    "half an epoch": (lambda: fit(epochs=1.5), ValueError, "got epochs=1.5 expected an integer"),
    "text of epochs": (lambda: fit(epochs="a"), TypeError, "epochs is a number, got 'a'"),
    "text as parameter": (lambda: fit(start={"w": "a"}), TypeError, "a leaf 'a' of type str"),
    "state of another": (
        lambda: fit(start=train.init(START, ADAM)), ValueError, "got 2 expected 1: use the state"
    ),
    "no state": (lambda: step(START), TypeError, "A step goes from state to state, got dict"),
    "batch": (lambda: step(train.init(START, optim.sgd(0.1)), {}), TypeError, "got a batch {}"),
    "pieces": (lambda: step(None, accumulate=1.5), ValueError, "got accumulate=1.5 expected an in"),
    "dtype": (lambda: step(None, compute_dtype="abc"), ValueError, "got compute_dtype='abc'"),
    "indices": (
        lambda: train.epoch(loss, ADAM)(train.init(START, ADAM), DATA, [[0, 1]]), TypeError,
        r"one array \[steps, batch\], got list",
    ),
    "random key": (lambda: train.init(START, ADAM, 3), TypeError, "A run has a random key, got 3"),
    "scale": (
        lambda: train.init(START, ADAM, loss_scale=2.0**15), TypeError, "loss scale .* got 32768.0"
    ),
    "metric": (lambda: fit(metric=3, held_out=DATA), TypeError, "A metric is a function, got int"),
    "no metric": (
        lambda: fit(metric=lambda p, b: None, held_out=DATA), TypeError, "a dict of scalars, got"
    ),
    "evaluation": (lambda: train.evaluate(loss, 2.5), ValueError, "got batch_size=2.5"),
    "text saved": (
        lambda: train.save_tensors("unused", {"w": "a"}), TypeError, "A file holds arrays, got 'a'"
    ),
    "metadata": (
        lambda: train.save("unused", START, metadata=3), TypeError, "a dict for JSON, got 3"
    ),
}
OF_DATA = {
    "half a batch": (lambda: data.batches(5, 2.5), ValueError, "got batch_size=2.5 expected 1 to"),
    "lists": (
        lambda: data.iterate({"x": [1, 2]}, 2), ValueError,
        r"got int as data\['x'\]\[0\] expected an array",
    ),
    "nothing": (lambda: data.iterate(None, 2), ValueError, r"got lengths \[\] expected"),
    "prefetch": (lambda: data.prefetch(3), TypeError, "gone through one by one, got int"),
    "prefetch size": (lambda: data.prefetch([1], "a"), ValueError, "got size='a'"),
    "address": (lambda: data.download("abc", "x", sha256="a" * 64), ValueError, "got url='abc'"),
    "checksum": (lambda: data.download("file:///x", "x", sha256=None), ValueError, "got None;"),
    "digits": (lambda: data.digits(__file__), ValueError, "Digits are stored as .npz, got .*py"),
    "list": (lambda: data.augment.random_flip(KEY, [[1]]), ValueError, r"got shape \(1, 1\)"),
    "flip": (lambda: data.augment.random_flip(KEY, IMAGES, "a"), ValueError, "got 'a' expected"),
    "shift": (lambda: data.augment.random_shift(KEY, IMAGES, 1.5), ValueError, "got pixels=1.5"),
    "crop": (lambda: data.augment.random_crop(KEY, IMAGES, 2), ValueError, "got size=2 expected"),
}
ERRORS = {
    f"{part}: {name}": row
    for part, rows in (("optim", OPTIMISERS), ("train", TRAINING), ("data", OF_DATA))
    for name, row in rows.items()
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_expected(name):
    call, error, text = ERRORS[name]
    with pytest.raises(error, match=text):
        call()


def test_a_state_outlives_a_batch_that_does_not_fit():
    state = train.init(START, optim.sgd(0.1))
    run = train.step(loss, optim.sgd(0.1))
    with pytest.raises(KeyError):
        run(state, {"x": DATA["x"]})
    state, metrics = run(state, DATA)
    assert bool(jnp.isfinite(metrics["loss"]))


def test_an_error_in_the_data_says_what_is_left(tmp_path):
    def breaking(epoch):
        yield DATA
        if epoch:
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="fit had made . steps; nothing was saved"):
        listed(breaking, epochs=2)
    with pytest.raises(RuntimeError, match=r"the last checkpoint is .*00000001\.safetensors"):
        listed(breaking, epochs=2, checkpoints=tmp_path)


def test_a_label_out_of_range_is_named_as_a_cause_of_nan():
    def nan(params, batch, key):
        return jnp.sum(params["w"]) * jnp.nan

    with pytest.raises(train.NonFiniteLoss, match="a class label outside the range"):
        fit(nan)


def test_integers_train_beside_parameters_when_frozen():
    optimizer = optim.freeze(ADAM, "n")
    state = train.init(INTEGERS | {"w": jnp.ones(3)}, optimizer)
    state, _ = train.step(loss, optimizer)(state, DATA)
    assert state.params["n"].tolist() == [0, 1, 2]
    assert float(state.params["w"][0]) != 1


def test_nothing_to_learn_is_no_error():
    for params in ({}, {"w": jnp.zeros((0, 3))}):
        for optimizer in (ADAM, optim.adafactor(), optim.lamb(0.1), optim.muon(0.1),
                          optim.chain(optim.clip_by_global_norm(1.0), optim.lion(0.1))):
            updates, _ = optimizer.update(params, optimizer.init(params), params)
            chex.assert_trees_all_equal(updates, params)
        state = train.init(params, ADAM, loss_scale=train.loss_scale())
        state, metrics = train.step(lambda p, b, k: jnp.sum(b), ADAM)(state, jnp.ones(2))
        assert not bool(metrics["skipped"])
