"""Number formats and rounding to them, and models whose products read rounded numbers.

The oracle of rounding lists all numbers of a format and takes the nearest in float64, the even one
of two; ``ml_dtypes`` agrees with it on float32 and rounds float64 twice, by way of float32.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.zoo import prepared
from uscale_jax.numerics._formats import FORMATS, number_format, quantized, saturating_cast
from uscale_jax.numerics._simulate import simulate_format

NAMES = [name for name in FORMATS if name != "float32"]
CAST = [name for name in NAMES if FORMATS[name].bits != 6]
NARROW = [name for name in NAMES if FORMATS[name].bits <= 8]


def numbers(name: str) -> np.ndarray:
    """All finite numbers of a format from 0 up, in float64."""
    fmt = FORMATS[name]
    codes = np.arange(2**fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):
        values = codes.view(fmt.dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values) & (values >= 0)])


def nearest(x: np.ndarray, name: str) -> np.ndarray:
    values, size = numbers(name), np.abs(np.asarray(x, np.float64))
    below = np.clip(np.searchsorted(values, size, side="right") - 1, 0, len(values) - 2)
    low, high = values[below], values[below + 1]
    up = (high - size < size - low) | ((high - size == size - low) & (below % 2 == 1))
    return np.copysign(np.where(up, high, low), x)


def places(name: str, dtype: type) -> np.ndarray:
    """Numbers of a format, the middles between them, and what is next to those in ``dtype``."""
    values = numbers(name)
    if len(values) > 300:
        values = values[:: len(values) // 300]
    values = values[values <= 1e38]  # that middles are finite
    middles = ((values[1:] + values[:-1]) / 2).astype(dtype)
    beside = [np.nextafter(middles, dtype(to)) for to in (0, np.inf)]
    beyond = dtype([min(FORMATS[name].max * 1.01, 3.4e38), 3.4e38])
    found = np.concatenate([values.astype(dtype), middles, *beside, beyond])
    # XLA flushes subnormal numbers of float32 to 0.
    found = found[(found == 0) | (found >= np.finfo(np.float32).tiny)]
    return np.concatenate([found, -found])


@pytest.mark.parametrize("name", NAMES)
def test_limits_are_those_of_the_numbers(name):
    fmt, values = FORMATS[name], numbers(name)
    assert fmt.max == values[-1]
    assert fmt.smallest_subnormal == values[1]
    assert fmt.eps == values[values > 1][0] - 1
    steps = np.diff(values)
    assert fmt.smallest_normal == values[1:-1][steps[1:] > steps[0]][0] / 2
    info = ml_dtypes.finfo(fmt.dtype)
    assert (fmt.bits, fmt.max) == (info.bits, float(info.max))


def test_published_limits():
    found = {name: number_format(name) for name in ("float8_e4m3fn", "float8_e5m2")}
    assert [(f.max, f.has_inf, f.has_nan) for f in found.values()] == [
        (448, False, True),
        (57344, True, True),
    ]
    assert number_format(jnp.float8_e4m3fn) == number_format("float8_e4m3fn")
    assert repr(found["float8_e5m2"]) == (
        "Format(float8_e5m2: max 57344, normal from 6.1e-05, subnormal from 1.53e-05, eps 0.25)"
    )


@pytest.mark.parametrize("bad", ["float8_e4m3fm", "int8", jnp.int8, "float8_e8m0fnu", 3, None])
def test_unknown_formats_are_refused_with_those_that_are_known(bad):
    with pytest.raises(ValueError, match="no number format that is known.*float8_e4m3fn, "):
        number_format(bad)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CAST)
def test_casts_round_once_to_the_nearest_and_saturate(name, dtype):
    x = places(name, dtype)
    with jax.enable_x64(True):
        y = np.asarray(jax.jit(lambda x: saturating_cast(x, name))(x))
    assert y.dtype == FORMATS[name].dtype
    np.testing.assert_array_equal(y.astype(np.float64), nearest(x, name))
    if dtype == np.float32:
        clipped = np.clip(x, -FORMATS[name].max, FORMATS[name].max)
        np.testing.assert_array_equal(y, clipped.astype(FORMATS[name].dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_quantized_is_the_cast_there_and_back(name, dtype):
    x = places(name, dtype)
    with jax.enable_x64(True):
        y = np.asarray(jax.jit(lambda x: quantized(x, name))(x))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, nearest(x, name))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", NARROW)
def test_from_formats_of_16_bits(name, dtype):
    x = np.random.default_rng(0).standard_cauchy(500).astype(dtype)
    want = nearest(x, name)
    np.testing.assert_array_equal(quantized(x, name).astype(jnp.float32), want)
    if FORMATS[name].bits != 6:
        np.testing.assert_array_equal(saturating_cast(x, name).astype(jnp.float32), want)


@pytest.mark.parametrize(
    ("name", "dtype", "largest"),
    [
        ("bfloat16", jnp.float16, 65280),  # the next number of bfloat16 is 65536
        ("float16", jnp.bfloat16, 65280),  # 65504 is no number of bfloat16
        ("float8_e4m3", jnp.float8_e3m4, 15),
        ("float32", jnp.bfloat16, float(jnp.finfo(jnp.bfloat16).max)),
    ],
)
def test_quantized_saturates_at_a_number_that_both_have(name, dtype, largest):
    x = jnp.asarray(jnp.finfo(dtype).max, dtype)
    assert float(quantized(x, name)) == largest
    assert float(quantized(-x, name)) == -largest


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_stays_visible(name, wrap):
    fmt = FORMATS[name]
    x = np.array([np.inf, -np.inf, np.nan, 1e38, -1e38, 0.0], np.float32)
    inf = np.inf if fmt.has_inf else np.nan
    # The largest of bfloat16 is larger than 1e38.
    top = min(fmt.max, float(quantized(1e38, "bfloat16")))
    want = np.array([inf, -inf, np.nan, top, -top, 0], np.float32)
    np.testing.assert_array_equal(wrap(lambda x: quantized(x, name))(x), want)
    if fmt.bits == 6:
        return
    if not fmt.has_nan:
        want[:3] = fmt.max, -fmt.max, fmt.max
    cast = wrap(lambda x: saturating_cast(x, name))(x)
    np.testing.assert_array_equal(np.asarray(cast).astype(np.float32), want)


def test_plain_casts_do_neither():
    """What these functions are for: NaN of finite numbers, and float64 rounded twice."""
    x = jnp.float32(465)
    assert jnp.isnan(x.astype(jnp.float8_e4m3fn))
    assert jnp.isinf(jnp.float32(1e6).astype(jnp.float8_e5m2))
    assert float(saturating_cast(x, "float8_e4m3fn")) == 448
    with jax.enable_x64(True):
        above = jnp.float64(1 + 2.0**-11 + 2.0**-40)  # more than half a step above 1
        assert float(above.astype(jnp.float16)) == 1
        assert float(saturating_cast(above, "float16")) == 1 + 2.0**-10


finite = st.floats(allow_nan=False, allow_infinity=False, width=32, allow_subnormal=False)


@given(finite, finite, st.sampled_from(NARROW))
def test_rounding_is_odd_monotone_idempotent_and_as_near_as_steps_allow(x, y, name):
    fmt = FORMATS[name]
    low, high = sorted((x, y))
    a, b, minus = (float(quantized(np.float32(v), name)) for v in (low, high, -low))
    assert a <= b
    assert minus == -a
    assert abs(a) <= fmt.max
    assert float(quantized(np.float32(a), name)) == a
    if abs(low) <= fmt.max:
        assert abs(a - low) <= max(fmt.eps * abs(low), fmt.smallest_subnormal) / 2


@given(finite, st.sampled_from([name for name in NARROW if FORMATS[name].bits != 6]))
def test_casts_of_finite_numbers_are_finite_and_those_of_quantized(x, name):
    cast = float(saturating_cast(np.float32(x), name))
    assert cast == float(quantized(np.float32(x), name))


def test_derivatives_pass_straight_through():
    x = jnp.array([0.3, 500.0, -1e6, 1e-9], jnp.float32)
    g = jnp.array([1e-6, 3.0, 1e9, -0.1], jnp.float32)  # no numbers of the format
    y, pull = jax.vjp(jax.jit(lambda x: quantized(x, "float8_e4m3fn")), x)
    np.testing.assert_array_equal(pull(g)[0], g)
    np.testing.assert_array_equal(y, [0.3125, 448, -448, 0])
    np.testing.assert_array_equal(jax.jvp(lambda x: quantized(x, "float16"), (x,), (g,))[1], g)
    rows = jax.vmap(lambda x: quantized(x, "float8_e4m3fn"))(jnp.stack([x, 2 * x]))
    np.testing.assert_array_equal(rows[0], y)


def test_what_cannot_be_rounded_is_refused():
    for function in (saturating_cast, quantized):
        with pytest.raises(TypeError, match="x must be floating, got .*int32"):
            function(jnp.arange(3), "float8_e4m3fn")
    with pytest.raises(ValueError, match="XLA does not convert to float6_e3m2fn.*quantized"):
        saturating_cast(jnp.ones(3), "float6_e3m2fn")


# Models whose products read rounded numbers.


@jax.custom_vjp
def rounded_dot(x, w):
    return jnp.matmul(quantized(x, "float8_e4m3fn"), quantized(w, "float8_e4m3fn"))


def rounded_dot_bwd(kept, g):
    x, w = (quantized(each, "float8_e4m3fn") for each in kept)
    g = quantized(g, "float8_e5m2")
    return g @ w.T, x.T @ g


rounded_dot.defvjp(lambda x, w: (rounded_dot(x, w), (x, w)), rounded_dot_bwd)


def chained(dot, w, x):
    return jnp.tanh(dot(jnp.tanh(dot(x, w)), w))


def called(dot, w, x):
    inner = jax.jit(lambda w, x: jnp.tanh(dot(x, w)))
    return inner(w, inner(w, x))


def scanned(dot, w, x):
    body = lambda x, scale: (jnp.tanh(dot(x, w * scale)), dot(x, w))  # noqa: E731
    last, each = jax.lax.scan(body, x, jnp.array([0.5, 2.0, 3.0]), reverse=True)
    return last + jnp.sum(each, 0)


def branched(dot, w, x):
    cases = [lambda x: dot(x, w), lambda x: jnp.sin(x), lambda x: dot(2 * x, w)]
    return sum(jax.lax.switch(jnp.asarray(i), cases, x) for i in range(3))


def rematerialised(dot, w, x):
    policy = jax.checkpoint_policies.nothing_saveable
    layer = jax.checkpoint(lambda x: jnp.tanh(dot(x, w)), policy=policy)
    return layer(layer(x))


def counted(dot, w, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(dot(x, w)), x)


def until(dot, w, x):
    """What the condition reads saturates below its limit: the loop runs to the end."""

    def going(state):
        return (state[0] < 9) & (jnp.max(jnp.abs(dot(state[1], 0.1 * w))) < 500.0)

    body = lambda state: (state[0] + 1, 2 * state[1] + jnp.tanh(dot(state[1], w)))  # noqa: E731
    turns, x = jax.lax.while_loop(going, body, (jnp.asarray(0), x))
    return x + turns.astype(jnp.float32)


def sharded(dot, w, x):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    local = lambda w, x: jnp.tanh(dot(x, w))  # noqa: E731
    rows = jax.P("rows")
    return jax.shard_map(local, mesh=mesh, in_specs=(jax.P(), rows), out_specs=rows)(w, x)


PROGRAMS = [chained, called, scanned, branched, rematerialised, counted, until, sharded]


def operands():
    w, x = (np.random.default_rng(i).standard_normal(s) for i, s in enumerate([(6, 6), (4, 6)]))
    return jnp.asarray(w, jnp.float32), jnp.asarray(40 * x, jnp.float32)  # some beyond 448


@pytest.mark.parametrize("program", PROGRAMS)
def test_products_are_rounded_wherever_they_are(program):
    w, x = operands()
    found = jax.jit(simulate_format(lambda w, x: program(jnp.matmul, w, x), "float8_e4m3fn"))
    want = jax.jit(lambda w, x: program(rounded_dot, w, x))
    np.testing.assert_allclose(found(w, x), want(w, x), rtol=1e-6, atol=1e-6)
    plain = program(jnp.matmul, w, x)
    assert float(jnp.max(jnp.abs(found(w, x) - plain))) > 1e-3


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p not in (until, sharded)])
def test_gradients_are_of_rounded_operands_and_cotangents(program):
    w, x = operands()
    simulated = simulate_format(lambda w, x: program(jnp.matmul, w, x), "float8_e4m3fn")
    cost = lambda f: jax.jit(jax.grad(lambda w, x: jnp.sum(f(w, x / 40) ** 2), (0, 1)))  # noqa: E731
    found = cost(simulated)(w, x)
    want = cost(lambda w, x: program(rounded_dot, w, x))(w, x)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))


def test_gradients_within_shard_map_are_summed_over_shards():
    w, x = operands()
    simulated = simulate_format(lambda w, x: sharded(jnp.matmul, w, x), "float8_e4m3fn")
    found = jax.jit(jax.grad(lambda w: jnp.sum(simulated(w, x / 40))))(w)
    want = jax.grad(lambda w: jnp.sum(jnp.tanh(rounded_dot(x / 40, w))))(w)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_rematerialised_layers_still_are():
    w, x = operands()
    simulated = simulate_format(lambda w, x: rematerialised(jnp.matmul, w, x), "float8_e4m3fn")
    text = str(jax.make_jaxpr(jax.grad(lambda w: jnp.sum(simulated(w, x))))(w))
    assert text.count("remat2") >= 2


def test_convolutions():
    x, kernel = (np.random.default_rng(i).standard_normal(s) for i, s in enumerate(SHAPES))
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 1), "SAME")  # noqa: E731
    y, pull = jax.vjp(simulate_format(conv, "float6_e3m2fn", backward="float4_e2m1fn"), x, kernel)
    read = [quantized(each, "float6_e3m2fn") for each in (x, kernel)]
    want, want_pull = jax.vjp(conv, *read)
    np.testing.assert_array_equal(y, want)
    for a, b in zip(pull(y), want_pull(quantized(want, "float4_e2m1fn")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


SHAPES = [(2, 3, 8, 7), (5, 3, 3, 2)]


def test_ragged_products_and_those_of_integers():
    x, w = (np.random.default_rng(i).standard_normal(s) for i, s in enumerate([(6, 3), (2, 3, 4)]))
    x, w, sizes = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.array([2, 4])
    f = lambda x, w: jax.lax.ragged_dot(x, w, sizes) * (sizes @ sizes).astype(jnp.float32)  # noqa: E731
    gradient = jax.grad(lambda *args: jnp.sum(simulate_format(f, "float8_e4m3fn")(*args)), (0, 1))
    read = [quantized(each, "float8_e4m3fn") for each in (x, w)]
    want = jax.grad(lambda *args: jnp.sum(f(*args)), (0, 1))(*read)  # 20 is a number of e5m2
    for a, b in zip(gradient(x, w), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_derivative_rules_of_others_are_kept_and_not_looked_into():
    @jax.custom_vjp
    def odd(x, w):
        return x @ w

    odd.defvjp(lambda x, w: (x @ w, w), lambda w, g: (7 * g @ w.T, jnp.zeros_like(w)))

    @jax.custom_jvp
    def odder(x, w):
        return x @ w

    odder.defjvp(lambda primals, tangents: (odder(*primals), 5 * tangents[0] @ primals[1]))
    w, x = operands()
    for rule, factor in ((odd, 7), (odder, 5)):
        y, pull = jax.vjp(simulate_format(rule, "float8_e4m3fn"), x, w)
        np.testing.assert_array_equal(y, x @ w)
        np.testing.assert_allclose(pull(y)[0], factor * y @ w.T, rtol=1e-6)
        assert not np.any(pull(y)[1])


@pytest.mark.parametrize("name", ["scan remat attention", "custom derivatives", "nnx scan"])
def test_models_run_as_they_are_where_rounding_does_nothing(name):
    model = prepared(name)
    args = jax.tree.map(
        lambda x: x.astype(np.float32) if x.dtype == np.float64 else x,
        (model.params, model.inputs),
    )
    params, inputs = args
    apply = model.model.apply
    found, want = jax.jit(lambda p, i: (simulate_format(apply, "float32")(p, *i), apply(p, *i)))(
        params, inputs
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    rounded = jax.jit(lambda p, i: simulate_format(apply, "float4_e2m1fn")(p, *i))(params, inputs)
    pairs = zip(jax.tree.leaves(rounded), jax.tree.leaves(want), strict=True)
    assert any(np.any(np.abs(a - b) > 1e-3) for a, b in pairs)


def test_other_arguments_are_passed_on_and_dtypes_stay():
    def apply(model, x, *, double, label):
        assert label == "text"
        return {"y": model(x) * (2 if double else 1), "none": None}

    model = nnx.Linear(6, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    _, x = operands()
    found = simulate_format(apply, "float8_e4m3fn")(model, x, double=True, label="text")
    want = apply(model, x, double=True, label="text")
    assert found["none"] is None
    assert found["y"].dtype == want["y"].dtype == jnp.bfloat16
    assert 0 < float(jnp.max(jnp.abs(found["y"] - want["y"]))) < 32


def test_formats_of_cotangents_by_default():
    g = jnp.full((1, 1), 1.1875, jnp.float32)  # a number of neither e4m3 nor e5m2
    for name, want in (("float8_e4m3fn", 1.25), ("float8_e3m4", 1.25), ("bfloat16", 1.1875)):
        one = jnp.ones((1, 1), jnp.float32)
        _, pull = jax.vjp(simulate_format(jnp.matmul, name), one, one)
        assert float(pull(g)[0][0, 0]) == want
    with pytest.raises(ValueError, match="no number format"):
        simulate_format(jnp.matmul, "fp8")
    with pytest.raises(ValueError, match="no number format"):
        simulate_format(jnp.matmul, "float16", backward="fp8")
