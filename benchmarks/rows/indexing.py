"""Gathers and scatter-adds as indexing, embeddings and graph sums produce them."""

import jax
import jax.numpy as jnp

from benchmarks.row import operation, row


@row(smoke=[(7, 5, 11)], small=[(4000, 64, 1024)],
     full=[(32000, 256, 8192), (8192, 512, 4096), (399, 128, 40960)])
def embedding(draw, V, D, N):
    """The last size has many lookups per row, as in openxla/xla#46225."""
    table, ids = draw.normal(V, D), draw.integers(V, N)
    moved = table.nbytes + 4 * N * D * 3
    return operation(lambda table, ids: table[ids], [table], [ids], bytes=moved)


@row(smoke=[(5, 7)], small=[(512, 512)], full=[(4096, 2048)])
def indexing(draw, B, D):
    x, columns = draw.normal(B, D), draw.integers(D, B)
    rows = jnp.arange(B, dtype=jnp.int32)
    return operation(lambda x, c: x[rows, c], [x], [columns], bytes=x.nbytes)


@row(smoke=[(5, 7)], small=[(512, 512)], full=[(4096, 2048)])
def slicing(draw, B, D):
    x = draw.normal(B, D)
    return operation(lambda x: x[1:, ::2] - x[:-1, 1::2], [x[:, : D - D % 2]], bytes=2 * x.nbytes)


@row(smoke=[(11, 5, 3)], small=[(4096, 64, 512)], full=[(65536, 128, 4096)])
def segment_sum(draw, E, D, N):
    x, segments = draw.normal(E, D), draw.integers(N, E)
    function = lambda x, s: jax.ops.segment_sum(x, s, num_segments=N)
    return operation(function, [x], [segments], bytes=2 * x.nbytes)
