"""A model with a list of layers, its plans and its checkpoints; for tests and their processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import uscale_jax as us

ADAM = optax.adamw(0.01)


def apply(params, x):
    h = x @ params["embed"]
    for layer in params["layers"]:
        y = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
        h = h + jnp.tanh(y @ layer["up"] + layer["bias"][None]) @ layer["down"]
    return h @ params["out"]


def params_of(width: int, mlp: int, layers: int, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(width + layers)
    draw = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape), dtype)  # noqa: E731
    layer = lambda: {  # noqa: E731
        "up": draw(width, mlp),
        "bias": draw(mlp),
        "down": draw(mlp, width),
    }
    stack = [layer() for _ in range(layers)]
    return {"embed": draw(5, width), "layers": stack, "out": draw(width, 3)}


INPUT = np.random.default_rng(5).standard_normal((4, 5)).astype(np.float32)
SMALL, BIG = (8, 12, 2), (16, 28, 3)


def planned(big: tuple[int, int, int] = BIG) -> us.Plan:
    return us.plan(apply, params_of(*SMALL), apply, params_of(*big), INPUT, depth="stack")


def state_of(params: Any, tx: Any = ADAM) -> Any:
    """A state after some steps."""
    state, step = tx.init(params), jax.jit(tx.update)
    for t in range(2):
        grads = jax.tree.map(lambda x, t=t: jnp.sin(3 * x + x.dtype.type(t)), params)
        _, state = step(grads, state, params)
    return state


def train_state(sizes: tuple[int, int, int], dtype: Any = np.float32) -> dict[str, Any]:
    """What people save: parameters, optimizer, and what is not of the model."""
    params = params_of(*sizes, dtype)
    rest = {"key": jax.random.key(7), "lr": 0.25, "rng": jnp.arange(6, dtype=jnp.uint32)}
    return {
        "params": params,
        "opt_state": state_of(params),
        "step": 3,
        "extra": {"empty": {}, "none": None, "tuple": (), **rest},
    }


def resized(tree: Any, plan: us.Plan, grow: Callable[..., Any] = us.grow, **options: Any) -> Any:
    """The same in memory."""
    state = us.resize_state(tree["opt_state"], plan, **options)
    return {**tree, "params": grow(tree["params"], plan), "opt_state": state}


def save(path: Path, tree: Any) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def load(path: Path, like: Any) -> Any:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)
