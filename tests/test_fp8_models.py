"""float8 products in models: programs, layers of Flax, shardings, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from tests.test_fp8 import E4M3, LINEAR, close, normal, rounded
from uscale_jax.numerics._fp8 import fp8_dot_general
from uscale_jax.numerics._simulate import simulate_format


def two_layers(dot, w, x):
    layer = lambda x: jnp.tanh(dot(x, w, (((x.ndim - 1,), (0,)), ((), ()))))  # noqa: E731
    return layer(layer(x))


def scanned(dot, w, x):
    layer = jax.checkpoint(lambda x: two_layers(dot, w, x))
    return jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=2)[0]


def mapped(dot, w, x):
    return jax.vmap(lambda x: two_layers(dot, w, x))(x)


def mapped_weights(dot, w, x):
    ws = jnp.stack([w, 2 * w])
    return jnp.sum(jax.vmap(lambda w: two_layers(dot, w, x))(ws), 0)


@pytest.mark.parametrize("program", [two_layers, scanned, mapped, mapped_weights])
def test_models_and_their_gradients_are_those_of_simulated_products(program):
    """Two implementations: products of float8, and of float32 rounded by arithmetic."""
    w, x = normal(0, 6, 6, std=0.5), normal(1, 4, 6)
    cost = lambda f: jax.jit(jax.value_and_grad(lambda w, x: jnp.sum(f(w, x) ** 2), (0, 1)))  # noqa: E731
    found = cost(lambda w, x: program(fp8_dot_general(), w, x))(w, x)
    want = cost(simulate_format(lambda w, x: program(jax.lax.dot_general, w, x), E4M3))(w, x)
    plain = cost(lambda w, x: program(jax.lax.dot_general, w, x))(w, x)
    for a, b, c in zip(*map(jax.tree.leaves, (found, want, plain)), strict=True):
        close(a, b, 1e-5)
        with pytest.raises(AssertionError):
            close(a, c, 1e-3)


LAYERS = {
    "Linear": lambda **dot: nnx.Linear(6, 5, **dot, rngs=nnx.Rngs(0)),
    "Linear, result preferred": lambda dot_general: nnx.Linear(
        6,
        5,
        use_bias=False,
        dtype=jnp.bfloat16,
        preferred_element_type=jnp.float32,
        dot_general=dot_general,
        rngs=nnx.Rngs(0),
    ),
    "LinearGeneral": lambda **dot: nnx.LinearGeneral(
        (3, 6), (2, 5), axis=(-2, -1), **dot, rngs=nnx.Rngs(0)
    ),
    "MultiHeadAttention": lambda dot_general: nnx.MultiHeadAttention(
        2,
        6,
        qkv_dot_general=dot_general,
        out_dot_general=dot_general,
        decode=False,
        rngs=nnx.Rngs(0),
    ),
}


def simulated_dot(lhs, rhs, numbers, **settings):
    product = lambda lhs, rhs: jax.lax.dot_general(lhs, rhs, numbers, **settings)  # noqa: E731
    return simulate_format(product, E4M3)(lhs, rhs)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_nnx(name):
    """Against the same layers with products of float32 that are rounded by arithmetic."""
    x = normal(0, 4, 3, 6)
    cost = nnx.jit(nnx.value_and_grad(lambda layer: jnp.sum(jnp.sin(layer(x)))))
    dots = fp8_dot_general(), simulated_dot, jax.lax.dot_general
    found, want, plain = (jax.tree.leaves(cost(LAYERS[name](dot_general=dot))) for dot in dots)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert any(float(jnp.max(jnp.abs(a - c))) > 1e-3 for a, c in zip(found, plain, strict=True))


@pytest.mark.parametrize("kind", [linen.Dense, linen.DenseGeneral])
def test_layers_of_linen(kind):
    x = normal(0, 4, 6)
    layer = kind(5, dot_general=fp8_dot_general(rhs_scale=4.0))
    params = layer.init(jax.random.key(0), x)
    kernel = params["params"]["kernel"]
    close(layer.apply(params, x), rounded(x, E4M3) @ rounded(kernel, E4M3, 4) / 4)
    gradient = jax.grad(lambda p: jnp.sum(3 * layer.apply(p, x)))(params)["params"]
    close(gradient["kernel"], rounded(x, E4M3).T @ np.full((4, 5), 3.0))
    close(gradient["bias"], np.full(5, 12.0))


def test_a_model_learns_in_float8(standard_promotion):
    dot = fp8_dot_general(rhs_scale=4.0, grad_scale=64.0)
    model = nnx.Sequential(
        nnx.Linear(6, 32, dot_general=dot, rngs=nnx.Rngs(0)),
        jnp.tanh,
        nnx.Linear(32, 1, dot_general=dot, rngs=nnx.Rngs(1)),
    )
    x = normal(0, 128, 6)
    target = np.sin(x[:, :1] + x[:, 1:2])
    graph, params = nnx.split(model)
    tx = optax.adam(1e-2)

    @jax.jit
    def train(params):
        cost = lambda params: jnp.mean((nnx.merge(graph, params)(x) - target) ** 2)  # noqa: E731

        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(cost)(params)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), None, length=200)[1]

    losses = train(params)
    assert float(losses[-1]) < 0.1 * float(losses[0])


def test_models_of_equal_settings_are_compiled_once():
    first, second, other = (fp8_dot_general(rhs_scale=s) for s in (4, 4.0, 2.0))
    assert first == second != other
    assert hash(first) == hash(second)
    traced = []

    @nnx.jit
    def run(model, x):
        traced.append(None)
        return model(x)

    for dot in (first, second):
        run(nnx.Linear(6, 5, dot_general=dot, rngs=nnx.Rngs(0)), normal(0, 4, 6))
    assert len(traced) == 1


@pytest.mark.parametrize("check", [True, False])
def test_gradients_under_shard_map(check):
    dot = partial(fp8_dot_general(), dimension_numbers=LINEAR)
    x, w = normal(0, 8, 6), normal(1, 6, 5)
    cost = lambda x, w: jnp.sum(jnp.tanh(dot(x, w)))  # noqa: E731
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    local = lambda x, w: jax.lax.psum(cost(x, w), "rows")  # noqa: E731
    specs = {"in_specs": (jax.P("rows"), jax.P()), "out_specs": jax.P()}
    sharded = jax.shard_map(local, mesh=mesh, check_vma=check, **specs)
    for a, b in zip(*(jax.grad(f, (0, 1))(x, w) for f in (sharded, cost)), strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("lhs", "rhs", "out"),
    [
        (jax.P("data", None), jax.P(None, "model"), None),
        (jax.P("data", "model"), jax.P("model", None), jax.P("data", None)),
    ],
)
def test_shardings_in_types(lhs, rhs, out):
    dot = partial(fp8_dot_general(), dimension_numbers=LINEAR, out_sharding=out)
    plain = partial(fp8_dot_general(), dimension_numbers=LINEAR)
    x, w = normal(0, 8, 8), normal(1, 8, 12)
    want = jax.grad(lambda x, w: jnp.sum(jnp.tanh(plain(x, w))), (0, 1))(x, w)
    mesh = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    with jax.set_mesh(mesh):
        given = [
            jax.device_put(v, jax.NamedSharding(mesh, spec)) for v, spec in ((x, lhs), (w, rhs))
        ]
        cost = lambda x, w: jnp.sum(jnp.tanh(dot(x, w)))  # noqa: E731
        found = jax.jit(jax.grad(cost, (0, 1)))(*given)
    assert [jax.typeof(g).sharding.spec for g in found] == [lhs, rhs]
    for a, b in zip(found, want, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"forward": "e4m3"},
            ValueError,
            "'e4m3' is no number format that is known.*float8_e4m3fn",
        ),
        ({"forward": "bfloat16"}, ValueError, "forward is bfloat16, of 16 bits.*simulate_format"),
        ({"backward": jnp.float32}, ValueError, "backward is float32, of 32 bits"),
        ({"lhs_scale": 0.0}, ValueError, "lhs_scale must be positive and finite"),
        ({"rhs_scale": np.inf}, ValueError, "rhs_scale must be positive and finite"),
        ({"grad_scale": np.nan}, ValueError, "grad_scale must be positive and finite"),
        ({"out_multiplier": -1.0}, ValueError, "out_multiplier must be positive and finite"),
        ({"lhs_scale": np.ones(2)}, ValueError, "lhs_scale must be a scalar"),
        ({"lhs_scale": "1"}, TypeError, "lhs_scale must be a positive finite real scalar"),
        (
            {"lhs_scale": 1e30, "rhs_scale": 1e30},
            ValueError,
            "out_multiplier over the product of its scales must be positive and finite",
        ),
        ({"dtype": jnp.float8_e5m2}, TypeError, "result of fp8_dot_general cannot be float8_e5m2"),
        ({"dtype": jnp.int32}, TypeError, "result of fp8_dot_general cannot be int32"),
    ],
)
def test_settings_that_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        fp8_dot_general(**settings)


def test_scales_are_known_before_compilation():
    x = normal(0, 3, 3)
    run = lambda s: fp8_dot_general(rhs_scale=s)(x, x, LINEAR)  # noqa: E731
    with pytest.raises(TypeError, match="rhs_scale is traced.*a number known before compilation"):
        jax.jit(run)(2.0)
    assert run(jnp.float32(2.0)).shape == (3, 3)


def test_operands_that_are_refused():
    dot, x = fp8_dot_general(), jnp.ones((3, 3), jnp.float32)
    with pytest.raises(TypeError, match="fp8_dot_general's rhs is float8_e4m3fn already.*Fix: "):
        dot(x, x.astype(jnp.float8_e4m3fn), LINEAR)
    with pytest.raises(TypeError, match="fp8_dot_general's lhs must be floating, got .*int32"):
        dot(jnp.ones((3, 3), jnp.int32), x, LINEAR)
    with pytest.raises(TypeError, match="contracting dimensions to have the same shape"):
        dot(x, jnp.ones((4, 3), jnp.float32), LINEAR)
    with pytest.raises(TypeError, match="cannot be float8_e5m2"):
        dot(x, x, LINEAR, preferred_element_type=jnp.float8_e5m2)


def test_derivatives_that_are_refused():
    x = normal(0, 3, 3)
    cost = lambda x: jnp.sum(fp8_dot_general()(x, x, LINEAR) ** 2)  # noqa: E731
    with pytest.raises(TypeError, match="gradients of fp8_dot_general have no derivative"):
        jax.hessian(cost)(x)
    with pytest.raises(TypeError, match="gradients of fp8_dot_general have no derivative"):
        jax.grad(lambda x: jnp.sum(jax.grad(cost)(x)))(x)
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(cost, (x,), (x,))
