"""Rows of rules/collective.py and rules/shard.py: functions mapped over 4 x 2 simulated devices."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from cases.case import Case, real


def mapped(body, in_specs=(P("i"),), out_specs=P("i"), check_vma=True):
    """``body`` on the shards of its operands."""

    def fun(*operands):
        kinds = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=kinds)
        run = jax.shard_map(
            body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
        )
        return run(*operands)

    return jax.jit(fun)


def everything(x, w):
    """Varying, invariant and replicated values, a loop, a kept value of each kind."""
    y = jnp.sin(x @ w)
    total = lax.psum(y, "i")
    h, _ = lax.scan(lambda h, _: (jnp.tanh(h * y + w[0]), None), y, None, length=2)
    return h + jnp.exp(total) * lax.axis_index("i").astype(y.dtype)


BOTH = (P("i"), P())

CASES = [
    Case(
        "shard_map",
        mapped(everything, BOTH),
        (real(4, 3), real(3, 2)),
        kept=8 * (12 + 6 * 4 + 8 + 8 + 2 + 4 + 16 + 16),
    ),
    Case(
        "shard_map",
        mapped(everything, BOTH, check_vma=False),
        (real(4, 3), real(3, 2)),
        "untracked",
        kept=8 * (12 + 6 + 3 * 16 + 8 + 32 + 32),
    ),
    Case(
        "shard_map",
        mapped(lambda x: jnp.sin(x), (P("j", "i"),), P("j", "i")),
        (real(2, 4),),
        "two axes",
        kept=8 * 8,
    ),
    Case(
        "psum",
        mapped(lambda x: lax.psum(x, "i") * x, check_vma=False),
        (real(4, 2),),
        kept=8 * (8 + 16),
    ),
    Case(
        "psum",
        jax.vmap(jax.vmap(lambda x: lax.psum(x, ("v", "w")) * x, axis_name="w"), axis_name="v"),
        (real(3, 2, 5),),
        "positional",
        kept=8 * (30 + 5),
    ),
    Case(
        "psum_invariant", mapped(lambda x: lax.psum(x, "i"), out_specs=P()), (real(4, 2),), kept=0
    ),
    Case("pvary", mapped(lambda x, w: x * w, BOTH), (real(4, 2), real(2)), kept=8 * (8 + 8)),
    Case(
        "all_gather", mapped(lambda x: lax.all_gather(x, "i") * x), (real(4, 2),), kept=8 * (32 + 8)
    ),
    Case(
        "all_gather",
        mapped(lambda x: lax.all_gather(x, "i", axis=1, tiled=True)),
        (real(4, 2),),
        "tiled",
        kept=0,
    ),
    Case(
        "all_gather_invariant",
        mapped(lambda x: lax.all_gather(x, "i", axis=1, to="invarying"), out_specs=P()),
        (real(4, 2),),
        kept=0,
    ),
    Case(
        "all_gather_invariant",
        mapped(lambda x: lax.all_gather(x, "i", tiled=True, to="invarying"), out_specs=P()),
        (real(8, 2),),
        "tiled",
        kept=0,
    ),
    Case(
        "reduce_scatter",
        mapped(lambda x: lax.psum_scatter(x, "i", scatter_dimension=1)),
        (real(4, 4),),
        kept=0,
    ),
    Case(
        "reduce_scatter",
        mapped(lambda x: lax.psum_scatter(x, "i", scatter_dimension=1, tiled=True)),
        (real(4, 8),),
        "tiled",
        kept=0,
    ),
    Case(
        "ppermute", mapped(lambda x: lax.ppermute(x, "i", [(0, 1), (1, 3)])), (real(4, 2),), kept=0
    ),
    Case(
        "all_to_all",
        mapped(lambda x: lax.all_to_all(x, "i", 1, 0, tiled=True)),
        (real(4, 4),),
        kept=0,
    ),
]
