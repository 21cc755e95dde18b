"""grow, shrink and verify: trees, dtypes, shardings, ways to tell copies apart, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import NamedSharding, PartitionSpec

import uscale_jax as us
from tests.nets import f32

INPUT = np.random.default_rng(5).standard_normal((4, 5)).astype(np.float32)


def apply(params, x):
    h = jnp.tanh(x @ params["up"] + params["bias"][None])
    return h @ params["down"]


def shapes(n: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"up": f32(5, n), "bias": f32(n), "down": f32(n, 3)}


def drawn(tree, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.standard_normal(s.shape), dtype)  # noqa: E731
    return jax.tree.map(draw, tree)


def planned(n: int = 7, m: int = 21) -> us.Plan:
    return us.plan(apply, shapes(n), apply, shapes(m), INPUT)


SMALL = drawn(shapes(7))


def test_values_are_copied_and_multiplied():
    big = us.grow(SMALL, planned())
    repeated = {
        "up": np.repeat(SMALL["up"], 3, axis=1),
        "bias": np.repeat(SMALL["bias"], 3),
        "down": np.repeat(SMALL["down"], 3, axis=0) * np.float32(1 / 3),
    }
    jax.tree.map(np.testing.assert_array_equal, big, repeated)


@pytest.mark.parametrize("kind", [dict, FrozenDict, nnx.State])
def test_tree_type_dtype_and_weak_type_are_kept(kind):
    small = kind({**SMALL, "bias": SMALL["bias"].astype(jnp.bfloat16), "down": SMALL["down"]})
    big = us.grow(small, planned(), verify=False)
    assert type(big) is kind
    assert big["bias"].dtype == jnp.bfloat16
    assert jax.tree.structure(big) == jax.tree.structure(small)


def test_a_weak_scalar_stays_weak():
    def scaled(params, x):
        return apply(params, x) * params["scale"]

    small = {**SMALL, "scale": jnp.asarray(2.0)}
    assert small["scale"].weak_type
    plan = us.plan(scaled, small, scaled, {**shapes(14), "scale": small["scale"]}, INPUT)
    assert us.grow(small, plan)["scale"].weak_type


def test_narrow_leaves_are_rounded_once():
    """1/3 of a bfloat16 number, rounded once from float32."""
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), SMALL)
    big = us.grow(small, planned(), verify=False)
    wide = np.asarray(small["down"], np.float32) * np.float32(1 / 3)
    expected = np.repeat(wide.astype(jnp.bfloat16), 3, axis=0)
    np.testing.assert_array_equal(big["down"], expected)


def test_it_runs_under_jit_and_differentiates():
    plan = planned()
    big = jax.jit(lambda params: us.grow(params, plan))(SMALL)
    jax.tree.map(np.testing.assert_array_equal, big, us.grow(SMALL, plan))
    loss = lambda params: jnp.sum(apply(us.grow(params, plan), INPUT) ** 2)  # noqa: E731
    small_loss = lambda params: jnp.sum(apply(params, INPUT) ** 2)  # noqa: E731
    got, expected = jax.grad(loss)(SMALL), jax.grad(small_loss)(SMALL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, expected)


def test_the_gradient_is_that_of_the_small_model_over_factor_and_copies():
    plan = planned(7, 17)
    big = us.grow(SMALL, plan)
    loss = lambda params: jnp.sum(apply(params, INPUT) ** 2)  # noqa: E731
    small, large = jax.grad(loss)(SMALL), jax.grad(loss)(big)
    for name, leaf in plan.leaves.items():
        expected = np.asarray(small[name])
        for axis, old in enumerate(leaf.maps):
            expected = expected if old is None else np.take(expected, old, axis)
        expected = expected / (leaf.factor * leaf.replicas)
        np.testing.assert_allclose(large[name], expected, rtol=2e-4, atol=1e-5)


def test_shardings_are_kept_and_must_divide():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    small = drawn(shapes(8))
    small = {
        "up": place(small["up"], None, "model"),
        "bias": place(small["bias"], "model"),
        "down": place(small["down"], "model", None),
    }
    big = us.grow(small, planned(8, 24))
    assert big["up"].sharding.spec == PartitionSpec(None, "model")
    assert big["down"].sharding.spec == PartitionSpec("model", None)
    with pytest.raises(ValueError, match="'bias' is float32.13.*into 4 parts: 16 is a size"):
        us.grow(small, planned(8, 13))
    whole = lambda name, leaf: NamedSharding(mesh, PartitionSpec())  # noqa: E731
    odd = us.grow(small, planned(8, 13), shardings=whole)
    assert odd["bias"].sharding.is_fully_replicated
    np.testing.assert_allclose(apply(odd, INPUT), apply(small, INPUT), rtol=1e-5, atol=1e-5)


def test_explicit_shardings_are_kept():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    small, plan = drawn(shapes(8)), planned(8, 24)
    expected = us.grow(small, plan)["up"]
    with jax.set_mesh(mesh):
        placed = jax.device_put(small["up"], PartitionSpec(None, "model"))
        rest = jax.tree.map(lambda x: jax.device_put(x, PartitionSpec()), small)
        big = us.grow({**rest, "up": placed}, plan, verify=False)
        assert big["up"].sharding.spec == PartitionSpec(None, "model")
        np.testing.assert_array_equal(big["up"], expected)


def test_a_plan_from_json_grows_the_same():
    plan = planned(7, 10)
    read = us.Plan.from_json(plan.to_json())
    jax.tree.map(np.testing.assert_array_equal, us.grow(SMALL, read), us.grow(SMALL, plan))


def test_keys_and_integers_go_along():
    def noisy(params, x):
        kept = jax.random.bernoulli(params["key"], 0.5, (len(x), 1))
        return apply(params, jnp.where(kept, x, 0.5 * x)) * params["n"].astype(jnp.float32)

    more = {"key": jax.random.key(1), "n": jnp.int32(3)}
    plan = us.plan(noisy, SMALL | more, noisy, shapes(14) | more, INPUT)
    big = us.grow(SMALL | more, plan)
    assert big["key"] == more["key"]
    assert big["n"] == 3
    assert us.shrink(big, plan)["key"] == more["key"]
    assert "no floating leaves: key, n" in str(plan)
    assert us.Plan.from_json(plan.to_json()) == plan


# Copies told apart.


def outputs_stay(big) -> None:
    np.testing.assert_allclose(apply(big, INPUT), apply(SMALL, INPUT), rtol=2e-5, atol=1e-5)


def test_noise_sums_to_zero_over_copies():
    big = us.grow(SMALL, planned(7, 17), symmetry="noise", amount=0.5, key=jax.random.key(1))
    plain = us.grow(SMALL, planned(7, 17))
    outputs_stay(big)
    np.testing.assert_array_equal(big["up"], plain["up"])
    noise = np.asarray(big["down"] - plain["down"])
    assert np.abs(noise).max() > 0.05
    sums = [noise[planned(7, 17).leaves["down"].maps[0] == j].sum(0) for j in range(7)]
    np.testing.assert_allclose(sums, 0, atol=1e-6)


def test_uneven_copies_have_shares():
    big = us.grow(SMALL, planned(), symmetry="uneven", amount=0.5)
    outputs_stay(big)
    rows = np.asarray(big["down"]).reshape(7, 3, 3)
    shares = np.array([0.5, 0.25, 0.25], np.float32)[None, :, None]
    np.testing.assert_allclose(rows, shares * np.asarray(SMALL["down"])[:, None], rtol=1e-6)


def test_new_units_without_readers_are_fresh():
    big = us.grow(SMALL, planned(), symmetry="zero_fan_out", key=jax.random.key(1))
    outputs_stay(big)
    up = np.asarray(big["up"]).reshape(5, 7, 3)
    np.testing.assert_array_equal(up[..., 0], SMALL["up"])
    assert np.linalg.matrix_rank(big["up"]) == 5
    assert np.abs(up[..., 1] - up[..., 0]).min() > 0
    np.testing.assert_array_equal(np.asarray(big["down"]).reshape(7, 3, 3)[:, 1:], 0)


def test_pairs_are_alike_and_read_with_opposite_signs():
    big = us.grow(SMALL, planned(), symmetry="paired", key=jax.random.key(1))
    outputs_stay(big)
    up, down = np.asarray(big["up"]).reshape(5, 7, 3), np.asarray(big["down"]).reshape(7, 3, 3)
    np.testing.assert_array_equal(up[..., 1], up[..., 2])
    np.testing.assert_array_equal(down[:, 1], -down[:, 2])
    assert np.abs(down[:, 1]).min() > 0


def test_copies_of_a_normalised_axis_only_differ_in_their_readers():
    def normed(params, x):
        h = x @ params["up"] + params["bias"][None]
        h = (h - h.mean(-1, keepdims=True)) / (h.std(-1, keepdims=True) + 0.1)
        return h @ params["down"]

    plan = us.plan(normed, shapes(7), normed, shapes(14), INPUT)
    assert plan.leaves["down"].roles == ("reader", "other")
    plain = us.grow(SMALL, plan)
    big = us.grow(SMALL, plan, symmetry="zero_fan_out", key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, big, plain)
    noisy = us.grow(SMALL, plan, symmetry="noise", key=jax.random.key(0))
    assert np.abs(noisy["down"] - plain["down"]).max() > 0.01


def test_a_weight_that_is_normalised_gets_no_noise():
    def normed(params, x):
        down = params["down"] / jnp.linalg.norm(params["down"], axis=0, keepdims=True)
        return jnp.tanh(x @ params["up"] + params["bias"][None]) @ down * params["gain"]

    small, big = ({**shapes(n), "gain": f32(1, 3)} for n in (7, 14))
    plan = us.plan(normed, small, normed, big, INPUT)
    assert plan.leaves["down"].roles[0] == "other"


# Refusals.


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        us.grow(*args, **kwargs)
    return str(error.value)


def test_parameters_with_nan():
    bad = {**SMALL, "up": SMALL["up"].at[1, 2].set(jnp.nan)}
    assert "the parameters hold NaN: up." in refusal(bad, planned())


def test_parameters_of_another_model():
    text = refusal(drawn(shapes(8)), planned())
    assert "'up' is float32[5,8]" in text
    assert "the plan is for shape (5, 7)" in text
    text = refusal({"up": SMALL["up"], "extra": SMALL["up"]}, planned())
    assert "it has no 'bias'" in text
    assert "'extra' is not in the plan" in text


def test_the_big_models_parameters():
    assert "these are the big model's parameters" in refusal(drawn(shapes(21)), planned())


def test_integers_in_place_of_numbers():
    bad = {**SMALL, "bias": jnp.zeros(7, jnp.int32)}
    assert "'bias' is int32[7]" in refusal(bad, planned())
    assert "not an array" in refusal({**SMALL, "bias": 3.0}, planned())


def test_symmetries_that_are_none_or_need_a_key():
    assert "is none of 'noise', 'uneven'" in refusal(SMALL, planned(), symmetry="chaos")
    assert "needs a key" in refusal(SMALL, planned(), symmetry="noise")


def test_growth_is_verified_unless_told_not_to():
    plan = planned()
    wrong = us.Plan(
        {**plan.leaves, "down": us.LeafPlan(**{**vars(plan.leaves["down"]), "factors": ()})},
        plan.axes,
        treedef=plan.treedef,
        models=plan.models,
    )
    assert "is not the same function" in refusal(SMALL, wrong)
    assert us.grow(SMALL, wrong, verify=False)["down"].shape == (21, 3)


# Verification.


def test_verification_knows_the_models_own_sensitivity():
    """A model that amplifies rounding passes if it was grown, and not if it was perturbed."""

    def steep(params, x):
        return jnp.sin(3e4 * apply(params, x))

    plan = us.plan(steep, shapes(7), steep, shapes(21), INPUT)
    big = us.grow(SMALL, plan, verify=False)
    measured = us.verify(plan, steep, SMALL, steep, big, INPUT, double=False)
    assert measured.dtype == "float32"
    assert measured.sensitivity > 1e-5
    assert "error" in str(measured)
    off = {**big, "up": big["up"] * 1.001}
    with pytest.raises(ValueError, match="not the same function"):
        us.verify(plan, steep, SMALL, steep, off, INPUT, double=False)


def test_verification_in_float64_sees_what_float32_hides():
    plan = planned()
    big = us.grow(SMALL, plan, verify=False)
    off = {**big, "up": big["up"] * (1 + 3e-6)}
    us.verify(plan, apply, SMALL, apply, big, INPUT, double=True)
    with pytest.raises(ValueError, match="Computed in float64"):
        us.verify(plan, apply, SMALL, apply, off, INPUT, double=True, tolerance=1e-7)


def test_verification_draws_inputs_where_only_shapes_are_given():
    inputs = f32(4, 5)
    plan = us.plan(apply, shapes(7), apply, shapes(21), inputs)
    big = us.grow(SMALL, plan)
    assert us.verify(plan, apply, SMALL, apply, big, inputs).error < 1e-6


def test_outputs_that_are_no_number_in_one_model_only():
    plan = planned()
    big = us.grow(SMALL, plan, verify=False)
    big["down"] = big["down"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="relative difference inf"):
        us.verify(plan, apply, SMALL, apply, big, INPUT)


# The way back.


@pytest.mark.parametrize("symmetry", [None, "noise", "uneven"])
def test_shrinking_undoes_growing(symmetry):
    plan = planned(7, 28)
    big = us.grow(SMALL, plan, symmetry=symmetry, key=jax.random.key(0))
    back = us.shrink(big, plan)
    exact = np.testing.assert_array_equal if symmetry is None else close
    jax.tree.map(exact, back, SMALL)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_shrinking_what_does_not_fit():
    with pytest.raises(ValueError, match="the plan makes \\(5, 21\\)"):
        us.shrink(SMALL, planned())
