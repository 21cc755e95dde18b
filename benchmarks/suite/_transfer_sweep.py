"""Learning rates swept over one size of a Transformer: what the transfer benchmark runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import uscale_jax as us
from benchmarks.models.functional import TransformerConfig
from benchmarks.registry import Options, Progress, Result
from benchmarks.suite import _grow_train as training
from benchmarks.suite._grow_train import Curve, Run, Text, Wrap
from benchmarks.training import TrainState

# Sizes that all differ, so that no two dimensions are taken for one.
TRACED = jax.ShapeDtypeStruct((3, 11), jnp.int32)
STEP = 0.5
"""Of the grid, in powers of two: √2."""


@dataclass(frozen=True)
class Sweep:
    """One way to grow: a base model, and how large the targets are relative to it."""

    way: Literal["width", "depth"]
    base: TransformerConfig
    factors: tuple[int, ...]
    rules: tuple[str, ...]
    steps: int
    batch: int
    seq: int
    held_out: int
    seeds: int
    start: int
    """Where the search begins: the learning rate is 2^(start/2)."""
    beside: int = 2
    """How many points of the grid are looked at on each side of the best one."""

    def target(self, factor: int) -> TransformerConfig:
        """Return a target model: sizes times ``factor``, heads of the same size."""
        base = self.base
        if self.way == "depth":
            return _resized(base, layers=base.layers * factor)
        grown = {name: getattr(base, name) * factor for name in GROWING}
        return _resized(base, **grown)

    def size(self, factor: int) -> int:
        """Return the width, or how many layers there are."""
        target = self.target(factor)
        return target.layers if self.way == "depth" else target.hidden


GROWING = ("hidden", "heads", "kv_heads", "mlp")


def _resized(config: TransformerConfig, **sizes: int) -> TransformerConfig:
    return TransformerConfig(**{**asdict(config), **sizes})


@cache
def transferred(base: TransformerConfig, target: TransformerConfig, rule: str) -> us.Transfer:
    """Return a rule, worked out for a target."""
    models = [training.language_model(config) for config in (base, target)]
    shapes = [training.shapes(config) for config in (base, target)]
    depth = None if base.layers == target.layers else "interleave"
    plan = us.plan(
        models[0].apply, shapes[0], models[1].apply, shapes[1], TRACED, depth=depth, exact=False
    )
    return us.transfer(plan, rule)


@cache
def wrapped(base: TransformerConfig, target: TransformerConfig, rule: str) -> Wrap:
    """Return what gives an optimizer the rule's learning rates; always the same object."""
    found = transferred(base, target, rule)
    return lambda tx: us.scale_optimizer(tx, found)


class Searched:
    """Losses on a grid of learning rates, looked at where they are lowest."""

    def __init__(self, loss: Callable[[int], float], start: int, beside: int) -> None:
        """Look around ``start`` until ``beside`` points on each side are no better."""
        self.found: dict[int, float] = {}
        self._loss, best = loss, start
        while True:
            for index in range(best - beside, best + beside + 1):
                self._look(index)
            lowest = min(self.found, key=lambda index: self.found[index])
            if lowest == best:
                return
            best = lowest

    def _look(self, index: int) -> None:
        if index not in self.found:
            loss = self._loss(index)
            self.found[index] = loss if math.isfinite(loss) else math.inf


def rate(index: int) -> float:
    """Return the learning rate at a point of the grid."""
    return float(2.0 ** (STEP * index))


def trained(sweep: Sweep, factor: int, rule: str, index: int, text: Text, seed: int) -> float:
    """Return the held-out loss of a target after training at one learning rate."""
    config = sweep.target(factor)
    found = transferred(sweep.base, config, rule)
    wrap = wrapped(sweep.base, config, rule)
    state = training.fresh(config, seed)
    params = found.start(state.params)
    state = TrainState(params, training.optimizer(0.0, wrap).init(params))
    run = Run(config, state, text, Curve(), wrap)
    run.advance(training.cosine(rate(index), sweep.steps // 10, 0, sweep.steps, 0.1))
    return run.curve.bits[-1]


def run_case(sweep: Sweep, factor: int, rule: str, options: Options, progress: Progress) -> Result:
    """Sweep one target under one rule, averaged over seeds."""
    progress.start(2 * sweep.beside + 3, "learning rates, about")
    start = time.perf_counter()
    texts = [_text(sweep, options, seed) for seed in _seeds(sweep, options)]

    def loss(index: int) -> float:
        each = [trained(sweep, factor, rule, index, text, text.seed) for text in texts]
        progress.advance(note=f"{rate(index):.5f}: {np.mean(each):.3f} bits/byte")
        return float(np.mean(each))

    found = Searched(loss, sweep.start, sweep.beside).found
    return {
        "way": sweep.way,
        "rule": rule,
        "factor": factor,
        "size": sweep.size(factor),
        "bits": {str(k): found[k] if math.isfinite(found[k]) else None for k in sorted(found)},
        "seconds": time.perf_counter() - start,
    }


def _seeds(sweep: Sweep, options: Options) -> range:
    return range(options.seed, options.seed + sweep.seeds)


def _text(sweep: Sweep, options: Options, seed: int) -> Text:
    return training.read_text(
        options.data, seed, sweep.steps, sweep.batch, sweep.seq, sweep.held_out
    )


# What is read out of a sweep


def losses(result: Result) -> dict[int, float]:
    """Return the losses by points of the grid; what diverged is infinite."""
    return {int(k): math.inf if bits is None else bits for k, bits in result["bits"].items()}


def optimum(curve: Mapping[int, float]) -> float:
    """Return log₂ of the best learning rate: where a parabola through five points is lowest."""
    best = min(curve, key=lambda index: curve[index])
    near = [i for i in range(best - 2, best + 3) if math.isfinite(curve.get(i, math.inf))]
    if len(near) < 3:
        return STEP * best
    a, b, _ = np.polyfit(near, [curve[i] for i in near], 2)
    lowest = -b / (2 * a) if a > 0 else best
    return STEP * float(np.clip(lowest, best - 1, best + 1))
