"""Networks from layers: in sequence, around a shortcut, the same block many times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.nn.layer import Layer


def sequential(*layers: Layer, name: str = "sequential") -> Layer:
    """Layers one after the other.

    Parameters are a dict with one entry for each layer that has any, under the layer's name; names
    that occur more than once are numbered in order: ``conv_0, conv_1, dense``. The state has one
    for each layer with state. The named scopes are the same, so ``params["conv_0"]`` is used at
    path ``"sequential/conv_0"``.

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
    layers = distinct(layers)

    def init(key, x):
        return init_in_order(layers, key, x)

    def init_state(x):
        return state_in_order(layers, x)

    def apply(params, x, *, state, **told):
        check_names(name, params, layers)
        return apply_in_order(layers, params, x, state=state, **told)

    return composed(init, apply, name, init_state, layers)


def residual(*layers: Layer, shortcut: Layer | None = None, name: str = "residual") -> Layer:
    """y = shortcut(x) + layers(x), the layers one after the other (He et al. 2016).

    Parameters and state are dicts with the layers' entries, as those of `sequential`, and
    ``"shortcut"``'s, if it has any.

    Args:
      *layers: the branch.
      shortcut: what x goes through on the other way, where the branch changes the shape: a strided
        1 x 1 convolution, say. Default: nothing.
      name: see `Layer`.

    Raises:
      ValueError: the two ways give different shapes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> block = nn.residual(nn.layer_norm(), nn.dense(3), nn.gelu())
      >>> x = jnp.ones((2, 3))
      >>> block.apply(block.init(jax.random.key(0), x), x).shape
      (2, 3)
    """
    way = [] if shortcut is None else [shortcut.renamed("shortcut")]
    parts = distinct((*layers, *way))
    branch, way = parts[:len(layers)], parts[len(layers):]

    def init(key, x):
        keys = jax.random.split(key)
        return init_in_order(branch, keys[0], x) | init_in_order(way, keys[1], x)

    def init_state(x):
        return state_in_order(branch, x) | state_in_order(way, x)

    def apply(params, x, *, key, state, **told):
        check_names(name, params, parts)
        keys = (None, None) if key is None else jax.random.split(key)
        y, new = apply_in_order(branch, params, x, key=keys[0], state=state, **told)
        x, more = apply_in_order(way, params, x, key=keys[1], state=state, **told)
        if x.shape != y.shape:
            raise ValueError(
                f"Layer {name!r} adds its branch to its shortcut, got shapes {y.shape} and "
                f"{x.shape} expected equal ones: give shortcut=, a layer that changes x likewise."
            )
        return x + y, new | more

    return composed(init, apply, name, init_state, parts)


def repeated(layer: Layer, n: int, *, remat: bool = False, name: str = "repeated") -> Layer:
    """The same layer n times in sequence, with parameters of its own each time.

    A `jax.lax.scan`: n layers compile in the time of one. Parameters and state are a dict with
    one entry, under the layer's name: those of the layer, stacked along a new first axis [n, ...].

    Args:
      layer: its output has the shape and dtype of its input.
      n: how many times.
      remat: keep only the n inputs for the backward pass and compute the rest again (Chen et al.
        2016): memory of one layer, for a third more time.
      name: see `Layer`.

    Raises:
      ValueError: n < 1; the layer changes shape or dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> tower = nn.repeated(nn.dense(3), 5)
      >>> params = tower.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> params["dense"]["kernel"].shape
      (5, 3, 3)
    """
    if n < 1:
        raise ValueError(f"A layer is repeated at least once, got n={n} expected n >= 1.")
    part = layer.name

    def init(key, x):
        _check_kept(name, layer, x, layer.out_shape(x))
        each = jax.vmap(lambda k: layer.init(k, x))(jax.random.split(key, n))
        return {part: each} if jax.tree.leaves(each) else {}

    def init_state(x):
        once = layer.init_state(x)
        return {part: jax.tree.map(lambda s: jnp.broadcast_to(s, (n, *s.shape)), once)}

    def apply(params, x, *, key, state, **told):
        check_names(name, params, [layer])

        def one(x, own):
            mine, state, k = own
            y, state = layer.apply(mine, x, key=k, state=state, **told)
            _check_kept(name, layer, x, y)
            return y, state

        keys = None if key is None else jax.random.split(key, n)
        own = params.get(part, {}), state_of(layer, state), keys
        y, new = lax.scan(jax.checkpoint(one) if remat else one, x, own, length=n)
        return y, {part: new}

    return composed(init, apply, name, init_state, [layer])


def composed(init: Callable, apply: Callable, name: str, init_state: Callable,
             parts: Sequence[Layer]) -> Layer:
    """A layer made of others, without state if they have none.

    Args:
      init, name, init_state: see `Layer`.
      apply: ``(params, x, *, key, train, state, lengths) -> (y, state)``, ``state`` a dict by the
        parts' names of what state they have.
      parts: the layers it is made of.
    """
    if any(part.stateful for part in parts):
        return Layer(init, apply, name, init_state, parts)

    def stateless(params, x, *, key, train, lengths):
        return apply(params, x, key=key, train=train, state={}, lengths=lengths)[0]

    return Layer(init, stateless, name, parts=parts)


def init_in_order(layers: Sequence[Layer], key, x) -> dict:
    """Parameters of layers that follow each other, of those that have any, by name."""
    params = {}
    for layer, k in zip(layers, jax.random.split(key, len(layers))):
        mine = layer.init(k, x)
        if jax.tree.leaves(mine):
            params[layer.name] = mine
        x = layer.out_shape(x)
    return params


def state_in_order(layers: Sequence[Layer], x) -> dict:
    """The state of layers that follow each other, of those that have any, by name."""
    state = {}
    for layer in layers:
        if layer.stateful:
            state[layer.name] = layer.init_state(x)
        x = layer.out_shape(x)
    return state


def apply_in_order(layers: Sequence[Layer], params, x, *, key, state, **told):
    """Output of layers that follow each other, and their new state by name."""
    new = {}
    for layer, k in zip(layers, _keys(key, len(layers))):
        mine = params.get(layer.name, {})
        x, mine = layer.apply(mine, x, key=k, state=state_of(layer, state), **told)
        if layer.stateful:
            new[layer.name] = mine
    return x, new


def distinct(layers: Sequence[Layer]) -> list[Layer]:
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


def check_names(name: str, params: dict, layers: Sequence[Layer]) -> None:
    """Raises if there are parameters of a layer that is none of these."""
    if strangers := sorted(set(params) - {layer.name for layer in layers}):
        raise ValueError(
            f"Parameters of {name!r} have an entry per layer, got {strangers[0]!r} expected some "
            f"of {[layer.name for layer in layers]}: these parameters belong to another network."
        )


def state_of(layer: Layer, state: dict):
    """A part's own state; None, which it complains about, where it needs one and has none."""
    return state.get(layer.name) if layer.stateful else {}


def _keys(key, n):
    """A key for each of n parts, or none."""
    return [None] * n if key is None else jax.random.split(key, n)


def _check_kept(name, layer, x, y):
    if (y.shape, y.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"Layer {name!r} feeds {layer.name!r} its own output, got {y.dtype.name}"
            f"{list(y.shape)} expected {x.dtype.name}{list(x.shape)}, as its input."
        )
