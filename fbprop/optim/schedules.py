"""Learning rates over time: functions from the number of updates done to a scalar.

Any function ``count -> scalar`` of a traced int32 will do as a schedule, Optax's among them. These
compute in float32 (float64 with x64 enabled), and hold their last value ever after. They count in
integers: a count is a Python or NumPy integer or an integer array, 0 to 2³¹ − 1 (int32; with x64
enabled or of unsigned type, as far as that goes), and no step of these is rounded to another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from fbprop.optim.arguments import check_count, check_least, passes

# Cycles of growing length that a schedule of restarts may have before its steps run out.
_MOST_CYCLES = 100_000


def _count(count):
    """A count as integers of 32 bits at least; a float is taken as it is."""
    kind = jnp.iinfo(jnp.result_type(int))
    of_host = isinstance(count, (int, np.integer, np.ndarray))
    if of_host and np.max(count, initial=0) > kind.max:
        raise ValueError(
            f"Steps are counted in {kind.dtype}, got count={count} expected at most {kind.max}: "
            "jax.enable_x64 allows for more."
        )
    count = jnp.asarray(count)
    narrow = jnp.issubdtype(count.dtype, jnp.integer) and count.dtype.itemsize < 4
    return count.astype(jnp.int32) if narrow else count


def _largest(count):
    """The last number that a count can be."""
    whole = jnp.issubdtype(count.dtype, jnp.integer)
    return jnp.iinfo(count.dtype).max if whole else math.inf


def _reached(step, count):
    """A step as a count, the last one at most."""
    return np.asarray(min(step, _largest(count)), count.dtype)


def _parts(count, start, end):
    """The shares of the way from ``start`` to ``end`` that lie behind ``count`` and before it.

    Both from differences of integers, so that neither is lost near its end.
    """
    start, stop = _reached(start, count), _reached(end, count)
    at, real = jnp.clip(count, start, stop), jnp.result_type(float)
    done, left = (at - start).astype(real), (stop - at).astype(real) + float(end - int(stop))
    length = float(end - int(start))
    return done / length, left / length


def _divmod(count, period):
    """How many whole periods, and how far into the next one."""
    if period > _largest(count):
        return jnp.zeros_like(count), count
    period = _reached(period, count)
    return count // period, count % period


def _line(start, end, parts):
    done, left = parts
    return start * left + end * done


def _ease(start, end, parts):
    """From ``start`` to ``end`` along half a cosine: (1 + cos πx) / 2 = sin²(π (1 − x) / 2)."""
    done, left = (jnp.sin(0.5 * math.pi * part) ** 2 for part in parts)
    return start * left + end * done


def _check_values(**values):
    for name, value in values.items():
        if not passes(name, value, lambda v: abs(v) < math.inf):
            raise ValueError(f"A rate is finite, got {name}={value} expected a finite number.")


def constant(value: float) -> Callable:
    """The same value always.

    Example:
      >>> from fbprop import optim
      >>> round(float(optim.constant(0.1)(7)), 6)
      0.1
    """
    _check_values(value=value)
    return lambda count: jnp.full(jnp.shape(count), value, jnp.result_type(float))


def linear(init_value: float, end_value: float, steps: int) -> Callable:
    """A straight line from ``init_value`` at 0 to ``end_value`` at ``steps``, then constant.

    Raises:
      ValueError: ``steps`` < 1.

    Example:
      >>> from fbprop import optim
      >>> [float(optim.linear(1.0, 0.0, 4)(t)) for t in (0, 1, 4, 9)]
      [1.0, 0.75, 0.0, 0.0]
    """
    check_count("steps", steps)
    _check_values(init_value=init_value, end_value=end_value)
    return lambda count: _line(init_value, end_value, _parts(_count(count), 0, int(steps)))


def exponential(init_value: float, decay_rate: float, steps: int = 1, staircase: bool = False,
                end_value: float | None = None) -> Callable:
    """``init_value · decay_rate^(t / steps)``.

    Args:
      init_value: value at 0.
      decay_rate: factor per ``steps`` updates, > 0.
      steps: see above. staircase: round t / steps down.
      end_value: stop there: a lower bound for a decay_rate < 1, else an upper one.

    Raises:
      ValueError: ``steps`` < 1, or ``decay_rate`` <= 0.

    Example:
      >>> from fbprop import optim
      >>> [round(float(optim.exponential(1.0, 0.5, 2)(t)), 6) for t in (0, 2, 6)]
      [1.0, 0.5, 0.125]
    """
    check_count("steps", steps)
    steps = int(steps)
    _check_values(init_value=init_value, end_value=0 if end_value is None else end_value)
    if not passes("decay_rate", decay_rate, lambda v: 0 < v < math.inf):
        raise ValueError(
            f"An exponential schedule multiplies by a factor, got decay_rate={decay_rate} expected "
            "a number > 0."
        )

    def schedule(count):
        whole, rest = (x.astype(jnp.result_type(float)) for x in _divmod(_count(count), steps))
        periods = whole if staircase else whole + rest / float(steps)
        value = init_value * jnp.exp(periods * math.log(decay_rate))
        if end_value is None:
            return value
        return jnp.maximum(value, end_value) if decay_rate < 1 else jnp.minimum(value, end_value)

    return schedule


def step(init_value: float, factors: Mapping[int, float]) -> Callable:
    """``init_value``, multiplied by a factor at each of some steps, that step included.

    Args:
      init_value: value at 0.
      factors: step -> factor.

    Returns:
      A schedule. The step itself has the new value already, as in PyTorch's ``MultiStepLR``;
      Optax's ``piecewise_constant_schedule`` is one update later.

    Raises:
      ValueError: a step < 1.

    Example:
      >>> from fbprop import optim
      >>> schedule = optim.step(1.0, {10: 0.5, 20: 0.5})
      >>> [float(schedule(t)) for t in (0, 9, 10, 19, 20)]
      [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    for at, factor in factors.items():
        check_count("step", at)
        _check_values(factor=factor)
    _check_values(init_value=init_value)

    def schedule(count):
        count = _count(count)
        value = jnp.full(count.shape, init_value, jnp.result_type(float))
        for at, factor in factors.items():
            if at <= _largest(count):
                value = jnp.where(count >= _reached(at, count), value * factor, value)
        return value

    return schedule


def cosine(peak: float, warmup_steps: int, total_steps: int, end_value: float = 0.0,
           init_value: float = 0.0) -> Callable:
    """A linear rise to ``peak``, then half a cosine down to ``end_value``.

    The rise takes ``warmup_steps`` updates from ``init_value`` (with 0, it starts at the peak); the
    end is reached at ``total_steps``, the rise included. Loshchilov and Hutter 2017
    (arXiv:1608.03983); warm-up: Goyal et al. 2017 (arXiv:1706.02677).

    Raises:
      ValueError: unless 0 <= warmup_steps < total_steps.

    Example:
      >>> from fbprop import optim
      >>> schedule = optim.cosine(1.0, warmup_steps=2, total_steps=6)
      >>> [round(float(schedule(t)), 6) for t in (0, 1, 2, 4, 6, 7)]
      [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    check_count("warmup_steps", warmup_steps, least=0)
    check_count("total_steps", total_steps, least=0)
    _check_values(peak=peak, end_value=end_value, init_value=init_value)
    if total_steps <= warmup_steps:
        raise ValueError(
            f"total_steps includes the warm-up, got total_steps={total_steps}, warmup_steps="
            f"{warmup_steps} expected total_steps > warmup_steps."
        )

    return lambda count: _up_and_down(
        _count(count), (int(warmup_steps), int(total_steps)), (init_value, peak, end_value), _line
    )


def _up_and_down(count, turns, values, rise):
    """To the peak at one turn, by ``rise``, and down along half a cosine to the other."""
    (top, end), (first, peak, last) = turns, values
    falling = _ease(peak, last, _parts(count, top, end))
    if not top:
        return falling
    rising = rise(first, peak, _parts(count, 0, top))
    return jnp.where(count < _reached(top, count), rising, falling)


def one_cycle(peak: float, total_steps: int, rise: float = 0.3, div_factor: float = 25.0,
              final_div_factor: float = 1e4) -> Callable:
    """One-cycle policy (Smith and Topin 2017, arXiv:1708.07120), with cosine slopes.

    From ``peak / div_factor`` up to ``peak`` at ``int(rise · total_steps)``, down to
    ``peak / (div_factor · final_div_factor)`` at ``total_steps``. Defaults and turning points are
    those of Optax's ``cosine_onecycle_schedule``. PyTorch's ``OneCycleLR`` peaks at
    ``rise · total_steps − 1`` and ends at ``total_steps − 1``.

    Raises:
      ValueError: the rise or the fall would take no step.

    Example:
      >>> from fbprop import optim
      >>> schedule = optim.one_cycle(1.0, 10)
      >>> [round(float(schedule(t)), 6) for t in (0, 3, 10)]
      [0.04, 1.0, 4e-06]
    """
    check_count("total_steps", total_steps, least=0)
    check_least(rise=rise)
    _check_values(peak=peak)
    for name, value in {"div_factor": div_factor, "final_div_factor": final_div_factor}.items():
        if not passes(name, value, lambda v: 0 < v < math.inf):
            raise ValueError(f"A factor divides, got {name}={value} expected a number > 0.")
    top = int(rise * total_steps)
    if not 0 < top < total_steps:
        raise ValueError(
            f"One cycle rises and falls, got total_steps={total_steps}, rise={rise}, whose peak is "
            f"at step {top}; expected it between 1 and total_steps - 1."
        )
    values = peak / div_factor, peak, peak / (div_factor * final_div_factor)
    return lambda count: _up_and_down(_count(count), (top, int(total_steps)), values, _ease)


def warm_restarts(peak: float, period: int, factor: float = 1.0, end_value: float = 0.0,
                  peak_factor: float = 1.0) -> Callable:
    """Cosine annealing with warm restarts (SGDR: Loshchilov and Hutter 2017, arXiv:1608.03983).

    Cycle i takes ``period · factorⁱ`` updates, from ``peak · peak_factorⁱ`` towards ``end_value``,
    which the next cycle's first update cuts off. PyTorch's ``CosineAnnealingWarmRestarts`` with
    T_0 = period, T_mult = factor; Optax's ``sgdr_schedule`` takes a list of cycles.

    Raises:
      ValueError: ``period`` < 1 or ``factor`` < 1, or a factor so near 1 that there are more than
      100,000 cycles.

    Example:
      >>> from fbprop import optim
      >>> schedule = optim.warm_restarts(1.0, period=2, factor=2)
      >>> [round(float(schedule(t)), 6) for t in (0, 1, 2, 4, 6)]
      [1.0, 0.5, 1.0, 0.5, 1.0]
    """
    check_count("period", period)
    _check_values(peak=peak, end_value=end_value)
    check_least(peak_factor=peak_factor)
    if not passes("factor", factor, lambda v: 1 <= v < math.inf):
        raise ValueError(f"Cycles do not shrink, got factor={factor} expected a number >= 1.")
    period = int(period)
    _starts(period, factor, 2**31)  # raises its error now

    def schedule(count):
        count = _count(count)
        cycle, parts = _equal(count, period) if factor == 1 else _growing(count, period, factor)
        return _ease(peak * peak_factor ** cycle.astype(jnp.result_type(float)), end_value, parts)

    return schedule


def _equal(count, period):
    """The number of the cycle that a count is in, and the parts of it behind and before."""
    cycle, within = _divmod(count, period)
    return cycle, _parts(within, 0, period)


def _growing(count, period, factor):
    """As `_equal`, for cycles whose starts are looked up."""
    starts = _starts(period, factor, min(_largest(count), 2**53))
    # Integers and what they are too large by; of the last cycle, which no count leaves, all of it.
    whole = np.minimum(np.ceil(starts), min(_largest(count), 2**62)).astype(count.dtype)
    over, real = (whole - starts).astype(np.float64), jnp.result_type(float)
    cycle = jnp.sum(count[..., None] >= whole[1:-1], -1, dtype=jnp.int32)
    whole, over = jnp.asarray(whole), jnp.asarray(over, real)
    done = (count - whole[cycle]).astype(real) + over[cycle]
    left = (whole[cycle + 1] - count).astype(real) - over[cycle + 1]
    return cycle, (done / (done + left), left / (done + left))


@functools.lru_cache
def _starts(period, factor, end):
    """Where cycles begin, float64, up to the first that begins at ``end`` or after it."""
    starts, length = [0.0], float(period)
    while factor > 1 and starts[-1] < end:
        starts.append(starts[-1] + length)
        length *= factor
        if len(starts) > _MOST_CYCLES:
            raise ValueError(
                f"Cycles grow, got factor={factor} with period={period}, which makes more than "
                f"{_MOST_CYCLES} cycles in {end} steps; expected a larger factor, or 1."
            )
    return np.array(starts)
