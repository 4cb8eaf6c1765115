"""Everything fbprop needs of JAX that is not public API or differs between versions.

Tested with jax 0.10.2 (Python 3.11) and jax 0.12.0.1 (Python 3.12). Nothing else in fbprop
touches an attribute of a jaxpr that is not used here, so a new JAX release is met in this file, and
in `fbprop.core.record`, which is a tracer.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys

import jax
import jaxlib
import numpy as np
from jax._src import literals
from jax.interpreters import ad


@functools.cache
def _source_info():
    """JAX's module about source lines and name stacks, told to skip fbprop's own frames.

    Imported when it is first needed: `jax.extend` imports Pallas, 40 ms of an import of fbprop.
    """
    from jax.extend import source_info_util

    source_info_util.register_exclusion(__file__.rsplit("/", 1)[0])
    return source_info_util


def as_function(jaxpr):
    """The function of flat values that a closed jaxpr is."""
    from jax.extend.core import jaxpr_as_fun

    return jaxpr_as_fun(jaxpr)


def open_jaxpr(jaxpr):
    """The part with ``constvars, invars, eqns, outvars``; jax 0.10 wraps it in a ClosedJaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def closed(jaxpr):
    """An open jaxpr without constants as a closed one."""
    return jaxpr if hasattr(jaxpr, "consts") else jax.extend.core.ClosedJaxpr(jaxpr, ())


def with_equations(jaxpr, eqns):
    """The jaxpr with these equations in the place of its own."""
    body = open_jaxpr(jaxpr)
    if body.eqns == eqns:
        return jaxpr
    body = body.replace(eqns=eqns)
    return body if jaxpr is open_jaxpr(jaxpr) else jaxpr.replace(jaxpr=body)  # jax 0.12; 0.10


def consts_of(jaxpr):
    """Values bound to ``constvars``; an open jaxpr (0.10's ``remat2`` parameter) has none."""
    return tuple(getattr(jaxpr, "consts", ()))


def out_avals(jaxpr):
    return [v.aval for v in open_jaxpr(jaxpr).outvars]


def in_avals(jaxpr):
    return [v.aval for v in open_jaxpr(jaxpr).invars]


def is_var(atom):
    """Whether an operand or result is a variable; a literal carries its value instead."""
    return not hasattr(atom, "val")


_NUMBERS = frozenset((
    literals.TypedInt, literals.TypedFloat, literals.TypedComplex, literals.TypedNdArray,
    int, float, complex, bool, np.ndarray,
))  # types of literals, and of constants


def literal(atom):
    """The value of a literal as the array that it stands for.

    JAX holds scalars as Python numbers without a shape, or as NumPy arrays, whose arithmetic warns.
    An equation takes them as they are (`bind`); rules, and whoever gets results, get arrays.
    """
    return jax.numpy.asarray(atom.val)


def differentiable(aval):
    """Whether values of this type have a tangent space: floats and complex numbers do."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jax.numpy.issubdtype(dtype, jax.numpy.inexact)


def written(atoms, effects):
    """Mutable references (`jax.new_ref`) among these inputs, if they may be written to."""
    writes = any(type(e).__name__ in ("WriteEffect", "AccumEffect") for e in effects)
    return [v for v in atoms if writes and hasattr(v.aval, "inner_aval")]


@functools.cache
def is_of_another_package(primitive):
    """Whether a primitive is not JAX's own: those are all held by a module of JAX."""
    modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == "jax"]
    return not any(x is primitive for m in modules for x in list(vars(m).values()))


def has_derivative(primitive):
    """Whether a derivative of a primitive is registered in JAX."""
    return primitive in ad.primitive_jvps


def no_cotangent(aval):
    """The cotangent of a result of this type that `jax.vjp`'s pullback takes for a symbolic 0."""
    return ad.Zero(aval.to_tangent_aval())


@functools.cache
def adds_by_compare_and_swap(dtype):
    """Whether XLA's scatter-add of such numbers on NVIDIA GPUs retries until none interferes.

    bfloat16: openxla/xla#26371. float32: jaxlib 0.10.2 to 0.11.0, jax-ml/jax#38806.
    """
    return dtype == jax.numpy.bfloat16 or (
        dtype == jax.numpy.float32 and (0, 10, 2) <= _jaxlib_version() <= (0, 11, 0)
    )


def primitive_names() -> set[str]:
    """Names of all primitives, of JAX and of others, that JAX can differentiate or compile here."""
    from jax.interpreters import ad, mlir

    tables = ad.primitive_jvps, ad.primitive_transposes, mlir._lowerings
    known = {p for table in (*tables, *mlir._platform_specific_lowerings.values()) for p in table}
    return {p.name for p in known}


