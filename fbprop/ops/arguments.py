"""Checks that several operations share."""

import jax
import jax.numpy as jnp


def floating(name: str, x):
    """``x`` as an array; raises TypeError unless it is of floating numbers."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} takes floating numbers, got {x.dtype.name}: cast the input.")
    return x


def check_smoothing(label_smoothing) -> None:
    """Raises ValueError unless it is a share of a target."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothing is a share of the target, got {label_smoothing} expected a number in "
            "[0, 1), such as 0.1."
        )


def one_key(name: str, key):
    """``key`` as a typed JAX key; raises ValueError unless it is a single one."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        alone = shape == ()
    else:
        alone = dtype == jnp.uint32 and len(shape) == 1
    if not alone:
        got = f"{key!r}" if dtype is None else f"{dtype}{list(shape)}"
        raise ValueError(f"{name} draws by a single JAX key, got {got} expected "
                         "jax.random.key(...): jax.vmap is for several.")
    return jax.random.wrap_key_data(key) if dtype == jnp.uint32 else key


def recurrent_arguments(name, gates, x, kernel, recurrent, biases, initial, states, lengths, both):
    """Operands of a recurrent operation: x, W, U, biases, states, lengths; or what is wrong.

    Args:
      gates: how many times H the weights are wide.
      biases: by name, (bias or None, how many times H it has).
      states: names of what ``initial`` has.
      both: whether weights have the two directions in front.
    """
    x, kernel, recurrent = floating(name, x), jnp.asarray(kernel), jnp.asarray(recurrent)
    if not x.dtype == kernel.dtype == recurrent.dtype:
        raise TypeError(f"{name} multiplies numbers of one dtype, got x {x.dtype.name}, kernel "
                        f"{kernel.dtype.name}, recurrent {recurrent.dtype.name}: cast them.")
    front = (2,) if both else ()
    D, H = x.shape[-1] if x.ndim == 3 else "D", recurrent.shape[-2] if recurrent.ndim > 1 else "H"
    wide = lambda n: f"{n} H" if H == "H" else n * H
    expected = {"kernel": (kernel, (*front, D, wide(gates))),
                "recurrent": (recurrent, (*front, H, wide(gates)))}
    expected |= {k: (b, (*front, wide(n))) for k, (b, n) in biases.items()}
    initial = (None,) * len(states) if initial is None else initial
    initial = (initial,) if len(states) == 1 and not isinstance(initial, (tuple, list)) else initial
    if len(initial) != len(states):
        raise ValueError(f"{name} starts from ({', '.join(states)}), got an initial state of "
                         f"{len(initial)} arrays.")
    expected |= {f"initial {k}": (s, (*front, len(x), H)) for k, s in zip(states, initial)}
    if x.ndim != 3:
        expected = {"x": (x, ("B", "T", "D"))}
    for what, (array, shape) in expected.items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{name} takes {what} of shape {_said(shape)}, got "
                             f"{_said(jnp.shape(array))}.")
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise TypeError(f"{name} takes lengths that are integers, got {lengths.dtype.name}.")
        if lengths.shape != x.shape[:1]:
            raise ValueError(f"{name}'s lengths are one per example, got shape {lengths.shape} "
                             f"expected {x.shape[:1]}.")
        lengths = lengths.astype(jnp.int32)
    return [x, kernel, recurrent, *(b for b, _ in biases.values()), *initial, lengths]


def _said(shape):
    return f"[{', '.join(map(str, shape))}]"
