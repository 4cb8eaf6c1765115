"""Whether a loss is a mean over examples that do not meet before: read off its jaxpr.

The loss is traced for a batch whose size is a prime number that divides no other size, so that a
dimension that is a multiple of it holds the examples. Every value is one of: the same for all
(no marks), *apart* (a value per example), *summed* over examples, made of *positions* in the batch.
Apart goes through anything that leaves the examples' dimension alone; summed only through what is
linear, up to the loss; positions only into indices. Anything else is an error that says where.
"""

from __future__ import annotations

import jax

from fbprop.core import jaxcompat as jc
from fbprop.core.halves import needed_equations, weights_in_sight

APART, SUMMED, POSITIONS = "apart", "summed", "positions"
NOTHING = frozenset()
LINEAR = {
    "add", "sub", "add_any", "neg", "mul", "div", "convert_element_type", "reshape", "squeeze",
    "broadcast_in_dim", "transpose", "reduce_sum", "copy", "reduce_precision", "select_n",
    "optimization_barrier",
}
OF_POSITIONS = {
    "broadcast_in_dim", "reshape", "convert_element_type", "concatenate", "lt", "ge", "add", "sub",
    "select_n", "squeeze", "transpose", "copy", "clamp",
}
PRIMES = (1009, 1013, 1019, 1021, 1031, 1033)


def traced_apart(flat, parameters, examples, table):
    """The jaxpr of a loss for a batch of one example, products with weights in sight.

    Args:
      flat: ``(*parameters, *examples) -> loss``; examples: with the batch in front.

    Raises:
      ValueError: examples of a batch meet.
    """
    sizes = [n for p in parameters for n in p.shape] + [n for x in examples for n in x.shape[1:]]
    prime = next(p for p in PRIMES if all(n % p for n in sizes if n))

    def traced(size):
        types = [jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for x in examples]
        return weights_in_sight(jax.make_jaxpr(flat)(*parameters, *types), table)

    found = []
    for size in (1, prime):
        try:
            found.append(traced(size))
        except Exception as error:
            traced(examples[0].shape[0])  # what is wrong for this batch too is the loss's own error
            raise ValueError(
                f"A loss takes batches of any size, got one that fails for {size} of the "
                f"{examples[0].shape[0]} examples ({type(error).__name__}: {error}): read the size "
                "off the batch, and put what differs between examples into it."
            ) from error
    _Walk(prime).run(found[1], [NOTHING] * len(parameters) + [{APART}] * len(examples))
    return found[0]


