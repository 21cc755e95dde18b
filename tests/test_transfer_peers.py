"""The comparison with mup and unit-scaling: twins, reasons, what is shown, a run with PyTorch."""

import importlib.util
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import uscale_jax as us
from benchmarks.foreign import torch_mup as mup
from benchmarks.foreign import torch_unit_scaling as unit_scaling
from benchmarks.foreign import transfer_twin as twin
from benchmarks.foreign.torch_unit_scaling import DEEP, WIDE
from benchmarks.foreign.transfer_twin import BASE, FORMS, PLAIN, SMALL, TARGET
from benchmarks.registry import Options
from benchmarks.suite import _transfer_peers as peers

OPTIONS = Options(full=False, seed=0, out=Path("unused"))
PAIR_IDS = [f"{form.name}, {rule}" for form, rule in peers.PAIRS]
ROOTS, TIED, ACROSS = FORMS[1:]
with_torch = pytest.mark.skipif(bool(peers.missing()), reason=peers.SKIPPED)
quiet = pytest.mark.filterwarnings("ignore")  # PyTorch's own, of its deprecations
promotes = pytest.mark.usefixtures("standard_promotion")


class Silent:
    """Progress that is not shown."""

    def start(self, total: int, what: str) -> None:
        pass

    def advance(self, units: int = 1, note: str = "") -> None:
        pass


# JAX's side


def _outputs(form, params):
    given = [jnp.asarray(x) for x in twin.inputs()]
    return np.asarray(jax.jit(twin.model(form))(params, *given))


def test_forms_are_the_same_model_otherwise_written():
    shallow = TARGET._replace(layers=1)
    base, params = twin.fresh(PLAIN, BASE._replace(layers=1)), twin.fresh(PLAIN, shallow)
    np.testing.assert_allclose(_outputs(ROOTS, base), _outputs(PLAIN, base), atol=1e-5)
    assert np.abs(_outputs(ROOTS, params) - _outputs(PLAIN, params)).max() > 0.01
    turned = {name: x.T if name.endswith("up.weight") else x for name, x in params.items()}
    np.testing.assert_allclose(_outputs(ACROSS, turned), _outputs(PLAIN, params), atol=1e-5)
    assert twin.shapes(ACROSS, shallow) == {name: x.shape for name, x in turned.items()}
    read = {"head.weight": params["embed.weight"], "head.bias": np.zeros_like(params["head.bias"])}
    tied = {name: x for name, x in params.items() if name not in read}
    np.testing.assert_allclose(_outputs(TIED, tied), _outputs(PLAIN, params | read), atol=1e-5)


def test_sizes_that_grow_are_axes_and_none_is_taken_for_another():
    axes = twin.planned(PLAIN, BASE, TARGET).axes
    grown = {(axis.small, axis.big) for axis in axes if axis.small != axis.big}
    assert grown == {(getattr(BASE, n), getattr(TARGET, n)) for n in ("hidden", "head", "mlp")}


def test_values_start_as_documented():
    sizes = twin.starts(PLAIN, TARGET)
    assert sizes["layers.0.down.bias"] == pytest.approx(1 / math.sqrt(3 * TARGET.mlp))
    assert sizes["norm.weight"] == 0
    for name, x in twin.started(PLAIN, TARGET).items():
        assert x.std() == pytest.approx(sizes[name])


# What the packages do, by their formulas


def _of_mup(form, optimizer):
    """``mup.optim``, ``mup.layer`` and ``mup.init`` in terms of shapes."""
    found = {}
    for name, target in twin.shapes(form, TARGET).items():
        grown = [b / a for a, b in zip(twin.shapes(form, BASE)[name], target, strict=True)]
        infinite = [x for x in grown if x != 1]
        wide = infinite[-1] if infinite else 1.0
        is_matrix, is_read = len(infinite) == 2, name == "head.weight"
        if optimizer == "adam":
            lr = 1 / wide if is_matrix else 1.0
        else:
            lr = grown[0] / grown[1] if is_matrix else wide
        kernel = twin.shapes(form, TARGET).get(name.replace("bias", "weight"))
        before = twin.shapes(form, BASE).get(name.replace("bias", "weight"))
        has_bias = (
            name.endswith("bias") and "norm" not in name and not (form.across and "up" in name)
        )
        start = math.sqrt(kernel[1] / before[1]) if has_bias else 1.0
        if is_read or (form.tied and name == "embed.weight"):
            start = math.sqrt(wide)
        found[name] = {
            "multiplier": 1 / wide if is_read else 1.0,
            "init": wide**-0.5 if is_matrix else 1.0,
            "start": start,
            "start by default": start,
            "lr": lr,
            "weight decay": 1 / lr,
            "decay of a step": 1.0,
        }
        if optimizer == "adam":
            found[name] |= {"ε": 1.0, "L2": 1 / lr}
    return found


