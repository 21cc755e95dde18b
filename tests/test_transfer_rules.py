"""The rules of transfer against the tables of the papers, and against the factors of growth."""

import math

import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import uscale_jax as us
from tests.nets import f32
from tests.test_zoo_plans import mixed
from tests.zoo import ZOO, big_model
from uscale_jax._transfer_rules import (
    FIXED,
    HIDDEN,
    INPUT,
    OPTIMIZERS,
    OUTPUT,
    RULES,
    VECTOR,
    Factors,
    Facts,
    Fan,
    Schedule,
)

R = 3.0  # by how much the width grows
L = 5.0  # and the number of layers
LAYERS = Fan(2, 10)

WIDTH, FEATURES, OUT = Fan(7, 21), Fan(5, 5), Fan(4, 4)
LEAVES = {
    "input": Facts(INPUT, FEATURES, WIDTH, R),
    "table": Facts(INPUT, Fan(1, 1), WIDTH, R, lookup=True),
    "bias": Facts(VECTOR, Fan(1, 1), WIDTH, R),
    "hidden": Facts(HIDDEN, WIDTH, Fan(11, 33), R * R),
    "output": Facts(OUTPUT, WIDTH, OUT, R),
    "last bias": Facts(FIXED, Fan(1, 1), OUT, 1.0),
}


def of(rule: str, leaf: str, **changed) -> Factors:
    return RULES[rule].rule(LEAVES[leaf]._replace(**changed))


def rate(optimizer: str, rule: str, leaf: str) -> float:
    return OPTIMIZERS[optimizer].lr(LEAVES[leaf], of(rule, leaf))


def deviation(rule: str, leaf: str) -> float:
    return of(rule, leaf).init


def row(what, *args) -> list[float]:
    """Of what comes in and vectors, which the tables have in one column; hidden; of readouts."""
    come_in = {round(what(*args, leaf), 12) for leaf in ("input", "table", "bias")}
    assert len(come_in) == 1
    return [come_in.pop(), what(*args, "hidden"), what(*args, "output")]


def close(got, wanted) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-11)


# Width


def test_mup_in_table_3():
    """Variances are of numbers whose fan-in is given: relative to the base."""
    close(row(deviation, "mup"), [1, R**-0.5, 1 / R])
    close(row(rate, "adam", "mup"), [1, 1 / R, 1 / R])
    close(row(rate, "lion", "mup"), [1, 1 / R, 1 / R])
    close(row(rate, "sgd", "mup"), [R, 1, 1 / R])
    close(row(lambda leaf: of("mup", leaf).multiplier), [1, 1, 1])


def test_mup_in_table_8():
    rule = "mup_multipliers"
    close(row(lambda leaf: of(rule, leaf).multiplier), [1, 1, 1 / R])
    close(row(deviation, rule), [1, R**-0.5, 1])
    close(row(rate, "adam", rule), [1, 1 / R, 1])
    close(row(rate, "sgd", rule), [R, 1, R])


def test_epsilon_goes_with_gradients():
    """n^-1 for all but a readout that holds 1/n itself."""
    close(row(lambda leaf: of("mup", leaf).eps), [1 / R, 1 / R, 1])
    close(row(lambda leaf: of("mup_multipliers", leaf).eps), [1 / R, 1 / R, 1 / R])


def test_decay_of_a_step_is_kept():
    close(row(lambda leaf: of("mup", leaf).weight_decay), [1, R, R])
    close(row(lambda leaf: of("mup_multipliers", leaf).weight_decay), [1, R, 1])
    for rule in RULES:
        close([of(rule, x).lr * of(rule, x).weight_decay for x in LEAVES], 1)


@pytest.mark.parametrize("rule", ["mup", "mup_multipliers", "spectral", "completep"])
def test_what_does_not_grow_is_left_alone(rule):
    assert of(rule, "last bias") == Factors()


def test_sgd_where_inputs_and_outputs_grow_unlike():
    """(d_out/d_in), as for the optimizers whose updates are as large as gradients."""
    leaf = Facts(HIDDEN, Fan(7, 28), Fan(11, 33), 12.0)
    close(OPTIMIZERS["sgd"].lr(leaf, RULES["mup"].rule(leaf)), 3 / 4)
    close(RULES["mup"].rule(leaf).eps, 1 / 3)
    close(RULES["mup"].rule(leaf).init, 1 / 2)


