"""Operations: functions with a backward pass derived by hand, as primitives of their own.

One primitive serves everybody. fbprop finds its rule in the table; `jax.grad` and `jax.jvp` find a
derivative that is linear in tangents, computed as the forward pass's, and transposed by the same
hand-written backward pass. So forward mode, second order, `jax.vmap` in any place and every other
transformation work under both, which a `jax.custom_vjp` does not give.
"""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fbprop.core import cotangent as ct
from fbprop.core import jaxcompat as jc
from fbprop.core.devices import own_broadcasting
from fbprop.core.fallback import Fallback
from fbprop.core.rule import Rule, Step


class Operation(Rule):
    """A function, its backward pass, and what that needs: callable, and the rule for itself.

    Args:
      name: of the primitive, as it stands in a jaxpr.
      math: forward and backward formula, what is kept and why.
      reference: ``(*operands, **static) -> result``, a few lines of plain code that say what it
        is: what tests and benchmarks compare with.
      forward: ``(*operands, **static) -> (*results, *extras)``; forward mode is its derivative.
        If it has a keyword ``wanted``, extras are made only where it is differentiated: it is then
        given, per operand, whether a cotangent may be asked for; else None, and returns no extras.
      backward: ``(dy, ..., *, static ...) -> one cotangent per operand``, of any precision, None
        for one that has none. **Its other parameter names say what is kept**: operands by the names
        they have in ``forward``, ``out``, or one of ``extras``. Of several results the first
        parameter is ``dys``, their cotangents. The keyword ``wanted``, if it asks for that, tells
        for which operands a cotangent is used.
      extras: names of what ``forward`` returns besides the results.
      results: how many results there are; a function of several returns a tuple.
      formulation: ``site -> str``, for `fbprop.explain`.
      weighs: whether it multiplies by weights: what looks for such products sees the reference.

    Operands that are None are not there; all other arguments are static and hashable.
    """

    takes_zeros = True

    def __init__(self, name, math, reference, forward, backward, *, extras=(), results=1,
                 formulation=lambda site: "", weighs=False):
        super().__init__(name, math, forward, backward)
        self.weighs = weighs
        parameters = inspect.signature(forward).parameters.values()
        self.operands = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        self.reference, self._forward, self._backward = reference, forward, backward
        self.results, self.extras, self._formulation = results, tuple(extras), formulation
        parameters = inspect.signature(backward).parameters.values()
        self._keeps = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY][1:]
        self._asks = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        self._all_results = next(iter(parameters)).name == "dys"
        self._on_demand = "wanted" in inspect.signature(forward).parameters
        self.primitive, self._linear = Primitive(name), Primitive(f"{name}_tangent")
        for p, function in ((self.primitive, self.run), (self._linear, self._tangents)):
            p.multiple_results = True
            _evaluated_by(p, function)
        ad.primitive_jvps[self.primitive] = self._jvp
        ad.primitive_jvps[self._linear] = self._linear_jvp
        ad.primitive_transposes[self._linear] = self._transpose
        batching.primitive_batchers[self.primitive] = self._batch
        batching.primitive_batchers[self._linear] = self._batch_linear

    def __call__(self, *operands, **static):
        outs = self.everything(*operands, **static)
        return outs[0] if self.results == 1 else tuple(outs[:self.results])

    def everything(self, *operands, **static):
        """Results and extras, which can be differentiated too."""
        arrays = [jnp.asarray(x) for x in operands if x is not None]
        arrays = [jc.varying_like(x, *arrays) for x in arrays]  # as JAX's primitives want it
        given = tuple(x is not None for x in operands)
        return self.primitive.bind(
            *arrays, given=given, static=tuple(sorted(static.items())), axes=(), wanted=None
        )

    # As a rule

    @property
    def rules(self) -> list[Rule]:
        """This, and the rule for its tangents where forward mode is differentiated."""
        return [self, Fallback(self._linear.name, f"Tangents of {self.name}; by JAX.")]

    def keeps(self):
        return ", ".join(self._keeps) or "nothing"

    def formulation(self, site):
        return self._formulation(site)

    def reached(self, site):
        return tuple(a and jc.differentiable(x) for a, x in zip(site.active, site.in_avals))

    def declared(self, site):
        if self._forms(site):
            return None
        return self._named(site)

    def _forms(self, site):
        """Whether extras are to be made because this is differentiated."""
        return self._on_demand and site.params["wanted"] is None

    def _named(self, site):
        index = self._index(site.params["given"])
        named = {index[k] for k in self._keeps if k in index}
        if any(site.wanted[self.results:]):  # in a second derivative
            named.update(range(len(site.in_avals)))
        return tuple(sorted(named))

    def prepare(self, site):
        wanted, n = self.reached(site), len(site.in_avals)
        forms, params = self._forms(site), dict(site.params)
        if forms:
            params["wanted"] = wanted
        named = self._named(site)
        keep = tuple(i for i in named if i < n) if forms else named
        extra = tuple(i for i in named if i not in keep)

        def forward(*operands):
            outs = self.primitive.bind(*operands, **params)
            return outs[:self.results], tuple(outs[i - n] for i in extra)

        def backward(kept, extras, douts):
            values = [None] * (n + self.results + len(self.extras))
            for i, value in zip((*keep, *extra), (*kept, *(extras or ()))):
                values[i] = value
            douts = [None if ct.is_zero(d) else d for d in douts]
            types = (*site.in_avals, *site.out_avals)
            return self._pulled(values[:n], values[n:], douts, types, wanted, **params)

        return Step(keep, backward, forward if forms else None)

    def _index(self, given):
        """Where operands that are there, results and extras stand in (*operands, *results)."""
        there = [name for name, g in zip(self.operands, given) if g]
        outs = ["out"] * self.results if self.results == 1 else self._names()
        return {name: i for i, name in enumerate((*there, *outs, *self.extras))}

    def _names(self):
        return [f"out{i}" for i in range(self.results)]

    # As functions of the arrays that are there

    def run(self, *arrays, given, static, axes, wanted):
        """Results and extras."""
        asked = dict(static)
        if self._on_demand:
            asked["wanted"] = wanted and tuple(_spread(wanted, given))

        def forward(*arrays):
            with own_broadcasting():
                outs = self._forward(*_spread(arrays, given), **asked)
            return outs if isinstance(outs, tuple) else (outs,)

        return list(_mapped(forward, axes)(*arrays))

    def in_plain_code(self, *arrays, extras=True, given, static, axes, wanted):
        """Results by the reference, and extras: the operation as ordinary equations."""
        def reference(*arrays):
            outs = self.reference(*_spread(arrays, given), **dict(static))
            return outs if isinstance(outs, tuple) else (outs,)

        results = list(_mapped(reference, axes)(*arrays))
        if not extras:
            return results
        outs = self.run(*arrays, given=given, static=static, axes=axes, wanted=wanted)
        return [*results, *outs[self.results:]]

    def _pulled(self, arrays, outs, douts, types, moving, **params):
        """A cotangent or None per array that is there.

        Args:
          arrays, outs: values; None for those that are not kept.
          douts: cotangents of results and extras, None for 0.
          types: of arrays, results and extras.
          moving: per array, whether its cotangent is wanted.
        """
        dys, dextras = douts[:self.results], douts[self.results:]
        dins = [None] * len(arrays)
        if any(d is not None for d in dys):
            outs_of = types[len(arrays):]
            dys = [ct.filled(ct.ZERO, a) if d is None else d for d, a in zip(dys, outs_of)]
            dins = self._by_hand(arrays, outs, dys, types, moving, **params)
            dins = [d if d is None else d.astype(a.dtype) for d, a in zip(dins, types)]
        if all(d is None for d in dextras):
            return dins
        which = [i for i, m in enumerate(moving) if m]

        def extras(*values):
            at = dict(zip(which, values))
            every = self.run(*(at.get(i, x) for i, x in enumerate(arrays)), **params)
            return [x for x, d in zip(every[self.results:], dextras) if d is not None]

        more = jax.vjp(extras, *(arrays[i] for i in which))[1]
        for i, d in zip(which, more([d for d in dextras if d is not None])):
            dins[i] = d if dins[i] is None else dins[i] + d
        return dins

    def _by_hand(self, arrays, outs, dys, types, moving, *, given, static, axes, wanted):
        """What cotangents of the results give; axes: per `jax.vmap` around it, the arrays'."""
        index = self._index(given)
        asked = dict(static, wanted=tuple(_spread(moving, given)))
        asked = {k: v for k, v in asked.items() if k in self._asks}
        values = [*arrays, *outs, *dys]
        levels = [(*a, *(0 for _ in outs), *(0 for _ in dys)) for a in axes]
        there = [i for i, v in enumerate(values) if v is not None]
        n = len(arrays) + len(outs)

        def backward(*present):
            at = dict(zip(there, present))
            dys = [at[i] for i in range(n, len(values))]
            kept = [at.get(index[k]) if k in index else None for k in self._keeps]
            with own_broadcasting():
                dins = self._backward(tuple(dys) if self._all_results else dys[0], *kept, **asked)
            dins = dins if isinstance(dins, (tuple, list)) else (dins,)
            dins = [d for d, g in zip(dins, given) if g]
            return tuple(d if m else None for d, m in zip(dins, moving))

        pulled = backward
        for level in reversed(levels):
            pulled = _mapped_and_summed(pulled, [level[i] for i in there], level)
        layouts = [jc.explicit_sharding(t) for t in types[:len(arrays)]]
        if any(map(jc.explicit_sharding, map(jax.typeof, (values[i] for i in there)))):
            # What is between has no types that say where it lies: a cotangent lies as its operand.
            pulled = jax.sharding.auto_axes(
                pulled, out_sharding=tuple(s if m else None for s, m in zip(layouts, moving)))
        return list(pulled(*(values[i] for i in there)))

    # As JAX's primitives

    def _jvp(self, primals, tangents, **params):
        moving = tuple(type(t) is not ad.Zero for t in tangents)
        forms = self._on_demand and params["wanted"] is None
        if forms:
            params["wanted"] = moving
        outs = self.primitive.bind(*primals, **params)
        dots = (t for t in tangents if type(t) is not ad.Zero)
        dots = self._linear.bind(*primals, *outs, *dots, moving=moving, **params)
        n = self.results if forms else len(outs)
        return outs[:n], dots[:n]

    def _split(self, args, given):
        n = sum(given)
        m = n + self.results + len(self.extras)
        return args[:n], args[n:m], args[m:]

    def _tangents(self, *args, moving, given, static, axes, wanted):
        """Tangents of results and extras."""
        arrays, _, dots = self._split(args, given)
        n, params = len(arrays), {"given": given, "static": static, "axes": (), "wanted": wanted}
        which = [i for i, m in enumerate(moving) if m]

        def tangents(*args):
            arrays, dots = args[:n], args[n:]

            def moved(*values):
                at = dict(zip(which, values))
                return self.run(*(at.get(i, x) for i, x in enumerate(arrays)), **params)

            return jax.jvp(moved, [arrays[i] for i in which], list(dots))[1]

        levels = [(*a, *(a[i] for i in which)) for a in axes]
        return list(_mapped(tangents, levels)(*arrays, *dots))

    def _linear_jvp(self, primals, tangents, **params):
        outs = self._linear.bind(*primals, **params)
        moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

        def moved(*values):
            at = dict(zip(moving, values))
            return self._tangents(*(at.get(i, x) for i, x in enumerate(primals)), **params)

        dots = jax.jvp(moved, [primals[i] for i in moving], [tangents[i] for i in moving])[1]
        return outs, dots

    def _transpose(self, cotangents, *args, moving, **params):
        arrays, outs, _ = self._split(args, params["given"])
        douts = [None if type(c) is ad.Zero else c for c in cotangents]
        types = [jax.typeof(x) for x in (*arrays, *outs)]
        dins = self._pulled(arrays, outs, douts, types, moving, **params)
        return [None] * (len(arrays) + len(outs)) + [d for d, m in zip(dins, moving) if m]

    def _batch(self, args, dims, *, axes, **params):
        args, level = _at_front(args, dims)
        outs = self.primitive.bind(*args, axes=(level, *axes), **params)
        return outs, [0] * len(outs)

    def _batch_linear(self, args, dims, **params):
        # As it stands: what is batched may be a tangent and not its operand.
        run = functools.partial(self._tangents, **params)
        args, level = _at_front(args, dims)
        outs = jax.vmap(lambda *xs: run(*xs), in_axes=level)(*args)
        return outs, [0] * len(outs)


