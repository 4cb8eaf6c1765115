"""Optimisers, schedules, clipping: pairs ``(init, update)`` with Optax's protocol.

`fbprop.optim.transform` says what an optimiser is; every name below is one, a part of one for
`chain`, or a schedule.
"""

from fbprop.optim.adafactor import adafactor, scale_by_factored_rms
from fbprop.optim.adam import adam, adamw, amsgrad, nadam, scale_by_adam
from fbprop.optim.average import average_params, averaged_params
from fbprop.optim.chain import apply_updates, chain
from fbprop.optim.clip import (
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_leaf_rms,
    clip_by_value,
)
from fbprop.optim.decay import add_weight_decay
from fbprop.optim.kfac import kfac, scale_by_kfac
from fbprop.optim.lamb import lamb, scale_by_trust_ratio
from fbprop.optim.lion import lion
from fbprop.optim.muon import muon, orthogonalize, scale_by_muon
from fbprop.optim.norm import global_norm
from fbprop.optim.paths import by_path, freeze, paths, select
from fbprop.optim.plateau import reduce_on_plateau
from fbprop.optim.range_test import RangeTest, find_learning_rate
from fbprop.optim.rmsprop import adagrad, rmsprop
from fbprop.optim.schedules import (
    constant,
    cosine,
    exponential,
    linear,
    one_cycle,
    step,
    warm_restarts,
)
from fbprop.optim.sgd import sgd
from fbprop.optim.soap import scale_by_soap, soap
from fbprop.optim.transform import Optimizer, scale, scale_by_learning_rate

__all__ = [
    "Optimizer", "RangeTest", "adafactor", "adagrad", "adam", "adamw", "add_weight_decay",
    "amsgrad", "apply_updates", "average_params", "averaged_params", "by_path", "chain",
    "clip_by_global_norm", "clip_by_leaf_norm", "clip_by_leaf_rms", "clip_by_value", "constant",
    "cosine", "exponential", "find_learning_rate", "freeze", "global_norm", "kfac", "lamb",
    "linear", "lion", "muon", "nadam", "one_cycle", "orthogonalize", "paths", "reduce_on_plateau",
    "rmsprop", "scale", "scale_by_adam", "scale_by_factored_rms", "scale_by_kfac",
    "scale_by_learning_rate", "scale_by_muon", "scale_by_soap", "scale_by_trust_ratio", "select",
    "sgd", "soap", "step", "warm_restarts",
]
