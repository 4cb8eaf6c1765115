"""Which operation made the first number that is not finite, forward or backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import tree_leaves

from fbprop import rules as _rules
from fbprop.core import jaxcompat as jc
from fbprop.core.arguments import indices, positions
from fbprop.core.factored import Rows, dense
from fbprop.core.table import Table
from fbprop.core.tap import TAP
from fbprop.reverse import value_and_grad, vjp
from fbprop.watch import blame
from fbprop.watch.factors import wide
from fbprop.watch.points import name_of, within
from fbprop.watch.traced import Traced
from fbprop.watch.trail import blank, extent, recorded


class Origin(NamedTuple):
    """Where the first number that is not finite was made.

    Attributes:
      kind: "nan" or "inf".
      direction: "forward"; "backward": it is in a cotangent; "given": in an argument or a constant.
      path, primitive, line: of the equation, as in `fbprop.watch.Point`.
      steps: the steps of the loops around it, the outermost first, from 0.
      operands: per operand its type and its smallest and largest number (nan if it holds one).
    """

    kind: str
    direction: str
    path: str
    primitive: str
    line: str
    steps: tuple[int, ...]
    operands: tuple[tuple[str, float, float], ...]

    def __str__(self):
        if self.direction == "given":
            return f"the first number that is not finite is {self.kind} in {self.primitive}"
        where = ", ".join(
            [f"path {self.path!r}"] * bool(self.path) + [f"at {self.line}"] * bool(self.line)
            + [f"step {'.'.join(map(str, self.steps))} of its loop"] * bool(self.steps)
        )
        ranges = ", ".join(f"{t} from {low:.4g} to {high:.4g}" for t, low, high in self.operands)
        return (
            f"the first number that is not finite is {self.kind}, made by {self.primitive} going "
            f"{self.direction}" + f" ({where})" * bool(where) + f", of {ranges}" * bool(ranges)
        )


@jax.tree_util.register_pytree_node_class
class NonFinite:
    """What `first_nonfinite` found: a pytree that a jitted function may return.

    Attributes:
      recorded: ranges of values and cotangents, one vector, 0 where all is finite; None if nothing
        was looked at, because all was finite and known to be.
    """

    def __init__(self, recorded, program):
        self.recorded, self.program = recorded, program

    def tree_flatten(self):
        return (self.recorded,), self.program

    @classmethod
    def tree_unflatten(cls, program, children):
        return cls(*children, program)

    def first(self) -> Origin | None:
        """The equation that made the first number that is not finite; None: all are finite."""
        if self.recorded is None:
            return None
        return self.program.first(self.recorded)

    def __bool__(self):
        return self.first() is not None

    def __str__(self):
        return str(self.first() or "all numbers are finite")

    def __repr__(self):
        return f"<fbprop: {self}>"


def first_nonfinite(
    fun: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False, *,
    rules: Table | None = None, fallback: str | None = "registered",
) -> Callable:
    """`fbprop.value_and_grad` that can say which operation made nan or infinity.

    Only if the value or the gradient is not finite, the function is run once more, with every value
    looked at. The equation is found by going back from there: what was masked (by `jnp.where`, say)
    and reaches neither is not blamed, and of a nan made of infinities it is who made these, unless
    they were given as constants. Under `jax.jit` the second run is a branch that is not taken.

    Args:
      fun: returns a scalar (or ``(scalar, aux)`` with ``has_aux``); is traced, as under `jax.jit`.
      argnums, has_aux, rules, fallback: see `fbprop.value_and_grad`.

    Returns:
      A function of ``fun``'s arguments that returns ``((value, gradient), found)``; ``found`` is a
      `NonFinite`: false if all is finite; ``found.first()`` is an `Origin`, or None.

    Raises:
      As `fbprop.value_and_grad`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import watch
      >>> def loss(x):
      ...     with jax.named_scope("safe"):
      ...         y = jnp.where(x > 0, jnp.log(x), 0.0)
      ...     with jax.named_scope("head"):
      ...         return jnp.sum(jnp.sqrt(y))
      >>> both, found = jax.jit(watch.first_nonfinite(loss))(jnp.array([-1.0, 1.0, 2.0]))
      >>> origin = found.first()
      >>> origin.kind, origin.direction, origin.path, origin.primitive, origin.operands
      ('inf', 'backward', 'head', 'sqrt', (('float32[3]', 0.0, 0.6931...),))
    """
    numbers, _ = indices(argnums)
    both_of = value_and_grad(
        fun, argnums, has_aux, rules=rules, fallback=fallback, factored=Rows
    )

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def value_gradient_and_first(*args, **kwargs):
        value, gradient = both_of(*args, **kwargs)
        ok = _finite(value[0] if has_aux else value, gradient)
        gradient = dense(gradient)
        if not isinstance(ok, jax.core.Tracer) and bool(ok):
            return (value, gradient), NonFinite(None, None)
        chosen = list(dict.fromkeys(positions(numbers, args)))
        table = _rules.current() if rules is None else rules
        program = Program(fun, args, kwargs, chosen, has_aux, table, fallback)
        inputs = program.traced.leaves, program.traced.others
        if isinstance(ok, jax.core.Tracer):
            recorded = lax.cond(ok, lambda *_: program.blank(), program.run, *inputs)
        else:
            recorded = jax.jit(program.run)(*inputs)
        return (value, gradient), NonFinite(recorded, program)

    return value_gradient_and_first


def _finite(value, gradient):
    """Whether all numbers are, by their sum of squares: that of huge ones is not, and costs a run
    that finds nothing. The largest would take twice as long. Of a table that is 0 but for a few
    rows these are enough: float16 apart, what adds up to infinity has squares that are."""
    gradient = jax.tree.map(
        lambda g: g.values if isinstance(g, Rows) and g.dtype != jnp.float16 else g,
        gradient, is_leaf=lambda g: isinstance(g, Rows),
    )
    gradient = dense(gradient)
    floating = [x for x in tree_leaves((value, gradient)) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.isfinite(jnp.stack([_squares(x) for x in floating])))


def _squares(x):
    return jnp.sum(jnp.square(wide(jnp.abs(x)))).astype("float32")


class Program:
    """A function run with every value looked at, and how to read what is recorded."""

    def __init__(self, fun, args, kwargs, chosen, has_aux, table, fallback):
        self.table = table if "tap" in table else table.extend(TAP)
        self.fallback = fallback
        self.traced = Traced(fun, args, kwargs, chosen, has_aux, table, fallback)
        self.plan = self.traced.plan
        form, self._tree = jax.tree.flatten(jax.eval_shape(self._form))
        self._shapes = [x.shape for x in form]
        self._size = sum(map(math.prod, self._shapes))
        self._dtype = max((x.dtype for x in form), key=lambda d: d.itemsize)

    def blank(self):
        """A packed record in which all is 0."""
        return jnp.zeros(self._size, self._dtype)

    def _form(self):
        inputs = jax.tree.map(jnp.zeros_like, _extents(self.traced.inputs(self.traced.leaves)))
        gradients = {k: x for k, x in inputs.items() if k < len(self.traced.leaves)}
        return {"inputs": inputs, "gradients": gradients, "level": blank(self.plan)}

    def run(self, leaves, others):
        """A record, packed into one vector: a thousand small results take a millisecond."""
        def tapped(leaves, zeros):
            outs, record = recorded(self.plan, [*leaves, *others], zeros)
            return outs[0], record

        value, pullback, record = vjp(
            tapped, leaves, blank(self.plan), has_aux=True, rules=self.table,
            fallback=self.fallback, factored=Rows,
        )
        gradients, back = pullback(jnp.ones_like(value))
        record = {
            "inputs": _extents([*leaves, *others]), "gradients": _extents(gradients),
            "level": _merged(record, back),
        }
        flat = [x.reshape(-1).astype(self._dtype) for x in jax.tree.leaves(record)]
        return jnp.concatenate(flat)

    def first(self, recorded):
        """The `Origin` that a packed record leads to, or None."""
        recorded = self._unpacked(np.asarray(recorded))
        level = blame.Level(self.plan, recorded["level"], recorded["inputs"])
        value = blame.Place(level, level.body.outvars[0], ())
        if blame.kind_of(blame.range_of(value)):
            return self._origin(blame.forward(value))
        for k, pair in recorded["gradients"].items():
            if blame.kind_of(pair):
                made = blame.backward(level, level.body.invars[k])
                if made is not None:
                    return self._origin(_earlier(made))
                what = f"the sum of what uses of {self.traced.names[k]} give it"
                return Origin(blame.kind_of(pair), "backward", "", what, "", (), ())
        return None

    def _unpacked(self, packed):
        ends = np.cumsum([math.prod(shape) for shape in self._shapes])
        parts = np.split(packed, ends[:-1])
        return self._tree.unflatten([x.reshape(s) for x, s in zip(parts, self._shapes)])

    def _origin(self, found):
        if isinstance(found, blame.Place):
            k = found.level.inputs.get(found.var) if jc.is_var(found.var) else None
            what = "a constant" if k is None else self.traced.names[k]
            return Origin(blame.kind_of(blame.range_of(found)), "given", "", what, "", (), ())
        level, i, at = found[:3]
        eqn = level.body.eqns[i]
        operands = []
        for v in eqn.invars:
            if jc.differentiable(v.aval):
                low, high = blame.range_of(blame.Place(level, v, at))
                operands.append((v.aval.str_short(), float(low), float(high)))
        return Origin(
            found.kind, "backward" if found.backward else "forward", within(level.path(), eqn),
            name_of(eqn, self.table), jc.source_line(eqn) or "", at, tuple(operands),
        )


def _extents(arrays):
    arrays = enumerate(x if isinstance(x, Rows) else jnp.asarray(x) for x in arrays)
    return {k: extent(x) for k, x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)}


def _earlier(made):
    """Who made, forward, what is not finite in the values that a pullback had, if somebody did."""
    level, i, at = made[:3]
    eqn = level.body.eqns[i]
    for v in (*eqn.outvars, *eqn.invars):
        place = blame.Place(level, v, at)
        if blame.kind_of(blame.range_of(place)):
            found = blame.forward(place)
            if isinstance(found, blame.Made):
                return found
    return made


def _merged(record, back):
    """Forward parts of one record, backward parts of the other."""
    return {
        "values": record["values"], "chosen": record["chosen"], "uses": back["uses"],
        "returns": back["returns"],
        "inner": {
            i: [_merged(r, b) for r, b in zip(inner, back["inner"][i])]
            for i, inner in record["inner"].items()
        },
    }