def _evaluated_by(primitive, function):
    """A primitive that is this function: un-jitted compiled, its types by tracing."""

    @functools.lru_cache(256)
    def compiled(params):
        return jax.jit(functools.partial(function, **dict(params)))

    @functools.lru_cache(256)
    def types(avals, params):
        return jc.out_avals(jax.make_jaxpr(functools.partial(function, **dict(params)))(*avals))

    key = lambda params: tuple(sorted(params.items()))
    primitive.def_impl(lambda *xs, **params: compiled(key(params))(*xs))
    primitive.def_abstract_eval(lambda *avals, **params: types(avals, key(params)))
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True))


def _spread(values, given):
    """The values at the places where something is given, None at the others."""
    values = iter(values)
    return [next(values) if g else None for g in given]


def _mapped(function, axes):
    for level in reversed(axes):
        function = jax.vmap(function, in_axes=tuple(level))
    return function


def _mapped_and_summed(pulled, in_axes, level):
    """`jax.vmap` of a pullback: cotangents of what all share are summed."""

    def run(*values):
        dins = jax.vmap(pulled, in_axes=tuple(in_axes))(*values)
        return tuple(
            jnp.sum(d, 0, dtype=d.dtype) if d is not None and a is None else d
            for d, a in zip(dins, level)
        )

    return run


def _at_front(args, dims):
    level = tuple(None if d is None else 0 for d in dims)
    return [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims)], level
