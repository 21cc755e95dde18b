"""The tour's last part: the trained model grown twofold, its training continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import uscale_jax as us
from benchmarks.models.lstm import LSTMConfig
from benchmarks.models.transformer import TransformerConfig
from benchmarks.registry import Result
from benchmarks.training import LanguageModel, Params, TrainState, cross_entropy_bits

WAYS = ("plan's learning rates", "one learning rate")


@dataclass(frozen=True)
class Growth:
    """A trained model and the larger one it becomes."""

    small: LanguageModel
    big: LanguageModel
    learning_rate: float
    held_out: Any

    def run(self, trained: TrainState, batches: Any, before: float) -> Result:
        """Return what growth does to the loss at once, and while training goes on.

        ``trained`` has the state of ``optax.adam``, ``before`` is its loss.
        """
        shapes = jax.eval_shape(self.big.init, jax.random.key(0))
        tokens = jnp.asarray(batches[0][:, :-1], jnp.int32)
        plan = us.plan(self.small.apply, trained.params, self.big.apply, shapes, tokens)
        grown = us.grow(trained.params, plan)  # verifies
        state = us.resize_state(trained.opt_state, plan)
        adam = optax.adam(self.learning_rate)
        optimizers = {WAYS[0]: us.scale_optimizer(adam, plan), WAYS[1]: adam}
        same = train(self.small, adam, trained, batches, self.held_out)
        ways = {
            name: train(self.big, tx, TrainState(grown, state), batches, self.held_out)
            for name, tx in optimizers.items()
        }
        return {
            "parameters": [size_of(trained.params), size_of(grown)],
            "error": us.verify(
                plan, self.small.apply, trained.params, self.big.apply, grown, tokens
            ).error,
            "bits_before": before,
            "bits_just_after": evaluate(self.big, grown, self.held_out),
            "small": same,
            "ways": ways,
            "plan": _excerpt(plan),
        }


def train(
    model: LanguageModel,
    tx: optax.GradientTransformation,
    state: TrainState,
    batches: Any,
    held_out: Any,
) -> Result:
    """Return training losses, and the held-out loss at the end."""

    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
        bits, gradients = jax.value_and_grad(partial(_loss, model.apply))(state.params, batch)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), bits

    program = jax.jit(partial(jax.lax.scan, step))
    state, bits = program(state, jnp.asarray(batches, jnp.int32))
    losses = [float(value) for value in jax.device_get(bits)]
    return {"losses": losses, "bits_after": evaluate(model, state.params, held_out)}


def evaluate(model: LanguageModel, params: Params, held_out: Any) -> float:
    """Return the held-out loss."""
    one = partial(_loss, model.apply, params)
    windows = jnp.asarray(held_out, jnp.int32)
    return float(jax.jit(lambda windows: jax.lax.map(one, windows).mean())(windows))


def _loss(apply: Callable[..., jax.Array], params: Params, batch: jax.Array) -> jax.Array:
    return cross_entropy_bits(apply(params, batch[:, :-1]), batch[:, 1:])


def size_of(params: Params) -> int:
    """Return the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _excerpt(plan: us.Plan, most: int = 8) -> list[str]:
    """The first lines of the plan's table of leaves that say something new."""
    header, *rows = str(plan).split("\n\n")[0].splitlines()
    seen: dict[tuple[str, ...], str] = {}
    for row in rows:
        cells = tuple(row.split()[1:])
        seen.setdefault(cells, row)
    return [header, *list(seen.values())[:most]]


def doubled(config: Any) -> Any:
    """Return the sizes of the larger model: hidden and MLP width, or the recurrent state."""
    if isinstance(config, LSTMConfig):
        return replace(config, embedding=2 * config.embedding, hidden=2 * config.hidden)
    assert isinstance(config, TransformerConfig)
    return replace(config, hidden=2 * config.hidden, mlp=2 * config.mlp)
