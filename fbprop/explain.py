"""What `vjp` does with a function, equation by equation, without running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import tree_flatten, tree_leaves, tree_unflatten

from fbprop.core import jaxcompat as jc
from fbprop.core import opaque
from fbprop.core.arguments import indices
from fbprop.core.devices import PLATFORMS
from fbprop.core.library import CALLS, call_name
from fbprop.core.logits import only_for_cross_entropy
from fbprop.core.recompute import stored_for
from fbprop.core.table import Table
from fbprop.reverse import vjp


class Line(NamedTuple):
    """One differentiated equation.

    Attributes:
      depth: how many equations it stands inside of.
      path: named scopes around it.
      primitive: its primitive, with the function's name for a call.
      rule: name of the rule that differentiates it.
      formulation: which of the rule's formulations, if it has several.
      shapes: types of operands and results.
      kept: bytes kept for its rule that are not kept for an equation above already; of a value
        that is made again, those it is made from. Inside another equation: at each run of it, as a
        part of what that one keeps, unless it exists outside anyway.
      again: bytes of what the rule asks for and is not stored, but made again.
    """

    depth: int
    path: str
    primitive: str
    rule: str
    formulation: str
    shapes: str
    kept: int
    again: int = 0


class Explanation(NamedTuple):
    """What `explain` found; ``str()`` of it is a table.

    Attributes:
      lines: the differentiated equations, in the order they run forward.
      kept: bytes held by the pullback between the sweeps.
      unmet: of the table's overrides with a pattern (``where``), those that no equation met, as
        (pattern, name of the rule): a scope may be misspelt.
      platform: the one that was asked about, or None.
      hints: sentences about what would be cheaper: logits that only a cross-entropy reads.
    """

    lines: tuple[Line, ...]
    kept: int
    unmet: tuple[tuple[str, str], ...] = ()
    platform: str | None = None
    hints: tuple[str, ...] = ()

    def __str__(self):
        head = ("path", "primitive", "rule", "formulation", "shapes", "bytes kept")
        body = [
            (x.path, "  " * x.depth + x.primitive, x.rule, x.formulation, x.shapes,
             f"({x.kept:,})" if x.depth else f"{x.kept:,} ")
            for x in self.lines
        ]
        body.append(("", "", "", "", "total", f"{self.kept:,} "))
        widths = [max(map(len, column)) for column in zip(head, *body)]
        unmet = [f"no equation met the override of {r!r} where {w!r}" for w, r in self.unmet]
        rows = [
            "  ".join([*(c.ljust(w) for c, w in zip(cells[:-1], widths)),
                       cells[-1].rjust(widths[-1])]).rstrip()
            for cells in (head, *body)
        ]
        again = sum(x.again for x in self.lines)
        if self.platform and again:
            unmet.insert(0, f"on {self.platform}: {again:,} bytes are not kept, but "
                            f"{opaque.WAYS[self.platform]}")
        return "\n".join([*rows, *unmet, *self.hints])


def explain(
    fun: Callable,
    *args: Any,
    argnums: int | Sequence[int] = 0,
    rules: Table | None = None,
    fallback: str | None = "registered",
    platform: str | None = None,
) -> Explanation:
    """Which rule differentiates which equation of a function, and what it keeps.

    Nothing is computed: the function is traced. Kept bytes are those between the two sweeps as
    fbprop sees them, which is what its pullback holds; where both sweeps are compiled as one, XLA
    may store less or more.

    Of a product with a matrix whose result only a cross-entropy of class numbers reads, in plain
    code, Optax's or `fbprop.nn`'s, more than 256 rows of more classes than features, a line says
    what `fbprop.ops.linear_cross_entropy` would save.

    Args:
      fun: pure function of pytrees of arrays, as for `vjp`.
      *args: its arguments; arrays may be `jax.ShapeDtypeStruct`.
      argnums: which positional argument(s) are differentiated.
      rules, fallback: see `vjp`.
      platform: "cpu", "cuda" or "tpu": formulations are those of a program for one device of it,
        which need not be there, and the table says what becomes of values that are not kept.
        Default: of those that depend on the platform it is said where they are taken.

    Returns:
      An `Explanation`. Lines in brackets are inside the equation above them (a loop's body, a
      branch, a jitted function): bytes at each run, which are counted there.

    Raises:
      MissingRule, TypeError: as `vjp`.
      ValueError: another platform.

    Example:
      >>> import fbprop, jax, jax.numpy as jnp
      >>> x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
      >>> print(fbprop.explain(lambda x: jnp.sum(jax.nn.relu(x) * 2.0), x))
      path  primitive             rule         formulation  shapes                     bytes kept
            custom_jvp_call relu  jax.nn.relu               f32[2,3] -> f32[2,3]              24
            mul                   mul                       f32[2,3], 2.0 -> f32[2,3]          0
            reduce_sum            reduce_sum                f32[2,3] -> f32[]                  0
                                                            total                             24
    """
    if platform not in (None, *PLATFORMS):
        raise ValueError(
            f"Formulations are chosen for cpu, cuda or tpu, got platform={platform!r}: leave it "
            "out for all of them."
        )
    if isinstance(rules, Table):
        rules = _Watched(rules)
    found = planned(fun, args, argnums, rules, fallback)
    lines = tuple(_lines(found.plan, found.kept, 0, platform))
    unmet = () if rules is None else rules.unmet()
    hints = tuple(map(_hint, only_for_cross_entropy(found.plan)))
    return Explanation(lines, _bytes(tree_leaves(found.kept)), unmet, platform, hints)


def planned(fun: Callable, args, argnums, rules, fallback):
    """The pullback that `vjp` would return, of types in place of arrays; arguments as `explain`."""
    if not callable(fun):
        raise TypeError(f"explain is about a function, got {fun!r} expected a callable.")
    chosen = _positions(indices(argnums)[0], args)
    # Only what is differentiated or has no value is traced: other arguments may be static.
    leaves, tree = tree_flatten([None if i in chosen else x for i, x in enumerate(args)])
    types = [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]

    def pullback(primals, values):
        values = iter(values)
        given = [next(values) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
        others = tree_unflatten(tree, given)

        def of_chosen(*primals):
            at = dict(zip(chosen, primals))
            return fun(*(at.get(i, x) for i, x in enumerate(others)))

        return vjp(of_chosen, *primals, rules=rules, fallback=fallback)[1]

    return jax.eval_shape(pullback, [args[i] for i in chosen], types)


class _Watched(Table):
    """A table that remembers which of its scoped overrides were met."""

    def __init__(self, table):
        super().__init__(table.values(), table.scoped, table.overridden)
        self._met = set()

    def scoped_rule(self, name, path):
        if found := super().scoped_rule(name, path):
            self._met.add(found)
        return found

    def unmet(self):
        return tuple((where, r.name) for where, r in self.scoped if (where, r) not in self._met)


def _hint(logits):
    return (f"fbprop.ops.linear_cross_entropy would keep none of {logits.bytes:,} bytes of logits "
            f"{logits.type}, which only a cross-entropy reads: {logits.where}")


def _positions(argnums, args):
    if wrong := [n for n in argnums if not -len(args) <= n < len(args)]:
        raise ValueError(
            f"argnums are positions of arguments, got {wrong[0]} expected one of {len(args)}: pass "
            "the arguments of the function after it."
        )
    return [n % len(args) for n in argnums]


def _lines(plan, kept, depth, platform):
    """A line per differentiated equation of a plan that keeps values of these types."""
    extras, counted, remade = iter(kept.extras), set(), set()
    made = plan.on_gpu.made if platform == "cuda" else plan.made
    for site, rule, step in filter(None, plan.steps):
        atoms = (*site.eqn.invars, *site.eqn.outvars)
        own = {v for i in step.keep for v in stored_for(atoms[i], plan.made)} - counted
        counted |= own
        again = {v for v in map(atoms.__getitem__, step.keep) if jc.is_var(v) and v in made}
        again -= remade
        remade |= again
        extra = next(extras) if step.forward else ()
        yield Line(
            depth, site.path, _name(site.eqn), rule.name, rule.formulation(site.on(platform)),
            _shapes(site), _bytes(v.aval for v in own) + _bytes(tree_leaves(extra)),
            _bytes(v.aval for v in again),
        )
        for number, both in enumerate(step.inner):
            if len(step.inner) > 1:
                total = _bytes(tree_leaves(both.kept))
                yield Line(depth + 1, site.path, f"branch {number}", "", "", "", total)
            deeper = depth + 1 + (len(step.inner) > 1)
            yield from _lines(both.plan, both.kept, deeper, platform)


def _name(eqn):
    if eqn.primitive.name in CALLS:
        return f"{eqn.primitive.name} {call_name(eqn)}"
    length = eqn.params.get("length") if eqn.primitive.name == "scan" else None
    return eqn.primitive.name if length is None else f"scan of {length}"


def _shapes(site):
    return " -> ".join(
        ", ".join(_type(v) for v in atoms) for atoms in (site.eqn.invars, site.eqn.outvars)
    )


def _type(atom):
    if not jc.is_var(atom):
        return str(atom.val)
    return atom.aval.str_short(short_dtypes=True)


def _bytes(types):
    return sum(map(jc.nbytes, types))
