"""The transfer benchmarks: search on a grid, claims from given results, and tiny runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import plots
from benchmarks.models.functional import TransformerConfig
from benchmarks.registry import Options
from benchmarks.suite import _transfer_report as report
from benchmarks.suite import _transfer_sweep as sweeps
from benchmarks.suite import coord_check, lr_transfer, seed_example
from tests import test_benchmark_grow as growing

corpus, Silent = growing.corpus, growing.Silent

TINY = sweeps.Sweep(
    way="width",
    base=TransformerConfig(256, 8, 1, 2, 1, 4, 20),
    factors=(1, 2),
    rules=("standard", "mup"),
    steps=3,
    batch=2,
    seq=9,
    held_out=2,
    seeds=2,
    start=-13,
    beside=1,
)


# Search


def bowl(lowest, curvature=0.1):
    return lambda index: 3.0 + curvature * (index - lowest) ** 2


@pytest.mark.parametrize(("lowest", "start"), [(-13.0, -13), (-9.3, -13), (-20.4, -13)])
def test_the_search_finds_the_lowest_point_and_its_neighbours(lowest, start):
    found = sweeps.Searched(bowl(lowest), start, 2).found
    best = min(found, key=found.__getitem__)
    assert best == round(lowest)
    assert {best - 2, best - 1, best, best + 1, best + 2} <= set(found)
    assert sweeps.optimum(found) == pytest.approx(lowest / 2)


def test_what_diverges_is_no_optimum():
    def loss(index):
        return float("nan") if index > -9 else bowl(-10.2)(index)

    found = sweeps.Searched(loss, -8, 2).found
    assert sweeps.optimum(found) == pytest.approx(-5.1)
    assert found[-8] == float("inf")


def test_the_grid_is_of_roots_of_two():
    assert sweeps.rate(-12) == pytest.approx(2**-6)
    assert sweeps.rate(-11) / sweeps.rate(-12) == pytest.approx(2**0.5)


# Sizes and rules


def test_targets_grow_in_width_with_heads_of_one_size_or_in_layers():
    wide = replace(TINY, base=lr_transfer.QUICK["width"].base).target(4)
    assert (wide.hidden, wide.heads, wide.kv_heads, wide.head_dim, wide.mlp) == (
        256,
        16,
        8,
        16,
        768,
    )
    deep = replace(TINY, way="depth").target(3)
    assert (deep.layers, deep.hidden) == (3, 8)


def test_rules_are_alike_on_the_base():
    for rule in ("standard", "mup"):
        found = sweeps.transferred(TINY.base, TINY.base, rule)
        assert {leaf.learning_rate for leaf in found.leaves.values()} == {1.0}


# Reports


def result(rule, factor, lowest, low=3.0, way="width"):
    bits = {
        str(i): low + 0.05 * (i - lowest) ** 2 for i in range(round(lowest) - 2, round(lowest) + 3)
    }
    return {
        "way": way,
        "rule": rule,
        "factor": factor,
        "size": 32 * factor,
        "bits": bits,
        "seconds": 1.0,
    }


def given(moved):
    return [
        result("standard", 1, -13, 3.3),
        result("standard", 4, -17, 3.1),
        result("mup", 4, -13 + moved, 3.0),
    ]


@pytest.mark.parametrize(("moved", "holds"), [(0.2, True), (-1.0, False)])
def test_claims_are_about_how_far_the_optimum_moves(moved, holds):
    stays, better = report.claims("width", given(moved))
    assert stays.passed == holds
    assert "standard: 2^2.00" in stays.detail
    assert better.passed


def test_a_larger_model_that_is_worse_at_one_rate_is_told():
    worse = [*given(0.0)[:2], result("mup", 4, -13, 3.35)]
    claims = list(report.claims("width", worse))
    assert [claim.passed for claim in claims] == [True, False]
    assert "+0.050" in claims[1].detail


def test_tables_and_plots_have_every_rule_and_size():
    best, every = report.tables("width", given(0.2))
    assert [row[0] for row in best.rows] == ["standard", "mup"]
    assert best.rows[0][-1] == "-1.00"
    assert best.rows[1][-1] == "+0.05"
    assert len(every.rows) == 4
    (plot,) = report.plots("width", given(0.2))
    assert plots.draw(plot).startswith(b"\x89PNG")


# Runs


def options(tmp_path, corpus):
    return Options(full=False, seed=0, out=tmp_path, data=corpus)


def test_a_tiny_sweep_runs(tmp_path, corpus, standard_promotion):
    found = [
        json.loads(
            json.dumps(sweeps.run_case(TINY, factor, rule, options(tmp_path, corpus), Silent()))
        )
        for factor, rule in ((1, "standard"), (2, "mup"))
    ]
    assert [r["size"] for r in found] == [8, 16]
    for r in found:
        assert all(np.isfinite(bits) for bits in sweeps.losses(r).values())
    assert len(lr_transfer.cases(options(tmp_path, corpus))) == 10


def test_the_first_examples_nets_follow_at_half_the_rate(monkeypatch, standard_promotion):
    setting = seed_example.Setting(small=20, big=40, inputs=6, outputs=3, batch=7, steps=5, seeds=1)
    monkeypatch.setattr(seed_example, "SETTING", setting)
    caches = (seed_example.batches, seed_example.plan, seed_example._ruled)
    for cached in caches:
        cached.cache_clear()
    shown = Options(full=False, seed=0, out=Path("unused"))
    results = {"grown": json.loads(json.dumps(seed_example.run_grown(shown, Silent())))}
    assert results["grown"]["factors"]["hidden"] == 0.5
    claims = seed_example.report(results, shown).claims
    assert claims[0].passed
    assert seed_example._apart(results["grown"], seed_example.HALVED) < 1e-3
    fresh = seed_example.run_fresh("mup", 40, shown, Silent())
    assert fresh["size"] == 40
    for cached in caches:
        cached.cache_clear()


def test_coordinate_checks_claim_what_is_right_and_what_is_wrong():
    def check(right, failures):
        return {
            "check": {"right": right},
            "widths": [32, 64],
            "changes": {"a": [0.5, 0.5]},
            "slopes": {"a": 0.1, "b": None},
            "failures": failures,
            "modules": 2,
        }

    results = {
        "μP, Adam": check(True, {}),
        "standard, Adam": check(False, {"a": "grows"}),
        "μP, SGD": check(None, {"a": "vanishes"}),
    }
    shown = coord_check.report(results, Options(full=False, seed=0, out=Path("unused")))
    assert [claim.passed for claim in shown.claims] == [True, True]
    assert plots.draw(shown.plots[0]).startswith(b"\x89PNG")
    results["μP, Adam"] = check(True, {"a": "grows"})
    results["standard, Adam"] = check(False, {})
    shown = coord_check.report(results, Options(full=False, seed=0, out=Path("unused")))
    assert [claim.passed for claim in shown.claims] == [False, False]


def test_planted_rules_differ_from_the_right_one_in_what_they_say():
    right = coord_check._rule(coord_check.Check(), coord_check._target(2, coord_check.Check()))
    for name, check in coord_check.CHECKS.items():
        if check.planted:
            wrong = coord_check._rule(check, coord_check._target(2, check))
            plain = right if check.planted != "hidden kernels by fan-out" else None
            scales = [rule.scales() for rule in (wrong, plain) if rule is not None]
            assert plain is None or scales[0] != scales[1], name