def test_u_mup_is_about_the_target_alone():
    """Multiplier, deviation and rate of Table 2; ε with gradients, which those leave at 1/n."""
    wanted = {
        "input": (5**-0.5, 1, 1, 1 / 21),
        "table": (1, 1, 21**-0.5, 1 / 21),
        "bias": (1, 1, 1, 1 / 21),
        "hidden": (21**-0.5, 1, 21**-0.5, 21**-0.5 / 33),
        "output": (1 / 21, 1, 1, 1 / 21),
        "last bias": (1, 1, 1, 1),
    }
    for name, row in wanted.items():
        found = of("u_mup", name)
        close((found.multiplier, found.init, found.lr, found.eps), row)


@pytest.mark.parametrize("gauge", [1.0, 0.5])
@pytest.mark.parametrize("leaf", ["input", "bias", "hidden", "output"])
def test_u_mup_is_mup_of_a_base_that_is_in_it_too(leaf, gauge):
    fans = {name: getattr(LEAVES[leaf], name).base for name in ("fan_in", "fan_out")}
    base = of("u_mup", leaf, **{name: Fan(n, n) for name, n in fans.items()})
    target, mup = (of(rule, leaf, gauge=gauge) for rule in ("u_mup", "mup"))
    a = target.multiplier / base.multiplier
    close((a * target.init / base.init, a * target.lr / base.lr), (mup.init, mup.lr))
    close(target.eps / base.eps, mup.eps * a)


def test_u_mup_in_depth():
    """Rates in branches L^-½, which end with a multiplier of L^-½."""
    inside, last = (of("u_mup", "hidden", layers=LAYERS, last=last) for last in (False, True))
    close((inside.multiplier, inside.lr), (21**-0.5, (21 * L) ** -0.5))
    close((last.multiplier, last.lr), ((21 * L) ** -0.5, (21 * L) ** -0.5))
    close([x.weight_decay * x.lr for x in (inside, last)], 1)


@pytest.mark.parametrize(("rule", "power"), [("standard_lr", 1), ("standard_lr_none", 0.5)])
def test_standard_initialisation_with_rates_per_layer(rule, power):
    """Everett et al.: b = 0, ½, ½; exponents 0, -1, -1 with full alignment and half with none."""
    close(row(deviation, rule), [1, R**-0.5, R**-0.5])
    close(row(rate, "adam", rule), [1, R**-power, R**-power])
    close(row(rate, "adam", "standard"), [1, 1, 1])
    close(row(deviation, "standard"), [1, R**-0.5, R**-0.5])


def test_gradients_behind_a_standard_readout_fall_with_its_square_root():
    close(row(lambda leaf: of("standard_lr", leaf).eps), [R**-0.5, R**-0.5, 1])


def test_norms_of_fresh_matrices():
    """σ(√m + √n) of a fresh matrix is √(fan_out/fan_in)."""
    square = Facts(HIDDEN, Fan(16, 64), Fan(9, 36), 16.0)
    close(RULES["spectral"].rule(square).init, RULES["mup"].rule(square).init)
    readout = Facts(OUTPUT, Fan(9, 36), Fan(4, 4), 4.0)
    close(RULES["spectral"].rule(readout).init, (2 / 6 / 8) / (2 / 3 / 5))
    wider = Facts(HIDDEN, Fan(4, 9), Fan(16, 144), 81 / 4)
    found = RULES["spectral"].rule(wider)
    close(found.init, (4 / 15) / (2 / 6))
    close((found.lr, found.eps), (4 / 9, 1 / 9))  # those of μP


# Depth


BRANCH = ("hidden", "bias")


@pytest.mark.parametrize("leaf", BRANCH)
@pytest.mark.parametrize(("rule", "alpha"), [("depth_mup", 0.5), ("completep", 1.0)])
def test_inside_of_branches(rule, alpha, leaf):
    """Rates η·m_N^-1·m_L^(α-1), of vectors η·m_L^(α-1); ε/(m_N·m_L^α); decay λ·m_N."""
    width = R if leaf == "hidden" else 1
    found = of(rule, leaf, layers=LAYERS)
    close((found.multiplier, found.init), (1, width**-0.5))
    close((found.lr, found.eps), (L ** (alpha - 1) / width, 1 / R / L**alpha))
    close(found.weight_decay, width)
    gradient = OPTIMIZERS["sgd"].lr(LEAVES[leaf], found)
    close(gradient, L ** (2 * alpha - 1) * (1 if leaf == "hidden" else R))


