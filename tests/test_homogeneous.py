"""Value scaling of homogeneous nets: what takes which power of k, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us

SIZES = (5, 7, 3, 4, 6)
ACTIVATIONS = {"linear": lambda x: x, "relu": lambda x: jnp.maximum(x, 0)}
NETS = [(depth, name) for depth in (2, 3, 4) for name in ACTIVATIONS]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def layers(depth: int) -> list[str]:
    return [f"Dense_{i}" for i in range(depth)]


def make_net(depth: int, activation: str):
    rng = np.random.default_rng(depth)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
    params = {
        name: {"kernel": normal(SIZES[i], SIZES[i + 1]), "bias": normal(SIZES[i + 1])}
        for i, name in enumerate(layers(depth))
    }

    def apply(params, x):
        for name in layers(depth)[:-1]:
            x = ACTIVATIONS[activation](x @ params[name]["kernel"] + params[name]["bias"][None])
        last = params[layers(depth)[-1]]
        return x @ last["kernel"] + last["bias"][None]

    return apply, params, normal(2, SIZES[0])


@pytest.mark.parametrize("k", [2.0, 0.5, 1.3])
@pytest.mark.parametrize(("depth", "activation"), NETS)
def test_outputs_and_gradients_take_the_powers_of_the_theory(depth, activation, k):
    """f → k^L f, weight gradients k^(L-1), bias gradients k^(L-l), cotangent fixed."""
    apply, params, x = make_net(depth, activation)
    exponents = us.homogeneous_exponents(params, layers(depth))
    scaled = us.scale_params(params, k, exponents=exponents.params)
    out, pullback = jax.vjp(lambda p: apply(p, x), params)
    out_scaled, pullback_scaled = jax.vjp(lambda p: apply(p, x), scaled)
    np.testing.assert_allclose(out_scaled, k**depth * out, rtol=1e-12)
    cotangent = jnp.cos(out)
    (grads,), (grads_scaled,) = pullback(cotangent), pullback_scaled(cotangent)
    for layer, name in enumerate(layers(depth), start=1):
        np.testing.assert_allclose(
            grads_scaled[name]["kernel"], k ** (depth - 1) * grads[name]["kernel"], rtol=1e-11
        )
        np.testing.assert_allclose(
            grads_scaled[name]["bias"], k ** (depth - layer) * grads[name]["bias"], rtol=1e-11
        )


@pytest.mark.parametrize(("depth", "activation"), NETS)
def test_biases_scaled_like_kernels_do_not_keep_the_direction(depth, activation):
    """The negative twin: plain scale_params on a net with biases is off by percents."""
    apply, params, x = make_net(depth, activation)
    wrong = apply(us.scale_params(params, 2.0), x) / 2.0**depth
    error = jnp.linalg.norm(wrong - apply(params, x)) / jnp.linalg.norm(apply(params, x))
    assert error > 0.01


@pytest.mark.parametrize("k", [2.0, 0.5, 1.3])
@pytest.mark.parametrize(("depth", "activation"), NETS)
def test_compensated_outputs_are_the_original_ones(depth, activation, k):
    apply, params, x = make_net(depth, activation)
    exponents = us.homogeneous_exponents(params, layers(depth))
    scaled = us.scale_params(params, k, exponents=exponents.params)
    out = us.compensate(apply, exponents, k)(scaled, x)
    if k == 1.3:
        np.testing.assert_allclose(out, apply(params, x), rtol=1e-13)
    else:  # powers of two: bit for bit
        np.testing.assert_array_equal(out, apply(params, x))


def test_exponents_that_add_up_to_zero_leave_the_function_alone():
    apply, params, x = make_net(2, "relu")
    exponents = us.homogeneous_exponents(params, {"Dense_0": 1.0, "Dense_1": -1.0})
    assert exponents.output == 0
    scaled = us.scale_params(params, 8.0, exponents=exponents.params)
    np.testing.assert_array_equal(apply(scaled, x), apply(params, x))
    assert not np.array_equal(scaled["Dense_0"]["bias"], params["Dense_0"]["bias"])
    np.testing.assert_array_equal(scaled["Dense_1"]["bias"], params["Dense_1"]["bias"])


def test_layers_with_factors_of_their_own():
    """b_l takes the product of the factors up to its layer: k = 2 with exponents 1, -2, 3."""
    apply, params, x = make_net(3, "relu")
    powers = {"Dense_0": 1.0, "Dense_1": -2.0, "Dense_2": 3.0}
    exponents = us.homogeneous_exponents(params, powers)
    assert [exponents.params[name]["bias"] for name in powers] == [1.0, -1.0, 2.0]
    scaled = us.scale_params(params, 2.0, exponents=exponents.params)
    np.testing.assert_array_equal(apply(scaled, x), 4 * apply(params, x))


def test_biases_are_told_by_the_caller_where_they_have_other_names():
    params = {"l1": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "l2": {"w": jnp.ones((3, 5))}}
    exponents = us.homogeneous_exponents(
        params, {"l2": 1.0, "l1": 1.0}, is_bias=lambda name: name.endswith("/b")
    )
    assert exponents.params["l1"] == {"w": 1.0, "b": 2.0}  # l1 comes second in the mapping


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Dense_0"], "leaf 'Dense_1/bias' lies in none"),
        (["Dense_0", "Dense_1", "Dense_2"], "layer 'Dense_2' holds no leaf"),
        (["Dense_0", "Dense_1", "Dense_1/bias"], "leaf 'Dense_1/bias' lies in 2"),
    ],
)
def test_layers_must_cover_every_leaf_once(names, message):
    _, params, _ = make_net(2, "relu")
    with pytest.raises(ValueError, match=message):
        us.homogeneous_exponents(params, names)


def test_compensate_outputs_of_several_parts():
    def apply(params, x):
        return {"logits": x @ params["w"], "features": x, "count": jnp.array(3)}

    params, x = {"w": jnp.eye(3)[:, :2]}, jnp.array([[1.0, 2.0, 3.0]])
    restored = us.compensate(apply, {"logits": 1, "features": 0, "count": 0}, 4.0)
    out = restored(us.scale_params(params, 4.0), x)
    np.testing.assert_array_equal(out["logits"], [[1.0, 2.0]])
    assert int(out["count"]) == 3
    with pytest.raises(TypeError, match="output 'count' is int64"):
        us.compensate(apply, 1, 4.0)(params, x)
    with pytest.raises(ValueError, match="exponents of the outputs does not fit"):
        us.compensate(apply, {"logits": 1}, 4.0)(params, x)


def test_compensate_keeps_output_dtypes_and_takes_traced_factors():
    def apply(params, x):
        return (x @ params["w"]).astype(jnp.bfloat16)

    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
    run = jax.jit(lambda k: us.compensate(apply, 1, k)(us.scale_params(params, k), x))
    assert run(4.0).dtype == jnp.bfloat16
    np.testing.assert_array_equal(run(4.0), apply(params, x))


def test_compensate_refuses_bad_factors_at_once():
    with pytest.raises(ValueError, match="k must be positive"):
        us.compensate(lambda p, x: x, 1, -1.0)


def test_training_the_compensated_net_needs_the_learning_rate_of_its_frame():
    """With Adam at α·k^e per leaf (ε = 0) it follows the unscaled net, step by step."""
    import optax

    apply, params, x = make_net(2, "relu")
    k, y = 4.0, jnp.cos(jnp.arange(6.0)).reshape(2, 3)
    exponents = us.homogeneous_exponents(params, layers(2))
    factors = jax.tree.map(lambda e: k**-e, exponents.params)

    def losses(apply, params, tx) -> list[float]:
        state, out = tx.init(params), []
        for _ in range(20):
            loss, grads = jax.value_and_grad(lambda p: jnp.sum((apply(p, x) - y) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            out.append(float(loss))
        return out

    with jax.numpy_dtype_promotion("standard"):
        plain = losses(apply, params, optax.adam(0.01, eps=0))
        scaled = losses(
            us.compensate(apply, exponents, k),
            us.scale_params(params, k, exponents=exponents.params),
            optax.chain(optax.adam(0.01, eps=0), us.unit_scale_lr(factors)),
        )
        unscaled_lr = losses(
            us.compensate(apply, exponents, k),
            us.scale_params(params, k, exponents=exponents.params),
            optax.adam(0.01, eps=0),
        )
    np.testing.assert_allclose(scaled, plain, rtol=1e-10)
    assert not np.allclose(unscaled_lr, plain, rtol=1e-2)
