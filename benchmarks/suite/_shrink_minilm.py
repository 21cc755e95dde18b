"""The shrinking benchmark's pretrained model: MiniLM, pruned with sentences and no training."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.stats import spearmanr

import uscale_jax as us
from benchmarks import data
from benchmarks.models import minilm
from benchmarks.models.bert import Bert, BertConfig
from benchmarks.models.minilm import missing
from benchmarks.registry import Case, Claim, Options, Progress, Result, Table
from benchmarks.suite.minilm import apply_of
from benchmarks.training import Params

PREFIX = "minilm"
METHODS = ("random", "magnitude", "activation", "variance", "wanda", "merging", "reconstruction")
LIBRARY = "reconstruction"
REFIT = "activation, refit"
DEPTH = f"{PREFIX}: layers"
SECONDS = 60.0
LENGTH = 32
BATCH = 50
# Only sentences: no names in code, signatures or markup.
SENTENCE = re.compile(r"[A-Z][^_=<>{}\[\]|`*]+[.!?]")


@dataclass(frozen=True)
class Setup:
    """How many sentences, what is pruned to which shares, and what else is measured."""

    calibration: int = 1000
    test: int = 400
    draws: int = 3
    """Of random numbers, whose best one counts."""
    shares: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("mlp", (0.75, 0.5, 0.25)),
        ("heads", (0.75, 0.5)),
        ("hidden", (0.75, 0.5)),
        ("mlp heads hidden", (0.75, 0.5)),
    )
    methods: tuple[str, ...] = METHODS
    refitted: tuple[str, float] = ("mlp", 0.5)
    """Where activations, which by themselves refit nothing, are tried with refitting."""
    layers: int = 4


# The model and the text


def sentences() -> list[str]:
    """Return the sentences in the docstrings of the standard library, in random order."""
    found = set()
    for file in data.read_files(None):
        for text in re.findall(r'"""(.*?)"""', file.content.decode("utf-8"), re.DOTALL):
            parts = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
            found.update(part for part in parts if _is_sentence(part))
    every = sorted(found)
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))]


def _is_sentence(text: str) -> bool:
    return 40 < len(text) < 160 and SENTENCE.fullmatch(text) is not None


class Loaded(NamedTuple):
    """The trained model, batches to measure importance on, and others to test on."""

    config: BertConfig
    params: Params
    calibration: list[Any]
    test: list[Any]
    similarities: np.ndarray
    """Of all pairs of sentences to test on, by the model as it is."""


@cache
def loaded(setup: Setup) -> Loaded:
    """Return the model and the text."""
    config, params, tokenizer = minilm.load()
    text = sentences()[: setup.calibration + setup.test]

    def batches(part: Sequence[str]) -> list[Any]:
        groups = (part[i : i + BATCH] for i in range(0, len(part), BATCH))
        return [minilm.encode(tokenizer, group, LENGTH) for group in groups]

    calibration, test = (batches(t) for t in (text[: -setup.test], text[-setup.test :]))
    return Loaded(config, params, calibration, test, similarities(config, params, test))


def similarities(config: BertConfig, params: Params, test: Sequence[Any]) -> np.ndarray:
    """Return the cosines of all pairs of sentences."""
    apply = _embedder(config)
    vectors = np.concatenate([np.asarray(apply(params, *batch)) for batch in test])
    return (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]


@cache
def _embedder(config: BertConfig) -> Any:
    return jax.jit(Bert(config).apply)


def correlation(model: Loaded, config: BertConfig, params: Params) -> float:
    """Return the rank correlation of the similarities with those of the model as it is."""
    now = similarities(config, params, model.test)
    return float(spearmanr(model.similarities, now).statistic)


# Cases


def smaller(config: BertConfig, axes: str, share: float) -> BertConfig:
    """Return the sizes with some of them cut."""
    return replace(config, **{name: round(getattr(config, name) * share) for name in axes.split()})


def plan_for(model: Loaded, config: BertConfig, **how: Any) -> us.Plan:
    """Return the plan to a smaller model, exact or not."""
    inputs = model.calibration[0]
    shapes = jax.eval_shape(Bert(config).init, jax.random.key(0), *inputs)
    apply, big = apply_of(config), apply_of(model.config)
    return us.plan(apply, shapes, big, model.params, *inputs, exact=False, **how)


def run_width(
    setup: Setup, axes: str, share: float, options: Options, progress: Progress
) -> Result:
    """Prune some axes by every method, and compare similarities."""
    del options
    refit = [REFIT] if (axes, share) == setup.refitted else []
    progress.start(len(setup.methods) + len(refit), "methods")
    model = loaded(setup)
    config = smaller(model.config, axes, share)
    plan = plan_for(model, config)
    found = {}
    for method in (*setup.methods, *refit):
        found[method] = _by(method, model, config, plan, setup)
        progress.advance(note=f"{method}: {found[method]['correlations'][0]:.3f}")
    shapes = [leaf.small for leaf in plan.leaves.values()]
    return {
        "axes": axes,
        "share": share,
        "setup": asdict(setup),
        "parameters": int(sum(np.prod(shape) for shape in shapes)),
        "methods": found,
    }


def _by(method: str, model: Loaded, config: BertConfig, plan: us.Plan, setup: Setup) -> Result:
    """Return what a method comes to, and the seconds from the plan to the small parameters."""
    correlations, seconds = [], 0.0
    for draw in range(setup.draws if method == "random" else 1):
        start = time.perf_counter()
        params = jax.block_until_ready(_pruned(method, model, plan, draw))
        seconds = max(seconds, time.perf_counter() - start)
        correlations.append(correlation(model, config, params))
    return {"correlations": correlations, "seconds": seconds}


def _pruned(method: str, model: Loaded, plan: us.Plan, draw: int) -> Params:
    importance = us.importance(
        apply_of(model.config),
        model.params,
        model.calibration,
        plan,
        method="activation" if method == REFIT else method,
        refit=True if method == REFIT else None,
        key=jax.random.key(draw),
    )
    if importance.data_free:
        # What such a choice is worth is measured here, and need not be warned of.
        return us.shrink(model.params, us.select(plan, importance))
    return us.shrink(model.params, plan, importance=importance)


def run_depth(setup: Setup, options: Options, progress: Progress) -> Result:
    """Drop layers: the least influential ones, and every other choice there is."""
    del options
    model = loaded(setup)
    big, small = model.config.layers, setup.layers
    # The first layer always stays.
    choices = list(itertools.combinations(range(1, big), small - 1))
    progress.start(len(choices), "choices")
    config = replace(model.config, layers=small)
    plan = plan_for(model, config, depth="stack")
    start = time.perf_counter()
    apply = apply_of(model.config)
    importance = us.importance(apply, model.params, model.calibration, plan, method="magnitude")
    seconds = time.perf_counter() - start
    every = {}
    for choice in choices:
        stays = np.isin(np.arange(big), (0, *choice)).astype(float)
        chosen = us.select(plan, dict.fromkeys(importance.layers, stays))
        value = correlation(model, config, us.shrink(model.params, chosen))
        every[_named((0, *choice))] = value
        progress.advance(note=f"layers {_named((0, *choice))}: {value:.3f}")
    kept = set(us.select(plan, importance).kept[next(iter(importance.layers))])
    return {
        "layers": [big, small],
        "influence": [float(x) for x in next(iter(importance.layers.values()))],
        "chosen": _named(sorted(kept)),
        "choices": every,
        "seconds": seconds,
    }


def _named(layers: Sequence[int]) -> str:
    return " ".join(map(str, layers))


def cases(setup: Setup) -> list[Case]:
    """Return one case per reduction; none where the model is not installed."""
    if missing():
        return []
    widths = [
        Case(f"{PREFIX}: {axes} {share:.0%}", partial(run_width, setup, axes, share))
        for axes, shares in setup.shares
        for share in shares
    ]
    return [*widths, Case(DEPTH, partial(run_depth, setup))]


# Report


def _widths(results: Mapping[str, Result]) -> dict[str, Result]:
    return {
        name.removeprefix(f"{PREFIX}: "): result
        for name, result in results.items()
        if name.startswith(PREFIX) and name != DEPTH
    }


def tables(results: Mapping[str, Result]) -> Iterator[Table]:
    """Yield what the similarities have become, and what it took."""
    widths = _widths(results)
    if widths:
        setup = next(iter(widths.values()))["setup"]
        methods = (*setup["methods"], REFIT)
        title = (
            f"MiniLM-L6 pruned, no training: rank correlation of the similarities of "
            f"{setup['test']} sentences with the original's\n"
            f"importance measured on {setup['calibration']} others; random: the best of "
            f"{setup['draws']}"
        )
        sizes = ("kept", "parameters")
        for head, text in ((title, _correlation), ("seconds: importance and shrinking", _seconds)):
            rows = tuple(
                (
                    name,
                    f"{r['parameters'] / 1e6:.1f} M",
                    *(text(r["methods"].get(m)) for m in methods),
                )
                for name, r in widths.items()
            )
            yield Table(head, (*sizes, *methods), rows)
    if DEPTH in results:
        yield _depth_table(results[DEPTH])


def _correlation(found: Result | None) -> str:
    return "" if found is None else f"{max(found['correlations']):.3f}"


def _seconds(found: Result | None) -> str:
    return "" if found is None else f"{found['seconds']:.1f}"


def _depth_table(result: Result) -> Table:
    values = sorted(result["choices"].values())
    rows = (
        (f"by influence: {result['chosen']}", f"{result['choices'][result['chosen']]:.3f}"),
        (f"at random: mean of all {len(values)} choices", f"{np.mean(values):.3f}"),
        ("the best choice", f"{values[-1]:.3f}"),
        ("the worst choice", f"{values[0]:.3f}"),
    )
    big, small = result["layers"]
    return Table(f"MiniLM-L6, layers {big} → {small}", ("layers kept", "rank correlation"), rows)


def claims(results: Mapping[str, Result]) -> Iterator[Claim]:
    """Yield what is claimed of the pretrained model."""
    widths = _widths(results)
    if widths:
        yield _beats_random(widths)
        yield _in_time(widths)
    if DEPTH in results:
        own, mean = _depth_numbers(results[DEPTH])
        yield Claim(
            "MiniLM: layers chosen by influence beat the average choice",
            own > mean,
            f"{own:.3f} against {mean:.3f}",
        )


def _depth_numbers(result: Result) -> tuple[float, float]:
    return result["choices"][result["chosen"]], float(np.mean([*result["choices"].values()]))


def _beats_random(widths: Mapping[str, Result]) -> Claim:
    found = {}
    for name, result in widths.items():
        best = {method: max(r["correlations"]) for method, r in result["methods"].items()}
        random = best.pop("random")
        winner = max(best, key=lambda method: best[method])
        found[name] = (best[winner], random, winner)
    detail = "; ".join(f"{n}: {b:.3f} ({w}) against {r:.3f}" for n, (b, r, w) in found.items())
    passed = all(best > random for best, random, _ in found.values())
    return Claim("MiniLM: the best method beats random choice at every size", passed, detail)


def _in_time(widths: Mapping[str, Result]) -> Claim:
    seconds = {name: r["methods"][LIBRARY]["seconds"] for name, r in widths.items()}
    count = next(iter(widths.values()))["setup"]["calibration"]
    slowest = max(seconds, key=lambda name: seconds[name])
    return Claim(
        f"MiniLM: importance on {count:,} sentences and shrinking take at most {SECONDS:.0f} s",
        seconds[slowest] <= SECONDS,
        f"{LIBRARY}: {min(seconds.values()):.1f} to {seconds[slowest]:.1f} s ({slowest})",
    )


def notes(results: Mapping[str, Result]) -> Iterator[str]:
    """Yield what is missing."""
    if not _widths(results):
        absent = ", ".join(missing()) or "its cases did not run"
        yield f"MiniLM is left out, for it needs what is not here: {absent}."
