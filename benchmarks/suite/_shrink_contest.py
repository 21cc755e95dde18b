"""The shrinking benchmark's contest: one trained model, pruned to several sizes, and recovered."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import jax

import uscale_jax as us
from benchmarks.registry import Options, Progress, Result
from benchmarks.suite import _grow_train as training
from benchmarks.suite import _shrink_train as shrinking
from benchmarks.suite._grow_train import Curve, Run, Schedule, Text
from benchmarks.suite._shrink_train import ModelConfig
from benchmarks.training import Params, TrainState

METHODS = ("random", "magnitude", "activation", "taylor", "reconstruction")
SHORT = 0.1
"""How long a recovery is that everyone gets, relative to training from scratch."""
LENGTHS = (0.05, SHORT, 0.2, 0.4)


@dataclass(frozen=True)
class Row:
    """A way to make a small model of the big one, and to train it on."""

    method: str
    loss: Literal["plain", "distilled"] = "plain"
    rates: Literal["plan", "unchanged"] = "plan"
    """The big model's learning rate, over the plan's factors or as it is."""
    state: Literal["resized", "fresh"] = "resized"
    """Adam's moments: those of the units that stay, or zeros."""
    length: float = SHORT
    """How long it trains, relative to training from scratch."""


LIBRARY = "reconstruction"
"""The default method; the rows of ``variants`` change one thing each."""


def variants(method: str, loss: Literal["plain", "distilled"]) -> tuple[Row, ...]:
    """Return a method with other learning rates, another state, and other lengths."""
    row = Row(method, loss)
    return (
        replace(row, rates="unchanged"),
        replace(row, state="fresh"),
        *(replace(row, length=length) for length in LENGTHS if length != SHORT),
    )


ROWS = (
    *(Row(method, loss) for method in METHODS for loss in ("plain", "distilled")),
    *variants(LIBRARY, "distilled"),
    Row(LIBRARY, rates="unchanged"),
    Row(LIBRARY, state="fresh"),
)


@dataclass(frozen=True)
class Size:
    """A big model, what shares of its parameters stay, and how all of them train.

    ``rate`` is the big model's highest learning rate; ``scratch_rates`` are those of the small
    models from scratch, by share. The big model and the small ones from scratch train for
    ``steps``. Every run ends with a cosine of its own.
    """

    big: ModelConfig
    scratch_rates: Mapping[float, float]
    rate: float
    steps: int
    chunk: int
    recovery_chunk: int
    batch: int
    seq: int
    held_out: int
    warm_up: int
    recovery_warm_up: int
    calibration: int
    """Batches that importance is measured on."""
    multiples: int | None = None
    """Of sizes; None for the library's choice."""
    widths: Mapping[float, int] = field(default_factory=dict)
    """Of what runs through all layers, by share; where there is none, all axes shrink alike."""
    recovery_rates: Mapping[str, float] = field(default_factory=dict)
    """Of a recovery by its loss, relative to ``rate``."""
    rows: tuple[Row, ...] = ROWS
    final: float = 0.05
    """Where a cosine ends, relative to the learning rate."""

    def small(self, share: float) -> ModelConfig:
        """Return the sizes of a small model."""
        return shrinking.under_budget(self.big, share, self.multiples, self.widths.get(share))

    def recovery(self, length: float) -> int:
        """Return the steps of a recovery: whole chunks."""
        return max(1, round(length * self.steps / self.recovery_chunk)) * self.recovery_chunk

    def scratch(self) -> dict[str, int]:
        """Return the steps from scratch: as the big model, with its recovery, or that alone."""
        whole = {"whole": self.steps, "total": self.steps + self.recovery(SHORT)}
        return {**whole, "recovery": self.recovery(SHORT)}