@functools.cache
def cpu_respects_barriers():
    """Whether XLA's compiler for CPUs keeps `jax.lax.optimization_barrier` until it has looked for
    common subexpressions: jaxlib 0.10.2 does not, 0.12.0 does."""
    return _jaxlib_version() >= (0, 12, 0)


def types_costly_to_hold():
    """Of these types an array stays where another is held by its first number
    (`fbprop.core.opaque`): jaxlib 0.10 copies it, 0.12 only what it converts."""
    return ("float16",) if cpu_respects_barriers() else ("float16", "float32")


def behind_barrier(tree):
    """`jax.lax.optimization_barrier` of arrays, each of the type that it was.

    In a ``shard_map``, jax 0.10 makes what goes through one barrier vary over the same axes: there
    arrays that vary over others get one of their own.
    """
    leaves, form = jax.tree.flatten(tree)
    kinds = [varying_axes(jax.typeof(x)) for x in leaves]
    if _jaxlib_version() >= (0, 12, 0) or len(set(kinds)) <= 1:
        return jax.lax.optimization_barrier(tree)
    for kind in dict.fromkeys(kinds):
        mine = [i for i, k in enumerate(kinds) if k == kind]
        for i, x in zip(mine, jax.lax.optimization_barrier([leaves[i] for i in mine])):
            leaves[i] = x
    return form.unflatten(leaves)


def is_for_one_device(ctx):
    """Whether what is lowered (`jax.interpreters.mlir.LoweringRuleContext`) is for one device.

    Unknown, as of an export for a mesh without devices, counts as several.
    """
    where = ctx.module_context.axis_context
    return getattr(where, "num_devices", None) == 1


def _jaxlib_version():
    return tuple(int(n) for n in re.findall(r"\d+", jaxlib.__version__)[:3])


def nbytes(aval):
    """Bytes of a value of this type; 0 if it is not an array."""
    return getattr(aval, "size", 0) * getattr(getattr(aval, "dtype", None), "itemsize", 0)


def bind(eqn, operands):
    """Evaluate one equation as it stands; returns the list of its results.

    Source line, name stack and context (mesh, compute type, ...) are the equation's own, so errors,
    profiles and outer transformations see the user's code rather than fbprop's.
    """
    with equation_context(eqn):
        out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    outs = out if eqn.primitive.multiple_results else [out]
    # A function that returns what it is given returns a literal as it is.
    return [jax.numpy.asarray(x) if type(x) in _NUMBERS else x for x in outs]


@contextlib.contextmanager
def equation_context(eqn):
    info, lines = eqn.source_info, _source_info()
    stack = lines.current_name_stack() + info.name_stack
    with lines.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def source_line(eqn):
    """``file:line:column (function)`` of the user's code that made this equation."""
    return _source_info().summarize(eqn.source_info)


def scope(eqn):
    """Named scopes of an equation as ``"encoder/dense"``: marks of transformations removed."""
    stack = str(eqn.source_info.name_stack)
    while (bare := re.sub(r"\w+\(([^()]*)\)", r"\1", stack)) != stack:
        stack = bare
    return "/".join(part for part in stack.split("/") if part)


def is_derivative(eqn):
    """Whether an equation was made by `jax.jvp` or `jax.grad` of a function."""
    stack = str(eqn.source_info.name_stack)
    return "jvp(" in stack or "transpose(" in stack


def sub_jaxprs(params):
    """Every jaxpr among an equation's parameters, by parameter name and position."""
    for name, value in params.items():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(open_jaxpr(item), "eqns"):
                yield name, item


def runnable(jaxpr):
    """The jaxpr without the algorithms for products that the platform lacks, if it runs at once.

    `jax.nn.dot_product_attention` of float16 asks for one, and where running that fails it does
    without. A trace is not run, so it has the first form. Under `jit` JAX's has it as well.
    """
    if jax.default_backend() != "cpu" or (plain := _with_plain_products(jaxpr)) is jaxpr:
        return jaxpr
    at_once = not isinstance(jax.numpy.zeros(()), jax.core.Tracer)
    return plain if at_once else jaxpr


def _with_plain_products(jaxpr):
    body = open_jaxpr(jaxpr)
    params = [{k: _plain(v) for k, v in eqn.params.items()} for eqn in body.eqns]
    same = [all(v is e.params[k] for k, v in p.items()) for e, p in zip(body.eqns, params)]
    if all(same):
        return jaxpr
    eqns = [e if s else e.replace(params=p) for e, p, s in zip(body.eqns, params, same)]
    body = body.replace(eqns=eqns)
    return body if jaxpr is open_jaxpr(jaxpr) else jaxpr.replace(jaxpr=body)  # jax 0.12; 0.10


