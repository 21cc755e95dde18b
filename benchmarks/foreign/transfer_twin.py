"""A Transformer in JAX whose twins in PyTorch the packages ``mup`` and ``unit-scaling`` scale.

Parameters are a flat dictionary with PyTorch's names, shapes and layouts.  The model knows nothing
of μP; plans, factors and trainings are those of ``uscale_jax``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import uscale_jax as us
from benchmarks.foreign.torch_layers import (
    Params,
    Shapes,
    layer_norm,
    layer_norm_shapes,
    linear,
    linear_shapes,
)

HEADS, VOCABULARY, FEATURES, BATCH, LENGTH = 2, 23, 7, 3, 11
"""What does not grow: heads, tokens, numbers known of every token, examples, rows of positions."""


class Sizes(NamedTuple):
    """What grows: no two sizes are the same."""

    hidden: int
    head: int
    mlp: int
    layers: int

    def times(self, factor: int) -> Sizes:
        """Return all widths times a number, and as many layers."""
        return Sizes(self.hidden * factor, self.head * factor, self.mlp * factor, self.layers)


SMALL = Sizes(6, 4, 14, 2)
"""Smaller than the base, which is a target itself under rules of a target's own widths."""
BASE = Sizes(12, 5, 26, 2)
TARGET = Sizes(24, 20, 78, 2)
"""Twice as wide, heads four times, the middle of the MLP three times."""


@dataclass(frozen=True)
class Form:
    """How the model is written."""

    name: str
    roots: bool = False
    """Whether scores are over √d, as everywhere but in μP; else over d, the same at the base."""
    tied: bool = False
    """Whether the embedding is the readout too; ``MuSharedReadout`` takes no bias then."""
    across: bool = False
    """Whether the first kernel of the MLP is stored as (in, out)."""


PLAIN = Form("scores over d")
FORMS = (
    PLAIN,
    Form("scores over √d", roots=True),
    Form("tied readout", tied=True),
    Form("a kernel stored as (in, out)", across=True),
)

STEPS = 3
SETTINGS = {
    "adam": {"lr": 0.003, "weight_decay": 0.1, "eps": 1e-13},
    "sgd": {"lr": 0.1, "weight_decay": 0.1},
}

Ratios: TypeAlias = "list[tuple[str, dict[str, float]]]"
"""Reasons, and by what factors here are larger for them than a package's."""


# The model


def shapes(form: Form, sizes: Sizes) -> Shapes:
    """Return the shapes of the parameters by name."""
    hidden, inner = sizes.hidden, HEADS * sizes.head
    made = {
        "embed.weight": (VOCABULARY, hidden),
        "positions.weight": (LENGTH, hidden),
        **linear_shapes("context", hidden, FEATURES),
    }
    for i in range(sizes.layers):
        at = f"layers.{i}"
        made |= layer_norm_shapes(f"{at}.norm1", hidden) | linear_shapes(f"{at}.q", inner, hidden)
        # No bias: no score depends on one, and Adam would make steps of rounding errors.
        made |= {f"{at}.k.weight": (inner, hidden)} | linear_shapes(f"{at}.v", inner, hidden)
        made |= linear_shapes(f"{at}.o", hidden, inner) | layer_norm_shapes(f"{at}.norm2", hidden)
        made |= linear_shapes(f"{at}.up", sizes.mlp, hidden)
        made |= linear_shapes(f"{at}.down", hidden, sizes.mlp)
        if form.across:
            made[f"{at}.up.weight"] = (hidden, sizes.mlp)
    made |= layer_norm_shapes("norm", hidden)
    return made if form.tied else made | linear_shapes("head", VOCABULARY, hidden)


def structs(form: Form, sizes: Sizes) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes as JAX's."""
    made = shapes(form, sizes).items()
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in made}


@cache
def model(form: Form) -> Callable[..., jax.Array]:
    """Return ``apply(params, tokens, context)``; always the same function."""
    return partial(_apply, form)


def _apply(form: Form, params: Params, tokens: jax.Array, context: jax.Array) -> jax.Array:
    """The scores of the tokens."""
    positions = params["positions.weight"][jnp.arange(tokens.shape[1])]
    x = params["embed.weight"][tokens] + positions[None] + linear(params, "context", context)
    for i in range(sum(name.endswith("norm1.weight") for name in params)):
        at = f"layers.{i}"
        x = x + _attention(form, params, at, layer_norm(params, f"{at}.norm1", x))
        y = _up(form, params, f"{at}.up", layer_norm(params, f"{at}.norm2", x))
        x = x + linear(params, f"{at}.down", jax.nn.gelu(y, approximate=False))
    x = layer_norm(params, "norm", x)
    if form.tied:
        return jnp.einsum("bsh,vh->bsv", x, params["embed.weight"])
    return linear(params, "head", x)


def _attention(form: Form, params: Params, at: str, x: jax.Array) -> jax.Array:
    keys = jnp.einsum("bsh,oh->bso", x, params[f"{at}.k.weight"])
    parts = (linear(params, f"{at}.q", x), keys, linear(params, f"{at}.v", x))
    q, k, v = (part.reshape(*part.shape[:2], HEADS, -1) for part in parts)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * _scale(form, q.shape[-1])
    y = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores, axis=-1), v)
    return linear(params, f"{at}.o", y.reshape(*y.shape[:2], -1))


