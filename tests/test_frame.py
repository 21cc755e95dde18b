"""scale_optimizer and clip_by_global_norm: trees, dtypes, wrappers, what is measured, refusals."""

import warnings
from functools import cache, partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import uscale_jax as us
from tests import depth_models, resizing
from uscale_jax import UnitScaleFrameWarning, clip_by_global_norm, scale_optimizer
from uscale_jax._grow import grow
from uscale_jax._plan import LeafPlan, Plan
from uscale_jax._planning import plan as make_plan
from uscale_jax._state import resize_state

pytestmark = pytest.mark.usefixtures("standard_promotion")

EVEN, UNEVEN = (8, 14), (8, 10)


def apply(p, x):
    """A residual block whose norm reads its gain as 1 + w."""
    h = x @ p["in"]
    h = h + jnp.tanh(h @ p["up"] + p["bias"].reshape(1, -1)) @ p["down"]
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-3)
    return (h * (1 + p["gain"].reshape(1, -1))) @ p["out"]


def shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        "in": (5, width),
        "up": (width, hidden),
        "bias": (hidden,),
        "down": (hidden, width),
        "gain": (width,),
        "out": (width, 3),
    }


def values(width: int = 4, hidden: int = 7, seed: int = 0, dtype: Any = np.float32) -> dict:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(0.5 * rng.standard_normal(shape), dtype)
        for name, shape in shapes(width, hidden).items()
    }


@cache
def planned(width: int, hidden: int) -> Plan:
    big = {name: jnp.zeros(shape) for name, shape in shapes(width, hidden).items()}
    return make_plan(apply, values(), apply, big, jnp.zeros((2, 5)))


def copied(tree: dict, plan: Plan) -> dict:
    """What the big model has in the small one's frame."""
    out = {}
    for name, leaf in plan.leaves.items():
        out[name] = np.asarray(tree[name])
        for axis, old in enumerate(leaf.maps):
            out[name] = out[name] if old is None else np.take(out[name], old, axis)
    return out


def big_gradients(small: dict, plan: Plan) -> dict:
    return {
        name: (x / plan.leaves[name].factor / plan.leaves[name].replicas).astype(x.dtype)
        for name, x in copied(small, plan).items()
    }


def updates_apart(tx: Any, plan: Plan, steps: int = 3, **options: Any) -> float:
    """How far updates are from m times the copies of the small model's, relative to the largest."""
    framed = scale_optimizer(tx, plan, **options)
    small, state = values(), tx.init(values())
    grown, grown_state = grow(small, plan, verify=False), resize_state(state, plan)
    jax.eval_shape(framed.init, grown)
    step, framed_step, worst = jax.jit(tx.update), jax.jit(framed.update), 0.0
    for t in range(steps):
        grads = values(seed=10 + t)
        wanted, state = step(grads, state, small)
        got, grown_state = framed_step(big_gradients(grads, plan), grown_state, grown)
        for name, u in copied(wanted, plan).items():
            u = u * plan.leaves[name].factor
            worst = max(worst, float(np.max(np.abs(got[name] - u)) / np.max(np.abs(u))))
    return worst


def test_the_state_is_that_of_the_optimizer_on_parameters_in_the_small_frame():
    plan = planned(*UNEVEN)
    tx = optax.ema(0.9, debias=False)
    keep = optax.GradientTransformation(lambda params: params, lambda u, s, p=None: (u, p))
    grown = grow(values(), plan, verify=False)
    state = scale_optimizer(keep, plan, check=False).init(grown)
    for name, wanted in copied(values(), plan).items():
        np.testing.assert_allclose(state[name], wanted, rtol=1e-6, atol=1e-7, err_msg=name)
    wanted = jax.tree.structure(tx.init(grown))
    assert jax.tree.structure(scale_optimizer(tx, plan).init(grown)) == wanted


def test_shapes_will_do_for_init():
    plan = planned(*EVEN)
    tx = scale_optimizer(optax.adam(0.1), plan)
    state = jax.eval_shape(
        tx.init, plan.tree(lambda leaf: jax.ShapeDtypeStruct(leaf.big, "float32"))
    )
    assert state[0].mu["up"].shape == (8, 14)


@pytest.mark.parametrize("sizes", [EVEN, UNEVEN])
@pytest.mark.parametrize("make", [optax.adamw, optax.sgd, optax.lion, optax.adabelief])
def test_elementwise_optimizers(make, sizes):
    assert updates_apart(make(0.1), planned(*sizes)) < 1e-5


