"""The benchmark of plans and of growth: a tiny model, what is claimed, what is left out."""

from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.registry import Options, discover
from benchmarks.suite import _resize_grow as work
from benchmarks.suite import resize
from benchmarks.suite._resize_grow import COPY, GROW, PEER, Size

OPTIONS = Options(full=False, seed=0, out=Path("unused"))
TINY = Size(1, 2, 128)


class Silent:
    """Progress that is not shown."""

    def start(self, total: int, what: str) -> None:
        pass

    def advance(self, units: int = 1, note: str = "") -> None:
        pass


def plan_result(layers: int, seconds: float) -> dict:
    own = {"seconds": seconds, "own_seconds": seconds / 2}
    return {"layers": layers, "equations": 60 * layers, **own}


def grow_result(ratio: float, peak: float) -> dict:
    size, times = 2**30, {"median_s": 0.1}
    return {
        "parameters": [100, 400],
        "output_bytes": size,
        "largest_leaf_bytes": 2**20,
        "peak_bytes": int(peak * size),
        "timings": {COPY: {**times, "ratio": 1.0}, GROW: {**times, "ratio": ratio}},
        "backend": "cpu",
    }


def results(**changed: dict) -> dict:
    return {
        "plan, 2 layers": plan_result(2, 0.1),
        "plan, 32 layers": plan_result(32, 1.6),
        "grow, 10 M": grow_result(1.2, 1.1),
        "peer": {"skipped": "not installed: torch"},
        **changed,
    }


def test_it_is_found_and_grows_a_tiny_model(standard_promotion):
    assert discover()["resize"].summary
    with jax.numpy_rank_promotion("allow"):
        found = work.grown(TINY, 0.1, 0)
    small, big = (work.count(work.model(TINY, widening)[1]) for widening in (1, 2))
    assert found["parameters"] == [small, big]
    assert found["output_bytes"] == 4 * big
    assert found["timings"][COPY]["ratio"] == 1.0
    assert found["timings"][GROW]["rounds"] >= 3


def test_a_process_of_its_own_says_what_went_wrong():
    with pytest.raises(RuntimeError, match="nothing of .* failed"):
        work.in_own_process("nothing", TINY, 0.1, 0)


def test_what_holds_and_what_does_not():
    assert resize.report(results(), OPTIONS).passed
    worse = {
        "plan, 32 layers": plan_result(32, 3.1),
        "grow, 10 M": grow_result(1.6, 1.1),
        "peer": {"timings": {PEER: {"median_s": 1.0}, GROW: {"median_s": 0.25}}},
    }
    for name, result in worse.items():
        report = resize.report(results(**{name: result}), OPTIONS)
        assert not report.passed, name
    assert not resize.report(results(**{"grow, 10 M": grow_result(1.2, 1.4)}), OPTIONS).passed
    slow = results(**{"plan, 2 layers": plan_result(2, 0.04)})
    assert [c.passed for c in resize.report(slow, OPTIONS).claims[:2]] == [True, False]


def test_what_is_left_out_is_said(monkeypatch):
    monkeypatch.setattr(resize, "free_bytes", lambda: 2**20)
    skipped = resize.run_grow(TINY, OPTIONS, Silent())["skipped"]
    assert "GiB are free" in skipped
    monkeypatch.setattr(work, "PEER_NEEDS", ("no_such_module",))
    missing = resize.run_peer(TINY, OPTIONS, Silent())
    assert missing == {"skipped": "not installed: no_such_module"}
    report = resize.report(results(**{"grow, 2 M": {"skipped": skipped}}), OPTIONS)
    assert {f"grow, 2 M: {skipped}", "peer: not installed: torch"} <= set(report.notes)


def test_sizes_are_what_they_are_called():
    for size in (*resize.SMALL, *resize.LARGE):
        millions = work.count(work.model(size, 2)[1]) / 1e6
        np.testing.assert_allclose(millions, size.millions, rtol=0.3)
