"""Primitives without a rule of their own, each with the reason.

Delegated ones are differentiated by JAX, one equation at a time (as ``fallback="jax"`` does for
primitives the table does not know): there is no mathematics in them to write down. Refused ones
have no derivative, in JAX neither.
"""

from __future__ import annotations

from fbprop.core.fallback import jax_step
from fbprop.core.rule import Rule, no_gradient


class Delegated(Rule):
    """JAX differentiates this primitive."""

    takes_zeros = True

    def keeps(self):
        return "what JAX keeps"

    def prepare(self, site):
        return jax_step(site)


class Refused(Rule):
    """This primitive has no derivative; the message says what to do instead."""

    def prepare(self, site):
        raise ValueError(
            f"{self.math.partition(':')[0]}, got a differentiated value through {site.name!r}"
            f"{site.location()}: wrap the call in jax.custom_vjp, or its inputs in "
            "jax.lax.stop_gradient."
        )


def _delegated(reason, *names):
    return [Delegated(name, f"By JAX: {reason}") for name in names]


RULES = [
    *_delegated(
        "a conversion between types that say how values are distributed over a mesh.",
        "all_gather_reduced",
        "global_array_to_host_local_array",
        "host_local_array_to_global_array",
        "pbroadcast",
        "pbroadcast_dynamic",
        "preduced",
        "ragged_all_to_all",
        "reduced_vary_cast",
        "reduced_vary_cast_p",
        "relayout",
        "reshard",
        "unreduced_psum",
        "unreduced_reduce_scatter",
        "vary_unreduced_cast",
        "vary_unreduced_cast_p",
        "with_memory_space_constraint",
    ),
    *_delegated(
        "its derivative is what the user's class or function defines.",
        "call_hi_primitive",
        "call_hi_primitive_linearized",
        "custom_lin",
        "remat_opt",
    ),
    *_delegated(
        "its derivative is that of the form for every platform (`fbprop.core.devices`).",
        "at_lowering",
    ),
    *_delegated(
        "a conversion to or from an extended dtype.",
        "from_edtype",
        "to_edtype",
        "stage",
    ),
    *_delegated(
        "a sparse product or conversion (jax.experimental.sparse), whose derivative visits stored "
        "elements only.",
        "bcoo_dot_general",
        "bcoo_dot_general_sampled",
        "bcoo_extract",
        "bcoo_fromdense",
        "bcoo_sort_indices",
        "bcoo_spdot_general",
        "bcoo_sum_duplicates",
        "bcoo_todense",
        "bcoo_transpose",
        "bcsr_dot_general",
        "bcsr_extract",
        "bcsr_fromdense",
        "bcsr_todense",
        "coo_fromdense",
        "coo_matmat",
        "coo_matvec",
        "coo_todense",
        "csr_fromdense",
        "csr_matmat",
        "csr_matvec",
        "csr_todense",
        "spsolve",
        "todense",
    ),
    *_delegated(
        "says where, when or how its operations run (jax.experimental), in the derivative too.",
        "compute_on",
        "fused_call",
        "program_order",
        "shard_alike",
        "xla_metadata_call",
        "xla_metadata_value",
    ),
    *[
        Refused(name, f"{what} have no derivative: the code behind them is not JAX's.")
        for name, what in [
            ("buffer_callback", "Buffer callbacks"),
            ("pure_callback", "Pure callbacks"),
            ("io_callback", "IO callbacks"),
            ("ffi_call", "Foreign functions"),
        ]
    ],
    *[
        Refused(name, "Pallas kernels have no reverse derivative: JAX has a forward one only.")
        for name in ("mpmd_map", "pallas_call")
    ],
    Refused(
        "reduce_window",
        "Windowed reductions other than max, min and sum have no derivative: JAX has a forward one "
        "only.",
    ),
    *no_gradient(
        "Looks at a value and returns nothing: no gradient.",
        "debug_callback",
        "debug_print",
        "inspect_sharding",
        "dce_sink",
        "check",
    ),
]
