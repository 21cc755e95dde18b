"""One model shrunk here and by Torch-Pruning: what prunes together, what stays, what comes out.

Where they differ, on tiny programs, the reference is the big model with the same units made zero.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import uscale_jax as us
from benchmarks.foreign import torch_pruner
from benchmarks.foreign.torch_layers import Params, Twin
from benchmarks.foreign.torch_programs import NORM
from benchmarks.foreign.torch_pruner import Group, Place, Pruned
from benchmarks.registry import Options, Progress, Result

REPEATS = 3


class Here:
    """What this library does with a twin."""

    def __init__(self, twin: Twin, share: float) -> None:
        """Plan, and measure magnitudes; ValueError where that is refused."""
        self.twin, self.params = twin, twin.params()
        self.inputs = jnp.asarray(twin.inputs())
        small = twin.small_params(share)
        self.plan = us.plan(twin.apply, small, twin.apply, self.params, self.inputs, exact=False)
        self.axes = {axis.name: axis for axis in self.plan.axes if axis.small != axis.big}

    def scores(self) -> dict[str, np.ndarray]:
        """Return the magnitude of every unit."""
        found = us.importance(
            self.twin.apply, self.params, [self.inputs], self.plan, method="magnitude"
        )
        return dict(found.scores)

    def outputs(self, params: Params) -> np.ndarray:
        """Return what the model makes of its inputs."""
        return np.asarray(self.twin.apply(params, self.inputs))

    def pruned(self, scores: Mapping[str, np.ndarray]) -> Params:
        """Return the parameters of the units of the highest scores."""
        # As a plain dictionary: an Importance without data is warned about.
        return us.shrink(self.params, self.plan, importance=scores)

    def axes_of(self, group: Group) -> list[str]:
        """Return the axes that a group of Torch-Pruning's has places of."""
        return [name for name, a in self.axes.items() if set(a.places) & set(group.places)]


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference, relative to the largest output."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def peer(twin: Twin, share: float, importance: Callable[[Any], Any]) -> Pruned:
    """Return what Torch-Pruning makes of a twin."""
    module, inputs = twin.torch_module(), twin.inputs()
    return torch_pruner.pruned(module, inputs, importance, share, twin.fixed, twin.heads)


def run_twin(twin: Twin, share: float, options: Options, progress: Progress) -> Result:
    """Compare groups, units, outputs and times on one model."""
    del options
    progress.start(3, "comparisons")
    here = Here(twin, share)
    whole = torch_pruner.outputs(twin.torch_module(), twin.inputs())
    progress.advance(note="the same function")
    scores = here.scores()
    alike = peer(twin, share, torch_pruner.every_leaf)
    groups, together = _groups(here, scores, alike)
    progress.advance(note="the same importance")
    result = {
        "kind": "model",
        "model": twin.name,
        "share": share,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torch-pruning")},
        "unpruned": apart(here.outputs(here.params), whole),
        "groups": groups,
        "alone": sorted(set(here.axes) - {name for g in groups for name in g["axes"]}),
        "error": _error(here, {**scores, **together}, alike),
        "own formula": _own_formula(here, scores, share),
        "seconds": {"there": _seconds_there(twin, share), "here": _seconds_here(twin, share)},
    }
    progress.advance(note="timed")
    return result


def _error(here: Here, scores: Mapping[str, np.ndarray], found: Pruned) -> float:
    there = torch_pruner.outputs(found.module, here.twin.inputs())
    return apart(here.outputs(here.pruned(scores)), there)


def _groups(
    here: Here, scores: Mapping[str, np.ndarray], found: Pruned
) -> tuple[list[Result], dict[str, np.ndarray]]:
    """Every group of Torch-Pruning's and what it is here; its scores where it joins axes."""
    rows, together = [], {}
    kept = us.select(here.plan, scores).kept
    for group in found.groups:
        names = here.axes_of(group)
        axes = [here.axes[name] for name in names]
        places = {place for axis in axes for place in axis.places}
        row: Result = {
            "root": _words([group.root]),
            "places": len(group.places),
            "axes": {axis.name: _words(axis.places) for axis in axes},
            "same": len(axes) == 1 and places == set(group.places),
            "joined": len(axes) > 1 and places == set(group.places),
            "only there": _words(set(group.places) - places),
            "only here": _words(places - set(group.places)),
            "units": [],
        }
        for axis in axes:
            stay = set(group.kept(axis.big)) & set(kept[axis.name])
            row["units"].append({"axis": axis.name, "kept": axis.small, "common": len(stay)})
            if not row["same"]:
                together[axis.name] = _per_unit(group, axis.big)
        rows.append(row)
    return rows, together


