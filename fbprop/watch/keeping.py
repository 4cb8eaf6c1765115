"""Which values are kept between the sweeps, for whom, and how large they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import tree_leaves, tree_unflatten

from fbprop import rules as _rules
from fbprop.core import jaxcompat as jc
from fbprop.core.arguments import indices
from fbprop.core.recompute import stored_for
from fbprop.core.table import Table
from fbprop.explain import planned
from fbprop.watch.points import BODIES, name_of, within
from fbprop.watch.traced import names_of


class KeptValue(NamedTuple):
    """A value that the pullback holds.

    Attributes:
      path, primitive: of the equation that made it, "" and e.g. "argument params['w']" of an input;
        in brackets of one that keeps more than its operands and result, for the backward pass.
      type: of the value, of a loop that of one step.
      steps: lengths of the loops over whose steps it is stacked.
      bytes: in all.
      readers: path and name of the equations whose pullbacks read it, or make others from it.
    """

    path: str
    primitive: str
    type: str
    steps: tuple[int, ...]
    bytes: int
    readers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Path and primitive."""
        return f"{self.path}/{self.primitive}" if self.path else self.primitive


class Keeping(NamedTuple):
    """What is kept, the largest first; ``str()`` of it is a table.

    Attributes:
      values: the `KeptValue`; bytes: of all of them, as `fbprop.explain` has it.
    """

    values: tuple[KeptValue, ...]
    bytes: int

    def rows(self) -> list[dict[str, Any]]:
        """A dict per value."""
        return [v._asdict() for v in self.values]

    def table(self) -> str:
        """The rows as text, names of readers cut off after two."""
        lines = [("value", "type", "bytes", "for")]
        for v in self.values:
            steps = "".join(f"{n} x " for n in v.steps)
            more = f" and {len(v.readers) - 2} more" if len(v.readers) > 2 else ""
            lines.append((v.name, steps + v.type, f"{v.bytes:,}", ", ".join(v.readers[:2]) + more))
        lines.append(("total", "", f"{self.bytes:,}", ""))
        wide = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(
            f"{a.ljust(wide[0])}  {b.ljust(wide[1])}  {c.rjust(wide[2])}  {d}".rstrip()
            for a, b, c, d in lines
        )

    def __str__(self):
        return self.table()


def kept(
    fun: Callable, *args: Any, argnums: int | Sequence[int] = 0, rules: Table | None = None,
    fallback: str | None = "registered",
) -> Keeping:
    """Which values `fbprop.vjp` keeps of a function, by size: `fbprop.explain`, by value.

    Nothing is computed: the function is traced. Parameters that products need are among them, and
    exist anyway; what is cheaply made of others again is not.

    Args:
      fun, *args, argnums, rules, fallback: see `fbprop.explain`.

    Raises:
      MissingRule, TypeError: as `fbprop.vjp`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import watch
      >>> def loss(w, x):
      ...     with jax.named_scope("layer"):
      ...         h = jnp.tanh(x @ w)
      ...     return jnp.sum(h * h)
      >>> x, w = jnp.ones((4, 3)), jnp.ones((3, 2))
      >>> print(watch.kept(loss, w, x))
      value       type      bytes  for
      a constant  f32[4,3]     48  layer/dot_general
      layer/tanh  f32[4,2]     32  layer/tanh, mul
      total                    80
    """
    found = planned(fun, args, argnums, rules, fallback)
    chosen = list(dict.fromkeys(n % len(args) for n in indices(argnums)[0]))
    names = names_of(fun, {i: args[i] for i in chosen}, chosen, {}, {})
    table = _rules.current() if rules is None else rules
    values = []
    kept_values, extras = list(found.kept.values), list(found.kept.extras)
    for plan in found.plans:
        n, m = len(plan.keep), plan.n_extras
        values += _values(plan, (kept_values[:n], extras[:m]), names, "", (), table)
        kept_values, extras = kept_values[n:], extras[m:]
    values.sort(key=lambda v: -v.bytes)
    return Keeping(tuple(values), sum(v.bytes for v in values))


def _values(plan, types, names, path, steps, table):
    """The values that a plan keeps, of these types: those of ``keep``, None for one kept outside,
    and what its steps keep besides.
    """
    body = jc.open_jaxpr(plan.jaxpr)
    made_by = {v: eqn for eqn in body.eqns for v in eqn.outvars}
    given = dict(zip(body.invars, names))
    readers = _readers(plan, path, table)
    for v, t in zip(plan.keep, types[0]):
        if t is None:
            continue
        eqn = made_by.get(v)
        where = within(path, eqn) if eqn else ""
        other = "a carried value" if v in body.invars and steps else "a constant"
        name = name_of(eqn, table) if eqn else given.get(v, other)
        yield KeptValue(
            where, name, v.aval.str_short(short_dtypes=True), _stacked(t, v.aval, steps),
            jc.nbytes(t), tuple(readers.get(v, ())),
        )
    extras = iter(types[1])
    for site, rule, step in filter(None, plan.steps):
        if step.forward:
            yield from _besides(site, rule, step, next(extras), path, steps, table)


def _readers(plan, path, table):
    readers = {}
    for site, _, step in filter(None, plan.steps):
        atoms = (*site.eqn.invars, *site.eqn.outvars)
        here, name = within(path, site.eqn), name_of(site.eqn, table)
        for v in {v: None for i in step.keep for v in stored_for(atoms[i], plan.made)}:
            readers.setdefault(v, {})[f"{here}/{name}" if here else name] = None
    return readers


def _stacked(kept, value, steps):
    """The loops over whose steps a value is stacked: those it has axes for."""
    n = len(kept.shape) - len(value.shape)
    return steps[-n:] if n else ()


def _besides(site, rule, step, extra, path, steps, table):
    """What a step keeps besides operands and results: the inside of a body, or what a rule says."""
    here, name = within(path, site.eqn), name_of(site.eqn, table)
    primitive = site.eqn.primitive.name
    if primitive in BODIES and len(step.inner) == 1 and primitive not in ("remat2", "shard_map"):
        (both,) = step.inner
        length = (site.params["length"],) if step.slots else ()
        values, extras = tree_unflatten(both.tree, _leaves(both, step, extra))[:2]
        yield from _values(both.plan, (values, extras), (), here, (*steps, *length), table)
        return
    for t in filter(None, tree_leaves(extra, is_leaf=lambda t: t is None)):
        short = jax.core.ShapedArray(t.shape, t.dtype).str_short(short_dtypes=True)
        full = f"{here}/{name}" if here else name
        yield KeptValue(here, f"({name})", short, (), jc.nbytes(t), (full,))


def _leaves(both, step, extra):
    """Types of the leaves that a body keeps, None for those that exist outside, or are there."""
    if step.slots:
        known = {"once": extra[0], "stacked": extra[1]}
        places = [None if kind == "outer" else (kind, i) for kind, i in step.slots]
        types = [p and known[p[0]][p[1]] for p in places]
    else:
        places = [s if s.kind == "new" else None for s in both.sources]
        types = [p and extra[p.index] for p in places]
    return [t if p not in places[:i] else None for i, (p, t) in enumerate(zip(places, types))]
