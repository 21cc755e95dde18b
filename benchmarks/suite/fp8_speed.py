"""`fp8_speed`: a step of layers with float8 products against bfloat16, qwix and Flax's op.

Times need an NVIDIA GPU with float8 units.  Where there is none, but JAX's CUDA plugin, the same
steps are compiled for an H200, and what they consist of is told; errors are told anywhere.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax

from benchmarks.registry import Benchmark, Case, Claim, Options, Progress, Report, Result, Table
from benchmarks.suite import _fp8_contestants as layers
from benchmarks.suite import _fp8_lowering as lowering
from benchmarks.suite._fp8_contestants import BFLOAT16, OWN, PEERS, Sizes
from benchmarks.timing import Thunk, measure

NUMERICS, COMPILED = "numerics", "compiled for an H200"
SMALL = Sizes(tokens=96, width=160, out=224)
"""Of the layer whose errors are measured."""
ROUNDING = 0.08
"""Of products of float8 operands: 0.06 where one is a gradient, with a mantissa of two bits."""
FAST, AT = 1.3, 4096
STEPS = 10
"""Enqueued before one is waited for."""
CAPABILITY = 8.9
"""Of NVIDIA's GPUs with float8 units: from Ada and Hopper on."""
NO_TIMES = (
    "times skipped: they need an NVIDIA GPU with float8 units (H100, H200, L40 or newer): "
    'pip install "jax[cuda12]" qwix, then python -m benchmarks run fp8_speed'
)
NO_PROGRAMS = (
    'what an H200 would run skipped: it needs JAX\'s CUDA plugin: pip install "jax[cuda12]"'
)
NO_QWIX = "qwix left out: pip install qwix"
NOT_TIMED = "compiled for an H200, not timed: without autotuning, Triton's products switched off"
HOW = (
    "operands, parameters and gradients are bfloat16, so bfloat16 casts nothing; a step is the "
    f"outputs and all gradients, {STEPS} enqueued at a time; contestants take turns, and ratios "
    "are within a turn"
)


def has_gpu() -> bool:
    """Return whether JAX computes on a GPU with float8 units."""
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return False
    return float(getattr(device, "compute_capability", 0)) >= CAPABILITY


def sizes(options: Options) -> tuple[tuple[int, ...], int]:
    """Return the widths, and how many tokens there are."""
    return ((2048, 4096, 8192), 8192) if options.full else ((1024, 2048), 2048)


def cases(options: Options) -> Sequence[Case]:
    """Return the errors, and the times of every block, or what an H200 would run."""
    made = [Case(NUMERICS, _numerics)]
    if has_gpu():
        blocks = layers.blocks(*sizes(options))
        made += [Case(name, partial(_timed, each)) for name, each in blocks.items()]
    elif lowering.has_plugin():
        made.append(Case(COMPILED, _compiled))
    return made


def _numerics(options: Options, progress: Progress) -> Result:
    names = list(layers.contestants())
    progress.start(len(names), "layers")
    found = {}
    for name in names:
        found[name] = layers.errors(name, SMALL, options.seed)
        progress.advance(note=name)
    packages = [name for name in ("flax", "qwix") if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"errors": found, "versions": versions}


def _compiled(options: Options, progress: Progress) -> Result:
    progress.start(1, "process")
    widths, tokens = sizes(replace(options, full=True))  # nothing is computed
    found = lowering.compiled(widths, tokens)
    progress.advance()
    return {"tokens": tokens, "programs": found}


