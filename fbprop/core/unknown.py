"""What to say where Python asks for a value that is not known, as inside `jit`.

JAX's classes of errors, so that what catches them goes on to; sentences of ours.
"""

from __future__ import annotations

import contextlib
import os
import re
import traceback

import jax
import numpy as np

ASKED = {  # what was asked for, by the error that JAX raises
    jax.errors.TracerBoolConversionError: "bool()",
    jax.errors.TracerIntegerConversionError: "an integer",
    jax.errors.TracerArrayConversionError: "a NumPy array",
    jax.errors.NonConcreteBooleanIndexError: "the elements where a mask is True",
    jax.errors.ConcretizationTypeError: "the value",
}
ERRORS = tuple(ASKED)
LIBRARIES = tuple(
    os.path.join(os.path.dirname(path), "")
    for path in (jax.__file__, np.__file__, os.path.dirname(__file__))
)


# What holds, and what to do, for a value that is not known and for one that is.
NOT_KNOWN = (
    "A value is not known while what computes it is compiled, mapped, or in the body of a loop or "
    "branch",
    "an operation on arrays: jax.lax.cond or jnp.where for a branch, jax.lax.while_loop or "
    "jax.lax.scan for a loop, size= for a shape; or make what the value comes from a static "
    "argument",
)
LOSES = (
    "What Python takes out of a differentiated array has no derivative",
    "jax.lax.stop_gradient(x) in its place, or x.item(), where that is meant",
)


@contextlib.contextmanager
def said():
    """Errors about a value that Python asks for, with a sentence of ours; JAX's stays as a note."""
    try:
        yield
    except ERRORS as error:
        if not hasattr(error, "said"):
            error.said = str(error)
            error.add_note(error.said)
            error.args = (_sentence(error),)
        raise


def _sentence(error):
    holds, instead = LOSES if getattr(error, "is_known", False) else NOT_KNOWN
    asked = next(asked for kind, asked in ASKED.items() if isinstance(error, kind))
    name = re.search(r"with the `([a-z]+)` function|The ([a-z]+)\(\) method", error.said)
    asked = f"{name[1] or name[2]}()" if name else asked
    of = re.search(r"\b\w+\[[\d,]*\]", error.said)
    of = f" of a {of[0]}" if of else ""
    return f"{holds}, got {asked}{of}{_where(error)} expected {instead}."


def _where(error):
    """The user's line that asked, as a part of a sentence."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith(LIBRARIES)]
    return f" at {users[-1].filename}:{users[-1].lineno} ({users[-1].name})" if users else ""