class Contest:
    """One model on one seed: trained once, pruned to every size."""

    def __init__(self, size: Size, options: Options, progress: Progress, seed: int) -> None:
        """Cut the corpus and train the big model."""
        self.size, self.seed, self.progress = size, seed, progress
        self.text = training.read_text(
            options.data, seed, size.chunk, size.batch, size.seq, size.held_out
        )
        self.big = self._fresh(size.big, size.rate, size.steps, "big model")
        self.batches = shrinking.calibration(self.text, size.calibration)

    def _fresh(self, config: ModelConfig, rate: float, steps: int, name: str) -> Run:
        """Train a model from scratch."""
        size = self.size
        text = self.text if steps >= size.steps else self._recovery_text()
        run = Run(config, training.fresh(config, self.seed), text, Curve())
        schedule = training.cosine(rate, min(size.warm_up, steps // 4), 0, steps, size.final)
        return self._advance(run, steps, schedule, name)

    def _recovery_text(self) -> Text:
        return self.text._replace(chunk=self.size.recovery_chunk)

    def _advance(self, run: Run, steps: int, schedule: Schedule, name: str) -> Run:
        """Train for some steps and tell how far it is."""
        for _ in range(steps // run.text.chunk):
            run.advance(schedule)
            self.progress.advance(run.text.chunk, f"{name}: {run.curve.bits[-1]:.2f} bits/byte")
        return run

    def _curve(self, run: Run) -> Result:
        """Return the held-out loss by tokens since the run began."""
        each = run.text.chunk * run.text.batch * run.text.seq
        bits = run.curve.bits
        return {"tokens": [i * each for i in range(len(bits))], "bits": list(bits)}

    def pruned(self, method: str, small: ModelConfig) -> tuple[TrainState, Result]:
        """Return the small model with the big one's moments, and what that took."""
        big, plan = self.size.big, shrinking.plan_for(small, self.size.big)
        params = self.big.state.params
        start = time.perf_counter()
        importance = us.importance(
            training.language_model(big).apply,
            params,
            self.batches,
            plan,
            method=method,
            loss=shrinking.likelihood,
            key=jax.random.key(self.seed),
        )
        chosen = us.select(plan, importance)
        # What a choice without data is worth is measured below, and need not be warned of.
        given = (params, chosen) if importance.data_free else (params, plan)
        found: Params = (
            us.shrink(*given) if importance.data_free else us.shrink(*given, importance=importance)
        )
        jax.block_until_ready(found)
        seconds = time.perf_counter() - start
        state = us.resize_state(self.big.state.opt_state, chosen)
        return TrainState(found, state), {"seconds": seconds, "notes": list(importance.notes)}

    def recovered(self, row: Row, small: ModelConfig, start: TrainState) -> Result:
        """Train a pruned model on, and return its curve."""
        size = self.size
        wrap = training.unchanged
        if row.rates == "plan":
            wrap = shrinking.recovery_optimizer(small, size.big)
        if row.state == "fresh":
            fresh = training.optimizer(size.rate, wrap).init(start.params)
            start = start._replace(opt_state=fresh)
        # The text goes on where the big model's training ended.
        curve = Curve(size.steps // size.recovery_chunk)
        run: Run
        if row.loss == "distilled":
            taught = shrinking.Distillation(small, start, self._recovery_text(), curve, wrap)
            run = taught.taught(size.big, self.big.state.params, wrap)
        else:
            run = Run(small, start, self._recovery_text(), curve, wrap)
        first, steps = curve.chunks * size.recovery_chunk, size.recovery(row.length)
        rate = size.rate * size.recovery_rates.get(row.loss, 1.0)
        last = first + steps
        schedule = training.cosine(rate, size.recovery_warm_up, first, last, size.final)
        run = self._advance(run, steps, schedule, f"{row.method}, {row.loss}")
        return {"row": asdict(row), **self._curve(run)}

    def scratch(self, share: float) -> Result:
        """Train a small model from scratch, for each number of steps."""
        small, rate = self.size.small(share), self.size.scratch_rates[share]
        return {
            name: self._curve(self._fresh(small, rate, steps, "from scratch"))
            for name, steps in self.size.scratch().items()
        }

    def target(self, share: float) -> Result:
        """Return one size: from scratch, and every row."""
        small = self.size.small(share)
        starts = {
            method: self.pruned(method, small)
            for method in dict.fromkeys(row.method for row in self.size.rows)
        }
        return {
            "config": asdict(small),
            "parameters": shrinking.parameters(small),
            "scratch": self.scratch(share),
            "pruning": {method: how for method, (_, how) in starts.items()},
            "rows": [self.recovered(row, small, starts[row.method][0]) for row in self.size.rows],
        }

    def run(self) -> Result:
        """Return the curves of all sizes, and the big model's."""
        start = time.perf_counter()
        size = self.size
        targets = {f"{share:g}": self.target(share) for share in size.scratch_rates}
        return {
            "seed": self.seed,
            "big": {"parameters": shrinking.parameters(size.big), **self._curve(self.big)},
            "targets": targets,
            "seconds": time.perf_counter() - start,
        }


def total_steps(size: Size) -> int:
    """Return the steps of a whole contest, for the progress."""
    each = sum(size.recovery(row.length) for row in size.rows) + sum(size.scratch().values())
    return size.steps + len(size.scratch_rates) * each


def run_case(size: Size, seed: int, options: Options, progress: Progress) -> Result:
    """Run one model on one seed."""
    progress.start(total_steps(size), "steps")
    return Contest(size, options, progress, seed).run()
