"""What need not be kept: values that a little arithmetic makes again from others that are.

Rules say what they need, one equation at a time. Together that is often the same thing more than
once: a normalised, scaled and rectified activation is four passes of arithmetic away from the
centred one, and a product keeps both of its factors where one is the other's mask or a row of
numbers repeated. Of such values the smallest are kept, and the others are computed again when the
backward sweep comes to them. A residual network's step (row ``resnet_step``) then takes 0.43 of the
memory, and less time: what is not written need not be read.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from fbprop.core import jaxcompat as jc
from fbprop.core.opaque import either, held, is_number_in_trace

# Elementwise arithmetic that a processor does as fast as it reads, and moving things about. No
# exponentials, roots, reductions or products: those are kept.
CHEAP = frozenset((
    "abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "concatenate",
    "convert_element_type", "copy", "copy_p", "custom_jvp_call", "div", "dynamic_slice", "eq",
    "expand_dims", "gather", "ge", "gt", "hold", "imag", "integer_pow", "iota", "is_finite", "jit",
    "le", "lt", "max", "min", "mul", "name", "ne", "neg", "not", "one_minus_square", "or", "pad",
    "real", "rem", "reshape", "rev", "select_n", "sign", "slice", "split", "square", "squeeze",
    "made_of", "stop_gradient", "sub", "tap", "transpose", "xor",
))
FURTHEST = 8  # times the size of a value may be computed to make it again
SMALLEST = 4096  # bytes; of less, an equation more is not worth it
# What is kept in the place of a value may be this many times as large. XLA does a cheap difference
# again in every loop that reads it, and keeps what it is a difference of besides: with 0.5 here
# `vit_step` takes 0.76 of `jax.grad`'s memory, with 1.125 0.57.
SLACK = 1.125
# While one value is made again and used, it needs the memory that it does not need before. Of a
# single operation nothing else is kept: batch norm by itself takes 2.0 of `jax.grad`'s memory if
# its two values are made again, a network of a few layers less than 1.
FEWEST = 3  # times the largest value that is made again, all of them together


def split(body, steps, keep: Collection, at_hand: Collection) -> tuple[tuple, dict]:
    """What is stored so that every variable in ``keep`` can be had, and how the others are made.

    Args:
      body: open jaxpr.
      steps: of its plan.
      keep: variables that rules ask for.
      at_hand: variables that exist anyway, of a function whose two sweeps run in turn.

    Returns:
      The variables to store, and ``{variable: equation}`` for those to be computed again, from
      stored ones and one another.
    """
    inputs = (*body.invars, *body.constvars)
    known = {v for v in inputs if v in keep or v in at_hand}  # stored, or no matter if it is
    needs = {v: frozenset((v,)) for v in inputs}  # what is stored if this is to be made again
    made_by, work = {}, {}
    for eqn, found in zip(body.eqns, steps):
        operands = _sources(eqn)
        passes = sum(work.get(v, 0) for v in operands)
        cheap = is_cheap(eqn) and runs_as_it_stands(found)
        for v in eqn.outvars:
            need = frozenset().union(*(needs[u] for u in operands)) - known
            size, cost = jc.nbytes(v.aval), sum(jc.nbytes(u.aval) for u in need)
            worth = size >= SMALLEST and cost <= SLACK * size if v in keep else cost < size
            spent = passes + size
            if not computes(eqn):
                need, worth, spent = needs[operands[0]] - known, True, passes
            if cheap and worth and spent <= FURTHEST * size:
                made_by[v], work[v], needs[v] = eqn, spent, need
                known |= need if v in keep else set()
            else:
                needs[v] = frozenset((v,))
                known |= {v} if v in keep else set()
    sizes = [jc.nbytes(v.aval) for v in keep if v in made_by and computes(made_by[v])]
    if at_hand and sum(sizes) < FEWEST * max(sizes, default=0):
        return tuple(keep), {}
    stored, made, todo = {v: None for v in keep if v not in made_by}, {}, [*keep]
    while todo:
        v = todo.pop()
        if v not in made_by:
            stored[v] = None
        elif v not in made:
            made[v] = made_by[v]
            todo += _sources(made[v])
    return tuple(stored), made


def stored_for(atom, made) -> set:
    """The stored variables that an atom is, or is made of; ``made``: see `split`."""
    if not jc.is_var(atom):
        return set()
    if atom not in made:
        return {atom}
    return set().union(*(stored_for(v, made) for v in _sources(made[atom])))


def is_cheap(eqn) -> bool:
    """Whether an equation is little arithmetic, with everything inside it."""
    return is_made_of(eqn, CHEAP)


def is_made_of(eqn, names: frozenset) -> bool:
    """Whether an equation, and everything inside it, is a primitive of these names, and no more."""
    if eqn.primitive.name not in names or eqn.effects:
        return False
    if eqn.primitive.name == "gather" and (
        jc.nbytes(eqn.outvars[0].aval) < jc.nbytes(eqn.invars[0].aval)
    ):
        return False  # from a large table: `word_embedding_step` takes 1.15 times as long otherwise
    return all(_is_made_of_inside(inner, names) for _, inner in jc.sub_jaxprs(eqn.params))


def _sources(eqn):
    """The variables that a result is made of: of `made_of` not the value itself."""
    of = eqn.invars[1:] if eqn.primitive.name == "made_of" else eqn.invars
    return [v for v in of if jc.is_var(v)]


def computes(eqn) -> bool:
    """Whether it is no tap, whose result is its first operand (`fbprop.core.tap`)."""
    return eqn.primitive.name != "tap"


def runs_as_it_stands(found) -> bool:
    """Whether the forward sweep evaluates an equation itself, rather than a rule's own forward."""
    _, _, step = found or (None, None, None)
    if step is None or step.forward is None:
        return True
    return bool(step.inner) and all(map(runs_as_it_stands, step.inner[0].plan.steps))