class _Walk:
    """The marks of every value of jaxprs for a batch of this size."""

    def __init__(self, size):
        self.size, self.calls = size, []

    def run(self, jaxpr, marks):
        """Marks of the results, from those of the inputs."""
        body = jc.open_jaxpr(jaxpr)
        known = dict(zip(body.invars, map(frozenset, marks)))

        def of(v):
            return known.get(v, NOTHING) if jc.is_var(v) else NOTHING

        for eqn in needed_equations(jaxpr, body.outvars, {}):
            found = self.results(eqn, [*map(of, eqn.invars)])
            known.update((v, frozenset(m)) for v, m in zip(eqn.outvars, found))
        return [of(v) for v in body.outvars]

    def results(self, eqn, marks):
        """Marks of an equation's results."""
        name, every = eqn.primitive.name, frozenset().union(*marks)
        inner = [jaxpr for _, jaxpr in jc.sub_jaxprs(eqn.params)]
        if name == "scan":
            return self.loop(eqn, marks, eqn.params["jaxpr"], *jc.scan_sizes(eqn.params))
        if name == "while":
            p = eqn.params
            a, b = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
            carry = self.loop(eqn, marks[a:], p["body_jaxpr"], b - a, len(marks) - b)
            self.run(p["cond_jaxpr"], [*marks[:a], *carry])
            return carry
        if name == "cond":
            outs = [self.run(jaxpr, marks[1:]) for jaxpr in inner]
            return [frozenset().union(*m) for m in zip(*outs)]
        if name in ("custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint", "jit", "pjit",
                    "closed_call", "core_call", "custom_vjp_call_jaxpr"):
            self.calls.append(eqn)
            found = self.run(inner[0], marks)
            self.calls.pop()
            return found
        if not every:
            made = self.made(eqn)
        elif SUMMED in every:
            made = self.summed(eqn, marks)
        elif name in ("gather", "scatter", "scatter-add", "scatter_add", "dynamic_slice",
                      "dynamic_update_slice"):
            made = self.indexed(eqn, marks)
        elif POSITIONS in every:
            if name not in OF_POSITIONS:
                self.refuse(eqn, "numbers that depend on an example's place in the batch")
            made = every
        else:
            made = self.apart(eqn)
        return [made] * len(eqn.outvars)

    def at(self, v):
        """Dimensions of a value that hold examples."""
        return [i for i, n in enumerate(getattr(v.aval, "shape", ())) if n and n % self.size == 0]

    def made(self, eqn):
        """Of a value made of nothing that depends on the batch but its size."""
        axes, name = self.at(eqn.outvars[0]), eqn.primitive.name
        if name.startswith("random_bits") and axes:
            self.refuse(eqn, "random numbers for the whole batch")
        counts = name == "iota" and eqn.params["dimension"] in axes
        return {POSITIONS} if counts or (name.startswith("iota_2x32") and axes) else NOTHING

    def summed(self, eqn, marks):
        """A sum over examples is only added, and multiplied with what all share."""
        name, others = eqn.primitive.name, [m for m in marks if SUMMED not in m]
        shared = all(not m for m in others)
        product = name == "mul" and not others
        divides = name == "div" and SUMMED in marks[1]
        chosen = name == "select_n" and SUMMED in marks[0]
        if name not in LINEAR or not shared or product or divides or chosen:
            self.refuse(eqn, "a statistic of the batch")
        return {SUMMED}

    def indexed(self, eqn, marks):
        """Slices of one example each: of all, or by its own place."""
        name, operand = eqn.primitive.name, eqn.invars[0]
        axes = self.at(operand) if marks[0] else []
        if name == "gather":
            numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
            by_place = POSITIONS in marks[1]
            if not axes and by_place:
                self.refuse(eqn, "numbers that depend on an example's place in the batch")
            whole = all(
                sizes[i] == operand.aval.shape[i] or i in numbers.operand_batching_dims or by_place
                for i in axes
            )
        elif name.startswith("scatter"):
            numbers = eqn.params["dimension_numbers"]
            axes = self.at(operand)
            whole = bool(axes) and all(
                i in numbers.operand_batching_dims or POSITIONS in marks[1]
                or i not in numbers.scatter_dims_to_operand_dims for i in axes
            )
        else:
            sized = eqn.outvars[0] if name == "dynamic_slice" else eqn.invars[1]
            whole = all(sized.aval.shape[i] == operand.aval.shape[i] for i in axes)
            whole &= bool(self.at(eqn.outvars[0]))
        if not whole:
            self.refuse(eqn, "one example picked out of the batch by another")
        return {APART}

    def apart(self, eqn):
        """What is done to each example, or their sum."""
        p, operands = eqn.params, [v for v in eqn.invars if self.at(v)]
        over = {
            i for key in ("axes", "axis", "dimension", "dimensions")
            if eqn.primitive.name.startswith(("reduce_", "arg", "cum", "sort", "rev", "top_k"))
            for i in _several(p.get(key))
        }
        if eqn.primitive.name == "dot_general":
            return self.product(eqn)
        if any(set(self.at(v)) & over for v in operands):
            if eqn.primitive.name == "reduce_sum":
                return {SUMMED}
            self.refuse(eqn, "a comparison or product of examples")
        window = p.get("window_dimensions")
        if window and any(window[i] > 1 for v in operands[:1] for i in self.at(v)):
            self.refuse(eqn, "a window over examples")
        if eqn.primitive.name == "conv_general_dilated":
            x, w = eqn.invars[:2]
            if self.at(w) or self.at(x) != [p["dimension_numbers"][0][0]]:
                self.refuse(eqn, "a convolution over examples")
        if eqn.primitive.name in MATRICES and any(i >= v.aval.ndim - 2 for v in operands
                                                  for i in self.at(v)):
            self.refuse(eqn, "a matrix of examples")
        if any(len(self.at(v)) != 1 for v in eqn.outvars if not _unused(v)):
            self.refuse(eqn, "some of the batch's examples, or pairs of them")
        return {APART}

    def product(self, eqn):
        (over, _), x, y = eqn.params["dimension_numbers"], *eqn.invars[:2]
        contracted = any(set(self.at(v)) & set(dims) for v, dims in zip((x, y), over))
        if contracted == bool(self.at(eqn.outvars[0])) or len(self.at(eqn.outvars[0])) > 1:
            self.refuse(eqn, "products of pairs of examples")
        return {SUMMED} if contracted else {APART}

    def loop(self, eqn, marks, jaxpr, n_consts, n_carry):
        """Marks after a scan: those of what is carried grow until they hold at every step."""
        if any(self.at(v)[:1] == [0] for v in eqn.invars[n_consts + n_carry :]):
            self.refuse(eqn, "a loop over examples")
        carry = list(marks[n_consts : n_consts + n_carry])
        while True:
            outs = self.run(jaxpr, [*marks[:n_consts], *carry, *marks[n_consts + n_carry :]])
            grown = [a | b for a, b in zip(carry, outs)]
            if grown == carry:
                return [*carry, *outs[n_carry:]]
            carry = grown

    def refuse(self, eqn, what):
        around = (eqn, *reversed(self.calls))
        path = "/".join(filter(None, map(jc.scope, reversed(around))))
        line = next(filter(None, map(jc.source_line, around)), "an unknown line")
        raise ValueError(
            "Examples of a batch do not meet before the mean of their losses, got "
            f"{what} in {eqn.primitive.name!r} (at {line}"
            f"{f', path {path!r}' if path else ''}): their gradients are not each one's own. Use "
            "statistics of each example (layer norm) or fixed ones, average losses of examples, "
            "and draw random numbers by a key per example in the batch."
        )


MATRICES = {"cholesky", "qr", "householder_product", "svd", "eig", "eigh", "lu", "schur", "fft",
            "triangular_solve", "tridiagonal_solve", "hessenberg"}


def _several(value):
    return value if isinstance(value, (tuple, list)) else () if value is None else (value,)


def _unused(v):
    return type(v).__name__ == "DropVar"
