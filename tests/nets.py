"""Small nets as plain functions, shapes, and flat programs."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from uscale_jax import _jax
from uscale_jax.trace.inline import program
from uscale_jax.trace.program import Program


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def flat(fun: Any, *shapes: Any) -> Program:
    return program([_jax.closed_jaxpr(fun, *shapes)[0]])


def relu_net(params, x):
    for i in range(len(params)):
        x = x @ params[i]["kernel"] + params[i].get("bias", 0.0)
        x = jnp.maximum(x, 0.0) if i + 1 < len(params) else x
    return x


def layers(*widths: int, bias: bool) -> list[dict[str, jax.ShapeDtypeStruct]]:
    shapes = itertools.pairwise(widths)
    return [{"kernel": f32(a, b)} | ({"bias": f32(1, b)} if bias else {}) for a, b in shapes]
