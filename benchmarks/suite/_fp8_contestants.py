"""Layers whose products are of float8 operands, one way or another: what `fp8_speed` compares.

One linen module for all, in bfloat16; only its ``dot_general`` differs.  ``qwix`` is imported where
it is used, and nowhere else.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

import uscale_jax as us
from benchmarks.registry import Result
from uscale_jax import numerics as un

Tree: TypeAlias = Any
Factory: TypeAlias = Callable[["Sizes"], linen.Module]

BFLOAT16 = "bfloat16"
STATIC, UNIT, EXACT = "static scales", "unit scaled", "unit scaled, factors not rounded"
QWIX, QWIX_FIXED = "qwix, absmax", "qwix, fixed range"
FLAX = "Flax, delayed scaling"
OWN, PEERS = (STATIC, UNIT, EXACT), (QWIX, QWIX_FIXED, FLAX)
FORWARD, BACKWARD = "float8_e4m3fn", "float8_e5m2"
BATCH = 8
"""Sequences that tokens are of; qwix knows parameters by their shapes, so inputs have another."""
WARM_UP = 3
"""Steps after which delayed scaling scales by what it has seen."""


@dataclass(frozen=True)
class Sizes:
    """Of a block: one layer, or the two of an MLP where there is a hidden size."""

    tokens: int
    width: int
    out: int
    hidden: int | None = None

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Return fan-in and fan-out of every layer."""
        if self.hidden is None:
            return {"layer": (self.width, self.out)}
        return {"up": (self.width, self.hidden), "down": (self.hidden, self.out)}

    @property
    def flops(self) -> int:
        """Return those of the products, forward and backward."""
        return 6 * self.tokens * sum(math.prod(fans) for fans in self.layers.values())


class Block(linen.Module):
    """Linear layers with an activation between them."""

    fans: Mapping[str, tuple[int, int]]
    dot: Callable[[int], Any] | None = None
    """Of a fan-in: what Flax takes as ``dot_general``."""
    dot_cls: Any = None
    act: Callable[[jax.Array], jax.Array] = jax.nn.gelu
    unit: bool = False
    """Whether kernels are of scale one."""
    dtype: Any = jnp.bfloat16

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the last layer's outputs."""
        normal, lecun = linen.initializers.normal(1.0), linen.initializers.lecun_normal()
        for i, (name, (fan_in, fan_out)) in enumerate(self.fans.items()):
            x = linen.Dense(
                fan_out,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.dtype,
                kernel_init=normal if self.unit else lecun,
                dot_general=self.dot(fan_in) if self.dot else None,
                dot_general_cls=self.dot_cls,
                name=name,
            )(x if i == 0 else self.act(x))
        return x


def contestants() -> dict[str, Factory]:
    """Return those that can be built here, by name."""
    made: dict[str, Factory] = {
        BFLOAT16: lambda sizes: Block(sizes.layers),
        STATIC: lambda sizes: Block(sizes.layers, dot=_static),
        UNIT: partial(_unit, rounded=True),
        EXACT: partial(_unit, rounded=False),
        FLAX: lambda sizes: Block(sizes.layers, dot_cls=linen.Fp8DirectDotGeneralOp),
    }
    if has_qwix():
        made |= {QWIX: partial(_qwix, fixed=False), QWIX_FIXED: partial(_qwix, fixed=True)}
    return made


def has_qwix() -> bool:
    """Return whether qwix is installed."""
    return importlib.util.find_spec("qwix") is not None


def _weight_scale(fan_in: int) -> float:
    """The power of two that brings weights of scale fan_in^-½ nearest to one."""
    return 2.0 ** round(math.log2(fan_in) / 2)


def _static(fan_in: int) -> Any:
    return us.fp8_dot_general(rhs_scale=_weight_scale(fan_in))


def _unit(sizes: Sizes, *, rounded: bool) -> Block:
    dot = un.unit_fp8_dot_general(rounded=rounded)
    return Block(sizes.layers, dot=lambda fan_in: dot, act=un.gelu, unit=True)


