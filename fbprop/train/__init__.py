"""Training: steps, epochs, whole runs, evaluation, checkpoints."""

from fbprop.data.tensorfile import CheckpointError, load_tensors, save_tensors
from fbprop.optim.objective import Weighted
from fbprop.train.checkpoint import latest, read_manifest, restore, save
from fbprop.train.evaluate import evaluate, evaluate_batches, predict
from fbprop.train.fit import Fit, fit
from fbprop.train.log import read_log
from fbprop.train.precision import LossScale, loss_scale
from fbprop.train.state import State, init
from fbprop.train.step import epoch, step
from fbprop.train.stopping import NonFiniteLoss

__all__ = [
    "CheckpointError", "Fit", "LossScale", "NonFiniteLoss", "State", "Weighted", "epoch",
    "evaluate", "evaluate_batches", "fit", "init", "latest", "load_tensors", "loss_scale",
    "predict", "read_log", "read_manifest", "restore", "save", "save_tensors", "step",
]
