"""Activations, attention, norms, sums, residual branches and losses; every transformation."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import integrate, stats

from uscale_jax import numerics as un

FREE = {"constraint": None}
KEY = jax.random.key(3)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (20, 90)))
LABELS = jnp.asarray(np.random.default_rng(0).integers(0, 1000, 300))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def scales(f, *operands):
    """The RMS of the output and of every gradient, of unit normal cotangents."""
    operands = [normal(i, *x) if isinstance(x, tuple) else x for i, x in enumerate(operands)]
    out, pull = jax.vjp(jax.jit(f), *operands)
    return [rms(out), *map(rms, pull(normal(99, *out.shape)))]


def test_relu_and_gelu_have_their_closed_forms():
    relu = un.activation_scales(jax.nn.relu)
    wanted = (math.sqrt(2 / (1 - 1 / math.pi)), math.sqrt(2), math.sqrt(2))
    np.testing.assert_allclose(relu, wanted, rtol=1e-7)
    square = 1 / 3 + 1 / (2 * math.pi * math.sqrt(3))
    gelu = un.activation_scales(partial(jax.nn.gelu, approximate=False))
    assert gelu.gate == pytest.approx(square**-0.5, rel=1e-6)
    assert gelu.output == pytest.approx((square - 1 / (4 * math.pi)) ** -0.5, rel=1e-6)


# What the paper prints, to three digits of the factors' inverses.
PUBLISHED = {
    jax.nn.relu: (1.714, 1.414),
    jax.nn.gelu: (1.702, 1.481),
    jax.nn.silu: (1.788, 1.623),
    jnp.tanh: (1.593, 1.467),
    jax.nn.sigmoid: (4.803, 4.722),
}


@pytest.mark.parametrize("f", PUBLISHED, ids=lambda f: f.__name__)
def test_constants_are_the_published_ones(f):
    np.testing.assert_allclose(un.activation_scales(f)[:2], PUBLISHED[f], rtol=1e-3)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("f", "same", "mult"),
    [(jax.nn.silu, lambda x: x * sigmoid(x), 0.3), (jax.nn.sigmoid, sigmoid, 2.5)],
)
def test_constants_agree_with_adaptive_quadrature(f, same, mult):
    def mean(g):
        return integrate.quad(lambda x: g(x) * stats.norm.pdf(x), -12, 12, epsabs=1e-13)[0]

    slope = lambda x: (same(mult * x + 1e-5) - same(mult * x - 1e-5)) / 2e-5  # noqa: E731
    variance = mean(lambda x: same(mult * x) ** 2) - mean(lambda x: same(mult * x)) ** 2
    found = un.activation_scales(f, mult)
    assert found.output == pytest.approx(mult * variance**-0.5, rel=1e-6)
    assert found.grad == pytest.approx(mean(lambda x: slope(x) ** 2) ** -0.5, rel=1e-6)


def test_kinks_anywhere_cost_less_than_1e_4():
    for at in (0.3141, -1.27, 2 / 3):
        found = un.activation_scales(lambda x, at=at: jnp.maximum(x - at, 0)).grad
        assert found == pytest.approx(stats.norm.sf(at) ** -0.5, rel=1e-4)


def test_constants_are_computed_once_and_in_the_middle_of_a_trace():
    calls = []

    def f(x):
        calls.append(x)
        return jnp.sin(x)

    for _ in range(3):
        jax.jit(jax.vmap(jax.grad(lambda x: un.activation(f, **FREE)(x))))(normal(0, 5))
    assert len(calls) == 1 + 3  # once for its constants


@pytest.mark.parametrize("mult", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("name", ["gelu", "silu", "relu", "tanh", "sigmoid"])
def test_activations_have_scale_one_in_both_directions(name, mult):
    x, g = normal(0, 90_000), normal(1, 90_000)
    y, pull = jax.vjp(jax.jit(partial(getattr(un, name), mult=mult, **FREE)), x)
    np.testing.assert_allclose([jnp.std(y), rms(pull(g)[0])], 1, atol=0.02)
    plain = {"tanh": jnp.tanh}.get(name) or getattr(jax.nn, name)
    np.testing.assert_allclose(y / y[0], plain(mult * x) / plain(mult * x[0]), rtol=1e-3, atol=1e-4)
    assert jnp.std(plain(mult * x) / mult) < 0.95


def test_blends_of_the_limits_are_as_far_off_as_measured():
    """Graphcore's factors over those here: what its outputs and gradients have been measured at."""

    def blend(a, lower, upper):
        return math.exp(a * math.log(upper) + (1 - a) * math.log(lower))

    relu = math.sqrt(2 / (1 - 1 / math.pi))
    for f, weight, wanted in (
        (jax.nn.gelu, 1 / 4, {0.25: (1.005, 0.999), 1: (1.041, 1.026), 4: (1.015, 1.018)}),
        (jax.nn.silu, 1, {0.25: (0.985, 1.009), 1: (0.991, 1.036), 4: (1.022, 1.025)}),
    ):
        for m, ratios in wanted.items():
            here, a = un.activation_scales(f, m), 1 / (1 + weight / m**2)
            output, grad = blend(1 / (1 + 0.25 / m**2), 2, relu), blend(a, 2, 2**0.5)
            found = output / here.output, grad / here.grad
            np.testing.assert_allclose(found, ratios, rtol=0.03, err_msg=f"{f} {m}")
    for n, m, out, grad in ((64, 1, 0.80, 0.97), (1024, 1, 0.65, 0.81), (1024, 4, 1.04, 1.01)):
        a = 1 / (1 + 4 / m**2)
        table = blend(a, n, math.sqrt(n)), blend(a, n / m, math.sqrt(n / m))
        probe = partial(un.softmax, mult=m, **FREE)
        y, pull = jax.vjp(probe, jnp.zeros(n))
        s, b = float(y[0]) * n, float(-pull(jnp.eye(n)[0])[0][1]) * n**2
        std = math.sqrt(s**-2 - n**-2)  # about the mean, where s is for the mean square
        found = table[0] * std, table[1] * m / b
        np.testing.assert_allclose(found, (out, grad), rtol=0.03)


