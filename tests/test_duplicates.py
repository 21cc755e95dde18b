"""What grow made is removed first, whatever the method, with no change of the function."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from benchmarks.models.functional import TransformerConfig
from benchmarks.models.lstm import LSTM, LSTMConfig
from benchmarks.models.transformer import Transformer
from benchmarks.training import LanguageModel, nnx_model
from uscale_jax._choice import chosen, first_members
from uscale_jax._duplicates import duplicates
from uscale_jax._planning import remade

CONFIG = TransformerConfig(vocab=50, hidden=12, layers=2, heads=4, kv_heads=2, head_dim=6, mlp=14)
BIGGER = {
    "multiples": {"hidden": 24, "heads": 8, "mlp": 42},
    "others": {"hidden": 19, "heads": 6, "mlp": 23},
}
SYMMETRIES = (None, "noise", "uneven", "zero_fan_out")


def transformer(config: TransformerConfig) -> LanguageModel:
    return nnx_model(lambda rngs: Transformer(config, rngs))


def lstm(hidden: int, embedding: int) -> LanguageModel:
    config = LSTMConfig(vocab=50, embedding=embedding, hidden=hidden, layers=2)
    return nnx_model(lambda rngs: LSTM(config, rngs))


def tokens(seed: int = 0, rows: int = 3) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, 7), 0, 50)


def pair(kind: str) -> tuple[LanguageModel, LanguageModel]:
    if kind == "lstm":
        return lstm(12, 10), lstm(36, 20)
    return transformer(CONFIG), transformer(dataclasses.replace(CONFIG, **BIGGER[kind]))


def grown(kind: str, symmetry: str | None) -> tuple[Any, ...]:
    small, big = pair(kind)
    params = small.initialised(0)
    shapes = jax.eval_shape(big.init, jax.random.key(1))
    plan = us.plan(small.apply, params, big.apply, shapes, tokens())
    large = us.grow(params, plan, symmetry=symmetry, key=jax.random.key(5), verify=False)
    return small, big, plan, params, large


@pytest.mark.filterwarnings("error::uscale_jax.UnitScaleShrinkWarning")
@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("kind", ["multiples", "others", "lstm"])
def test_what_grow_made_goes_with_no_change(kind, symmetry):
    small, big, plan, _, large = grown(kind, symmetry)
    batches = [tokens(seed) for seed in range(3)]
    for method in ("magnitude", "reconstruction"):
        found = us.importance(big.apply, large, batches, plan, method=method)
        cut = us.shrink(large, plan, importance=found)
        selected = us.select(plan, found)
        error = us.verify(selected, small.apply, cut, big.apply, large, tokens(9)).error
        assert error < 2e-6, method


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_the_classes_are_the_units_of_the_small_model(symmetry):
    _, _, plan, _, large = grown("multiples", symmetry)
    assert plan.models is not None
    found = duplicates(remade(plan, plan.models), jax.tree.leaves(large))
    for axis in plan.axes:
        if axis.small != axis.big:
            alive = ~found.dead[axis.name]
            assert len(np.unique(found.classes[axis.name][alive])) == axis.small
            fresh = symmetry == "zero_fan_out" and axis.name != "a"  # a: the residual stream
            assert found.dead[axis.name].sum() == (axis.big - axis.small if fresh else 0)


def test_training_one_copy_ends_it():
    """A change that float32 can tell apart in what makes a unit, and the classes are split."""
    _, _, plan, _, large = grown("multiples", None)
    leaves, treedef = jax.tree.flatten(large)
    names = list(plan.leaves)
    at = names.index("blocks/0/mlp/up/kernel")
    leaves[at] = leaves[at].at[3, 4].multiply(1.01)
    assert plan.models is not None
    made = remade(plan, plan.models)
    found = duplicates(made, jax.tree.leaves(jax.tree.unflatten(treedef, leaves)))
    axis = next(a for a in plan.axes if ("blocks/0/mlp/up/kernel", 1) in a.places)
    assert len(np.unique(found.classes[axis.name])) == axis.small + 1
    assert found.classes[axis.name][4] != found.classes[axis.name][3]


def test_random_units_are_all_different():
    small, big = pair("others")
    shapes = jax.eval_shape(big.init, jax.random.key(1))
    plan = us.plan(small.apply, small.initialised(0), big.apply, shapes, tokens())
    assert plan.models is not None
    found = duplicates(remade(plan, plan.models), jax.tree.leaves(big.initialised(2)))
    assert all(len(np.unique(each)) == len(each) for each in found.classes.values())


@pytest.mark.parametrize("method", ["wanda", "reconstruction"])
def test_more_is_kept_than_differs(method):
    """Twice the copies are halved: every unit is left twice."""
    small, big, _, params, _ = grown("multiples", None)
    middle = transformer(dataclasses.replace(CONFIG, hidden=24, heads=8, mlp=28))
    largest = transformer(dataclasses.replace(CONFIG, hidden=48, heads=16, mlp=56))
    shapes = [jax.eval_shape(m.init, jax.random.key(1)) for m in (middle, largest)]
    first = us.plan(small.apply, params, largest.apply, shapes[1], tokens())
    large = us.grow(params, first, symmetry="uneven", verify=False)
    plan = us.plan(middle.apply, shapes[0], largest.apply, shapes[1], tokens())
    found = us.importance(largest.apply, large, [tokens(1), tokens(2)], plan, method=method)
    cut, selected = us.shrink(large, plan, importance=found), us.select(plan, found)
    assert us.verify(selected, middle.apply, cut, small.apply, params, tokens(9)).error < 2e-6
    assert "merged" in str(selected)
    del big


def test_choice_prefers_what_is_worth_most_together():
    scores = np.array([0.2, 0.5, 0.2, 0.4, 0.2])
    classes = np.array([0, 1, 0, 2, 0])
    units = chosen(scores, classes, np.zeros(5, bool), 2)
    assert units.tolist() == [0, 1, 0, -1, 0]  # three times 0.2 and once 0.5
    assert first_members(units).tolist() == [0, 1]
    dead = np.array([False, True, False, False, False])
    assert chosen(scores, classes, dead, 2).tolist() == [0, -1, 0, 1, 0]


def test_choice_keeps_parts_of_classes_if_there_is_room():
    classes = np.array([0, 1, 0, 2, 0, 1])
    units = chosen(np.ones(6), classes, np.zeros(6, bool), 5)
    assert sorted(set(units.tolist())) == [0, 1, 2, 3, 4]
    for unit in range(5):
        assert len(set(classes[units == unit].tolist())) == 1
    assert jnp.all(jnp.diff(jnp.asarray(first_members(units))) > 0)