@pytest.mark.parametrize("make", [optax.lamb, optax.lars, optax.adafactor, optax.fromage])
def test_norms_and_means_per_leaf(make):
    assert updates_apart(make(0.1), planned(*EVEN)) < 1e-5
    with pytest.warns(UnitScaleFrameWarning, match="copied unequally often"):
        assert updates_apart(make(0.1), planned(*UNEVEN)) > 1e-3


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"consistent_rms": 0.2}])
def test_muon_is_divided_by_its_ratio(options):
    tx, plan = optax.contrib.muon(0.1, **options), planned(*EVEN)
    assert updates_apart(tx, plan, steps=2) < 1e-4


def test_the_ratio_of_a_large_model_is_found_on_stand_ins_in_its_proportions():
    """768 × 3072 to twice the width: √(out/in) stays, and the norm counts four copies."""
    plan = hand_made("kernel", (768, 3072), (1536, 6144))
    tx = optax.contrib.muon(0.1)
    big = {"kernel": jax.ShapeDtypeStruct((1536, 6144), np.float32)}
    texts = []
    for check in (True, False):
        framed = scale_optimizer(tx, plan, check=check)
        state = jax.eval_shape(framed.init, big)
        texts.append(str(jax.make_jaxpr(framed.update)(big, state, big)))
    last = [text.rsplit(" mul ", 1)[1].split(":")[0].split()[-1] for text in texts]
    assert last == ["0.5", "0.25"]  # m = 1/4 in this plan, divided by 1/2


def hand_made(name: str, small: tuple[int, ...], big: tuple[int, ...]) -> Plan:
    pairs = zip(small, big, strict=True)
    maps = tuple(None if n == m else np.arange(m) * n // m for n, m in pairs)
    n = np.asarray(float(np.prod(big) / np.prod(small)))
    leaf = LeafPlan(
        key=(name,),
        source=(name,),
        small=small,
        big=big,
        dtype="float32",
        maps=maps,
        factors=(1 / n,),
        copies=(n,),
    )
    return Plan({name: leaf}, axes=(), small_keys=((name,),))


def test_clipping_by_a_global_norm_is_said_not_to_be_exact():
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
    framed = scale_optimizer(tx, planned(*EVEN))
    with pytest.warns(UnitScaleFrameWarning) as caught:
        framed.init(values(*EVEN))
    text = str(caught[0].message)
    assert "us.clip_by_global_norm(max_norm, plan)" in text
    assert "depends on the gradients of others" in text
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        framed.init(values(*EVEN))  # once
        scale_optimizer(tx, planned(*EVEN), check=False).init(values(*EVEN))


@pytest.mark.parametrize("sizes", [EVEN, UNEVEN])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_our_clipping_is_exact(max_norm, sizes):
    plan = planned(*sizes)
    tx = optax.chain(clip_by_global_norm(max_norm, plan), optax.sgd(0.1))
    assert updates_apart(tx, plan) < 1e-5


def test_our_clipping_on_the_small_model_is_optax_s():
    grads = values(seed=1)
    ours, theirs = clip_by_global_norm(0.1, planned(*EVEN)), optax.clip_by_global_norm(0.1)
    got, wanted = (tx.update(grads, tx.init(grads))[0] for tx in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)


def test_an_optimizer_that_keeps_other_dimensions_for_a_big_model_is_found():
    """Too large to try as it is: Adafactor factors from 128 on."""
    plan = hand_made("kernel", (100, 4000), (200, 8000))
    with pytest.warns(UnitScaleFrameWarning, match="v_row/kernel"):
        jax.eval_shape(
            scale_optimizer(optax.adafactor(0.1), plan).init, {"kernel": jnp.zeros((200, 8000))}
        )
    plan = hand_made("kernel", (200, 4000), (400, 8000))
    jax.eval_shape(
        scale_optimizer(optax.adafactor(0.1), plan).init, {"kernel": jnp.zeros((400, 8000))}
    )


def test_an_optimizer_that_cannot_be_tried_is_not_judged():
    def update(updates, state, params=None, *, temperature, **extra_args):
        return jax.tree.map(lambda u: u * temperature, updates), state

    odd = optax.GradientTransformationExtraArgs(lambda params: (), update)
    plan = planned(*EVEN)
    tx = scale_optimizer(odd, plan)
    grads = big_gradients(values(seed=1), plan)
    updates, _ = tx.update(grads, tx.init(values(*EVEN)), values(*EVEN), temperature=2.0)
    np.testing.assert_allclose(updates["bias"], 4 * grads["bias"], rtol=1e-6)  # m²·n·2


def test_optimizers_that_are_told_the_loss_are_tried_with_one():
    with pytest.warns(UnitScaleFrameWarning, match="gradients of others"):
        scale_optimizer(optax.polyak_sgd(), planned(*EVEN)).init(values(*EVEN))


def test_masks_and_partitions_by_name_and_rank():
    plan = planned(*UNEVEN)
    labels = lambda params: {name: "a" if x.ndim > 1 else "b" for name, x in params.items()}  # noqa: E731
    mask = {name: name in ("up", "down") for name in shapes(1, 1)}
    for tx in (
        optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.2)}, labels),
        optax.partition({"a": optax.adam(0.1), "b": optax.set_to_zero()}, labels),
        optax.adamw(0.1, mask=mask, weight_decay=0.3),
        optax.chain(optax.masked(optax.scale_by_adam(), mask), optax.scale(-0.1)),
    ):
        state = scale_optimizer(tx, plan, check=False).init(values(*UNEVEN))
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(values(*UNEVEN)))
    assert updates_apart(optax.adamw(0.1, mask=mask, weight_decay=0.3), plan) < 1e-5


