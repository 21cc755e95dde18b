"""Products: scale one forward and backward, the factors themselves, Flax, refusals."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uscale_jax import numerics as un

FREE = {"constraint": None}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def scales(f, *shapes):
    """The RMS of the output and of every gradient, of unit normal operands and cotangents."""
    operands = [normal(i, *shape) for i, shape in enumerate(shapes)]
    out, pull = jax.vjp(jax.jit(f), *operands)
    return [rms(out), *map(rms, pull(normal(99, *out.shape)))]


def conv(lhs, rhs, *args, **kwargs):
    return un.conv(lhs, rhs, *args, **kwargs, constraint=None)


NHC = ("NHC", "HIO", "NHC")
NHWC = ("NHWC", "HWIO", "NHWC")

# (unit-scaled, not scaled, shapes).  All sizes differ, so that no factor can stand for another.
PRODUCTS = {
    "linear": (partial(un.linear, **FREE), jnp.matmul, (300, 96), (96, 224)),
    "linear of more dimensions": (partial(un.linear, **FREE), jnp.matmul, (7, 45, 96), (96, 224)),
    "dot_general of batches": (
        lambda x, w: un.dot_general(x, w, (((1,), (2,)), ((2,), (0,))), **FREE),
        lambda x, w: jax.lax.dot_general(x, w, (((1,), (2,)), ((2,), (0,)))),
        (80, 110, 6),
        (6, 70, 110),
    ),
    "matmul": (partial(un.matmul, **FREE), jnp.matmul, (3, 80, 110), (3, 110, 70)),
    "matmul, broadcast": (partial(un.matmul, **FREE), jnp.matmul, (1, 80, 110), (5, 110, 70)),
    "einsum": (
        partial(un.einsum, "...sd,dhk->...hsk", **FREE),
        partial(jnp.einsum, "...sd,dhk->...hsk"),
        (2, 70, 90),
        (90, 5, 40),
    ),
    "einsum of activations": (
        partial(un.einsum, "bqd,bkd->bkq", weight=False, **FREE),
        partial(jnp.einsum, "bqd,bkd->bkq"),
        (3, 80, 110),
        (3, 70, 110),
    ),
    "conv of 1 dimension, strides": (
        lambda x, w: conv(x, w, (2,), "VALID", dimension_numbers=NHC),
        lambda x, w: jax.lax.conv_general_dilated(x, w, (2,), "VALID", dimension_numbers=NHC),
        (7, 400, 24),
        (5, 24, 40),
    ),
    "conv of 2 dimensions, groups": (
        lambda x, w: conv(x, w, (1, 2), "VALID", dimension_numbers=NHWC, feature_group_count=4),
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 2), "VALID", dimension_numbers=NHWC, feature_group_count=4
        ),
        (6, 18, 25, 32),
        (3, 4, 8, 48),
    ),
    "conv of 3 dimensions": (
        lambda x, w: conv(x, w, (1, 2, 1), "VALID"),
        lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 2, 1), "VALID"),
        (3, 24, 9, 10, 7),
        (32, 24, 3, 2, 4),
    ),
    "conv, transposed and dilated": (
        lambda x, w: conv(x, w, (1, 1), [(1, 1), (0, 0)], (2, 1), (1, 2)),
        lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), [(1, 1), (0, 0)], (2, 1), (1, 2)),
        (5, 24, 39, 25),
        (40, 24, 4, 3),
    ),
    "conv, groups of examples": (
        lambda x, w: conv(x, w, (1,), "VALID", batch_group_count=2),
        lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), "VALID", batch_group_count=2),
        (8, 40, 90),
        (36, 40, 5),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_have_scale_one_in_both_directions(name):
    unit, plain, *shapes = PRODUCTS[name]
    found, unscaled = scales(unit, *shapes), scales(plain, *shapes)
    np.testing.assert_allclose(found, 1, atol=0.05, err_msg=f"{name}: {found}")
    assert min(unscaled) > 2, f"{name}: {unscaled}"


@pytest.mark.parametrize(
    ("constraint", "wanted"),
    {
        None: (1.00, 0.999, 1),
        "to_output_scale": (1.00, 1.99, 1),
        "to_grad_input_scale": (0.50, 1.00, 1),
        "gmean": (0.71, 1.41, 1),
        "hmean": (0.67, 1.33, 1),
        "amean": (0.75, 1.50, 1),
    }.items(),
)
def test_linear_under_constraints_is_what_has_been_measured(constraint, wanted):
    found = scales(partial(un.linear, constraint=constraint), (512, 256), (256, 1024))
    np.testing.assert_allclose(found, wanted, rtol=0.03)


def test_a_readout_is_small_forward_only():
    found = scales(un.linear_readout, (512, 256), (256, 1024))
    np.testing.assert_allclose(found, (0.063, 0.998, 1), rtol=0.03)


def test_linear_is_the_formula():
    x, w, b, g = normal(0, 2, 3, 4), normal(1, 4, 5), normal(2, 5), normal(3, 2, 3, 5)
    y, pull = jax.vjp(partial(un.linear, **FREE), x, w, b)
    gx, gw, gb = pull(g)
    np.testing.assert_allclose(y, x @ w / 2 + b[None, None], rtol=1e-5)
    np.testing.assert_allclose(gx, g @ w.T / 5**0.5, rtol=1e-5, atol=1e-6)
    rows = 6**-0.5
    np.testing.assert_allclose(gw, rows * jnp.einsum("abi,abo->io", x, g), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gb, rows * jnp.sum(g, (0, 1)), rtol=1e-5, atol=1e-6)


def test_ways_to_write_one_product_agree():
    x, w, g = normal(0, 6, 5, 8), normal(1, 8, 7), normal(2, 6, 5, 7)
    ways = [
        un.linear,
        partial(un.dot_general, dimension_numbers=(((2,), (0,)), ((), ()))),
        partial(un.einsum, "bsd, dk -> bsk"),
        partial(un.einsum, "...d,dk->...k"),
    ]
    first, *others = [[y, *pull(g)] for y, pull in (jax.vjp(way, x, w) for way in ways)]
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_under_true_gradients_a_product_has_its_derivative():
    x, w, g = normal(0, 5, 8), normal(1, 8, 7), normal(2, 5, 7)
    with un.true_gradients():
        found = jax.vjp(partial(un.linear, **FREE), x, w)[1](g)
    for a, b in zip(found, jax.vjp(lambda x, w: x @ w / 8**0.5, x, w)[1](g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_padding_changes_gradients_factors_only():
    """The function of a kernel must not depend on the size of images."""
    kernel = normal(1, 48, 32, 3, 3)
    image = jnp.zeros((1, 32, 20, 20)).at[:, :, :5, :5].set(normal(0, 1, 32, 5, 5))
    for size in (8, 12, 20):
        out = un.conv(image[:, :, :size, :size], kernel, (1, 1), "SAME")
        wanted = 288**-0.5 * _plain(image, kernel)
        np.testing.assert_allclose(out[:, :, :6, :6], wanted, rtol=1e-4, atol=1e-5)
    found = scales(lambda x, w: conv(x, w, (1, 1), "SAME"), (16, 32, 4, 4), (48, 32, 3, 3))
    np.testing.assert_allclose(found[1:], 1, atol=0.05)


def _plain(image, kernel):
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME")[:, :, :6, :6]


UNIT = nn.initializers.normal(1.0)
DENSE = {"kernel_init": UNIT, "dot_general": un.dot_general}
WINDOW = {"kernel_init": UNIT, "conv_general_dilated": un.conv}


def by_hand(name, w, x):
    if name.endswith("General"):
        return un.einsum("abc,bcd->ad", x, w)
    if name.endswith("Conv"):
        return un.conv(x, w, (1, 1), "SAME", dimension_numbers=NHWC)
    return un.linear(x, w)


LAYERS = {
    "nnx.Linear": (lambda r: nnx.Linear(9, 7, rngs=r, **DENSE), (5, 9)),
    "nnx.LinearGeneral": (
        lambda r: nnx.LinearGeneral((3, 4), 7, axis=(1, 2), rngs=r, **DENSE),
        (5, 3, 4),
    ),
    "nnx.Conv": (lambda r: nnx.Conv(3, 6, (3, 2), rngs=r, **WINDOW), (2, 8, 7, 3)),
    "linen.Dense": (lambda _: nn.Dense(7, **DENSE), (5, 9)),
    "linen.DenseGeneral": (lambda _: nn.DenseGeneral(7, axis=(1, 2), **DENSE), (5, 3, 4)),
    "linen.Conv": (lambda _: nn.Conv(6, (3, 2), **WINDOW), (2, 8, 7, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_flax_layers_take_them_in_place_of_their_own(name):
    make, shape = LAYERS[name]
    layer, x = make(nnx.Rngs(0)), normal(3, *shape)
    if name.startswith("nnx"):
        graph, params = nnx.split(layer)
        apply = lambda p, x: nnx.merge(graph, p)(x)  # noqa: E731
    else:
        params = layer.init(jax.random.key(0), x)["params"]
        apply = lambda p, x: layer.apply({"params": p}, x)  # noqa: E731
    y, pull = jax.vjp(apply, params, x)
    g = normal(4, *y.shape)
    kernel = params["kernel"][...]
    wanted, pull_by_hand = jax.vjp(partial(by_hand, name), kernel, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    gradients, gx = pull(g)
    wanted_w, wanted_x = pull_by_hand(g)
    np.testing.assert_allclose(gradients["kernel"][...], wanted_w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gx, wanted_x, rtol=1e-5, atol=1e-6)


def test_options_of_jax_are_passed_on():
    x, w = normal(0, 4, 8).astype(jnp.bfloat16), normal(1, 8, 6).astype(jnp.bfloat16)
    numbers = (((1,), (0,)), ((), ()))
    wide = un.dot_general(x, w, numbers, None, jnp.float32)
    assert wide.dtype == jnp.float32
    plain = jax.lax.dot_general(x, w, numbers, None, jnp.float32)
    np.testing.assert_allclose(wide, plain / 8**0.5, rtol=1e-6)
    gradient = jax.grad(lambda w: jnp.sum(un.dot_general(x, w, numbers, None, jnp.float32)))(w)
    assert gradient.dtype == jnp.bfloat16
    program = jax.make_jaxpr(partial(un.matmul, precision="highest"))(x, w)
    assert "HIGHEST" in str(program)


def test_refusals_say_what_and_where():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
    with pytest.raises(TypeError, match=r"linear's w must be floating, got int32\[4,5\].*Fix:"):
        un.linear(x, jnp.ones((4, 5), jnp.int32))
    with pytest.raises(TypeError, match="conv's lhs must be floating"):
        un.conv(jnp.ones((1, 2, 3), jnp.int8), jnp.ones((2, 2, 3)), (1,), "SAME")
    with pytest.raises(ValueError, match=r"x of shape \(3, 4\) and w of shape \(4,\).*Fix:"):
        un.linear(x, w[:, 0])
    with pytest.raises(ValueError, match=r"b of shape \(1, 5\). Expected: \(5,\)"):
        un.linear(x, w, w[:1])
    for product in (un.linear, un.matmul, partial(un.einsum, "ab,bc->ac")):
        with pytest.raises((TypeError, ValueError), match=r"contract|Size of label|size"):
            product(x, jnp.ones((3, 5)))
    with pytest.raises(TypeError, match="dot_general"):
        un.dot_general(x, w, (((5,), (0,)), ((), ())))
    for subscripts in ("ab,bc", "ab->a", "ab,bc,cd->ad"):
        with pytest.raises(ValueError, match=r"takes two operands and an arrow.*Fix:"):
            un.einsum(subscripts, x, w)
    with pytest.raises(ValueError, match=r"diagonal: 'aa'"):
        un.einsum("aa,ab->b", jnp.ones((4, 4)), w)


def test_empty_operands_pass():
    assert un.linear(jnp.ones((0, 4)), jnp.ones((4, 5))).shape == (0, 5)
    assert un.matmul(jnp.ones((3, 0)), jnp.ones((0, 5))).shape == (3, 5)
