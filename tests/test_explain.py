"""The table that `fbprop.explain` prints, and that its bytes are what the pullback holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from fbprop import nn, ops

X, W = jnp.arange(15.0).reshape(3, 5) / 7, jnp.ones((5, 5)) / 5


def network(w, x):
    """Everything that contains equations, under a scope."""
    with jax.named_scope("encoder"):
        h = jax.nn.silu(x @ w)
    h = jax.jit(lambda h: jnp.sin(h) * h)(h)
    c, hs = lax.scan(lambda c, t: (jnp.tanh(c @ w + t),) * 2, h[0], h)
    hs = lax.cond(c[0] > 0, jnp.sin, lambda hs: jnp.exp(hs) * 2.0, hs)
    hs = jax.checkpoint(lambda hs: jnp.sin(jnp.sin(hs)))(hs)
    return jnp.sum(jax.nn.log_softmax(hs))


def held(fun, *primals):
    return sum(x.nbytes for x in jax.tree.leaves(fbprop.vjp(fun, *primals)[1].kept))


def rules(explanation, depth=0):
    return [line.rule for line in explanation.lines if line.depth == depth]


def test_bytes_are_those_that_the_pullback_holds():
    for argnums, fun, primals in [
        (0, lambda w: network(w, X), (W,)),
        (1, lambda x: network(W, x), (X,)),
        (-1, lambda x: network(W, x), (X,)),
        ((0, 1), network, (W, X)),
    ]:
        explanation = fbprop.explain(network, W, X, argnums=argnums)
        assert explanation.kept == held(fun, *primals)
        assert sum(line.kept for line in explanation.lines if not line.depth) == explanation.kept


def test_nested_equations_stand_below_those_that_contain_them():
    lines = fbprop.explain(network, W, X).lines
    for outer, depth, inner in [
        ("jit <lambda>", 1, ["sin", "mul"]),
        ("scan of 3", 1, ["dot_general", "add", "tanh"]),
        ("branch 0", 2, ["exp", "mul"]),
        ("branch 1", 2, ["sin"]),
        ("remat2", 1, ["sin", "sin"]),
    ]:
        start = [line.primitive for line in lines].index(outer) + 1
        found = lines[start : start + len(inner)]
        assert [line.rule for line in found] == inner
        assert {line.depth for line in found} == {depth}


def test_paths_rules_formulations_and_shapes():
    first, *_ = fbprop.explain(network, W, X).lines
    assert first[:4] == (0, "encoder", "dot_general", "dot_general")
    assert first.shapes == "f32[3,5], f32[5,5] -> f32[3,5]"
    assert "jax.nn.silu" in rules(fbprop.explain(network, W, X))
    image, kernel = jnp.ones((2, 5, 5, 3)), jnp.ones((1, 1, 3, 2))
    conv = lambda x, w: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    (line,) = fbprop.explain(conv, image, kernel).lines
    assert line.formulation == "matmul"
    assert "matmul" in str(fbprop.explain(conv, image, kernel))


def test_a_value_kept_by_two_rules_is_counted_once():
    fun = lambda x: jnp.sum(jnp.tanh(x) ** 2)
    explanation = fbprop.explain(fun, X)
    assert explanation.kept == X.nbytes == held(fun, X)
    assert [line.kept for line in explanation.lines] == [X.nbytes, 0, 0]


def test_nothing_is_computed_and_types_are_enough():
    large = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)
    fun = lambda scale, x, axis: jnp.sum(scale * jnp.sin(x), axis)
    assert fbprop.explain(fun, large, large, 1).kept == 2**42
    assert fbprop.explain(fun, 2.0, large, None, argnums=(0, 1)).kept == 2 * 2**42 + 4


def test_the_table_is_aligned_and_ends_in_the_total():
    head, *body, last = str(fbprop.explain(network, W, X)).splitlines()
    assert head.split("  ")[0] == "path"
    assert all(line[: head.index("shapes")].endswith("  ") for line in body)
    total = fbprop.explain(network, W, X).kept
    assert last.split() == ["total", f"{total:,}"]


def test_other_rules_show():
    mine = fbprop.rule("tanh", "", x=lambda dy, x: dy / jnp.square(jnp.cosh(x)))
    table = fbprop.table.override(mine)
    fun = lambda x: jnp.tanh(2.0 * x)
    ours, theirs = (fbprop.explain(fun, X, rules=r) for r in (None, table))
    assert ours.kept == theirs.kept == X.nbytes
    y = jnp.tanh(2.0 * X)
    np.testing.assert_allclose(fbprop.vjp(fun, X)[1].kept.values[0], y)
    np.testing.assert_allclose(fbprop.vjp(fun, X, rules=table)[1].kept.values[0], 2.0 * X)


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def convolved(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3] // w.shape[2],
    )


def attention(q):
    return fbprop.ops.attention(q, q, q, causal=True)


def head(x, w):
    return fbprop.ops.linear_cross_entropy(x, w, jnp.zeros(4096, jnp.int32))


BLOCKS, BY_HEAD = "by blocks of queries", "head by head, by blocks of queries"
MASKED, IF_NEED_BE = "summed masked", "summed as it stands, again if not finite"
IMAGES, CONVOLUTION = "convolution, w̄ some images at a time", "convolution"


@pytest.mark.parametrize(("fun", "args", "expected"), [
    (jax.nn.softmax, [f32(3, 5)], (IF_NEED_BE, f"{MASKED}, in one kernel", MASKED)),
    (lambda x: jax.nn.softmax(x, 0), [f32(3, 5)], (IF_NEED_BE, MASKED, MASKED)),
    (jnp.matmul, [f32(2048, 256), f32(256, 96)], ("b̄ turned", "", "")),
    (convolved, [f32(2, 8, 8, 3), f32(3, 3, 3, 4)], (IMAGES, CONVOLUTION, CONVOLUTION)),
    (convolved, [f32(2, 8, 8, 4), f32(3, 3, 1, 4)], ("taps", CONVOLUTION, CONVOLUTION)),
    (convolved, [f32(2, 8, 8, 3), f32(1, 1, 3, 4)], ("matmul",) * 3),
    (lambda x: x[jnp.array([1, 1])], [bf16(3, 5)], ("", "rows sorted", "")),
    (attention, [bf16(2, 256, 4, 64)], (BY_HEAD, "cuDNN", "Pallas")),
    (head, [f32(4096, 512), f32(512, 11)],
     ("chunks of 512 rows", "chunks of 1024 rows",
      "chunks of 1024 rows (the Pallas kernel takes 512 classes or more)")),
    (head, [f32(4096, 512), f32(512, 700)],
     ("chunks of 512 rows", "chunks of 1024 rows", "chunks of 2048 rows, by a Pallas kernel")),
    (fbprop.ops.layer_norm, [f32(1024, 768)], ("row by row", "", "")),
], ids=["softmax", "softmax of columns", "matmul", "convolution", "taps", "matmul 1x1", "gather",
        "attention", "head", "head by a kernel", "layer_norm"])
def test_what_is_chosen_on_a_platform(fun, args, expected):
    argnums = tuple(range(len(args)))
    for platform, form in zip(("cpu", "cuda", "tpu"), expected, strict=True):
        found = fbprop.explain(fun, *args, argnums=argnums, platform=platform)
        assert [x.formulation for x in found.lines if x.formulation] == [form] * bool(form)


def test_why_a_kernel_is_not_chosen_on_a_platform():
    said = {p: next(x.formulation for x in fbprop.explain(attention, f32(2, 70, 4, 8), platform=p)
                    .lines if x.rule == "attention") for p in ("cpu", "cuda", "tpu")}
    assert said["cpu"] == BY_HEAD
    assert said["cuda"] == f"{BLOCKS}; not cuDNN: cuDNN takes 16-bit numbers, not float32"
    assert said["tpu"].startswith(f"{BLOCKS}; not Pallas: the Pallas kernel takes multiples of 128")


def test_what_becomes_of_values_that_are_not_kept():
    def layers(w, x):
        for _ in range(5):
            x = jnp.square(jax.nn.relu((x @ w) * 2.0 + 1.0))
        return jnp.sum(x)

    args = f32(64, 64), f32(256, 64)
    plain = fbprop.explain(layers, *args)
    again = sum(x.again for x in plain.lines)
    assert again > 0
    assert again % (256 * 64 * 4) == 0
    for platform, way in [("cpu", "computed again, behind a truth"), ("tpu", "left to XLA"),
                          ("cuda", "computed again, behind a barrier")]:
        found = fbprop.explain(layers, *args, platform=platform)
        again = sum(x.again for x in found.lines)  # on GPUs by a cut of its own
        assert again > 0
        assert str(found).splitlines()[-1].startswith(
            f"on {platform}: {again:,} bytes are not kept, but {way}")
        assert [x._replace(formulation="") for x in found.lines] == [
            x._replace(formulation="") for x in plain.lines]
    assert "on cpu" not in str(plain)


def test_errors():
    with pytest.raises(ValueError, match="for cpu, cuda or tpu, got platform='gpu'"):
        fbprop.explain(jnp.sin, X, platform="gpu")
    with pytest.raises(ValueError, match="got 1 expected one of 1"):
        fbprop.explain(jnp.sin, X, argnums=1)
    with pytest.raises(TypeError, match="got 3 expected a callable"):
        fbprop.explain(3, X)


def plain_loss(z, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], -1)


def optax_loss(z, y):
    """As Optax's, of integer labels."""
    z = z - lax.stop_gradient(jnp.max(z, -1, keepdims=True))
    return jnp.log(jnp.sum(jnp.exp(z), -1)) - jnp.take_along_axis(z, y[:, None], -1)[:, 0]


