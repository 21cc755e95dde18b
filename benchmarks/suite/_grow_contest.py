"""The growth benchmark's contest: who starts from what, and one model's way through it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

import uscale_jax as us
from benchmarks.models.functional import TransformerConfig
from benchmarks.models.lstm import LSTMConfig
from benchmarks.registry import Options, Progress, Result
from benchmarks.suite import _grow_train as training
from benchmarks.suite._grow_train import Curve, Run, Schedule, Wrap
from benchmarks.training import Params, TrainState

ModelConfig: TypeAlias = TransformerConfig | LSTMConfig


@dataclass(frozen=True)
class Row:
    """A way to come to a trained large model.

    ``kind`` says what it starts from: nothing ("scratch"), the library's growth ("grown"), or the
    small weights in the leading block of a fresh large model ("corner").
    """

    name: str
    kind: Literal["scratch", "grown", "corner"] = "grown"
    symmetry: str | None = "noise"
    amount: float = 1.0
    depth: str = "stack"
    new_layers: str = "identity"
    rates: Literal["plan", "small", "large"] = "plan"
    """The small model's learning rate times the plan's factors, or one for all leaves: the small
    model's, or the best one for training the large model from scratch."""
    state: Literal["mapped", "zeros", "fresh"] = "zeros"
    """The optimizer's: "zeros" maps it too, but that of new layers is zero."""
    rewarm: bool = False
    schedule: Literal["constant", "new cosine", "continued cosine"] = "constant"
    control: bool = False
    """Whether it is only run for as long as it takes to compare it with the small model."""

    @property
    def exact(self) -> bool:
        """Return whether it promises to start as the same function as the small model."""
        return self.kind == "grown" and self.new_layers == "identity"


SCRATCH = Row("from scratch", kind="scratch", rates="large")
LIBRARY = Row("library")
CORNER = Row("random new parts", kind="corner", rates="large", state="fresh", rewarm=True)
ONE_RATE = Row("one learning rate", rates="small")
COPIES = Row("layers copied", new_layers="copy")
MAIN = (SCRATCH, LIBRARY, CORNER, ONE_RATE)


def _with(rows: tuple[Row, ...], **changes: Any) -> tuple[Row, ...]:
    """Return the rows, those that grow changed."""
    return tuple(replace(row, **changes) if row.kind == "grown" else row for row in rows)


FRESH_UNITS = _with(MAIN, symmetry="zero_fan_out")
"""For models all of whose units may be fresh: no axis is normalised, or added to itself."""
CONTROL = Row("no noise (control)", symmetry=None, state="mapped", control=True)
"""In width alone it must train as the small model does."""
LSTM_EXTRA = (
    CONTROL,
    Row("noise"),
    *_with(
        (
            Row("one learning rate, the large one's", rates="large"),
            Row("fresh optimizer state", state="fresh"),
            Row("fresh optimizer state, re-warm-up", state="fresh", rewarm=True),
            Row("re-warm-up", rewarm=True),
        ),
        symmetry="zero_fan_out",
    ),
)
EXTRA = (
    Row("no noise", symmetry=None),
    Row("noise 0.1", amount=0.1),
    Row("noise 0.3", amount=0.3),
    Row("noise 2", amount=2.0),
    Row("zero fan-out", symmetry="zero_fan_out"),
    Row("uneven copies", symmetry="uneven", amount=1 / 3),
    Row("one learning rate, the large one's", rates="large"),
    Row("fresh optimizer state", state="fresh"),
    Row("fresh optimizer state, re-warm-up", state="fresh", rewarm=True),
    Row("re-warm-up", rewarm=True),
    Row("new layers' state mapped", state="mapped"),
    Row("new layers between the old", depth="interleave"),
    COPIES,
    Row("layers copied in between", new_layers="copy", depth="interleave"),
    replace(SCRATCH, name="from scratch, cosine", schedule="new cosine"),
    Row("library, new cosine", schedule="new cosine"),
    Row("library, cosine continued", schedule="continued cosine"),
)


