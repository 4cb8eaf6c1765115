"""Other learning rules than backpropagation, by path, and hybrids with it.

A rule is data, as an optimiser is: `Method.init` makes its memory from a key, an explicit pytree,
`Method.value_and_grad` gives value and update direction, and some learn by `Method.update`.
"""

from fbprop.learning.alignment import Alignment, alignment
from fbprop.learning.by_path import by_path
from fbprop.learning.feedback import Feedback, feedback_alignment, kolen_pollack, sign_symmetry
from fbprop.learning.method import Method, backprop

__all__ = [
    "Alignment", "Feedback", "Method", "alignment", "backprop", "by_path", "feedback_alignment",
    "kolen_pollack", "sign_symmetry",
]
