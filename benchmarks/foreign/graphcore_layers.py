"""Norms, dropout, embeddings, sums, residual branches and losses here and in ``unit-scaling``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.foreign.graphcore_pairs import MULTS, TERNARY, Pair, graphcore, turned
from uscale_jax import numerics as un

EPSILON = 1e-5
"""Of norms there, by default."""
LAYERS, TAU = 3, 0.4
DEPTH_RULE = {"residual_mult": 0.7, "residual_attn_ratio": 1.6}


def layers() -> list[Pair]:
    """Return the pairs of operations that are no sums of products and no functions by element."""
    return [*_norms(), _embedding(), *_dropout(), *_sums(), *_residual(), *_losses()]


def _norms() -> list[Pair]:
    layer_norm = partial(un.layer_norm, epsilon=EPSILON)
    options = {"eps": EPSILON}
    return [
        Pair(
            "layer_norm",
            "layer_norm",
            {"x": (3, 7, 26), "w": (26,), "b": (26,)},
            layer_norm,
            lambda x, w, b: graphcore("layer_norm", **options)(x, (26,), w, b),
        ),
        Pair(
            "layer_norm",
            "layer_norm of two dimensions",
            {"x": (3, 7, 26), "w": (7, 26), "b": (7, 26)},
            partial(layer_norm, axis=(-2, -1)),
            lambda x, w, b: graphcore("layer_norm", **options)(x, (7, 26), w, b),
        ),
        Pair(
            "rms_norm",
            "rms_norm",
            {"x": (3, 7, 26), "w": (26,)},
            partial(un.rms_norm, epsilon=EPSILON),
            lambda x, w: graphcore("rms_norm", **options)(x, (26,), w),
        ),
    ]


def _embedding() -> Pair:
    rows, ids = 41, _integers(41, 5, 8)
    there = lambda table: graphcore("embedding")(_tensor(ids), table)  # noqa: E731
    return Pair("embedding", "embedding", {"table": (rows, 18)}, partial(un.embedding, ids), there)


def _dropout() -> list[Pair]:
    shapes, rate = {"x": (37, 53)}, 0.3
    train = partial(un.dropout, rate=rate, rng=jax.random.key(0))
    evaluate = partial(un.dropout, rate=rate, deterministic=True)
    of = "dropout"
    there = graphcore(of, p=rate), graphcore(of, p=rate, training=False)
    return [
        Pair(of, "dropout, what both keep", shapes, train, there[0], masked=True),
        Pair(of, "dropout, evaluation", shapes, evaluate, there[1]),
    ]


def _sums() -> list[Pair]:
    shape = (6, 19)
    others = {"": shape, "broadcast, ": shape[1:], "one element, ": (1, 1)}
    return [
        Pair(
            "add",
            f"add, {what}{c}",
            {"a": shape, "b": other},
            partial(un.add, constraint=c),
            graphcore("add", constraint=c),
        )
        for what, other in others.items()
        for c in TERNARY
    ]


def _residual() -> list[Pair]:
    shape, tau = (6, 19), {"tau": TAU}
    split, added = partial(un.residual_split, **tau), partial(un.residual_add, **tau)
    weights = {f"up{i}": (17, 29) for i in range(2 * LAYERS)}
    weights |= {f"down{i}": (29, 17) for i in range(2 * LAYERS)}
    return [
        Pair(
            "residual_split",
            "residual_split",
            {"x": shape},
            split,
            graphcore("residual_split", **tau),
        ),
        Pair(
            "residual_add",
            "residual_add",
            {"branch": shape, "skip": shape},
            added,
            graphcore("residual_add", **tau),
        ),
        Pair(
            "residual_apply",
            f"the residual branches of {LAYERS} layers, tau by the depth rule",
            {"x": (5, 17), **weights},
            partial(_stack_here, DEPTH_RULE),
            partial(_stack_there, DEPTH_RULE),
        ),
    ]


def _stack_here(rule: Mapping[str, float], x: Any, *weights: Any) -> Any:
    taus = [tau for pair in un.residual_taus(LAYERS, **rule) for tau in pair]
    for up, down, tau in zip(weights[: len(taus)], weights[len(taus) :], taus, strict=True):
        branch, skip = un.residual_split(x, tau)
        x = un.residual_add(un.linear(un.linear(branch, up), down), skip, tau)
    return x


def _stack_there(rule: Mapping[str, float], x: Any, *weights: Any) -> Any:
    from unit_scaling.core.functional import transformer_residual_scaling_rule

    tau, linear = transformer_residual_scaling_rule(**rule), graphcore("linear")
    count = 2 * LAYERS
    for i in range(count):
        pair = weights[i], weights[count + i]
        apply = graphcore("residual_apply", tau=tau(i, count))
        x = apply(lambda branch, pair=pair: reduce(partial(turned, linear), pair, branch), x)
    return x


def _losses() -> list[Pair]:
    classes, positions = 23, 31
    labels = _integers(classes, positions)
    entropies = [
        Pair(
            "cross_entropy",
            f"cross_entropy, {reduction}, mult {mult:g}",
            {"logits": (positions, classes)},
            partial(un.cross_entropy, labels=labels, reduction=reduction, mult=mult),
            partial(_cross_entropy, labels, reduction=reduction, mult=mult),
        )
        for reduction in ("mean", "sum")
        for mult in MULTS
    ]
    squares = [
        Pair(
            "mse_loss",
            f"mse_loss, {reduction}",
            {"prediction": (6, 19), "target": (6, 19)},
            partial(un.mse, reduction=reduction),
            graphcore("mse_loss", reduction=reduction),
        )
        for reduction in ("mean", "sum")
    ]
    return [*entropies, *squares]


def _cross_entropy(labels: jax.Array, logits: Any, **options: Any) -> Any:
    return graphcore("cross_entropy", **options)(logits, _tensor(labels))


def _integers(below: int, *shape: int) -> jax.Array:
    drawn = np.random.default_rng(0).integers(0, below, shape)
    return jnp.asarray(drawn, jnp.int32)


def _tensor(integers: jax.Array) -> Any:
    import torch

    return torch.tensor(np.asarray(integers)).long()