@pytest.mark.parametrize(("n", "mult"), [(2, 0.5), (7, 1.0), (64, 1.0), (500, 3.0)])
def test_softmax_has_scale_one_for_every_number_of_classes(n, mult):
    x = (200_000 // n, n)
    found = scales(lambda x: un.softmax(x, mult=mult, **FREE), x)
    np.testing.assert_allclose(found, 1, atol=0.05)
    assert max(scales(lambda x: jax.nn.softmax(mult * x), x)) < 0.8


ATTENTION = {
    "all": ({}, (12, 40, 5, 32), (12, 40, 5, 32), 32),
    "causal": ({"is_causal": True}, (12, 40, 5, 32), (12, 40, 5, 32), 32),
    "grouped queries, other sizes": ({}, (12, 30, 6, 32), (12, 40, 2, 32), 24),
    "dropout": ({"dropout_rate": 0.4, "dropout_rng": KEY}, (12, 30, 4, 32), (12, 40, 4, 32), 24),
}


@pytest.mark.parametrize(
    ("case", "mult"), [*((case, 4.0) for case in ATTENTION), ("all", 1.0), ("causal", 1.0)]
)
def test_attention_has_scale_one_in_both_directions(case, mult):
    options, q, k, size = ATTENTION[case]
    f = partial(un.attention, mult=mult, **options, **FREE)
    found = scales(lambda *x: f(*x), q, k, (*k[:-1], size))
    np.testing.assert_allclose(found, 1, atol=0.06, err_msg=f"{case}: {found}")


def test_attentions_default_is_what_has_been_measured():
    shape = (2, 512, 4, 64)
    for options, wanted in (
        ({"is_causal": True}, (0.114 / 1.037, 0.114 / 1.037, 1.046 / 1.037)),
        ({"is_causal": True, "mult": 8.0}, (0.807 / 0.953, 0.812 / 0.953, 0.944 / 0.953)),
    ):
        out, *grads = scales(
            partial(lambda q, k, v, o: un.attention(q, k, v, **o), o=options), *[shape] * 3
        )
        assert out == pytest.approx(1, abs=0.03)
        np.testing.assert_allclose(np.divide(grads, out), wanted, rtol=0.05)


def test_attention_is_jaxs_times_a_factor():
    q, k, v, g = (normal(i, 2, 9, 4, 8) for i in range(4))
    k, v = k[:, :, :2], v[:, :, :2]
    mask = jnp.asarray(np.random.default_rng(0).random((2, 1, 9, 9)) < 0.7)
    bias = normal(5, 4, 9, 9)
    f = partial(un.attention, bias=bias, mask=mask, is_causal=True, mult=2.0)
    y, pull = jax.vjp(jax.jit(f), q, k, v)
    plain = partial(
        jax.nn.dot_product_attention, bias=bias[None], mask=mask, is_causal=True, scale=0.25
    )
    wanted, pull_plain = jax.vjp(jax.jit(plain), q, k, v)
    s = y[0, 0, 0, 0] / wanted[0, 0, 0, 0]
    for a, b in zip((y, *pull(g)), (wanted, *pull_plain(g)), strict=True):
        np.testing.assert_allclose(a, s * b, rtol=1e-4, atol=1e-5)


def test_attention_decodes_with_the_factor_of_training():
    """Position by position, over a cache of keys with a mask, as all at once."""
    q, k, v = (normal(i, 7, 2, 4) for i in range(3))
    s = un.attention_scale(7, 4, is_causal=True)
    once = un.attention(q, k, v, is_causal=True)

    def step(i):
        seen = jnp.arange(7)[None, None] <= i
        return un.attention(q[i][None], k, v, mask=seen, scale=s)[0]

    np.testing.assert_allclose(jax.vmap(step)(jnp.arange(7)), once, rtol=1e-5)


def test_flax_takes_attention_in_place_of_its_own():
    layer = nnx.MultiHeadAttention(
        4, 16, decode=False, attention_fn=un.attention, rngs=nnx.Rngs(0), dropout_rate=0.1
    )
    x = normal(0, 2, 9, 16)
    run = nnx.jit(lambda layer, rngs=None: layer(x, deterministic=rngs is None, rngs=rngs))
    quiet, loud = run(layer), run(layer, nnx.Rngs(1))
    assert quiet.shape == x.shape
    assert jnp.any(quiet != loud)


def test_dropout_keeps_the_mean_square():
    f = partial(un.dropout, rate=0.3, rng=KEY)
    np.testing.assert_allclose(scales(f, (300, 400)), 1, atol=0.02)
    kept = un.dropout(jnp.ones((40, 50)), 0.75, KEY, broadcast_dims=(0,))
    assert set(np.unique(kept).tolist()) == {0.0, 2.0}
    np.testing.assert_array_equal(kept, jnp.broadcast_to(kept[:1], kept.shape))
    assert jnp.all(un.dropout(jnp.ones(5), 0.0) == 1)
    many = un.dropout(jnp.ones(40_000), 0.75, KEY)  # evaluation is the mean of training
    mean = un.dropout(jnp.ones(5), 0.75, deterministic=True)
    np.testing.assert_allclose(mean, jnp.full(5, jnp.mean(many)), rtol=0.03)


ONE, ZERO = jnp.ones, jnp.zeros
LAYERS = {
    "layer_norm": (un.layer_norm, (300, 400), ONE(400), ZERO(400)),
    "layer_norm of axes": (
        partial(un.layer_norm, axis=(0, -1)),
        (30, 70, 20),
        ONE((30, 20)),
        ZERO((30, 20)),
    ),
    "rms_norm": (un.rms_norm, (300, 400), ONE(400)),
    "embedding": (partial(un.embedding, IDS), (50, 70)),
    "add": (partial(un.add, **FREE), (300, 200), (300, 200)),
    "add, broadcast": (partial(un.add, **FREE), (20, 1500, 4), (1500, 1)),
    "silu_glu": (partial(un.silu_glu, **FREE), (300, 400), (300, 400)),
    "glu": (lambda x, g: un.glu(x, g, jax.nn.gelu, mult=2.0, **FREE), (300, 400), (300, 400)),
    "residual, τ = 0.2": (lambda x, w: residual(x, w, 0.2), (300, 100), (100, 100)),
    "residual, τ = 3": (lambda x, w: residual(x, w, 3.0), (300, 100), (100, 100)),
}


def residual(x, w, tau):
    branch, skip = un.residual_split(x, tau)
    return un.residual_add(un.linear(branch, w), skip, tau)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_scale_one_in_both_directions(name):
    f, *operands = LAYERS[name]
    found = scales(f, *operands)
    np.testing.assert_allclose(found, 1, atol=0.05, err_msg=f"{name}: {found}")


def test_without_factors_they_do_not():
    heads = (12, 40, 5, 32)
    for f, *operands in (
        (lambda *x: jax.nn.dot_product_attention(*x), heads, heads, heads),
        (lambda t: t[IDS], (50, 70)),
        (lambda a, b: a + b[None], (300, 200), (200,)),
        (lambda x, w, tau=3.0: x + tau * x @ w / 10, (300, 100), (100, 100)),
        (lambda x, g: x * jax.nn.silu(g), (300, 400), (300, 400)),
    ):
        assert max(abs(s - 1) for s in scales(f, *operands)) > 0.3
    x, w, b = normal(0, 300, 400), jnp.ones(400), jnp.zeros(400)
    with un.true_gradients():
        assert min(scales(un.layer_norm, x, w, b)[2:]) > 10


def test_adds_default_is_what_has_been_measured():
    np.testing.assert_allclose(scales(un.add, (512, 256), (512, 256)), (1, 0.707, 0.707), rtol=0.03)
    found = scales(un.add, (512, 256), (256,))
    np.testing.assert_allclose(found, (1.01, 0.705, 15.95), rtol=0.08)  # 256 numbers: ± 5 %
    np.testing.assert_array_equal(un.add(jnp.arange(3.0), 2), jnp.arange(3.0) + 2)
    np.testing.assert_array_equal(un.add(jnp.ones(3), jnp.full((1,), 2.0)), jnp.full(3, 3.0))


def test_a_residual_stream_has_true_gradients_and_rounds_once():
    w = [normal(i, 60, 60) for i in range(4)]

    def stream(params):
        x = params["x"]
        for (attention, mlp), u, v in zip(un.residual_taus(2), w[:2], w[2:], strict=True):
            x = residual(residual(x, u, attention), v, mlp)
        return x

    found = un.verify_gradients(jax.jit(stream), {"x": normal(9, 50, 60)})["x"]
    np.testing.assert_allclose(found, (1, 1), rtol=1e-6)
    a, b = (normal(i, 400).astype(jnp.bfloat16) for i in range(2))
    once = (a.astype(jnp.float32) * 0.6 + b.astype(jnp.float32) * 0.8).astype(jnp.bfloat16)
    np.testing.assert_array_equal(un.residual_add(a, b, 0.75) == once, np.ones(400, bool))


@pytest.mark.parametrize(("mult", "ratio"), [(1.0, 1.0), (0.5, 2.0)])
def test_residual_taus_are_the_published_rule(mult, ratio):
    layers = 5
    mlp = mult * math.sqrt(2 / (1 + ratio**2))
    attention = ratio * mlp
    for i, tau in enumerate(np.ravel(un.residual_taus(layers, mult, ratio))):
        before = (i + 1) // 2 * attention**2 + i // 2 * mlp**2
        own = mlp if i % 2 else attention
        assert tau == pytest.approx(own / math.sqrt(layers + before), rel=1e-12)
    # What each branch contributes in the end, over the embedding.
    taus = np.ravel(un.residual_taus(layers, mult, ratio))
    parts = [t**2 * np.prod(1 + taus[:i] ** 2) for i, t in enumerate(taus)]
    assert sum(parts[::2]) == pytest.approx(attention**2)
    assert sum(parts[1::2]) == pytest.approx(mlp**2)


@pytest.mark.parametrize(("mult", "loss", "scale"), [(1.0, 7.41, 1.001), (4.0, 13.97, 1.127)])
def test_cross_entropy(mult, loss, scale):
    z = normal(0, 300, 1000)
    f = partial(un.cross_entropy, labels=LABELS, mult=mult)
    y, g = jax.jit(jax.value_and_grad(f))(z)
    assert (y, rms(g)) == (pytest.approx(loss, rel=0.04), pytest.approx(scale, rel=0.01))
    each = f(z, reduction="none")
    np.testing.assert_allclose(jnp.mean(each), y, rtol=1e-5)
    np.testing.assert_allclose(f(z.T, axis=0, reduction="sum"), 300 * y, rtol=1e-5)
    exact = jax.nn.logsumexp(mult * z, 1) - mult * z[jnp.arange(300), LABELS]
    np.testing.assert_allclose(each, exact, rtol=1e-5, atol=1e-4)
    outside = un.cross_entropy(z[:2], jnp.array([-1, 1000]), reduction="none")
    assert jnp.all(jnp.isnan(outside))


def test_mse():
    x, y = normal(0, 300, 200), normal(1, 300, 200)
    loss, grads = jax.value_and_grad(un.mse, (0, 1))(x, y)
    assert loss == pytest.approx(2, rel=0.02)
    np.testing.assert_allclose([*map(rms, grads)], 1, atol=0.02)
    assert un.mse(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("mult", [0.5, 1.0, 3.0])
def test_softmax_under_a_constraint_has_the_gradients_of_what_it_returns(mult):
    x, g = normal(3, 11, 7), normal(4, 11, 7)
    y, pull = jax.vjp(lambda x: un.softmax(x, mult=mult), x)
    s = float(jnp.sum(y[0]))
    own, plain = jax.vjp(lambda x: s * jax.nn.softmax(mult * x), x)
    np.testing.assert_allclose(y, own, 1e-5)
    np.testing.assert_allclose(pull(g)[0], plain(g)[0], 1e-4, 1e-6)