def _scale(form: Form, d: int) -> float:
    return 1 / math.sqrt(d) if form.roots else math.sqrt(BASE.head) / d


def _up(form: Form, params: Params, name: str, x: jax.Array) -> jax.Array:
    if not form.across:
        return linear(params, name, x)
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"].reshape(1, 1, -1)


# Arrays


def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens, and what is known of every one of them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)
    return tokens, rng.normal(size=(BATCH, LENGTH, FEATURES)).astype(np.float32)


def wanted(seed: int = 1) -> np.ndarray:
    """Return random scores to train towards."""
    drawn = np.random.default_rng(seed).normal(size=(BATCH, LENGTH, VOCABULARY))
    return drawn.astype(np.float32)


def fresh(form: Form, sizes: Sizes, seed: int = 2) -> dict[str, np.ndarray]:
    """Return random initial values: variances of 1/fan_in, gains about 1, biases of 1/10."""
    rng, made = np.random.default_rng(seed), {}
    for name, shape in shapes(form, sizes).items():
        fan_in = shape[0] if form.across and "up" in name else shape[-1]
        size = 1 / math.sqrt(fan_in) if len(shape) == 2 else 0.1
        is_gain = "norm" in name and name.endswith("weight")
        made[name] = (is_gain + size * rng.normal(size=shape)).astype(np.float32)
    return made


def starts(form: Form, sizes: Sizes) -> dict[str, float]:
    """Return the standard deviations that PyTorch's layers start with, by its documentation."""
    own = shapes(form, sizes)
    found = {}
    for name in own:
        layer = name.rpartition(".")[0]
        if "norm" in layer or (form.across and name.endswith("up.bias")):
            found[name] = 0.0
        elif layer in ("embed", "positions"):
            found[name] = 1.0
        else:
            fan_in = own[f"{layer}.weight"][0 if form.across and layer.endswith("up") else 1]
            found[name] = 1 / math.sqrt(3 * fan_in)
    return found


def started(form: Form, sizes: Sizes) -> dict[str, np.ndarray]:
    """Return initial values that have these deviations to the last digit."""
    made, own = {}, starts(form, sizes)
    for name, shape in shapes(form, sizes).items():
        values = np.linspace(-1, 1, math.prod(shape)).reshape(shape)
        made[name] = values / values.std() * own[name]
    return made


# Plans, factors and trainings


@cache
def planned(form: Form, base: Sizes, target: Sizes) -> us.Plan:
    """Return the plan of two models in JAX."""
    apply, made = model(form), [structs(form, sizes) for sizes in (base, target)]
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs()]
    depth = None if base.layers == target.layers else "interleave"
    return us.plan(apply, made[0], apply, made[1], *given, depth=depth)


@cache
def here(form: Form, base: Sizes, target: Sizes, rule: str, optimizer: str) -> dict[str, Any]:
    """Return every factor of every leaf under a rule."""
    plan = planned(form, base, target)
    initial = (started(form, base), started(form, target))
    found = us.transfer(plan, rule, optimizer=optimizer)
    start = us.transfer(plan, rule, optimizer=optimizer, initial=initial).init
    decay, decays = found.weight_decay, _decays(found)
    return {
        name: {
            "multiplier": float(leaf.factors.multiplier),
            "init": float(leaf.factors.init),
            "start": float(start[name]),
            "start by default": float(leaf.init),
            "lr": float(leaf.learning_rate),
            "weight decay": float(decay[name]),
            "decay of a step": decays[name],
            "ε": float(leaf.factors.eps),
            "L2": float(leaf.factors.eps * leaf.factors.weight_decay),
        }
        for name, leaf in found.leaves.items()
    }


def _decays(rule: us.Transfer) -> dict[str, float]:
    """What decays in a step in the rule's frame; without gradients optimizers do no more."""
    tx = optax.chain(optax.add_decayed_weights(1.0), optax.scale(-1.0))
    scaled = us.scale_optimizer(tx, rule, check=False)
    leaves = rule.plan.leaves.items()
    zeros, ones = ({n: np.full(x.big, of, np.float32) for n, x in leaves} for of in (0, 1))
    steps, _ = jax.jit(lambda g, w: scaled.update(g, scaled.init(w), w))(zeros, ones)
    return {name: -float(np.max(step)) for name, step in steps.items()}


def _optimizer(kind: str, lr: float, weight_decay: float, **more: float) -> Any:
    if kind == "adam":
        return optax.adamw(lr, weight_decay=weight_decay, **more)
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(lr, **more))


def trained(
    rule: us.Transfer, apply: Callable[..., jax.Array], params: Params, optimizer: str
) -> tuple[Any, Any, Any]:
    """Return outputs before, and weights and outputs after steps in the frame of a rule."""
    scaled = us.scale_optimizer(_optimizer(optimizer, **SETTINGS[optimizer]), rule)
    whole, given, aim = jax.jit(rule.apply(apply)), [jnp.asarray(x) for x in inputs()], wanted()

    @jax.jit
    def step(params: Params, state: Any) -> tuple[Params, Any]:
        def loss(params: Params) -> jax.Array:
            return jnp.mean(jnp.square(whole(params, *given) - aim))

        updates, state = scaled.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before, state = whole(params, *given), scaled.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return before, {name: np.asarray(x) for name, x in params.items()}, whole(params, *given)
