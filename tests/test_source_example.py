"""The example unit scaling was first shown on: two Dense(1000) layers, Adam at 0.001.

Scale the parameters by k = 0.5 and double the learning rate, or by 2 and halve it.  These tests
say precisely what that keeps and what it does not (float64, random data, one output cotangent).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import uscale_jax as us

pytestmark = pytest.mark.usefixtures("standard_promotion")

LR = 1e-3
TINY = 1e-30  # Adam's ε: not 0, which makes 0/0 of the gradients of dead ReLU units


class Net(nn.Module):
    """``depth`` Dense layers with ReLU between them."""

    depth: int = 2
    features: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(self.depth):
            x = nn.Dense(self.features, param_dtype=jnp.float64, name=f"Dense_{layer}")(x)
            x = nn.relu(x) if layer < self.depth - 1 else x
        return x


class Step(NamedTuple):
    """Norms at the first optimizer step."""

    output: jax.Array
    function_step: jax.Array
    weight_update: float
    weight: float


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def setup(depth: int = 2, features: int = 1000):
    net = Net(depth, features)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 784)))
    params = net.init(jax.random.key(0), x)["params"]
    nonzero = lambda path, leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)  # noqa: E731
    return (lambda p, x: net.apply({"params": p}, x)), jax.tree.map_with_path(nonzero, params), x


def first_step(apply, params, x, tx) -> Step:
    """The optimizer's first step with a fixed output cotangent, and what it does to the output."""
    out, pullback = jax.vjp(lambda p: apply(p, x), params)
    (grads,) = pullback(jnp.cos(jnp.arange(out.size)).reshape(out.shape))
    updates, _ = tx.update(grads, tx.init(params), params)
    _, change = jax.jvp(lambda p: apply(p, x), (params,), (updates,))
    kernels = lambda tree: optax.tree.norm([tree[name]["kernel"] for name in tree])  # noqa: E731
    return Step(out, change, float(kernels(updates)), float(kernels(params)))


def scaled_by(k: float, apply, params, x, adam) -> Step:
    """The same for kernels × k and biases × k^l, learning rates α/k and, for biases, α·k^(l-2)."""
    exponents = us.homogeneous_exponents(params, sorted(params)).params
    slower = us.unit_scale_lr(jax.tree.map(lambda e: k ** (2 - e), exponents))
    scaled = us.scale_params(params, k, exponents=exponents)
    return first_step(apply, scaled, x, optax.chain(adam, slower))


@pytest.mark.parametrize("k", [0.5, 2.0])
def test_what_the_example_keeps(k):
    """With two layers, Adam's first-order function step is the same at α/k: exact for ε → 0."""
    apply, params, x = setup()
    adam = optax.adam(LR, eps=TINY)
    plain, scaled = first_step(apply, params, x, adam), scaled_by(k, apply, params, x, adam)
    assert jnp.linalg.norm(plain.function_step) > 1
    np.testing.assert_allclose(scaled.function_step, plain.function_step, rtol=1e-9)


@pytest.mark.parametrize("k", [0.5, 2.0])
def test_what_the_example_does_not_keep(k):
    apply, params, x = setup()
    adam = optax.adam(LR, eps=TINY)
    plain, scaled = first_step(apply, params, x, adam), scaled_by(k, apply, params, x, adam)
    np.testing.assert_allclose(scaled.output, k**2 * plain.output, rtol=1e-10, atol=1e-12)
    relative = scaled.weight_update / scaled.weight / (plain.weight_update / plain.weight)
    assert relative == pytest.approx(k**-2, rel=1e-9)


@pytest.mark.parametrize("k", [0.5, 2.0])
def test_with_three_layers_the_step_is_k_times_larger(k):
    """The negative twin: α/k keeps the function step of two layers only."""
    apply, params, x = setup(depth=3, features=90)
    adam = optax.adam(LR, eps=TINY)
    plain = first_step(apply, params, x, adam).function_step
    scaled = scaled_by(k, apply, params, x, adam).function_step
    np.testing.assert_allclose(scaled, k * plain, rtol=1e-9)


@pytest.mark.parametrize("k", [0.5, 2.0])
def test_inference_after_compensation_is_the_original(k):
    apply, params, x = setup()
    exponents = us.homogeneous_exponents(params, sorted(params))
    scaled = us.scale_params(params, k, exponents=exponents.params)
    restored = us.compensate(apply, exponents, k)(scaled, x)
    np.testing.assert_array_equal(restored, apply(params, x))  # powers of two: bit for bit


@pytest.mark.parametrize("k", [0.5, 2.0])
def test_adams_epsilon_breaks_it_a_little_in_practice(k):
    apply, params, x = setup()
    adam = optax.adam(LR)
    plain, scaled = first_step(apply, params, x, adam), scaled_by(k, apply, params, x, adam)
    error = jnp.linalg.norm(scaled.function_step - plain.function_step)
    assert 0 < error / jnp.linalg.norm(plain.function_step) < 1e-5
