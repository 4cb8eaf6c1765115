"""Published weights by name: GPT-2 and BERT in the layout of Hugging Face's `transformers`.

PyTorch's linear layers hold W as [out, in], GPT-2's (`Conv1D`) as [in, out], ours as [in, out].
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbprop.data.tensorfile import load_tensors
from fbprop.nn.encoder import encoder
from fbprop.nn.language import gpt
from fbprop.nn.layer import Layer


def load_gpt2(file: str | os.PathLike, *, heads: int | None = None, dropout: float = 0.0,
              dtype=jnp.float32) -> tuple[Layer, Any]:
    """GPT-2 (Radford et al. 2019) from a safetensors file: `gpt` and its parameters.

    Sizes are those of the arrays. Names may begin with ``transformer.``; the masks that older files
    hold are not read. Logits are by the token embedding, or by ``lm_head`` where that differs.

    Args:
      file: such as ``model.safetensors`` of the model ``gpt2``.
      heads: which no array tells: None is ``n_head`` of the ``config.json`` beside the file, or
        without one features / 64, as in all published sizes.
      dropout: see `gpt`.
      dtype: of the parameters.

    Returns:
      ``(network, params)``, for ``network.apply(params, tokens)``.

    Raises:
      ValueError: an array is missing or of another shape; the configuration names another
        activation; heads does not divide features.
      fbprop.train.CheckpointError: the file is damaged or of another format.

    Example:
      >>> import jax, jax.numpy as jnp, os, tempfile
      >>> from fbprop import nn, train
      >>> D, wide = 4, {"ln_1": (4,), "ln_2": (4,), "attn.c_attn": (4, 12), "attn.c_proj": (4, 4),
      ...               "mlp.c_fc": (4, 16), "mlp.c_proj": (16, 4)}
      >>> arrays = {"wte.weight": jnp.ones((7, D)), "wpe.weight": jnp.ones((5, D)),
      ...           "ln_f.weight": jnp.ones(D), "ln_f.bias": jnp.zeros(D)}
      >>> for name, shape in wide.items():
      ...     arrays[f"h.0.{name}.weight"] = jnp.ones(shape)
      ...     arrays[f"h.0.{name}.bias"] = jnp.zeros(shape[-1])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "model.safetensors")
      ...     train.save_tensors(file, arrays)
      ...     network, params = nn.load_gpt2(file, heads=2)
      >>> network.apply(params, jnp.zeros((1, 3), jnp.int32)).shape
      (1, 3, 7)
    """
    config = _config(file, "activation_function", "gelu_new")
    take = _Arrays(file, "transformer.", "wte.weight", dtype)
    tokens, positions = take("wte.weight"), take("wpe.weight")
    layers, features = take.blocks("h."), tokens.shape[1]
    head = take.found.get("lm_head.weight", None)
    tie = head is None or np.array_equal(head, take.found[take.prefix + "wte.weight"])
    network = gpt(
        tokens.shape[0], layers=layers, features=features, context=positions.shape[0],
        heads=heads or config.get("n_head") or max(features // 64, 1), dropout=dropout, tie=tie,
        dtype=dtype,
    )
    params = {"embedding": {"embedding": tokens}, "position_embedding": {"embedding": positions},
              "layer_norm": take.norm("ln_f")}
    for i, name in enumerate(_numbered("block", layers)):
        at = f"h.{i}."
        params[name] = {
            "attention": {
                "layer_norm": take.norm(at + "ln_1"),
                "attention": {"qkv": take.dense(at + "attn.c_attn"),
                              "out": take.dense(at + "attn.c_proj")},
            },
            "mlp": {"layer_norm": take.norm(at + "ln_2"), "dense_0": take.dense(at + "mlp.c_fc"),
                    "dense_1": take.dense(at + "mlp.c_proj")},
        }
    if not tie:
        params["head"] = {"kernel": jnp.asarray(head.T, dtype)}
    return _checked(file, network, params)


def load_bert(file: str | os.PathLike, *, heads: int | None = None, dropout: float = 0.0,
              dtype=jnp.float32) -> tuple[Layer, Any]:
    """BERT (Devlin et al. 2019) or a sentence encoder like it: `encoder` and its parameters.

    Sizes are those of the arrays. Names may begin with ``bert.``. The vector of the first segment
    is added to every position's; other segments, the pooler and heads are not read.

    Args:
      file: such as ``model.safetensors`` of the model ``bert-base-uncased``.
      heads: which no array tells: None is ``num_attention_heads`` of the ``config.json`` beside the
        file, or without one features / 64, as in the published BERTs.
      dropout: see `encoder`.
      dtype: of the parameters.

    Returns:
      ``(network, params)``, for ``network.apply(params, tokens, lengths=lengths)``.

    Raises:
      ValueError: an array is missing or of another shape; the configuration names another
        activation; heads does not divide features.
      fbprop.train.CheckpointError: the file is damaged or of another format.

    Example::

        network, params = nn.load_bert("all-MiniLM-L6-v2/model.safetensors")
        vectors = network.apply(params, tokens, lengths=lengths)      # [B, T, 384]
    """
    config = _config(file, "hidden_act", "gelu")
    take = _Arrays(file, "bert.", "embeddings.word_embeddings.weight", dtype, transposed=True)
    tokens = take("embeddings.word_embeddings.weight")
    positions = take("embeddings.position_embeddings.weight")
    positions = positions + take("embeddings.token_type_embeddings.weight")[0]
    layers, features = take.blocks("encoder.layer."), tokens.shape[1]
    params = {"embedding": {"embedding": tokens}, "position_embedding": {"embedding": positions},
              "layer_norm": take.norm("embeddings.LayerNorm")}
    for i, name in enumerate(_numbered("block", layers)):
        at = f"encoder.layer.{i}."
        each = [take.dense(f"{at}attention.self.{part}") for part in ("query", "key", "value")]
        params[name] = {
            "attention": {"attention": {
                "qkv": jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *each),
                "out": take.dense(at + "attention.output.dense"),
            }},
            "layer_norm_0": take.norm(at + "attention.output.LayerNorm"),
            "mlp": {"dense_0": take.dense(at + "intermediate.dense"),
                    "dense_1": take.dense(at + "output.dense")},
            "layer_norm_1": take.norm(at + "output.LayerNorm"),
        }
    network = encoder(
        tokens.shape[0], layers=layers, features=features, context=positions.shape[0],
        heads=heads or config.get("num_attention_heads") or max(features // 64, 1),
        hidden=take("encoder.layer.0.intermediate.dense.bias").shape[0], dropout=dropout,
        epsilon=config.get("layer_norm_eps", 1e-12), dtype=dtype,
    )
    return _checked(file, network, params)


class _Arrays:
    """The arrays of a file under the names of the model, with or without the prefix."""

    def __init__(self, file, prefix, first, dtype, transposed=False):
        self.file, self.found, self.dtype = file, load_tensors(file), dtype
        self.prefix = prefix if prefix + first in self.found else ""
        self.transposed = transposed

    def __call__(self, name):
        try:
            return jnp.asarray(self.found[self.prefix + name], self.dtype)
        except KeyError:
            raise ValueError(
                f"Weights are found by their names in transformers, got {self.file} without "
                f"{name!r} expected it among {sorted(self.found)[:5]}...: this is another model."
            ) from None

    def blocks(self, prefix):
        """How many blocks there are: the numbers that follow ``prefix``; at least one."""
        start = self.prefix + prefix
        numbers = [int(n[len(start):].split(".")[0]) for n in self.found if n.startswith(start)]
        return max(numbers, default=0) + 1

    def dense(self, name):
        kernel = self(name + ".weight")
        return {"kernel": kernel.T if self.transposed else kernel, "bias": self(name + ".bias")}

    def norm(self, name):
        return {"scale": self(name + ".weight"), "bias": self(name + ".bias")}


def _config(file, key, activation):
    """The ``config.json`` beside a file, if there is one, after a look at its activation."""
    path = pathlib.Path(file).with_name("config.json")
    config = json.loads(path.read_text()) if path.exists() else {}
    if config.get(key, activation) != activation:
        raise ValueError(
            f"This network's activation is {activation!r}, got {key}={config[key]!r} in {path}; "
            f"expected {activation!r}: build the network from layers."
        )
    return config


def _numbered(name, n):
    """What `sequential` calls n layers of one name."""
    return [name] if n == 1 else [f"{name}_{i}" for i in range(n)]


def _checked(file, network, params):
    """The pair, when the parameters have the shapes that the network's own would have."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), tokens))
    expected = dict(jax.tree.leaves_with_path(shapes))
    for path, found in jax.tree.leaves_with_path(params):
        if path not in expected or expected[path].shape != found.shape:
            raise ValueError(
                f"Weights have the shapes of their network, got {list(found.shape)} for "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')!r} in {file}; expected "
                f"{list(expected[path].shape) if path in expected else 'none'}: another model."
            )
    return network, params
