"""The shrinking benchmark: sizes, claims computed from given results, and a tiny run of it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import plots
from benchmarks.models.functional import TransformerConfig
from benchmarks.models.lstm import LSTMConfig
from benchmarks.registry import Options, discover
from benchmarks.suite import _grow_train as training
from benchmarks.suite import _shrink_contest as contest
from benchmarks.suite import _shrink_minilm as pretrained
from benchmarks.suite import _shrink_peers, shrink
from benchmarks.suite import _shrink_report as report
from benchmarks.suite import _shrink_seen as saved
from benchmarks.suite import _shrink_train as shrinking
from tests import test_benchmark_grow as growing

TINY = contest.Size(
    big=TransformerConfig(256, 16, 1, 4, 2, 6, 28),
    scratch_rates={0.5: 8e-3},
    rate=8e-3,
    steps=20,
    chunk=2,
    recovery_chunk=1,
    batch=3,
    seq=10,
    held_out=2,
    warm_up=2,
    recovery_warm_up=1,
    calibration=2,
)
MODELS = {
    "transformer": replace(TINY, multiples=2),
    "lstm": replace(TINY, big=LSTMConfig(256, 12, 18, 1), multiples=2),
}


corpus, Silent = growing.corpus, growing.Silent
"""A small corpus, and progress that is only counted."""


# Sizes and rates


@pytest.mark.parametrize("name", shrink.QUICK)
def test_sizes_keep_within_the_budget(name):
    size = shrink.QUICK[name]
    whole = shrinking.parameters(size.big)
    for share in size.scratch_rates:
        found = shrinking.parameters(size.small(share)) / whole
        assert share - 0.04 < found <= share


def test_the_plans_rates_are_those_of_the_sizes_that_are_summed_over(standard_promotion):
    size = shrink.QUICK["lstm"]
    small = size.small(0.5)
    wrap = shrinking.recovery_optimizer(small, size.big)
    params = training.language_model(small).initialised(0)
    steps = []
    for tx in (training.optimizer(1e-3, wrap), training.optimizer(1e-3)):
        steps.append(tx.update(params, tx.init(params), params)[0])
    ratio = jax.tree.map(lambda a, b: (a / b).mean(), *steps)
    assert ratio["readout"]["kernel"][...] == pytest.approx(size.big.hidden / small.hidden)
    assert ratio["embed"]["embedding"][...] == pytest.approx(1)


def test_a_student_that_is_its_teacher_stays(standard_promotion):
    config = TINY.big
    state = training.fresh(config, 0)
    windows = np.random.default_rng(0).integers(0, 256, (2, 3, 9))
    program = shrinking.distiller(config, config, training.unchanged)
    rates = np.full(2, 1e-2, np.float32)
    same = program(state.params, state, windows, rates)
    other = program(training.fresh(config, 1).params, state, windows, rates)
    moved = [
        max(
            float(abs(a - b).max())
            for a, b in zip(*map(jax.tree.leaves, (state.params, new.params)), strict=True)
        )
        for new in (same, other)
    ]
    # Adam divides gradients by their size, rounding errors of 0 too.
    assert moved[1] > 0.009
    assert float(loss_of(config, same, windows)) < 1.001 * loss_of(config, state, windows)


def loss_of(config, state, windows):
    return training.evaluator(config)(state.params, windows)


# Claims


def curve(bits, tokens=100, **more):
    at = [tokens * i / (len(bits) - 1) for i in range(len(bits))]
    return {"bits": list(bits), "tokens": at, **more}


def made(start, ends, scratch, share="0.5"):
    """A model's results on one seed, from what rows start and end with."""
    rows = []
    for row in contest.ROWS:
        end = ends(row)
        first = start[row.method]
        tokens = 1000 * row.length
        rows.append(curve([first, end], tokens, row=contest.asdict(row)))
    return {
        "big": {"parameters": 1000, **curve([8.0, 2.0], 1000)},
        "targets": {
            share: {
                "parameters": 480,
                "scratch": {
                    "whole": curve([8.0, scratch], 1000),
                    "total": curve([8.0, scratch - 0.1], 1100),
                    "recovery": curve([8.0, 3.5]),
                },
                "rows": rows,
            }
        },
    }


START = {"random": 5.0, "magnitude": 4.0, "activation": 3.4, "taylor": 3.3, "reconstruction": 3.0}


def good(row):
    rise = 0.1 * (row.rates == "unchanged") + 0.2 * (row.method == "magnitude")
    return 2.4 + rise - 0.5 * (row.length - 0.1)


def verdicts(*results):
    return [claim.passed for claim in report.claims("model", results)]


def test_claims_hold_where_they_should():
    result = made(START, good, 2.41)
    assert verdicts(result, result) == [True] * 5
    assert "3.000" not in str(list(report.claims("model", [result]))[1])


