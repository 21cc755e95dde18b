"""Which layers matter: by what they change, or by what is lost without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from uscale_jax import _jax, _tree
from uscale_jax._calibration import NO_BATCH, each_batch
from uscale_jax._plan import Models, Plan
from uscale_jax._planning import shapes_of
from uscale_jax._types import Tree
from uscale_jax.trace import layer_runs
from uscale_jax.trace.layer_runs import Layers

Scores: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"


def layer_scores(
    plan: Plan,
    models: Models,
    params: Tree,
    batches: Sequence[Any],
    how: str,
    loss: Callable[..., Any] | None,
) -> Scores:
    """Returns one number a layer of every family that the small model has fewer of."""
    total: dict[str, Any] = {}
    count = 0
    programs: dict[Any, Callable[..., Any]] = {}
    for inputs, batch in zip(each_batch(batches, len(models.inputs)), batches, strict=True):
        shapes = jax.tree.map(np.shape, inputs)
        kind = str(jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple)))
        if kind not in programs:
            found, outputs = _layers(plan, models, inputs)
            of = _losses(found, outputs, loss) if loss and how == "loss" else found.influences
            programs[kind] = jax.jit(of)
            follows = found.follows
        given = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        args = [*jax.tree.leaves(params), *jax.tree.leaves(inputs)]
        scores = programs[kind](args) if how != "loss" else programs[kind](args, given)
        total = {
            n: total.get(n, 0) + np.asarray(_jax.fetched(s), np.float64) for n, s in scores.items()
        }
        count += 1
    if not count:
        raise ValueError(NO_BATCH)
    means = {name: each / count for name, each in total.items()}
    return {**means, **{name: means[leader] for name, leader in follows.items()}}


def _layers(plan: Plan, models: Models, inputs: Sequence[Any]) -> tuple[Layers, Any]:
    small, big = shapes_of(plan, models)
    sides = [_jax.closed_jaxpr(m.apply, m.params, *inputs) for m in (small, big)]
    keys = [_tree.flatten_named(m.params)[0] for m in (small, big)]
    a, b = (layer_runs.flattened(closed) for closed, _ in sides)
    return layer_runs.find(a, b, *keys), jax.tree.structure(sides[1][1])


def _losses(found: Layers, outputs: Any, loss: Callable[..., Any]) -> Callable[..., Any]:
    """By how much the loss is higher without each layer; infinitely without the first."""

    def of(args: Sequence[Any], batch: Sequence[Any]) -> dict[str, jax.Array]:
        value = lambda outs: loss(jax.tree.unflatten(outputs, outs), *batch)  # noqa: E731
        whole = value(_jax.evaluate(found.closed, *args))
        return {
            name: jax.numpy.stack(
                [
                    jax.numpy.full((), jax.numpy.inf),
                    *(
                        value(found.without(name, k)(args)) - whole
                        for k in range(1, found.count(name))
                    ),
                ]
            )
            for name in (*found.chains, *found.stacks)
        }

    return of


def chosen(families: Mapping[str, int], scores: Scores) -> dict[str, tuple[int, ...]]:
    """Returns the source of every layer such that those of the highest scores stay.

    ``families`` are the numbers of layers of the small model.  The first layer always stays.
    """
    found = {}
    for name, small in families.items():
        own = np.asarray(scores[name], np.float64)
        order = np.argsort(-own[1:], kind="stable")[: small - 1] + 1
        stays = np.zeros(len(own), bool)
        stays[[0, *order]] = True
        found[name] = tuple(int(i) for i in np.cumsum(stays) - 1)
    return found