def _of_unit_scaling(sizes):
    """``unit_scaling.optim`` and ``unit_scaling.functional`` in terms of shapes."""
    found, shapes = {}, twin.shapes(PLAIN, sizes)
    for name, shape in shapes.items():
        layer = name.rpartition(".")[0]
        is_linear = layer not in ("embed", "positions") and "norm" not in layer
        fan_in = shapes[f"{layer}.weight"][-1]
        lr = fan_in**-0.5 if len(shape) == 2 and layer != "head" else 1.0
        lr *= sizes.layers**-0.5 if layer.startswith("layers") else 1.0
        multiplier = fan_in ** (-1.0 if layer == "head" else -0.5) if is_linear else 1.0
        rates = {"lr": lr, "weight decay": 1 / lr, "decay of a step": 1.0}
        found[name] = {"init": 1.0, "multiplier": multiplier, **rates}
    return found


def _gradients_of_unit_scaling(optimizer):
    """What the backward pass makes of ε and of SGD's rates when all widths grow threefold."""
    found = {}
    for name, shape in twin.shapes(PLAIN, BASE).items():
        inside = name.startswith("layers") and "norm" not in name
        falls, lr = (3**-1.5 if inside else 1 / 3), 3.0
        if name in ("embed.weight", "positions.weight"):
            lr = 3**0.5
        elif name == "context.weight":
            lr = 1.0
        elif inside and len(shape) == 1:
            lr = 3**1.5
        found[name] = {"ε": falls} if optimizer == "adam" else {"lr": lr}
    return found


def _compared(form, rule, optimizer):
    there, here = _of_mup(form, optimizer), twin.here(form, BASE, TARGET, rule, optimizer)
    multipliers = {name: row["multiplier"] for name, row in here.items()}
    return peers.compared(there, here, partial(mup.reasons, form, rule, optimizer, multipliers))


def _odd(leaves):
    return {
        (factor, name)
        for name, leaf in leaves.items()
        for factor, why in leaf["why"].items()
        if why == [peers.NOT]
    }


@promotes
@pytest.mark.parametrize(("form", "rule"), peers.PAIRS, ids=PAIR_IDS)
def test_factors_are_those_of_mup_or_differ_as_explained(form, rule):
    adam, sgd = (_compared(form, rule, optimizer) for optimizer in peers.OPTIMIZERS)
    assert not _odd(adam) | _odd(sgd)
    wanted = {"Table 3"} if rule == "mup" else set()
    wanted |= {"scores"} if form.roots else {"layout"} if form.across else set()
    wanted |= {"tied", "tied start"} if form.tied else set()
    found = {reason for leaf in adam.values() for why in leaf["why"].values() for reason in why}
    assert found == wanted | {"no ε", "bias start"}
    if form.roots:  # one of queries and keys in every layer
        apart = [name for name, leaf in adam.items() if leaf["why"].get("multiplier")]
        assert len([name for name in apart if name.endswith("weight")]) == TARGET.layers


@promotes
def test_the_l2_term_follows_gradients():
    rule = us.transfer(twin.planned(PLAIN, BASE, TARGET), "mup_multipliers")
    decayed = optax.chain(optax.add_decayed_weights(1.0), optax.scale(-1.0))
    tx = us.scale_optimizer(decayed, rule, check=False)
    here = twin.here(PLAIN, BASE, TARGET, "mup_multipliers", "adam")
    ones = {name: np.ones(leaf.big, np.float32) for name, leaf in rule.plan.leaves.items()}
    zeros = {name: np.zeros_like(x) for name, x in ones.items()}
    step = jax.jit(lambda gradients, params: tx.update(gradients, tx.init(params), params)[0])
    of_weights, of_gradients = step(zeros, ones), step(ones, zeros)
    for name, x in of_weights.items():
        assert float(x.max() / of_gradients[name].max()) == pytest.approx(here[name]["L2"])


