"""What holds for every gradient transformation and every tree function of the package.

A new one joins by one line in the lists of ``tests/cases.py``.
"""

import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import example, given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import trees
from tests.cases import (
    COMPOSITIONS,
    LABELS,
    LR,
    TRANSFORMATIONS,
    TREE_FUNCTIONS,
    Case,
    K,
    Transformation,
    TreeFunction,
    assert_values,
    at_divided_rates,
    each,
    every,
    every_transformation,
    is_determined,
    optimizer,
    train,
    two_layers,
)
from uscale_jax._types import Tree

ROUNDED_K = 2.0**-20  # a few roundings of a traced k to float32


@every
@settings(max_examples=15)
@given(tree=trees.trees(), k=trees.factors())
@example(tree=trees.mixed_tree(), k=K)
@example(tree=trees.mixed_tree(), k=0.3)
def test_values_are_those_of_float64_arithmetic_and_kinds_are_kept(
    case: Case, tree: Tree, k: float
):
    weights = trees.weights_like(tree)
    out = case(tree, weights, k)
    trees.assert_same_kind(out, tree)
    assert_values(case, out, tree, weights, k)


@every
@pytest.mark.parametrize("k", [K, 0.3, 4.0])
def test_jit_gives_what_eager_calls_give(case: Case, k: float):
    tree = trees.mixed_tree()
    weights = trees.weights_like(tree)
    out = jax.jit(lambda tree, weights: case(tree, weights, k))(tree, weights)
    trees.assert_same_kind(out, tree)
    assert_values(case, out, tree, weights, k)
    if is_determined(case, k, tree):
        trees.assert_equal(out, case(tree, weights, k))


@every
def test_another_k_compiles_nothing_when_eager(case: Case):
    tree = trees.mixed_tree()
    weights = trees.weights_like(tree)
    case(tree, weights, K)
    with trees.compilations() as compiled:
        out = case(tree, weights, 0.6)
    assert_values(case, out, tree, weights, 0.6)
    assert not compiled


def test_the_count_of_compilations_counts():
    with trees.compilations() as compiled:
        jax.jit(lambda x: x * 3 + 1)(2.0)
    assert compiled


@every
def test_another_k_compiles_nothing_under_jit(case: Case):
    tree, jitted = trees.mixed_tree(), jax.jit(case.__call__)
    weights = trees.weights_like(tree)
    for k in (K, 0.6):
        assert_values(case, jitted(tree, weights, k), tree, weights, k, loose=ROUNDED_K)
    assert jitted._cache_size() == 1


@every
def test_vmap_over_k(case: Case):
    tree, ks = trees.mixed_tree(), jnp.array([K, 0.6, 3.0])
    weights = trees.weights_like(tree)
    out = jax.vmap(partial(case, tree, weights))(ks)
    for i, k in enumerate(ks):
        one = jax.tree.map(operator.itemgetter(i), out)
        assert_values(case, one, tree, weights, float(k), loose=ROUNDED_K)


@every
def test_gradients_by_the_tree_are_the_slope(case: Case):
    tree = trees.plain_tree()
    weights = trees.weights_like(tree)
    by_tree = jax.grad(lambda tree: _weighted_sum(case(tree, weights, K)))(tree)
    columns = zip(*map(jax.tree.leaves, (by_tree, tree, weights)), strict=True)
    for i, (got, x, w) in enumerate(columns):
        f, w64, eps = case.factor(K, i, 0), trees.wide(w), float(jnp.finfo(x.dtype).eps)
        slope = case.exact(1.0, w64, f) - case.exact(0.0, w64, f)  # all cases are affine in x
        assert got.dtype == x.dtype
        np.testing.assert_allclose(trees.wide(got), (i + 2) * slope, rtol=2 * eps)


@every
def test_the_gradient_by_k_is_that_of_the_closed_form(case: Case):
    tree = jax.tree.map(lambda x: x.astype(jnp.float32), trees.plain_tree())
    weights = trees.weights_like(tree)
    by_k = jax.grad(lambda k: _weighted_sum(case(tree, weights, k)))(K)

    def closed(k: float) -> list[Any]:
        columns = zip(jax.tree.leaves(tree), jax.tree.leaves(weights), strict=True)
        return [
            case.exact(trees.wide(x), trees.wide(w), case.factor(k, i, 0))
            for i, (x, w) in enumerate(columns)
        ]

    h = 1e-5  # central differences in float64 are good to h²
    slope = sum(
        (i + 2) * np.sum(above - below) / (2 * h)
        for i, (above, below) in enumerate(zip(closed(K + h), closed(K - h), strict=True))
    )
    np.testing.assert_allclose(by_k, slope, rtol=1e-5)