@pytest.mark.parametrize("leaf", BRANCH)
def test_what_branches_end_with_stands_behind_a_multiplier(leaf):
    """CompleteP as it is published, and the same without the multiplier."""
    width = R if leaf == "hidden" else 1
    apart = of("completep_multipliers", leaf, layers=LAYERS, last=True)
    close((apart.multiplier, apart.init, apart.lr), (1 / L, width**-0.5, 1 / width))
    close((apart.eps, apart.weight_decay), (1 / R / L, width))
    within = of("completep", leaf, layers=LAYERS, last=True)
    close((within.multiplier, within.init, within.lr), (1, width**-0.5 / L, 1 / width / L))
    close((within.eps, within.weight_decay), (1 / R, width * L))
    half = of("depth_mup", leaf, layers=LAYERS, last=True)
    close((half.multiplier, half.init, half.lr), (1, width**-0.5 * L**-0.5, 1 / width / L))


def test_outside_of_branches_depth_makes_no_difference():
    for rule, plain in [("depth_mup", "mup"), ("completep", "mup")]:
        assert all(of(rule, leaf) == of(plain, leaf) for leaf in LEAVES)
    assert all(of("completep_multipliers", x) == of("mup_multipliers", x) for x in LEAVES)


# Forms and optimizers


@given(*[st.floats(0.1, 10)] * 6)
def test_moving_a_multiplier_changes_no_training(a, b, c, eps, decay, theta):
    """A/θ, B·θ, C·θ, ε/θ, λ/θ; α·θ² under SGD, α under Adafactor."""
    old = Factors(a, b, c, eps, decay)
    new = old.moved(theta)
    close(new.multiplier * new.init, a * b)
    close(new.multiplier * new.lr, a * c)
    close(new.eps * new.lr, eps * c)
    close(new.weight_decay * new.lr, decay * c)
    ratios = {"adam": theta, "lion": theta, "sgd": theta**2, "adafactor": 1, "muon": theta}
    for name, ratio in ratios.items():
        before, after = (OPTIMIZERS[name].lr(LEAVES["hidden"], x) for x in (old, new))
        close(after, ratio * before)


def test_what_constants_in_the_model_call_for_is_in_all_factors():
    """Parts of a fused kernel may differ."""
    gauge = np.array([[0.5, 0.5, 1.0]])
    old, new = of("mup", "hidden"), of("mup", "hidden", gauge=gauge)
    close(
        [new.init, new.lr, 1 / new.eps, 1 / new.weight_decay],
        [gauge * x for x in (old.init, old.lr, 1 / old.eps, 1 / old.weight_decay)],
    )
    for rule, leaf in [
        ("mup_multipliers", "hidden"),
        ("mup_multipliers", "output"),
        ("u_mup", "bias"),
    ]:
        old, new = of(rule, leaf), of(rule, leaf, gauge=gauge)
        close(new.multiplier, gauge * old.multiplier)
        close(new.init * np.ones(3), old.init)
        close(new.lr * np.ones(3), old.lr)


@given(st.tuples(*[st.integers(2, 64)] * 4))
def test_norms_of_updates_are_those_of_the_spectral_condition(fans):
    """Muon's is the square root of max(1, out/in), or of max(in, out) with ``consistent_rms``."""
    (fan_in, wide_in), (fan_out, wide_out) = sorted(fans[:2]), sorted(fans[2:])
    leaf = Facts(HIDDEN, Fan(fan_in, wide_in), Fan(fan_out, wide_out), 1.0)
    wanted = math.sqrt(wide_out / wide_in) / math.sqrt(fan_out / fan_in)
    found = Factors(lr=leaf.m)
    adam = math.sqrt(wide_out * wide_in) / math.sqrt(fan_out * fan_in)
    close(OPTIMIZERS["adam"].lr(leaf, found) * adam, wanted)
    plain = math.sqrt(max(1, wide_out / wide_in)) / math.sqrt(max(1, fan_out / fan_in))
    close(OPTIMIZERS["muon"].lr(leaf, found) * plain, wanted)
    alike = math.sqrt(max(wide_out, wide_in)) / math.sqrt(max(fan_out, fan_in))
    close(OPTIMIZERS["muon_rms"].lr(leaf, found) * alike, wanted)


def test_muon_leaves_the_rest_to_adam():
    for leaf in ("input", "table", "bias", "output", "last bias"):
        assert (
            rate("muon", "mup", leaf) == rate("muon_rms", "mup", leaf) == rate("adam", "mup", leaf)
        )


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("rule", ["mup", "mup_multipliers", "standard_lr", "completep"])
def test_updates_that_are_as_large_as_weights(rule, leaf):
    close(rate("adafactor", rule, leaf) * deviation(rule, leaf), rate("adam", rule, leaf))


