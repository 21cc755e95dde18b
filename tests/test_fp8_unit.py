"""Unit-scaled float8 products: scale one, factors within products, Flax, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from tests.test_fp8 import E4M3, E5M2, LINEAR, close, kinds, normal, rounded
from uscale_jax import numerics as un
from uscale_jax.numerics._fp8 import fp8_dot_general

HEADS = (((2,), (0,)), ((), ()))
JOINED = (((2, 3), (0, 1)), ((), ()))
BATCHED = (((1,), (2,)), ((2,), (0,)))

# (dimensions, shapes of activations and weights, and of what sums run over: output, gradients).
PRODUCTS = {
    "linear": (LINEAR, (300, 96), (96, 224), (96, 224, 300)),
    "heads": (HEADS, (3, 110, 90), (90, 5, 40), (90, 200, 330)),
    "heads joined": (JOINED, (3, 110, 5, 18), (5, 18, 140), (90, 140, 330)),
    "batches": (BATCHED, (80, 110, 6), (6, 70, 110), (110, 70, 80)),
}


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def pulled(dot, numbers, *shapes):
    """The operands and cotangent, and the output and both gradients."""
    x, w = normal(0, *shapes[0]), normal(1, *shapes[1])
    y, pull = jax.vjp(jax.jit(lambda x, w: dot(x, w, numbers)), x, w)
    g = normal(2, *y.shape)
    return (x, w, g), (y, *pull(g))


def exact(numbers, x, w, g):
    """The three products of rounded operands, in float64."""
    x8, w8, g8 = rounded(x, E4M3), rounded(w, E4M3), rounded(g, E5M2)
    with jax.enable_x64(True):
        product = lambda x, w: jax.lax.dot_general(x, w, numbers)  # noqa: E731
        y, pull = jax.vjp(product, x8, w8)
        return (y, *pull(jnp.asarray(g8)))


@pytest.mark.parametrize("name", PRODUCTS)
def test_outputs_and_gradients_have_scale_one(name):
    numbers, *shapes, _ = PRODUCTS[name]
    _, found = pulled(un.unit_fp8_dot_general(constraint=None, rounded=False), numbers, *shapes)
    np.testing.assert_allclose([*map(rms, found)], 1, atol=0.05)
    _, unscaled = pulled(fp8_dot_general(), numbers, *shapes)
    assert min(map(rms, unscaled)) > 2


@pytest.mark.parametrize("name", PRODUCTS)
def test_rounded_factors_are_the_nearest_powers_of_two(name):
    numbers, *shapes, sums = PRODUCTS[name]
    operands, found = pulled(un.unit_fp8_dot_general(constraint=None), numbers, *shapes)
    for each, product, n in zip(found, exact(numbers, *operands), sums, strict=True):
        factor = rms(each) / rms(product)
        assert np.log2(factor) == pytest.approx(round(np.log2(factor)), abs=1e-6)
        assert abs(np.log2(factor) + np.log2(n) / 2) <= 0.5 + 1e-6
        assert 2**-0.5 * 0.95 < rms(each) < 2**0.5 * 1.05


CONSTRAINTS = {
    None: (96**-0.5, 224**-0.5),
    "to_output_scale": (96**-0.5, 96**-0.5),
    "to_grad_input_scale": (224**-0.5, 224**-0.5),
    "gmean": ((96 * 224) ** -0.25,) * 2,
    max: (96**-0.5, 96**-0.5),
}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_products_are_of_rounded_operands_times_factors(constraint):
    dot = un.unit_fp8_dot_general(constraint=constraint, rounded=False)
    operands, found = pulled(dot, *PRODUCTS["linear"][:3])
    factors = *CONSTRAINTS[constraint], 300**-0.5
    for each, product, factor in zip(found, exact(LINEAR, *operands), factors, strict=True):
        close(each, factor * np.asarray(product))
        with pytest.raises(AssertionError):
            close(each, 1.01 * factor * np.asarray(product))


@pytest.mark.parametrize("rounded_factors", [True, False])
def test_true_gradients_are_those_of_the_output(rounded_factors):
    dot = un.unit_fp8_dot_general(constraint=None, rounded=rounded_factors)
    settings = PRODUCTS["linear"][:3]
    operands, unit = pulled(dot, *settings)
    with un.true_gradients():
        _, true = pulled(dot, *settings)
    np.testing.assert_array_equal(unit[0], true[0])
    factor = 2.0**-3 if rounded_factors else 96**-0.5
    for each, product in zip(true, exact(LINEAR, *operands), strict=True):
        close(each, factor * np.asarray(product))
    for before, after in zip(unit[1:], true[1:], strict=True):
        assert rms(after) > 1.3 * rms(before)


def test_gradients_of_residual_branches_are_verified():
    """To what float8 rounds; without a constraint they are far from it."""

    def block(params, x, constraint):
        branch, skip = un.residual_split(un.linear(x, params["in"]), 1.0)
        branch = un.silu(un.fp8_linear(branch, params["up"], constraint=constraint))
        return un.residual_add(un.fp8_linear(branch, params["down"]), skip, 1.0)

    shapes = {"in": (12, 16), "up": (16, 300), "down": (300, 16)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    x = normal(9, 7, 12)
    found = un.verify_gradients(block, params, x, "to_output_scale", tolerance=0.01)
    assert min(match.cosine for match in found.values()) > 0.99
    with pytest.raises(ValueError, match="leaf 'in': cosine 0.[89]"):
        un.verify_gradients(block, params, x, None, tolerance=0.02)


def test_linear_is_that_of_full_precision_but_for_rounding():
    x, w, b = normal(0, 3, 50, 64), normal(1, 64, 256), normal(2, 256)
    layers = un.linear, un.fp8_linear, partial(un.fp8_linear, rounded=False)
    wide, fast, free = (jax.vjp(layer, x, w, b) for layer in layers)
    g = normal(3, *wide[0].shape)
    for layer in (fast, free):
        assert 0.01 < rms(layer[0] - wide[0]) < 0.05
    grads, fast, free = (pull(g) for _, pull in (wide, fast, free))
    for found, want in zip(free, grads, strict=True):
        assert rms(found - want) < 0.08 * rms(want)
    np.testing.assert_array_equal(free[2], grads[2])  # of the bias, whose sum is exact
    np.testing.assert_allclose(rms(fast[1]) / rms(free[1]), 2.0**-4 * 150**0.5, rtol=1e-5)


def test_the_three_products_are_of_float8_and_factors_multiply_their_sums():
    x, w, g = normal(0, 5, 7), normal(1, 7, 3), normal(2, 5, 3)
    run = lambda dot: lambda x, w, g: jax.vjp(lambda x, w: dot(x, w, LINEAR), x, w)[1](g)  # noqa: E731
    unit = un.unit_fp8_dot_general()
    assert kinds(run(unit), x, w, g) == [
        (E4M3, E4M3, "float32"),
        (E5M2, E4M3, "float32"),
        (E4M3, E5M2, "float32"),
    ]
    count = lambda dot: str(jax.make_jaxpr(run(dot))(x, w, g)).count("= mul")  # noqa: E731
    assert count(unit) == count(fp8_dot_general()) + 3  # and none of operands


def test_formats_and_dtypes_are_what_is_asked_for():
    x, w = (jnp.asarray(normal(i, *s), jnp.bfloat16) for i, s in enumerate([(5, 64), (64, 3)]))
    assert un.fp8_linear(x, w).dtype == jnp.bfloat16
    assert un.fp8_linear(x, w, dtype=jnp.float32).dtype == jnp.float32
    dot = un.unit_fp8_dot_general("float8_e5m2", "float8_e4m3fn", dtype=jnp.float32)
    y, pull = jax.vjp(lambda x, w: dot(x, w, LINEAR), x, w)
    close(y, rounded(x, E5M2) @ rounded(w, E5M2) / 8)
    assert [v.dtype for v in pull(y)] == [jnp.bfloat16] * 2
    assert dot(x, w, LINEAR, preferred_element_type=jnp.float16).dtype == jnp.float16
    # Powers of two round nothing: in bfloat16, results are those of the sums.
    sums = (rounded(x, E4M3) @ rounded(w, E4M3)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(un.fp8_linear(x, w), sums * jnp.bfloat16(0.125))


def layers_of_nnx(dot):
    unit = {"kernel_init": nnx.initializers.normal(1.0), "dot_general": dot, "rngs": nnx.Rngs(0)}
    return nnx.Sequential(
        nnx.LinearGeneral(12, (3, 5), **unit),
        nnx.LinearGeneral((3, 5), 20, axis=(-2, -1), **unit),
        un.silu,
        nnx.Linear(20, 7, **unit),
    )


class LayersOfLinen(linen.Module):
    dot: object

    @linen.compact
    def __call__(self, x):
        unit = {"kernel_init": linen.initializers.normal(1.0), "dot_general": self.dot}
        x = linen.DenseGeneral((3, 5), **unit)(x)
        x = linen.DenseGeneral(20, axis=(-2, -1), **unit)(x)
        return linen.Dense(7, **unit)(un.silu(x))


def by_arithmetic(lhs, rhs, numbers, **_):
    """Another implementation: the wide product, of operands and cotangents rounded in float32."""

    @jax.custom_vjp
    def narrowed(y):
        return y

    narrowed.defvjp(lambda y: (y, None), lambda _, g: (un.quantized(g, E5M2),))
    product = partial(un.dot_general, dimension_numbers=numbers)
    return narrowed(product(un.quantized(lhs, E4M3), un.quantized(rhs, E4M3)))


DOTS = un.unit_fp8_dot_general(rounded=False), by_arithmetic, un.dot_general


def compared(values):
    """Gradients are those of the other implementation, and not those without rounding."""
    found, want, wide = map(jax.tree.leaves, values)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype
        close(a, b, 1e-4)
    assert max(rms(a - c) / rms(c) for a, c in zip(found, wide, strict=True)) > 1e-2


def test_layers_of_nnx():
    x = normal(0, 4, 3, 12)
    cost = nnx.jit(nnx.value_and_grad(lambda model: jnp.sum(jnp.sin(model(x)))))
    compared([cost(layers_of_nnx(dot)) for dot in DOTS])


def test_layers_of_linen():
    x = normal(0, 4, 3, 12)

    def cost(dot):
        model = LayersOfLinen(dot)
        params = model.init(jax.random.key(0), x)
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.apply(p, x)))))(params)

    compared([cost(dot) for dot in DOTS])


def test_factors_are_those_of_one_example_under_vmap():
    x, w, g = normal(0, 4, 9, 16), normal(1, 16, 5), normal(2, 4, 9, 5)
    layer = partial(un.fp8_linear, rounded=False)
    pulls = jax.vmap(lambda x, g: jax.vjp(layer, x, w)[1](g))(x, g)
    each = [jax.vjp(layer, x[i], w)[1](g[i]) for i in range(4)]
    for found, want in zip(pulls, zip(*each, strict=True), strict=True):
        close(found, np.stack(want))


def test_equal_settings_are_equal_objects_and_compiled_once():
    make = un.unit_fp8_dot_general
    assert make() == make("float8_e4m3fn", jnp.float8_e5m2)
    assert hash(make()) == hash(make(rounded=True))
    others = [make(rounded=False), make(constraint=None), make(dtype="float32"), make(E5M2)]
    assert len({make(), *others}) == 5
    traced = []

    @nnx.jit
    def run(model, x):
        traced.append(None)
        return model(x)

    for dot in (make(), make()):
        run(nnx.Linear(6, 5, dot_general=dot, rngs=nnx.Rngs(0)), normal(0, 4, 6))
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"forward": "e4m3"}, ValueError, "'e4m3' is no number format that is known"),
        ({"backward": "bfloat16"}, ValueError, "backward is bfloat16, of 16 bits"),
        ({"constraint": "mean"}, ValueError, "there is no constraint 'mean'.*Expected"),
        ({"constraint": "to_left_grad_scale"}, ValueError, "one of 2 operands"),
        ({"dtype": jnp.float8_e5m2}, TypeError, "result of fp8_dot_general cannot be float8_e5m2"),
    ],
)
def test_settings_that_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        un.unit_fp8_dot_general(**settings)
    with pytest.raises(error, match=message):
        un.fp8_linear(normal(0, 3, 4), normal(1, 4, 5), **settings)


def test_operands_that_are_refused():
    dot, x, w = un.unit_fp8_dot_general(), normal(0, 3, 4), normal(1, 4, 5)
    for layer in (un.fp8_linear, lambda x, w: dot(x, w, LINEAR)):
        with pytest.raises(TypeError, match="rhs is float8_e4m3fn already.*Fix: "):
            layer(x, jnp.asarray(w, jnp.float8_e4m3fn))
        with pytest.raises(TypeError, match="must be floating, got .*int32"):
            layer(np.ones((3, 4), np.int32), w)
        with pytest.raises(TypeError, match="contracting dimensions to have the same shape"):
            layer(x, w[:3])
    with pytest.raises(ValueError, match="fp8_linear got x of shape .* Expected: .* Fix: "):
        un.fp8_linear(x, normal(1, 4, 5, 2))
    with pytest.raises(ValueError, match=r"b of shape \(4,\). Expected: \(5,\)"):
        un.fp8_linear(x, w, normal(2, 4))
    with pytest.raises(TypeError, match="have no derivative"):
        jax.hessian(lambda x: jnp.sum(un.fp8_linear(x, w) ** 2))(x)


def test_what_is_not_finite_is_seen():
    x = normal(0, 3, 4)
    x[1, 2] = np.inf
    y = un.fp8_linear(x, normal(1, 4, 5))
    assert np.isnan(y[1]).all()
    assert np.isfinite(np.delete(y, 1, 0)).all()
