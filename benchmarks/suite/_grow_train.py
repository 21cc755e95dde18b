"""What the growth benchmark trains with: programs compiled once, their FLOPs, and a clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from benchmarks import data
from benchmarks.models.lstm import LSTM, LSTMConfig
from benchmarks.models.transformer import Transformer
from benchmarks.training import LanguageModel, Params, TrainState, cross_entropy_bits, nnx_model

Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]
# Runs of some thousand steps are too short for the usual memory of a thousand steps.
B2 = 0.99


# FLOPs


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Return the FLOPs of the matrix products in ``function``: 2·m·n·k for each.

    They are counted in the jaxpr, where a loop's body counts once per turn; what XLA reports
    depends on the backend and counts a loop's body once.
    """
    return float(_flops(jax.make_jaxpr(function)(*args).jaxpr))


def _flops(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += turns * sum(map(_flops, _inner(equation.params)))
        if equation.primitive.name == "dot_general":
            total += _product_flops(equation)
    return total


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Yield the jaxprs that an equation runs."""
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _product_flops(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


# Programs


def unchanged(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the optimizer as it is."""
    return tx


def optimizer(rate: Any, wrap: Wrap = unchanged) -> optax.GradientTransformation:
    """Return Adam at ``rate``, which may be traced, as ``wrap`` changes it."""
    return wrap(optax.adam(rate, b2=B2))


def _loss(model: LanguageModel, params: Params, batch: jax.Array) -> jax.Array:
    return cross_entropy_bits(model.apply(params, batch[:, :-1]), batch[:, 1:])


def _train(
    model: LanguageModel, wrap: Wrap, state: TrainState, windows: jax.Array, rates: jax.Array
) -> TrainState:
    """Take one step per batch of ``windows`` (steps, batch, seq + 1), at the rate of each."""

    def step(state: TrainState, now: tuple[jax.Array, jax.Array]) -> tuple[TrainState, None]:
        batch, rate = now
        gradients = jax.grad(partial(_loss, model))(state.params, batch)
        tx = optimizer(rate, wrap)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), None

    return jax.lax.scan(step, state, (windows.astype(jnp.int32), rates))[0]


def _evaluate(model: LanguageModel, params: Params, windows: jax.Array) -> jax.Array:
    """Return the mean bits over ``windows`` (batches, batch, seq + 1)."""
    return jax.lax.map(partial(_loss, model, params), windows.astype(jnp.int32)).mean()


@cache
def language_model(config: Any) -> LanguageModel:
    """Return the model of these sizes, always the same object."""
    module = LSTM if isinstance(config, LSTMConfig) else Transformer
    return nnx_model(lambda rngs: module(config, rngs))


@cache
def trainer(config: Any, wrap: Wrap = unchanged) -> Callable[..., TrainState]:
    """Return the compiled training program of a model and an optimizer."""
    return jax.jit(partial(_train, language_model(config), wrap))


@cache
def evaluator(config: Any) -> Callable[..., jax.Array]:
    """Return the compiled evaluation of a model."""
    return jax.jit(partial(_evaluate, language_model(config)))


@cache
def step_flops(config: Any, batch: int, seq: int) -> float:
    """Return the FLOPs of the gradient on one batch."""
    model = language_model(config)
    params = shapes(config)
    windows = jax.ShapeDtypeStruct((batch, seq + 1), jnp.int32)
    return flops(jax.grad(partial(_loss, model)), params, windows)


@cache
def shapes(config: Any) -> Params:
    """Return the shapes of a model's parameters."""
    return jax.eval_shape(language_model(config).init, jax.random.key(0))


# Runs


class Text(NamedTuple):
    """The windows to train and to evaluate on, in chunks of ``chunk`` steps."""

    train: np.ndarray
    held_out: np.ndarray
    seed: int
    chunk: int
    batch: int
    seq: int

    def windows(self, index: int) -> np.ndarray:
        """Return the batches of a chunk, the same for whoever comes to it."""
        rng = np.random.default_rng([self.seed, 1, index])
        return data.random_windows(self.train, (self.chunk, self.batch), self.seq + 1, rng)


def read_text(path: Any, seed: int, chunk: int, batch: int, seq: int, held_out: int) -> Text:
    """Return the corpus cut for one seed."""
    corpus = data.load_corpus(path, seed)
    windows = data.spread_windows(corpus.held_out, (held_out, batch), seq + 1)
    return Text(corpus.train, windows, seed, chunk, batch, seq)


@dataclass
class Curve:
    """Held-out bits against FLOPs, and how many chunks have been trained on."""

    chunks: int = 0
    spent: float = 0.0
    flops: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)


Schedule = Callable[[np.ndarray], np.ndarray]


class Run:
    """One model in training: its state, and its curve so far."""

    def __init__(
        self, config: Any, state: TrainState, text: Text, curve: Curve, wrap: Wrap = unchanged
    ) -> None:
        """Begin where ``curve`` stands, with an evaluation there."""
        self.config, self.state, self.text = config, state, text
        self.chunks, self.spent = curve.chunks, curve.spent
        self.curve = Curve(curve.chunks, curve.spent)
        self.program = trainer(config, wrap)
        self.chunk_flops = text.chunk * step_flops(config, text.batch, text.seq)
        self._look()

    def _look(self) -> None:
        bits = evaluator(self.config)(self.state.params, self.text.held_out)
        self.curve.flops.append(self.curve.spent)
        self.curve.bits.append(float(bits))

    def advance(self, schedule: Schedule) -> None:
        """Train on one chunk, at the rates that ``schedule`` has for its steps, and evaluate."""
        first = self.curve.chunks * self.text.chunk
        rates = schedule(np.arange(first, first + self.text.chunk)).astype(np.float32)
        windows = self.text.windows(self.curve.chunks)
        self.state = self.program(self.state, windows, rates)
        self.curve.chunks += 1
        self.curve.spent += self.chunk_flops
        self._look()

    def until(self, budget: float, schedule: Schedule, report: Callable[[str], None]) -> Curve:
        """Train while the next chunk stays within ``budget`` FLOPs; return the curve."""
        while self.curve.spent + self.chunk_flops <= budget * (1 + 1e-9):
            self.advance(schedule)
            report(f"{self.curve.bits[-1]:.2f} bits/byte")
        return self.curve


def fresh(config: Any, seed: int) -> TrainState:
    """Return freshly initialised parameters and Adam's state for them."""
    params = language_model(config).initialised(seed)
    return TrainState(params, optimizer(0.0).init(params))


def warm_up(rate: float, steps: int, start: int = 0) -> Schedule:
    """Return a constant rate after ``steps`` of linear warm-up from step ``start``."""
    return lambda step: rate * np.minimum((step - start + 1) / max(steps, 1), 1.0)


def cosine(rate: float, steps: int, start: int, end: int, final: float) -> Schedule:
    """Return a warm-up, then half a cosine down to ``final`` times the rate at step ``end``."""
    warm = warm_up(rate, steps, start)

    def at(step: np.ndarray) -> np.ndarray:
        done = np.clip((step - start) / (end - start), 0, 1)
        return warm(step) * (final + (1 - final) * (1 + np.cos(np.pi * done)) / 2)

    return at