def _weighted_sum(tree: Tree) -> jax.Array:
    """A scalar with another gradient, 2, 3, ..., in each leaf."""
    sums = [jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(tree)]
    return sum((i + 2) * total for i, total in enumerate(sums))


# Specs on a mesh of 2 × 4 devices, each with a shape whose sizes it divides.
SHARDED = {
    "both": (P("data", "model"), (6, 20)),
    "columns": (P(None, "data"), (5, 6)),
    "replicated": (P(), (7, 3)),
    "rows": (P("model"), (12, 5)),
}


@every
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shardings_are_kept(case: Case, axis_type: AxisType):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    bare = {
        name: trees.leaf(trees.KINDS[0], s, i) for i, (name, (_, s)) in enumerate(SHARDED.items())
    }
    shardings = {name: NamedSharding(mesh, spec) for name, (spec, _) in SHARDED.items()}
    tree, weights = (jax.device_put(t, shardings) for t in (bare, trees.weights_like(bare)))
    for function in (case.__call__, jax.jit(case.__call__)):
        out = function(tree, weights, K)
        assert_values(case, out, tree, weights, K, loose=ROUNDED_K)
        for name, sharding in shardings.items():
            assert out[name].sharding.is_equivalent_to(sharding, out[name].ndim), name
            if axis_type is AxisType.Explicit:
                assert jax.typeof(out[name]) == jax.typeof(tree[name])


@every
@pytest.mark.parametrize("container", trees.CONTAINERS)
def test_containers_keep_structure_boxes_and_names(case: Case, container: str):
    tree = trees.CONTAINERS[container]()
    weights = trees.weights_like(tree)
    out = case(tree, weights, K)
    trees.assert_same_kind(out, tree)
    assert_values(case, out, tree, weights, K)


@each([case for case in [*TRANSFORMATIONS, *TREE_FUNCTIONS] if case.direct])
@pytest.mark.parametrize("container", trees.CONTAINERS)
def test_a_plain_dict_of_factors_fits_every_container_by_name(case: Case, container: str):
    tree = trees.CONTAINERS[container]()
    ks = {"inner": {"bias": 3.1, "kernel": K}, "outer": 0.6}
    weights = trees.weights_like(tree)
    out = case(tree, weights, ks)
    trees.assert_same_kind(out, tree)
    assert_values(case, out, tree, weights, trees.entry_for_each(tree, **ks))


@every
def test_shapes_in_shapes_out(case: Case):
    tree = trees.mixed_tree()
    weights = trees.weights_like(tree)
    out = jax.eval_shape(lambda tree, weights: case(tree, weights, K), tree, weights)
    for got, x in zip(jax.tree.leaves(out), jax.tree.leaves(tree), strict=True):
        assert (got.shape, got.dtype, got.weak_type) == (x.shape, x.dtype, x.weak_type)


@each([case for case in TREE_FUNCTIONS if case.takes_shapes])
def test_shape_dtype_structs_come_back(case: TreeFunction):
    structs = jax.eval_shape(trees.mixed_tree)
    out = case.apply(structs, K)
    assert jax.tree.structure(out) == jax.tree.structure(structs)
    assert all(map(operator.is_, jax.tree.leaves(out), jax.tree.leaves(structs)))


@each(TREE_FUNCTIONS)
def test_tree_functions_in_scan(case: TreeFunction):
    tree, ks = trees.plain_tree(), jnp.array([K, 0.6, 1.1])
    out, _ = jax.lax.scan(lambda tree, k: (case.apply(tree, k), None), tree, ks)
    expected = tree
    for k in ks:
        expected = case.apply(expected, float(k))
    trees.assert_same_kind(out, tree)
    for got, x in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(trees.wide(got), trees.wide(x), rtol=2 * jnp.finfo(x.dtype).eps)


@every_transformation
def test_transformations_in_scan(case: Transformation):
    tree = trees.mixed_tree()
    weights, tx = trees.weights_like(tree), case.build(K, tree)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), tree)
    last, out = jax.lax.scan(
        lambda state, u: tx.update(u, state, weights)[::-1], tx.init(weights), stacked
    )
    assert jax.tree.structure(last) == jax.tree.structure(tx.init(weights))
    for t in range(3):
        one = jax.tree.map(operator.itemgetter(t), out)
        assert_values(case, one, tree, weights, K, step=t, loose=ROUNDED_K)


