"""The comparison with unit-scaling: pairs, what is shown, and a run where PyTorch is here."""

import importlib.util
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks.foreign import graphcore_compared as peer
from benchmarks.foreign import graphcore_functions, graphcore_products
from benchmarks.foreign.graphcore_pairs import REASONS, Pair, blend
from benchmarks.registry import Options, discover
from benchmarks.suite import _numerics_peers as peers
from uscale_jax import numerics as un

OPTIONS = Options(full=False, seed=0, out=Path("unused"))
PAIRS = [pair for pairs in peer.pairs().values() for pair in pairs]
BY_NAME = {pair.name: pair for pair in PAIRS}
with_torch = pytest.mark.skipif(bool(peers.missing()), reason=peers.SKIPPED)
quiet = pytest.mark.filterwarnings("ignore")  # PyTorch's own, of its deprecations


class Silent:
    """Progress that is not shown."""

    def start(self, total: int, what: str) -> None:
        pass

    def advance(self, units: int = 1, note: str = "") -> None:
        pass


# Pairs


def test_pairs_have_names_of_their_own_and_reasons_that_are_told():
    assert len(BY_NAME) == len(PAIRS)
    for pair in PAIRS:
        assert (pair.reason in REASONS) == bool(pair.ratios or pair.given), pair.name
        assert set(pair.ratios) | set(pair.judged) <= {"output", *pair.shapes}, pair.name
        assert set(pair.given) <= set(pair.shapes), pair.name
    assert {pair.reason for pair in PAIRS} == {"", *REASONS}


@pytest.mark.parametrize("of", peer.pairs())
def test_the_side_here_runs_with_gradients_and_sizes_differ(of):
    for pair in peer.pairs()[of]:
        for shape in pair.shapes.values():
            sizes = [size for size in shape if size > 1]
            assert len(set(sizes)) == len(sizes), pair.name
        arrays = list(peer.drawn(pair.shapes, 0).values())
        out, pull = jax.eval_shape(partial(jax.vjp, pair.here), *arrays)
        gradients = jax.eval_shape(pull, out)
        assert [g.shape for g in gradients] == list(pair.shapes.values()), pair.name


def test_products_at_borders_are_those_of_a_convolution_of_ones():
    shapes = {"x": (1, 6, 23), "w": (10, 3, 5)}
    ones = [jnp.ones(shape) for shape in shapes.values()]
    uses = float(jnp.sum(lax.conv_general_dilated(*ones, (2,), [(1, 1)], feature_group_count=2)))
    found = graphcore_products._border_ratios(shapes, 2, 1, 2)
    inside, per_input = (2 * 2 / (10 * 5)) ** 0.5, (uses / (6 * 23)) ** -0.5
    assert found["x"] == pytest.approx(per_input / inside, rel=1e-5)
    outputs = (23 + 2 - 5) // 2 + 1
    assert found["w"] == pytest.approx((uses / (10 * 3 * 5) / outputs) ** -0.5, rel=1e-5)


def test_ratios_are_those_of_published_constants():
    """The blend over the constants of *Unit Scaling*, Table A.2, and what u-µP's library was
    measured at."""
    gelu, silu = BY_NAME["gelu, mult 1, None"].ratios, BY_NAME["silu, mult 1, None"].ratios
    relu = 1.714
    blends = blend(0.8, 2, relu), blend(0.8, 2, 2**0.5), blend(0.5, 2, 2**0.5)
    assert gelu["output"] == pytest.approx(1.702 / blends[0], rel=1e-3)
    assert gelu["x"] == pytest.approx(1.481 / blends[1], rel=1e-3)
    assert silu["output"] == pytest.approx(1.788 / blends[0], rel=1e-3)
    assert silu["x"] == pytest.approx(1.623 / blends[2], rel=1e-3)


