"""The tour's end: the trained model cut down, and trained on a little."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import uscale_jax as us
from benchmarks.models.lstm import LSTMConfig
from benchmarks.models.transformer import TransformerConfig
from benchmarks.registry import Result
from benchmarks.suite._tour_growth import evaluate, size_of, train
from benchmarks.training import LanguageModel, TrainState

METHODS = ("random", "activation", "reconstruction")


@dataclass(frozen=True)
class Shrinking:
    """A trained model, and the smaller one that is made of it."""

    big: LanguageModel
    small: LanguageModel
    learning_rate: float
    held_out: Any
    calibration: Any
    """Tokens to measure importance on: (batches, batch, length)."""

    def run(self, trained: TrainState, batches: Any, before: float) -> Result:
        """Return what each method leaves at once, and after training on ``batches``."""
        tokens = [jnp.asarray(each, jnp.int32) for each in np.asarray(self.calibration)]
        shapes = jax.eval_shape(self.small.init, jax.random.key(0))
        plan = us.plan(
            self.small.apply, shapes, self.big.apply, trained.params, tokens[0], exact=False
        )
        rows = {}
        for method in METHODS:
            found = us.importance(self.big.apply, trained.params, tokens, plan, method=method)
            with warnings.catch_warnings():  # "random" is here to be no good
                warnings.simplefilter("ignore", us.UnitScaleShrinkWarning)
                rows[method] = self._row(trained, plan, found, batches)
        return {
            "parameters": [size_of(trained.params), size_of(shapes)],
            "bits_before": before,
            "rows": rows,
        }

    def _row(
        self, trained: TrainState, plan: us.Plan, found: us.Importance, batches: Any
    ) -> Result:
        selected = us.select(plan, found)
        params = us.shrink(trained.params, plan, importance=found)
        state = TrainState(params, us.resize_state(trained.opt_state, selected))
        tx = us.scale_optimizer(optax.adam(self.learning_rate), selected)
        run = train(self.small, tx, state, batches, self.held_out)
        return {**run, "bits_just_after": evaluate(self.small, params, self.held_out)}


def halved(config: Any) -> Any:
    """Return the sizes of the smaller model: half the MLP, or three quarters of the state."""
    if isinstance(config, LSTMConfig):
        return replace(config, hidden=3 * config.hidden // 4)
    assert isinstance(config, TransformerConfig)
    return replace(config, mlp=config.mlp // 2)
