"""Training: the state, one step, an epoch in one dispatch, evaluation."""

from fbprop.train.evaluate import evaluate, predict
from fbprop.train.state import State, init
from fbprop.train.step import epoch, step

__all__ = ["State", "epoch", "evaluate", "init", "predict", "step"]