def onehot_loss(z, y):
    return -jnp.sum(jax.nn.one_hot(y, 32) * jax.nn.log_softmax(3 * jnp.tanh(z / 3)), -1)


def softmax_loss(z, y):
    return -jnp.log(jnp.sum(jax.nn.softmax(z + 1.0) * jax.nn.one_hot(y, 32), -1))


HEAD = f32(512, 16), f32(16, 32), jax.ShapeDtypeStruct((512,), jnp.int32)


def hints(loss, operands=HEAD):
    return fbprop.explain(lambda x, w, y: jnp.mean(loss(x @ w, y)), *operands,
                          argnums=(0, 1)).hints


def test_logits_that_only_a_cross_entropy_reads():
    for loss in (plain_loss, optax_loss, onehot_loss, softmax_loss, nn.softmax_cross_entropy,
                 jax.checkpoint(jax.jit(plain_loss)), lambda z, y: plain_loss(z[2:], y[2:])):
        (hint,) = hints(loss)
        assert "linear_cross_entropy would keep none of 65,536 bytes of logits f32[512,32]" in hint
        assert "test_explain" in hint
    looped = lambda z, y: lax.map(lambda a: jnp.sum(plain_loss(*a)), (z[None], y[None]))
    assert hints(looped) == ()  # the product is before the loop, and what is in it is another body
    steps = lambda x, w, y: jnp.sum(lax.map(lambda x: jnp.mean(plain_loss(x @ w, y)), x[None]))
    explanation = fbprop.explain(steps, *HEAD, argnums=(0, 1))
    assert str(explanation).splitlines()[-1] == explanation.hints[0]
    x, w, y = HEAD
    op = lambda x, w, y: ops.linear_cross_entropy(x, w, y)
    saved = [fbprop.explain(f, x, w, y, argnums=(0, 1)).kept for f in (
        lambda x, w, y: nn.softmax_cross_entropy(x @ w, y), op)]
    assert abs(saved[0] - saved[1] - 65536) < 5000  # a few numbers per row


def test_logits_that_something_else_reads():
    for other in (lambda z, y: jnp.sum(plain_loss(z, y)) + jnp.sum(z**2),
                  lambda z, y: jnp.sum(plain_loss(z, y)) + jnp.sum(jnp.exp(z) * z),
                  lambda z, y: jnp.sum(plain_loss(z, y)) + jnp.sum(z, 0)[0],
                  lambda z, y: jnp.sum(plain_loss(z, y)) + nn.accuracy(z, y),
                  lambda z, y: jax.nn.logsumexp(z, -1), lambda z, y: z,
                  lambda z, y: plain_loss(jnp.sum(z, 0, keepdims=True), y[:1])):
        assert hints(other) == ()
    _, w, y = HEAD
    few = jax.ShapeDtypeStruct((256,), jnp.int32)
    assert hints(plain_loss, (f32(256, 16), w, few)) == ()
    assert hints(plain_loss, (f32(512, 64), f32(64, 32), y)) == ()  # fewer classes than features
    aux = lambda x, w, y: (jnp.mean(plain_loss(x @ w, y)), x @ w)
    assert len(fbprop.explain(aux, *HEAD).hints) == 1  # of two products, the first