def _per_unit(group: Group, units: int) -> np.ndarray:
    """A group's scores per unit of an axis that repeats, as heads repeat their lanes."""
    return np.asarray(group.scores, np.float64).reshape(-1, units).mean(0)


def _words(places: Sequence[Place] | set[Place]) -> str:
    return ", ".join(f"{name}[{dim}]" for name, dim in sorted(places))


def _own_formula(here: Here, scores: Mapping[str, np.ndarray], share: float) -> Result:
    """Torch-Pruning's own importance, handed over; and how many units all leaves would keep."""
    found = peer(here.twin, share, torch_pruner.own_magnitude())
    handed = {
        name: _per_unit(group, here.axes[name].big)
        for group in found.groups
        for name in here.axes_of(group)
    }
    theirs, ours = (us.select(here.plan, each).kept for each in (handed, scores))
    return {
        "error": _error(here, handed, found),
        "kept": sum(map(len, theirs.values())),
        "common": sum(len(set(theirs[name]) & set(ours[name])) for name in theirs),
    }


def _seconds_there(twin: Twin, share: float) -> Result:
    runs = [peer(twin, share, torch_pruner.own_magnitude()) for _ in range(REPEATS)]
    return {
        "groups": min(run.building for run in runs),
        "importance": min(run.scoring for run in runs),
        "pruning": min(run.pruning for run in runs),
    }


def _seconds_here(twin: Twin, share: float) -> Result:
    """The best of some runs, and the first one of new programs, which compiles them."""
    jax.clear_caches()
    runs = []
    for _ in range(REPEATS):
        times = [time.perf_counter()]
        here = Here(twin, share)
        times.append(time.perf_counter())
        scores = here.scores()
        times.append(time.perf_counter())
        jax.block_until_ready(here.pruned(scores))
        times.append(time.perf_counter())
        runs.append(np.diff(times))
    steps = ("groups", "importance", "pruning")
    best = dict(zip(steps, np.min(runs, 0).tolist(), strict=True))
    return best | {f"first {step}": s for step, s in zip(steps, runs[0].tolist(), strict=True)}


# Tiny programs


def run_program(twin: Twin, share: float, options: Options, progress: Progress) -> Result:
    """Compare how far pruned outputs are from those without the same units."""
    del options
    progress.start(2, "libraries")
    here = on_program(twin, share)
    progress.advance(note="here")
    there = _there_on_program(twin, share)
    progress.advance(note="Torch-Pruning")
    return {"kind": "program", "model": twin.name, "share": share, "here": here, "there": there}


def on_program(twin: Twin, share: float) -> Result:
    """Return how far the model shrunk here is from the big one without the same units."""
    try:
        here = Here(twin, share)
    except ValueError as error:
        return {"error": None, "why": _refusal(error)}
    scores = here.scores()
    found = here.outputs(here.pruned(scores))
    return {"error": apart(found, here.outputs(reference(here, scores))), "why": ""}


def _refusal(error: ValueError) -> str:
    """The line that gives the reason and the place in the program."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.split(": ", 1)[-1] for line in lines if " at " in line), lines[0])


def reference(here: Here, scores: Mapping[str, np.ndarray]) -> Params:
    """Return the big model's parameters with the units that go made zero.

    Lanes of a norm, which counts zeros too, are taken out instead, by their numbers.
    """
    chosen = us.select(here.plan, scores)
    made = {}
    for name, leaf in chosen.leaves.items():
        weight = np.array(here.params[name])
        for dim, old in enumerate(leaf.maps):
            if old is None:
                continue
            stays = np.asarray(old) >= 0
            if here.twin is NORM:
                weight = np.take(weight, np.flatnonzero(stays), dim)
            else:
                np.moveaxis(weight, dim, 0)[~stays] = 0
        made[name] = jnp.asarray(weight)
    return made


def _there_on_program(twin: Twin, share: float) -> Result:
    """How far Torch-Pruning's model is from the big one without the same units; why it failed."""
    try:
        found = peer(twin, share, torch_pruner.own_magnitude())
        outputs = torch_pruner.outputs(found.module, twin.inputs())
    except Exception as error:  # whatever it stops with is the result
        return {"error": None, "why": f"{type(error).__name__}: {error}"}
    weights = twin.weights()
    gone = list(found.groups[0].gone)
    for name, dim in found.groups[0].places:
        if twin is NORM:
            weights[name] = np.delete(weights[name], gone, dim)
        elif name.startswith("first"):
            weights[name][gone] = 0
    whole = twin.apply({k: jnp.asarray(v) for k, v in weights.items()}, jnp.asarray(twin.inputs()))
    return {"error": apart(outputs, np.asarray(whole)), "why": ""}
