"""What programs are made of: templates of expressions, filled with what the program has so far.

Holes of a template: ``{f}`` a real value, ``{c}`` a complex one, ``{x}`` either, ``{i}`` integers,
``{n}`` a number, ``{t}`` a dtype, ``{p}`` a policy of `jax.checkpoint`, ``{q}`` a precision; and
functions drawn for the purpose: ``{scan}`` of a carry and an element, ``{one}`` of one value. What
JAX itself refuses is drawn again.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from .program import NAMES, Line, Program, Type

DTYPES = ("float32", "float64", "float16", "bfloat16", "complex64", "complex128")
NUMBERS = ("0.5", "1.5", "-2.0", "1.23", "3", "np.float32(0.25)")
POLICIES = (
    "None", "policies.everything_saveable", "policies.nothing_saveable", "policies.dots_saveable",
    "policies.dots_with_no_batch_dims_saveable",
    "policies.save_only_these_names('name')", "policies.save_anything_except_these_names('name')",
    "policies.save_from_both_policies(policies.dots_saveable, "
    "policies.save_only_these_names('name'))",
)
PRECISIONS = (
    "'highest'", "'default'", "('highest', 'default')", "lax.Precision.HIGH",
    "preset.F16_F16_F16", "preset.F16_F16_F32", "preset.BF16_BF16_F32", "preset.F32_F32_F32",
    "preset.F64_F64_F64", "preset.BF16_BF16_BF16", "preset.DEFAULT",
)

FAMILIES = {
    "elementwise": """
        jnp.sin({x})
        jnp.tanh({x})
        jnp.exp(-jnp.square({f}))
        jnp.abs({x})
        jnp.sqrt(1 + jnp.square({f}))
        jnp.log(2 + jnp.sin({f}))
        {x} + {x}
        {x} - {x}
        {x} * {x}
        {x} / (2 + jnp.sin({f}))
        {n} * {x}
        {n} - {x}
        {x} ** 2
        {x} ** {n}
        {n} ** {f}
        jnp.maximum({f}, {f})
        jnp.clip({f}, -1, {n})
        jnp.arctan2({f}, 2 + jnp.square({f}))
        jnp.where({f} > 0, {x}, {x})
        jnp.where({f} > 0, {x}, {n})
        jnp.logaddexp({f}, {f})
        jnp.hypot({f}, {f})
        jax.nn.relu({f})
        jax.nn.gelu({f})
        jax.nn.silu({f})
        jax.nn.softplus({f})
        doubled({x})
        doubled(doubled({x})) * {x}
        scaled({x}, 3.0)
        lax.stop_gradient({x}) * {x}
        jax.ad_checkpoint.checkpoint_name({x}, 'name')
    """,
    "types": """
        {x}.astype({t})
        {x}.astype({t}) * {x}
        lax.complex({f}, {f})
        jnp.real({c}) + jnp.imag({c})
        jnp.conj({x}) * {x}
    """,
    "shape": """
        {x}.T
        {x}.reshape(-1)
        {x}[..., None]
        {x}[None]
        {x}[::-1]
        {x}[0]
        {x}[:0]
        {x}[1:]
        {x}[..., -1]
        {x}[{i}]
        {x}.at[0].set({n})
        {x}.at[{i}].add({x})
        {x}.at[{i}].multiply({x})
        jnp.concatenate([{x}, {x}])
        jnp.stack([{x}, {x}], -1)
        jnp.pad({x}, 1)
        jnp.broadcast_to({x}, (2, *{x}.shape))
        jnp.roll({x}, 1)
        jnp.take({x}, {i}, axis=0, mode='clip')
        jnp.take_along_axis({x}, jnp.zeros((1,) * {x}.ndim, int), -1)
    """,
    "reductions": """
        jnp.sum({x})
        jnp.sum({x}, 0)
        jnp.mean({x}, -1, keepdims=True)
        jnp.max({f}, 0)
        jnp.prod({x}, -1)
        jnp.var({f})
        jnp.var({f}, -1)
        jnp.std(jnp.sin({f}) + {f}, ddof=0)
        jnp.linalg.norm({x} + 2)
        jax.nn.softmax({f})
        jax.nn.log_softmax({f}, 0)
        jax.nn.logsumexp({f}, -1)
        jax.nn.standardize({f}) * {f}
        jnp.cumsum({x}, 0)
        jnp.cumprod({x}, -1)
        lax.cummax({f})
        jnp.sort({f}, 0)
        total({x}) * {x}
    """,
    "products": """
        jnp.dot({x}, {x})
        jnp.dot({x}, {n})
        jnp.dot({n}, {x})
        jnp.dot({x}, {x}.T)
        jnp.matmul({x}, {x}.T)
        jnp.outer({x}, {x})
        jnp.vdot({x}, {x})
        jnp.tensordot({x}, {x}, 1)
        jnp.einsum('i,j->ji', {x}.reshape(-1), {x}.reshape(-1))
        jnp.einsum('...i,...i->...', {x}, {x})
        jnp.dot({f}, {f}.T, precision={q})
        lax.dot({f}, {f}, precision={q}, preferred_element_type={t})
        lax.dot_general({x}, {x}, (((0,), (0,)), ((), ())), preferred_element_type={t})
        lax.dot_general({x}, {x}, (((), ()), ((), ())))
        lax.conv_general_dilated({x}[None, None], {x}[None, None], (1,) * {x}.ndim, 'SAME')
        lax.conv_general_dilated({x}[None, :2], {x}[:2, None], (1,), 'SAME', feature_group_count=2)
        lax.conv_general_dilated({x}[None, :0], {x}[None, :0], (1,) * ({x}.ndim - 1), 'VALID')
        jnp.convolve({x}, {x})
        sparse.BCOO.fromdense(EYES.astype({x}.dtype), nse=5) @ {x}
        sparse_times({x}, {x})
        sparse.BCOO(({x}.reshape(-1)[:2], np.array([[0, 1], [2, 0]])), shape=(3, 2)).todense()
        sparse.BCSR.fromdense(EYES.astype({x}.dtype), nse=5) @ {x}
    """,
    "control": """
        lax.scan({scan}, {x}, {x})[0]
        lax.scan({scan}, {x}, {x})[1]
        lax.scan({scan}, {x}, {x}, reverse=True)[1]
        lax.scan(jax.checkpoint({scan}, policy={p}), {x}, {x})[0]
        jax.checkpoint(partial(lax.scan, {scan}), policy={p})({x}, {x})[0]
        jax.checkpoint(partial(lax.scan, {scan}), policy={p})({x}, {x})[1]
        lax.fori_loop(0, 3, lambda i, c: like({one}({x})[0], c), {x})
        lax.cond(jnp.sum({f}) > 0, {one}, {one}, {x})[0]
        lax.cond(jnp.sum({f}) > 0, lambda v: {x}, lambda v: like({one}(v)[0], {x}), {x})
        lax.switch(jnp.sum({i}), [lambda v: v, lambda v: like({one}(v)[0], v)], {x})
        jax.checkpoint(partial(lax.cond, jnp.sum({f}) > 0, {one}, {one}), policy={p})({x})[0]
        jax.checkpoint({one}, policy={p})({x})[0]
        jax.checkpoint({one}, prevent_cse=False)({x})[0]
        jax.jit({one})({x})[0]
        jax.vmap({one})({x})[0]
        jax.vmap(lambda v: lax.psum({one}(v)[0], 'rows'), axis_name='rows')({x})
        jax.vmap(lambda v: v - lax.pmean(v, 'rows'), axis_name='rows')({x})
        jax.vmap(lambda v: lax.all_gather(v, 'rows'), axis_name='rows')({x})
        lax.map({one}, {x})[0]
        lax.associative_scan(jnp.multiply, {x})
        jax.grad(lambda v: jnp.real(total({one}(v)[0])), holomorphic=False)({f})
        jax.jvp({one}, ({x},), ({x},))[1][0]
    """,
}
TEMPLATES = {
    family: [line.strip() for line in text.strip().splitlines()]
    for family, text in FAMILIES.items()
}
LARGEST = 64  # elements of a value
SIZES = ((), (1,), (3,), (2, 3), (3, 2), (3, 3), (2, 1, 3))


class Drawing:
    """One program being drawn: the types of what it has so far, and a source of names."""

    def __init__(self, rng, dtypes, family=None):
        self.rng, self.dtypes, self.family, self.counts = rng, dtypes, family, {}

    def choose(self, options):
        return options[self.rng.integers(len(options))]

    def fresh(self, letter):
        self.counts[letter] = self.counts.get(letter, -1) + 1
        return f"{letter}{self.counts[letter]}"

    def input(self):
        scale, shift = self.choose([(1.0, 0.0)] * 5 + [(1.0, 1e4), (1e-3, 0.0)])
        if self.rng.random() < 0.1:
            return Type((), self.choose(("float64", "float64", "complex128")), weak=True)
        return Type(self.choose(SIZES), self.choose(self.dtypes), scale, shift)

    def program(self, n_lines):
        """A whole program of up to this many lines."""
        inputs = {self.fresh("x"): self.input() for _ in range(self.rng.integers(1, 4))}
        inputs[self.fresh("i")] = Type((2,), "int32")
        types = {
            n: jax.ShapeDtypeStruct(t.shape, t.dtype, weak_type=t.weak) for n, t in inputs.items()
        }
        lines, types = self.lines(types, n_lines, depth=0)
        made = [line.target for line in lines] or list(inputs)
        results = tuple(dict.fromkeys(self.choose(made) for _ in range(2)))
        return Program("f", inputs, lines, results).needed()

    def lines(self, types, n_lines, depth):
        lines = []
        for _ in range(n_lines):
            for _ in range(8):
                if made := self.line(types, depth):
                    line, out = made
                    lines.append(line)
                    types = {**types, line.target: out}
                    break
        return tuple(lines), types

    def line(self, types, depth):
        """A line and the type of what it makes, or None if JAX would have none of it."""
        families = [f for f in TEMPLATES if depth < 2 or f != "control"]
        families += [self.family] * (self.family is not None and depth == 0)
        template = self.choose(TEMPLATES[self.choose(families)])
        blocks, failed = [], []

        def fill(hole):
            text = self.hole(hole[1], types, depth, blocks)
            failed.extend([hole] * (text is None))
            return text or ""

        expression = re.sub(r"\{(\w+)\}", fill, template)
        if failed:
            return None
        line = Line(self.fresh("v"), expression, tuple(blocks))
        try:
            out = type_of(line, types)
        except Exception:  # whatever JAX refuses, it refuses in its own way
            return None
        shaped = hasattr(out, "shape") and out.size <= LARGEST
        return (line, out) if shaped and jnp.issubdtype(out.dtype, jnp.inexact) else None

    def hole(self, kind, types, depth, blocks):
        fixed = {"n": NUMBERS, "p": POLICIES, "q": PRECISIONS, "t": [repr(t) for t in DTYPES]}
        if kind in fixed:
            return self.choose(fixed[kind])
        if kind in ("one", "scan"):
            block = self.block(kind, types, depth)
            blocks.append(block)
            return block.name
        if kind == "i":
            return self.choose([n for n, t in types.items() if t.dtype == "int32"] or [None])
        real = [n for n, t in types.items() if jnp.issubdtype(t.dtype, jnp.floating)]
        odd = [n for n, t in types.items() if jnp.issubdtype(t.dtype, jnp.complexfloating)]
        names = {"f": real, "c": odd, "x": real + odd}[kind]
        return self.choose(names[-3:] + names) if names else None

    def block(self, kind, types, depth):
        """An inner function; the types of its own inputs are those of values of the program."""
        like = [t for t in types.values() if jnp.issubdtype(t.dtype, jnp.inexact)]
        names = [self.fresh("c"), self.fresh("a")][: 2 if kind == "scan" else 1]
        mine = {n: _part(self.choose(like), kind == "scan" and i) for i, n in enumerate(names)}
        outer = {n: t for n, t in types.items() if self.rng.random() < 0.4}
        lines, _ = self.lines({**outer, **mine}, self.rng.integers(1, 3), depth + 1)
        made = [line.target for line in lines] or names
        last = self.choose(made)
        results = (f"like({last}, {names[0]})", self.choose(made)) if kind == "scan" else (last,)
        return Program(self.fresh("f"), dict.fromkeys(names), lines, results)


def _part(t, elements):
    """The type of an element of a loop, or the type itself."""
    return jax.ShapeDtypeStruct(t.shape[1:], t.dtype) if elements else t


def type_of(line, types):
    """Type of what a line makes of values of these types."""
    def run(*values):
        namespace = dict(NAMES, **dict(zip(types, values)))
        for block in line.blocks:
            exec(block.source(), namespace)
        return eval(line.expression, namespace)

    return jax.eval_shape(run, *types.values())
