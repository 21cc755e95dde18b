"""Programs written to be grown wrongly: refused for the right reason, or exact."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests import adversarial_models, adversarial_steps, resizing
from tests.adversarial import CASES, middle

# Imported for the programs they define.
_MODELS = adversarial_models, adversarial_steps

# Values that depend on the place along an axis.
middle("iota", lambda h, n: h * jnp.arange(n), "`iota` counts it")
middle("linspace", lambda h, n: h * jnp.linspace(0.5, 1.0, n), "`iota` counts it")
middle("sinusoid", lambda h, n: h + jnp.sin(10.0 ** (-jnp.arange(n) / n)), "`iota` counts it")
middle("mask", lambda h, n: jnp.where(jnp.arange(n) < 2, h, 0.0), "`iota` counts it")
middle("cumsum_of_ones", lambda h, n: h * jnp.cumsum(jnp.ones(n)), "`cumsum` mixes places")
middle("identity_row", lambda h, n: h * jnp.eye(n)[0], "`iota` counts it")
middle("tri_row", lambda h, n: h * jnp.tri(n).sum(0), "`iota` counts it")
middle("captured", lambda h, n: h * np.linspace(0.5, 1.0, n), "closes over")
middle("captured_jax", lambda h, n: h * jnp.asarray(np.hanning(n + 2)[1:-1]), "closes over")
middle("captured_uniform", lambda h, n: h * np.full(n, 0.7))
middle("captured_uniform_by_size", lambda h, n: h * np.full(n, 0.7 / n))
middle("captured_pair", lambda h, n: h * np.repeat([0.5, 1.0], n // 2), "closes over")
middle("scatter_one", lambda h, n: h.at[:, 0].set(0.0), "`scatter` looks places up")
middle("padded_and_cut", lambda h, n: jnp.pad(h, ((0, 0), (1, 0)))[:, :-1])
middle("one_hot", lambda h, n: h * jax.nn.one_hot(1, n, dtype=h.dtype), "`iota` counts it")
middle("random", lambda h, n: h * jax.random.uniform(jax.random.key(0), (n,)), "random numbers")
middle(
    "dropout",
    lambda h, n: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0.0),
    "random numbers",
)
middle(
    "dropout_of_rows",
    lambda h, n: jnp.where(jax.random.bernoulli(jax.random.key(3), 0.5, (len(h), 1)), h, 0.0),
)


# The order of places, and neighbours.
middle("cumsum", lambda h, n: jnp.cumsum(h, -1), "`cumsum` mixes places")
middle("cumprod", lambda h, n: jnp.cumprod(h, -1), "`cumprod` mixes places")
middle("cummax", lambda h, n: lax.cummax(h, 1), "`cummax` mixes places")
middle("cumlogsumexp", lambda h, n: lax.cumlogsumexp(h, 1), "`cumlogsumexp` mixes places")
middle(
    "associative_scan", lambda h, n: lax.associative_scan(jnp.add, h, axis=1), "different programs"
)
middle(
    "scan_over_units",
    lambda h, n: lax.scan(lambda c, a: (c + a,) * 2, h[:, 0], h.T)[1].T,
    "different programs",
)
middle("sort", lambda h, n: jnp.sort(h, -1), "`sort` orders")
middle("argsort", lambda h, n: h * jnp.argsort(h, -1), "`sort` orders")
middle("median", lambda h, n: h - jnp.median(h, -1, keepdims=True), "`sort` orders")
middle("quantile", lambda h, n: h - jnp.quantile(h, 0.3, axis=-1, keepdims=True), "`sort` orders")
middle("top_k", lambda h, n: h * lax.top_k(h, 2)[0].sum(-1, keepdims=True), "`top_k` ranks")
middle("flip", lambda h, n: h[:, ::-1], "`rev` reverses")
middle("roll", lambda h, n: h + jnp.roll(h, 1, -1), "cuts across its structure")
middle("differences", lambda h, n: h - jnp.diff(h, prepend=0.0), "cuts across its structure")
middle("fft", lambda h, n: jnp.fft.fft(h).real, "`fft` transforms")
middle("argmax", lambda h, n: h * jnp.argmax(h, -1, keepdims=True), "`argmax` counts places")
middle("argmax_of_rows", lambda h, n: h * (1 + jnp.argmax(h, 0)))
middle("first_unit", lambda h, n: h * h[:, :1])
middle("every_other_unit", lambda h, n: h * jnp.repeat(lax.slice_in_dim(h, 0, n, 2, 1), 2, -1))
middle("halves", lambda h, n: jnp.tile(h[:, : n // 2] * h[:, n // 2 :], 2))
middle("interleaved", lambda h, n: jnp.stack(jnp.split(h, 2, -1), -1).reshape(len(h), n))
middle(
    "convolved", lambda h, n: jnp.convolve(h[0], jnp.ones(3), "same") * h, "slides over neighbours"
)
middle(
    "gathered_by_sort", lambda h, n: jnp.take_along_axis(h, jnp.argsort(h, -1), -1), "`sort` orders"
)
middle(
    "kept_by_rank", lambda h, n: jnp.where(h >= jnp.sort(h, -1)[:, -2:-1], h, 0.0), "`sort` orders"
)
middle(
    "histogram",
    lambda h, n: h * jnp.histogram(h, 3, (-1.0, 1.0))[0][0].astype(h.dtype),
    "`scatter-add` looks places up",
)


# Reductions that count replicas.
middle("sum", lambda h, n: h + h.sum(-1, keepdims=True), "must agree")
middle("prod", lambda h, n: h * jnp.prod(h, -1, keepdims=True), "`reduce_prod` multiplies")
middle("logsumexp", lambda h, n: h + jax.nn.logsumexp(h, -1, keepdims=True), "`log` needs")
middle("logmeanexp", lambda h, n: h + jnp.log(jnp.exp(h).mean(-1, keepdims=True)))
middle(
    "entropy",
    lambda h, n: h * jax.scipy.special.entr(jax.nn.softmax(h)).sum(-1)[:, None],
    "`log` needs",
)
middle("max", lambda h, n: h - h.max(-1, keepdims=True))
middle("var", lambda h, n: h / (1 + h.var(-1, keepdims=True)))
middle("var_ddof_1", lambda h, n: h / (1 + h.var(-1, ddof=1, keepdims=True)), "must agree")
middle("layer_norm_ddof_1", lambda h, n: h / h.std(-1, ddof=1, keepdims=True))
middle("layer_norm", lambda h, n: (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True))
middle("rms_norm", lambda h, n: h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-5))
middle("l2_norm", lambda h, n: h / jnp.linalg.norm(h, axis=-1, keepdims=True))
middle("l2_eps", lambda h, n: h / jnp.sqrt((h**2).sum(-1, keepdims=True) + 1), "must agree")
middle("softmax", lambda h, n: jax.nn.softmax(h))
middle("log_softmax", lambda h, n: jax.nn.log_softmax(h), "`log` needs")
middle("softmax_and_itself", lambda h, n: h + jax.nn.softmax(h), "must agree")
middle("count", lambda h, n: h * (h > 0).sum(-1, keepdims=True), "counts in integers")
middle("count_divides", lambda h, n: h / (1 + (h > 0).sum(-1, keepdims=True)), "counts in integers")
middle("count_nonzero", lambda h, n: h * jnp.count_nonzero(h > 0, axis=-1)[:, None], "in integers")
middle("parity", lambda h, n: h * ((h > 0).sum(-1, keepdims=True) % 2), "counts in integers")
middle(
    "integer_dot",
    lambda h, n: h * (((h > 0).astype(int)) @ jnp.ones(n, int))[:, None],
    "counts in integers",
)
middle("share", lambda h, n: h * (h > 0).mean(-1, keepdims=True))
middle("any", lambda h, n: h * (h > 0.5).any(-1, keepdims=True))
middle("bit_or", lambda h, n: h * lax.reduce_or_p.bind((h * 9).astype(int), axes=(1,))[:, None])
middle(
    "bit_xor",
    lambda h, n: h * lax.reduce_xor_p.bind((h * 9).astype(int), axes=(1,))[:, None],
    "no rule",
)
middle("size", lambda h, n: h + n, "must agree")
middle("size_less_one", lambda h, n: jnp.tanh(h * (n - 1)), "`tanh` needs")
middle("size_in_int", lambda h, n: h * (jnp.int32(n) // 3), "integer")
middle("size_in_power", lambda h, n: jnp.abs(h) ** (1 / n), "`pow` needs")
middle("size_in_half_precision", lambda h, n: h * np.float64(np.float16(1 / (3 * n + 1))))
middle(
    "scan_counts", lambda h, n: lax.fori_loop(0, n, lambda i, a: a * 0.9, h), "different programs"
)
middle(
    "scan_to_size",
    lambda h, n: lax.fori_loop(0, jnp.int32(n), lambda i, a: a * 0.9, h),
    "an integer is",
)
middle(
    "segment_sum",
    lambda h, n: h * jax.ops.segment_sum(h.T, jnp.zeros(n, int), 2)[0][:, None],
    "`scatter-add` looks places up",
)
middle(
    "scattered_counts",
    lambda h, n: h * jnp.zeros(3).at[jnp.clip((3 * h).astype(int), 0, 2)].add(1.0)[0],
    "`scatter-add` looks places up",
)
middle(
    "scattered_by_value",
    lambda h, n: h * jnp.zeros(3).at[jnp.clip((3 * h).astype(int), 0, 2)].max(jnp.abs(h))[0],
)


# Numbers that count as they are.
middle("threshold", lambda h, n: jnp.where(h > 0.5, h, 0.0))
middle("threshold_of_sum", lambda h, n: jnp.where(h.sum(-1, keepdims=True) > 0.5, h, -h), "agree")
middle("clip_of_sum", lambda h, n: h * jnp.clip(h.sum(-1, keepdims=True), -1, 1), "must agree")
middle("floor_of_sum", lambda h, n: h * jnp.floor(h.sum(-1, keepdims=True)), "`floor` needs")
middle("int_of_sum", lambda h, n: h * h.sum(-1, keepdims=True).astype(int), "without a factor")
middle("int_and_back", lambda h, n: h + (10 * h).astype(int).astype(h.dtype))
middle("sign_of_sum", lambda h, n: h * jnp.sign(h.sum(-1, keepdims=True)))
middle(
    "bits", lambda h, n: lax.bitcast_convert_type(lax.bitcast_convert_type(h, np.int64) | 1, float)
)
middle(
    "bits_of_sum",
    lambda h, n: h * (lax.bitcast_convert_type(h.sum(-1, keepdims=True), np.int64) % 2),
    "`bitcast_convert_type` needs",
)
middle("power_0", lambda h, n: h + h.sum(-1, keepdims=True) ** 0)
middle("zero_to_the_zero", lambda h, n: h + (jnp.zeros(n) * n) ** 0)
middle(
    "power_of_sum", lambda h, n: h * jnp.abs(h).sum(-1, keepdims=True) ** 0.123456789, "`pow` needs"
)
middle(
    "infinite_power", lambda h, n: h * (jnp.abs(h).sum(-1, keepdims=True) > 2) ** jnp.inf, "agree"
)
middle(
    "complex_power",
    lambda h, n: h * (jnp.abs(h).sum(-1, keepdims=True).astype(complex) ** np.complex128(1j)).real,
    "`pow` needs",
)
middle("not_quite_zero", lambda h, n: h + 0.0 * h.sum(-1, keepdims=True), "must agree")
middle("cancels", lambda h, n: h + (h.sum(-1, keepdims=True) - h.sum(-1, keepdims=True)), "agree")
middle("exp_of_zero", lambda h, n: h * jnp.exp(jnp.zeros(n)))
middle(
    "nan_test",
    lambda h, n: jnp.where(jnp.isnan(h.sum(-1, keepdims=True) * jnp.nan), h, 1.0),
)
middle("infinite_over_sum", lambda h, n: jnp.where(jnp.inf / h.sum(-1, keepdims=True) > 0, h, -h))
middle(
    "cast_beyond_integers",
    lambda h, n: jnp.where(jnp.full(2, jnp.inf).astype(int).max() > 0, h.sum(-1, keepdims=True), h),
    "must agree",
)
middle("remainder", lambda h, n: h * (h.sum(-1, keepdims=True) % 0.5), "must agree")
middle("atan2", lambda h, n: h * jnp.arctan2(h.sum(-1), 2 * h.sum(-1))[:, None])
middle(
    "atan2_of_one",
    lambda h, n: h * jnp.arctan2(h.sum(-1), h[:, 0] * 0 + 1)[:, None],
    "equally often",
)
middle(
    "gamma_of_sum",
    lambda h, n: h * jax.random.gamma(jax.random.key(0), jnp.abs(h).sum(-1, keepdims=True)),
    "without a factor",
)
middle(
    "applied_in_place",
    lambda h, n: h * jnp.abs(h).sum(-1).at[1].apply(jnp.sin)[:, None],
    "without a factor",
)
middle(
    "filled",
    lambda h, n: (
        h * h.sum(-1).at[jnp.array([0, 9, 1, 2, 9])].get(mode="fill", fill_value=5.0)[:, None]
    ),
    "without a factor",
)
middle(
    "approx_top_k",
    lambda h, n: lax.approx_max_k(h.T, 2, reduction_dimension=0)[0].T @ jnp.ones((2, n)) * h,
    "`top_k` ranks",
)


# Matrices.
middle("gram_of_batch", lambda h, n: h @ (h.T @ h) / n)
middle("gram_of_units", lambda h, n: jnp.tanh(h @ h.T) @ h, "`tanh` needs")
middle("outer", lambda h, n: (h[:, :, None] * h[:, None, :]).sum(1) / n)
middle("eye", lambda h, n: h @ jnp.eye(n), "`iota` counts it")
middle("kron", lambda h, n: jnp.kron(h, jnp.ones((1, 2))).reshape(len(h), n, 2)[..., 0])
middle("diagonal", lambda h, n: jnp.diagonal(h.T @ h) * h, "`gather` looks places up")
middle("inverse", lambda h, n: h @ jnp.linalg.inv(h.T @ h + jnp.eye(n)), "works on whole matrices")
middle("inverse_of_batch", lambda h, n: jnp.linalg.inv(h @ h.T / n + jnp.eye(len(h))) @ h)
middle("svd", lambda h, n: h * jnp.linalg.svd(h)[1][0], "works on whole matrices")
middle("qr", lambda h, n: h * jnp.linalg.qr(h)[0][:, :1], "works on whole matrices")
middle("determinant", lambda h, n: h * jnp.linalg.det(h.T @ h), "works on whole matrices")


# Opaque calls, and control.
middle(
    "callback",
    lambda h, n: jax.pure_callback(np.cos, jax.ShapeDtypeStruct(h.shape, h.dtype), h),
    "different programs",
)
middle("python_branch", lambda h, n: jnp.sin(h) if n > 4 else jnp.cos(h), "different programs")
middle(
    "python_rewiring", lambda h, n: h - 2 * h.T.T if n > 4 else 2 * h - h.T.T, "different programs"
)
middle("python_constant", lambda h, n: h * (0.3 if n > 4 else 0.7))
middle("python_sign", lambda h, n: h * (0.3 if n > 4 else -0.7), "a constant is")
middle("python_count", lambda h, n: sum([h] * n), "different programs")
middle(
    "python_operands",
    lambda h, n: jnp.concatenate([h] * n).reshape(n, *h.shape).sum(0),
    "different programs",
)
middle("python_axis", lambda h, n: h * h.mean(n // 8, keepdims=True), "different programs")
middle("switch", lambda h, n: lax.switch(n // 4, [jnp.sin, jnp.cos, jnp.tan], h), "an integer is")
middle(
    "branches",
    lambda h, n: lax.switch(jnp.argmax(h[:, 0]), [jnp.sin, jnp.cos] * (n // 4), h),
    "different programs",
)
middle("while_mean", lambda h, n: lax.while_loop(lambda a: (a**2).mean() > 0.1, lambda a: a / 2, h))
middle(
    "while_norm",
    lambda h, n: lax.while_loop(lambda a: (a**2).sum() > 0.1, lambda a: a / 2, h),
    "must agree",
)
middle("mutable", lambda h, n: _written(h), "mutable")
middle("custom_vjp", lambda h, n: jax.grad(lambda a: _straight(a).sum())(h) + _straight(h))
middle("checkpoint", lambda h, n: jax.checkpoint(lambda a: jnp.sin(a) * a)(h))
middle("mapped_mean", lambda h, n: _mapped(lambda a: a - lax.pmean(a, "units"), h))
middle("mapped_max", lambda h, n: _mapped(lambda a: a - lax.pmax(a, "units"), h))
middle("mapped_sum", lambda h, n: h + _mapped(lambda a: lax.psum(a, "units"), h), "agree")
middle(
    "mapped_place", lambda h, n: _mapped(lambda a: a * lax.axis_index("units"), h), "`iota` counts"
)
middle("map", lambda h, n: lax.map(jnp.sin, h))
middle("map_over_units", lambda h, n: lax.map(jnp.sin, h.T).T, "different programs")
middle("gradient", lambda h, n: h - jax.grad(lambda a: jnp.cosh(a).sum())(h))
middle("gradient_of_mean", lambda h, n: h - jax.grad(lambda a: jnp.cosh(a).mean())(h), "agree")
middle(
    "hessian",
    lambda h, n: jax.vmap(jax.hessian(lambda a: (a**4).sum()))(h).sum(1),
    "`iota` counts it",
)


def _mapped(fun, h):
    return jax.vmap(fun, 1, 1, axis_name="units")(h)


def _written(h: jax.Array) -> jax.Array:
    ref = jax.new_ref(jnp.zeros_like(h))
    ref[...] = jnp.sin(h)
    return ref[...]


@jax.custom_vjp
def _straight(a: jax.Array) -> jax.Array:
    return jnp.round(3 * a)


_straight.defvjp(lambda a: (_straight(a), None), lambda _, g: (3 * g,))


@pytest.fixture
def lenient(strict_promotion):
    """As a user's session: programs are written as people write them."""
    promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with jax.enable_x64(True), promotion[0], promotion[1]:
        yield


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("lenient")
def test_it_is_exact_or_refused_for_its_reason(name):
    case = CASES[name]
    if case.words is None:
        assert resizing.error(case.model(0), case.model(1), case.inputs) < 1e-11
        return
    with pytest.raises(ValueError, match=re.escape(case.words)) as caught:
        resizing.error(case.model(0), case.model(1), case.inputs)
    assert "Expected" in str(caught.value)