def test_it_may_stand_inside_a_mask_itself():
    plan = planned(*EVEN)
    mask = {name: name == "up" for name in shapes(1, 1)}
    tx = optax.masked(scale_optimizer(optax.sgd(1.0), plan, check=False), mask)
    params, grads = values(*EVEN), values(*EVEN, seed=1)
    updates, _ = tx.update(grads, tx.init(params), params)
    leaf = plan.leaves["up"]
    np.testing.assert_allclose(
        updates["up"], -grads["up"] * leaf.factor**2 * leaf.replicas, rtol=1e-6
    )
    np.testing.assert_array_equal(updates["in"], grads["in"])


def test_absent_leaves_and_integers_pass():
    plan = planned(*EVEN)
    tx = scale_optimizer(optax.sgd(1.0), plan)
    grads = {**values(*EVEN), "up": None, "in": optax.MaskedNode()}
    updates, _ = tx.update(grads, tx.init(values(*EVEN)))
    assert updates["up"] is None
    assert updates["in"] == optax.MaskedNode()
    whole = {**values(*EVEN), "gain": jnp.arange(8)}
    updates, _ = scale_optimizer(optax.identity(), plan).update(whole, optax.EmptyState())
    np.testing.assert_array_equal(updates["gain"], jnp.arange(8))


def test_hyperparameters_accumulation_and_finiteness_go_on_top_or_inside():
    plan, grads = planned(*EVEN), values(*EVEN, seed=1)
    params = values(*EVEN)
    plain = scale_optimizer(optax.adam(0.1), plan, check=False)
    wanted, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    make = lambda rate: scale_optimizer(optax.adam(rate), plan, check=False)  # noqa: E731
    for tx in (
        optax.inject_hyperparams(make)(0.1),
        scale_optimizer(optax.inject_hyperparams(optax.adam)(0.1), plan, check=False),
        optax.apply_if_finite(plain, 3),
        scale_optimizer(optax.MultiSteps(optax.adam(0.1), 1), plan, check=False),
        optax.MultiSteps(plain, 1),
    ):
        got, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, wanted)


def test_frozen_dicts_and_parts_of_a_model():
    def part_apply(variables, x):
        return apply(variables["params"], x) + variables["offset"]["c"].reshape(1, -1)

    offset = {"c": jnp.zeros(3)}
    plan = make_plan(
        part_apply,
        {"params": values(), "offset": offset},
        part_apply,
        {"params": values(*EVEN), "offset": offset},
        jnp.zeros((2, 5)),
    )
    tx, params = scale_optimizer(optax.adam(0.1), plan), flax.core.freeze(values(*EVEN))
    grads = flax.core.freeze(values(*EVEN, seed=1))
    updates, _ = tx.update(grads, tx.init(params), params)
    assert isinstance(updates, flax.core.FrozenDict)
    factor = plan.leaves["params/up"].factor
    np.testing.assert_allclose(updates["up"], -0.1 * factor * jnp.sign(grads["up"]), rtol=1e-3)


