"""What a look at a network shows, in words: dead units, gradients that vanish, explode or break."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

DEAD = 0.9  # share of zeros in a value from which its units count as dead
APART = 1e4  # gradients so many times smaller, or larger, than the middle one of a network
GROWN = 100.0  # a gradient that has grown so many times since the first look explodes


def findings(network: dict[str, Any], looks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Per look what is to be said of it: ``{"points": numbers, "kind": ..., "text": a sentence}``.

    Kinds are "dead", "vanishing", "exploding" and "broken", the last for what is not finite. What
    is to be said of several points in a row is said once.

    Args:
      network, looks: as `fbprop.watch.history` has them.
    """
    names = [f"{p['path']}/{p['primitive']}".strip("/") for p in network["points"]]
    norms = [[_norm(d) for d in look["cotangent"]] for look in looks]
    found = []
    for look, now in zip(looks, norms):
        said = []
        for i in range(len(names)):
            value, cotangent = look["value"][i], look["cotangent"][i]
            said += [
                (kind, text, i) for kind, text in (
                    _broken(value, "value"), _broken(cotangent, "gradient"), _dead(value),
                    _over_steps(cotangent, network["points"][i]["steps"]),
                    _beside(now[i], now), _since(now[i], norms[0][i]),
                ) if kind
            ]
        found.append(_said_once(said, names))
    return found


def _said_once(said, names):
    out = []
    for kind, text, i in said:
        if out and out[-1][:2] == (kind, text) and out[-1][2][-1] == i - 1:
            out[-1][2].append(i)
        else:
            out.append((kind, text, [i]))
    return [
        {
            "points": numbers, "kind": kind,
            "text": " to ".join(dict.fromkeys(names[i] for i in (numbers[0], numbers[-1])))
            + f": {text}",
        }
        for kind, text, numbers in out
    ]


NOTHING = "", ""


def _flat(x):
    return [v for v in np.ravel(np.array(x, dtype=object)) if v is not None]


def _norm(found):
    """The norm over all steps, from norms or, without these, largest numbers; None: not known."""
    for name in ("norm", "max_abs"):
        if _flat(found.get(name)):
            return float(np.sqrt(np.sum(np.square(np.array(_flat(found[name]), float)))))
    return None


def _broken(found, what):
    shares = _flat(found.get("finite"))
    if shares and min(shares) < 1:
        return "broken", f"{1 - min(shares):.1%} of its {what} is not finite."
    if any(isinstance(v, float) and not math.isfinite(v) for v in _flat(found.get("norm"))):
        return "broken", f"its {what} is not finite."
    return NOTHING


def _dead(value):
    shares = _flat(value.get("zeros"))
    share = sum(shares) / len(shares) if shares else 0
    if share >= DEAD:
        return "dead", f"{share:.0%} of its values are 0: units are dead, or nothing reaches them."
    return NOTHING


def _over_steps(cotangent, steps):
    norms = cotangent.get("norm")
    if len(steps) != 1 or not isinstance(norms, list) or None in norms or len(norms) < 2:
        return NOTHING
    first, last = norms[0], norms[-1]
    if 0 < first < last / APART:
        return "vanishing", (
            f"its gradient falls from {last:.2g} at step {steps[0]} of its loop to {first:.2g} at "
            "the first."
        )
    if first > last * APART > 0:
        return "exploding", (
            f"its gradient grows from {last:.2g} at step {steps[0]} of its loop to {first:.2g} at "
            "the first."
        )
    return NOTHING


def _beside(norm, norms):
    known = sorted(n for n in norms if n)
    if norm is None or not known or not math.isfinite(norm):
        return NOTHING
    middle = known[len(known) // 2]
    if norm == 0:
        return "vanishing", "no gradient comes here."
    if norm < middle / APART:
        return "vanishing", f"its gradient is {norm:.2g}, that of the middle point {middle:.2g}."
    if norm > middle * APART:
        return "exploding", f"its gradient is {norm:.2g}, that of the middle point {middle:.2g}."
    return NOTHING


def _since(norm, first):
    if norm and first and math.isfinite(norm) and norm > GROWN * first:
        return "exploding", f"its gradient is {norm:.2g}, at the first look it was {first:.2g}."
    return NOTHING
