"""A function's operations written down as Python runs it, with their values where they are known.

`jax.make_jaxpr` never knows a value, `jax.grad` outside of `jit` does: there ``if x > 0`` works. So
the tracers here, when asked, have everything recorded up to then evaluated, as one piece, and go
on. A function that asks nothing stays one piece, and nothing in it is evaluated twice, or early.

It stands on JAX's `DynamicJaxprTrace`, which `make_jaxpr` uses: tested with 0.10.2 and 0.12.0.1.
"""

from __future__ import annotations

import sys
import weakref

import jax
from jax._src import api_util, core, dtypes, effects
from jax._src.interpreters.partial_eval import DynamicJaxprTrace, DynamicJaxprTracer, TracebackScope
from jax.extend import source_info_util as lines

from fbprop.core import jaxcompat as jc
from fbprop.core.unknown import ERRORS
from fbprop.core.written import WRITTEN, Written

# Functions of JAX that ask of every operand whether it is known, and do without it.
IDLE = frozenset(("_convert_element_type", "_infer_src_sharding", "array", "is_constant_dim"))
# What arrays have and JAX's tracers have not: a derivative could get lost. Integers have none.
METHODS = (
    "__array__", "__complex__", "__dlpack__", "__float__", "addressable_data", "devices", "tobytes",
    "tolist",
)
ATTRIBUTES = frozenset(("block_until_ready", "copy_to_host_async", "device", "sharding"))


class Recorded(DynamicJaxprTracer):
    """A value of a function that is being recorded.

    Attributes:
      known: the value, once it is evaluated.
    """

    __slots__ = ("known",)

    def __init__(self, trace, aval, var, line, known=None):
        super().__init__(trace, aval, var, line)
        self.known = known

    def to_concrete_value(self):
        asking = sys._getframe(1)
        while asking.f_code.co_name in ("to_concrete_value", "is_concrete"):
            asking = asking.f_back
        name = asking.f_code.co_name
        if name in IDLE or (name == "power" and jc.differentiable(self.aval)):
            return None
        return core.to_concrete_value(self.evaluated())

    def evaluated(self):
        """The value, which may be a tracer of what is around; None if it is not known."""
        if self.known is None and self._trace.knows:
            self._trace.cut()
        return self.known

    def constant(self):
        """The value if no derivative gets lost where Python takes it; None otherwise."""
        value = self.evaluated()
        return None if self.val in self._trace.pieces.active else value

    def __getattr__(self, name):
        if name in ATTRIBUTES and not jc.differentiable(self.aval):
            value = self.evaluated()
            if value is not None:
                return getattr(value, name)
        return super().__getattr__(name)

    def __repr__(self):
        return super().__repr__() if self.evaluated() is None else f"Recorded({self.known})"

    def __format__(self, spec):
        value = self.evaluated()
        return super().__format__(spec) if value is None or not spec else format(value, spec)


def _of_constant(name):
    def method(self, *args, **kwargs):
        value = self.constant()
        if value is not None:
            return getattr(value, name)(*args, **kwargs)
        try:
            return getattr(super(Recorded, self), name)(*args, **kwargs)
        except ERRORS as error:
            error.is_known = self.known is not None
            raise

    return method


for _name in METHODS:
    setattr(Recorded, _name, _of_constant(_name))


