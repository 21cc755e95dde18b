"""A factor in front of an optimizer acts, or the user is told; and no false alarm."""

import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import uscale_jax as us
from uscale_jax import _chain_order

pytestmark = pytest.mark.usefixtures("standard_promotion")

LR = 0.01
PARAMS = {"kernel": jnp.linspace(-1.0, 2.0, 15).reshape(3, 5), "bias": jnp.linspace(0.3, 1.0, 5)}
GRADS = jax.tree.map(lambda p: 0.1 * p + 0.02, PARAMS)
LABELS = {"kernel": "a", "bias": "b"}
FRONT = us.unit_scale_lr(2.0)


def wrapped(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.MultiSteps(tx, 3).gradient_transformation()


def partitioned(a: optax.GradientTransformation, b: optax.GradientTransformation):
    return optax.partition({"a": a, "b": b}, LABELS)


CANCELS = {
    "adam": lambda: optax.chain(us.unit_scale_lr(2.0), optax.adam(LR)),
    "named": lambda: optax.named_chain(("k", us.unit_scale_lr(2.0)), ("o", optax.lion(LR))),
    "nested": lambda: optax.chain(optax.chain(optax.identity(), FRONT), optax.rmsprop(LR)),
    "clip": lambda: optax.chain(FRONT, optax.clip_by_global_norm(1.0), optax.sgd(LR)),
    "late": lambda: optax.chain(FRONT, optax.radam(LR)),
    "partly": lambda: optax.chain(FRONT, optax.adagrad(LR)),
    "one of two leaves": lambda: optax.chain(FRONT, partitioned(optax.sgd(LR), optax.adam(LR))),
    "masked": lambda: optax.chain(
        optax.masked(FRONT, {"kernel": True, "bias": False}), optax.adam(LR)
    ),
    "in a partition": lambda: partitioned(optax.chain(FRONT, optax.adam(LR)), optax.sgd(LR)),
    "in accumulation": lambda: wrapped(optax.chain(FRONT, optax.adam(LR))),
    "before accumulation": lambda: optax.chain(FRONT, wrapped(optax.adam(LR))),
    "before a wrapper": lambda: optax.chain(FRONT, optax.apply_if_finite(optax.adam(LR), 3)),
    "injected": lambda: optax.chain(
        optax.inject_hyperparams(us.unit_scale_lr)(k=2.0), optax.adam(LR)
    ),
    "schedule": lambda: optax.chain(us.unit_scale_lr(lambda step: 2.0), optax.adam(LR)),
    "keep_decay": lambda: optax.chain(us.unit_scale_lr(2.0, keep_decay=0.1), optax.adam(LR)),
    "muon": lambda: optax.chain(FRONT, optax.contrib.muon(LR)),
    "lamb": lambda: optax.chain(FRONT, optax.lamb(LR)),
}

ACTS = {
    "alone": lambda: us.unit_scale_lr(2.0),
    "last": lambda: optax.chain(optax.adam(LR), FRONT),
    "last, named": lambda: optax.named_chain(("o", optax.adam(LR)), ("k", FRONT)),
    "last, nested": lambda: optax.chain(optax.adam(LR), optax.chain(FRONT, optax.scale(3.0))),
    "sgd": lambda: optax.chain(FRONT, optax.sgd(LR)),
    "momentum": lambda: optax.chain(FRONT, optax.sgd(LR, momentum=0.9, nesterov=True)),
    "bfloat16 momentum": lambda: optax.chain(
        FRONT, optax.sgd(LR, momentum=0.9, accumulator_dtype=jnp.bfloat16)
    ),
    "schedule": lambda: optax.chain(FRONT, optax.sgd(optax.linear_schedule(LR, LR / 9, 7))),
    "injected": lambda: optax.chain(
        optax.inject_hyperparams(us.unit_scale_lr)(k=2.0),
        optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(LR, LR / 9, 7)),
    ),
    "before decay": lambda: optax.chain(
        optax.scale_by_adam(), FRONT, optax.add_decayed_weights(0.1), optax.scale(-LR)
    ),
    "accumulation": lambda: optax.chain(FRONT, wrapped(optax.sgd(LR))),
    "wrapper": lambda: optax.chain(FRONT, optax.apply_if_finite(optax.sgd(LR), 3)),
    "partition": lambda: partitioned(optax.chain(FRONT, optax.sgd(LR)), optax.adam(LR)),
    "ema": lambda: optax.chain(FRONT, optax.ema(0.9), optax.centralize(), optax.scale(-LR)),
    "k is one": lambda: optax.chain(us.unit_scale_lr(1.0), optax.adam(LR)),
    "masked": lambda: optax.chain(
        FRONT, optax.masked(optax.scale(3.0), {"kernel": True, "bias": False}), optax.sgd(LR)
    ),
}


