"""`minilm`: a pretrained BERT of 22 million parameters, grown, and its embeddings compared.

Real weights and real sentences. Width grows exactly; layers cannot be added exactly, because a
block whose output passes a norm is never the identity, and the library says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

import uscale_jax as us
from benchmarks.models import minilm
from benchmarks.models.bert import Bert, BertConfig
from benchmarks.registry import (
    Benchmark,
    Case,
    Claim,
    Options,
    Progress,
    Report,
    Result,
    Table,
    UsageError,
)

LENGTH = 32
TOLERANCE = 1e-5

GROWTHS: dict[str, dict[str, int]] = {
    "hidden × 2": {"hidden": 2},
    "heads × 2": {"heads": 2},
    "mlp × 2": {"mlp": 2},
    "head size × 2": {"head_dim": 2},
    "hidden, heads, mlp × 2": {"hidden": 2, "heads": 2, "mlp": 2},
}
UNEVEN = {"heads": 18, "mlp": 2000}


class Pretrained(NamedTuple):
    """The trained model and what it is run on."""

    config: BertConfig
    params: Any
    tokens: Any
    mask: Any


def pretrained() -> Pretrained:
    """Return the model of the installed package."""
    config, params, tokenizer = minilm.load()
    return Pretrained(config, params, *minilm.encode(tokenizer, minilm.SENTENCES, LENGTH))


def grown_config(config: BertConfig, factors: dict[str, int]) -> BertConfig:
    """Return the sizes multiplied."""
    return replace(config, **{name: getattr(config, name) * k for name, k in factors.items()})


def apply_of(config: BertConfig) -> Any:
    """Return the cosines of all pairs of sentences as a function of parameters."""
    return partial(Bert(config).apply, method="similarities")


def planned(model: Pretrained, config: BertConfig, **how: Any) -> us.Plan:
    """Return the plan for another configuration."""
    shapes = jax.eval_shape(Bert(config).init, jax.random.key(0), model.tokens, model.mask)
    return us.plan(
        apply_of(model.config),
        model.params,
        apply_of(config),
        shapes,
        model.tokens,
        model.mask,
        **how,
    )


def run_growth(big: dict[str, int], options: Options, progress: Progress) -> Result:
    """Grow by some sizes, and compare embeddings."""
    del options
    progress.start(3, "steps")
    model = pretrained()
    config = replace(model.config, **big)
    start = time.perf_counter()
    plan = planned(model, config)
    planning = time.perf_counter() - start
    progress.advance(note="planned")
    start = time.perf_counter()
    params = jax.block_until_ready(us.grow(model.params, plan, verify=False))
    growing = time.perf_counter() - start
    progress.advance(note="grown")
    before, after = (
        np.asarray(Bert(c).apply(p, model.tokens, model.mask), np.float64)
        for c, p in ((model.config, model.params), (config, params))
    )
    progress.advance(note="compared")
    return {
        "sizes": big,
        "parameters": int(sum(leaf.size for leaf in jax.tree.leaves(params))),
        "planning": planning,
        "growing": growing,
        "cosine_distance": _apart(before, after),
        "similarities": float(np.abs(before @ before.T - after @ after.T).max()),
    }


def _apart(before: np.ndarray, after: np.ndarray) -> float:
    """The largest cosine distance of a sentence to itself; units repeated as often as they are."""
    repeated = np.repeat(before, after.shape[1] // before.shape[1], axis=1)
    cosines = np.sum(repeated * after, 1)
    norms = np.linalg.norm(repeated, axis=1) * np.linalg.norm(after, axis=1)
    return float(np.max(1 - cosines / norms))


def run_depth(options: Options, progress: Progress) -> Result:
    """Try to add layers."""
    del options
    progress.start(2, "plans")
    model = pretrained()
    config = replace(model.config, layers=9)
    try:
        planned(model, config, depth="interleave")
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    progress.advance(note="identity")
    plan = planned(model, config, depth="interleave", new_layers="copy")
    progress.advance(note="copies")
    return {"refusal": refusal, "exact": plan.exact, "notes": list(plan.notes)}


def cases(options: Options) -> Sequence[Case]:
    """Return one case per growth, and one that adds layers."""
    del options
    if absent := minilm.missing():
        raise UsageError(f"minilm needs packages that are not here: {', '.join(absent)}")
    config = minilm.load()[0]
    growths = {
        name: {size: getattr(config, size) * k for size, k in factors.items()}
        for name, factors in GROWTHS.items()
    }
    growths["heads 12 → 18, mlp 1536 → 2000"] = UNEVEN
    widths = [Case(name, partial(run_growth, big)) for name, big in growths.items()]
    return [*widths, Case("layers 6 → 9", run_depth)]


def report(results: dict[str, Result], options: Options) -> Report:
    """Return what growth did to the embeddings."""
    del options
    widths = {name: r for name, r in results.items() if "cosine_distance" in r}
    rows = [
        (
            name,
            f"{r['parameters'] / 1e6:.1f} M",
            f"{r['planning']:.2f} s",
            f"{r['growing']:.2f} s",
            f"{r['cosine_distance']:.1e}",
            f"{r['similarities']:.1e}",
        )
        for name, r in widths.items()
    ]
    columns = ("growth", "parameters", "plan", "grow", "cosine distance", "similarities")
    table = Table("MiniLM-L6 grown: embeddings of 12 sentences", columns, tuple(rows))
    return Report(tables=(table,), claims=_claims(widths, results["layers 6 → 9"]))


def _claims(widths: dict[str, Result], depth: Result) -> tuple[Claim, ...]:
    worst = max(r["cosine_distance"] for r in widths.values())
    refusal = depth["refusal"].splitlines() or ["no refusal"]
    return (
        Claim(
            f"embeddings of real sentences stay within a cosine distance of {TOLERANCE:g}",
            worst <= TOLERANCE,
            f"largest {worst:.1e}",
        ),
        Claim(
            "identity layers are refused, because BERT's norms follow the sums",
            bool(depth["refusal"]),
            refusal[0],
        ),
        Claim("copied layers are said to be inexact", not depth["exact"], depth["notes"][-1]),
    )


BENCHMARK = Benchmark(
    name="minilm",
    summary="grow a pretrained BERT and compare its embeddings of real sentences",
    cases=cases,
    report=report,
)
