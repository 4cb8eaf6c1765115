"""One backward sweep over a batch that leaves every example's gradient apart, in factors.

The loss is differentiated for a batch of one example, under `jax.vmap` with the parameters shared:
the products with them are those of the whole batch, and no gradient of an example is formed that
its factors (`fbprop.watch.factors`) can stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)

from fbprop import rules as _rules
from fbprop.core.arguments import check_function, check_input, cotangent_one
from fbprop.core.devices import by_devices
from fbprop.core.factored import is_factored
from fbprop.core.halves import inlined
from fbprop.core.jaxcompat import explicit_sharding
from fbprop.reverse import vjp
from fbprop.watch.factors import Own, combined, each, form_of, wide
from fbprop.watch.mixing import traced_apart
from fbprop.watch.parted import Parted
from fbprop.watch.unsummed import unsummed

BYTES = 1 << 26  # of all values of the examples that are worked through at once


class Swept(NamedTuple):
    """What one sweep leaves.

    Attributes:
      values: the loss of each example.
      forms: per leaf of the parameters its gradient (`fbprop.watch.factors.Form`), None where it
        is 0; arrays have the examples in front.
      parameters: the leaves; paths: their names; tree: their structure.
    """

    values: jax.Array
    forms: list
    parameters: list
    paths: list
    tree: object

    def map(self, fun, of_zero):
        """A pytree like the parameters of ``fun(form)``, ``of_zero(parameter)`` where it is 0."""
        pairs = zip(self.forms, self.parameters)
        return tree_unflatten(self.tree, [of_zero(p) if f is None else fun(f) for f, p in pairs])

    def squares(self):
        """Squared norms [B], like the parameters."""
        def zero(p):
            return jnp.zeros(self.values.shape, wide(p).dtype)

        return self.map(lambda form: each(lambda f: f.squared(), form, form.at_once), zero)

    def total(self, scale):
        """Σ over examples of scale times gradient, like the parameters."""
        return self.map(lambda form: form.total(scale), jnp.zeros_like)


def sweep(consume, loss: Callable, params, batch, has_aux=False, rules=None, at_once=None):
    """What ``consume`` makes of every example's loss and gradient.

    Args:
      consume: ``Swept -> (per example, summed)``, two pytrees: of arrays with the examples in
        front, and of arrays that are added up where the batch is worked through in parts.
      loss: ``(params, *batch) -> scalar``, a mean over the batch's examples.
      params: pytree of floating-point arrays.
      batch: the other arguments, pytrees of arrays whose first dimension is the batch.
      at_once: how many examples are worked through at once, a divisor of their number; default:
        as many as `BYTES` allow.
    """
    check_function(loss)
    if sharding := next(filter(None, map(_in_types, tree_leaves(batch))), None):
        of_each = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        # The compiler places what is between: sums over examples have no types to say where.
        return jax.sharding.auto_axes(
            lambda params, batch: sweep(consume, loss, params, batch, has_aux, rules, at_once),
            out_sharding=(of_each, whole),
        )(params, batch)
    leaves, tree = tree_flatten(params)
    paths = [keystr(path) for path, _ in tree_flatten_with_path(params)[0]]
    leaves = [jnp.asarray(p) for p in leaves]
    for leaf in leaves:
        check_input(leaf.dtype, False, False)
    examples, batch_tree = tree_flatten(batch)
    examples = _batched(examples)

    def flat(*values):
        n = len(leaves)
        out = loss(tree_unflatten(tree, values[:n]), *tree_unflatten(batch_tree, values[n:]))
        value = out[0] if has_aux else out
        cotangent_one(value, False)
        return value

    table = unsummed(_rules.current() if rules is None else rules)
    parted = Parted(inlined(traced_apart(flat, leaves, examples, table), table), len(leaves))
    used, shared = parted.first(leaves)

    def of_one(example):
        example = [x[None] for x in example]
        value, pullback = vjp(
            lambda *used: parted.second(used, shared, example), *used, rules=table, factored=True
        )
        return value, *_forms(parted, pullback(jnp.ones_like(value)))

    def of_some(examples):
        values, forms, others = jax.vmap(of_one)(examples)
        _add_computed(parted, leaves, forms, others)
        return consume(Swept(values, forms, leaves, paths, tree))

    size = _at_once(len(examples[0]), parted, at_once)
    if size == len(examples[0]):
        return of_some(examples)
    return in_parts(of_some, examples, size)


def _in_types(x):
    """The sharding that is part of an array's type, if it is sharded over examples."""
    sharding = explicit_sharding(jax.typeof(x)) if hasattr(x, "dtype") else None
    return sharding if sharding is not None and any(sharding.spec[:1]) else None


def _at_once(n, parted, asked):
    """How many of n examples to work through at once."""
    if asked is None:
        fitting = BYTES // max(parted.bytes(), 1)
        return max((d for d in range(1, n + 1) if n % d == 0 and d <= fitting), default=min(n, 1))
    if asked < 1 or n % asked:
        raise ValueError(
            f"Examples at once divide the batch, got at_once={asked} expected a divisor of {n}."
        )
    return asked


def in_parts(of_some, examples, size):
    """``of_some(examples) -> (per example, summed)``, so many examples at a time on one device."""
    def one(examples):
        parts = [x.reshape(-1, size, *x.shape[1:]) for x in examples]
        part = [jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for x in examples]
        _, types = jax.eval_shape(of_some, part)

        def add(total, part):
            stacked, summed = of_some(part)
            return jax.tree.map(jnp.add, total, summed), stacked

        zeros = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), types)
        summed, stacked = lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked), summed

    return by_devices(examples, one=one, several=of_some)


def _batched(examples):
    sizes = {jnp.shape(x)[:1] for x in examples}
    if len(sizes) != 1 or () in sizes:
        shapes = [list(jnp.shape(x)) for x in examples]
        raise ValueError(
            "A batch is arrays whose first dimension numbers its examples, got the shapes "
            f"{shapes} expected one size in front of all: close over what examples share."
        )
    return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in examples]


def _forms(parted, cotangents):
    """Per parameter the form of its gradient or None; and cotangents of uses that are computed."""
    found, others = {}, []
    for use, cotangent in zip(parted.uses, cotangents):
        if use.parameter is None:
            others.append(cotangent.dense() if is_factored(cotangent) else cotangent)
        else:
            found.setdefault(use.parameter, []).append(form_of(cotangent, use))
    forms = [combined(found[i]) if i in found else None for i in range(parted.n_params)]
    computed = parted.reached_by_computed()
    forms = [Own(f.dense()) if f and i in computed else f for i, f in enumerate(forms)]
    return forms, others


def _add_computed(parted, leaves, forms, others):
    """Add what flows through values that are computed from parameters: as arrays."""
    computed = sorted(parted.reached_by_computed())
    if not computed:
        return

    def of_computed(*some):
        at = dict(zip(computed, some))
        return parted.computed([at.get(i, p) for i, p in enumerate(leaves)])

    _, pullback = vjp(of_computed, *(leaves[i] for i in computed))
    for i, d in zip(computed, jax.vmap(pullback)(others)):
        forms[i] = Own(d if forms[i] is None else forms[i].array + d)