def told(update, tx, steps: int = 2) -> list[warnings.WarningMessage]:
    """Warnings of a few steps, with Python's own once-per-line filter switched off."""
    state = tx.init(PARAMS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            _, state = update(GRADS, state, PARAMS)
    return [w for w in caught if issubclass(w.category, us.UnitScaleOrderWarning)]


@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize("name", CANCELS)
def test_the_user_is_told_once_where_the_factor_cancels(name, mode):
    tx = CANCELS[name]()
    (warning,) = told(jax.jit(tx.update) if mode == "jit" else tx.update, tx)
    assert "optax.chain(optax.adam(lr), us.unit_scale_lr(k))" in str(warning.message)
    assert warning.filename == __file__  # the user's line, not a library's


@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize("name", ACTS)
def test_no_false_alarm_where_it_acts(name, mode):
    tx = ACTS[name]()
    assert not told(jax.jit(tx.update) if mode == "jit" else tx.update, tx)


@pytest.mark.parametrize("name", sorted(set(ACTS) - {"k is one", "before decay"}))
def test_where_it_acts_it_really_acts(name):
    """The claim behind the silence, with effective_lr_scale as an independent witness.

    Before decay only the gradients' share is divided, which test_learning_rate compares.
    """
    scale = us.effective_lr_scale(ACTS[name](), PARAMS, steps=12)
    first_leaf_only = {"partition": {"kernel": 0.5, "bias": 1.0}}
    expected = first_leaf_only.get(name, {"kernel": 0.5, "bias": 0.5})
    assert scale.leaves == pytest.approx(expected, rel=1e-2)


def test_the_message_says_what_follows_and_what_was_measured():
    tx = CANCELS["adam"]()
    (warning,) = told(tx.update, tx)
    assert "in front of ScaleByAdam" in str(warning.message)
    (measured,) = re.findall(r"update × (\d\.\d\d)", str(warning.message))
    assert float(measured) > 0.9


def test_the_warning_points_at_the_line_that_called_update():
    tx = CANCELS["adam"]()
    state = tx.init(PARAMS)
    with pytest.warns(us.UnitScaleOrderWarning) as caught:
        line = inspect.currentframe().f_lineno + 1
        tx.update(GRADS, state, PARAMS)
    assert caught[0].lineno == line


def test_an_update_that_cannot_be_tried_is_said_to_be_so():
    def update(updates, state, params=None):
        if params["kernel"].shape != (17, 5):
            raise RuntimeError("only for my model")
        return updates, state

    mine = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    tx = optax.chain(us.unit_scale_lr(2.0), mine)
    params = {"kernel": jnp.ones((17, 5))}
    with pytest.warns(us.UnitScaleOrderWarning, match="could not be tried.*only for my model"):
        tx.update(params, tx.init(params), params)


def test_learning_rates_traced_in_the_same_program_are_no_obstacle():
    @jax.jit
    def step(grads, lr, k):
        tx = optax.chain(us.unit_scale_lr(k), optax.sgd(lr))
        return tx.update(grads, tx.init(grads))[0]

    np.testing.assert_allclose(step(GRADS, 0.1, 4.0)["bias"], -0.025 * GRADS["bias"], rtol=1e-6)


@pytest.mark.parametrize("scope", ["scan", "vmap", "remat"])
def test_inside_other_transformations(scope):
    tx = optax.chain(us.unit_scale_lr(2.0), optax.adam(LR))
    update = lambda g, s: tx.update(g, s, PARAMS)  # noqa: E731
    state = tx.init(PARAMS)
    runs = {
        "scan": lambda: jax.lax.scan(lambda s, _: (update(GRADS, s)[1], None), state, length=3),
        "vmap": lambda: jax.vmap(update, in_axes=(0, None))(
            jax.tree.map(lambda g: jnp.stack([g, 2 * g]), GRADS), state
        ),
        "remat": lambda: jax.checkpoint(update)(GRADS, state),
    }
    with pytest.warns(us.UnitScaleOrderWarning):
        runs[scope]()


def test_inside_nnx_optimizer():
    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 3))) ** 2))(model)
    good = nnx.Optimizer(model, optax.chain(optax.adam(LR), us.unit_scale_lr(2.0)), wrt=nnx.Param)
    good.update(model, grads)
    bad = nnx.Optimizer(model, optax.chain(us.unit_scale_lr(2.0), optax.adam(LR)), wrt=nnx.Param)
    with pytest.warns(us.UnitScaleOrderWarning):
        nnx.jit(lambda m, o, g: o.update(m, g))(model, bad, grads)


def test_under_a_transfer_guard_and_in_an_explicit_mesh():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    tx = optax.chain(us.unit_scale_lr(2.0), optax.sgd(LR))
    with jax.set_mesh(mesh):
        params = jax.device_put({"w": jnp.ones((8, 12))}, jax.P("x", "y"))
        state = tx.init(params)
        update = jax.jit(tx.update)
        with jax.transfer_guard("disallow"):
            updates, _ = update(params, state, params)
    assert updates["w"].sharding == params["w"].sharding


def test_measuring_a_wrong_chain_does_not_use_up_the_warning():
    tx = optax.chain(us.unit_scale_lr(2.0), optax.adam(LR))
    us.effective_lr_scale(tx, PARAMS)
    with pytest.warns(us.UnitScaleOrderWarning):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_large_models_are_probed_at_small_cost():
    """Stand-ins are cut to six a dimension: no array of the model's size is ever made."""
    tx = optax.chain(us.unit_scale_lr(2.0), optax.adam(LR))
    huge = {"w": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}  # 4 TiB
    with pytest.warns(us.UnitScaleOrderWarning):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), huge)


@pytest.mark.parametrize("broken", ["names of functions", "names of variables"])
def test_an_optax_that_cannot_be_read_is_said_to_be_so(monkeypatch, broken):
    """The chain is read from the stack; should optax change, silence is not an option."""
    unknown = {"chain.<locals>.update_fn": lambda local: local["renamed"]}
    readers = {} if broken == "names of functions" else unknown
    monkeypatch.setattr(_chain_order, "_READERS", readers)
    _chain_order._can_read_chains.cache_clear()
    try:
        tx = optax.chain(us.unit_scale_lr(2.0), optax.adam(LR))
        with pytest.warns(us.UnitScaleOrderWarning, match="cannot be read"):
            tx.update(GRADS, tx.init(PARAMS), PARAMS)
    finally:
        _chain_order._can_read_chains.cache_clear()
