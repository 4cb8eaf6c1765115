"""Loading ahead: the same batches, no more of them than asked for, and no thread left behind."""

import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim, train
from fbprop.data.prefetch import prefetch


def test_prefetch_runs_ahead_and_ends_when_closed():
    made = []

    def slowly():
        for i in range(1000):
            made.append(i)
            yield i

    before = threading.active_count()
    loaded = prefetch(slowly(), 2)
    assert next(loaded) == 0
    for _ in range(100):
        if len(made) == 4:  # one given, two waiting, one in hand
            break
        time.sleep(0.01)
    assert made == [0, 1, 2, 3]
    loaded.close()
    assert threading.active_count() == before
    assert list(prefetch([1, 2, 3], 1)) == [1, 2, 3]


def broken():
    yield {"x": np.ones(2)}
    raise KeyError("broken record")


def test_an_error_in_the_data_arrives_where_it_happened():
    loaded = prefetch(broken())
    assert next(loaded)["x"].tolist() == [1, 1]
    with pytest.raises(KeyError, match="broken record"):
        next(loaded)


def test_an_error_in_the_data_ends_a_run():
    def loss(params, batch, key):
        return jnp.sum(params * batch["x"])

    with pytest.raises(KeyError, match="broken record"):
        train.fit(loss, optim.sgd(0.1), jnp.ones(2), broken(), epochs=1)


def test_a_queue_has_room():
    with pytest.raises(ValueError, match="got size=0 expected >= 1"):
        prefetch([], 0)
