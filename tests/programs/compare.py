"""A program differentiated by fbprop and by JAX, and what differs."""

from __future__ import annotations

import contextlib
import gc
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fbprop

from .program import Program, total

EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "complex64": 2.0**-24}
FACTOR = 32  # rounding errors that a gradient may be off by, of its largest element


def first(module, fun, primals):
    """Values, and cotangents of every input, for cotangents of one."""
    out, pullback = module.vjp(fun, *primals)
    return out, pullback(jax.tree.map(lambda y: jnp.ones_like(y), out))


def second(module, fun, primals):
    """The gradient of a function of the gradient."""
    moving = [i for i, p in enumerate(primals) if jnp.issubdtype(jnp.result_type(p), jnp.inexact)]

    def of_gradient(*values):
        full = [*primals]
        for i, v in zip(moving, values):
            full[i] = v
        gradients = first(module, fun, full)[1]
        return sum(jnp.real(total(gradients[i])).astype(float) for i in moving)

    return module.vjp(of_gradient, *(primals[i] for i in moving))[1](1.0)


def stacked(primals):
    return [jnp.stack([jnp.asarray(p), jnp.asarray(p)]) for p in primals]


TRANSFORMS = {
    "plain": first,
    "jit": lambda module, fun, primals: jax.jit(lambda *p: first(module, fun, p))(*primals),
    "vmap": lambda module, fun, primals: jax.vmap(lambda *p: first(module, fun, p))(
        *stacked(primals)
    ),
    "of vmap": lambda module, fun, primals: first(module, jax.vmap(fun), stacked(primals)),
    "of scan": lambda module, fun, primals: first(
        module, lambda *p: lax.map(lambda q: fun(*q), p), stacked(primals)
    ),
    "of checkpoint": lambda module, fun, primals: first(module, jax.checkpoint(fun), primals),
    "second order": second,
}
SETTINGS = {
    "none": {},
    "64 bits": {"enable_x64": True},
    "rank promotion": {"numpy_rank_promotion": "raise"},
    "strict types": {"numpy_dtype_promotion": "strict"},
    "leaks": {"check_tracer_leaks": True},
    "no jit": {"disable_jit": True},
}


@contextlib.contextmanager
def settings(name):
    with contextlib.ExitStack() as stack:
        for option, value in {"numpy_dtype_promotion": "standard", **SETTINGS[name]}.items():
            stack.enter_context(getattr(jax, option)(value))
        if name == "leaks":
            stack.enter_context(young_heap())
        yield


