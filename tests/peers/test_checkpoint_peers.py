"""Our files are safetensors files to the safetensors library, and its files are read by ours."""

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import safe_open

from fbprop import optim, train


def test_the_library_reads_a_checkpoint(tmp_path):
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.float16)}
    state = train.init(params, optim.adam(0.1))
    file = train.save(tmp_path / "a.safetensors", state, metadata={"note": "é"})
    with safe_open(file, "numpy") as opened:
        assert set(opened.metadata()) == {"sha256", "fbprop"}
        for name, x in params.items():
            np.testing.assert_array_equal(opened.get_tensor(f"params/{name}"), x, strict=True)
        assert opened.get_tensor("key").dtype == np.uint32
        assert opened.get_tensor("params/b").dtype == np.float16


def test_files_of_either_are_read_by_the_other(tmp_path):
    arrays = {
        "a/b": np.arange(3, dtype=np.int16), "c": np.ones((2, 0), np.float32), "d": np.array(True),
        "e": np.asarray(jnp.ones((2, 3), jnp.bfloat16)),
    }
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    safetensors.numpy.save_file(arrays, theirs, {"format": "np"})
    train.save_tensors(ours, arrays)
    for got in (train.load_tensors(theirs), safetensors.numpy.load_file(ours)):
        assert jax.tree.structure(got) == jax.tree.structure(arrays)
        for name, x in arrays.items():
            np.testing.assert_array_equal(got[name], x, strict=True)
