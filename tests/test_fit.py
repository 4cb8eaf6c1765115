"""Whole runs: rounds, data of every kind, early stopping, divergence, logs, progress."""

import io
import json
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import data, optim, train
from fbprop.train import progress

N = 24
X = np.random.RandomState(0).normal(size=(N, 3)).astype(np.float32)
DATA = {"x": X, "y": X @ np.array([1.0, -2.0, 0.5], np.float32)}
START = {"w": jnp.zeros(3)}


def loss(params, batch, key):
    noise = jax.random.normal(key, (), batch["y"].dtype) * 1e-3
    value = jnp.mean((batch["x"] @ params["w"] - batch["y"] + noise) ** 2)
    return value, {"size": jnp.float32(len(batch["y"]))}


def metric(params, batch):
    return {"loss": jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)}


def quick(*, start=START, epochs=3, optimizer=None, **options):
    options = {"data": DATA, "batch_size": 4} | options
    return train.fit(loss, optimizer or optim.sgd(0.1), start, epochs=epochs, **options)


def same(a, b):
    chex.assert_trees_all_equal(a.state.params, b.state.params)
    assert int(a.state.step) == int(b.state.step)


def test_a_run_learns_and_reports_both_losses():
    done = quick(epochs=20, metric=metric, held_out=DATA)
    assert done.stopped == "epochs"
    assert [row["step"] for row in done.history] == list(range(6, 126, 6))
    assert [row["epoch"] for row in done.history] == list(range(1, 21))
    first, last = done.history[0], done.history[-1]
    assert last["train"]["loss"] < 1e-3 < first["train"]["loss"]
    assert last["held_out"]["loss"] < 1e-3
    assert last["train"]["size"] == 4
    np.testing.assert_allclose(done.state.params["w"], [1, -2, 0.5], atol=0.01)


def test_a_run_is_the_steps_it_is_made_of():
    done = quick(epochs=2)
    state, optimizer = train.init(START, optim.sgd(0.1)), optim.sgd(0.1)
    run, losses = train.epoch(loss, optimizer), []
    for i in range(2):
        key = jax.random.fold_in(jax.random.fold_in(state.key, 2**32 - 1), i)
        state, metrics = run(state, DATA, data.batches(N, 4, key=key))
        losses.append(float(jnp.mean(metrics["loss"])))
    chex.assert_trees_all_equal(done.state.params, state.params)
    np.testing.assert_allclose([r["train"]["loss"] for r in done.history], losses, rtol=1e-6)


@pytest.mark.parametrize("most", [1, 2, 4, 6, 100])
def test_steps_in_a_dispatch_change_nothing_but_rounding(most):
    for every in (None, 5):
        done = quick(steps_per_dispatch=most, every=every)
        chex.assert_trees_all_close(done.state.params, quick().state.params, rtol=1e-5)
        rounds = [5, 6, 11, 12, 17, 18] if every else [6, 12, 18]
        assert [row["step"] for row in done.history] == rounds


def batches_of(n, epoch=0):
    return data.iterate(DATA, n, key=jax.random.key(epoch))


