"""A model on a mesh of 2 × 4 devices, of one process or of two; for tests and their processes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import uscale_jax as us

SMALL, BIG = (8, 12), (16, 32)
SPECS = {
    "embed": P(None, "model"),
    "up": P("data", "model"),
    "bias": P("model"),
    "down": P("model", "data"),
    "steps": P(),
    "out": P(("data", "model")),
}
INPUT = np.random.default_rng(5).standard_normal((6, 5)).astype(np.float32)
LR = 0.02


def apply(params: Mapping[str, Any], x: Any) -> jax.Array:
    """A residual layer between an embedding and a head, normalised."""
    h = x @ params["embed"]
    y = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = h + jnp.tanh(y @ params["up"] + params["bias"][None]) @ params["down"]
    return (h @ params["out"]) * (params["steps"] > 0).astype(jnp.float32)


def params_of(width: int, mlp: int) -> dict[str, np.ndarray]:
    """Numbers of NumPy, equal in every process."""
    rng = np.random.default_rng(width)
    draw = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    return {
        "embed": draw(5, width),
        "up": draw(width, mlp),
        "bias": draw(mlp),
        "down": draw(mlp, width),
        "steps": np.int32(3),
        "out": draw(width, 3),
    }


def planned(big: tuple[int, int] = BIG) -> us.Plan:
    return us.plan(apply, params_of(*SMALL), apply, params_of(*big), INPUT)


def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def onto(over: jax.sharding.Mesh, tree: Any) -> Any:
    """A tree on the mesh, every process with the parts that are its own."""

    def one(path: Any, x: Any) -> jax.Array:
        named = next((SPECS[key.key] for key in path if getattr(key, "key", None) in SPECS), P())
        sharding = NamedSharding(over, named if np.ndim(x) else P())
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree_util.tree_map_with_path(one, tree)


def specs(tree: Any) -> list[P]:
    """The specs of a tree, less what ends with None."""
    found = [leaf.sharding.spec for leaf in jax.tree.leaves(tree)]
    return [P(*[e for i, e in enumerate(spec) if any(spec[i:])]) for spec in found]


def transformations(plan: us.Plan) -> dict[str, optax.GradientTransformation]:
    """Ours, one each, with optimizers."""
    clipped = optax.chain(us.clip_by_global_norm(0.5, plan), optax.adam(LR))
    return {
        "unit_scale_lr": optax.chain(optax.adamw(LR), us.unit_scale_lr(1.7)),
        "keep_decay": optax.chain(optax.adamw(LR), us.unit_scale_lr(1.7, keep_decay=LR * 1e-4)),
        "scale_optimizer": us.scale_optimizer(optax.adamw(LR), plan),
        "clip_by_global_norm": us.scale_optimizer(clipped, plan),
    }


def train(
    params: Any, tx: optax.GradientTransformation, state: Any = None, steps: int = 3
) -> tuple[Any, Any, list[float]]:
    """Returns parameters, state and losses after some steps."""
    weights = {k: v for k, v in params.items() if k != "steps"}

    def loss(weights: Any) -> jax.Array:
        return jnp.mean(jnp.square(apply({**weights, "steps": jnp.int32(1)}, INPUT) - 1))

    @jax.jit
    def step(weights: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(weights)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, value

    state, losses = jax.jit(tx.init)(weights) if state is None else state, []
    for _ in range(steps):
        weights, state, value = step(weights, state)
        losses.append(float(value))
    return {**params, **weights}, state, losses


def same(x: Any) -> Any:
    return x


def pruned(params: Any, plan: us.Plan, method: str) -> Any:
    """The small model with the units of the big one that matter most."""
    found = us.importance(apply, params, [INPUT], plan, method=method)
    return us.shrink(params, plan, importance=found)


Place = Callable[[Any], Any]


def results(place: Place = same) -> dict[str, Any]:
    """All that is compared: from one process without a mesh, on a mesh, and from two processes."""
    plan = planned()
    small, random = place(params_of(*SMALL)), jax.random.key(3)
    big = us.grow(small, plan)
    adam = optax.adam(LR)
    trained, state, losses = train(small, adam)
    grown, grown_state = us.grow(trained, plan), us.resize_state(state, plan)
    framed = us.scale_optimizer(adam, plan)
    found = {
        "scaled": us.scale_params(small, 1.3),
        "scaled unlike": us.scale_params(big, plan.factors),
        "compensated": us.compensate(apply, 1.0, 1.3)(us.scale_params(small, 1.3), INPUT),
        "grown": big,
        "noise": us.grow(small, plan, symmetry="noise", key=random),
        "uneven": us.grow(small, plan, symmetry="uneven"),
        "fresh": us.grow(small, plan, symmetry="zero_fan_out", key=random),
        "shrunk": us.shrink(big, plan),
        "pruned": pruned(place(params_of(*BIG)), plan, "wanda"),
        # Inputs are few, and rounding decides on weights that they do not tell apart.
        "refit": jnp.isfinite(apply(pruned(place(params_of(*BIG)), plan, "reconstruction"), INPUT)),
        "state": grown_state,
        "state without frame": us.resize_state(state, plan, optimizer=adam),
        "state shrunk": us.resize_state(grown_state, plan),
        "losses": np.asarray(losses),
        "losses grown": np.asarray(train(grown, framed, grown_state)[2]),
    }
    for name, tx in transformations(plan).items():
        after, _, losses = train(big, tx)
        found |= {name: after, f"losses {name}": np.asarray(losses)}
    return found
