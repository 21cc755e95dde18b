"""Training of a language model whose scale and learning rate can change between steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

import uscale_jax as us

Params = Any
Apply = Callable[[Params, jax.Array], jax.Array]


@dataclass(frozen=True)
class LanguageModel:
    """A model as two pure functions: key to parameters, and parameters, tokens to logits."""

    init: Callable[[jax.Array], Params]
    apply: Apply

    def initialised(self, seed: int) -> Params:
        """Return freshly initialised parameters."""
        # A program that runs once is not worth optimising; without, it takes half the time.
        cheap = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        return jax.jit(self.init, compiler_options=cheap)(jax.random.key(seed))


def nnx_model(build: Callable[[nnx.Rngs], nnx.Module]) -> LanguageModel:
    """Return the functional form of an nnx module; its parameters are an ``nnx.State``."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return LanguageModel(
        init=lambda key: nnx.state(build(nnx.Rngs(key)), nnx.Param),
        apply=lambda params, tokens: nnx.merge(graphdef, params)(tokens),
    )


def linen_model(module: linen.Module) -> LanguageModel:
    """Return the functional form of a linen module; its parameters are a dict."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return LanguageModel(init=lambda key: module.init(key, tokens), apply=module.apply)


class Setting(NamedTuple):
    """The numbers a branch may change; all may be traced, so that one program serves all.

    The forward pass reads ``read_scale`` times the stored weights.
    """

    learning_rate: float
    lr_divisor: float = 1.0
    read_scale: float = 1.0
    eps: float = 1e-8


class TrainState(NamedTuple):
    """Parameters and the optimizer's state."""

    params: Params
    opt_state: optax.OptState


def optimizer(setting: Setting, scale_first: bool = False) -> optax.GradientTransformationExtraArgs:
    """Return Adam at ``learning_rate / lr_divisor``.

    ``scale_first`` puts the division before Adam, where it has no effect: the wrong order.
    """
    adam = optax.adam(setting.learning_rate, eps=setting.eps)
    unit_scale = us.unit_scale_lr(setting.lr_divisor)
    return optax.chain(unit_scale, adam) if scale_first else optax.chain(adam, unit_scale)


def rescale_moments(opt_state: optax.OptState, divisor: float) -> optax.OptState:
    """Return Adam's state as it would be had every gradient been ``divisor`` times smaller."""
    mu = us.scale_params(optax.tree.get(opt_state, "mu"), 1 / divisor)
    nu = us.scale_params(optax.tree.get(opt_state, "nu"), 1 / divisor**2)
    return optax.tree.set(opt_state, mu=mu, nu=nu)


def cross_entropy_bits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean cost in bits per token."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return nats.mean() / math.log(2)


def _logits(model: LanguageModel, params: Params, read_scale: float, inputs: jax.Array) -> Any:
    return model.apply(us.scale_params(params, read_scale), inputs)


def _train(
    model: LanguageModel,
    state: TrainState,
    setting: Setting,
    windows: jax.Array,
    scale_first: bool = False,
) -> tuple[TrainState, jax.Array]:
    """Take one step per batch of ``windows`` (steps, batch, seq + 1)."""
    tx = optimizer(setting, scale_first)

    def loss(params: Params, batch: jax.Array) -> jax.Array:
        logits = _logits(model, params, setting.read_scale, batch[:, :-1])
        return cross_entropy_bits(logits, batch[:, 1:])

    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
        bits, gradients = jax.value_and_grad(loss)(state.params, batch)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), bits

    # A scan keeps the whole chunk on the device; on CPU it also beats a Python loop.
    return jax.lax.scan(step, state, windows.astype(jnp.int32))


def _evaluate(
    model: LanguageModel, params: Params, read_scale: float, windows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return mean bits and all logits over ``windows`` (batches, batch, seq + 1)."""

    def one(batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _logits(model, params, read_scale, batch[:, :-1])
        return cross_entropy_bits(logits, batch[:, 1:]), logits

    bits, logits = jax.lax.map(one, windows.astype(jnp.int32))
    return bits.mean(), logits


class Trainer:
    """The compiled training and evaluation programs of one model."""

    def __init__(self, model: LanguageModel) -> None:
        """Prepare the programs; they compile at their first use."""
        self.model = model
        self._train = jax.jit(partial(_train, model), static_argnames="scale_first")
        self._evaluate = jax.jit(partial(_evaluate, model))

    def init(self, seed: int, setting: Setting) -> TrainState:
        """Return freshly initialised parameters and optimizer state."""
        params = self.model.initialised(seed)
        return TrainState(params, optimizer(setting).init(params))

    def train(
        self, state: TrainState, setting: Setting, windows: Any, scale_first: bool = False
    ) -> tuple[TrainState, list[float]]:
        """Return the state after one step per batch, and the training loss of each in bits."""
        state, bits = self._train(state, setting, windows, scale_first=scale_first)
        return state, [float(value) for value in jax.device_get(bits)]

    def evaluate(self, params: Params, read_scale: float, windows: Any) -> tuple[float, jax.Array]:
        """Return the mean bits per token on ``windows``, and the logits."""
        bits, logits = self._evaluate(params, read_scale, windows)
        return float(bits), logits