def _qwix(sizes: Sizes, *, fixed: bool) -> linen.Module:
    """Quantised training, one scale a tensor: with one a channel, products would be multiplied."""
    import qwix

    limits = {dtype: float(jnp.finfo(dtype).max) for dtype in (FORWARD, BACKWARD)}

    def over(dtype: str, scale: float = 1.0) -> str:
        limit = limits[dtype] / scale
        return f"fixed,-{limit},{limit}" if fixed else "absmax"

    rules = [
        qwix.QtRule(
            module_path=name,
            weight_qtype=FORWARD,
            act_qtype=FORWARD,
            bwd_qtype=BACKWARD,
            weight_calibration_method=over(FORWARD, _weight_scale(fan_in)),
            act_calibration_method=over(FORWARD),
            # Scales of weights have been multiplied into gradients by then.
            bwd_calibration_method=over(BACKWARD, _weight_scale(fan_in)),
            disable_channelwise_axes=True,
        )
        for name, (fan_in, _) in sizes.layers.items()
    ]
    return qwix.quantize_model(Block(sizes.layers), qwix.QtProvider(rules))


def forward(model: linen.Module) -> Callable[..., jax.Array]:
    """Return the forward pass, of variables and inputs."""
    return lambda variables, x: model.apply(variables, x)


def step(model: linen.Module) -> Callable[..., Any]:
    """Return outputs and all gradients, of variables, inputs and the outputs' gradient."""

    def both(variables: Tree, x: jax.Array, g: jax.Array) -> Any:
        y, pull = jax.vjp(forward(model), variables, x)
        return y, *pull(g)

    return both


def arguments(model: linen.Module, sizes: Sizes, seed: int) -> tuple[Tree, jax.Array, jax.Array]:
    """Return variables, inputs and the outputs' gradient, all of scale one but for kernels."""
    keys = jax.random.split(jax.random.key(seed), 3)
    batch = BATCH, sizes.tokens // BATCH
    x = jax.random.normal(keys[0], (*batch, sizes.width), jnp.bfloat16)
    g = jax.random.normal(keys[1], (*batch, sizes.out), jnp.bfloat16)
    return model.init(keys[2], x), x, g


# Numerics


def errors(name: str, sizes: Sizes, seed: int) -> Result:
    """Return how far outputs and gradients of one layer are from those in float32.

    The RMS of the difference over that of the exact tensor, after the best factor: unit-scaled
    layers have others.
    """
    if sizes.hidden is not None:
        raise ValueError("layers are compared one by one. Fix: sizes without a hidden one.")
    model = contestants()[name](sizes)
    variables, x, g = arguments(model, sizes, seed)
    kernel = _kernel(variables)
    run = jax.jit(step(model))
    for _ in range(WARM_UP):
        y, gradients, dx = run(variables, x, g)
        variables = _overwritten(variables, gradients)
    x, w, g = map(_matrix, (x, kernel, g))
    found = map(_matrix, (y, dx, _kernel(gradients)))
    pairs = zip(("output", "input", "kernel"), found, (x @ w, g @ w.T, x.T @ g), strict=True)
    return {tensor: _error(a, b) for tensor, a, b in pairs}


def _kernel(variables: Tree) -> jax.Array:
    return variables["params"]["layer"]["kernel"]


def _matrix(x: jax.Array) -> np.ndarray[Any, Any]:
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])


def _overwritten(variables: Tree, gradients: Tree) -> Tree:
    """Variables with the new histories of Flax's op, which come as their gradients."""
    name = "_overwrite_with_gradient"
    return variables | ({name: gradients[name]} if name in gradients else {})


def _error(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    factor = np.vdot(a, b) / np.vdot(a, a)
    return float(np.linalg.norm(factor * a - b) / np.linalg.norm(b))


def blocks(widths: Sequence[int], tokens: int) -> dict[str, Sizes]:
    """Return a square layer and an MLP of every width, by name."""
    made = {}
    for width in widths:
        made[f"linear {width}"] = Sizes(tokens, width, width)
        made[f"MLP {width}"] = Sizes(tokens, width, width, 4 * width)
    return made