def test_every_seed_has_to_hold():
    assert verdicts(made(START, good, 2.41), made(START, good, 2.39)) == [
        True,
        False,
        True,
        True,
        True,
    ]


def test_claims_fail_where_they_should():
    worse = {**START, "random": 2.9}
    result = made(worse, lambda row: 3.6 - 0.1 * (row.rates == "unchanged"), 2.41)
    assert verdicts(result) == [False] * 5


def test_a_loss_that_is_not_finite_beats_nothing():
    result = made({**START, "reconstruction": None}, lambda row: None, 2.41)
    # Another method is the best one before recovery.
    assert verdicts(result) == [True, False, False, False, False]
    assert all(plots.draw(plot) for plot in report.plots("model", [result]))


def test_tokens_needed_are_read_between_lengths():
    # At 5, 10, 20 and 40 % of 1000 tokens: 2.425, 2.4, 2.35, 2.25.
    for level, wanted in ((2.4, 0.1), (2.375, 0.15), (2.5, 0.05), (2.2, None)):
        size = saved.seen([made(START, good, level)])[0]
        found = saved.needed(size, 0)
        assert found is wanted or found == pytest.approx(wanted)


def width(random, best, seconds=10.0):
    methods = {"random": random, "magnitude": [0.2], "reconstruction": [best]}
    return {
        "axes": "mlp",
        "share": 0.5,
        "setup": {"methods": list(methods), "calibration": 1000, "test": 400, "draws": 2},
        "parameters": 10**7,
        "methods": {n: {"correlations": c, "seconds": seconds} for n, c in methods.items()},
    }


def depth(own):
    choices = {"0 1": own, "0 2": 0.5, "0 3": 0.7}
    return {"layers": [4, 2], "chosen": "0 1", "choices": choices, "seconds": 1.0}


def test_claims_of_the_pretrained_model():
    good = {"minilm: mlp 50%": width([0.5, 0.6], 0.61), pretrained.DEPTH: depth(0.65)}
    assert [claim.passed for claim in pretrained.claims(good)] == [True] * 3
    bad = {"minilm: mlp 50%": width([0.5, 0.62], 0.61, 61.0), pretrained.DEPTH: depth(0.55)}
    assert [claim.passed for claim in pretrained.claims(bad)] == [False] * 3
    assert [len(table.rows) for table in pretrained.tables(good)] == [1, 1, 4]
    assert not list(pretrained.notes(good))


# The whole


def test_without_the_pretrained_model_the_rest_runs(monkeypatch):
    monkeypatch.setattr(pretrained, "missing", lambda: ("a-package",))
    options = Options(full=False, seed=0, out=Path("unused"))
    names = [case.name for case in shrink.cases(options)]
    assert names[:2] == ["transformer-seed1", "transformer-seed2"]
    found = shrink.report({}, options)
    assert "a-package" in found.notes[0]
    assert not found.tables


def test_tiny_contest_resumes_from_json_and_reports(corpus, monkeypatch, standard_promotion):
    monkeypatch.setattr(shrink, "QUICK", MODELS)
    monkeypatch.setattr(shrink, "SEEDS", {"quick": 1})
    monkeypatch.setattr(pretrained, "missing", lambda: ("a-package",))
    monkeypatch.setattr(_shrink_peers, "cases", lambda options: ())
    options = Options(full=False, seed=0, out=corpus, data=corpus)
    results = {}
    for case in shrink.cases(options):
        progress = Silent()
        results[case.name] = json.loads(json.dumps(case.run(options, progress)))
        assert progress.done == progress.total
    assert list(results) == ["transformer-seed1", "lstm-seed1"]
    found = shrink.report(results, options)
    # Five methods, two variants, three times from scratch, and the big model.
    assert [len(table.rows) for table in found.tables[:4]] == [11, 1] * 2
    assert all(plots.draw(plot).startswith(b"\x89PNG") for plot in found.plots)
    assert len(found.claims) == 10
    assert json.dumps(dict(shrink.config(options)))


@pytest.mark.skipif(bool(pretrained.missing()), reason="the pretrained model is not installed")
def test_few_sentences_through_the_pretrained_model(standard_promotion):
    setup = pretrained.Setup(
        calibration=6, test=4, draws=2, shares=(("heads", (0.5,)),), methods=("random", "wanda")
    )
    setup = replace(setup, refitted=("heads", 0.5), layers=2)
    options = Options(full=False, seed=0, out=Path("unused"))
    results = {}
    for case in pretrained.cases(setup):
        progress = Silent()
        results[case.name] = json.loads(json.dumps(case.run(options, progress)))
        assert progress.done == progress.total
    widths, depths = results.values()
    assert set(widths["methods"]) == {"random", "wanda", pretrained.REFIT}
    assert len(depths["choices"]) == 5
    assert [len(table.rows) for table in pretrained.tables(results)] == [1, 1, 4]


def test_registered():
    assert discover()["shrink"].cases is shrink.BENCHMARK.cases
