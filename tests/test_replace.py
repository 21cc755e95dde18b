"""with_dot_general: every product by another function, and float8 training of any model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import uscale_jax as us


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def model(params, x):
    """Products in a scan, a checkpoint, a branch and a call; an einsum and a batched product."""

    def layer(h, w):
        return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(jax.checkpoint(layer), x, params["stack"])
    h = jax.lax.cond(jnp.sum(h) > 1e9, lambda h: h @ params["a"], lambda h: h @ params["b"], h)
    scores = jax.jit(lambda h: jnp.einsum("bti,bsi->bts", h, h))(h)
    return jax.nn.softmax(scores) @ h @ params["head"]


def model_args():
    params = {
        "stack": 0.3 * normal(0, 3, 12, 12),
        "a": normal(1, 12, 10),
        "b": 0.3 * normal(2, 12, 10),
        "head": 0.3 * normal(3, 10, 5),
    }
    return params, normal(4, 2, 7, 12)


def counting(seen):
    def dot_general(lhs, rhs, dimension_numbers, **settings):
        seen.append((lhs.shape, rhs.shape))
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, **settings)

    return dot_general


def test_every_product_is_replaced_and_nothing_else_changes():
    params, x = model_args()
    seen: list = []
    run = us.with_dot_general(model, counting(seen))
    np.testing.assert_allclose(jax.jit(run)(params, x), jax.jit(model)(params, x), 1e-6)
    assert {rhs for _, rhs in seen} == {(12, 12), (12, 10), (2, 7, 10), (10, 5)}
    loss = lambda run: lambda params: jnp.sum(jnp.sin(run(params, x)))  # noqa: E731
    found, own = (jax.jit(jax.grad(loss(each)))(params) for each in (run, model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), found, own)


def test_where_chooses():
    params, x = model_args()
    seen: list = []
    where = lambda value: value.name.startswith(("head", "stack"))  # noqa: E731
    jax.eval_shape(us.with_dot_general(model, counting(seen), where=where), params, x)
    assert {rhs for _, rhs in seen} == {(12, 12), (10, 5)}


def test_a_result_of_another_shape_is_refused():
    params, x = model_args()
    wrong = lambda lhs, rhs, numbers, **_: jnp.zeros((1, 2))  # noqa: E731
    with pytest.raises(TypeError, match=r"returned \(1, 2\) for .* Expected: \(2, 7, 12\)"):
        us.with_dot_general(model, wrong)(params, x)


def test_any_model_trains_in_float8_once_it_is_unit_scaled(standard_promotion):
    """Weights of 0.02/40 are below float8's range; the unit-scaled model is not."""
    params = {"up": 5e-4 * normal(0, 64, 96), "down": 5e-4 * normal(1, 96, 10)}
    x, labels = normal(2, 128, 64), np.random.default_rng(3).integers(0, 10, 128)

    def loss(params, x):
        h = jnp.tanh(2000 * (x @ params["up"])) @ params["down"] * 200
        return optax.softmax_cross_entropy_with_integer_labels(h, labels).mean()

    unit = us.unit_scale(loss, params, x)

    def train(loss, params, tx):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, x)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=30)[1])(params)

    tx, dot = optax.adam(2e-5), us.fp8_dot_general()
    exact = train(loss, params, tx)
    plain = train(us.with_dot_general(loss, dot), params, tx)
    scaled = train(us.with_dot_general(unit.apply, dot), unit.params, us.scale_optimizer(tx, unit))
    assert exact[-1] < 0.5 * exact[0]
    np.testing.assert_allclose(scaled, exact, atol=0.05)
    assert np.abs(plain - exact).max() > 0.2
