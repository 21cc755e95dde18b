"""What the shrinking benchmark trains with: sizes under a budget, recovery, and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import uscale_jax as us
from benchmarks import data
from benchmarks.models.functional import TransformerConfig
from benchmarks.models.lstm import LSTMConfig
from benchmarks.suite import _grow_train as training
from benchmarks.suite._grow_train import Text, Wrap
from benchmarks.training import LanguageModel, Params, TrainState, cross_entropy_bits

ModelConfig: TypeAlias = TransformerConfig | LSTMConfig

# Sizes that all differ, so that no two dimensions are taken for one.
TRACED = jax.ShapeDtypeStruct((3, 11), jnp.int32)
WIDTH = "embed/embedding[1]"
"""A place of the axis that runs through all layers."""


# Sizes


def parameters(config: ModelConfig) -> int:
    """Return how many parameters a model has."""
    return sum(leaf.size for leaf in jax.tree.leaves(training.shapes(config)))


@cache
def under_budget(
    big: ModelConfig, share: float, multiples: int | None, width: int | None = None
) -> ModelConfig:
    """Return the sizes of a model with at most ``share`` of the parameters.

    With the ``width`` of what runs through all layers given, the rest is found to fit.
    """
    model = training.language_model(big)
    limits = None if width is None else {WIDTH: width}
    found = us.budget(
        model.apply, training.shapes(big), TRACED, params=share, multiples=multiples, limits=limits
    )
    return _config(big, found.shapes)


def _config(big: ModelConfig, shapes: Params) -> ModelConfig:
    """Return the configuration of a tree of shapes; heads keep their size."""
    at = {jax.tree_util.keystr(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(shapes)}
    of = lambda part: next(shape for path, shape in at.items() if part in path)  # noqa: E731
    if isinstance(big, LSTMConfig):
        return replace(big, embedding=of("embed")[1], hidden=of("recurrent")[0])
    return replace(
        big,
        hidden=of("embed")[1],
        heads=of("query")[1],
        kv_heads=of("key")[1],
        mlp=of("gate")[1],
    )


@cache
def plan_for(small: ModelConfig, big: ModelConfig) -> us.Plan:
    """Return the plan between two models, exact or not."""
    small_model, big_model = map(training.language_model, (small, big))
    return us.plan(
        small_model.apply,
        training.shapes(small),
        big_model.apply,
        training.shapes(big),
        TRACED,
        exact=False,
    )


# The optimizer


@cache
def recovery_optimizer(small: ModelConfig, big: ModelConfig) -> Wrap:
    """Return what gives the big model's optimizer the plan's learning rates for the small one.

    Which units stay does not matter to the rates, so that one choice serves all: a program is
    compiled once for every wrap.
    """
    plan = plan_for(small, big)
    chosen = us.select(plan, {axis.name: np.arange(axis.big) for axis in plan.axes})
    # The check tries optimizers nobody knows; Adam treats every element alike.
    return lambda tx: us.scale_optimizer(tx, chosen, check=False)


# Programs


def _distil(
    models: tuple[LanguageModel, LanguageModel],
    wrap: Wrap,
    teacher: Params,
    state: TrainState,
    windows: jax.Array,
    rates: jax.Array,
) -> TrainState:
    """Take one step per batch of ``windows``, towards what the teacher says of each byte."""
    student_model, teacher_model = models

    def loss(params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return us.distillation_loss(student_model.apply(params, inputs), targets)

    def step(index: int, state: TrainState) -> TrainState:
        inputs = windows[index, :, :-1].astype(jnp.int32)
        gradients = jax.grad(loss)(state.params, inputs, teacher_model.apply(teacher, inputs))
        tx = training.optimizer(rates[index], wrap)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state)

    return jax.lax.fori_loop(0, len(rates), step, state)


@cache
def distiller(small: ModelConfig, big: ModelConfig, wrap: Wrap) -> Callable[..., TrainState]:
    """Return the compiled training program of a small model whose teacher is the big one."""
    models = training.language_model(small), training.language_model(big)
    return jax.jit(partial(_distil, models, wrap))


class Distillation(training.Run):
    """A run that learns from a teacher instead of the text."""

    def taught(self, big: ModelConfig, teacher: Params, wrap: Wrap) -> Distillation:
        """Return itself, with the program that learns from these parameters."""
        self.program = partial(distiller(self.config, big, wrap), teacher)
        return self


# Calibration


def likelihood(logits: jax.Array, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the loss that importance is measured by: bits a byte."""
    del inputs
    return cross_entropy_bits(logits, targets)


def calibration(text: Text, batches: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return bytes and the bytes that follow them, from the training part of the text."""
    rng = np.random.default_rng([text.seed, 2])
    found = data.random_windows(text.train, (batches, text.batch), text.seq + 1, rng)
    return [(each[:, :-1], each[:, 1:]) for each in found.astype(np.int32)]