def test_batches_and_duration():
    """η·√(B/D), (1 − β)·B/D, ε·√(D/B), λ·√(B/D): four times the batch, nine times the tokens."""
    found = Schedule(batch=4.0, tokens=9.0).of(Factors(0.3, 0.7, 1.1, 1.3, 1.7))
    close((found.multiplier, found.init), (0.3, 0.7))
    close((found.lr, found.eps, found.weight_decay), (1.1 * 2 / 3, 1.3 * 3 / 2, 1.7 * 2 / 3))
    close(Schedule(4.0, 9.0).beta(0.95), 1 - 0.05 * 4 / 9)


SEEN = """
t5 gated|perceiver|weight norm|gpt-2 by head|llama query norm|gemma one key|one-hot tokens
top-k mixture gathered|ensemble|bilinear|memory slots|nnx scan|nnx cnn|cumulative|optimized lstm
gru|mamba separate projections|rg-lru|rwkv|linear attention|fori loop|cond|scan remat attention
custom derivatives|cnn batch norm train|depthwise|grouped conv|convnext
"""
PARTS = ["gpt-j", "deepseek", "bidirectional", "fused lstm", "mamba", "resnet pad"]
"""Leaves in parts of which some grow more than others."""


@pytest.mark.parametrize("name", [*SEEN.strip().replace("\n", "|").split("|"), *PARTS])
def test_mup_is_what_growth_by_copies_asks_for(name):
    built, big = ZOO[name].build(ZOO[name].sizes), big_model(name, mixed(name))
    plan = us.plan(built.apply, built.params, *big, *built.inputs)
    found = us.transfer(plan, optimizer="sgd").leaves
    for leaf in plan.leaves.values():
        if leaf.floating:
            one, shape = found[leaf.name], np.zeros(leaf.big)
            close(one.factors.lr + shape, leaf.lr_factor + shape)
            close(one.factors.eps + shape, 1 / (leaf.factor * leaf.replicas) + shape)
            close(one.factors.weight_decay + shape, 1 / np.asarray(leaf.factor) + shape)
            close(one.learning_rate + shape, leaf.sgd_lr_factor + shape)


def plan_of_mlp() -> us.Plan:
    small, big = ({"in": f32(5, n), "mid": f32(n, n), "out": f32(n, 3)} for n in (8, 32))
    apply = lambda p, x: x @ p["in"] @ p["mid"] @ p["out"]  # noqa: E731
    return us.plan(apply, small, apply, big, f32(2, 5))


PLAN = plan_of_mlp()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"rule": "mu_p"}, "rule is 'mu_p'.*'mup', 'mup_multipliers'.*Fix"),
        ({"optimizer": "adamw"}, "optimizer is 'adamw'.*'adam', 'lion'.*Fix"),
        ({"batch": 0}, "batch is 0.*positive.*Fix"),
        ({"batch": math.nan}, "batch is nan.*Fix"),
        ({"tokens": math.inf}, "tokens is inf.*Fix"),
        ({"batch": 2, "optimizer": "sgd"}, "derived for Adam.*Fix"),
        ({"initial": ({}, {"in": np.ones(3)})}, "of the base.*in, mid, out.*Fix"),
        ({"plan": us.Plan.from_json(PLAN.to_json())}, "read from JSON.*Fix"),
    ],
)
def test_what_is_refused(how, words):
    with pytest.raises(ValueError, match=words):
        us.transfer(**{"plan": PLAN, **how})


def test_trees_of_another_model_are_refused():
    rule, base = us.transfer(PLAN), {"in": np.ones((5, 8), np.float32)}
    for use in (rule.start, us.scale_optimizer(optax.adam(0.1), rule).init):
        with pytest.raises(ValueError, match="'in' is float32.5,8. .*the plan makes .5, 32."):
            use(base)


@pytest.mark.parametrize("k", [[1, 2, 3], [[1, 2]], [[1, 0, 2]], [[1, math.nan, 2]], [[1, -1, 2]]])
def test_factors_by_element_that_do_not_fit(k):
    with pytest.raises(ValueError, match="k .for leaf 'w'. must be"):
        us.scale_params({"w": np.ones((2, 3), np.float32)}, {"w": np.asarray(k, float)})