SOURCES = {
    "list": lambda: list(batches_of(5)),
    "list of jax arrays": lambda: [jax.tree.map(jnp.asarray, b) for b in batches_of(5)],
    "function of the pass": lambda: lambda epoch: batches_of(5),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("most", [1, 2, 3])
def test_iterables_with_a_shorter_last_batch(name, most):
    optimizer = optim.sgd(0.1)
    state, step = train.init(START, optimizer), train.step(loss, optimizer)
    for _ in range(2):
        for batch in batches_of(5):
            state, _ = step(state, batch)
    done = train.fit(
        loss, optimizer, START, SOURCES[name](), epochs=2, steps_per_dispatch=most,
        metric=metric, held_out=lambda: batches_of(7),
    )
    chex.assert_trees_all_close(done.state.params, state.params, rtol=1e-5)
    assert [row["step"] for row in done.history] == [5, 10]
    expected = metric(done.state.params, DATA)["loss"]
    np.testing.assert_allclose(done.history[-1]["held_out"]["loss"], expected, rtol=1e-5)


def test_an_endless_iterator_ends_with_the_steps():
    def endless():
        while True:
            yield DATA

    done = train.fit(loss, optim.sgd(0.1), START, endless(), steps=7, every=3)
    assert [row["step"] for row in done.history] == [3, 6, 7]
    assert done.stopped == "steps"


def test_steps_may_end_inside_a_pass():
    done = quick(epochs=None, steps=8)
    assert [(row["step"], row["epoch"]) for row in done.history] == [(6, 1), (8, 1)]
    same(done, quick(epochs=2, steps=8))


def test_another_order_in_every_pass():
    seen = []

    def spy(epoch):
        seen.append(epoch)
        return batches_of(8, epoch)

    train.fit(loss, optim.sgd(0.1), START, spy, epochs=3)
    assert seen == [0, 1, 2]


def test_the_best_state_is_kept_and_patience_ends_the_run(tmp_path):
    # The rate grows: the run gets better first and then worse.
    schedule = optim.exponential(1e-3, 10.0, 12)
    results = []
    for checkpoints in (None, tmp_path):
        with pytest.warns(RuntimeWarning, match="Training diverges"):
            results.append(quick(
                epochs=50, optimizer=optim.sgd(schedule), metric=metric, held_out=DATA, patience=3,
                checkpoints=checkpoints, keep_last=1,
            ))
    for done in results:
        losses = [row["held_out"]["loss"] for row in done.history]
        best = int(np.argmin(losses))
        assert done.stopped == "patience"
        assert len(losses) == best + 1 + 3
        assert int(done.best.step) == done.history[best]["step"]
        assert float(metric(done.best.params, DATA)["loss"]) == pytest.approx(losses[best])
        assert int(done.state.step) == done.history[-1]["step"]
    same(*results)
    kept = {file.name for file in tmp_path.iterdir()}
    steps = int(results[1].best.step), int(results[1].state.step)
    assert kept == {f"step-{n:08d}.safetensors" for n in steps}


def test_more_may_be_better_and_nan_is_never_best():
    values = iter([0.1, 0.7, float("nan"), 0.3])

    def accuracy(params, batch):
        value = jax.pure_callback(lambda: np.float32(next(values)), jax.ShapeDtypeStruct((), "f4"))
        return {"accuracy": value}

    done = quick(epochs=4, metric=accuracy, held_out={"x": np.ones(4)}, monitor="accuracy",
                 mode="max")
    assert int(done.best.step) == 12


def test_a_state_is_taken_with_its_model_state_and_precision():
    def running(params, batch, key, model_state):
        value, metrics = loss(params, batch, key)
        return value, metrics, model_state + 1

    def of_state(params, batch, model_state):
        return {"loss": model_state.astype(jnp.float32)}

    state = train.init(START, optim.sgd(0.1), jax.random.key(3), model_state=jnp.int32(0))
    done = train.fit(
        running, optim.sgd(0.1), state, DATA, epochs=2, batch_size=4, accumulate=2,
        compute_dtype=jnp.bfloat16, metric=of_state, held_out=DATA,
    )
    assert int(done.state.model_state) == 2 * 2 * 6
    assert [row["held_out"]["loss"] for row in done.history] == [12, 24]


@pytest.mark.parametrize("most", [1, 4])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, most):
    # Infinite from step 15 on, the third of the third round.
    def breaking(params, batch, key):
        value, _ = loss(params, batch, key)
        return value / params["alive"], {}

    falling = optim.by_path({"alive": _countdown(14.0), "w": optim.sgd(0.01)})
    start = START | {"alive": jnp.float32(1.0)}
    with pytest.raises(train.NonFiniteLoss, match=r"a loss of inf in step 15 .*0012\.saf") as info:
        train.fit(breaking, falling, start, DATA, epochs=9, batch_size=4, checkpoints=tmp_path,
                  steps_per_dispatch=most, log=tmp_path / "log.jsonl")
    assert (info.value.step, info.value.checkpoint) == (15, train.latest(tmp_path))
    like = train.init(start, falling)
    restored = train.restore(train.latest(tmp_path), like)
    assert int(restored.step) == 12
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(restored.params))
    assert [row["step"] for row in train.read_log(tmp_path / "log.jsonl")] == [6, 12]


