"""The products of a training step: their FLOPs by format, and what formats lose of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from benchmarks.models.functional import TransformerConfig
from benchmarks.models.transformer_linen import DotGeneral
from benchmarks.registry import Result
from benchmarks.suite._fp8_train import Setting, Variant, batch_loss, model
from benchmarks.training import Params
from uscale_jax import numerics as un

PRODUCTS = ("query", "key", "value", "out", "gate", "up", "down")
"""Of one block, in the order in which they are computed."""
FORMATS = {"weights": "float8_e4m3fn", "activations": "float8_e4m3fn", "cotangents": "float8_e5m2"}


# FLOPs


class Product(NamedTuple):
    """One matrix product of a program."""

    role: str
    flops: int
    dtypes: frozenset[str]
    """Of both operands."""


def marked(dot: DotGeneral) -> DotGeneral:
    """Return a product that can be told from others in a traced program, backward too."""

    def marked_dot(lhs: jax.Array, rhs: jax.Array, numbers: Any, **how: Any) -> jax.Array:
        def hidden_linear(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return dot(lhs, rhs, numbers, **how)

        return jax.jit(hidden_linear)(lhs, rhs)

    return marked_dot


def products(variant: Variant, setting: Setting) -> list[Product]:
    """Return the products of one gradient, read out of the traced program."""
    found = model(variant, setting.sizes, marked)
    params = jax.eval_shape(found.init, jax.random.key(0))
    batch = jax.ShapeDtypeStruct((setting.batch, setting.seq + 1), jnp.int32)
    traced = jax.make_jaxpr(jax.grad(partial(batch_loss, found)))(params, batch)
    return [*_products(traced.jaxpr, hidden=False)]


def _products(jaxpr: core.Jaxpr, hidden: bool) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield _product(equation, hidden)
        inside = hidden or equation.params.get("name") == "hidden_linear"
        for value in equation.params.values():
            if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
                yield from _products(getattr(value, "jaxpr", value), inside)


def _product(equation: core.JaxprEqn, hidden: bool) -> Product:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left, right = (operand.aval for operand in equation.invars)
    terms = math.prod(left.shape[dim] for dim in contracted)
    flops = 2 * math.prod(equation.outvars[0].aval.shape) * terms
    role = "hidden" if hidden else "attention" if batch else "readout"
    return Product(role, flops, frozenset({left.dtype.name, right.dtype.name}))


def flops_by_role(variant: Variant, setting: Setting) -> Result:
    """Return the FLOPs of every role, in all and of two float8 operands, and by formula."""
    found = products(variant, setting)
    roles = ("hidden", "readout", "attention")
    narrow = [p for p in found if all(name.startswith("float8") for name in p.dtypes)]
    total = {role: sum(p.flops for p in found if p.role == role) for role in roles}
    float8 = {role: sum(p.flops for p in narrow if p.role == role) for role in roles}
    return {"flops": total, "float8": float8, "formula": formula(setting)}


def formula(setting: Setting) -> Result:
    """Return 2·m·n·k of every product, three times: forward, and for both gradients."""
    c, tokens = setting.sizes, setting.batch * setting.seq
    per_layer = layer_parameters(c)
    logits = 2 * c.heads * c.head_dim * setting.seq
    return {
        "hidden": 6 * tokens * c.layers * per_layer,
        "readout": 6 * tokens * c.hidden * c.vocab,
        "attention": 6 * tokens * c.layers * logits,
    }


def layer_parameters(c: TransformerConfig) -> int:
    """Return the number of weights in the linear layers of one block."""
    return c.hidden * (2 * c.head_dim * (c.heads + c.kv_heads) + 3 * c.mlp)


# What is lost


def census(variant: Variant, setting: Setting) -> Callable[[Params, jax.Array], Result]:
    """Return a function of parameters and a batch to what float8 would lose of every product.

    Of operands as they enter the product, and of the gradient of its result as it arrives.
    """
    sizes = setting.sizes

    def run(shifts: list[jax.Array] | None, params: Params, batch: jax.Array) -> Any:
        seen: list[tuple[jax.Array, jax.Array, jax.Array]] = []
        found = model(variant, sizes, lambda dot: _noted(dot, seen, shifts))
        loss = batch_loss(found, params, batch)
        return loss, seen

    def measure(params: Params, batch: jax.Array) -> Result:
        _, seen = jax.eval_shape(partial(run, None), params, batch)
        shifts = [jnp.zeros(out.shape, out.dtype) for *_, out in seen]
        cotangents, noted = jax.grad(run, has_aux=True)(shifts, params, batch)
        read = [
            {"activations": lhs, "weights": rhs, "cotangents": g}
            for (lhs, rhs, _), g in zip(noted, cotangents, strict=True)
        ]
        return [{kind: _loss_of(x, FORMATS[kind]) for kind, x in one.items()} for one in read]

    compiled = jax.jit(measure)
    return lambda params, batch: _named(compiled(params, batch), sizes)


def _noted(dot: DotGeneral, seen: list[Any], shifts: list[jax.Array] | None) -> DotGeneral:
    """The product, which notes what it reads; a gradient of ``shifts`` is that of its result."""

    def noted(lhs: jax.Array, rhs: jax.Array, numbers: Any, **how: Any) -> jax.Array:
        out = dot(lhs, rhs, numbers, **how)
        out = out if shifts is None else out + shifts[len(seen)]
        seen.append((lhs, rhs, out))
        return out

    return noted


def _loss_of(x: jax.Array, fmt: str) -> dict[str, jax.Array]:
    wide, limits = x.astype(jnp.float32), un.number_format(fmt)
    zero = un.quantized(wide, fmt) == 0
    return {
        "rms": jnp.sqrt(jnp.mean(jnp.square(wide))),
        "largest": jnp.max(jnp.abs(wide)) / limits.max,
        "flushed": jnp.mean(zero & (wide != 0), dtype=jnp.float32),
        "zero": jnp.mean(zero, dtype=jnp.float32),
    }


def _named(measured: list[Any], sizes: TransformerConfig) -> Result:
    numbers = jax.tree.map(float, jax.device_get(measured))
    names = [f"{layer}/{name}" for layer in range(sizes.layers) for name in PRODUCTS]
    return dict(zip(names, numbers, strict=True))