class Record(DynamicJaxprTrace):
    """The trace under which a function runs; ``pieces`` (`Pieces`) evaluates what it recorded."""

    __slots__ = ("born", "knows", "pieces", "stack", "written")

    def __init__(self, fun, pieces):
        source = api_util.fun_sourceinfo(fun)
        super().__init__(core.DebugInfo("fbprop.vjp", source, None, None), core.trace_ctx.trace)
        self.pieces, self.knows = pieces, _knows(self.parent_trace)
        self.stack = lines.current_name_stack()
        self.born, self.written = [], {}

    def input(self, value):
        aval = jax.typeof(value)
        var = self.frame.newvar(aval)
        self.pieces.start(var)
        return Recorded(self, aval, var, lines.current(), value)

    def var_to_tracer(self, var, source_info, parent=None):
        tracer = Recorded(self, var.aval, var, source_info)
        self.born.append(weakref.ref(tracer))
        return tracer

    def stage_value(self, val):
        if self.knows and not isinstance(val, Recorded):
            return self.parent_trace.stage_value(val)
        return super().stage_value(val)

    def process_primitive(self, primitive, tracers, params, /):
        if self.knows and not self._concerns(primitive, tracers):
            avals = tuple(map(core.typeof, tracers))
            return primitive.bind_with_trace(self.parent_trace, tuple(tracers), avals, params)
        return self._done(super().process_primitive(primitive, tracers, params))

    def _concerns(self, primitive, operands):
        """Whether an operation is about recorded values; others are done at once, as in JAX."""
        return primitive.ref_allocating or any(
            (isinstance(x, Recorded) and x._trace is self) or isinstance(x, core.Ref)
            for x in operands
        )

    def process_custom_jvp_call(self, prim, fun, jvp, tracers, /, **params):
        record = super().process_custom_jvp_call
        return self._custom(record, prim, (fun, jvp), tracers, params)

    def process_custom_vjp_call(self, prim, fun, fwd, bwd, tracers, /, **params):
        record = super().process_custom_vjp_call
        return self._custom(record, prim, (fun, fwd, bwd), tracers, params)

    def _custom(self, record, prim, functions, tracers, params):
        """A function with a derivative of its own: if need be it runs as written, on values."""
        call = Written(prim, functions, params)
        try:
            outs = record(prim, *functions, tracers, **params)
            eqn = self.frame.tracing_eqns[-1]
            if self.knows and eqn.outvars and eqn.params["num_consts"] == 0:
                self.written[eqn.outvars[0]] = call
            return self._done(outs)
        except ERRORS:
            values = [x.evaluated() if isinstance(x, Recorded) else x for x in tracers]
            if any(v is None for v in values):
                raise
        with core.set_current_trace(self.parent_trace):
            avals = [*map(jax.typeof, call(*values))]
        line = lines.current()
        tracers = [self.to_jaxpr_tracer(x, line) for x in tracers]
        return self.emit_eqn(tracers, avals, WRITTEN, {"call": call}, effects.no_effects)

    def _done(self, outs):
        """Results of an operation just recorded; if the world sees that it is done, it is done."""
        eqns = self.frame.tracing_eqns
        if self.knows and eqns and _is_seen(eqns[-1]):
            self.cut()
        return [*map(core.full_lower, outs)] if isinstance(outs, list) else core.full_lower(outs)

    def cut(self):
        """Evaluate what was recorded since the last time, for the values that someone holds."""
        if not self.frame.tracing_eqns:
            return
        free = self._free((), ())
        self.frame.tracing_eqns = self.frame.get_eqns()  # of variables, which keep no value alive
        alive = [t for t in (ref() for ref in self.born) if t is not None]
        self.born = []
        jaxpr, args = self._piece([], free, alive)
        with core.set_current_trace(self.parent_trace), lines.set_name_stack(self.stack):
            outs = self.pieces.run(jaxpr, args, self.written)
        for t, out in zip(alive, outs):
            t.known = out

    def last(self, leaves, outs):
        """The jaxpr from the inputs, and what else is known, to the results; and its arguments."""
        line = lines.current()
        outs = [self.to_jaxpr_tracer(dtypes.canonicalize_value(x), line) for x in outs]
        return self._piece(leaves, self._free(outs, leaves), outs)

    def _free(self, outs, leaves):
        """Tracers, of values that are known, that what is not evaluated yet needs, but leaves."""
        used, made = {}, {t.val for t in leaves}
        for eqn in self.frame.tracing_eqns:
            used.update((t.val, t) for t in eqn.in_tracers if jc.is_var(t.val))
            made.update(eqn.outvars)
        used.update((t.val, t) for t in outs if jc.is_var(t.val))
        return {v: t for v, t in used.items() if v not in made}

    def _piece(self, leaves, free, outs):
        frame = self.frame
        consts, frame.constvar_to_val = frame.constvar_to_val, {}
        frame.invars = [*(t.val for t in leaves), *free]
        args = [t.known if isinstance(t, Recorded) else consts[v] for v, t in free.items()]
        jaxpr, _ = frame.to_jaxpr(self, outs, frame.debug_info, lines.current())
        frame.constvar_to_val, frame.tracing_eqns = consts, []
        return jc.closed(jaxpr), [*(t.known for t in leaves), *args]


def record(fun, leaves, pieces):
    """What a function of these values does, from where it last asked for one.

    Returns:
      Arguments for `Pieces.run`: the jaxpr to the function's results from ``leaves`` and what else
      is known, those values, and the functions in it that can be called as written.
    """
    trace = Record(fun, pieces)
    with core.ensure_no_leaks(trace):
        try:
            with lines.reset_name_stack(), TracebackScope():
                inputs = [trace.input(x) for x in leaves]
                with core.set_current_trace(trace):
                    outs = fun(*inputs)
                found = *trace.last(inputs, outs), trace.written
        finally:
            trace.invalidate()
            trace.pieces = None  # equations of custom_jvp keep the trace, which keeps all of it
        del trace, inputs, outs, fun
    return found


def _knows(trace):
    """Whether values are known under this trace: not if it, or one around it, is of `jit`."""
    while not isinstance(trace, core.EvalTrace):
        if isinstance(trace, Record):
            return trace.knows
        if isinstance(trace, DynamicJaxprTrace) or not hasattr(trace, "parent_trace"):
            return False
        trace = trace.parent_trace
    return True


def _is_seen(eqn):
    """Whether an equation does something outside, not only on a mutable array or over an axis."""
    inside = (effects.JaxprInputEffect, core.NamedAxisEffect)
    seen = any(not isinstance(effect, inside) for effect in eqn.effects)
    return seen or eqn.primitive.name == "pure_callback"