class Module(nnx.Module):
    def __init__(self, hidden):
        self.up = nnx.Linear(5, hidden, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(hidden, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def test_an_nnx_optimizer_goes_on_in_the_large_model():
    small, big = Module(7), Module(14)

    def run(state, x):
        return nnx.merge(nnx.graphdef(small), state)(x)

    def run_big(state, x):
        return nnx.merge(nnx.graphdef(big), state)(x)

    states = nnx.state(small, nnx.Param), nnx.state(big, nnx.Param)
    x = jax.random.normal(jax.random.key(0), (2, 5))
    plan = make_plan(run, states[0], run_big, states[1], x)
    loss = lambda model: jnp.mean(jnp.square(model(x) - 1))  # noqa: E731
    tx = optax.adamw(0.05)
    optimizer = nnx.Optimizer(small, tx, wrt=nnx.Param)
    optimizer.update(small, nnx.grad(loss)(small))
    nnx.update(big, grow(nnx.state(small, nnx.Param), plan, verify=False))
    framed = nnx.Optimizer(big, scale_optimizer(tx, plan, check=False), wrt=nnx.Param)
    nnx.update(framed, resize_state(nnx.state(optimizer), plan))
    for _ in range(3):
        optimizer.update(small, nnx.grad(loss)(small))
        framed.update(big, nnx.grad(loss)(big))
        np.testing.assert_allclose(loss(big), loss(small), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_gradients_are_multiplied_in_float32_and_rounded_once(dtype):
    plan = hand_made("kernel", (4, 3), (12, 3))
    grads = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((12, 3)), dtype)}
    updates, _ = scale_optimizer(optax.identity(), plan).update(grads, optax.EmptyState())
    wide = grads["kernel"].astype(jnp.float32) * np.float32(1.0)
    assert updates["kernel"].dtype == grads["kernel"].dtype
    once = (wide / np.float32(3)).astype(dtype)  # in: m·n = 1; out: m = 1/3
    np.testing.assert_array_equal(updates["kernel"], once)


def test_no_factor_is_as_large_as_its_leaf():
    plan = planned(*UNEVEN)
    tx = scale_optimizer(optax.sgd(0.1), plan, check=False)
    grads = values(*UNEVEN)
    closed = jax.make_jaxpr(tx.update)(grads, tx.init(grads))
    assert max(np.size(const) for const in closed.consts) <= 10


def test_a_tree_of_another_model_is_refused():
    tx = scale_optimizer(optax.adam(0.1), planned(*EVEN), check=False)
    other = values(6, 9)
    with pytest.raises(ValueError, match="'up' is float32.6,9. .*the plan makes .8, 14.") as caught:
        tx.init(other)
    assert "big model" in str(caught.value)
    with pytest.raises(ValueError, match="'extra' is not in the plan"):
        tx.init({**values(*EVEN), "extra": jnp.zeros(3)})
    state = tx.init(values(*EVEN))
    with pytest.raises(ValueError, match="'in' is float32.5,6."):
        tx.update(other, state, other)


def test_a_line_search_inside_is_refused():
    search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15))
    tx, params = scale_optimizer(search, planned(*EVEN), check=False), values(*EVEN)
    extra = {"value": 0.0, "grad": params, "value_fn": lambda p: 0.0}
    with pytest.raises(ValueError, match="value_fn.*put it behind, optax.chain"):
        tx.update(params, tx.init(params), params, **extra)


def test_a_line_search_stands_behind_it():
    """The slope u'·g' is the small model's: m·u over n copies of g/(m·n)."""
    x, y = jnp.ones((2, 5)), jnp.ones((2, 3))
    loss = lambda p: jnp.mean(jnp.square(apply(p, x) - y))  # noqa: E731
    search = optax.scale_by_backtracking_linesearch(15)

    @partial(jax.jit, static_argnums=0)
    def step(tx, params):
        value, grads = jax.value_and_grad(loss)(params)
        extra = {"value": value, "grad": grads, "value_fn": loss}
        updates, _ = tx.update(grads, tx.init(params), params, **extra)
        return optax.apply_updates(params, updates)

    plan = planned(*UNEVEN)
    adam = optax.adam(1.0)
    small = step(optax.chain(adam, search), values())
    behind = optax.chain(scale_optimizer(adam, plan, check=False), search)
    big = step(behind, grow(values(), plan, verify=False))
    np.testing.assert_allclose(loss(big), loss(small), rtol=1e-4)


def test_it_needs_no_implicit_promotion():
    plan = planned(*UNEVEN)
    tx = optax.chain(clip_by_global_norm(0.1, plan), optax.trace(0.9), optax.scale(-0.1))
    params = {**values(*UNEVEN), "up": values(*UNEVEN)["up"].astype(jnp.bfloat16)}
    with jax.numpy_dtype_promotion("strict"):
        framed = scale_optimizer(tx, plan)
        state = framed.init(params)
        updates, state = framed.update(params, state, params)
        assert resize_state(state, plan)[1].trace["up"].dtype == jnp.bfloat16
    assert updates["up"].dtype == jnp.bfloat16


def test_optax_finds_its_way_around_the_state():
    tx = scale_optimizer(optax.adam(0.1), planned(*EVEN))
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, tx.init(values(*EVEN)))
    assert float(doubled[0].mu["up"][0, 0]) == 1.0
    assert int(doubled[0].count) == 0


def test_layers_that_a_plan_adds_are_no_reason_to_warn():
    small, big = depth_models.encoder(2), depth_models.encoder(4)
    models = (small.apply, small.params, big.apply, big.params)
    plan = us.plan(*models, *small.inputs, depth="stack")
    params = us.grow(resizing.random_params(small.params, dtype=np.float32), plan, verify=False)
    scale_optimizer(optax.adam(0.01), plan).init(params)  # warnings are errors