@contextlib.contextmanager
def young_heap():
    """What exists is not looked through for leaks: in a run of many tests that took minutes."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Trial(NamedTuple):
    """A program, and how it is to be differentiated."""

    program: Program
    transform: str
    setting: str
    seed: int = 0
    ours: object = fbprop  # a module, or anything that has ``vjp``

    def difference(self) -> str | None:
        """What differs between fbprop and JAX, in a line; None if nothing does."""
        with settings(self.setting):
            try:
                primals = self.program.primals(self.seed)
            except Exception as error:
                return f"the program itself: {error!r}"
            (theirs, refused), (ours, failed) = self.outcomes(primals)
            if refused or failed:
                return refusal(refused, failed)
            weak = any(getattr(jax.typeof(p), "weak_type", False) for p in primals)
            return structures(ours, theirs, weak) or self.numbers(ours, theirs, primals)

    def outcomes(self, primals):
        """(result, None) or (None, error), of JAX and of ours, with no code made for it.

        Under `jit` XLA evaluates the constants that everything is; one program of both takes less.
        """
        if self.setting != "no jit":
            with contextlib.suppress(Exception):
                both = jax.jit(lambda: [self.run(module, primals) for module in (jax, self.ours)])()
                return [(result, None) for result in both]
        return [self.outcome(module, primals) for module in (jax, self.ours)]

    def run(self, module, primals):
        return TRANSFORMS[self.transform](module, self.program.function(), primals)

    def outcome(self, module, primals):
        run = lambda: self.run(module, primals)
        try:
            return (run() if self.setting == "no jit" else jax.jit(run)()), None
        except Exception as error:
            return None, error

    def numbers(self, ours, theirs, primals):
        """What differs beyond rounding; where it seems to, JAX's own is measured in 64 bits."""
        ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
        if not self.beyond(ours, theirs, [None] * len(ours)):
            return None
        return self.beyond(ours, theirs, self.wide(primals) or [None] * len(ours))

    def beyond(self, ours, theirs, reference):
        epsilon = max(
            [EPSILON[t] for t in EPSILON if t in self.text()] + [2.0**-53 * 2**10]
        )
        for i, (a, b, exact) in enumerate(zip(ours, theirs, reference)):
            if getattr(b, "dtype", None) == jax.dtypes.float0:
                continue
            a, b = (np.asarray(x).astype(complex) for x in (a, b))
            seen = np.isfinite(b)  # where JAX has none, ours may have a derivative
            if not seen.any():
                continue
            scale = max(np.abs(b[seen]).max(), 1e-30)
            allowed = FACTOR * epsilon * scale
            if exact is not None and exact.shape == b.shape and np.isfinite(exact[seen]).all():
                allowed += FACTOR * np.abs(b - exact)[seen].max()
                b = np.where(seen, exact, b)
            error = np.where(seen, np.abs(a - b), 0)
            if not error.max() <= allowed:  # also where it is nan
                at = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)
                return f"leaf {i}{list(map(int, at))}: got {a[at]:.9g} expected {b[at]:.9g}"
        return None

    def text(self):
        return self.program.source() + str([t.dtype for t in self.program.inputs.values()])

    def wide(self, primals):
        """JAX's result in 64 bits, as flat arrays, if the program can be run so."""
        source = re.sub(r"b?float(16|32)\b", "float64", self.program.source())
        source = source.replace("complex64", "complex128")
        if "preset" in source:
            return None
        with jax.enable_x64(True):
            try:
                fun, wide = self.program.function(source), [*map(widened, primals)]
                out = jax.jit(lambda: TRANSFORMS[self.transform](jax, fun, wide))()
            except Exception:  # a loop of which only some types were widened, say
                return None
        return [
            np.zeros(()) if x.dtype == jax.dtypes.float0 else np.asarray(x).astype(complex)
            for x in jax.tree.leaves(out)
        ]

    def __str__(self):
        inputs = ", ".join(
            f"{n}: {t.dtype}{list(t.shape)}" + " number" * t.weak
            + f" at {t.shift:g}" * bool(t.shift) + f" of size {t.scale:g}" * (t.scale != 1)
            for n, t in self.program.inputs.items()
        )
        return f"# {self.transform}, setting: {self.setting}; {inputs}\n{self.program.source()}"


def widened(x):
    kind = jnp.result_type(x)
    if isinstance(x, (int, float, complex)) or not jnp.issubdtype(kind, jnp.inexact):
        return x
    return jnp.asarray(x, jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64)


def refusal(theirs, ours):
    """What differs between two errors, or an error and none."""
    if ours is None:
        # A derivative where JAX has none is no fault, nor is doing without a product.
        lacks = isinstance(theirs, NotImplementedError) or "supported by dot_general" in str(theirs)
        return None if lacks else f"JAX refuses: {theirs!r}"[:300]
    said = f"{type(ours).__name__}: {str(ours)[:300]}"
    if theirs is None:
        return f"fbprop refuses: {said}"
    same = isinstance(ours, type(theirs)) or isinstance(theirs, type(ours))
    return None if same else f"fbprop says {said}\nJAX says {type(theirs).__name__}: {theirs}"[:600]


def structures(ours, theirs, weak=False):
    """What differs in structure, shapes, dtypes and weak types.

    Of Python numbers (``weak``) JAX gives some cotangents as strong ones, 0.10 and 0.12 alike, as
    where a number is an operand of `lax.complex`; ours are all weak.
    """
    (a, tree_a), (b, tree_b) = jax.tree.flatten(ours), jax.tree.flatten(theirs)
    if tree_a != tree_b:
        return f"structure: got {tree_a} expected {tree_b}"
    for i, (x, y) in enumerate(zip(a, b)):
        got, expected = (
            (np.shape(v), getattr(v, "dtype", type(v)), getattr(v, "weak_type", False))
            for v in (x, y)
        )
        if got != expected and not (weak and got == (*expected[:2], True)):
            return f"leaf {i} is of type {got} expected {expected}"
    return None
