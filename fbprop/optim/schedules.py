"""Learning rates over time: functions from the number of updates done to a scalar.

Any function ``count -> scalar`` of a traced int32 will do as a schedule, Optax's among them. These
compute in float32 (float64 with x64 enabled), and hold their last value ever after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp


def _time(count):
    return jnp.asarray(count).astype(jnp.result_type(float))


def _check_steps(name, steps, least=1):
    if steps != int(steps) or steps < least:
        raise ValueError(
            f"{name} counts updates, got {name}={steps} expected an integer >= {least}."
        )


def constant(value: float) -> Callable:
    """The same value always.

    Example:
      >>> from fbprop import optim
      >>> round(float(optim.constant(0.1)(7)), 6)
      0.1
    """
    return lambda count: jnp.asarray(value, jnp.result_type(float))


def linear(init_value: float, end_value: float, steps: int) -> Callable:
    """A straight line from ``init_value`` at 0 to ``end_value`` at ``steps``, then constant.

    Raises:
      ValueError: ``steps`` < 1.

    Example:
      >>> from fbprop import optim
      >>> [float(optim.linear(1.0, 0.0, 4)(t)) for t in (0, 1, 4, 9)]
      [1.0, 0.75, 0.0, 0.0]
    """
    _check_steps("steps", steps)

    def schedule(count):
        done = jnp.clip(_time(count) / steps, 0, 1)
        return init_value * (1 - done) + end_value * done

    return schedule


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
    _check_steps("steps", steps)
    if decay_rate <= 0:
        raise ValueError(
            f"An exponential schedule multiplies by a factor, got decay_rate={decay_rate} expected "
            "a number > 0."
        )

    def schedule(count):
        periods = _time(count) / steps
        periods = jnp.floor(periods) if staircase else periods
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
    for at in factors:
        _check_steps("step", at)

    def schedule(count):
        value = jnp.asarray(init_value, jnp.result_type(float))
        for at, factor in factors.items():
            value = jnp.where(_time(count) >= at, value * factor, value)
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
    _check_steps("warmup_steps", warmup_steps, least=0)
    if total_steps <= warmup_steps:
        raise ValueError(
            f"total_steps includes the warm-up, got total_steps={total_steps}, warmup_steps="
            f"{warmup_steps} expected total_steps > warmup_steps."
        )

    def schedule(count):
        t = _time(count)
        falling = _ease(peak, end_value, (t - warmup_steps) / (total_steps - warmup_steps))
        if not warmup_steps:
            return falling
        rising = init_value + (peak - init_value) * (t / warmup_steps)
        return jnp.where(t < warmup_steps, rising, falling)

    return schedule


def _ease(start, end, done):
    """From ``start`` to ``end`` along half a cosine, as ``done`` goes from 0 to 1."""
    return end + (start - end) * (0.5 * (1 + jnp.cos(math.pi * jnp.clip(done, 0, 1))))


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
    top = int(rise * total_steps)
    if not 0 < top < total_steps:
        raise ValueError(
            f"One cycle rises and falls, got total_steps={total_steps}, rise={rise}, whose peak is "
            f"at step {top}; expected it between 1 and total_steps - 1."
        )

    def schedule(count):
        t = _time(count)
        up = _ease(peak / div_factor, peak, t / top)
        down = _ease(peak, peak / (div_factor * final_div_factor), (t - top) / (total_steps - top))
        return jnp.where(t < top, up, down)

    return schedule


def warm_restarts(peak: float, period: int, factor: float = 1.0, end_value: float = 0.0,
                  peak_factor: float = 1.0) -> Callable:
    """Cosine annealing with warm restarts (SGDR: Loshchilov and Hutter 2017, arXiv:1608.03983).

    Cycle i takes ``period · factorⁱ`` updates, from ``peak · peak_factorⁱ`` towards ``end_value``,
    which the next cycle's first update cuts off. PyTorch's ``CosineAnnealingWarmRestarts`` with
    T_0 = period, T_mult = factor; Optax's ``sgdr_schedule`` takes a list of cycles.

    Raises:
      ValueError: ``period`` < 1 or ``factor`` < 1.

    Example:
      >>> from fbprop import optim
      >>> schedule = optim.warm_restarts(1.0, period=2, factor=2)
      >>> [round(float(schedule(t)), 6) for t in (0, 1, 2, 4, 6)]
      [1.0, 0.5, 1.0, 0.5, 1.0]
    """
    _check_steps("period", period)
    if factor < 1:
        raise ValueError(f"Cycles do not shrink, got factor={factor} expected a number >= 1.")

    def schedule(count):
        t = _time(count)
        if factor == 1:
            cycle, start = jnp.floor(t / period), jnp.floor(t / period) * period
        else:
            # Cycles before i take period (factorⁱ − 1) / (factor − 1). The rounding of the
            # logarithm must not put the first update of a cycle into the one before.
            grown = 1 + t * ((factor - 1) / period)
            cycle = jnp.floor(jnp.log(grown) / math.log(factor) + 1e-5)
            start = period * (factor**cycle - 1) / (factor - 1)
        top = peak * peak_factor**cycle
        return _ease(top, end_value, (t - start) / (period * factor**cycle))

    return schedule
