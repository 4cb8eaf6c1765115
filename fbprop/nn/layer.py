"""What a layer is, and how layers are put in sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import jax


class Layer:
    """A network or a part of one: a pair of pure functions and a name.

    Parameters are an ordinary pytree (nested dicts of arrays) that the caller holds; a layer holds
    none. A layer of your own is such a pair::

        def init(key, x):                          # x: shape and dtype of the input
            return {"scale": jnp.ones(x.shape[-1], x.dtype)}

        def apply(params, x, *, key, train):       # key: random numbers; train: static
            return params["scale"] * x

        scale = nn.Layer(init, apply, "scale")

    A layer unpacks into its two functions: ``init, apply = nn.dense(3)``.

    Args:
      init: ``(key, x) -> params``, ``x`` a `jax.ShapeDtypeStruct` or an array.
      apply: ``(params, x, *, key, train) -> y``.
      name: of the `jax.named_scope` that ``apply`` runs in; a part of the path by which rules are
        overridden (``where="encoder/*"``) and errors say where they happened.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> double = nn.Layer(lambda key, x: {}, lambda params, x, **_: 2 * x, "double")
      >>> double.apply({}, jnp.arange(3)).tolist()
      [0, 2, 4]
    """

    def __init__(self, init: Callable, apply: Callable, name: str):
        self._init, self._apply, self.name = init, apply, name

    def init(self, key: jax.Array, x):
        """Parameters for inputs like ``x``.

        Args:
          key: a JAX random key; the same key gives the same parameters.
          x: an array, or a `jax.ShapeDtypeStruct`, or a pytree of them; only shapes and dtypes
            are looked at, and the batch may be of any size.

        Raises:
          TypeError: ``x`` has no shape and dtype.
        """
        if any(not (hasattr(a, "shape") and hasattr(a, "dtype")) for a in jax.tree.leaves(x)):
            raise TypeError(
                f"Layer {self.name!r} is initialised for the shape and dtype of its input, got "
                f"{x!r} expected an array or a jax.ShapeDtypeStruct: give an example batch or "
                "jax.ShapeDtypeStruct(shape, dtype)."
            )
        return self._init(key, x)

    def apply(self, params, x, *, key: jax.Array | None = None, train: bool = False):
        """The layer's output.

        Args:
          params: what `init` returned, possibly trained since.
          x: the input.
          key: a JAX random key, for layers that draw random numbers in training.
          train: whether to behave as in training (dropout drops) or as in use.
        """
        with jax.named_scope(self.name):
            return self._apply(params, x, key=key, train=train)

    def renamed(self, name: str) -> Layer:
        """The same layer under another name."""
        return Layer(self._init, self._apply, name)

    def __iter__(self):
        return iter((self.init, self.apply))

    def __repr__(self):
        return f"<layer {self.name!r}>"


def function(fun: Callable, name: str | None = None) -> Layer:
    """A function of one array as a layer without parameters.

    Args:
      fun: array -> array.
      name: default the function's own.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> nn.function(jnp.sin)
      <layer 'sin'>
    """
    return Layer(lambda key, x: {}, lambda params, x, **_: fun(x), name or fun.__name__)


def sequential(*layers: Layer, name: str = "sequential") -> Layer:
    """Layers one after the other.

    Parameters are a dict with one entry for each layer that has any, under the layer's name; names
    that occur more than once are numbered in order: ``conv_0, conv_1, dense``. The named scopes are
    the same, so ``params["conv_0"]`` is used at path ``"sequential/conv_0"``.

    Args:
      *layers: each takes what the one before returns.
      name: see `Layer`; a sequence within another one is told apart by it.

    Raises:
      ValueError: two layers end up with the same name (`init`, `apply`: not a layer of this one).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net = nn.sequential(nn.dense(5), nn.relu(), nn.dense(3))
      >>> params = net.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.float32))
      >>> {name: layer["kernel"].shape for name, layer in params.items()}
      {'dense_0': (2, 5), 'dense_1': (5, 3)}
      >>> net.apply(params, jnp.ones((7, 2))).shape
      (7, 3)
    """
    layers = _distinct(layers)

    def init(key, x):
        params = {}
        for layer, k in zip(layers, jax.random.split(key, len(layers))):
            mine = layer.init(k, x)
            if jax.tree.leaves(mine):
                params[layer.name] = mine
            x = jax.eval_shape(layer.apply, mine, x)
        return params

    def apply(params, x, *, key, train):
        _check_names(name, params, layers)
        keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
        for layer, k in zip(layers, keys):
            x = layer.apply(params.get(layer.name, {}), x, key=k, train=train)
        return x

    return Layer(init, apply, name)


def _distinct(layers):
    """The layers, those of the same name numbered."""
    occurs, seen = Counter(layer.name for layer in layers), Counter()
    result = []
    for layer in layers:
        number = f"_{seen[layer.name]}" if occurs[layer.name] > 1 else ""
        seen[layer.name] += 1
        result.append(layer.renamed(layer.name + number))
    if len({layer.name for layer in result}) < len(result):
        names = [layer.name for layer in result]
        raise ValueError(
            f"Layers in a sequence have distinct names, got {names} expected no repetition: "
            "numbering made two the same, give one another name."
        )
    return result


def _check_names(name, params, layers):
    if strangers := sorted(set(params) - {layer.name for layer in layers}):
        raise ValueError(
            f"Parameters of {name!r} have an entry per layer, got {strangers[0]!r} expected some "
            f"of {[layer.name for layer in layers]}: these parameters belong to another network."
        )