@pytest.mark.parametrize(("n", "mult"), [(7, 1.0), (64, 3.0)])
def test_factors_of_softmax_are_read_off_equal_logits(n, mult):
    s, b = graphcore_functions._softmax_factors(n, mult)
    p = np.exp(mult * np.random.default_rng(0).standard_normal((300_000 // n, n)))
    p /= p.sum(1, keepdims=True)
    g = np.random.default_rng(1).standard_normal(p.shape)
    assert s == pytest.approx(np.mean(p**2) ** -0.5, rel=0.02)
    pulled = p * (g - np.sum(p * g, 1, keepdims=True))
    assert b == pytest.approx(np.mean(pulled**2) ** -0.5, rel=0.02)


# Measures


def test_apart_is_relative_to_the_element_and_the_rms():
    b = np.array([3.0, 4.0, 0.0, 0.0])  # of RMS 2.5
    assert peer.apart(b, b) == 0
    assert peer.apart(b + np.array([0, 0.65, 0, 0]), b) == pytest.approx(0.1)
    assert peer.apart(b + np.array([0, 0, 0, -0.25]), b) == pytest.approx(0.1)


def test_scale_and_its_error():
    x = np.random.default_rng(0).standard_normal((400, 50)) * 3 + 4
    root, error = peer.scale(x, centred=False)
    assert root == pytest.approx(5, rel=0.01)
    assert peer.scale(x, centred=True)[0] == pytest.approx(3, rel=0.01)
    apart = [peer.scale(x[i : i + 20], centred=False)[0] for i in range(0, 400, 20)]
    assert error == pytest.approx(np.std(apart, ddof=1) / 20**0.5, rel=0.5)


# What is shown


def _found(larger=1.0, apart=1e-7, left=1e-7):
    return {"larger": larger, "apart": apart, "left": left}


def _results(**changed):
    same = {"name": "linear, None", "reason": "", "tensors": {"output": _found(), "x": _found()}}
    tensors = {"output": _found(0.9627, 0.04), "x": _found(0.9627, 0.03), "w": _found()}
    other = {"name": "gelu", "reason": "activation", "tensors": tensors | changed}
    one = {"here": 1.001, "there": 1.04, "error": 0.002}
    scales = {"output": one, "x": {**one, "there": 0.998}}
    head = {"versions": {"torch": "2"}, "left out": []}
    return {
        "linear": {**head, "compared": [same], "scales": []},
        "gelu": {**head, "compared": [other], "scales": [{"name": "gelu", "tensors": scales}]},
    }


def test_tables_notes_and_claims_of_results():
    alike, different, nearer = peers.tables(_results())
    assert alike.rows == (("linear", "1", "2", "1.0e-07"),)
    row = ("gelu", "output, x 0.9627", "4.0e-02", "1.0e-07", "activation")
    assert different.rows == (row,)
    assert nearer.rows[0] == ("gelu: output", "1.040", "1.001", "0.002", "here")
    assert nearer.rows[1][-1] == "level"
    found = peers.claims(_results())
    assert all(claim.passed for claim in found)
    assert found[-1].detail == "1 of 2, 1 level, there 0"
    assert peers.notes(_results())[-1] == f"activation: {REASONS['activation']}"


def test_what_is_not_explained_or_left_out_fails_the_claims():
    results = _results(x=_found(0.5, 0.5, 0.5))
    results["linear"]["compared"][0]["tensors"]["x"]["apart"] = math.nan
    results["gelu"]["left out"] = ["new_function"]
    results["gelu"]["scales"][0]["tensors"]["output"] |= {"here": 1.2, "there": 1.0}
    found = peers.claims(results)
    assert not any(claim.passed for claim in found)
    assert "new_function" in found[0].detail
    assert found[1].detail.endswith("not: linear, None: x")
    assert found[2].detail.endswith("not: gelu: x")
    assert "there 1 (gelu: output)" in found[-1].detail


def test_without_the_packages_it_is_skipped_and_says_so(monkeypatch):
    found = importlib.util.find_spec
    absent = lambda name: None if name in peers.REQUIRES else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    assert not peers.cases(OPTIONS)
    report = discover()["numerics_peers"].report({}, OPTIONS)
    assert report.notes == (peers.SKIPPED,)
    assert report.tables == report.claims == ()


# Both


@with_torch
@quiet
def test_every_function_there_is_compared():
    assert set(peer.public()) == set(peer.pairs())


@with_torch
@quiet
@pytest.mark.parametrize("of", peer.pairs())
def test_both_are_the_same_or_differ_as_explained(of):
    for pair in peer.pairs()[of]:
        found = peer.compared(pair, 5)["tensors"]
        left = {name: each["left"] for name, each in found.items()}
        assert max(left.values()) <= peers.SAME, (pair.name, left)
        apart = max(each["apart"] for each in found.values())
        assert (apart > peers.SAME) == bool(pair.reason), (pair.name, apart)


@with_torch
@quiet
def test_a_wrong_factor_or_another_function_is_noticed():
    gelu, linear = BY_NAME["gelu, mult 1, None"], BY_NAME["linear, None"]
    biased = BY_NAME["linear, None, with a bias"]
    for wrong in (
        replace(gelu, ratios={**gelu.ratios, "x": 1.0}),
        replace(gelu, here=partial(un.gelu, constraint=None)),  # by tanh
        replace(linear, here=lambda x, w: un.scale_bwd(un.linear(x, w, constraint=None), 1.0001)),
        replace(biased, given={}),
    ):
        found = peer.compared(wrong, 0)["tensors"]
        assert max(each["left"] for each in found.values()) > peers.SAME


@with_torch
@quiet
def test_scales_of_both_are_those_of_their_factors():
    pair: Pair = BY_NAME["gelu, mult 1, None"]
    found = peer.scales(pair, 0, draws=60)["tensors"]
    assert set(found) == {"output", "x"}
    for name, each in found.items():
        assert each["here"] == pytest.approx(1, abs=4 * each["error"])
        assert each["here"] / each["there"] == pytest.approx(pair.ratios[name], rel=1e-4)


@with_torch
@quiet
def test_a_case_is_what_json_can_hold_and_its_claims_hold():
    (case,) = (case for case in peers.cases(OPTIONS) if case.name == "matmul")
    results = {case.name: json.loads(json.dumps(case.run(OPTIONS, Silent())))}
    for claim in peers.claims(results):
        assert claim.passed, f"{claim.text}: {claim.detail}"
