"""`vjp`, `grad` and `value_and_grad`: trace a function, sweep forward, sweep backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import float0
from jax.tree_util import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)

from fbprop import rules as _rules
from fbprop.core import cotangent as ct
from fbprop.core.arguments import check_function, check_input, cotangent_one, indices, positions
from fbprop.core.engine import Engine
from fbprop.core.factored import Factored
from fbprop.core.fallback import FALLBACKS
from fbprop.core.jaxcompat import differentiable, out_avals, weak_like
from fbprop.core.pieces import Pieces, backward
from fbprop.core.record import record
from fbprop.core.table import Table
from fbprop.core.unknown import said


def vjp(
    fun: Callable,
    *primals,
    has_aux: bool = False,
    rules: Table | None = None,
    fallback: str | None = "registered",
    factored: bool | type = False,
):
    """Value of a function and its pullback, as `jax.vjp`, by fbprop's table of rules.

    The function runs once, on values where they are known: Python may branch and loop on them
    outside of `jax.jit`, as under `jax.vjp`. What it does with arrays is recorded, and evaluated
    when a value is asked for, or at the end.

    Args:
      fun: pure function of pytrees of arrays, returning a pytree of arrays.
      *primals: where to evaluate and differentiate it. Leaves of integer or boolean dtype are
        allowed; their cotangents are of dtype `jax.dtypes.float0`.
      has_aux: ``fun`` returns ``(out, aux)``, of which only ``out`` is differentiated.
      rules: the table of rules; default `fbprop.table`.
      fallback: who differentiates primitives that have no rule. ``"registered"``: the packages that
        brought them, if they are not JAX's own, by the derivative that they registered in JAX;
        ``"jax"``: JAX, these and its own; None: nobody.
      factored: cotangents that are products of two factors, or a few rows of a table, come back as
        such, `fbprop.Contraction` and `fbprop.Rows`, in place of arrays; one of these two classes:
        only that form does; False: as arrays.

    Returns:
      ``(out, pullback)``, or ``(out, pullback, aux)``. ``pullback`` maps a cotangent with the
      structure, shapes and dtypes of ``out`` to the tuple of cotangents of ``primals``. It is a
      pytree: it may be returned from and passed to jitted functions.

    Raises:
      TypeError: ``fun`` is not callable, a leaf is not an array, or ``has_aux`` without a pair.
      MissingRule: a differentiated value passes through a primitive that has no rule.
      jax.errors.ConcretizationTypeError: Python asks for a value that is not known (its kin too).

    Example:
      >>> import fbprop, jax.numpy as jnp
      >>> y, pullback = fbprop.vjp(jnp.sin, 0.0)
      >>> float(y), float(pullback(1.0)[0])
      (0.0, 1.0)
    """
    check_function(fun)
    engine = Engine(
        _rules.current() if rules is None else _checked(rules), _checked_fallback(fallback)
    )
    leaves, in_tree = tree_flatten(primals)
    leaves = [_as_value(x) for x in leaves]
    flat, seen = _flat(fun, in_tree, has_aux)
    pieces = Pieces(engine, _form(factored))
    with said():
        jaxpr, *rest = record(flat, leaves, pieces)
        in_avals, avals = [jax.typeof(x) for x in leaves], out_avals(jaxpr)
        n_out = seen["out_tree"].num_leaves
        outs = pieces.run(jaxpr, *rest, tuple(i < n_out for i in range(len(avals))))
    outs = [y if isinstance(y, jax.Array) else jnp.asarray(y) for y in outs]  # constants
    swept, kept = pieces.finish()
    static = (engine, swept, in_tree, seen["out_tree"], tuple(in_avals), tuple(avals[:n_out]))
    out, pullback = tree_unflatten(seen["out_tree"], outs[:n_out]), Pullback(kept, static)
    return (out, pullback, _aux(seen, outs[n_out:])) if has_aux else (out, pullback)


def _form(factored):
    if factored in (True, False):
        return Factored if factored else None
    if isinstance(factored, type) and issubclass(factored, Factored):
        return factored
    raise TypeError(
        f"factored says which cotangents come back unevaluated, got {factored!r} expected True, "
        "False, fbprop.Rows or fbprop.Contraction."
    )


def _flat(fun, in_tree, has_aux):
    """``fun`` from flat values to a list, its results and then the array leaves of ``aux``.

    Also what is known once it has run: the structure of both, and the other leaves of ``aux``.
    """
    seen = {}

    def flat(*values):
        out = fun(*tree_unflatten(in_tree, values))
        aux = ()
        if has_aux:
            if not (isinstance(out, (tuple, list)) and len(out) == 2):
                raise TypeError(
                    "With has_aux=True the function returns a pair (out, aux), got "
                    f"{type(out).__name__} expected a tuple of length 2."
                )
            out, aux = out
        outs, seen["out_tree"] = tree_flatten(out)
        extras, seen["aux_tree"] = tree_flatten(aux)
        # What aux holds besides traced values (a string, a NumPy array) is handed back as it is.
        traced = [isinstance(x, jax.core.Tracer) for x in extras]
        seen["static"] = [None if t else (x,) for x, t in zip(extras, traced)]
        return [*outs, *(x for x, t in zip(extras, traced) if t)]

    flat.__wrapped__ = fun  # what errors are to name
    return flat, seen


def _aux(seen, arrays):
    arrays = iter(arrays)
    leaves = [next(arrays) if s is None else s[0] for s in seen["static"]]
    return tree_unflatten(seen["aux_tree"], leaves)


def _is_array(x):
    return isinstance(x, (jax.Array, np.ndarray, np.generic, bool, int, float, complex))


def _as_value(x):
    """A leaf as JAX sees it; tracers and arrays as they are, Python and NumPy numbers converted."""
    if isinstance(x, jax.Array):
        return x
    _check_leaf(x, "Differentiated arguments")
    return jnp.asarray(x)


def _check_leaf(x, what):
    if not _is_array(x) and not hasattr(x, "__jax_array__"):
        raise TypeError(
            f"{what} are pytrees of arrays, got a leaf {x!r} of type {type(x).__name__}, which is "
            "not a valid JAX type."
        )


def _checked(rules):
    if not isinstance(rules, Table):
        raise TypeError(
            f"rules is a table, got {type(rules).__name__} expected fbprop.Table: start from "
            "fbprop.table.override(...)."
        )
    return rules


def _checked_fallback(fallback):
    if fallback not in FALLBACKS:
        raise ValueError(
            f"fallback says who differentiates primitives without a rule, got "
            f"{fallback!r} expected 'registered', 'jax' or None."
        )
    return fallback


@jax.tree_util.register_pytree_node_class
class Pullback:
    """The backward sweep of one `vjp` call, with what its forward sweep kept.

    A pytree whose leaves are the kept arrays; everything else about it is static.
    """

    def __init__(self, kept, static):
        self.kept, self._static = kept, static

    def tree_flatten(self):
        return (self.kept,), self._static

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, static)

    @property
    def plans(self):
        """What was decided per equation, of each piece: `fbprop.core.engine.Plan`."""
        return [piece.plan for piece in self._static[1]]

    @property
    def plan(self):
        """That of the last piece, the only one if Python asked for no value."""
        return self.plans[-1]

    def __call__(self, cotangent, *others) -> tuple:
        """Cotangents of the primals, given one of the output."""
        engine, pieces, in_tree, out_tree, in_avals, avals = self._static
        if others:
            raise TypeError(
                "A pullback takes one cotangent with the structure of the output, got "
                f"{1 + len(others)} arguments expected 1: those of several outputs go in a tuple."
            )
        leaves, tree = tree_flatten(cotangent)
        if tree != out_tree:
            raise ValueError(
                "Tree structure of cotangent input does not match structure of primal output: "
                f"got {tree} expected {out_tree}."
            )
        numbered = enumerate(zip(leaves, avals))
        douts = [_checked_cotangent(d, a, i, cotangent) for i, (d, a) in numbered]
        douts += [ct.ZERO] * (len(pieces[-1].plan.wanted) - len(douts))
        dins = backward(engine, pieces, self.kept, douts)
        return tree_unflatten(in_tree, [_boundary(d, a) for d, a in zip(dins, in_avals)])

    def __repr__(self):
        n = sum(x.size * x.dtype.itemsize for x in tree_leaves(self.kept))
        return f"<fbprop pullback keeping {n} bytes>"


def _checked_cotangent(d, aval, number, cotangent):
    """That leaf, of an output of this type; that of integers is zero, whatever its own type."""
    _check_leaf(d, "Cotangents")
    got, expected = jax.typeof(d), aval.to_tangent_aval()
    if got.shape == aval.shape:
        if not differentiable(aval):
            return ct.ZERO
        if got.dtype == aval.dtype:
            return _as_value(d)
    path = keystr(tree_flatten_with_path(cotangent)[0][number][0])
    raise ValueError(
        "A cotangent has the shape and dtype of the output, got an unexpected JAX type for "
        f"argument to vjp function: {got.str_short()} expected {expected.str_short()}, that of "
        f"output{path}: cast or reshape it."
    )


def _boundary(d, aval):
    if differentiable(aval):
        return d if isinstance(d, Factored) else weak_like(ct.dense(d, aval), aval)
    return np.zeros(aval.shape, float0)


def value_and_grad(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    rules: Table | None = None,
    fallback: str | None = "registered",
    factored: bool | type = False,
) -> Callable:
    """A function that returns ``fun``'s value and gradient, as `jax.value_and_grad`.

    Args:
      fun: returns a scalar (or ``(scalar, aux)`` with ``has_aux``).
      argnums: which positional argument(s) to differentiate.
      has_aux: ``fun`` returns ``(scalar, aux)``; the result is then ``((scalar, aux), gradient)``.
      holomorphic: ``fun`` is holomorphic; inputs and output are complex.
      allow_int: accept integer and boolean inputs, whose gradient is of dtype float0.
      rules, fallback, factored: see `vjp`.

    Returns:
      A function of ``fun``'s arguments returning ``(value, gradient)``; the gradient has the
      structure, shapes and dtypes of the argument(s), a tuple of them for a sequence ``argnums``.

    Raises:
      TypeError: ``fun`` returns something else than a real scalar, or an input is not
        real-valued (see ``holomorphic``, ``allow_int``).

    Example:
      >>> import fbprop, jax.numpy as jnp
      >>> value, gradient = fbprop.value_and_grad(lambda x: jnp.sum(x ** 2))(jnp.array([1.0, 2.0]))
      >>> float(value), gradient.tolist()
      (5.0, [2.0, 4.0])
    """
    check_function(fun)
    numbers, several = indices(argnums)

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def value_and_gradient(*args, **kwargs):
        chosen = positions(numbers, args)
        distinct = list(dict.fromkeys(chosen))

        def of_chosen(*values):
            full = list(args)
            for i, value in zip(distinct, values):
                full[i] = value
            return fun(*full, **kwargs)

        of_chosen.__wrapped__ = fun
        primals = [args[i] for i in distinct]
        for leaf in tree_leaves(primals):
            check_input(_as_value(leaf).dtype, holomorphic, allow_int)
        value, pullback, *aux = vjp(
            of_chosen, *primals, has_aux=has_aux, rules=rules, fallback=fallback,
            factored=factored,
        )
        found = dict(zip(distinct, pullback(cotangent_one(value, holomorphic))))
        gradient = tuple(found[i] for i in chosen) if several else found[chosen[0]]
        return (value, *aux) if has_aux else value, gradient

    return value_and_gradient


def grad(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    rules: Table | None = None,
    fallback: str | None = "registered",
    factored: bool | type = False,
) -> Callable:
    """A function that returns ``fun``'s gradient, as `jax.grad`; see `value_and_grad`.

    Returns:
      A function of ``fun``'s arguments returning the gradient, or ``(gradient, aux)``.

    Example:
      >>> import fbprop, jax.numpy as jnp
      >>> float(fbprop.grad(jnp.tanh)(0.0))
      1.0
    """
    both = value_and_grad(
        fun, argnums, has_aux, holomorphic, allow_int, rules=rules, fallback=fallback,
        factored=factored,
    )

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def gradient(*args, **kwargs):
        value, result = both(*args, **kwargs)
        return (result, value[1]) if has_aux else result

    return gradient
