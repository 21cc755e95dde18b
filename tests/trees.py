"""Trees to test on, and how their leaves are compared with float64 arithmetic."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core import FrozenDict
from hypothesis import strategies as st

from uscale_jax._types import Tree

BATCH, IN, OUT, HEADS = 3, 5, 7, 2


class Kind(NamedTuple):
    """What a leaf holds."""

    dtype: Any
    weak: bool = False


KINDS = (
    Kind(jnp.float32),
    Kind(jnp.float32, weak=True),
    Kind(jnp.bfloat16),
    Kind(jnp.float16),
    Kind(jnp.float8_e4m3fn),
    Kind(jnp.float8_e5m2),
    Kind(jnp.int32),
    Kind(jnp.bool_),
)
# No two sizes of a shape are equal, so that a transposed or reshaped leaf cannot pass.
SHAPES = ((), (IN,), (BATCH, OUT), (HEADS, IN, BATCH))


def leaf(kind: Kind, shape: tuple[int, ...], seed: int) -> jax.Array:
    """Returns values of magnitude 1/4 to 4: times 64 they fit float8, and none is zero."""
    rng = np.random.default_rng(seed)
    if kind.weak:
        return jnp.full(shape, rng.uniform(0.25, 4.0))
    values = rng.uniform(0.25, 4.0, shape) * rng.choice([-1.0, 1.0], shape)
    if not jnp.issubdtype(kind.dtype, jnp.floating):
        values = np.trunc(values)
    return jnp.asarray(values.astype(np.float32).astype(kind.dtype))


def weights_like(tree: Tree) -> Tree:
    """Returns other values in the structure and the kinds of ``tree``."""
    leaves, treedef = jax.tree.flatten(tree)
    kinds = [Kind(x.dtype, x.weak_type) for x in leaves]
    return treedef.unflatten(
        [
            leaf(kind, x.shape, 100 + i)
            for i, (kind, x) in enumerate(zip(kinds, leaves, strict=True))
        ]
    )


def plain_tree() -> Tree:
    """What most parameter trees hold."""
    return {
        "bias": leaf(Kind(jnp.bfloat16), (OUT,), 1),
        "kernel": leaf(Kind(jnp.float32), (IN, OUT), 2),
    }


def mixed_tree() -> Tree:
    """One leaf of every kind."""
    shapes = ((IN, OUT), (), (OUT,), (HEADS, IN), (BATCH, OUT), (HEADS, BATCH, IN), (BATCH,), (IN,))
    leaves = [leaf(kind, s, i) for i, (kind, s) in enumerate(zip(KINDS, shapes, strict=True))]
    return {"float32": tuple(leaves[:2]), "narrow": leaves[2:6], "not floating": {"n": leaves[6:]}}


def trees() -> st.SearchStrategy[Tree]:
    """Nested dicts, lists and tuples of up to 6 leaves of all kinds."""
    leaves = st.builds(leaf, st.sampled_from(KINDS), st.sampled_from(SHAPES), st.integers(0, 999))
    names = st.sampled_from(["bias", "kernel", "scale", "0", "value"])
    return st.recursive(
        leaves,
        lambda node: (
            st.lists(node, min_size=1, max_size=3)
            | st.lists(node, min_size=1, max_size=3).map(tuple)
            | st.dictionaries(names, node, min_size=1, max_size=3)
        ),
        max_leaves=6,
    )


def factors() -> st.SearchStrategy[float]:
    """Log-uniform between 1/8 and 8."""
    return st.floats(-3.0, 3.0).map(lambda power: 2.0**power)


def per_leaf(tree: Tree, entry: Callable[[int], Any]) -> Tree:
    """Returns ``entry(0), entry(1), ...`` in the places of the leaves."""
    treedef = jax.tree.structure(tree)
    return treedef.unflatten([entry(i) for i in range(treedef.num_leaves)])


def wide(x: Any) -> np.ndarray:
    """Returns a leaf in float64."""
    return np.asarray(x).astype(np.float64)


def rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns float64 values rounded as the package promises: to float32, then to the dtype."""
    return wide(values.astype(np.float32).astype(dtype))


def assert_leaf(actual: Any, exact: np.ndarray, slack: np.ndarray | float) -> None:
    """Asserts that ``actual`` is ``exact`` rounded, where ``exact`` may be off by ``slack``.

    Rounding is monotone: the values allowed are those between the rounded ends, which without
    slack is a single one.
    """
    low, high = (rounded(exact + sign * slack, actual.dtype) for sign in (-1, 1))
    found = wide(actual)
    assert np.all((low <= found) & (found <= high)), f"{found} is not in [{low}, {high}]"


def assert_same_kind(actual: Tree, like: Tree) -> None:
    """Asserts that structure, containers, dtypes, weak types and shapes are the same."""
    assert type(actual) is type(like)
    assert jax.tree.structure(actual) == jax.tree.structure(like)
    for got, x in zip(jax.tree.leaves(actual), jax.tree.leaves(like), strict=True):
        assert isinstance(got, jax.Array)
        assert (got.dtype, got.weak_type, got.shape) == (x.dtype, x.weak_type, x.shape)


def assert_equal(actual: Tree, expected: Tree) -> None:
    """Asserts that two trees are the same, bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, x in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(wide(got), wide(x))


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Gives a list that grows by one entry for every program that XLA compiles within."""
    found: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Perceptron(nnx.Module):
    """Two layers, 5 → 7 → 2."""

    def __init__(self) -> None:
        self.inner = nnx.Linear(IN, OUT, rngs=nnx.Rngs(0))
        self.outer = nnx.Linear(OUT, HEADS, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(nnx.relu(self.inner(x)))


class _Boxed(nn.Module):
    """The same in linen, with kernels in boxes."""

    box: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = self.box(nn.initializers.lecun_normal(), ("rows", "columns"))
        x = nn.relu(nn.Dense(OUT, kernel_init=init, name="inner")(x))
        return nn.Dense(HEADS, kernel_init=init, name="outer")(x)


def _boxed(box: Callable[..., Any]) -> Tree:
    return _Boxed(box).init(jax.random.key(0), jnp.ones((BATCH, IN)))["params"]


def layers(**extra: Any) -> Tree:
    """Returns a dict of two layers, with the same extra entries in each."""
    return {
        "inner": plain_tree() | extra,
        "outer": {"kernel": leaf(Kind(jnp.float32), (OUT, HEADS), 4)} | extra,
    }


def _state() -> nnx.State:
    return nnx.state(Perceptron(), nnx.Param)


def _pure(state: nnx.State) -> Tree:
    # nnx.pure was renamed: the old name warns on the newest flax, the new one is not in 0.12.4.
    return (nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure)(state)


# Every way to hold the parameters of a model whose layers are named inner and outer.
CONTAINERS: dict[str, Callable[[], Tree]] = {
    "dict": layers,
    "FrozenDict": lambda: FrozenDict(layers()),
    "Partitioned": lambda: _boxed(nn.with_partitioning),
    "LogicallyPartitioned": lambda: _boxed(nn.with_logical_partitioning),
    "nnx.State": _state,
    "pure nnx.State": lambda: _pure(_state()),
    "None leaves": lambda: layers(absent=None),
    "MaskedNode leaves": lambda: layers(absent=optax.MaskedNode()),
}


def entry_for_each(tree: Tree, inner: Mapping[str, Any], outer: Any) -> list[Any]:
    """Returns what ``{"inner": {"bias": ..., "kernel": ...}, "outer": ...}`` says for each leaf."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [
        (inner["bias"] if "bias" in name else inner["kernel"]) if "inner" in name else outer
        for name in names
    ]
