"""A loss of one example, parted where parameters meet what depends on the example.

What depends on parameters alone is computed once for the whole batch. Every place where such a
value is used with one of the example is an input of its own of the other part, so that its
cotangent stays in factors, however often a parameter is used (tied weights). Cotangents of uses
that are the parameter's elements in another order or type need no more: that is followed here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from fbprop.core import jaxcompat as jc
from fbprop.core.halves import evaluate

VIEWS = ("transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "copy")


class Use(NamedTuple):
    """An operand of an equation that depends on the example, made of parameters alone.

    Attributes:
      at: number of the equation and of the operand.
      var: the value.
      parameter: whose elements, all of them, it consists of, by number; None if it is computed.
      views: then the equations from the parameter to it.
    """

    at: tuple[int, int]
    var: object
    parameter: int | None
    views: tuple

    def back(self, cotangent):
        """The parameter's cotangent as an array, from the use's."""
        for eqn in reversed(self.views):
            aval = eqn.invars[0].aval
            if eqn.primitive.name == "transpose":
                cotangent = lax.transpose(cotangent, np.argsort(eqn.params["permutation"]))
            cotangent = lax.reshape(cotangent, aval.shape).astype(aval.dtype)
        return cotangent


class Parted:
    """The jaxpr of ``(*parameters, *example) -> loss`` in two.

    Attributes:
      uses: of parameters, `Use`.
      shared: other values of the first part that the second one reads.
    """

    def __init__(self, jaxpr, n_params: int):
        self.jaxpr, self.n_params = jaxpr, n_params
        body = jc.open_jaxpr(jaxpr)
        self.parameters = body.invars[:n_params]
        late, learned = set(body.invars[n_params:]), set(self.parameters)
        self.late = []
        for eqn in body.eqns:
            inputs = {v for v in eqn.invars if jc.is_var(v)}
            self.late.append(bool(inputs & late) or bool(eqn.effects))
            if self.late[-1]:
                late.update(eqn.outvars)
            elif inputs & learned:
                learned.update(v for v in eqn.outvars if jc.differentiable(v.aval))
        self.made_by = {v: eqn for eqn in body.eqns for v in eqn.outvars}
        read = [((i, j), v) for i, eqn in enumerate(body.eqns) if self.late[i]
                for j, v in enumerate(eqn.invars) if jc.is_var(v) and v not in late]
        if jc.is_var(body.outvars[0]) and body.outvars[0] not in late:
            read.append(((len(body.eqns), 0), body.outvars[0]))
        self.uses = [Use(at, v, *self._origin(v)) for at, v in read if v in learned]
        self.shared = list(dict.fromkeys(v for _, v in read if v not in learned))

    def _origin(self, v):
        """The parameter that a value is a view of, by number, and the equations between them."""
        views = []
        while v in self.made_by and self._is_view(self.made_by[v]):
            views.insert(0, self.made_by[v])
            v = views[0].invars[0]
        if v not in self.parameters:
            return None, ()
        return self.parameters.index(v), tuple(views)

    def _is_view(self, eqn):
        x, y = eqn.invars[0], eqn.outvars[0]
        floating = jc.is_var(x) and jnp.issubdtype(x.aval.dtype, jnp.floating)
        return eqn.primitive.name in VIEWS and floating and x.aval.size == y.aval.size

    def first(self, parameters):
        """Values of `uses`, and of `shared`."""
        want = [*(use.var for use in self.uses), *self.shared]
        values = evaluate(self.jaxpr, parameters, want, known={})
        return values[: len(self.uses)], values[len(self.uses) :]

    def computed(self, parameters):
        """Values of those uses that are no views."""
        want = [use.var for use in self.uses if use.parameter is None]
        return evaluate(self.jaxpr, parameters, want, known={})

    def second(self, used, shared, example):
        """The loss, from the values of `uses` and `shared` and one example."""
        body = jc.open_jaxpr(self.jaxpr)
        env = dict(zip(body.constvars, jc.consts_of(self.jaxpr)))
        env.update(zip(body.invars[self.n_params :], example))
        env.update(zip(self.shared, shared))
        own = {use.at: value for use, value in zip(self.uses, used)}

        def read(at, v):
            return own[at] if at in own else env[v] if jc.is_var(v) else v.val

        for i, eqn in enumerate(body.eqns):
            if self.late[i]:
                operands = [read((i, j), v) for j, v in enumerate(eqn.invars)]
                env.update(zip(eqn.outvars, jc.bind(eqn, operands)))
        return jnp.asarray(read((len(body.eqns), 0), body.outvars[0]))

    def bytes(self):
        """Of all values of one example, by the forward pass; of loops, at every step."""
        eqns = jc.open_jaxpr(self.jaxpr).eqns
        return sum(_bytes(eqn) for eqn, late in zip(eqns, self.late) if late)

    def reached_by_computed(self) -> set[int]:
        """Numbers of the parameters that computed uses depend on."""
        wanted = {use.var for use in self.uses if use.parameter is None}
        for eqn in reversed(jc.open_jaxpr(self.jaxpr).eqns):
            if any(v in wanted for v in eqn.outvars):
                wanted.update(v for v in eqn.invars if jc.is_var(v))
        return {i for i, v in enumerate(self.parameters) if v in wanted}


def _bytes(eqn):
    inner = [jaxpr for _, jaxpr in jc.sub_jaxprs(eqn.params)]
    within = sum(_bytes(e) for jaxpr in inner for e in jc.open_jaxpr(jaxpr).eqns)
    return max(within * eqn.params.get("length", 1), sum(jc.nbytes(v.aval) for v in eqn.outvars))
