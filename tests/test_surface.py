"""What one may hand to `grad`, `value_and_grad` and `vjp`, right or wrong: as JAX has it.

Each entry runs with fbprop's functions and with JAX's; structures, types, weak types and values are
the same, or the class of the error is. Where ours differs on purpose, the entry is in a test below.
"""

import collections
import functools
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.dtypes import float0

import fbprop

X = np.array([0.5, -1.0], "float32")
N = np.array([1, 2], "int32")
OURS, THEIRS = ((m.grad, m.value_and_grad, m.vjp) for m in (fbprop, jax))


def types(tree, weak):
    """Structure, and per leaf its type, Python's numbers as the weakly typed arrays they stand for.

    NumPy's constants in a value count as arrays: JAX hands them back as they are, ours as arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, [
        (x.shape, "float0") if getattr(x, "dtype", None) == float0
        else type(x) if isinstance(x, (str, bytes)) or type(x) is object
        else (jnp.shape(x), jnp.asarray(x).dtype, weak and jnp.asarray(x).weak_type)
        for x in leaves
    ]


def outcome(entry, functions, weak):
    try:
        found = entry(*functions)
        return types(found, weak), found
    except Exception as error:
        return type(error), str(error)


def same_outcome(entry, weak):
    kind, found = outcome(entry, OURS, weak)
    expected_kind, expected = outcome(entry, THEIRS, weak)
    if isinstance(expected_kind, type):
        assert isinstance(kind, type), f"got {found} expected {expected_kind.__name__}: {expected}"
        common = set(kind.__mro__) & set(expected_kind.__mro__) - {Exception, BaseException, object}
        assert common, f"got {kind.__name__}: {found} expected {expected_kind.__name__}: {expected}"
        return
    assert kind == expected_kind, f"got {kind}: {found}"
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        if isinstance(a, jax.Array) and not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-6)


class Point(NamedTuple):
    x: object
    y: object


@jax.tree_util.register_dataclass
@dataclass
class Data:
    a: object
    b: object
    name: str = field(default="name", metadata={"static": True})


@jax.tree_util.register_pytree_node_class
class Node:
    def __init__(self, child):
        self.child = child

    def tree_flatten(self):
        return (self.child,), "static"

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def three(x, y, z=2.0):
    return jnp.sum(x * y) * z


def generator(x):
    yield x


def total(tree):
    numbers = [x for x in jax.tree.leaves(tree) if not isinstance(x, str)]
    return sum((jnp.sum(jnp.asarray(x).astype("float32") * 2.0) for x in numbers), jnp.float32(0))


def both(fun, *args, **kwargs):
    """An entry: value and gradient."""
    return lambda grad, value_and_grad, vjp: value_and_grad(fun, **kwargs)(*args)


def pulled(fun, cotangent, *primals):
    return lambda grad, value_and_grad, vjp: vjp(fun, *primals)[1](cotangent)


ARGNUMS = [
    0, 1, -1, -2, (0, 1), (1, 0), (0, -1), [0], [0, 1], np.int32(1), np.array([0, 1]), np.array(1),
    True, False, (True, False), range(2), jnp.int32(1), 2, -3, (0, 5), (0, -5), (), [], "0", None,
    1.0, (1.0,), (0, "a"),
]
NUMBERS = {
    "float": 3.0, "int": 3, "bool": True, "complex": 1 + 2j, "np.float32": np.float32(2),
    "np.float64": np.float64(2), "np.float16": np.float16(2), "np.int32": np.int32(2), "array": X,
    "array64": X.astype("float64"), "integers": N, "weak": jnp.asarray(2.0), "empty": X[:0],
    "booleans": N > 1, "complexes": X.astype("complex64"), "bfloat16": X.astype(jnp.bfloat16),
}
FUNCTIONS = {
    "same": lambda x: x, "sum": lambda x: jnp.sum(x * 2), "square": lambda x: x * x + 1.0,
    "constant": lambda x: jnp.float32(1), "stopped": lambda x: jnp.sum(jax.lax.stop_gradient(x)),
    "loop": lambda x: jax.lax.scan(lambda c, _: (c * 2, None), jnp.sum(x), None, length=2)[0],
    "branch": lambda x: jax.lax.cond(True, lambda x: x * 2, lambda x: x, jnp.sum(x)),
    "jitted": jax.jit(lambda x: jnp.sum(x * 3)),
}
TREES = {
    "dict": {"w": X, "b": (X, None, []), "e": {}}, "namedtuple": Point(X, {"a": X}),
    "none": None, "dataclass": Data(X, 3.0), "node": Node([X, 2.0]), "()": (), "{}": {},
    "order": {"z": X, "a": 2.0}, "ordered": collections.OrderedDict(b=X, a=2.0),
    "keys": {2: X, 1: 2.0}, "default": collections.defaultdict(list, b=X),
    "partial": jax.tree_util.Partial(three, X, z=2.0),
    "integer": {"a": X, "n": 3}, "string": {"a": X, "s": "text"}, "unsorted": {1: X, "a": 2.0},
    "object": [X, object()], "set": {1.0, 2.0}, "strings": np.array(["a"]), "bytes": b"ab",
    "huge": 2**70, "large": 2**40, "range": range(3), "objects": np.array([None, 1]), "...": ...,
}
RESULTS = {
    "None": lambda x: None, "text": lambda x: "text", "tuple": lambda x: (x,),
    "dict": lambda x: {"a": x}, "vector": lambda x: x * X, "one": lambda x: x * jnp.ones(1),
    "int": lambda x: 3, "integers": lambda x: N, "bool": lambda x: True, "float": lambda x: 3.0,
    "complex": lambda x: x * 1j, "()": lambda x: (), "object": lambda x: object(),
    "set": lambda x: {1.0},
    "key": lambda x: jax.random.key(0), "raises": lambda x: 1 / 0, "generator": lambda x: iter([x]),
}
COTANGENTS = {
    "1.0": 1.0, "1": 1, "True": True, "None": None, "scalar": jnp.ones(()), "vector": jnp.ones(2),
    "longer": jnp.ones(3), "float16": jnp.ones((), "float16"), "1j": 1j, "int32": jnp.int32(1),
    "float0": np.zeros((), float0), "float0s": np.zeros((2,), float0), "np.float32": np.float32(1),
    "np.float64": np.float64(1), "tuple": (1.0,), "list": [1.0], "text": "a", "object": object(),
    "matrix": jnp.ones((1, 2)), "dict": {"a": 1.0}, "()": (),
}
OUTPUTS = {
    "scalar": (lambda x: x * 2.0, 1.0), "vector": (lambda x: x * 2, X),
    "integer": (lambda x: 3, 1.0),
    "float16": (jnp.sum, X.astype("float16")), "complex": (jnp.sum, X.astype("complex64")),
    "integers": (lambda x: N, 1.0), "tuple": (lambda x: (x,), 1.0), "pair": (lambda x: (x, N), 1.0),
    "dict": (lambda x: {"a": x}, 1.0), "None": (lambda x: None, 1.0), "()": (lambda x: (), 1.0),
    "list": (lambda x: [x], 1.0), "constant": (lambda x: 2.0, X), "bool": (lambda x: x > 0, 1.0),
}


def with_aux(result):
    return lambda x: (x * 2.0, result(x))


ENTRIES = {
    **{f"argnums {n!r}": both(three, X, X + 1, argnums=n) for n in ARGNUMS},
    **{f"argnums {n!r} of three": both(three, X, X + 1, 3.0, argnums=n)
       for n in (2, -3, -4, (0, 2))},
    "keyword only": lambda grad, *_: grad(lambda x: x)(x=3.0),
    "a keyword": lambda grad, *_: grad(three)(X, y=X, z=3.0),
    "a static keyword": lambda grad, *_: grad(lambda x, *, how: getattr(jnp, how)(x))(X, how="sum"),
    "a static position": both(lambda x, how: getattr(jnp, how)(x), X, "sum"),
    "text differentiated": both(lambda x, how: jnp.sum(x), X, "sum", argnums=1),
    "no arguments": both(lambda: 1.0),
    "too many": both(lambda x: x, 1.0, 2.0),
    "too few": both(lambda x, y: x, 1.0),
    "vjp of a keyword": lambda _, __, vjp: vjp(lambda x, y: x, X, y=X),
    "pullback of two": lambda _, __, vjp: vjp(lambda x: x, 1.0)[1](1.0, 2.0),
    "pullback of none": lambda _, __, vjp: vjp(lambda x: x, 1.0)[1](),
    **{f"{f} of {n}": both(FUNCTIONS[f], x) for f in ("same", "square")
       for n, x in NUMBERS.items()},
    **{f"{f} of {n}": both(FUNCTIONS[f], NUMBERS[n]) for f in FUNCTIONS
       for n in ("float", "weak")},
    **{f"integer {f} of {n}": both(FUNCTIONS[f], NUMBERS[n], allow_int=True)
       for f in ("sum", "square") for n in ("float", "int", "bool", "integers", "array")},
    **{f"holomorphic {f} of {n}": both(FUNCTIONS[f], x, holomorphic=True)
       for f in ("sum", "constant") for n, x in NUMBERS.items()
       if n in ("float", "int", "complex", "complexes")},
    **{f"vjp of {n}": pulled(FUNCTIONS["same"], x, x) for n, x in NUMBERS.items()},
    **{f"tree {n}": both(total, tree) for n, tree in TREES.items()},
    **{f"tree {n}, integers": both(total, tree, allow_int=True) for n, tree in TREES.items()},
    **{f"tree {n}, not differentiated": both(lambda x, t: x * 2.0, 1.0, t)
       for n, t in TREES.items()},
    **{f"tree {n}, aux": both(with_aux(lambda x, t=t: t), 1.0, has_aux=True)
       for n, t in TREES.items() if n not in ("objects", "strings")},
    **{f"returns {n}": both(f, 1.0) for n, f in RESULTS.items() if n != "float"},
    **{f"returns {n}, with aux": both(f, 1.0, has_aux=True) for n, f in RESULTS.items()},
    **{f"returns {n}, holomorphic": both(f, 1j, holomorphic=True) for n, f in RESULTS.items()},
    **{f"aux {n}": both(with_aux(f), 1.0, has_aux=True) for n, f in RESULTS.items()
       if n not in ("generator", "object", "set")},
    "aux list": both(lambda x: [x, 1], 1.0, has_aux=True),
    "aux of three": both(lambda x: (x, 1, 2), 1.0, has_aux=True),
    "aux in a namedtuple": both(lambda x: Point(x, x), 1.0, has_aux=True),
    "aux in a dict": both(lambda x: {"a": x, "b": x}, 1.0, has_aux=True),
    "aux of all kinds": both(
        with_aux(lambda x: {"a": x, "b": 1, "c": 2.0, "d": N, "e": None, "f": x * X, "g": "text"}),
        1.0, has_aux=True,
    ),
    **{f"function {f!r}": both(f, X, X + 1) for f in
       (3, None, "f", functools.partial(three, z=3.0), jax.jit(three), jnp.dot, staticmethod(three),
        generator)},
    **{f"cotangent {c} of {o}": pulled(fun, COTANGENTS[c], *primals)
       for o, (fun, *primals) in OUTPUTS.items() for c in COTANGENTS},
    "cotangent of a pair": pulled(lambda x: (x, N), (1.0, np.zeros(2, float0)), 1.0),
    "cotangent of a pair, integers": pulled(lambda x: (x, N), (1.0, N), 1.0),
    "cotangent of a pair, one": pulled(lambda x: (x, N), (1.0, None), 1.0),
}


@pytest.mark.parametrize("start", range(8))
def test_as_jax(start):
    wrong = []
    for name in list(ENTRIES)[start::8]:
        try:  # JAX lets cotangents be as weakly typed as those handed in, ours as the primals
            with jax.numpy_dtype_promotion("standard"):
                same_outcome(ENTRIES[name], weak=not name.startswith(("vjp", "cotangent")))
        except AssertionError as error:
            wrong.append(f"{name}: {str(error).partition(' assert ')[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_gradients_are_as_weakly_typed_as_what_they_are_of(wrap, x64):
    weak = wrap(lambda: 2.0 * jnp.asarray(1.0))()
    for x, y in [(3.0, weak), (weak, jnp.float64(2)), (1j, weak), (jnp.ones(2), weak)]:
        fun = lambda x, y: jnp.sum(jnp.abs(x * y)) ** 2 + jnp.size(x)
        found = wrap(fbprop.grad(fun, (0, 1)))(x, y)
        for d, p in zip(found, (x, y)):
            p = jnp.asarray(p)
            assert (d.dtype, d.weak_type) == (p.dtype, p.weak_type)
    strong = fbprop.vjp(lambda x: x * 2.0, jnp.float64(1.0))[1](1.0)[0]
    assert not strong.weak_type


@pytest.mark.parametrize("argnums", [(0, 0), (0, -2, 1), [1, 1, 0]])
def test_an_argument_named_twice_gets_its_whole_gradient_twice(argnums):
    expected = jax.grad(three, (0, 1))(X, X + 1)
    found = fbprop.grad(three, argnums)(X, X + 1)
    assert isinstance(found, tuple)
    for n, d in zip(argnums, found, strict=True):
        np.testing.assert_array_equal(d, expected[n % 2])
    np.testing.assert_array_equal(fbprop.grad(lambda x: x * x, (0, 0))(1.0), [2.0, 2.0])


def test_what_aux_holds_besides_traced_values_is_handed_back_as_it_is():
    constants = np.array([None, 1]), np.array(["a"]), np.ones(2), 3, jnp.ones(2), object()
    _, (found, traced) = fbprop.grad(lambda x: (x, (constants, x)), has_aux=True)(2.0)
    assert all(a is b for a, b in zip(found, constants, strict=True))
    assert traced == 2.0


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: fbprop.grad(three, "0"), TypeError, "got '0' expected an integer or a sequence"),
    (lambda: fbprop.grad(three, ())(X, X), ValueError, "got none expected one or more"),
    (lambda: fbprop.grad(three, -3)(X, X), ValueError, "got -3 expected at least -2 with 2 pos"),
    (lambda: fbprop.grad(three)(x=X), TypeError,
     "requires at least 1 positional arguments .* keyword arguments are not differentiated"),
    (lambda: fbprop.grad(generator), TypeError, "got <function gen.* and no generator function"),
    (lambda: fbprop.vjp(staticmethod(three)), TypeError, "got <staticmethod.* expected a callable"),
    (lambda: fbprop.explain(three, X, X, argnums="x"), TypeError, "got 'x' expected an integer"),
    (lambda: fbprop.vjp(lambda x: x, 1.0)[1](1.0, 2.0), TypeError,
     "one cotangent .* got 2 arguments expected 1"),
    (lambda: fbprop.vjp(lambda x: x, 1.0)[1]("a"), TypeError, "Cotangents are .* 'a' of type str"),
    (lambda: fbprop.vjp(lambda x: x, 1.0)[1](1), ValueError, r"int32\[\] expected float32\[\]"),
    (lambda: fbprop.vjp(lambda x: {"y": (x, x)}, X)[1]({"y": (X, X[:1])}), ValueError,
     re.escape("got an unexpected JAX type for argument to vjp function: float32[1] expected "
               "float32[2], that of output['y'][1]: cast or reshape it")),
])
def test_one_sentence(call, error, match):
    with pytest.raises(error, match=match):
        call()