@dataclass(frozen=True)
class Target:
    """A large model: its rows on every seed, those on the first seed only, and when it grows.

    ``rate`` is the learning rate of training from scratch, and of all rows with one for all
    leaves; ``fraction`` is what part of the FLOPs goes to the small model.
    """

    model: ModelConfig
    rate: float
    fraction: float
    rows: tuple[Row, ...] = MAIN
    extra: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Size:
    """A small model, what it grows to, and how they train.

    ``steps`` are those from scratch; everyone may spend as many FLOPs. ``rate`` is the small
    model's learning rate, which the library keeps.
    """

    small: ModelConfig
    targets: Mapping[str, Target]
    rate: float
    steps: int
    chunk: int
    batch: int
    seq: int
    held_out: int
    warm_up: int
    control_steps: int
    final: float = 0.05
    """Where a cosine ends, relative to the learning rate."""

    def budget(self, target: Target) -> float:
        """Return the FLOPs of training from scratch."""
        return self.steps * training.step_flops(target.model, self.batch, self.seq)

    def grows_after(self, target: Target) -> int:
        """Return the number of chunks that the small model trains on."""
        chunk = self.chunk * training.step_flops(self.small, self.batch, self.seq)
        return max(1, round(target.fraction * self.budget(target) / chunk))


# Growth


@cache
def plan_for(small: ModelConfig, big: ModelConfig, depth: str, new_layers: str) -> us.Plan:
    """Return the library's plan; ``depth`` only matters where layers are added."""
    models = training.language_model(small), training.language_model(big)
    sides = [
        (model.apply, training.shapes(c)) for model, c in zip(models, (small, big), strict=True)
    ]
    tokens = jax.ShapeDtypeStruct((3, 11), jnp.int32)
    more = small.layers != big.layers
    deeper = {"depth": depth, "new_layers": new_layers} if more else {}
    return us.plan(*sides[0], *sides[1], tokens, **deeper)


@cache
def per_leaf(small: ModelConfig, big: ModelConfig, depth: str, new_layers: str) -> Wrap:
    """Return what gives an optimizer the plan's learning rates, always the same object."""
    plan = plan_for(small, big, depth, new_layers)
    # The check tries optimizers nobody knows; Adam treats every element alike.
    return lambda tx: us.scale_optimizer(tx, plan, check=False)


def corner(big: Params, small: Params) -> Params:
    """Return ``big`` with the small weights in the leading block of every leaf of that name."""
    leaves = jax.tree_util.tree_leaves_with_path(small)
    known = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        old = known.get(jax.tree_util.keystr(path))
        return leaf if old is None else leaf.at[tuple(map(slice, old.shape))].set(old)

    return jax.tree_util.tree_map_with_path(place, big)


def grown(row: Row, small: Run, config: ModelConfig, rate: float, seed: int) -> tuple[Any, Wrap]:
    """Return the training state a row starts from, and its optimizer's wrap."""
    if row.kind == "corner":
        start = training.fresh(config, seed)
        return start._replace(params=corner(start.params, small.state.params)), training.unchanged
    sides = (small.config, config, row.depth, row.new_layers)
    plan = plan_for(*sides)
    wrap = per_leaf(*sides) if row.rates == "plan" else training.unchanged
    params = us.grow(
        small.state.params,
        plan,
        symmetry=row.symmetry,
        amount=row.amount,
        key=jax.random.key(seed),
        verify=False,  # the benchmark compares the losses on the held-out text instead
    )
    if row.state == "fresh":
        return TrainState(params, training.optimizer(rate, wrap).init(params)), wrap
    # The wrapped optimizer works in the small model's frame, a bare one in the large model's.
    bare = None if row.rates == "plan" else training.optimizer(rate)
    state = us.resize_state(small.state.opt_state, plan, optimizer=bare, new_layers=row.state)
    return TrainState(params, state), wrap


# The contest


def rows(target: Target, first: bool) -> tuple[Row, ...]:
    """Return the rows of a target, the extra ones on the first seed only."""
    return target.rows + (target.extra if first else ())


