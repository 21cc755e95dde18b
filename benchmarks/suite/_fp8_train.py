"""What the FP8 benchmark trains: one Transformer in two parametrizations, by how it multiplies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import uscale_jax as us
from benchmarks.models import transformer_linen, transformer_unit
from benchmarks.models.functional import TransformerConfig
from benchmarks.models.transformer_linen import DotGeneral
from benchmarks.registry import Progress, Result
from benchmarks.suite import _grow_train as training
from benchmarks.suite._grow_train import Text
from benchmarks.training import Params, TrainState
from uscale_jax import numerics as un

Parametrization = Literal["unit-scaled", "standard"]
OWN_RATE, BY_ASTYPE = "float8, learning rate of its own", "float8 by astype"
BY_HAND = "float8, scales by hand"
LOOKS = 10
"""How often held-out text is looked at."""


@dataclass(frozen=True, eq=False)
class Setting:
    """Sizes and schedule, the same for all that is compared.

    Learning rates are the best on a grid of √2 in bfloat16. ``decay`` is taken off weights at every
    step, whatever the learning rate, in proportion to the schedule.
    """

    sizes: TransformerConfig
    steps: int
    batch: int
    seq: int
    held_out: int
    seeds: int
    """Of the two that are compared; others are seen on the first two of them."""
    unit_rate: float
    standard_rate: float
    standard_float8_rate: float
    """Where standard float8 is least bad."""
    decay: float = 1e-4

    def seeds_of(self, variant: Variant) -> int:
        """Return on how many seeds a variant is run."""
        return self.seeds if variant in COMPARED else min(self.seeds, 2)

    def rate(self, variant: Variant) -> float:
        """Return the learning rate of a variant."""
        if variant.model == "unit-scaled":
            return self.unit_rate
        own = variant.products == OWN_RATE
        return self.standard_float8_rate if own else self.standard_rate

    def text(self, path: Any, seed: int) -> Text:
        """Return the text of one seed, in chunks from look to look."""
        chunk = self.steps // LOOKS
        return training.read_text(path, seed, chunk, self.batch, self.seq, self.held_out)


@dataclass(frozen=True)
class Variant:
    """A parametrization, and how the linear layers of its blocks multiply."""

    model: Parametrization
    products: str

    @property
    def name(self) -> str:
        """Return both."""
        return f"{self.model}, {self.products}"


def cast_dot_general(
    lhs: jax.Array, rhs: jax.Array, numbers: Any, precision: Any = None, **_: Any
) -> jax.Array:
    """Return a product of operands that are simply cast to float8, differentiated by JAX."""
    narrow = [x.astype(jnp.float8_e4m3fn) for x in (lhs, rhs)]
    wide = jax.lax.dot_general(*narrow, numbers, precision, preferred_element_type=jnp.float32)
    return wide.astype(lhs.dtype)


DOTS: Mapping[Variant, DotGeneral] = {
    Variant("unit-scaled", "float32"): un.dot_general,
    Variant("unit-scaled", "bfloat16"): un.dot_general,
    Variant("unit-scaled", "float8"): un.unit_fp8_dot_general(),
    Variant("standard", "bfloat16"): jax.lax.dot_general,
    Variant("standard", "float8"): us.fp8_dot_general(),
    Variant("standard", OWN_RATE): us.fp8_dot_general(),
    Variant("standard", BY_ASTYPE): cast_dot_general,
    # Of weights of fan_in^-½, and of gradients of a mean over some thousand tokens.
    Variant("standard", BY_HAND): us.fp8_dot_general(rhs_scale=8.0, grad_scale=2.0**14),
}


COMPARED = (Variant("unit-scaled", "bfloat16"), Variant("unit-scaled", "float8"))


class Model(NamedTuple):
    """A model as pure functions."""

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    """Of logits and targets, in nats per token."""
    divisors: Callable[[Params], Any]
    """Of the learning rate, for every leaf or for all."""


def model(
    variant: Variant,
    sizes: TransformerConfig,
    via: Callable[[DotGeneral], DotGeneral] = lambda f: f,
) -> Model:
    """Return a model whose products are those of a variant, as ``via`` changes them."""
    dtype = jnp.float32 if variant.products == "float32" else jnp.bfloat16
    dot = via(DOTS[variant])
    if variant.model == "standard":
        module = transformer_linen.Transformer(sizes, dot, dtype)
        return Model(*_functions(module), _mean_loss, lambda params: 1.0)
    config = transformer_unit.UnitConfig(sizes, dot_general=dot, dtype=dtype)
    loss = partial(transformer_unit.loss, config)
    divisors = partial(transformer_unit.rate_divisors, config)
    return Model(*_functions(transformer_unit.UnitTransformer(config)), loss, divisors)


def _functions(module: Any) -> tuple[Callable[..., Params], Callable[..., jax.Array]]:
    return lambda key: module.init(key, jnp.zeros((1, 2), jnp.int32)), module.apply


def _mean_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    wide = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(wide, targets).mean()


def batch_loss(model: Model, params: Params, batch: jax.Array) -> jax.Array:
    """Return the loss on windows (batch, seq + 1)."""
    return model.loss(model.apply(params, batch[:, :-1]), batch[:, 1:])


def optimizer(
    setting: Setting, variant: Variant, divisors: Any, share: Any
) -> optax.GradientTransformation:
    """Return Adam with decay that is independent of its rate, at a share of both."""
    return optax.chain(
        optax.scale_by_adam(b2=training.B2),
        us.unit_scale_lr(divisors),
        optax.scale(setting.rate(variant)),
        optax.add_decayed_weights(setting.decay),
        optax.scale(-share),
    )


class Program(NamedTuple):
    """The compiled programs of one variant."""

    init: Callable[[int], TrainState]
    train: Callable[..., TrainState]
    """Of a state, windows (steps, batch, seq + 1) and the share of the rate at each step."""
    evaluate: Callable[..., jax.Array]
    """Of parameters and windows (batches, batch, seq + 1): bits per token."""


@cache
def program(variant: Variant, setting: Setting) -> Program:
    """Return the programs of a variant, which compile at their first use."""
    found = model(variant, setting.sizes)
    divisors = found.divisors(jax.eval_shape(found.init, jax.random.key(0)))
    at = partial(optimizer, setting, variant, divisors)

    def init(seed: int) -> TrainState:
        params = jax.jit(found.init)(jax.random.key(seed))
        return TrainState(params, at(0.0).init(params))

    def step(state: TrainState, now: tuple[jax.Array, jax.Array]) -> tuple[TrainState, None]:
        batch, share = now
        gradients = jax.grad(partial(batch_loss, found))(state.params, batch.astype(jnp.int32))
        updates, opt_state = at(share).update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), None

    def train(state: TrainState, windows: jax.Array, shares: jax.Array) -> TrainState:
        return jax.lax.scan(step, state, (windows, shares))[0]

    def evaluate(params: Params, windows: jax.Array) -> jax.Array:
        nats = jax.lax.map(partial(batch_loss, found, params), windows.astype(jnp.int32))
        return nats.mean() / math.log(2)

    return Program(init, jax.jit(train), jax.jit(evaluate))


class Trained(NamedTuple):
    """The losses of one run, and the parameters at its ends."""

    curve: Result
    first: Params
    last: Params


def trained(
    variant: Variant, setting: Setting, path: Any, seed: int, progress: Progress
) -> Trained:
    """Train one model: a warm-up over a tenth, then half a cosine down to nothing."""
    programs, text = program(variant, setting), setting.text(path, seed)
    state = start = programs.init(seed)
    schedule = training.cosine(1.0, setting.steps // 10, 0, setting.steps, 0.0)
    steps, bits = [0], [float(programs.evaluate(state.params, text.held_out))]
    for index in range(LOOKS):
        shares = schedule(np.arange(index * text.chunk, (index + 1) * text.chunk))
        state = programs.train(state, text.windows(index), shares.astype(np.float32))
        bits.append(float(programs.evaluate(state.params, text.held_out)))
        steps.append((index + 1) * text.chunk)
        progress.advance(note=f"{bits[-1]:.3f} bits/byte")
    curve = {**asdict(variant), "seed": seed, "steps": steps, "bits": bits}
    return Trained(curve, start.params, state.params)