@every_transformation
def test_the_second_update_is_not_traced_again(case: Transformation):
    tree = trees.mixed_tree()
    weights, tx = trees.weights_like(tree), case.build(K, tree)
    traces = []

    @jax.jit
    def update(updates: Tree, state: Any, weights: Tree) -> Any:
        traces.append(None)
        return tx.update(updates, state, weights)

    _, state = update(tree, tx.init(weights), weights)
    update(weights, state, tree)
    assert len(traces) == 1


@every_transformation
def test_unknown_extra_arguments_are_accepted(case: Transformation):
    tree = trees.mixed_tree()
    weights, tx = trees.weights_like(tree), case.build(K, tree)
    out, _ = tx.update(tree, tx.init(weights), weights, value=1.0, some_name="some value")
    trees.assert_equal(out, case(tree, weights, K))


@every_transformation
def test_parameters_may_be_left_out_unless_they_decay(case: Transformation):
    tree = trees.mixed_tree()
    tx = case.build(K, tree)
    if case.decay:
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(tree, tx.init(tree))
    else:
        assert_values(case, tx.update(tree, tx.init(tree))[0], tree, tree, K)


@every_transformation
def test_init_needs_shapes_only(case: Transformation):
    tree = trees.mixed_tree()
    tx = case.build(K, tree)
    shapes = jax.eval_shape(tx.init, jax.eval_shape(lambda: tree))
    assert shapes == jax.eval_shape(lambda: tx.init(tree))


@each([case for case in TRANSFORMATIONS if case.direct])
def test_a_constant_schedule_is_the_constant(case: Transformation):
    tree = trees.mixed_tree()
    weights = trees.weights_like(tree)
    trees.assert_equal(case(tree, weights, lambda step: K), case(tree, weights, K))


in_optax = pytest.mark.usefixtures("standard_promotion")


@in_optax
@every_transformation
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_behind_adam_the_learning_rate_is_divided(case: Transformation, composition: str):
    last = case.build(K, two_layers(0))
    out = jax.jit(lambda: train(COMPOSITIONS[composition](optimizer(case), last)))()
    for i, layer in enumerate(LABELS):
        untouched = composition.endswith("alone") and layer == "outer"
        wanted = at_divided_rates(composition)[case.name, None if untouched else i][layer]
        # What Adam's own arithmetic makes of another learning rate: a few roundings.
        np.testing.assert_allclose(out[layer]["kernel"], wanted["kernel"], rtol=1e-5, atol=1e-8)


@in_optax
@every_transformation
def test_an_injected_k_may_change_between_steps(case: Transformation):
    params, grads = two_layers(0), two_layers(2)
    adam = optax.adam(LR)
    tx = optax.inject_hyperparams(lambda k: optax.chain(adam, case.build(k, params)))(k=K)
    state, plain_state = tx.init(params), adam.init(params)
    update = jax.jit(tx.update)
    for step, k in enumerate((K, 0.6, 0.6)):
        state.hyperparams["k"] = jnp.asarray(k, jnp.float32)
        updates, state = update(grads, state, params)
        plain, plain_state = adam.update(grads, plain_state, params)
        assert_values(case, updates, plain, params, k, step, loose=ROUNDED_K)
    assert update._cache_size() == 1


@in_optax
@every_transformation
def test_mapping_over_the_parameters_in_the_state_finds_its_way(case: Transformation):
    params = two_layers(0)
    tx = optax.chain(optax.adam(LR), case.build(K, params))
    state = tx.init(params)
    _, state = tx.update(two_layers(2), state, params)
    trees.assert_equal(optax.tree.map_params(tx, lambda x: x, state), state)
    zeroed = optax.tree.map_params(tx, jnp.zeros_like, state)
    trees.assert_equal(zeroed[-1], state[-1])  # a count is no parameter


@in_optax
@every_transformation
def test_nnx_optimizer_trains_at_the_divided_rate(case: Transformation):
    def trained(tx: optax.GradientTransformation) -> list[jax.Array]:
        model = trees.Perceptron()
        trainer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        x = trees.leaf(trees.KINDS[0], (trees.BATCH, trees.IN), 5)
        trainer.update(model, nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model))
        return jax.tree.leaves(nnx.state(model, nnx.Param))

    params = nnx.state(trees.Perceptron(), nnx.Param)
    out = trained(optax.chain(optimizer(case), case.build(K, params)))
    plain = trained(optimizer(case))
    columns = zip(out, plain, jax.tree.leaves(params), strict=True)
    for i, (got, undivided, start) in enumerate(map(partial(map, trees.wide), columns)):
        step = case.exact(undivided - start, start, case.factor(K, i, 0))
        assert np.any(step != 0)
        np.testing.assert_allclose(got - start, step, rtol=0, atol=2e-7)
