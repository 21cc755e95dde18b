"""Random programs: growing is refused in words, or keeps the function; nothing else happens.

``python -m tests.test_random_programs 2000 [seed]`` runs that many programs and prints counts and
every wrong one as code.
"""

import random
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import program_layout, resizing
from tests.program_ops import GENTLE, NASTY
from tests.programs import HIDDEN, Program, Sizes, write
from uscale_jax.trace import affine

# Imported for the operations it defines.
_LAYOUT = program_layout

# Programs that compute the same function differ by rounding, which hard programs amplify.
TOLERANCE, AMPLIFIED = 1e-9, 1e5
OPERATIONS = [*GENTLE, *NASTY]
WEIGHTS = [1.0] * len(GENTLE) + [0.4] * len(NASTY)


class Outcome(NamedTuple):
    """What became of growing one program by some factors."""

    kind: str
    """``exact``, ``idle`` (exact, but what grew does not matter), ``refused`` or ``wrong``;
    ``invalid`` where the program does not run, or not to finite numbers."""
    program: Program
    grown: Sizes
    why: str = ""

    def __str__(self) -> str:
        return f"# {self.kind}: {self.why}\n{self.program.source(self.grown)}"


def outcomes(rng: random.Random, trials: int = 2) -> Iterator[Outcome]:
    """Writes a program and grows it in some ways."""
    program = write(rng, OPERATIONS, WEIGHTS)
    used = [h for h in HIDDEN if any(h in f for d in program.params.values() for f in sum(d, ()))]
    promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with jax.enable_x64(True), promotion[0], promotion[1]:
        try:
            before = Before(program)
        except Invalid as error:
            yield Outcome("invalid", program, {}, str(error))
            return
        for _ in range(trials):
            chosen = rng.sample(used, rng.choice([1, 1, 2, len(used)]) if len(used) > 1 else 1)
            same = rng.choice([None, 2, 3])
            ratios = {name: same or rng.choice([2, 2, 3]) for name in chosen}
            if rng.random() < 0.3:  # sizes that are no multiples
                n = program.sizes[chosen[0]]
                ratios[chosen[0]] = Fraction(n + rng.randint(1, n + 1), n)
            yield before.grow(ratios)


class Invalid(Exception):
    """A program that does not run, which says nothing about the library."""


class Before:
    """A small model, and what it computes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.small = program.model(program.sizes)
        self.inputs = program.arrays(0)
        self.params = resizing.random_params(self.small.params)
        try:
            self.outputs = run(self.small.apply, self.params, self.inputs)
            near = perturbed(self.params, 1e-13)
            self.noise = distance(self.outputs, run(self.small.apply, near, self.inputs))
        except Exception as error:
            raise Invalid(f"{type(error).__name__}: {error}") from error
        if not np.all(np.isfinite(self.outputs)):
            raise Invalid("not finite")

    def grow(self, ratios: Sizes) -> Outcome:
        """Grows the model."""
        program = self.program
        sizes = {name: int(n * ratios.get(name, 1)) for name, n in program.sizes.items()}
        big = program.model(sizes)
        try:
            jax.eval_shape(big.apply, big.params, *self.inputs)
        except Exception as error:
            return Outcome("invalid", program, ratios, f"{type(error).__name__}: {error}")
        try:
            larger = resizing.grown(resizing.solve(self.small, big, self.inputs), self.params)
        except ValueError as error:
            clear = "Expected" in str(error)
            return Outcome("refused" if clear else "wrong", program, ratios, str(error))
        except Exception:
            return Outcome("wrong", program, ratios, traceback.format_exc().replace("\n", "\n# "))
        return self._compared(big, larger, ratios, sizes)

    def _compared(self, big: Any, larger: Any, ratios: Sizes, sizes: Sizes) -> Outcome:
        after = run(big.apply, larger, self.inputs)
        error = distance(self.outputs, after)
        if error > max(TOLERANCE, AMPLIFIED * self.noise):
            return Outcome("wrong", self.program, ratios, f"error {error:.2g}")
        changed = {k for k, v in self.small.params.items() if v.shape != big.params[k].shape}
        other = perturbed(larger, 0.1, changed)
        moves = distance(after, run(big.apply, other, self.inputs)) > 1e-6
        return Outcome("exact" if moves else "idle", self.program, ratios, f"error {error:.2g}")


def run(apply: Any, params: Any, inputs: Any) -> np.ndarray:
    return np.asarray(jax.jit(apply)(params, *inputs))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative to the larger of what they should be."""
    if a.shape != b.shape:
        return np.inf
    gap = float(np.max(np.abs(a - b), initial=0.0))
    return gap / (float(np.max(np.abs(a), initial=0.0)) or 1.0) if np.isfinite(gap) else np.inf


def perturbed(params: Any, size: float, names: Any = None) -> Any:
    rng = np.random.default_rng(1)
    return {
        k: v * (1 + size * rng.standard_normal(v.shape)) if names is None or k in names else v
        for k, v in params.items()
    }


def test_programs_grow_exactly_or_are_refused_in_words():
    counts: Counter[str] = Counter()

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True))
    def check(rng: random.Random) -> None:
        for outcome in outcomes(rng):
            counts[outcome.kind] += 1
            assert outcome.kind != "wrong", str(outcome)

    check()
    total = counts.total()
    assert counts["exact"] > 0.4 * total, counts
    assert counts["refused"] > 0.1 * total, counts
    assert counts["invalid"] < 0.1 * total, counts


def test_missing_factors_are_noticed(monkeypatch):
    """Without its factors a grown model is another function, and the comparison says so."""
    monkeypatch.setattr(affine, "factor", lambda known: 1.0)
    kinds = [outcome.kind for i in range(12) for outcome in outcomes(random.Random(i))]
    assert kinds.count("wrong") > 4, kinds


def main(count: int, seed: int) -> None:
    """Counts the outcomes of many programs, and prints those that are wrong."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for i in range(count):
        for outcome in outcomes(random.Random(f"{seed}/{i}")):
            counts[outcome.kind] += 1
            if outcome.kind == "wrong":
                print(f"# program {seed}/{i}\n{outcome}", flush=True)
            if outcome.kind in ("refused", "invalid"):
                reasons[f"{outcome.kind}: {_short(outcome.why)}"] += 1
        if (i + 1) % 200 == 0:
            print(f"# {i + 1} programs: {dict(counts)}", flush=True)
    for reason, times in reasons.most_common(40):
        print(f"# {times:5d} {reason}")
    print(f"# {count} programs: {dict(counts)}")


def _short(why: str) -> str:
    lines = why.split("\n")
    return (lines[1] if len(lines) > 1 and lines[0].startswith(("the", "no")) else lines[0])[:110]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