def _countdown(steps):
    """An optimiser that takes a parameter of 1 to 0 at the given step, and not before."""
    def update(grads, state, params=None):
        fall = jnp.where(state + 1 == steps, -1.0, 0.0)
        return jax.tree.map(lambda g: fall.astype(g.dtype), grads), state + 1

    return optim.Optimizer(lambda params: jnp.float32(0), update)


def test_parameters_that_are_no_numbers_are_not_saved(tmp_path):
    # The loss of the last step is finite, its update is not.
    exploding = optim.sgd(lambda count: jnp.where(count == 11, jnp.inf, 0.1))
    with pytest.raises(train.NonFiniteLoss, match="parameters with nan or inf in step 12"):
        quick(optimizer=exploding, checkpoints=tmp_path)
    assert train.latest(tmp_path).name == "step-00000006.safetensors"


def test_without_checkpoints_the_message_says_how_to_get_them():
    with pytest.raises(train.NonFiniteLoss, match="no checkpoint was written"):
        quick(optimizer=optim.sgd(float(np.float32(1e30))))


def test_overflow_at_the_least_loss_scale_stops_the_run():
    def infinite_gradient(params, batch, key):
        return jnp.sum(jnp.sqrt(params["w"])), {}

    state = train.init(START, optim.sgd(0.1), loss_scale=train.loss_scale(4.0))
    with pytest.raises(train.NonFiniteLoss, match="gradients with nan or inf at loss scale 1 in"):
        train.fit(infinite_gradient, optim.sgd(0.1), state, DATA, epochs=1, batch_size=4)


def test_a_resumed_run_continues_and_a_finished_one_does_nothing(tmp_path):
    options = {"metric": metric, "held_out": DATA, "optimizer": optim.adam(0.05)}
    whole = quick(epochs=6, **options)
    quick(epochs=2, checkpoints=tmp_path, log=tmp_path / "log.jsonl", **options)
    resumed = quick(epochs=6, checkpoints=tmp_path, log=tmp_path / "log.jsonl", **options)
    chex.assert_trees_all_equal(resumed.state.params, whole.state.params)
    chex.assert_trees_all_equal(resumed.best.params, whole.best.params)
    for a, b in zip(resumed.history, whole.history, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    before = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir() if f.suffix == ".safetensors"}
    again = quick(epochs=6, checkpoints=tmp_path, **options)
    chex.assert_trees_all_equal(again.state.params, whole.state.params)
    assert before == {f: f.stat().st_mtime_ns for f in before}


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("most", [1, 2])
def test_iterables_resume_where_they_were(tmp_path, every, most):
    def run(steps, **options):
        return train.fit(
            loss, optim.adam(0.05), START, lambda epoch: batches_of(5, epoch), steps=steps,
            every=every, steps_per_dispatch=most, **options,
        )

    whole = run(14)
    for steps in (4, 5, 10, 14):
        done = run(steps, checkpoints=tmp_path / "run")
        assert int(done.state.step) == steps
    chex.assert_trees_all_close(done.state.params, whole.state.params, rtol=1e-6)


def test_the_log_drops_what_is_not_done(tmp_path):
    log = tmp_path / "logs" / "log.jsonl"
    done = quick(log=log)
    assert train.read_log(log) == done.history
    with open(log, "a") as file:
        file.write('{"step": 99, "tr')
    assert train.read_log(log) == done.history
    again = quick(log=log, epochs=1)
    assert [row["step"] for row in train.read_log(log)] == [6] == [r["step"] for r in again.history]