@promotes
@pytest.mark.parametrize(
    ("target", "why"), [(BASE, ["bias"]), (DEEP, ["bias", "branch"])], ids=["base", "target"]
)
def test_factors_are_those_of_unit_scaling_or_differ_as_explained(target, why):
    there, here = _of_unit_scaling(target), unit_scaling.here(target, "adam")
    leaves = peers.compared(there, here, partial(unit_scaling.reasons, target))
    assert not _odd(leaves)
    for layer in ("embed", "positions", "head"):
        assert not leaves[f"{layer}.weight"]["why"]
    assert leaves["layers.1.o.bias"]["why"]["multiplier"] == why


@promotes
@pytest.mark.parametrize("optimizer", peers.OPTIMIZERS)
def test_factors_of_own_widths_are_the_same_from_any_smaller_model(optimizer):
    found = twin.here(PLAIN, SMALL, WIDE, "u_mup", optimizer)
    for name, row in unit_scaling.here(WIDE, optimizer).items():
        assert row == pytest.approx(found[name]), name


@promotes
@pytest.mark.parametrize("optimizer", peers.OPTIMIZERS)
def test_what_is_compared_with_gradients_grows_as_in_unit_scaling(optimizer):
    base, wide = (unit_scaling.here(sizes, optimizer) for sizes in (BASE, WIDE))
    there = _gradients_of_unit_scaling(optimizer)
    leaves = peers.compared(there, unit_scaling.over(wide, base), unit_scaling.reasons_of_gradients)
    assert not _odd(leaves)


def test_a_difference_of_another_size_than_its_reason_says_is_not_explained():
    reasons = [("first", {"lr": 2.0}), ("second", {"lr": 3.0, "init": 1.0})]
    there = {"a": {"lr": 1.0, "init": 1.0}}
    for lr, why in ((6.0, ["first", "second"]), (2.0, [peers.NOT]), (1.0, None)):
        leaves = peers.compared(there, {"a": {"lr": lr, "init": 1.0}}, lambda name: reasons)
        assert leaves["a"]["why"] == ({} if why is None else {"lr": why})
    with pytest.raises(ValueError, match="other parameters"):
        peers.compared(there, {}, lambda name: [])


# What is shown


def _result(package, of, rule, optimizer, leaves, **more):
    head = {"package": package, "of": of, "rule": rule, "optimizer": optimizer}
    return {"kind": "factors", **head, "versions": {package: "1.0"}, "leaves": leaves, **more}


def _leaf(there, here, **why):
    factors = ("init", "start", "multiplier", "lr", "weight decay", "decay of a step", "ε")
    sides = {"there": dict.fromkeys(factors, there), "here": dict.fromkeys(factors, here)}
    return {**sides, "why": {name.replace("_", " "): each for name, each in why.items()}}


def _results(**why):
    leaves = {"layers.0.q.weight": _leaf(0.5, 0.5), "layers.1.q.weight": _leaf(0.5, 0.5)}
    leaves["head.bias"] = _leaf(2**0.5, 1.0, **why)
    of = (PLAIN.name, "mup_multipliers")
    run = {"of": PLAIN.name, "rule": "mup", "optimizer": "adam"}
    run |= {"outputs": 1e-7, "weights": 1e-6, "later": 1e-6, "moved": 0.5}
    branches = {"branches": [[0.5**0.5] * 2, [0.5] * 4], "last": 0.5**0.5}
    every = [
        _result("mup", *of, "adam", leaves, sampled=0.02),
        _result("mup", *of, "sgd", leaves, sampled=0.03),
        _result("unit-scaling", "target", "u_mup", "adam", leaves, **branches),
        _result("unit-scaling", "gradients", "u_mup", "adam", leaves),
        _result("unit-scaling", "gradients", "u_mup", "sgd", leaves),
        {"kind": "steps", "runs": [run]},
    ]
    return {f"peers {i}": result for i, result in enumerate(every)}


