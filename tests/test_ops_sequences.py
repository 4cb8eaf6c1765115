"""`ops.ctc_loss` and `ops.rotary`: values, ends, padding, types, errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import ops

Z = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 4)), jnp.float32)
LABELS = jnp.array([[1, 1, 0], [2, 1, 3], [3, 9, -5]])
LENGTHS = {"logit_lengths": jnp.array([5, 4, 3]), "label_lengths": jnp.array([2, 3, 1])}


def probability(p, labels, blank=0):
    """Of the labels, path by path."""
    total = 0.0
    for path in itertools.product(range(p.shape[1]), repeat=len(p)):
        spelled = [k for k, _ in itertools.groupby(path) if k != blank]
        if spelled == labels:
            total += np.prod([p[t, k] for t, k in enumerate(path)])
    return total


def test_ctc_loss_sums_over_all_paths(x64):
    z = Z.astype("float64")
    p = np.asarray(jax.nn.softmax(z))
    expected = [-np.log(probability(p[i, :t], labels))
                for i, (t, labels) in enumerate([(5, [1, 1]), (4, [2, 1, 3]), (3, [3])])]
    np.testing.assert_allclose(ops.ctc_loss(z, LABELS, **LENGTHS), expected, rtol=1e-12)
    last = ops.ctc_loss(jnp.roll(z, -1, -1), LABELS - 1, blank=3, **LENGTHS)
    np.testing.assert_allclose(last, expected, rtol=1e-12)


@pytest.mark.parametrize("ad", [jax, fbprop], ids=["jax", "fbprop"])
def test_ctc_loss_at_the_ends(ad):
    """Padding that holds nan, what cannot be spelled, large logits, 16 bits, no labels, no rows."""
    both = lambda z, labels, **lengths: jax.jit(ad.value_and_grad(
        lambda z: (jnp.sum(w := ops.ctc_loss(z, labels, **lengths)), w), has_aux=True))(z)
    padded = jnp.arange(5)[None, :, None] >= LENGTHS["logit_lengths"][:, None, None]
    (_, clean), dz = both(Z, LABELS, **LENGTHS)
    (_, loss), dn = both(jnp.where(padded, jnp.nan, Z), LABELS, **LENGTHS)
    np.testing.assert_array_equal(loss, clean)
    np.testing.assert_array_equal(dn, dz)
    assert (dz[jnp.broadcast_to(padded, dz.shape)] == 0).all()
    np.testing.assert_allclose(dz.sum(-1), 0, atol=1e-6)  # a constant added changes nothing
    (_, loss), dz = both(Z[:1, :2], jnp.array([[1, 1]]))  # takes 3 frames
    assert loss[0] == jnp.inf
    assert (dz == 0).all()
    (_, loss), dz = both(1e4 * jnp.eye(4)[None, [1, 0, 1]], jnp.array([[1, 1]]))
    np.testing.assert_allclose(loss, 0)
    np.testing.assert_allclose(dz, 0)
    (_, loss), dz = both(Z.astype(jnp.bfloat16), LABELS, **LENGTHS)
    assert (loss.dtype, dz.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(loss, clean, rtol=2e-2)
    (_, loss), _ = both(Z, jnp.zeros((3, 0), int))
    np.testing.assert_allclose(loss, -jax.nn.log_softmax(Z)[..., 0].sum(1), rtol=1e-5)
    assert both(Z[:0], LABELS[:0])[1].shape == (0, 5, 4)


def test_ctc_loss_keeps_what_its_docstring_says():
    found = fbprop.explain(lambda z: ops.ctc_loss(z, LABELS, **LENGTHS), Z)
    assert found.kept == 4 * (Z.size + LABELS.size + 6 + 5 * 3 * 7 + 3 * 5 + 3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_knows_distances_only(interleaved):
    q, k = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6)), jnp.float32)
    turned = lambda x: ops.rotary(jnp.tile(x, (9, 1, 1)), interleaved=interleaved)[:, 0]
    scores = turned(q) @ turned(k).T
    for distance in range(-8, 9):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores[0, 0], q @ k, rtol=1e-6)


def test_rotary_by_complex_numbers():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, 3, 4)), jnp.float32)
    at = jnp.array([[0, 1, 2, 3, 4], [7, 3, 3, 0, 100]])
    angles = np.asarray(at)[..., None, None] * 10000.0 ** (-np.arange(2) / 2)
    for interleaved in (False, True):
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :2], x[..., 2:])
        expected = (np.asarray(a) + 1j * np.asarray(b)) * np.exp(1j * angles)
        y = ops.rotary(x, at, interleaved=interleaved)
        a, b = (y[..., ::2], y[..., 1::2]) if interleaved else (y[..., :2], y[..., 2:])
        np.testing.assert_allclose(np.asarray(a) + 1j * np.asarray(b), expected, rtol=1e-4,
                                   atol=1e-5)
    half = x.astype(jnp.bfloat16)
    assert ops.rotary(half).dtype == jnp.bfloat16
    assert fbprop.explain(lambda x: ops.rotary(x, at), x).kept == 4 * at.size
    assert ops.rotary(x[:, :0]).shape == (2, 0, 3, 4)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: ops.ctc_loss(Z, LABELS[0]), ValueError, r"got shapes \(3, 5, 4\) and \(3,\)"),
    (lambda: ops.ctc_loss(Z, LABELS.astype(float)), TypeError, "that are integers, got float32"),
    (lambda: ops.ctc_loss(LABELS, LABELS), TypeError, "ctc_loss takes floating numbers, got int32"),
    (lambda: ops.ctc_loss(Z, LABELS, blank=4), ValueError, r"got blank=4 expected 0 \.\. 3"),
    (lambda: ops.ctc_loss(Z, LABELS, logit_lengths=jnp.array(5)), ValueError,
     r"logit_lengths are one per example, got shape \(\) expected \(3,\)"),
    (lambda: ops.rotary(Z[0]), ValueError, r"got shape \(5, 4\) expected at least three"),
    (lambda: ops.rotary(Z, jnp.arange(4)), ValueError, r"got shape \(4,\) expected \(3,\)"),
    (lambda: ops.rotary(Z, base=0.0), ValueError, "got base=0.0 expected one above 0"),
    (lambda: ops.rotary(LABELS), TypeError, "rotary takes floating numbers, got int32"),
])
def test_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