@functools.lru_cache(2048)
def _is_made_of_inside(jaxpr, names):
    return all(is_made_of(eqn, names) for eqn in jc.open_jaxpr(jaxpr).eqns)


class Before(dict):
    """Values, by variable, that need not be computed again: at hand in the trace they are of.

    A pytree without leaves: what crosses the boundary of a trace goes without them.
    """

    def add(self, wanted, variables, values):
        """Remember those that are ``wanted``, if any of them is traced."""
        if any(isinstance(x, jax.core.Tracer) for x in values):
            self.update((v, x) for v, x in zip(variables, values) if v in wanted)


jax.tree_util.register_pytree_node(Before, lambda _: ((), None), lambda *_: Before())


class Values:
    """Values of what rules ask for in one backward sweep: stored, or made when asked for.

    Args:
      stored, made: see `split`; on_gpu: the same of `fbprop.core.gpu_plan`.
      values: of the stored variables; before: of these and those made again, where at hand.
    """

    def __init__(self, stored, made, on_gpu, values, before):
        self.stored = Made(dict(zip(stored, values)), made, min)
        known = {v: before[v] for v in on_gpu.stored if v in before}
        at_hand = len(known) == len(on_gpu.stored)
        self.on_gpu = Made(known, on_gpu.made if at_hand else {}, max)
        self.before = before

    def wanted(self, atom, cotangents):
        """Value of an atom for a rule that got these result cotangents."""
        value = self.stored.of(atom, cotangents)
        if not jc.is_var(atom) or atom not in self.before:
            return value
        first = self.before[atom]
        gpu = self.on_gpu.of(atom, cotangents) if atom in self.on_gpu.made_by else first
        return first if value is first and gpu is first else either(first, value, gpu)

    def forget(self, eqn):
        """Drop results of an equation that the sweep has passed: nothing asks for them again."""
        self.stored.forget(eqn)
        self.on_gpu.forget(eqn)


class Made:
    """Values that are known, and those made from them when asked for.

    Args:
      known: values by variable; made_by: equations by variable.
      held: ``min`` or ``max``: of the first operands, by size, which waits for the cotangent.
    """

    def __init__(self, known, made_by, held):
        self.known, self.made_by, self.held, self.made = known, made_by, held, {}

    def of(self, atom, cotangents):
        """Value of an atom; ``cotangents``: those that are there by now."""
        if not jc.is_var(atom):
            return jc.literal(atom)
        if atom in self.known:
            return self.known[atom]
        if atom not in self.made:
            eqn = self.made_by[atom]
            if eqn.primitive.name == "made_of":
                self.made[atom] = self.of(eqn.invars[1], cotangents)
                return self.made[atom]
            operands = [self.of(v, cotangents) for v in eqn.invars]
            if not any(v in self.made_by for v in eqn.invars if jc.is_var(v)):
                n = len(operands) if computes(eqn) else 1  # a tap's others are not read
                operands = [*_held(operands[:n], cotangents, self.held), *operands[n:]]
            self.made.update(zip(eqn.outvars, jc.bind(eqn, operands)))
        return self.made[atom]

    def forget(self, eqn):
        """Drop results of an equation."""
        for v in eqn.outvars:
            self.made.pop(v, None)


def _held(operands, cotangents, choose):
    """The operands, the smallest or largest of them to be had only when the cotangents are.

    Otherwise XLA, which compiles both sweeps as one, would find that an equation computed again is
    the one computed before, and keep the value after all.
    """
    arrays = [i for i, x in enumerate(operands) if isinstance(x, jax.Array) and _is_plain(x)]
    traced = [d for d in jax.tree.leaves(cotangents) if is_number_in_trace(d)]
    if not arrays or not traced:
        return operands
    i = choose(arrays, key=lambda i: operands[i].size)
    return [*operands[:i], held(operands[i], traced[0]), *operands[i + 1 :]]


def _is_plain(x):
    return jnp.issubdtype(x.dtype, np.number) or x.dtype == bool
