"""The gradient transformations and the tree functions that test_properties runs through."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import uscale_jax as us
from tests import trees
from uscale_jax._types import Tree

K = 1.7  # no power of two, so that every rounding shows
DECAY = 0.03  # learning rate times weight decay

Values = np.ndarray | float


def _k_itself(k: Any, leaf: int, step: Any) -> Any:
    return k


@dataclass(frozen=True)
class Transformation:
    """A learning-rate factor: updates u become u/f + (1/f − 1)·decay·w."""

    name: str
    build: Callable[[Any, Tree], optax.GradientTransformationExtraArgs]  # of k and the parameters
    factor: Callable[[Any, int, Any], Any] = _k_itself  # f of k, leaf number and step
    decay: float = 0.0
    direct: bool = True  # k is handed over as it is, so it may be a prefix or a schedule

    def __call__(self, tree: Tree, weights: Tree, k: Any) -> Tree:
        tx = self.build(k, tree)
        return tx.update(tree, tx.init(weights), weights)[0]

    def exact(self, u: Values, w: Values, f: float) -> Values:
        return u / f + (1 / f - 1) * self.decay * w

    def slack(self, dtype: Any) -> float:
        """The reciprocal 1/k is rounded, and a traced k before it; decay is rounded again."""
        return 4 * float(jnp.finfo(dtype).eps) if self.decay else 2.0**-23


@dataclass(frozen=True)
class TreeFunction:
    """A function of a tree and k that multiplies, or divides, leaves by f."""

    name: str
    apply: Callable[[Tree, Any], Tree]
    factor: Callable[[Any, int, Any], Any] = _k_itself
    combine: Callable[[Values, float], Values] = operator.mul
    direct: bool = True
    takes_shapes: bool = False  # jax.ShapeDtypeStruct leaves come back as they are

    def __call__(self, tree: Tree, weights: Tree, k: Any) -> Tree:
        return self.apply(tree, k)

    def exact(self, x: Values, w: Values, f: float) -> Values:
        return self.combine(x, f)

    def slack(self, dtype: Any) -> float:
        return 0.0 if self.combine is operator.mul else 2.0**-23


Case = Transformation | TreeFunction


def _rising(k: Any) -> optax.Schedule:
    return lambda step: k * (1 + jnp.asarray(step, jnp.float32) / 2)


def _each(k: Any, tree: Tree) -> Tree:
    return trees.per_leaf(tree, lambda i: k * (1 + i / 4))


def _power(i: int) -> int:
    return (1, -1, 2, 0)[i % 4]


def _degrees(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: int(jnp.issubdtype(x.dtype, jnp.inexact)), tree)


TRANSFORMATIONS = [
    Transformation("unit_scale_lr", lambda k, tree: us.unit_scale_lr(k)),
    Transformation(
        "unit_scale_lr, schedule",
        lambda k, tree: us.unit_scale_lr(_rising(k)),
        factor=lambda k, leaf, step: k * (1 + step / 2),
        direct=False,
    ),
    Transformation(
        "unit_scale_lr, per leaf",
        lambda k, tree: us.unit_scale_lr(_each(k, tree)),
        factor=lambda k, leaf, step: k * (1 + leaf / 4),
        direct=False,
    ),
    Transformation(
        "unit_scale_lr, keep_decay",
        lambda k, tree: us.unit_scale_lr(k, keep_decay=DECAY),
        decay=DECAY,
    ),
]
TREE_FUNCTIONS = [
    TreeFunction("scale_params", us.scale_params, takes_shapes=True),
    TreeFunction(
        "scale_params, per leaf",
        lambda tree, k: us.scale_params(tree, _each(k, tree)),
        factor=lambda k, leaf, step: k * (1 + leaf / 4),
        direct=False,
        takes_shapes=True,
    ),
    TreeFunction(
        "scale_params, exponents",
        lambda tree, k: us.scale_params(tree, k, exponents=trees.per_leaf(tree, _power)),
        factor=lambda k, leaf, step: k ** _power(leaf),
        takes_shapes=True,
    ),
    TreeFunction(
        "compensate",
        lambda tree, k: us.compensate(lambda outputs: outputs, _degrees(tree), k)(tree),
        combine=operator.truediv,
        direct=False,
    ),
]


def each(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


every = each([*TRANSFORMATIONS, *TREE_FUNCTIONS])
every_transformation = each(TRANSFORMATIONS)


def assert_values(
    case: Case, actual: Tree, tree: Tree, weights: Tree, k: Any, step: int = 0, loose: float = 0.0
) -> None:
    """Compares with float64; ``loose`` is what rounding k itself may add.  ``k``: one or a leaf."""
    leaves = jax.tree.leaves(tree)
    ks = k if isinstance(k, list) else [k] * len(leaves)
    columns = zip(jax.tree.leaves(actual), leaves, jax.tree.leaves(weights), ks, strict=True)
    for i, (got, x, w, one) in enumerate(columns):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_array_equal(got, x)
            continue
        f = float(np.float32(case.factor(one, i, step)))
        exact = case.exact(trees.wide(x), trees.wide(w), f)
        size = np.maximum(np.abs(exact), np.abs(case.exact(trees.wide(x), 0.0, f)))
        trees.assert_leaf(got, exact, (case.slack(x.dtype) + loose) * size)


def is_determined(case: Case, k: float, tree: Tree) -> bool:
    """Whether only one result is right: of products, and of quotients by powers of two."""
    powers_of_two = all(
        math.frexp(case.factor(k, i, 0))[0] == 0.5 for i in range(len(jax.tree.leaves(tree)))
    )
    return case.slack(jnp.float32) <= (2.0**-23 if powers_of_two else 0.0)


LR, STEPS = 0.01, 4
MASK = {"inner": True, "outer": False}
LABELS = {"inner": "scaled", "outer": "plain"}

Compose = Callable[[Any, Any], Any]
# An optimizer and a transformation standing last.  Where the mask or the partition is around the
# transformation alone, only the inner layer is scaled.
COMPOSITIONS: dict[str, Compose] = {
    "chain": optax.chain,
    "named_chain": lambda front, last: optax.named_chain(("front", front), ("last", last)),
    "masked": lambda front, last: optax.masked(optax.chain(front, last), MASK),
    "masked alone": lambda front, last: optax.chain(front, optax.masked(last, MASK)),
    "partition": lambda front, last: optax.partition(
        {"scaled": optax.chain(front, last), "plain": optax.sgd(0.1)}, LABELS
    ),
    "partition alone": lambda front, last: optax.chain(
        front, optax.partition({"scaled": last, "plain": optax.identity()}, LABELS)
    ),
    "MultiSteps": lambda front, last: optax.MultiSteps(optax.chain(front, last), 2),
    "MultiSteps, transformation": lambda front, last: optax.MultiSteps(
        optax.chain(front, last), 2
    ).gradient_transformation(),
    "apply_if_finite": lambda front, last: optax.apply_if_finite(optax.chain(front, last), 3),
}


def two_layers(seed: int) -> Tree:
    return {
        "inner": {"kernel": trees.leaf(trees.KINDS[0], (trees.IN, trees.OUT), seed)},
        "outer": {"kernel": trees.leaf(trees.KINDS[0], (trees.OUT, trees.HEADS), seed + 1)},
    }


def optimizer(case: Transformation) -> optax.GradientTransformation:
    """Adam, or AdamW where the case is about decay."""
    return optax.adamw(LR, weight_decay=case.decay / LR) if case.decay else optax.adam(LR)


def train(tx: Any) -> Tree:
    """The updates of all steps, stacked."""
    params = two_layers(0)
    grads = [two_layers(2 * t + 2) for t in range(STEPS)]

    def step(carry: Any, grads: Tree) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    return jax.lax.scan(step, (params, tx.init(params)), stacked)[1]


@cache
def at_divided_rates(composition: str) -> dict[tuple[str, int | None], Tree]:
    """The updates without our factors, at α/f for the f of every case and leaf, and at α.

    All in one program, because compiling is what takes the time.
    """
    rows = [(case, leaf) for case in TRANSFORMATIONS for leaf in (None, 0, 1)]
    factors = jnp.array(
        [
            [1.0 if leaf is None else case.factor(K, leaf, t) for t in range(STEPS)]
            for case, leaf in rows
        ]
    )

    def updates(factors: jax.Array, decay: jax.Array) -> Tree:
        # decay stays what it is per step: with a rate divided by f, λ is multiplied by f
        tx = optax.adamw(lambda t: LR / factors[t], weight_decay=decay / LR * factors[0])
        return train(COMPOSITIONS[composition](tx, optax.identity()))

    out = jax.jit(jax.vmap(updates))(factors, jnp.array([case.decay for case, _ in rows]))
    return {
        (case.name, leaf): jax.tree.map(operator.itemgetter(n), out)
        for n, (case, leaf) in enumerate(rows)
    }
