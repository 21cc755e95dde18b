"""Programs that real models made hard: regrouped axes, linear algebra, models over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import uscale_jax as us
from tests import resizing
from tests.nets import f32
from uscale_jax.trace.tracing import Model

X = np.random.default_rng(0).standard_normal((2, 6, 3)).astype(np.float32)
EXACT = 1e-13


def grown_error(apply, shapes, small, big, *inputs) -> float:
    models = [Model(apply, shapes(*sizes)) for sizes in (small, big)]
    return resizing.error(*models, inputs)


# Regrouping


def chunked(params, x):
    """Time in chunks, padded and shifted as a convolution does, then split into two."""
    h = x @ params["w"]
    h = jnp.pad(h.reshape(2, 2, 3, -1).reshape(2, 6, -1), ((0, 0), (3, 0), (0, 0)))
    first, second = jnp.split(jnp.tanh(h[:, 1:7] * params["k"][0][None, None]), [4], axis=-1)
    return first @ params["o"] + jnp.tanh(second) @ params["q"]


def chunked_shapes(n):
    return {"w": f32(3, n + 4), "k": f32(4, n + 4), "o": f32(4, 2), "q": f32(n, 2)}


def shifted(params, x):
    """A causal convolution as a sum of shifts, over features that were put side by side."""
    h = jnp.concatenate([x @ params["a"], x @ params["b"]], axis=-1)
    h = jnp.pad(h, ((0, 0), (3, 0), (0, 0)))
    y = sum(h[:, i : i + 6] * params["k"][i][None, None] for i in range(4))
    return jnp.tanh(y.reshape(2, 2, 3, -1)) @ params["o"]


def shifted_shapes(m, n):
    return {"a": f32(3, m), "b": f32(3, n), "k": f32(4, m + n), "o": f32(m + n, 2)}


def regrouped_from_the_right(params, x):
    """(4, 3·n) as (3, 4, n): from the left nothing fits, from the right n does."""
    h = jnp.tanh((x[:, :4] @ params["w"]).reshape(2, 3, 4, -1))
    return h @ params["o"]


def concatenated_array(params, x):
    """``jnp.concatenate`` of one array is a reshape that permutes."""
    h = jnp.tanh(x @ params["w"]).reshape(2, 6, 3, -1)
    return jnp.concatenate(h.transpose(2, 0, 1, 3), axis=-1) @ params["o"]


def with_empty_pieces(params, x):
    empty, first, second = jnp.split(x @ params["w"], [0, 4], axis=-1)
    first = jnp.concatenate([empty, jnp.tanh(first) @ params["o"]], axis=-1)
    return first + second @ params["q"]


@pytest.mark.parametrize(
    ("apply", "shapes", "small", "big"),
    [
        (chunked, chunked_shapes, (5,), (10,)),
        (shifted, shifted_shapes, (5, 4), (10, 12)),
        (
            regrouped_from_the_right,
            lambda n: {"w": f32(3, 3 * n), "o": f32(n, 2)},
            (5,),
            (10,),
        ),
        (concatenated_array, lambda n: {"w": f32(3, 3 * n), "o": f32(3 * n, 2)}, (5,), (15,)),
        (
            with_empty_pieces,
            lambda n: {"w": f32(3, n + 4), "o": f32(4, 2), "q": f32(n, 2)},
            (5,),
            (10,),
        ),
    ],
)
def test_regrouped_models_grow(apply, shapes, small, big):
    assert grown_error(apply, shapes, small, big, X) <= EXACT


# Linear algebra


def gaussian(params, x):
    """A covariance of three features a unit; solved, factored, and its spectrum taken."""
    root = params["a"]
    eye = jnp.eye(3, dtype=root.dtype)[None]
    covariance = jnp.einsum("nij,nkj->nik", root, root) + 0.1 * eye
    mean = jnp.einsum("bi,nim->nim", x, params["b"])
    factor = jnp.linalg.cholesky(covariance)
    whitened = jax.scipy.linalg.solve_triangular(factor, mean, lower=True)
    solved = jnp.linalg.solve(covariance, params["b"])
    together = jnp.einsum("nim,nim->i", whitened, solved)
    orthogonal = jnp.tanh(jnp.linalg.qr(covariance)[0]).mean(0).sum(0)
    spectrum = jnp.exp(jnp.linalg.eigh(covariance)[0]).mean(0)
    return together + orthogonal + spectrum


@pytest.mark.parametrize("big", [(8, 5), (4, 15), (12, 10)])
def test_batches_and_columns_of_matrices_grow(big):
    shapes = lambda n, m: {"a": f32(n, 3, 3), "b": f32(n, 3, m)}  # noqa: E731
    assert grown_error(gaussian, shapes, (4, 5), big, X[0, :2]) <= EXACT


@pytest.mark.parametrize(
    ("apply", "power"),
    [
        (lambda p, x: jnp.linalg.cholesky(p @ p.T) @ x, 1.0),
        (lambda p, x: jax.scipy.linalg.solve_triangular(p, x), -1.0),
        (lambda p, x: jax.scipy.linalg.solve_triangular(p, x, unit_diagonal=True), 0.0),
        (lambda p, x: jnp.linalg.solve(jnp.eye(3), p @ x), 1.0),
    ],
)
def test_powers_of_matrices(apply, power):
    params = np.float32([[2.0, 0.3, 0.2], [0.0, 1.5, 0.4], [0.0, 0.0, 0.7]])
    x = np.float32([[0.3, 0.8], [1.2, -0.4], [0.5, 0.9]])
    exponents = us.trace_exponents(apply, params, x)
    assert exponents.output == power
    scaled = us.scale_params(params, 2.0, exponents=exponents.params)
    np.testing.assert_allclose(apply(scaled, x), 2.0**power * apply(params, x), rtol=2e-6)


# Models over a mesh


def mesh() -> Mesh:
    return Mesh(jax.devices()[:2], ("d",))


def fully_sharded(params, x):
    """Parameters gathered where they are used; tokens and features change places on the way."""

    def body(w1, w2, x):
        h = jnp.tanh(x @ lax.all_gather(w1, "d", axis=1, tiled=True))
        h = lax.all_to_all(lax.all_to_all(h, "d", 1, 0, tiled=True), "d", 0, 1, tiled=True)
        return h @ lax.all_gather(w2, "d", axis=0, tiled=True)

    specs = PartitionSpec(None, "d"), PartitionSpec("d"), PartitionSpec("d")
    run = jax.shard_map(
        body, mesh=mesh(), in_specs=specs, out_specs=PartitionSpec("d"), check_vma=False
    )
    return run(params["w1"], params["w2"], x)


def tensor_parallel(params, x):
    """Hidden units over the mesh, their sums scattered over it."""

    def body(w1, w2, x):
        return lax.psum_scatter(jnp.tanh(x @ w1) @ w2, "d", scatter_dimension=1, tiled=True)

    specs = PartitionSpec(None, "d"), PartitionSpec("d"), PartitionSpec()
    run = jax.shard_map(
        body, mesh=mesh(), in_specs=specs, out_specs=PartitionSpec(None, "d"), check_vma=False
    )
    return jnp.tanh(run(params["w1"], params["w2"], x)) @ params["w3"]


def test_a_fully_sharded_model_grows():
    shapes = lambda n: {"w1": f32(3, 2 * n), "w2": f32(2 * n, 5)}  # noqa: E731
    assert grown_error(fully_sharded, shapes, (3,), (9,), X[0, :4]) <= EXACT


def test_a_tensor_parallel_model_grows():
    shapes = lambda m, n: {"w1": f32(3, 2 * m), "w2": f32(2 * m, 2 * n), "w3": f32(2 * n, 5)}  # noqa: E731
    assert grown_error(tensor_parallel, shapes, (7, 9), (14, 27), X[0, :4]) <= EXACT
    axes = us.trace_axes(tensor_parallel, shapes(7, 9), X[0, :4])
    assert sorted(axis.size for axis in axes.free) == [7, 9]
    assert all("mesh shards" in axis.why for axis in axes.fixed if axis.size == 2)
