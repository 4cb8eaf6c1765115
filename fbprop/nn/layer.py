"""What a layer is: two pure functions, and a third where there are running statistics."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar

import jax

from fbprop.core.devices import own_broadcasting
from fbprop.nn.shapes import without_padding

_watcher: ContextVar[Callable | None] = ContextVar("watcher", default=None)
_lengths: ContextVar[object] = ContextVar("lengths", default=None)


class Layer:
    """A network or a part of one: pure functions and a name.

    Parameters are an ordinary pytree (nested dicts of arrays) that the caller holds; a layer holds
    none. A layer of your own is a pair::

        def init(key, x):                          # x: shape and dtype of the input
            return {"scale": jnp.ones(x.shape[-1], x.dtype)}

        def apply(params, x, *, key, train):       # of the keywords, those that it needs
            return params["scale"] * x

        scale = nn.Layer(init, apply, "scale")

    A layer unpacks into its two functions: ``init, apply = nn.dense(3)``.

    A layer with state, such as running statistics, has a third function and returns two results::

        def init_state(x):
            return {"seen": jnp.zeros((), jnp.int32)}

        def apply(params, x, *, train, state):
            return x, {"seen": state["seen"] + train}

        counter = nn.Layer(lambda key, x: {}, apply, "counter", init_state)

    Args:
      init: ``(key, x) -> params``, ``x`` a `jax.ShapeDtypeStruct` or an array.
      apply: ``(params, x, *, key, train, lengths) -> y``; with ``init_state``
        ``(params, x, *, key, train, lengths, state) -> (y, state)``. It is given the keywords that
        its signature names (all, if that ends in ``**_``); `apply` below says what they are.
      name: of the `jax.named_scope` that ``apply`` runs in; a part of the path by which rules are
        overridden (``where="encoder/*"``) and errors say where they happened.
      init_state: ``x -> state``, a pytree of arrays; None for a layer without state.
      parts: the layers that it is made of, in order, by the names of their parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> double = nn.Layer(lambda key, x: {}, lambda params, x: 2 * x, "double")
      >>> double.apply({}, jnp.arange(3)).tolist()
      [0, 2, 4]
    """

    def __init__(self, init: Callable, apply: Callable, name: str,
                 init_state: Callable | None = None, parts: Sequence[Layer] = ()):
        self._init, self._apply, self._init_state, self.name = init, apply, init_state, name
        self.parts = tuple(parts)
        self._takes = _keywords(apply)
        self._out_shapes = {}

    @property
    def stateful(self) -> bool:
        """Whether the layer, or a part of it, has state."""
        return self._init_state is not None

    def init(self, key: jax.Array, x):
        """Parameters for inputs like ``x``.

        Args:
          key: a JAX random key; the same key gives the same parameters.
          x: an array, or a `jax.ShapeDtypeStruct`, or a pytree of them; only shapes and dtypes
            are looked at, and the batch may be of any size.

        Raises:
          TypeError: ``x`` has no shape and dtype.
        """
        self._check_shaped(x)
        return self._init(key, x)

    def init_state(self, x):
        """The state before training, for inputs like ``x``: a pytree of arrays, ``{}`` without.

        In `fbprop.train` it is the ``model_state`` that a loss receives and returns.

        Args:
          x: as for `init`.

        Raises:
          TypeError: ``x`` has no shape and dtype.
        """
        self._check_shaped(x)
        return self._init_state(x) if self.stateful else {}

    def apply(self, params, x, *, key: jax.Array | None = None, train: bool = False, state=None,
              lengths: jax.Array | None = None):
        """The layer's output; with a state given, the pair of output and new state.

        Args:
          params: what `init` returned, possibly trained since.
          x: the input.
          key: a JAX random key, for layers that draw random numbers in training.
          train: whether to behave as in training (dropout drops, batch norm uses the batch's
            statistics and updates the running ones) or as in use.
          state: what `init_state` returned, possibly updated since. A layer without state returns
            it as it is.
          lengths: integers [B], for a batch of padded sequences [B, T, ...]: how many of the T
            steps of each are real. Every layer inside is told; recurrent layers, attention and
            averages over time leave out the rest, which may hold anything: it is read as 0, and
            gets gradient 0. None: all are real.

        Raises:
          ValueError: the layer has state and none is given.
        """
        if state is None and self.stateful:
            raise ValueError(
                f"Layer {self.name!r} keeps a state, got state=None expected what init_state(x) "
                "returned: call y, state = layer.apply(params, x, state=state, train=train)."
            )
        offered = {"key": key, "train": train, "state": state, "lengths": lengths}
        with jax.named_scope(self.name), _watched(self.name) as note, _real(x, lengths) as x:
            with own_broadcasting():
                out = self._apply(params, x, **{name: offered[name] for name in self._takes})
            y, new = out if self.stateful else (out, state)
            note(y)
        return y if state is None else (y, new)

    def out_shape(self, x):
        """Shape and dtype of the output for inputs like ``x``; nothing is computed.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from fbprop import nn
          >>> nn.max_pool(2).out_shape(jax.ShapeDtypeStruct((5, 8, 6, 3), jnp.float32)).shape
          (5, 4, 3, 3)
        """
        def run(x):
            params = self.init(jax.random.key(0), x)
            return self.apply(params, x, state=self.init_state(x))[0]

        self._check_shaped(x)
        # Remembered: a network asks each part at every level of its nesting, 3^depth times in all.
        leaves, tree = jax.tree.flatten(x)
        form = tree, tuple((a.shape, a.dtype) for a in leaves)
        if form not in self._out_shapes:
            with watching(None):
                self._out_shapes[form] = jax.eval_shape(run, x)
        return self._out_shapes[form]

    def renamed(self, name: str) -> Layer:
        """The same layer under another name."""
        return Layer(self._init, self._apply, name, self._init_state, self.parts)

    def _check_shaped(self, x):
        if any(not (hasattr(a, "shape") and hasattr(a, "dtype")) for a in jax.tree.leaves(x)):
            raise TypeError(
                f"Layer {self.name!r} is initialised for the shape and dtype of its input, got "
                f"{x!r} expected an array or a jax.ShapeDtypeStruct: give an example batch or "
                "jax.ShapeDtypeStruct(shape, dtype)."
            )

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
    return Layer(lambda key, x: {}, lambda params, x: fun(x), name or fun.__name__)


def _keywords(apply):
    """Those of the keywords of `Layer.apply` that a function takes."""
    known, found = ("key", "train", "state", "lengths"), inspect.signature(apply).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in found.values())
    return known if everything else tuple(name for name in known if name in found)


@contextlib.contextmanager
def _real(x, lengths):
    """``x`` without what padding holds; done once, by the outermost layer that is told lengths."""
    if lengths is None or lengths is _lengths.get():
        yield x
        return
    token = _lengths.set(lengths)
    try:
        yield without_padding(x, lengths)
    finally:
        _lengths.reset(token)


@contextlib.contextmanager
def _watched(name):
    """Tells the watcher, if there is one, what is applied and what comes out."""
    watch = _watcher.get()
    if watch is None:
        yield lambda y: None
    else:
        watch(True, name, None)
        yield lambda y: watch(False, name, y)


@contextlib.contextmanager
def watching(watch: Callable | None):
    """Calls ``watch(entering, name, output)`` at both ends of every `Layer.apply` inside."""
    token = _watcher.set(watch)
    try:
        yield
    finally:
        _watcher.reset(token)
