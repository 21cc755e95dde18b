"""fp8_dot_general: its three products against products of rounded operands in float64."""

import string
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from uscale_jax.numerics._formats import FORMATS
from uscale_jax.numerics._fp8 import fp8_dot_general

LINEAR = (((1,), (0,)), ((), ()))
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


def normal(seed: int, *shape: int, std: float = 1.0) -> np.ndarray:
    return (std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def rounded(x, name: str, scale: float = 1.0) -> np.ndarray:
    """scale·x in a format, saturating, in float64; of float32 ``ml_dtypes`` rounds once."""
    fmt = FORMATS[name]
    scaled = np.asarray(x).astype(np.float32) * np.float32(scale)
    clipped = np.clip(scaled, -fmt.max, fmt.max)
    return clipped.astype(getattr(ml_dtypes, name)).astype(np.float64)


def close(found, want, tolerance: float = 1e-6) -> None:
    """To a share of the largest element: sums of float32 in any order."""
    found, want = (np.asarray(x, np.float64) for x in (found, want))
    assert found.shape == want.shape
    assert np.max(np.abs(found - want)) <= tolerance * np.max(np.abs(want))


def letters(numbers, lhs_ndim: int, rhs_ndim: int) -> tuple[str, str, str]:
    """The subscripts of a product, for ``np.einsum``."""
    (left, right), (left_batch, right_batch) = numbers
    lhs, rhs = list(string.ascii_lowercase[:lhs_ndim]), list(string.ascii_uppercase[:rhs_ndim])
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        rhs[j] = lhs[i]
    batch = [lhs[i] for i in left_batch]
    free = [x for x in lhs if x not in rhs], [x for x in rhs if x not in lhs]
    return "".join(lhs), "".join(rhs), "".join([*batch, *free[0], *free[1]])


PRODUCTS = {
    "linear": ((5, 7), (7, 3), LINEAR),
    "tokens": ((2, 5, 7), (7, 3), (((2,), (0,)), ((), ()))),
    "attention": ((2, 5, 4, 3), (2, 6, 4, 3), (((3,), (3,)), ((0, 2), (0, 2)))),
    "batch dimensions in another order": (
        (5, 2, 7, 4),
        (4, 7, 2, 3),
        (((2,), (1,)), ((3, 1), (0, 2))),
    ),
    "several summed, in another order": (
        (4, 5, 6, 7),
        (7, 3, 4, 6),
        (((2, 0, 3), (3, 2, 0)), ((), ())),
    ),
    "heads": ((2, 5, 4, 3), (4, 3, 6), (((2, 3), (0, 1)), ((), ()))),
    "outer": ((5, 2), (3,), (((), ()), ((), ()))),
    "inner": ((5, 2), (2, 5), (((0, 1), (1, 0)), ((), ()))),
    "lists": ((2, 5, 7), (3, 7), [[[2], [1]], [[], []]]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_all_three_are_products_of_rounded_operands(name):
    """With scales and multipliers, and some operands that saturate."""
    lhs_shape, rhs_shape, numbers = PRODUCTS[name]
    lhs, rhs = normal(0, *lhs_shape, std=0.02), normal(1, *rhs_shape, std=100)
    settings = {"lhs_scale": 64.0, "rhs_scale": 2.0, "grad_scale": 1024.0}
    multipliers = {"out_multiplier": 0.3, "lhs_grad_multiplier": 0.7, "rhs_grad_multiplier": 1.1}
    dot = fp8_dot_general(**settings, **multipliers)
    y, pull = jax.vjp(lambda a, b: dot(a, b, numbers), lhs, rhs)
    plain = lambda a, b: jax.lax.dot_general(a, b, numbers)  # noqa: E731
    assert y.shape == jax.eval_shape(plain, lhs, rhs).shape
    g = normal(2, *y.shape, std=0.001)
    a, b, c = letters(numbers, lhs.ndim, rhs.ndim)
    lhs8, rhs8 = rounded(lhs, E4M3, 64), rounded(rhs, E4M3, 2)
    g8 = rounded(g, E5M2, 1024)
    close(y, 0.3 / 128 * np.einsum(f"{a},{b}->{c}", lhs8, rhs8))
    lhs_grad, rhs_grad = pull(g)
    close(lhs_grad, 0.7 / 2048 * np.einsum(f"{c},{b}->{a}", g8, rhs8))
    close(rhs_grad, 1.1 / 65536 * np.einsum(f"{a},{c}->{b}", lhs8, g8))
    # What the oracle would be wrong about: neither rounding nor saturation would go unseen.
    exact = np.einsum(f"{a},{b}->{c}", lhs.astype(float), rhs.astype(float))
    assert np.max(np.abs(np.asarray(y) / 0.3 - exact)) > 1e-3 * np.max(np.abs(exact))


def products(closed) -> list:
    """All products of a program, those of calls and derivative rules too."""
    found = []
    for eqn in closed.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(eqn)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns"):
                found += products(value)
    return found


def kinds(fun, *args) -> list[tuple[str, str, str]]:
    eqns = products(jax.make_jaxpr(fun)(*args))
    return [tuple(v.aval.dtype.name for v in (*e.invars, *e.outvars)) for e in eqns]


def test_all_three_multiply_float8_and_add_in_float32():
    dot = partial(fp8_dot_general(), dimension_numbers=LINEAR)
    x, w, g = normal(0, 5, 7), normal(1, 7, 3), normal(2, 5, 3)
    found = kinds(lambda x, w, g: jax.vjp(dot, x, w)[1](g), x, w, g)
    assert found == [
        (E4M3, E4M3, "float32"),
        (E5M2, E4M3, "float32"),
        (E4M3, E5M2, "float32"),
    ]


def test_plain_differentiation_does_neither():
    """Backward products in float32, and cotangents rounded to the forward format, without scale."""

    def plain(x, w):
        x, w = x.astype(jnp.float8_e4m3fn), w.astype(jnp.float8_e4m3fn)
        return jax.lax.dot_general(x, w, LINEAR, preferred_element_type=jnp.float32)

    x, w, g = normal(0, 5, 7), normal(1, 7, 3), normal(2, 5, 3, std=1e-3)
    found = kinds(lambda x, w, g: jax.vjp(plain, x, w)[1](g), x, w, g)
    assert ("float32", "float8_e4m3fn", "float32") in found
    assert ("float8_e5m2", "float8_e4m3fn", "float32") not in found
    want = g.astype(np.float64) @ rounded(w, E4M3).T
    errors = [
        np.max(np.abs(np.asarray(jax.vjp(fun, x, w)[1](g)[0], np.float64) - want))
        for fun in (plain, partial(fp8_dot_general(grad_scale=1024.0), dimension_numbers=LINEAR))
    ]
    assert errors[0] > 2 * errors[1]


def test_every_scale_is_one_multiplication():
    """One of the operand, and one of the sums; none where the number is 1."""
    x, w, g = normal(0, 5, 7), normal(1, 7, 3), normal(2, 5, 3)

    def multiplications(**settings) -> int:
        dot = partial(fp8_dot_general(**settings), dimension_numbers=LINEAR)
        text = str(jax.make_jaxpr(lambda x, w, g: jax.vjp(dot, x, w)[1](g))(x, w, g))
        return text.count("= mul")

    # Without any, two that make operands one operation each (and casts, in older JAX).
    casts = multiplications()
    assert casts == 2 or jax.__version_info__ < (0, 10)
    # Of lhs, and of the gradient of rhs; 2 / 2 is 1.
    assert multiplications(lhs_scale=2.0, out_multiplier=2.0) == casts + 2
    every = {"out_multiplier": 0.3, "lhs_grad_multiplier": 0.7, "rhs_grad_multiplier": 1.1}
    assert multiplications(lhs_scale=3.0, rhs_scale=2.0, grad_scale=5.0, **every) == casts + 6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("factor", [0.25, 0.3])
def test_dtypes_are_the_operands_and_results_are_rounded_once(dtype, factor):
    x, w = jnp.asarray(normal(0, 5, 7), dtype), jnp.asarray(normal(1, 7, 3), dtype)
    multipliers = dict.fromkeys(("out_multiplier", "lhs_grad_multiplier"), factor)
    dot = fp8_dot_general(**multipliers)
    y, pull = jax.vjp(lambda x, w: dot(x, w, LINEAR), x, w)
    assert y.dtype == dtype
    assert [g.dtype for g in pull(y)] == [dtype, dtype]
    sums = (rounded(x, E4M3) @ rounded(w, E4M3)).astype(np.float32)  # exact
    np.testing.assert_array_equal(y, (sums * np.float32(factor)).astype(dtype))
    sums = (rounded(y, E5M2) @ rounded(w, E4M3).T).astype(np.float32)
    np.testing.assert_array_equal(pull(y)[0], (sums * np.float32(factor)).astype(dtype))


def test_dtypes_that_are_asked_for():
    x, w = jnp.asarray(normal(0, 5, 7), jnp.bfloat16), jnp.asarray(normal(1, 7, 3), jnp.bfloat16)
    dot = fp8_dot_general(dtype=jnp.float32)
    assert dot(x, w, LINEAR).dtype == jnp.float32
    assert dot(x, w, LINEAR, preferred_element_type=jnp.float16).dtype == jnp.float16
    close(dot(x, w, LINEAR), rounded(x, E4M3) @ rounded(w, E4M3))
    assert jax.grad(lambda x: jnp.sum(dot(x, w, LINEAR)))(x).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = fp8_dot_general()(*(np.asarray(v, np.float64) for v in (x, w)), LINEAR)
        assert wide.dtype == jnp.float64


def test_what_is_too_large_saturates_and_what_is_not_finite_is_seen():
    one = jnp.ones((1, 1), jnp.float32)
    dot = fp8_dot_general(lhs_scale=4.0)
    product = lambda x: float(dot(x * one, one, LINEAR)[0, 0])  # noqa: E731
    assert product(1e6) == 448 / 4
    assert product(-3e38) == -448 / 4  # times 4 it is beyond float32
    assert np.isnan(product(np.inf))
    assert np.isnan(product(np.nan))
    pull = jax.vjp(lambda x: dot(x, one, LINEAR), one)[1]
    assert float(pull(1e9 * one)[0][0, 0]) == 57344
    assert np.isinf(float(pull(np.inf * one)[0][0, 0]))
