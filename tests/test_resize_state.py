"""resize_state: what arrays belong to, both ways, powers, new layers, shardings, refusals."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from uscale_jax._frame import UnitScaleFrameWarning, scale_optimizer
from uscale_jax._plan import Plan
from uscale_jax._planning import plan as make_plan
from uscale_jax._powers import Power, measure
from uscale_jax._state import resize_state

pytestmark = pytest.mark.usefixtures("standard_promotion")


def apply(p, x):
    h = jnp.tanh(x @ p["up"] + p["bias"].reshape(1, -1))
    return p["scale"].reshape(1, 1) * (h @ p["down"])


def values(hidden: int = 7, seed: int = 0, dtype: Any = np.float32) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"up": (5, hidden), "bias": (hidden,), "down": (hidden, 3), "scale": ()}
    return {k: jnp.asarray(rng.standard_normal(shape), dtype) for k, shape in shapes.items()}


def planned(hidden: int) -> Plan:
    return make_plan(apply, values(), apply, values(hidden), jnp.zeros((2, 5)))


EVEN, UNEVEN = planned(14), planned(10)


def state_of(tx: Any, steps: int = 2) -> Any:
    """A state after some steps on the small model."""
    state, step = tx.init(values()), jax.jit(tx.update)
    for t in range(steps):
        _, state = step(values(seed=t + 1), state, values())
    return state


def by_rank(params):
    return {name: "matrix" if x.ndim > 1 else "vector" for name, x in params.items()}


MASK = {"up": True, "bias": False, "down": True, "scale": False}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adamw(0.1),
    "bfloat16 moments": optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "chain": optax.chain(optax.trace(0.9), optax.chain(optax.scale_by_rms(), optax.ema(0.5))),
    "named chain": optax.named_chain(("a", optax.scale_by_adam()), ("b", optax.scale(-0.1))),
    "injected": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 9)),
    "accumulation": optax.MultiSteps(optax.adam(0.1), 3),
    "masked": optax.adamw(0.1, mask=MASK),
    "masked moments": optax.chain(optax.masked(optax.scale_by_adam(), MASK), optax.scale(-0.1)),
    "partition": optax.partition(
        {"matrix": optax.adam(0.1), "vector": optax.sgd(0.1, momentum=0.9)}, by_rank
    ),
    "if finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "factored": optax.adafactor(0.1, min_dim_size_to_factor=3),
    "muon": optax.contrib.muon(0.1),
    "schedule-free": optax.contrib.schedule_free_adamw(0.1),
    "history": optax.scale_by_lbfgs(memory_size=2),
    "noise": optax.add_noise(0.1, 0.5, key=jax.random.key(3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_state_has_the_structure_that_init_gives_and_comes_back(name):
    tx = OPTIMIZERS[name]
    state = state_of(tx)
    for plan, hidden in ((EVEN, 14), (UNEVEN, 10)):
        grown = resize_state(state, plan)
        wanted = jax.eval_shape(scale_optimizer(tx, plan, check=False).init, values(hidden))
        assert jax.tree.structure(grown) == jax.tree.structure(wanted)
        for got, like in zip(jax.tree.leaves(grown), jax.tree.leaves(wanted), strict=True):
            assert (got.shape, got.dtype) == (like.shape, like.dtype)
        back = resize_state(grown, plan)
        assert jax.tree.structure(back) == jax.tree.structure(state)
        for got, like in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
            assert jnp.array_equal(got, like)


def test_arrays_are_copied_where_leaves_are_and_nothing_is_multiplied():
    state = state_of(optax.adam(0.1))
    grown, maps = resize_state(state, UNEVEN), UNEVEN.leaves["up"].maps
    np.testing.assert_array_equal(grown[0].mu["up"], np.asarray(state[0].mu["up"])[:, maps[1]])
    np.testing.assert_array_equal(grown[0].nu["down"], np.asarray(state[0].nu["down"])[maps[1]])
    assert int(grown[0].count) == 2


def test_shrinking_takes_the_mean_over_copies():
    grown = resize_state(state_of(optax.sgd(0.1, momentum=0.9)), EVEN)
    maps = EVEN.leaves["bias"].maps[0]
    first = jnp.asarray(np.unique(maps, return_index=True)[1])
    trace = {**grown[0].trace, "bias": grown[0].trace["bias"].at[first].add(2.0)}
    back = resize_state((grown[0]._replace(trace=trace), *grown[1:]), EVEN)
    wanted = np.asarray(grown[0].trace["bias"])[np.asarray(first)] + 1.0
    np.testing.assert_allclose(back[0].trace["bias"], wanted, atol=1e-6)


def test_parameters_and_a_plan_from_json_will_do():
    plan = Plan.from_json(UNEVEN.to_json())
    grown = resize_state({"ema": values(), "step": 3}, plan)
    assert grown["ema"]["up"].shape == (5, 10)
    assert grown["step"] == 3
    assert resize_state(values(), plan)["down"].shape == (10, 3)


def test_arrays_may_be_traced():
    state = state_of(optax.adam(0.1))
    for plan in (EVEN, UNEVEN):
        for options in ({}, {"optimizer": optax.adam(0.1)}):
            wanted = resize_state(state, plan, **options)
            got = jax.jit(lambda s, p=plan, o=options: resize_state(s, p, **o))(state)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6)


def test_rows_and_columns_change_places_where_another_dimension_becomes_the_larger():
    """[5, 4] keeps a row of 4 without its largest dimension; [5, 8] keeps a row of 5."""
    wide = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    shapes = lambda n: {"up": jnp.ones((5, n)), "down": jnp.ones((n, 3))}  # noqa: E731
    plan = make_plan(wide, shapes(4), wide, shapes(8), jnp.zeros((2, 5)))
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    grads = {
        k: jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), np.float32)
        for k, x in shapes(4).items()
    }
    _, state = tx.update(grads, tx.init(shapes(4)), shapes(4))
    grown = resize_state(state, plan)
    np.testing.assert_array_equal(grown.v_row["up"], state.v_col["up"])
    np.testing.assert_array_equal(grown.v_col["up"], np.repeat(state.v_row["up"], 2))
    back = resize_state(grown, plan)
    np.testing.assert_array_equal(back.v_row["up"], state.v_row["up"])


def test_factored_moments_of_other_dimensions_are_refused():
    plan = _kernel_plan((4, 3, 5), (4, 6, 5), UNEVEN)
    state = optax.FactoredState(
        jnp.zeros((), jnp.int32),
        v_row={"kernel": jnp.ones((4, 3))},
        v_col={"kernel": jnp.ones((3, 5))},
        v={"kernel": jnp.zeros((1,))},
    )
    with pytest.raises(
        ValueError, match="'v_row/kernel'.*over dimension 2.*would keep that over dimension 1"
    ):
        resize_state(state, plan)


def _kernel_plan(small: tuple[int, ...], big: tuple[int, ...], like: Plan) -> Plan:
    pairs = zip(small, big, strict=True)
    leaf = replace(
        like.leaves["up"],
        key=("kernel",),
        source=("kernel",),
        small=small,
        big=big,
        maps=tuple(None if n == m else np.arange(m) * n // m for n, m in pairs),
        factors=(),
        copies=(np.asarray(np.prod(big) / np.prod(small)),),
        roles=(),
    )
    return replace(
        like, leaves={"kernel": leaf}, small_keys=(("kernel",),), treedef=None, small_treedef=None
    )


POWERS = {
    "trace": (optax.trace(0.9), {"trace": Power(1, 0)}),
    "adam": (optax.scale_by_adam(), {"mu": Power(1, 0), "nu": Power(2, 0)}),
    "rms": (optax.scale_by_rms(), {"nu": Power(2, 0)}),
    "lion": (optax.scale_by_lion(), {"mu": Power(1, 0)}),
    "behind adam": (optax.chain(optax.scale_by_adam(), optax.trace(0.9)), {"trace": Power(0, 0)}),
    "relative to weights": (
        optax.chain(optax.scale_by_trust_ratio(), optax.trace(0.9)),
        {"trace": Power(0, 1)},
    ),
    "square root": (
        optax.chain(
            optax.stateless(lambda u, _: jax.tree.map(lambda x: jnp.sqrt(jnp.abs(x)), u)),
            optax.ema(0.9),
        ),
        {"ema": Power(0.5, 0)},
    ),
    "accumulation": (
        optax.MultiSteps(optax.scale_by_adam(), 4).gradient_transformation(),
        {"acc_grads": Power(1, 0), "nu": Power(2, 0)},
    ),
    "accumulators that start above zero": (
        optax.scale_by_rss(initial_accumulator_value=0.1),
        {"sum_of_squares": None},
    ),
    "global norm": (
        optax.chain(optax.clip_by_global_norm(1e-3), optax.trace(0.9)),
        {"trace": None},
    ),
}


@pytest.mark.parametrize("name", POWERS)
def test_powers_are_measured(name):
    tx, wanted = POWERS[name]
    found = measure(tx, EVEN, ())
    for field, power in wanted.items():
        got = {p for key, p in found.items() if field in key and key[-1] in ("up", "down", "bias")}
        assert got == {power}


@pytest.mark.parametrize("plan", [EVEN, UNEVEN])
def test_a_bare_state_is_what_the_large_models_gradients_make_of_it(plan):
    tx = optax.chain(optax.scale_by_adam(), optax.ema(0.9, debias=False))
    state, big = state_of(tx), None
    for t in range(2):
        grads = {
            name: np.asarray(values(seed=t + 1)[name])
            if not leaf.small
            else _copied(values(seed=t + 1)[name], leaf) / leaf.factor / leaf.replicas
            for name, leaf in plan.leaves.items()
        }
        grads = jax.tree.map(lambda x: jnp.asarray(x, np.float32), grads)
        big = tx.init(grads) if big is None else big
        _, big = tx.update(grads, big)
    got = resize_state(state, plan, optimizer=tx)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(big), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    back = resize_state(got, plan, optimizer=tx)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def _copied(x: Any, leaf: Any) -> np.ndarray:
    x = np.asarray(x)
    for axis, old in enumerate(leaf.maps):
        x = x if old is None else np.take(x, old, axis)
    return x


def test_a_state_without_powers_is_refused_for_a_bare_optimizer():
    prodigy = optax.contrib.prodigy()
    moved = prodigy.init(values())._replace(numerator_weighted=jnp.ones(()))
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(0.1))
    for tx, state, name in (
        (optax.adagrad(0.1), state_of(optax.adagrad(0.1)), "sum_of_squares"),
        (clipped, state_of(clipped), "mu"),
        (prodigy, moved, "numerator_weighted"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*does not scale.*us.scale_optimizer"):
            resize_state(state, EVEN, optimizer=tx)
    with pytest.raises(ValueError, match="could not try the optimizer.*value"):
        resize_state(optax.polyak_sgd().init(values()), EVEN, optimizer=optax.polyak_sgd())


class Blocks(NamedTuple):
    """A plan that adds a layer, and trees of its two models."""

    plan: Plan
    small: dict
    big: dict


def blocks(zero: tuple[str, ...] = ("b2",)) -> Blocks:
    """Two blocks become three, and wider; the one in the middle is new, from the first."""

    def net(p, x):
        for name in sorted(key for key in p if key.startswith("b")):
            x = x + jnp.tanh(x @ p[name]["up"]) @ p[name]["down"]
        return x

    def tree(n: int, names: str) -> dict:
        return {
            name: {"up": jnp.full((5, n), 1.0 + i), "down": jnp.full((n, 5), 2.0 + i)}
            for i, name in enumerate(names.split())
        }

    wide = make_plan(net, tree(3, "b1 b2"), net, tree(6, "b1 b2"), jnp.zeros((2, 5)))
    leaves = {}
    for new, old in (("b1", "b1"), ("b2", "b1"), ("b3", "b2")):
        for name in ("down", "up"):
            leaf = wide.leaves[f"{old}/{name}"]
            added = {"new": new == "b2", "zero": new == "b2" and name == "down"}
            leaves[f"{new}/{name}"] = replace(leaf, key=(new, name), **added)
    big = tree(6, "b1 b2 b3")
    plan = replace(wide, leaves=leaves, treedef=jax.tree.structure(big))
    return Blocks(plan, tree(3, "b1 b2"), big)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.1),
        optax.MultiSteps(optax.adamw(0.1), 2).gradient_transformation(),
        optax.partition(
            {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
            lambda params: {k: {"up": "a", "down": "b"} for k in params},
        ),
    ],
)
def test_trees_get_the_layers_that_the_plan_adds(tx):
    plan, small, big = blocks()
    _, state = tx.update(small, tx.init(small), small)
    for way in ("mapped", "zeros"):
        grown = resize_state(state, plan, new_layers=way)
        wanted = jax.eval_shape(tx.init, big)
        assert jax.tree.structure(grown) == jax.tree.structure(wanted)
        back = resize_state(grown, plan)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
            assert jnp.array_equal(a, b)


def test_new_layers_start_with_the_moments_of_their_sources_or_with_none():
    plan, small, _ = blocks()
    tx = optax.trace(0.9)
    _, state = tx.update(small, tx.init(small))
    mapped, zeros = (resize_state(state, plan, new_layers=way) for way in ("mapped", "zeros"))
    firsts = [float(mapped.trace[name]["up"][0, 0]) for name in ("b1", "b2", "b3")]
    assert firsts == [1.0, 1.0, 2.0]
    assert not jnp.any(zeros.trace["b2"]["up"])
    assert float(zeros.trace["b3"]["up"][0, 0]) == 2.0
    bare = resize_state(state, plan, optimizer=tx)
    assert float(bare.trace["b3"]["up"][0, 0]) == 1.0  # m = 1, n = 2


def test_layers_that_are_stacked_in_one_leaf():
    def net(p, x):
        return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None), x, p)[0]

    def tree(layers: int, n: int) -> dict:
        rng = np.random.default_rng(0)
        shapes = {"up": (layers, 5, n), "down": (layers, n, 5)}
        return {k: jnp.asarray(rng.standard_normal(s), np.float32) for k, s in shapes.items()}

    plan = make_plan(net, tree(2, 3), net, tree(4, 6), jnp.zeros((2, 5)), depth="interleave")
    tx = optax.trace(0.9)
    _, state = tx.update(tree(2, 3), tx.init(tree(2, 3)))
    mapped = resize_state(state, plan).trace["down"]
    zeros = resize_state(state, plan, new_layers="zeros").trace["down"]
    np.testing.assert_array_equal(mapped[0], mapped[1])
    np.testing.assert_array_equal(zeros[0], mapped[0])
    assert not jnp.any(zeros[1])
    for grown in (mapped, zeros):
        back = resize_state(optax.TraceState({"down": grown, "up": tree(4, 6)["up"]}), plan)
        np.testing.assert_array_equal(back.trace["down"], state.trace["down"])


def test_shardings_are_kept():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
    mu = {
        "up": jax.device_put(jnp.ones((5, 8)), place(P(None, "model"))),
        "bias": jnp.ones(8),
        "down": jax.device_put(jnp.ones((8, 3)), place(P("model"))),
        "scale": jnp.ones(()),
    }
    plan = make_plan(apply, values(8), apply, values(12), jnp.zeros((2, 5)))
    grown = resize_state(optax.TraceState(mu), plan).trace
    assert grown["up"].sharding.spec == P(None, "model")
    assert grown["down"].sharding.spec == P("model")


def test_a_number_per_leaf_is_kept_and_said():
    tx = optax.novograd(0.1)
    with pytest.warns(UnitScaleFrameWarning, match="one number a leaf, '0/nu/bias'") as caught:
        grown = resize_state(state_of(tx), EVEN)
    assert caught[0].filename == __file__
    assert grown[0].nu["up"].shape == ()


def refused(state: Any, plan: Plan = EVEN) -> str:
    with pytest.raises(ValueError, match="state") as caught:
        resize_state(state, plan)
    return str(caught.value)


def test_states_of_other_models_and_optimizers_are_refused():
    other = optax.adam(0.1).init({**values(), "extra": jnp.zeros((3, 3))})
    text = refused(other)
    assert "'0/mu/extra' is float32[3,3]" in text
    assert "not named like a leaf" in text
    text = refused(optax.adam(0.1).init(values(9)))
    assert "'0/mu/bias' is float32[9]" in text
    assert "the plan is for (7,) and (14,)" in text
    text = refused(optax.sm3(0.1).init(values()))
    assert "'0/mu/up/0'" in text
    half = optax.adam(0.1).init(values())
    mixed = (half[0]._replace(nu=values(14)), half[1])
    assert "'0/mu/bias' is of the small model and '0/nu/bias' of the big one" in refused(mixed)


def test_nan_is_refused_before_it_is_copied():
    state = state_of(optax.adam(0.1))
    bad = {**state[0].nu, "up": state[0].nu["up"].at[0, 0].set(jnp.nan)}
    assert "NaN: 0/nu/up" in refused((state[0]._replace(nu=bad), *state[1:]))


def test_new_layers_is_one_of_two():
    with pytest.raises(ValueError, match="new_layers='copy' is neither 'mapped' nor 'zeros'"):
        resize_state(values(), EVEN, new_layers="copy")
