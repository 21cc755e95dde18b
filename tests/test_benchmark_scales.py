"""The benchmark of scales: claims from given results, and a tiny run."""

from pathlib import Path

from benchmarks import plots
from benchmarks.models.functional import TransformerConfig
from benchmarks.registry import Options
from benchmarks.suite import scales
from tests import test_benchmark_grow as growing

corpus, Silent = growing.corpus, growing.Silent
TINY = scales.Setting(TransformerConfig(256, 8, 1, 2, 1, 4, 20), 2, 9, 3)


def test_the_model_in_units_trains_as_the_standard_one(corpus, monkeypatch, standard_promotion):
    options = Options(full=False, seed=0, out=Path("unused"), data=corpus)
    monkeypatch.setattr(scales, "QUICK", TINY)
    scales._text.cache_clear()
    names = (scales.STANDARD, scales.UNIT)
    results = {name: scales.run_model(name, options, Silent()) for name in names}
    scales._text.cache_clear()
    shown = scales.report(results, options)
    assert [row[0] for row in shown.tables[0].rows[::2]] == [*names]
    same = [claim for claim in shown.claims if "loss by loss" in claim.text]
    assert same[0].passed
    assert plots.draw(shown.plots[0]).startswith(b"\x89PNG")


def test_claims_fail_where_tensors_do_not_fit():
    fits, lost = [1.0, 3.0, 0.01, 0.0, 0.0], [1e-4, 3e-4, 0.5, 0.0, 0.0]
    row = lambda value, gradient: {  # noqa: E731
        "name": "up",
        "kind": "product",
        "value": value,
        "gradient": gradient,
    }
    look = lambda rows: {"losses": [5.0, 4.0], "before": rows, "after": rows}  # noqa: E731
    results = {
        scales.STANDARD: look([row(fits, lost)]),
        scales.UNIT: look([row(fits, fits)]),
        scales.BUILT: look([row(lost, fits)]),
    }
    options = Options(full=False, seed=0, out=Path("unused"))
    passed = [claim.passed for claim in scales.report(results, options).claims]
    assert passed == [True, True, False, True]
    results[scales.UNIT] = {**results[scales.UNIT], "losses": [5.0, 4.2]}
    assert not scales.report(results, options).claims[-1].passed
