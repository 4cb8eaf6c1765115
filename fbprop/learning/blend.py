"""Something of a learning rule and something of backpropagation, as a schedule says."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax.tree_util import tree_map

from fbprop.core.factored import dense
from fbprop.learning.feedback import Feedback
from fbprop.learning.method import Method, check_method
from fbprop.reverse import grad


def blend(method: Method, share: float | Callable) -> Method:
    """A share of a rule, and the rest of backpropagation; annealed, if the share is a schedule.

    Of a rule with feedback weights, their share of each weight on the way back:
    x̄ = ȳ (s B + (1 − s) W)ᵀ. Of any other, of the direction: s d + (1 − s) g, g the gradient.

    | stored | the rule's memory, and a count of steps |
    |---|---|
    | cost | the rule's; and the gradient's, for a rule without feedback weights |

    Args:
      method: the rule.
      share: s, or a function of the count of steps from 0, such as `fbprop.optim`'s schedules.

    Raises:
      ValueError: a share outside [0, 1].   TypeError: no learning rule.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning, optim
      >>> rule = learning.feedback_alignment()
      >>> method = learning.blend(rule, optim.linear(1.0, 0.0, 100))
      >>> loss = lambda p, x: jnp.mean((x + p["bias"]) @ p["w"])
      >>> params, x = {"bias": jnp.zeros(3), "w": jnp.ones((3, 1))}, jnp.ones((2, 3))
      >>> memory = method.init(jax.random.key(0), loss, params, x)
      >>> _, memory = method.value_and_grad(loss)(params, x, memory=memory)
      >>> int(memory["w"]["count"])
      1
    """
    check_method(method)
    if not callable(share) and not 0 <= share <= 1:
        raise ValueError(f"A share is between 0 and 1, got share={share}: 1 is the rule alone.")

    def now(count, dtype):
        return jnp.asarray(share(count) if callable(share) else share).astype(dtype)

    return _of_weights(method, now) if isinstance(method, Feedback) else _of_directions(method, now)


def _of_weights(method, now):
    def start(key, w):
        return {"rule": method.start(key, w), "count": jnp.zeros((), jnp.int32)}

    def weight(state, w):
        b, rule = method.weight(state["rule"], w)
        b = w + now(state["count"], w.dtype) * (b - w)
        return b, {"rule": rule, "count": state["count"] + 1}

    def learn(state, w, update):
        update, rule = method.learn(state["rule"], w, update)
        return update, state | {"rule": rule}

    def reflect(state, seen):
        return state | {"rule": method.reflect(state["rule"], seen)}

    return Feedback(start, weight, method.learn and learn, method.reflect and reflect)


def _of_directions(method, now):
    def init(key, loss, params, *args):
        return {"rule": method.init(key, loss, params, *args), "count": jnp.zeros((), jnp.int32)}

    def value_and_direction(loss, has_aux, options, params, args, memory):
        run = method.value_and_grad(loss, has_aux, **options)
        (value, direction), rule = run(params, *args, memory=memory["rule"])
        gradient = dense(grad(loss, has_aux=has_aux, **options)(params, *args))
        gradient = gradient[0] if has_aux else gradient
        mixed = tree_map(
            lambda d, g: g + now(memory["count"], g.dtype) * (d - g), dense(direction), gradient
        )
        return (value, mixed), {"rule": rule, "count": memory["count"] + 1}

    def update(updates, params, memory):
        updates, rule = method.update(updates, params, memory["rule"])
        return updates, memory | {"rule": rule}

    return Method(init, value_and_direction, update)
