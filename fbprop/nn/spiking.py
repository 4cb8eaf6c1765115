"""Layers of neurons that spike."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from fbprop.core.precision import at_least_float32
from fbprop.learning.surrogate import step
from fbprop.nn.layer import Layer
from fbprop.nn.shapes import check_sequence, sequence_mask


def leaky_integrate_and_fire(
    *, decay: float = 0.9, threshold: float = 1.0, reset: str = "subtract",
    surrogate: str | None = "fast_sigmoid", slope: float | None = None,
    name: str = "leaky_integrate_and_fire",
) -> Layer:
    """Neurons that gather their input, lose some of it, and spike at a threshold.

    From v = 0, at each step::

        v = decay v + x
        y = 1 if v > threshold else 0           # the output
        v = v - threshold y, or (1 - y) v       # reset: "subtract" or "zero"

    No parameters; a `dense` before it makes the synapses. The reset is not differentiated, as is
    usual (Zenke and Ganguli 2018; Eshraghian et al. 2023). With ``apply(..., lengths=lengths)`` a
    padded step leaves v as it is, and its output is 0.

    Args:
      decay: in [0, 1], what is left of v after a step: exp(−Δt / τ).
      threshold: above which it spikes.
      reset: what a spike takes from v.
      surrogate, slope: the spike's derivative, see `fbprop.learning.surrogate`. None: it is
        `jax.numpy.heaviside`, whose derivative is 0, and a rule by path may give another.
      name: see `Layer`.

    Raises:
      ValueError: the input is not [B, T, D]; decay or reset are something else.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> layer = nn.leaky_integrate_and_fire(decay=0.5)
      >>> layer.apply({}, jnp.full((1, 4, 1), 0.7)).ravel().tolist()
      [0.0, 1.0, 0.0, 1.0]
    """
    if reset not in ("subtract", "zero") or not 0 <= decay <= 1:
        raise ValueError(
            f"Layer {name!r} decays by a share and resets by 'subtract' or to 'zero', got "
            f"decay={decay}, reset={reset!r} expected 0 <= decay <= 1 and one of these."
        )

    def spike(v):
        over = v - jnp.asarray(threshold, v.dtype)
        if surrogate is None:
            return jnp.heaviside(over, jnp.zeros((), v.dtype))
        return step(over, surrogate, slope)

    def apply(params, x, *, lengths):
        check_sequence(name, x)

        def one(v, now):
            x, real = now
            new = jnp.asarray(decay, v.dtype) * v + at_least_float32(x)
            y = spike(new)
            gone = lax.stop_gradient(y)
            left = jnp.asarray(threshold, v.dtype) if reset == "subtract" else new
            new = new - gone * left
            if real is not None:
                new, y = jnp.where(real, new, v), jnp.where(real, y, 0)
            return new, y.astype(x.dtype)

        real = None if lengths is None else sequence_mask(lengths, x.shape[1]).T[..., None]
        start = at_least_float32(jnp.sum(jnp.zeros_like(x[:, :1]), axis=1))
        _, out = lax.scan(one, start, (x.swapaxes(0, 1), real))
        return out.swapaxes(0, 1)

    return Layer(lambda key, x: {}, apply, name)