def _timed(block: Sizes, options: Options, progress: Progress, repeats: int = 30) -> Result:
    """Compile the step of every contestant, then time them against each other."""
    names = list(layers.contestants())
    progress.start(len(names) + 1, "programs")
    thunks, compiled, calls = {}, {}, {}
    for name in names:
        thunks[name], compiled[name], text = _program(name, block, options.seed)
        calls[name] = asdict(lowering.calls(text))
        progress.advance(note=name)
    timings = measure(thunks, repeats=repeats, budget_s=20.0, reference=BFLOAT16)
    progress.advance(note="timed")
    return {
        "tokens": block.tokens,
        "flops": block.flops,
        "compile": compiled,
        "calls": calls,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def _program(name: str, block: Sizes, seed: int) -> tuple[Thunk, float, str]:
    """What runs steps, how long it took to compile, and its text."""
    model = layers.contestants()[name](block)
    arguments = jax.jit(lambda: layers.arguments(model, block, seed))()
    lowered = jax.jit(layers.step(model)).lower(*arguments)
    start = time.perf_counter()
    program = lowered.compile()
    return partial(_steps, program, arguments), time.perf_counter() - start, program.as_text()


def _steps(program: Any, arguments: Any) -> Any:
    for _ in range(STEPS):
        last = program(*arguments)
    return last  # one queue: the others are done by then


# What is shown


def _times(results: Mapping[str, Result]) -> dict[str, Result]:
    return {name: result for name, result in results.items() if "timings" in result}


def _programs(results: Mapping[str, Result]) -> dict[str, dict[str, Result]]:
    """What steps consist of, by block and contestant: as run, else as compiled."""
    if COMPILED in results:
        programs = results[COMPILED]["programs"]
        return {
            block: {name: both["both"] for name, both in each.items()}
            for block, each in programs.items()
        }
    return {block: result["calls"] for block, result in _times(results).items()}


def report(results: dict[str, Result], options: Options) -> Report:
    """Return times or programs, errors, and the claims on them."""
    del options
    made = [
        _table_of_times(_times(results)),
        _table_of_programs(results),
        _table_of_errors(results),
    ]
    return Report(
        tables=tuple(table for table in made if table.rows),
        claims=(*_of_times(results), *_of_programs(results), _of_errors(results[NUMERICS])),
        notes=_notes(results),
    )


def _table_of_times(times: Mapping[str, Result]) -> Table:
    rows = [
        (
            f"{block}: {name}",
            f"{1e3 * timing['best_s'] / STEPS:.3f}",
            f"{1 / timing['ratio']:.2f}",
            f"{result['flops'] * STEPS / timing['best_s'] / 1e12:.0f}",
            *_cells(result["calls"][name]),
            f"{result['compile'][name]:.1f}",
        )
        for block, result in times.items()
        for name, timing in result["timings"].items()
    ]
    columns = ("step", "best, ms", "× bfloat16", "TFLOP/s", *_CELLS, "compiled in, s")
    return Table(f"Forward and backward, {_tokens(times)} tokens", columns, tuple(rows))


_CELLS = ("products in float8", "other kernels", "MB they move")


def _cells(calls: Result) -> tuple[str, str, str]:
    f8 = f"{calls['f8']} of {calls['products']}"
    return f8, str(calls["others"]), f"{calls['moved'] / 1e6:.0f}"


def _tokens(results: Mapping[str, Result]) -> str:
    return ", ".join(dict.fromkeys(str(result["tokens"]) for result in results.values()))


def _table_of_programs(results: Mapping[str, Result]) -> Table:
    if COMPILED not in results:
        return Table("", (), ())
    result = results[COMPILED]
    rows = [
        (f"{block}: {name}", *(cell for which in lowering.PASSES for cell in _cells(both[which])))
        for block, each in result["programs"].items()
        for name, both in each.items()
    ]
    columns = tuple(f"{which}: {cell}" for which in lowering.PASSES for cell in _CELLS)
    title = f"Compiled for an H200, not timed: {result['tokens']} tokens"
    return Table(title, ("step", *columns), tuple(rows))


def _table_of_errors(results: Mapping[str, Result]) -> Table:
    errors = results[NUMERICS]["errors"]
    rows = [(name, *(f"{error:.4f}" for error in each.values())) for name, each in errors.items()]
    columns = ("layer", *(f"{tensor}" for tensor in next(iter(errors.values()))))
    title = "Errors of a layer and its gradients, over the RMS of each in float32"
    return Table(title, columns, tuple(rows))


def _of_times(results: Mapping[str, Result]) -> list[Claim]:
    made = []
    for block, result in _times(results).items():
        ratios = {name: timing["ratio"] for name, timing in result["timings"].items()}
        own, peer = (_least(ratios, names) for names in (OWN, PEERS))
        fast = f"{own}, {1 / ratios[own]:.2f}× bfloat16"
        if block.endswith(f" {AT}"):
            text = f"{block}: float8 is {FAST}× as fast as bfloat16"
            made.append(Claim(text, ratios[own] <= 1 / FAST, fast))
        detail = f"{fast}; {peer}, {1 / ratios[peer]:.2f}×"
        text = f"{block}: ahead of Flax's op and of qwix"
        made.append(Claim(text, ratios[own] <= ratios[peer], detail))
    return made


def _least(values: Mapping[str, float], names: Sequence[str]) -> str:
    return min((name for name in names if name in values), key=lambda name: values[name])


def _of_programs(results: Mapping[str, Result]) -> list[Claim]:
    made = []
    for block, each in _programs(results).items():
        own = {name: calls for name, calls in each.items() if name in OWN}
        plain = [name for name, calls in own.items() if calls["f8"] < calls["products"]]
        text = f"{block}: all products are of float8 operands"
        count = next(iter(own.values()))["products"]
        made.append(Claim(text, not plain, f"not in {plain}" if plain else f"{count} of {count}"))
        for what, unit in (("others", "kernels"), ("moved", "bytes")):
            values = {name: calls[what] for name, calls in each.items()}
            mine, theirs = (_least(values, names) for names in (OWN, PEERS))
            text = f"{block}: no more {unit} besides products than Flax's op and qwix"
            detail = f"{mine} {values[mine]}; {theirs} {values[theirs]}"
            made.append(Claim(text, values[mine] <= values[theirs], detail))
    return made


def _of_errors(result: Result) -> Claim:
    worst = {
        name: max(each.values()) for name, each in result["errors"].items() if name != BFLOAT16
    }
    name = max(worst, key=lambda name: worst[name])
    text = f"outputs and gradients are within {ROUNDING} of float32's, as float8 rounds"
    return Claim(text, worst[name] <= ROUNDING, f"at most {worst[name]:.4f}, {name}")


def _notes(results: Mapping[str, Result]) -> tuple[str, ...]:
    versions = results[NUMERICS]["versions"]
    made = [HOW, ", ".join(f"{name} {version}" for name, version in versions.items())]
    if "qwix" not in versions:
        made.append(NO_QWIX)
    if not _times(results):
        made.append(NO_TIMES)
        made.append(NOT_TIMED if COMPILED in results else NO_PROGRAMS)
    return tuple(made)


BENCHMARK = Benchmark(
    name="fp8_speed",
    summary="a step of layers with float8 products against bfloat16, qwix and Flax's op (GPU)",
    cases=cases,
    report=report,
    config=lambda options: {"sizes": sizes(options)},
)