def test_the_log_is_json_also_for_nan(tmp_path):
    def odd(params, batch):
        return {"loss": jnp.float32(jnp.nan), "other": jnp.float32(jnp.inf)}

    quick(epochs=1, metric=odd, held_out=DATA, log=tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["held_out"] == {"loss": None, "other": None}


def test_divergence_is_warned_of_once_and_noise_is_not():
    with pytest.warns(RuntimeWarning, match=r"the loss was .* and is .* up to step") as caught:
        quick(epochs=12, optimizer=optim.sgd(0.9))
    assert len(caught) == 1
    quick(epochs=12, optimizer=optim.sgd(0.3))  # warnings are errors


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    quick(metric=metric, held_out=DATA, every=2)
    lines = terminal.getvalue().split("\r")[1:]
    assert terminal.getvalue().count("\n") == 1
    assert len(lines) == 9 + 1
    assert lines[-1].startswith("step 18/18  ")
    assert "loss " in lines[-1]
    assert "held-out loss " in lines[-1]
    assert {len(line.rstrip("\n")) for line in lines} == {79}
    monkeypatch.setattr(sys, "stderr", plain := io.StringIO())
    quick()
    assert plain.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", silenced := Terminal())
    quick(progress=False)
    assert silenced.getvalue() == ""


def test_progress_uses_tqdm_where_it_is_installed(monkeypatch):
    calls = []

    class Bar:
        def __init__(self, total, initial, **_):
            calls.append((total, initial))

        def set_postfix_str(self, text, refresh):
            calls.append(text)

        def update(self, steps):
            calls.append(steps)

        def close(self):
            calls.append("closed")

    module = type(sys)("tqdm")
    module.tqdm = Bar
    monkeypatch.setitem(sys.modules, "tqdm", module)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: module)
    quick(epochs=2, progress=True)
    assert calls[0] == (12, 0)
    assert [c for c in calls if isinstance(c, int)] == [6, 6]
    assert calls[-1] == "closed"


ERRORS = {
    "no end": ("neither epochs nor steps", {"epochs": None}),
    "no epochs": ("got epochs=0 expected an integer >= 1", {"epochs": 0}),
    "no rounds": ("got every=0 expected an integer >= 1", {"every": 0}),
    "no patience": ("got patience=0", {"patience": 0, "metric": metric, "held_out": DATA}),
    "metric alone": ("one of metric and held_out; expected both", {"metric": metric}),
    "held out alone": ("one of metric and held_out; expected both", {"held_out": DATA}),
    "patience alone": ("patience=2 without held_out", {"patience": 2}),
    "batch too large": ("got batch_size=25 expected 1 to 24", {"batch_size": 25}),
    "two lengths": (
        r"got lengths \[2, 24\] expected one length: without batch_size, data is",
        {"data": DATA | {"z": np.ones(2)}},
    ),
    "no arrays": ("got function as data expected an array", {"data": lambda epoch: []}),
    "numbers": (r"got int as data\[0\] expected an array of one dimension", {"data": [1, 2, 3]}),
    "arrays for batches": ("data is an iterable of batches, got dict", {"batch_size": None}),
    "held-out arrays for batches": (
        "held_out is an iterable of batches, got dict",
        {"data": [DATA], "batch_size": None, "metric": metric, "held_out": DATA},
    ),
    "mode": ("got mode='less' expected", {"mode": "less"}),
    "monitor": (
        r"got monitor='accuracy' expected one of \['loss'\]",
        {"monitor": "accuracy", "metric": metric, "held_out": DATA},
    ),
    "keep none": ("got keep_last=0", {"keep_last": 0, "checkpoints": "unused"}),
    "used up": (
        "got none in pass 2 after 0 of them; expected an iterable that starts anew",
        {"data": iter([DATA]), "batch_size": None},
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_expected(name):
    text, options = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        quick(**options)


def test_runs_do_not_share_a_directory(tmp_path):
    quick(checkpoints=tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"got resume=False and .*step-00000006\.safetensors"):
        quick(checkpoints=tmp_path, resume=False)
    with pytest.raises(train.CheckpointError, match=r"'params/w' of float32\[3\] in .* of float"):
        quick(checkpoints=tmp_path, start={"w": jnp.zeros(5)})


def test_a_log_of_another_kind_is_refused(tmp_path):
    (tmp_path / "log").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="got 'step,loss' in line 1 of"):
        train.read_log(tmp_path / "log")
