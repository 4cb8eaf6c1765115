"""Weights by name; numbers against PyTorch's are in peers_torch/test_pretrained.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import nn, train

TOKENS = jnp.array([[3, 0, 6, 1]])


def norm(name, d):
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def gpt2_arrays(layers=2, d=4, prefix=""):
    shapes = {"wte.weight": (7, d), "wpe.weight": (5, d)} | norm("ln_f", d)
    for i in range(layers):
        for name, shape in (("attn.c_attn", (d, 3 * d)), ("attn.c_proj", (d, d)),
                            ("mlp.c_fc", (d, 4 * d)), ("mlp.c_proj", (4 * d, d))):
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        shapes |= norm(f"h.{i}.ln_1", d) | norm(f"h.{i}.ln_2", d)
    return drawn(shapes, prefix)


def bert_arrays(layers=2, d=4, hidden=6):
    e = "embeddings."
    shapes = {f"{e}word_embeddings.weight": (7, d), f"{e}position_embeddings.weight": (5, d),
              f"{e}token_type_embeddings.weight": (2, d)} | norm(f"{e}LayerNorm", d)
    for i in range(layers):
        at = f"encoder.layer.{i}."
        for name, shape in (("attention.self.query", (d, d)), ("attention.self.key", (d, d)),
                            ("attention.self.value", (d, d)), ("attention.output.dense", (d, d)),
                            ("intermediate.dense", (hidden, d)), ("output.dense", (d, hidden))):
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        shapes |= norm(f"{at}attention.output.LayerNorm", d) | norm(f"{at}output.LayerNorm", d)
    return drawn(shapes, "")


def drawn(shapes, prefix):
    draw = np.random.default_rng(0).normal
    return {prefix + n: draw(0, 0.4, shape).astype("float32") for n, shape in shapes.items()}


def written(folder, arrays, config=None):
    file = folder / "model.safetensors"
    train.save_tensors(file, arrays)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return file


@pytest.mark.parametrize("layers", [1, 2])
def test_parameters_are_those_of_the_network(tmp_path, layers):
    for load, arrays in ((nn.load_gpt2, gpt2_arrays(layers)), (nn.load_bert, bert_arrays(layers))):
        network, params = load(written(tmp_path, arrays), heads=2)
        shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), TOKENS))
        assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
            lambda a: (a.shape, a.dtype), shapes)


def test_prefix_masks_and_dtype_change_nothing_else(tmp_path):
    _, plain = nn.load_gpt2(written(tmp_path, gpt2_arrays()), heads=2)
    more = gpt2_arrays(prefix="transformer.")
    more["transformer.h.0.attn.bias"] = np.ones((1, 1, 5, 5), "float32")
    more["lm_head.weight"] = more["transformer.wte.weight"]
    _, found = nn.load_gpt2(written(tmp_path, more), heads=2, dtype=jnp.bfloat16)
    plain = jax.tree.map(lambda a: a.astype(jnp.bfloat16), plain)
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_a_head_of_its_own_makes_the_logits(tmp_path):
    arrays = gpt2_arrays() | {"lm_head.weight": np.zeros((7, 4), "float32")}
    network, params = nn.load_gpt2(written(tmp_path, arrays), heads=2)
    assert not network.apply(params, TOKENS).any()


def test_heads_are_the_configuration_s(tmp_path):
    arrays = gpt2_arrays()
    one, params = nn.load_gpt2(written(tmp_path, arrays))  # 4 features / 64: one head at least
    two, _ = nn.load_gpt2(written(tmp_path, arrays, {"n_head": 2}))
    asked, _ = nn.load_gpt2(written(tmp_path, arrays), heads=2)
    a, b, c = (n.apply(params, TOKENS) for n in (one, two, asked))
    assert not np.allclose(a, b)
    np.testing.assert_array_equal(b, c)


def test_padding_changes_no_vector(tmp_path):
    network, params = nn.load_bert(written(tmp_path, bert_arrays()), heads=2)
    alone = network.apply(params, TOKENS[:, :3])
    padded = network.apply(params, TOKENS, lengths=jnp.array([3]))
    np.testing.assert_allclose(padded[:, :3], alone, atol=1e-6)


def test_another_model_is_refused(tmp_path):
    arrays = gpt2_arrays()
    with pytest.raises(ValueError, match="Weights are found by their names in transformers, got"):
        nn.load_bert(written(tmp_path, arrays))
    with pytest.raises(ValueError, match=r"of their network, got \[3\] for 'layer_norm/bias'"):
        nn.load_gpt2(written(tmp_path, arrays | {"ln_f.bias": np.ones(3, "float32")}))
    with pytest.raises(ValueError, match="activation is 'gelu', got hidden_act='relu'"):
        nn.load_bert(written(tmp_path, bert_arrays(), {"hidden_act": "relu"}))
