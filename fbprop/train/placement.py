"""Where a state, its gradients and its batches lie: on a mesh by a layout, or where JAX puts them.

What is said here are shardings of values inside a program; XLA finds what devices have to send.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import tree_map

from fbprop.core.factored import is_factored
from fbprop.mesh.feed import Feed, host
from fbprop.mesh.follow import following
from fbprop.mesh.layouts import Layout, automatic, check_layout, check_mesh, replicated


class Anywhere:
    """Without a mesh nothing is moved."""

    feed = None

    def program(self, fun):
        return fun

    def around(self):
        return contextlib.nullcontext()

    def start(self, params, opt_init, rest):
        """Parameters, the optimiser's state and the rest of a state, all in new buffers."""
        params = tree_map(fresh, params() if is_maker(params) else params)
        return params, tree_map(fresh, opt_init(params)), tree_map(fresh, rest)

    def moved(self, state):
        return state

    def batch(self, batch):
        return batch

    def gradients(self, grads, params):
        return grads

    def result(self, state, metrics):
        return state, metrics


class Placement:
    """On a mesh, by a layout. In programs: `batch`, `gradients`, `result`; outside the others."""

    def __init__(self, mesh, layout: Layout):
        self.mesh, self.layout, self.feed = automatic(mesh), layout, Feed(mesh, layout)
        self.whole = NamedSharding(self.mesh, PartitionSpec())

    def program(self, fun):
        """A function to be compiled, as `around` outside of programs."""
        @functools.wraps(fun)
        def run(*args):
            if not _is_explicit():
                return fun(*args)
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return fun(*args)

        return run

    def around(self):
        """A context in place of a mesh that the caller has set (`jax.set_mesh`) for Explicit axes.

        There JAX refuses arrays that lie on the same axes as Auto ones.
        """
        return jax.set_mesh(self.mesh) if _is_explicit() else contextlib.nullcontext()

    def start(self, params, opt_init, rest):
        """As `Anywhere.start`; no device holds more than its part at any time."""
        with self.around():
            return self._start(params, opt_init, rest)

    def _start(self, params, opt_init, rest):
        def opt_state_of(p):
            return tree_map(fresh, opt_init(p))

        if is_maker(params):
            params = _made(lambda: tree_map(fresh, params()), self.params)
        else:
            tree_map(check_array, params)
            params = self.put(params, self.params(jax.eval_shape(_fresh_all, params)))
            params = _made(_fresh_all, self.params, params)
        follow = lambda state: following(self.layout, self.mesh, params, state)
        opt_state = _made(opt_state_of, follow, params)
        rest = self.put(tree_map(fresh, rest), tree_map(lambda _: self.whole, rest))
        return params, opt_state, rest

    def moved(self, state):
        """A state made elsewhere, in new buffers."""
        return self.put(state, self.state(state))

    def batch(self, batch):
        """The examples of a batch along the axes for them."""
        def one(x):
            if jnp.ndim(x):
                self.feed.check(x.shape[0])
            return lax.with_sharding_constraint(x, self.feed.sharding(x))

        return tree_map(one, batch)

    def gradients(self, grads, params):
        """Gradients where their parameters are; those in factors, and holes, are left alone."""
        def one(g, sharding):
            return g if _is_other(g) else lax.with_sharding_constraint(g, sharding)

        return tree_map(one, grads, self.params(params), is_leaf=_is_other)

    def result(self, state, metrics):
        """A new state where the old one was; metrics on every device."""
        state = tree_map(lax.with_sharding_constraint, state, self.state(state))
        return state, tree_map(lambda m: lax.with_sharding_constraint(m, self.whole), metrics)

    def params(self, params) -> Any:
        """The parameters' shardings."""
        return self.layout.shardings(self.mesh, params)

    def state(self, state) -> Any:
        """A state's shardings: the optimiser's follow the parameters', all else is whole."""
        whole = tree_map(lambda _: self.whole, state)
        return whole._replace(
            params=self.params(state.params),
            opt_state=following(self.layout, self.mesh, state.params, state.opt_state),
        )

    def put(self, tree, shardings) -> Any:
        """Copies of arrays that every process has, each device's part to it."""
        return tree_map(_put, tree, shardings)


def placement(mesh, layout) -> Anywhere | Placement:
    if mesh is None and layout is None:
        return Anywhere()
    check_mesh(mesh)
    check_layout(layout, none=True)
    return Placement(mesh, replicated() if layout is None else layout)


def _is_explicit() -> bool:
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def is_maker(params) -> bool:
    """Whether parameters are given by a function; a module that is a pytree is none."""
    return callable(params) and jax.tree_util.all_leaves([params])


def fresh(x):
    """A copy with a buffer of its own, without the weak type that would make step 2 recompile."""
    check_array(x)
    return jnp.array(x, dtype=jnp.asarray(x).dtype, copy=True)


def check_array(x):
    # Of JAX 0.10, a union does not know tracers as arrays.
    if not isinstance(x, (jax.Array, jax.typing.ArrayLike, list)):
        raise TypeError(
            f"A state is a pytree of arrays, got a leaf {x!r} of type {type(x).__name__} expected "
            "arrays or numbers: keep what is none outside."
        )


def _fresh_all(tree):
    return tree_map(fresh, tree)


def _made(fun, shardings, *args):
    """What a function returns, made in parts where ``shardings`` of its form says."""
    return jax.jit(fun, out_shardings=shardings(jax.eval_shape(fun, *args)))(*args)


def _is_other(g):
    return g is None or is_factored(g)


def _put(x, sharding):
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(x)
    if jax.process_count() == 1:
        return jax.device_put(x, sharding, may_alias=False)
    whole = host(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
