"""The frame the other way round: the small model trained with the big one's optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import uscale_jax as us
from tests.test_frame import EVEN, apply, planned, values

TRANSFORMS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.05, eps=1e-3, weight_decay=0.1),
    "lion": optax.lion(0.01, weight_decay=0.1),
    "rmsprop": optax.rmsprop(0.01, eps=1e-3),
}


def loss(params: Any, x: Any) -> Any:
    return jnp.mean(jnp.square(apply(params, x) - 1))


def trained(tx: Any, params: Any, state: Any, steps: int) -> tuple[Any, Any]:
    x = jnp.asarray(np.random.default_rng(3).standard_normal((6, 5)))
    state = tx.init(params) if state is None else state
    for _ in range(steps):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, state = tx.update(jax.grad(loss)(params, x), state, params)
            params = optax.apply_updates(params, updates)
    return params, state


def distance(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in pairs)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_small_model_trains_as_the_big_one_whose_units_are_copies(name):
    tx, plan = TRANSFORMS[name], planned(*EVEN)
    with jax.enable_x64(True):
        big, state = trained(tx, us.grow(values(dtype=np.float64), plan), None, 4)
        small, small_state = us.shrink(big, plan), us.resize_state(state, plan)
        loose, _ = trained(tx, small, small_state, 20)
        small, _ = trained(us.scale_optimizer(tx, plan), small, small_state, 20)
        wanted = us.shrink(trained(tx, big, state, 20)[0], plan)
        assert distance(small, wanted) < 1e-11
        assert distance(loose, wanted) > 1e-3


def selected() -> us.Plan:
    plan = planned(*EVEN)
    axes = {axis.name: axis.big for axis in plan.axes if axis.small != axis.big}
    return us.select(plan, {name: np.arange(size) * 7 % size for name, size in axes.items()})


def test_chosen_units_learn_at_rates_that_go_by_sizes():
    """Adam's rate is α·k for a kernel that sums over an axis that became k times smaller."""
    plan = selected()
    params = us.shrink(values(*EVEN), plan)
    tx = us.scale_optimizer(optax.scale(-1.0), plan)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    rates = {name: -float(np.unique(each)[0]) for name, each in updates.items()}
    assert rates == {"in": 1, "up": 2, "bias": 1, "down": 2, "gain": 1, "out": 2}


def test_the_moments_of_chosen_units_are_theirs():
    plan = selected()
    big, state = trained(optax.adam(0.1), values(*EVEN), None, 3)
    moments = us.resize_state(state, plan)[0]
    cut = us.shrink(big, plan)
    for name, leaf in plan.leaves.items():
        kept = [
            np.arange(size) if old is None else np.flatnonzero(old >= 0)
            for old, size in zip(leaf.maps, leaf.big, strict=True)
        ]
        np.testing.assert_array_equal(moments.mu[name], state[0].mu[name][np.ix_(*kept)])
        np.testing.assert_array_equal(moments.nu[name], state[0].nu[name][np.ix_(*kept)])
        np.testing.assert_allclose(cut[name], big[name][np.ix_(*kept)], rtol=1e-6)


def test_the_frame_of_chosen_units_survives_json():
    plan = selected()
    read = us.Plan.from_json(plan.to_json())
    assert read == plan
    assert read.kept == plan.kept
    params = us.shrink(values(*EVEN), read)
    both = [us.scale_optimizer(optax.adam(0.1), each) for each in (plan, read)]
    a, b = (trained(tx, params, None, 3)[0] for tx in both)
    assert distance(a, b) == 0