def test_tables_and_claims_of_results():
    results = {**_results(lr=["bias"]), "another": {}}
    of_mup, of_unit_scaling, of_gradients, differences, steps = peers.tables(results)
    same, apart = of_mup.rows  # one row of two layers
    assert same == ("layers.*.q.weight", *["1/2"] * 7, "yes")
    assert apart[0] == "head.bias"
    assert apart[4] == apart[6] == "√2, here 1"
    assert apart[-1] == "bias"
    assert of_unit_scaling.rows[1][3:] == ("√2, here 1", "√2", "bias")
    assert of_gradients.rows[1] == ("head.bias", "√2", "√2, here 1", "bias")
    assert differences.rows[0] == ("mup", "bias", "lr", "1/√2", "head.bias", "all")
    assert steps.rows == ((f"{PLAIN.name}, mup, adam", "1.0e-07", "1.0e-06", "1.0e-06"),)
    assert all(len(row) == len(t.columns) for t in peers.tables(results) for row in t.rows)
    assert all(claim.passed for claim in peers.claims(results))
    assert "mup 1.0" in peers.notes(results)[0]
    assert peers.notes(results)[-1] == f"bias: {peers.REASONS['bias']}"


def test_what_is_not_explained_fails_the_claims():
    results = _results(lr=[peers.NOT])
    results["peers 0"]["sampled"] = 0.3
    results["peers 2"]["last"] = 1.0
    results["peers 5"]["runs"][0]["weights"] = 0.1
    found = peers.claims(results)
    assert not any(claim.passed for claim in found)
    assert found[0].detail.endswith("not explained: lr of head.bias")
    still = _results(lr=["bias"])
    still["peers 5"]["runs"][0]["moved"] = 0.0  # nothing was trained
    assert not peers.claims(still)[-1].passed


def test_without_the_packages_it_is_skipped_and_says_so(monkeypatch):
    found = importlib.util.find_spec
    absent = lambda name: None if name in peers.REQUIRES else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    assert not peers.cases(OPTIONS)
    assert peers.notes({}) == (peers.SKIPPED,)
    assert peers.tables({}) == peers.claims({}) == ()
    assert peers.SKIPPED not in peers.notes(_results())


# Both


@with_torch
@quiet
@promotes
@pytest.mark.parametrize("optimizer", peers.OPTIMIZERS)
def test_the_formulas_are_what_the_packages_do(optimizer):
    for form in FORMS:
        _alike(mup.factors(form, optimizer), _of_mup(form, optimizer))
    _alike(unit_scaling.factors(DEEP), _of_unit_scaling(DEEP))
    base, wide = (unit_scaling.gradients(sizes, optimizer) for sizes in (BASE, WIDE))
    found, wanted = unit_scaling.over(wide, base), _gradients_of_unit_scaling(optimizer)
    _alike(found, wanted)


def _alike(found, wanted):
    assert set(found) == set(wanted)
    for name, row in found.items():
        assert row == pytest.approx(wanted[name], rel=1e-5), name


@with_torch
@quiet
@promotes
@pytest.mark.parametrize(
    ("form", "rule", "optimizer"),
    [(PLAIN, "mup", "adam"), (ROOTS, "mup_multipliers", "adam"), (TIED, "mup_multipliers", "sgd")],
)
def test_steps_of_both_are_the_same(form, rule, optimizer):
    found = mup.stepped(twin.planned(form, BASE, TARGET), form, rule, optimizer)
    assert max(found[each] for each in ("outputs", "weights", "later")) <= peers.SAME
    assert found["moved"] > 0.1


@with_torch
@quiet
@promotes
def test_claims_hold_of_a_run():
    # Without the trainings, which are the benchmark's.
    results = {
        case.name: json.loads(json.dumps(case.run(OPTIONS, Silent())))
        for case in peers.cases(OPTIONS)
        if "steps" not in case.name
    }
    for claim in peers.claims(results):
        assert claim.passed, f"{claim.text}: {claim.detail}"
    assert len(peers.tables(results)) == 4
