"""What is known of a value of the loss: whether it is made of data, of a weight, of neither.

A weight is known as such because it comes from a parameter alone. What becomes of it on the way to
its product (a transpose, a cast, a slice of a loop's) becomes of a second array beside it, its
feedback weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

# What a value is made of, from the least to the most. A "weight" is linear in parameters whose
# method has feedback; what is "made" of them is not; a "parameter" is of those without.
KINDS = ("constant", "parameter", "weight", "made", "data")


class Mark(NamedTuple):
    """What a value is made of.

    Attributes:
      kind: one of `KINDS`.
      leaves: numbers of the parameters it depends on.
      rows: whether data choose which part of the parameters it is: rows of an embedding. These are
        data where a weight meets them, and a weight where data do.
      made_by: the equation after which a weight was none any more, in words.
    """

    kind: str = "constant"
    leaves: frozenset = frozenset()
    rows: bool = False
    made_by: str = ""

    @property
    def is_weight(self):
        return self.kind == "weight"

    @property
    def is_data(self):
        return self.kind == "data" or self.rows


CONSTANT, DATA = Mark(), Mark("data")


@jax.tree_util.register_pytree_node_class
class Value:
    """An array of the loss, its mark, and for a weight the feedback weight beside it."""

    __slots__ = ("array", "feedback", "mark")

    def __init__(self, array, mark: Mark = CONSTANT, feedback: Any = None):
        self.array, self.mark, self.feedback = array, mark, feedback

    def tree_flatten(self):
        return (self.array, self.feedback), self.mark

    @classmethod
    def tree_unflatten(cls, mark, children):
        return cls(children[0], mark, children[1])

    @property
    def stand_in(self):
        """What stands for it where feedback weights are followed."""
        return self.feedback if self.mark.is_weight else self.array

    def marked(self, mark: Mark) -> Value:
        """The same array under another mark, which knows less."""
        return Value(self.array, mark, self.stand_in if mark.is_weight else None)


def joined(marks) -> Mark:
    """The mark of what is one of these values: of a branch, or of a step of a loop."""
    marks = list(marks)
    kind = max((m.kind for m in marks), key=KINDS.index)
    leaves = frozenset().union(*(m.leaves for m in marks))
    if kind == "data" or (kind != "weight" and any(m.rows for m in marks)):
        return Mark("data", leaves)
    made_by = next((m.made_by for m in marks if m.made_by), "")
    return Mark(kind, leaves, any(m.rows for m in marks), made_by)
