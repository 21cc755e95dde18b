"""Honest timing: contestants interleaved in one run, every output waited for, compile apart."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

# A sample this long is far above the clock's resolution and the cost of the loop around it.
MIN_SAMPLE_S = 2e-3
MIN_ROUNDS = 3
NOT_KERNELS = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast"})

Thunk = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contestant.

    ``ratio`` is the median over rounds of its time divided by the reference's time in the same
    round, so that what slows the whole machine for a while cancels; 1.0 for the reference.
    """

    best_s: float
    median_s: float
    iqr_s: float
    ratio: float
    rounds: int
    calls_per_round: int


def measure(
    contestants: Mapping[str, Thunk],
    repeats: int = 15,
    budget_s: float = 20.0,
    reference: str | None = None,
    min_sample_s: float = MIN_SAMPLE_S,
) -> dict[str, Timing]:
    """Time thunks against each other and return the timing of each, by name.

    Every thunk is called once to warm up (compile), then once more to find how many calls make
    a sample long enough for the clock. Then come up to ``repeats`` rounds in which each
    contestant runs once, each round starting with another one; rounds stop early once
    ``budget_s`` is spent, but not before three. Each call is followed by
    ``jax.block_until_ready`` on its whole output, so a thunk has to return all it computes.

    Thunks must be repeatable: one that donates a buffer has to make a new one, and then the
    making is timed as well.

    Args:
      contestants: name to function without arguments.
      repeats: most rounds to run.
      budget_s: seconds after which no further round begins.
      reference: the contestant that ratios refer to; the first one if not given.
      min_sample_s: least length of a sample. A long one, of many calls, shows a loop with warm
        caches; a single call shows what the contestant before it has left of them.
    """
    if not contestants or repeats < 1:
        raise ValueError("measure needs at least one contestant and one round")
    names = list(contestants)
    reference = names[0] if reference is None else reference
    if reference not in contestants:
        raise ValueError(f"reference {reference!r} is not among {names}")
    calls = {name: _calls_per_sample(thunk, min_sample_s) for name, thunk in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    with _no_garbage_collection():
        for round_ in range(repeats):
            if round_ >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
                break
            for name in _rotated(names, round_):
                samples[name].append(_sample(contestants[name], calls[name]))
    return {name: _summarise(samples[name], samples[reference], calls[name]) for name in names}


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _sample(thunk: Thunk, calls: int) -> float:
    """Return the mean seconds of ``calls`` calls, each waited for."""
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(thunk())
    return (time.perf_counter() - start) / calls


def _calls_per_sample(thunk: Thunk, min_sample_s: float) -> int:
    """Warm up and return how many calls take at least ``min_sample_s``."""
    jax.block_until_ready(thunk())
    return max(1, int(np.ceil(min_sample_s / max(_sample(thunk, 1), 1e-7))))


def _summarise(samples: list[float], reference: list[float], calls: int) -> Timing:
    low, median, high = np.percentile(samples, [25, 50, 75])
    ratio = np.median(np.divide(samples, reference))
    return Timing(
        best_s=min(samples),
        median_s=float(median),
        iqr_s=float(high - low),
        ratio=float(ratio),
        rounds=len(samples),
        calls_per_round=calls,
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the collector from running inside one contestant's sample."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class CompileStats:
    """What XLA says about a compiled function; None where a backend does not say.

    ``kernels`` counts the instructions of the optimised entry computation that do work: all but
    parameters, constants, tuples, tuple elements and bitcasts. A loop counts once.
    """

    compile_s: float
    flops: float | None
    bytes_accessed: float | None
    argument_bytes: int | None
    output_bytes: int | None
    alias_bytes: int | None
    temp_bytes: int | None
    kernels: int


def compile_stats(fn: Callable[..., Any], *args: Any) -> CompileStats:
    """Compile ``fn`` ahead of time for ``args`` and return what the compiler tells.

    ``args`` may be arrays or ``jax.ShapeDtypeStruct``; nothing is executed. A function that is
    not jitted yet is jitted without options; pass ``jax.jit(fn, donate_argnums=...)`` to see
    the effect of donation. Tracing is not part of ``compile_s``.
    """
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    lowered = jitted.lower(*args)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    return CompileStats(
        compile_s=seconds,
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        argument_bytes=getattr(memory, "argument_size_in_bytes", None),
        output_bytes=getattr(memory, "output_size_in_bytes", None),
        alias_bytes=getattr(memory, "alias_size_in_bytes", None),
        temp_bytes=getattr(memory, "temp_size_in_bytes", None),
        kernels=sum(opcode not in NOT_KERNELS for opcode in entry_opcodes(compiled.as_text())),
    )


def entry_opcodes(hlo: str) -> list[str]:
    """Return the opcodes of an HLO module's entry computation, in program order."""
    entry = re.search(r"^ENTRY .*?^}", hlo, re.MULTILINE | re.DOTALL)
    if entry is None:
        raise ValueError("the HLO text has no entry computation")
    # name = type opcode(operands): the type may be a tuple, but no word in it precedes a "(".
    pattern = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*?\s([a-z][a-z0-9\-]*)\(", re.MULTILINE)
    return pattern.findall(entry.group())
