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


def say(error, invariant, instead):
    """Put one sentence in the place of JAX's text, which stays as a note.

    Args:
      error: one of `ERRORS`.
      invariant: what holds; instead: what is expected, and the way to it.
    """
    if getattr(error, "said", False):
        return
    text = str(error)
    asked = next(asked for kind, asked in ASKED.items() if isinstance(error, kind))
    name = re.search(r"with the `(\w+)` function|The (\w+)\(\) method", text)
    shape = re.search(r"\b\w+\[[\d,]*\]", text)
    asked = f"{name[1] or name[2]}()" if name else asked
    kind = f" of {shape[0]}" if shape else ""
    error.args = (f"{invariant}, got {asked} asked{kind}{_where(error)} expected {instead}.",)
    error.add_note(text)
    error.said = True


@contextlib.contextmanager
def said():
    """Where Python asks for a value that is not known because a function is traced, say so."""
    try:
        yield
    except ERRORS as error:
        say(
            error,
            "A value is not known while what computes it is compiled, mapped, or in the body of a "
            "loop or branch",
            "an operation on arrays: jax.lax.cond or jnp.where for a branch, jax.lax.while_loop or "
            "jax.lax.scan for a loop, size= for a shape; or make what the value comes from a "
            "static argument",
        )
        raise


def _where(error):
    """The user's line that asked, as a part of a sentence."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith(LIBRARIES)]
    return f" at {users[-1].filename}:{users[-1].lineno} ({users[-1].name})" if users else ""