class Contest:
    """One model on one seed: the small one trained once, grown to every target."""

    def __init__(self, size: Size, options: Options, progress: Progress, seed: int) -> None:
        """Cut the corpus and begin the small model's training."""
        self.size, self.seed = size, seed
        self.text = training.read_text(
            options.data, seed, size.chunk, size.batch, size.seq, size.held_out
        )
        self.small = self._small()
        self.spent = 0.0
        self.shown = 0
        self.progress = progress

    def _small(self) -> Run:
        return Run(self.size.small, training.fresh(self.size.small, self.seed), self.text, Curve())

    def _train(self, run: Run, budget: float, schedule: Schedule, name: str) -> Curve:
        """Train within the budget and tell how far it is."""

        def report(note: str) -> None:
            self.spent += run.chunk_flops
            units = int(self.spent / 1e9) - self.shown
            self.shown += units
            self.progress.advance(units, f"{name}: {note}")

        return run.until(budget, schedule, report)

    def _schedule(self, row: Row, target: Target, start: int) -> Schedule:
        """Return the learning rates of a row whose training of the large model starts there."""
        size = self.size
        rate = target.rate if row.rates == "large" else size.rate
        warmed = 0 if row.kind == "grown" and not row.rewarm else start
        if row.schedule == "constant":
            return training.warm_up(rate, size.warm_up, warmed)
        spent = size.grows_after(target) * self.small.chunk_flops if start else 0.0
        steps = (size.budget(target) - spent) / training.step_flops(
            target.model, size.batch, size.seq
        )
        begin = start if row.schedule == "new cosine" else 0
        return training.cosine(rate, size.warm_up, begin, start + int(steps), size.final)

    def row(self, row: Row, target: Target) -> Result:
        """Run one row and return its curve."""
        size, small = self.size, self.small
        if row.kind == "scratch":
            schedule = self._schedule(row, target, 0)
            run = Run(target.model, training.fresh(target.model, self.seed), self.text, Curve())
            return self._result(row, self._train(run, size.budget(target), schedule, row.name))
        chunks = size.grows_after(target)
        schedule = self._schedule(row, target, chunks * size.chunk)
        if row.schedule == "continued cosine":
            small = self._small()
            self._train(small, chunks * small.chunk_flops, schedule, row.name)
        state, wrap = grown(row, small, target.model, size.rate, self.seed)
        run = Run(target.model, state, self.text, small.curve, wrap)
        budget = size.budget(target)
        if row.control:
            budget = run.curve.spent + size.control_steps // size.chunk * run.chunk_flops
        return self._result(row, self._train(run, budget, schedule, row.name), small.curve)

    def _result(self, row: Row, curve: Curve, small: Curve | None = None) -> Result:
        return {
            "row": asdict(row),
            "exact": row.exact,
            "flops": curve.flops,
            "bits": curve.bits,
            "small_bits": small.bits[-1] if small else None,
            "small_chunks": small.chunks if small else 0,
        }

    def run(self, first: bool) -> Result:
        """Return the curves of all rows of all targets, and the small model's own."""
        start = time.perf_counter()
        size = self.size
        schedule = training.warm_up(size.rate, size.warm_up)
        targets = sorted(size.targets.items(), key=lambda item: size.grows_after(item[1]))
        found = {}
        for name, target in targets:
            budget = size.grows_after(target) * self.small.chunk_flops
            self._train(self.small, budget, schedule, "small")
            found[name] = [self.row(row, target) for row in rows(target, first)]
        longest = max(map(size.budget, size.targets.values()))
        curve = self._train(self.small, longest, schedule, "small")
        return {
            "seed": self.seed,
            "small": {"flops": curve.flops, "bits": curve.bits},
            "targets": {name: found[name] for name in size.targets},
            "seconds": time.perf_counter() - start,
        }


def total_flops(size: Size, first: bool) -> float:
    """Return the FLOPs of a whole contest, for the progress."""
    chunk = size.chunk * training.step_flops(size.small, size.batch, size.seq)
    total = max(map(size.budget, size.targets.values()))
    for target in size.targets.values():
        spent = size.grows_after(target) * chunk
        for row in rows(target, first):
            total += _row_flops(row, size, target, spent)
    return total


def _row_flops(row: Row, size: Size, target: Target, spent: float) -> float:
    if row.control:
        return size.control_steps * training.step_flops(target.model, size.batch, size.seq)
    own = row.kind == "scratch" or row.schedule == "continued cosine"
    return size.budget(target) - (0.0 if own else spent)


def run_case(size: Size, seed: int, first: bool, options: Options, progress: Progress) -> Result:
    """Run one model on one seed."""
    progress.start(int(total_flops(size, first) / 1e9), "GFLOP")
    return Contest(size, options, progress, seed).run(first)