def _plain(param):
    """A parameter with plain products: of a product, or of an equation that contains others."""
    if isinstance(param, (jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset)):
        return param if cpu_has(param) else None
    if isinstance(param, tuple):
        items = tuple(map(_plain, param))
        return param if all(a is b for a, b in zip(items, param)) else items
    return _inner_with_plain_products(param) if hasattr(open_jaxpr(param), "eqns") else param


_inner_with_plain_products = functools.lru_cache(2048)(_with_plain_products)


@functools.cache
def cpu_has(algorithm) -> bool:
    """Whether JAX has products by this algorithm on CPUs."""
    one = jax.ShapeDtypeStruct((1,), "float32")
    try:
        jax.jit(lambda x: jax.lax.dot(x, x, precision=algorithm)).lower(one)
    except ValueError:
        return False
    return True


def scan_sizes(params):
    """(number of constants, number of carried values) of a ``scan`` equation."""
    if "num_consts" in params:  # jax 0.10
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax 0.12
    return len(consts), len(carry)


@contextlib.contextmanager
def backward_context(eqn):
    """Backward work carries its equation's source line and, marked, its scope, as JAX's does."""
    info, lines = eqn.source_info, _source_info()
    with lines.transform_name_stack("transpose"):
        stack = lines.current_name_stack() + info.name_stack
        with lines.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
            yield


def is_sharded(eqn):
    """Whether a ``jit`` equation prescribes where its operands or results lie."""
    prescribed = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return any(isinstance(s, jax.sharding.Sharding) for s in prescribed)


def constrain(values, shardings):
    """Put values where a ``jit`` equation prescribes them."""
    return [
        jax.lax.with_sharding_constraint(v, s) if isinstance(s, jax.sharding.Sharding) else v
        for v, s in zip(values, shardings)
    ]


def derivative_function(eqn):
    """The Python function behind a ``custom_jvp_call``'s derivative; None if it is not found.

    JAX wraps it anew at each tracing, so it is looked for under the wrappers' closures.
    """
    thunk = eqn.params["jvp_jaxpr_fun"]
    try:
        while True:
            memoized = inspect.getclosurevars(thunk.f).nonlocals["fn"]
            function = inspect.getclosurevars(memoized).nonlocals["jvp"].f
            inner = inspect.getclosurevars(function).nonlocals.get("jvp_jaxpr_fun")
            if inner is None:
                return function
            thunk = inner  # the equation came from evaluating another one
    except (AttributeError, KeyError, TypeError):
        return None


def varying_axes(aval):
    """Mesh axes over which values of this type differ, where JAX tracks it (``check_vma``)."""
    kind = getattr(aval, "manual_axis_type", None)  # jax 0.12
    return frozenset(getattr(aval, "vma", ())) if kind is None else frozenset(kind.varying)


def zeros(aval):
    """Zeros of exactly this type: axes they vary over, explicit sharding and memory included."""
    value = varying_like(jax.numpy.zeros(aval.shape, aval.dtype), aval)
    value = sharded_like(value, aval)
    space = getattr(aval, "memory_space", jax.memory.Space.Device)
    return value if space == jax.memory.Space.Device else jax.device_put(value, space)


def explicit_sharding(aval, order=None):
    """The sharding that is part of this type (mesh axes of type Explicit), or None.

    Args:
      order: the sharding of the array with its dimensions in this order.
    """
    sharding = getattr(aval, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return None
    if order is None:
        return sharding
    spec = jax.sharding.PartitionSpec(*(sharding.spec[d] for d in order))
    return jax.sharding.NamedSharding(mesh, spec)


def mesh_context(aval):
    """Where operations on values of this type may be: inside ``auto_axes`` the mesh is another."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    if mesh is None or mesh.empty or mesh == jax.sharding.get_abstract_mesh():
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def weak_like(value, aval):
    """The value as weakly or strongly typed as this type; Python numbers are weakly typed."""
    if jax.typeof(value).weak_type == aval.weak_type:
        return value
    from jax.extend.core.primitives import convert_element_type_p

    return convert_element_type_p.bind(
        value, new_dtype=value.dtype, weak_type=aval.weak_type, sharding=None
    )


def sharded_like(value, aval):
    """The value with the sharding that this type prescribes, if it does."""
    sharding = explicit_sharding(aval)
    if sharding is None or jax.typeof(value).sharding == sharding:
        return value
    return jax.sharding.reshard(value, sharding)


def varying_like(value, *others):
    """The value as one that varies over the axes the others (arrays or types) vary over.

    A loop that starts from a constant and adds such values to it needs to start from this.
    """
    types = [x if hasattr(x, "to_tangent_aval") else jax.typeof(x) for x in others]
    axes = frozenset().union(*map(varying_axes, types)) - varying_axes(jax.typeof(value))
    return jax.lax.pcast(value, tuple(axes), to="varying") if axes else value
