"""The growth benchmark: FLOPs counted and saved, who starts from what, and a tiny run of it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import plots
from benchmarks.models.functional import TransformerConfig
from benchmarks.models.lstm import LSTMConfig
from benchmarks.registry import Options, discover
from benchmarks.suite import _grow_contest as contest
from benchmarks.suite import _grow_train as training
from benchmarks.suite import grow
from benchmarks.suite._grow_saving import Line, line, reached, saved

TINY = {
    "transformer": contest.Size(
        small=TransformerConfig(256, 12, 1, 2, 1, 6, 14),
        targets={"both": contest.Target(TransformerConfig(256, 24, 2, 4, 2, 6, 28), 4e-3, 0.3)},
        rate=8e-3,
        steps=8,
        chunk=2,
        batch=3,
        seq=10,
        held_out=2,
        warm_up=2,
        control_steps=4,
    ),
    "lstm": contest.Size(
        small=LSTMConfig(256, 6, 9, 1),
        targets={
            "width": contest.Target(LSTMConfig(256, 12, 18, 1), 8e-3, 0.3, extra=(contest.CONTROL,))
        },
        rate=8e-3,
        steps=8,
        chunk=2,
        batch=3,
        seq=10,
        held_out=2,
        warm_up=2,
        control_steps=4,
    ),
}


class Silent:
    """Progress that is only counted."""

    def start(self, total: int, what: str) -> None:
        self.total, self.done = total, 0

    def advance(self, units: int = 1, note: str = "") -> None:
        self.done += units


@pytest.fixture
def corpus(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for index in range(6):
        words = rng.choice(["alpha", "beta", "gamma", "delta\n"], 4000)
        (tmp_path / f"file{index}.txt").write_text(" ".join(words), encoding="utf-8")
    return tmp_path


# FLOPs


def test_flops_of_products_loops_and_calls():
    x, w = jnp.ones((3, 5)), jnp.ones((5, 5))
    assert training.flops(lambda x, w: x @ w, x, w) == 2 * 3 * 5 * 5
    assert training.flops(jax.jit(lambda x, w: jnp.sin(x) @ w), x, w) == 150

    def loop(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]

    assert training.flops(loop, x, w) == 7 * 150
    batched = training.flops(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *[jnp.ones((4, 2, 2))] * 2
    )
    assert batched == 4 * 2 * 2 * 2 * 2


def test_step_flops_are_six_per_weight_and_token():
    size = TINY["lstm"]
    config = size.small
    products = 4 * config.hidden * (config.embedding + config.hidden) + config.hidden * 256
    counted = training.step_flops(config, size.batch, size.seq)
    assert counted == pytest.approx(6 * products * size.batch * size.seq, rel=0.02)


# FLOPs saved


def test_saved_by_hand():
    scratch = Line((0.0, 10.0, 20.0, 30.0), (8.0, 4.0, 3.0, 2.0))
    # At the level 2: half way between 12 and 16 FLOPs, so 14 of 30.
    other = Line((12.0, 16.0, 20.0), (3.0, 1.0, 1.0))
    assert reached(other, 2.0) == pytest.approx(13 + 1)
    assert saved(scratch, other) == pytest.approx(1 - 14 / 30)
    assert saved(scratch, scratch) == 0


def test_nothing_is_extrapolated():
    scratch = Line((0.0, 10.0), (8.0, 2.0))
    assert saved(scratch, Line((5.0, 10.0), (3.0, 2.1))) is None
    assert reached(Line((5.0, 10.0), (1.5, 1.0)), 2.0) == 5.0
    assert saved(scratch, Line((12.0, 15.0), (3.0, 1.0))) == pytest.approx(1 - 13.5 / 10)


def test_a_level_reached_before_the_end_counts_from_there():
    scratch = Line((0.0, 10.0, 20.0), (4.0, 2.0, 2.0))
    assert saved(scratch, Line((5.0,), (2.0,))) == 0.5


def test_smoothing_looks_back_and_never_hides_a_divergence():
    assert line([1, 2, 3, 4], [6.0, 4.0, 2.0, 0.0]).bits == (6.0, 5.0, 4.0, 2.0)
    broken = line([1, 2, 3], [6.0, None, 2.0])
    assert broken.bits[1:] == (float("inf"), float("inf"))
    assert reached(broken, 3.0) is None
    recovered = line([1, 2, 3, 4, 5], [9.0, None, 2.0, 2.0, 2.0])
    assert reached(recovered, 3.0) == 5


# Schedules and starts


def test_schedules():
    steps = np.arange(8)
    assert training.warm_up(1.0, 4)(steps) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert training.warm_up(1.0, 2, start=3)(steps[3:6]) == pytest.approx([0.5, 1, 1])
    rates = training.cosine(2.0, 0, 0, 8, 0.1)(np.array([0, 4, 8, 9]))
    assert rates == pytest.approx([2.0, 1.1, 0.2, 0.2])


def test_corner_keeps_the_small_weights_and_fresh_ones_elsewhere():
    big = {"a": jnp.full((4, 3), 7.0), "new": jnp.ones(2)}
    placed = contest.corner(big, {"a": jnp.zeros((2, 3))})
    assert placed["a"].tolist() == [[0.0] * 3] * 2 + [[7.0] * 3] * 2
    assert placed["new"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("row", [*contest.MAIN[1:], contest.COPIES], ids=lambda row: row.name)
def test_starts_of_the_rows(row, standard_promotion):
    size = TINY["transformer"]
    config = size.targets["both"].model
    small = training.fresh(size.small, 0)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    run = type("Small", (), {"config": size.small, "state": small})
    state, wrap = contest.grown(row, run, config, 1e-3, 0)
    models = training.language_model(size.small), training.language_model(config)
    before, after = (m.apply(s.params, tokens) for m, s in zip(models, (small, state), strict=True))
    assert bool(jnp.allclose(before, after, atol=1e-4)) is row.exact
    tx = training.optimizer(1e-3, wrap)
    shapes = jax.eval_shape(tx.init, state.params)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, state.opt_state)
    updates, _ = jax.eval_shape(tx.update, state.params, state.opt_state, state.params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, state.params)


# The whole


def test_tiny_contest_resumes_from_json_and_reports(corpus, monkeypatch, standard_promotion):
    monkeypatch.setattr(grow, "QUICK", TINY)
    monkeypatch.setattr(grow, "SEEDS", 2)
    options = Options(full=False, seed=0, out=corpus, data=corpus)
    found = grow.cases(options)
    assert [case.name for case in found] == [
        f"{model}-seed{seed}" for model in TINY for seed in (1, 2)
    ]
    results = {}
    for case in found:
        progress = Silent()
        results[case.name] = json.loads(json.dumps(case.run(options, progress)))
        assert 0.7 * progress.total <= progress.done <= progress.total
    report = grow.report(results, options)
    assert [len(table.rows) for table in report.tables] == [5, 5]
    assert all(plots.draw(plot).startswith(b"\x89PNG") for plot in report.plots)
    exact, control = report.claims[:2]
    assert exact.passed, exact.detail
    assert control.passed, control.detail
    assert json.dumps(dict(grow.config(options)))


def test_everyone_sees_the_same_batches(corpus):
    size = TINY["lstm"]
    text = training.read_text(corpus, 1, size.chunk, size.batch, size.seq, size.held_out)
    assert np.array_equal(text.windows(3), text.windows(3))
    assert not np.array_equal(text.windows(3), text.windows(4))


def test_registered():
    assert discover()["grow"].cases is grow.BENCHMARK.cases
    for size in (*grow.QUICK.values(), *grow.FULL.values()):
        assert all(target.fraction < 1 for target in size.targets.values())
        assert replace(size, steps=2 * size.steps).steps % size.chunk == 0
