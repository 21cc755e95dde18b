"""A function for every primitive, with the axes it should have.

A row of ``EXAMPLES`` has the axes of arguments and results: a letter an axis, capital if it is
held still, products with a dot, parts in brackets.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import primitives as P
from jax.extend.random import threefry2x32_p
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

RNG = np.random.default_rng(0)


def x(*shape: int) -> np.ndarray:
    """Positive numbers below one, all different."""
    return RNG.uniform(0.1, 0.9, shape)


def z(*shape: int) -> np.ndarray:
    return x(*shape) + 1j * x(*shape)


def n(*shape: int, high: int = 9) -> np.ndarray:
    return RNG.integers(0, high, shape).astype(np.int32)


def b(*shape: int) -> np.ndarray:
    return RNG.uniform(size=shape) < 0.5


class Example(NamedTuple):
    axes: str
    fun: Callable[..., Any]
    args: tuple[Any, ...]


EXAMPLES: dict[str, Example] = {}


def row(name: str, axes: str, fun: Callable[..., Any], *args: Any) -> None:
    assert name not in EXAMPLES
    EXAMPLES[name] = Example(axes, fun, args)


def unary(names: str, make: Callable[..., Any] = x, of: Any = None) -> None:
    for name in names.split():
        fun = of or (lambda a, name=name: getattr(lax, name)(a))
        row(name, "a b -> a b", fun, make(3, 4))


def binary(names: str, make: Callable[..., Any] = x, of: Any = None) -> None:
    for name in names.split():
        fun = of or (lambda a, c, name=name: getattr(lax, name)(a, c))
        row(name, "a b, a b -> a b", fun, make(3, 4), make(3, 4))


def bound(names: str, *makes: Callable[..., Any]) -> None:
    """Primitives that no public function of jax.lax is called after."""
    for name in names.split():
        fun = lambda *args, name=name: getattr(P, f"{name}_p").bind(*args)  # noqa: E731
        operands = ", ".join(["a b"] * len(makes))
        row(name, f"{operands} -> a b", fun, *(make(3, 4) for make in makes))


def definite(*shape: int) -> np.ndarray:
    """Symmetric positive definite matrices."""
    a = x(*shape, shape[-1])
    return a @ np.swapaxes(a, -1, -2) + np.eye(shape[-1])


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:2]), ("d",))


def sharded(fun: Callable[..., Any], out: Any = "d", **options: Any) -> Callable[..., Any]:
    specs = {"in_specs": PartitionSpec("d"), "out_specs": PartitionSpec(out)}
    return lambda a: jax.shard_map(fun, mesh=mesh(), **specs, **options)(a)


unary("abs neg square sqrt rsqrt cbrt exp exp2 expm1 log log1p logistic tanh tan sin cos sign")
unary("asin acos atan sinh cosh asinh atanh erf erfc erf_inv lgamma digamma floor ceil round")
unary("is_finite bessel_i0e bessel_i1e stop_gradient optimization_barrier")
unary("acosh", lambda *shape: 1 + x(*shape))
unary("real imag conj", z)
unary("population_count clz", n)
unary("integer_pow", of=lambda a: lax.integer_pow(a, -3))
unary("convert_element_type", of=lambda a: a.astype(jnp.complex128))
unary("bitcast_convert_type", of=lambda a: lax.bitcast_convert_type(a, jnp.int64))
unary("copy", of=jnp.copy)
unary("not", b, of=jnp.logical_not)
unary("reduce_precision", of=lambda a: lax.reduce_precision(a, 11, 52))
unary("device_put", of=lambda a: jax.device_put(a))
unary("name", of=lambda a: checkpoint_name(a, "here"))
unary("sharding_constraint", of=lambda a: lax.with_sharding_constraint(a, at(PartitionSpec())))
unary("layout_constraint", of=lambda a: constrained(a))
unary("reshard", of=lambda a: resharded(a))
binary("mul div add sub max min rem atan2 nextafter complex igamma igammac igamma_grad_a")
binary("eq ne lt le gt ge")
binary("and", b, of=lax.bitwise_and)
binary("or", b, of=lax.bitwise_or)
binary("xor", b, of=lax.bitwise_xor)
binary("shift_left shift_right_logical shift_right_arithmetic mulhi", n)
bound("eq_to le_to lt_to", x, x)
binary("add_any", of=lambda a, c: jax.grad(lambda w: (w * c + w * a).sum())(a))
row("pow", "a b -> a b", lambda a: lax.pow(a, -1.5), x(3, 4))
row("zeta", "a b -> a b", lambda a: lax.zeta(2 + a, a), x(3, 4))
row("polygamma", "a b -> a b", lambda a: lax.polygamma(jnp.ones_like(a), a), x(3, 4))
row(
    "regularized_incomplete_beta",
    "a b, " * 2 + "a b -> a b",
    lax.betainc,
    *(x(3, 4) for _ in "abx"),
)
row("select_n", "a b, a b, a b -> a b", lax.select_n, b(3, 4), x(3, 4), x(3, 4))
row("clamp", ", a b,  -> a b", lax.clamp, x(), x(3, 4), x())

row(
    "broadcast_in_dim",
    "a b -> a c b",
    lambda a: lax.broadcast_in_dim(a, (3, 5, 4), (0, 2)),
    x(3, 4),
)
row("transpose", "a b c -> c a b", lambda a: a.transpose(2, 0, 1), x(3, 4, 5))
row("squeeze", "a 1 b -> a b", lambda a: a.squeeze(1), x(3, 1, 4))
row("reshape", "a·b c d -> a b c·d", lambda a: a.reshape(3, 2, 10), x(6, 2, 5))
row("tile", "a b -> a c·b", lambda a: jnp.tile(a, (1, 2)), x(3, 4))
row("reduce_sum", "a b c -> a c", lambda a: a.sum(1), x(3, 4, 5))
row("reduce_max", "a b -> a", lambda a: a.max(1), x(3, 4))
row("reduce_min", "a b -> a", lambda a: a.min(1), x(3, 4))
row("reduce_and", "a b -> a", lambda a: a.all(1), b(3, 4))
row("reduce_or", "a b -> a", lambda a: a.any(1), b(3, 4))
row("reduce_prod", "a B -> a", lambda a: a.prod(1), x(3, 4))
row("argmax", "a B -> a", lambda a: lax.argmax(a, 1, jnp.int32), x(3, 4))
row("argmin", "a B -> a", lambda a: lax.argmin(a, 1, jnp.int32), x(3, 4))
for along in ("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp"):
    row(along, "a B -> a C", lambda a, f=along: getattr(lax, f)(a, axis=1), x(3, 4))
row("rev", "a B -> a C", lambda a: a[:, ::-1], x(3, 4))
row("fft", "a B -> a C", lambda a: jnp.fft.fft(a), z(3, 4))
row("sort", "a B, a B -> a C, a D", lambda a, c: lax.sort((a, c), dimension=1), x(3, 4), x(3, 4))
row("top_k", "a B -> a C, a D", lambda a: lax.top_k(a, 2), x(3, 4))
row("approx_top_k", "a B -> a C, a D", lambda a: lax.approx_max_k(a, 2), x(3, 4))
row("iota", "a B -> a B", lambda a: a * lax.broadcasted_iota(jnp.float64, (3, 4), 1), x(3, 4))

KEY = jax.random.key(3)
row("random_bits", " -> A", lambda k: jax.random.bits(k, (3,)), KEY)
row("random_fold_in", " -> A", lambda k: jax.random.key_data(jax.random.fold_in(k, 7)), KEY)
row("random_split", " -> A B", lambda k: jax.random.key_data(jax.random.split(k)), KEY)
row("random_clone", " -> A", lambda k: jax.random.key_data(jax.random.clone(k)), KEY)
row("random_unwrap", " -> A", lambda k: jax.random.key_data(k), KEY)
row(
    "random_wrap",
    "A -> B",
    lambda d: jax.random.key_data(jax.random.wrap_key_data(d)),
    np.arange(2, dtype=np.uint32),
)
row("random_seed", " -> A", lambda s: jax.random.key_data(jax.random.key(s)), n())
row("random_gamma", ", A -> B", lambda k, a: jax.random.gamma(k, a), KEY, x(3))
row(
    "rng_bit_generator",
    "A -> B, C",
    lambda k: lax.rng_bit_generator(k, (3,)),
    np.arange(4, dtype=np.uint32),
)
row("rng_uniform", " -> A", lambda a: lax.rng_uniform(a, a * (1 + 1e-15), (3,)), x())
row(
    "threefry2x32",
    "A, B, C, D -> E, F",
    lambda *a: threefry2x32_p.bind(*a),
    *(np.arange(2, dtype=np.uint32) for _ in "kkxx"),
)

row(
    "dot_general",
    "a b c, a c d -> a b d",
    lambda a, c: jnp.einsum("bij,bjk->bik", a, c),
    x(2, 3, 4),
    x(2, 4, 5),
)
row(
    "ragged_dot_general",
    "A b, C b d, E -> A d",
    lax.ragged_dot,
    x(6, 4),
    x(2, 4, 5),
    np.array([2, 4], np.int32),
)
row(
    "conv_general_dilated",
    "a B c·d, E d c·f -> a G c·f",
    lambda a, k: conv(a, k, groups=2),
    x(2, 7, 6),
    x(3, 3, 10),
)
for window in ("sum", "max", "min"):
    row(f"reduce_window_{window}", "a B -> a C", lambda a, w=window: windows(a, w), x(3, 7))

row("slice", "a (b|c|d) -> a c", lambda a: a[:, 2:5], x(3, 9))
row("split", "a (b|c) -> a b, a c", lambda a: lax.split(a, (2, 5), axis=1), x(3, 7))
row("concatenate", "a b, a c -> a (b|c)", lambda a, c: jnp.concatenate([a, c], 1), x(3, 2), x(3, 5))
row("pad", "a b,  -> a (c|b|d)", lambda a, p: lax.pad(a, p, ((0, 0, 0), (2, 5, 0))), x(3, 4), x())
row(
    "dynamic_slice",
    "a B,  -> a C",
    lambda a, i: lax.dynamic_slice_in_dim(a, i, 2, 1),
    x(3, 7),
    n(high=5),
)
row(
    "dynamic_update_slice",
    "a B, a C,  -> a B",
    lambda a, u, i: lax.dynamic_update_slice_in_dim(a, u, i, 1),
    x(3, 7),
    x(3, 2),
    n(high=5),
)
row("gather", "A b, c -> c b", lambda a, i: a.at[i].get(mode="clip"), x(3, 7), n(5, high=3))
for name, method in {"": "set", "-min": "min", "-max": "max"}.items():
    row(
        "scatter" + name,
        "A b, c, c b -> A b",
        lambda a, i, u, m=method: getattr(a.at[i], m)(u, mode="clip"),
        x(7, 4),
        np.array([5, 0, 3]),
        x(3, 4),
    )
for name, method in {"-add": "add", "-sub": "subtract"}.items():
    row(
        "scatter" + name,
        "A b, C, C b -> A b",
        lambda a, i, u, m=method: getattr(a.at[i], m)(u, mode="clip"),
        x(7, 4),
        np.array([5, 0, 3]),
        x(3, 4),
    )

SCAN = lambda a: lax.scan(lambda c, y: (c + y, 2 * c), jnp.zeros(4), a)  # noqa: E731
for name in ("loop_enter", "loop_close", "loop_slice", "loop_stack"):
    row(name, "A b -> b, C b", SCAN, x(3, 4))
row("shard", "A·b c -> D·b c", sharded(lambda a: 2 * a), x(4, 3))
row("unshard", "A·b c -> D·b", sharded(lambda a: a.sum(1)), x(4, 3))
row("psum", "A·b c -> b c", sharded(lambda a: lax.psum(a, "d"), None, check_vma=False), x(4, 3))
row("psum_invariant", "A·b c -> b c", sharded(lambda a: lax.psum(a, "d"), None), x(4, 3))
row("pmax", "A·b c -> b c", sharded(lambda a: lax.pmax(a, "d"), None), x(4, 3))
row("pmin", "A·b c -> b c", sharded(lambda a: lax.pmin(a, "d"), None), x(4, 3))
row(
    "ppermute", "A·b c -> D·b c", sharded(lambda a: lax.ppermute(a, "d", [(0, 1), (1, 0)])), x(4, 3)
)
row(
    "axis_index",
    "A·b c -> D·b c",
    sharded(lambda a: a + lax.axis_index("d").astype(a.dtype)),
    x(4, 3),
)
row(
    "pvary",
    "A·b C -> D·b C",
    sharded(lambda a: a * varying(jnp.arange(3.0)[None])),
    x(4, 3),
)

linalg = lax.linalg
row("cholesky", "a B C -> a D E", partial(linalg.cholesky, symmetrize_input=False), definite(2, 3))
row("lu", "a B C -> a D E, a F, a G", linalg.lu, x(2, 3, 4))
row("qr", "a B C -> a D E, a F G", partial(linalg.qr, full_matrices=False), x(2, 4, 3))
row("svd", "a B C -> a D", partial(linalg.svd, compute_uv=False), x(2, 3, 4))
row("eigh", "a B C -> a D E, a F", partial(linalg.eigh, symmetrize_input=False), definite(2, 3))
row("eig", "a B C -> a D, a E F, a G H", linalg.eig, definite(2, 3))
row("schur", "a B C -> a D E, a F G", linalg.schur, definite(2, 3))
row("hessenberg", "a B C -> a D E, a F", linalg.hessenberg, x(2, 3, 3))
row("tridiagonal", "a B C -> a D E, a F, a G, a H", linalg.tridiagonal, definite(2, 3))
row(
    "triangular_solve",
    "a B C, a D e -> a D e",
    partial(linalg.triangular_solve, left_side=True, lower=True),
    definite(2, 3),
    x(2, 3, 4),
)
row(
    "all_gather",
    "A·b c -> D·b E·c",
    sharded(lambda a: lax.all_gather(a, "d", axis=1, tiled=True)),
    x(4, 3),
)
row(
    "all_to_all",
    "A·b C·d -> E·C·b d",
    sharded(lambda a: lax.all_to_all(a, "d", 1, 0, tiled=True)),
    x(4, 6),
)
row(
    "reduce_scatter",
    "A·b C·d -> E·b d",
    sharded(lambda a: lax.psum_scatter(a, "d", scatter_dimension=1, tiled=True)),
    x(4, 6),
)

# More of those whose rules tell cases apart; the primitive's name comes first.
row(
    "conv_general_dilated depthwise",
    "a B c, D 1 c -> a E c",
    lambda a, k: conv(a, k, 6),
    x(2, 7, 6),
    x(3, 1, 6),
)
row(
    "conv_general_dilated multiplied",
    "a B c, D 1 c·e -> a F c·e",
    lambda a, k: conv(a, k, 6),
    x(2, 7, 6),
    x(3, 1, 12),
)
row(
    "conv_general_dilated pointwise",
    "a b c, 1 c d -> a b d",
    lambda a, k: conv(a, k, 1),
    x(2, 7, 6),
    x(1, 6, 5),
)
row(
    "dot_general over two",
    "a b c d, c d a e -> a e b",
    lambda a, c: jnp.einsum("abcd,cdae->aeb", a, c),
    x(2, 3, 4, 5),
    x(4, 5, 2, 6),
)
row("dot_general squared", "a b -> a a", lambda a: a @ a.T, x(3, 4))
row("reduce_sum softmax", "a b -> a a", lambda a: jax.nn.softmax(a @ a.T), x(3, 4))
row("reshape across units", "A B -> C D", lambda a: a.reshape(6, 4), x(4, 6))
row("reshape with ones", "a b -> 1 a 1 b", lambda a: a.reshape(1, 3, 1, 4), x(3, 4))
row("broadcast_in_dim of ones", "1 a -> b a", lambda a: jnp.broadcast_to(a, (3, 4)), x(1, 4))
row("select_n of a scalar", ", a b, a b -> a b", lax.select_n, b(), x(3, 4), x(3, 4))
row(
    "concatenate of products",
    "a b c, a d c -> a (b|d)·c",
    lambda a, c: jnp.concatenate([a, c], 1).reshape(3, -1),
    x(3, 2, 4),
    x(3, 5, 4),
)
row(
    "split of products",
    "a (b·c|d·e) -> a b c, a d e",
    lambda a: [p.reshape(3, 4, 2) for p in jnp.split(a, 2, 1)],
    x(3, 16),
)
row("slice with a step", "a B -> a C", lambda a: lax.slice(a, (0, 0), (3, 7), (1, 2)), x(3, 7))
row(
    "slice with a step that divides",
    "a b·(1|1) -> a b",
    lambda a: lax.slice(a, (0, 1), (3, 6), (1, 2)),
    x(3, 6),
)
row("pad between", "a B,  -> a C", lambda a, p: lax.pad(a, p, ((0, 0, 0), (1, 0, 1))), x(3, 4), x())
row(
    "reduce_window_sum in the middle",
    "a B c -> a D c",
    lambda a: lax.reduce_window(a, 0.0, lax.add, (1, 2, 1), (1, 2, 1), "VALID"),
    x(3, 5, 4),
)
row(
    "gather batched",
    "a B c, a d c -> a d c",
    lambda a, i: jnp.take_along_axis(a, i, 1),
    x(3, 7, 4),
    n(3, 2, 4, high=7),
)
row(
    "gather of a grid",
    "A B c, d, e -> d e c",
    lambda a, i, j: a[i[:, None], j[None]],
    x(3, 7, 4),
    n(5, high=3),
    n(2, high=7),
)
row(
    "scatter batched",
    "a B, a, a -> a B",
    jax.vmap(lambda a, i, u: a.at[i].set(u)),
    x(3, 7),
    n(3, high=7),
    x(3),
)
row(
    "scatter-add to columns",
    "a B c, D, a D c -> a B c",
    lambda a, i, u: a.at[:, i].add(u),
    x(3, 7, 4),
    n(2, high=7),
    x(3, 2, 4),
)
row(
    "bitcast_convert_type to halves",
    "A B -> C D E",
    lambda a: lax.bitcast_convert_type(a, jnp.int32),
    x(3, 4),
)
row(
    "loop_close of products",
    "a b, C b b -> a b, D a b",
    lambda h, w: lax.scan(lambda h, w: (h @ w, h), h, w),
    x(2, 4),
    x(3, 4, 4),
)

NOT_BOUND = {
    "zeros_like": "only inside JAX's own derivative rules",
    "stage": "only inside JAX's own staging",
    "geqrf": "only inside JAX's own QR decomposition",
    "all_gather_invariant": "only inside JAX's own gathers of what does not vary",
    "pbroadcast": "for meshes over several processes",
}


def varying(a: Any) -> Any:
    return lax.pcast(a, "d", to="varying") if hasattr(lax, "pcast") else lax.pvary(a, "d")


def at(spec: Any) -> NamedSharding:
    return NamedSharding(mesh(), spec)


def constrained(a: Any) -> Any:
    return with_layout_constraint(a, Layout((0, 1)))


def resharded(a: Any) -> Any:
    explicit = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))
    return jax.sharding.reshard(a, NamedSharding(explicit, PartitionSpec()))


def conv(a: Any, kernel: Any, groups: int) -> Any:
    layout = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        a, kernel, (1,), "VALID", dimension_numbers=layout, feature_group_count=groups
    )


def windows(a: Any, kind: str) -> Any:
    fun, start = {"sum": (lax.add, 0.0), "max": (lax.max, -np.inf), "min": (lax.min, np.inf)}[kind]
    return lax.reduce_window(a, start, fun, (1, 2), (1, 2), "VALID")
