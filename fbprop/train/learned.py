"""A learning rule in a training step: its memory is a part of the state."""

from __future__ import annotations

from fbprop.learning.method import Method, check_method


def check_learning(method: Method | None, state):
    """That there is a memory for a rule, and a rule for a memory."""
    if method is not None:
        check_method(method)
    if (method is None) != (state.learning is None):
        got = "a state without a memory" if method is not None else "a memory in the state alone"
        raise ValueError(
            f"A learning rule and its memory come together, got {got}; expected "
            "train.init(params, optimizer, learning=method.init(key, loss, params, batch, key)) "
            "and train.step(loss, optimizer, learning=method)."
        )


def learned(method: Method | None, updates, params, memory):
    """Updates and memory after the optimiser's step."""
    return (updates, memory) if method is None else method.update(updates, params, memory)
