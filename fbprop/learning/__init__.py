"""Other learning rules than backpropagation, by path, and hybrids with it.

A rule is data, as an optimiser is: `Method.init` makes its memory from a key, an explicit pytree,
`Method.value_and_grad` gives value and update direction, and some learn by `Method.update`.

* Feedback through other weights: `feedback_alignment`, `sign_symmetry`, `kolen_pollack`,
  `weight_mirror`, `product_feedback`; straight from the output: `direct_feedback_alignment`,
  `direct_kolen_pollack`. Of any network, whatever package wrote it.
* No way back: `forward_gradient`, `activity_forward_gradient`, `evolution_strategy`.
* One layer at a time, of a list of layers: `greedy`, `forward_forward`, `pepita`,
  `difference_target_propagation`, `difference_reconstruction`, `predictive_coding`; of an energy:
  `equilibrium_propagation`.
* Hybrids: `by_path`, `blend`. How good a direction is: `alignment`.
* Derivatives of steps, signs and rounding: `surrogate`, `step`, `one_hot_argmax`.
"""

from fbprop.learning.activity import activity_forward_gradient
from fbprop.learning.alignment import Alignment, alignment
from fbprop.learning.blend import blend
from fbprop.learning.by_path import by_path
from fbprop.learning.difference_reconstruction import difference_reconstruction
from fbprop.learning.direct import direct_feedback_alignment, direct_kolen_pollack
from fbprop.learning.energy import equilibrium_propagation, predictive_coding, settle
from fbprop.learning.feedback import Feedback
from fbprop.learning.learned_feedback import kolen_pollack, product_feedback, weight_mirror
from fbprop.learning.local_losses import forward_forward, forward_forward_scores, greedy
from fbprop.learning.method import Method, backprop
from fbprop.learning.pepita import pepita
from fbprop.learning.perturbation import evolution_strategy, forward_gradient
from fbprop.learning.random_feedback import feedback_alignment, sign_symmetry
from fbprop.learning.surrogate import one_hot_argmax, step, surrogate
from fbprop.learning.target_propagation import difference_target_propagation

__all__ = [
    "Alignment", "Feedback", "Method", "activity_forward_gradient", "alignment", "backprop",
    "blend", "by_path", "difference_reconstruction", "difference_target_propagation",
    "direct_feedback_alignment", "direct_kolen_pollack", "equilibrium_propagation",
    "evolution_strategy",
    "feedback_alignment", "forward_forward", "forward_forward_scores", "forward_gradient",
    "greedy", "kolen_pollack", "one_hot_argmax", "pepita", "predictive_coding",
    "product_feedback", "settle", "sign_symmetry", "step", "surrogate", "weight_mirror",
]
