"""unit_scale_lr: what reaches the parameters, schedules, weight decay, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import uscale_jax as us

pytestmark = pytest.mark.usefixtures("standard_promotion")

LR, DECAY = 0.01, 0.1


def make_params() -> dict:
    rng = np.random.default_rng(5)
    return {
        "kernel": jnp.asarray(rng.standard_normal((3, 5)), jnp.float32),
        "bias": jnp.asarray(rng.standard_normal(5), jnp.float32),
    }


def gradients(step: int) -> dict:
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), make_params())


def train(tx: optax.GradientTransformation, steps: int = 7) -> dict:
    params = make_params()
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_same(got: dict, expected: dict, rtol: float = 1e-6) -> None:
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=rtol, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("k", [4.0, 0.25, 1.7])
@pytest.mark.parametrize(
    "make",
    [optax.sgd, optax.adam, optax.lion, optax.adafactor, optax.lamb, optax.rmsprop, optax.radam],
    ids=lambda make: make.__name__,
)
def test_behind_any_optimizer_it_is_the_learning_rate_over_k(make, k):
    assert_same(train(optax.chain(make(LR), us.unit_scale_lr(k))), train(make(LR / k)), rtol=1e-5)


def test_in_front_of_linear_optimizers_it_is_the_learning_rate_over_k():
    for make in (optax.sgd, lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True)):
        assert_same(train(optax.chain(us.unit_scale_lr(4.0), make(LR))), train(make(LR / 4)))


def test_factors_per_leaf():
    tx = optax.chain(optax.adam(LR), us.unit_scale_lr({"kernel": 4.0, "bias": 1.0}))
    plain, slow = train(optax.adam(LR)), train(optax.adam(LR / 4))
    assert_same(train(tx), {"kernel": slow["kernel"], "bias": plain["bias"]})


def test_schedules_see_the_step_from_zero():
    values = [2.0, 4.0, 8.0, 16.0]
    tx = us.unit_scale_lr(lambda step: jnp.asarray(values)[step])
    params = make_params()
    state = tx.init(params)
    for k in values:
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state)
        np.testing.assert_array_equal(updates["bias"], np.full(5, 1 / k))
    assert isinstance(state, us.UnitScaleState)
    assert state.unit_scale_count.dtype == jnp.int32


def test_schedules_per_leaf_beside_constants():
    tx = us.unit_scale_lr({"kernel": lambda step: 2.0 + step, "bias": 8.0})
    state = tx.init(make_params())
    ones = jax.tree.map(jnp.ones_like, make_params())
    _, state = tx.update(ones, state)
    updates, _ = jax.jit(tx.update)(ones, state)
    np.testing.assert_allclose(updates["kernel"], np.full((3, 5), 1 / 3), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], np.full(5, 1 / 8))


def test_a_constant_has_no_state_and_names_do_not_collide_with_optax():
    assert us.unit_scale_lr(2.0).init(make_params()) == optax.EmptyState()
    tx = optax.chain(optax.adam(LR), us.unit_scale_lr(lambda step: 2.0))
    assert int(optax.tree.get(tx.init(make_params()), "count")) == 0  # Adam's, unambiguous


def test_k_may_be_traced_and_differs_without_recompiling():
    traces = []

    @jax.jit
    def step(grads: dict, k: jax.Array) -> dict:
        traces.append(k)
        tx = optax.chain(optax.sgd(LR), us.unit_scale_lr(k))
        return tx.update(grads, tx.init(grads))[0]

    for k in (2.0, 3.0):
        expected = -LR / k * np.asarray(gradients(0)["bias"])
        np.testing.assert_allclose(step(gradients(0), k)["bias"], expected, rtol=1e-6)
    assert len(traces) == 1


# Decoupled weight decay. The three ways are compared with what optax does by itself.


def test_behind_adamw_the_decay_is_divided_too():
    tx = optax.chain(optax.adamw(LR, weight_decay=DECAY), us.unit_scale_lr(4.0))
    assert_same(train(tx), train(optax.adamw(LR / 4, weight_decay=DECAY)))


def test_keep_decay_keeps_the_share_that_decays_per_step():
    tx = optax.chain(
        optax.adamw(LR, weight_decay=DECAY), us.unit_scale_lr(4.0, keep_decay=LR * DECAY)
    )
    kept = train(optax.adamw(LR / 4, weight_decay=4 * DECAY))
    assert_same(train(tx), kept)
    divided = train(optax.adamw(LR / 4, weight_decay=DECAY))
    assert np.max(np.abs(kept["kernel"] - divided["kernel"])) > 1e-3  # the test can tell


def test_between_preconditioner_and_decay_it_leaves_the_decay_alone():
    tx = optax.chain(
        optax.scale_by_adam(),
        us.unit_scale_lr(4.0),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(LR),
    )
    assert_same(train(tx), train(optax.adamw(LR / 4, weight_decay=4 * DECAY)))


def test_keep_decay_per_leaf_follows_the_mask_of_the_optimizer():
    mask = {"kernel": True, "bias": False}
    tx = optax.chain(
        optax.adamw(LR, weight_decay=DECAY, mask=mask),
        us.unit_scale_lr(4.0, keep_decay={"kernel": LR * DECAY, "bias": 0.0}),
    )
    assert_same(train(tx), train(optax.adamw(LR / 4, weight_decay=4 * DECAY, mask=mask)))


def test_keep_decay_and_k_may_follow_schedules():
    lr = optax.linear_schedule(LR, LR / 10, 5)
    tx = optax.chain(
        optax.adamw(lr, weight_decay=DECAY),
        us.unit_scale_lr(lambda step: 4.0, keep_decay=lambda step: lr(step) * DECAY),
    )
    slow = optax.linear_schedule(LR / 4, LR / 40, 5)
    assert_same(train(tx), train(optax.adamw(slow, weight_decay=4 * DECAY)))


def test_keep_decay_keeps_narrow_dtypes_and_integer_leaves():
    params = {"w": jnp.full((3,), 2.0, jnp.bfloat16), "n": jnp.array([1, 2])}
    tx = us.unit_scale_lr(2.0, keep_decay=0.5)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(updates["w"], np.float32), np.full(3, 0.5))
    np.testing.assert_array_equal(updates["n"], params["n"])


def test_keep_decay_without_params_is_refused():
    tx = us.unit_scale_lr(2.0, keep_decay=0.1)
    with pytest.raises(ValueError, match=r"needs the parameters(.|\n)*tx.update\(grads, state, p"):
        tx.update(gradients(0), tx.init(make_params()))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), np.ones(2)])
def test_bad_k_is_refused_when_the_transformation_is_made(bad):
    with pytest.raises(ValueError, match="^k "):
        us.unit_scale_lr(bad)
    with pytest.raises(ValueError, match=r"k\['kernel'\]"):
        us.unit_scale_lr({"kernel": bad, "bias": 1.0})


@pytest.mark.parametrize("bad", [None, "2", 1j, True])
def test_k_that_is_no_real_number_is_refused(bad):
    with pytest.raises(TypeError, match="k must be"):
        us.unit_scale_lr(bad)


def test_bad_values_of_a_schedule_are_refused_when_they_are_concrete():
    tx = us.unit_scale_lr(lambda step: 1.0 - step)
    _, state = tx.update(gradients(0), tx.init(make_params()))
    with pytest.raises(ValueError, match=r"k\(step\) must be positive.*got 0\.0"):
        tx.update(gradients(0), state)


def test_negative_keep_decay_is_refused():
    with pytest.raises(ValueError, match="keep_decay must be positive"):
        us.unit_scale_lr(2.0, keep_decay=-0.1)


def test_a_prefix_that_does_not_fit_the_updates_is_refused():
    tx = us.unit_scale_lr({"kernel": 2.0})
    with pytest.raises(ValueError, match="no entry of k covers leaf 'bias'"):
        tx.update(gradients(0), tx.init(make_params()))


def test_float0_gradients_of_integer_parameters_pass_through():
    params = {"w": jnp.ones(3), "n": jnp.arange(2)}
    grads = jax.grad(lambda p: jnp.sum(p["w"]), allow_int=True)(params)
    tx = us.unit_scale_lr(2.0)
    updates, _ = tx.update(grads, tx.init(params))
    assert updates["n"].dtype == jax.dtypes.float0


def test_updates_without_parameters_are_refused_and_parameters_without_updates_are_not():
    tx = us.unit_scale_lr(2.0, keep_decay=0.5)
    params = {"w": jnp.full((3,), 2.0), "frozen": jnp.ones(5)}
    updates, _ = tx.update({"w": jnp.ones(3), "frozen": None}, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], np.zeros(3))
    with pytest.raises(ValueError, match="updates without parameters: .'w'"):
        tx.update({"w": jnp.ones(3)}, tx.init(params), {"v": jnp.ones(3)})
