"""The comparison with Torch-Pruning: twins, what is shown, and a run where PyTorch is here."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from benchmarks.foreign.torch_peers import Here, apart, on_program, reference
from benchmarks.foreign.torch_programs import FLIP, PROGRAMS
from benchmarks.foreign.torch_twins import TWINS
from benchmarks.registry import Options
from benchmarks.suite import _shrink_peers as peers

OPTIONS = Options(full=False, seed=0, out=Path("unused"))
PROGRAM_IDS = [twin.name for twin in PROGRAMS]
TWIN_IDS = [twin.name for twin in TWINS]
with_torch = pytest.mark.skipif(bool(peers.missing()), reason=peers.SKIPPED)
quiet = pytest.mark.filterwarnings("ignore")  # PyTorch's own, of its deprecations


class Silent:
    """Progress that is not shown."""

    def start(self, total: int, what: str) -> None:
        pass

    def advance(self, units: int = 1, note: str = "") -> None:
        pass


# JAX's side


@pytest.mark.parametrize("twin", TWINS, ids=TWIN_IDS)
def test_every_size_of_a_twin_is_an_axis(twin):
    here = Here(twin, 0.5)
    shrunk = {(axis.small, axis.big) for axis in here.axes.values()}
    assert shrunk >= {(twin.smaller(0.5)[n], twin.sizes[n]) for n in twin.sizes if n != "lanes"}
    pruned = here.pruned(here.scores())
    assert {name: leaf.shape for name, leaf in pruned.items()} == twin.shapes(twin.smaller(0.5))


@pytest.mark.parametrize("share", [0.5, 0.75])
@pytest.mark.parametrize("twin", TWINS[:2], ids=TWIN_IDS[:2])
def test_a_pruned_network_is_the_big_one_with_units_made_zero(twin, share):
    here = Here(twin, share)
    scores = here.scores()
    zeroed = here.outputs(reference(here, scores))
    assert apart(here.outputs(here.pruned(scores)), zeroed) <= peers.ZEROED
    assert apart(here.outputs(here.params), zeroed) > 0.01  # it matters what is zero


@pytest.mark.parametrize("twin", TWINS[2:], ids=TWIN_IDS[2:])
def test_a_transformer_pruned_inside_its_blocks_is_the_big_one_with_units_made_zero(twin):
    # Lanes of the stream stay: norms count zeros too.
    sizes = twin.smaller(0.5) | {"lanes": twin.sizes["lanes"]}
    f32 = jnp.float32
    small = {k: jax.ShapeDtypeStruct(shape, f32) for k, shape in twin.shapes(sizes).items()}
    x, params = jnp.asarray(twin.inputs()), twin.params()
    plan = us.plan(twin.apply, small, twin.apply, params, x, exact=False)
    rng = np.random.default_rng(0)
    axes = [axis for axis in plan.axes if axis.small != axis.big]
    scores = {axis.name: rng.normal(size=axis.big) for axis in axes}
    found = twin.apply(us.shrink(params, plan, importance=scores), x)
    zeroed = dict(params)
    for axis in axes:
        gone = np.setdiff1d(np.arange(axis.big), us.select(plan, scores).kept[axis.name])
        for name, dim in axis.places:
            # Heads and q, k and v come before their lanes: places repeat the units.
            places = np.isin(np.arange(zeroed[name].shape[dim]) % axis.big, gone)
            leaf = np.moveaxis(np.array(zeroed[name]), dim, 0)
            leaf[places] = 0
            zeroed[name] = jnp.asarray(np.moveaxis(leaf, 0, dim))
    assert apart(np.asarray(found), np.asarray(twin.apply(zeroed, x))) <= peers.ZEROED


@pytest.mark.parametrize("twin", PROGRAMS, ids=PROGRAM_IDS)
def test_a_program_is_pruned_right_or_refused(twin):
    found = on_program(twin, 0.5)
    if twin is FLIP:
        assert "reverses along it at" in found["why"]
    else:
        assert found["error"] <= peers.ZEROED


# What is shown


def _model(**more):
    group = {
        "root": "up.weight[0]",
        "places": 3,
        "axes": {"a": "down.weight[1], up.bias[0], up.weight[0]"},
        "same": True,
        "joined": False,
        "only there": "",
        "only here": "",
        "units": [{"axis": "a", "kept": 4, "common": 4}],
    }
    steps = dict.fromkeys(peers.STEPS, 0.002)
    return {
        "kind": "model",
        "model": "cnn",
        "share": 0.5,
        "versions": {"torch": "2.0", "torch-pruning": "1.6"},
        "unpruned": 1e-7,
        "groups": [group | more],
        "alone": [],
        "error": 2e-7,
        "own formula": {"error": 3e-7, "kept": 4, "common": 3},
        "seconds": {"there": steps, "here": steps | {f"first {s}": 0.5 for s in peers.STEPS}},
    }


def _program(**here):
    there = {"error": 0.5, "why": ""}
    found = {"error": 0.0, "why": ""} | here
    return {"kind": "program", "model": "flip", "share": 0.5, "here": found, "there": there}


def test_tables_and_claims_of_results():
    results = {"peers cnn 50%": _model(), "peers flip 50%": _program(error=None, why="reverses")}
    agreement, times, programs = peers.tables({**results, "another": {}})
    assert agreement.rows == (("cnn, 50%", "1", "1", "4 of 4", "2.0e-07", "3 of 4", "3.0e-07"),)
    assert times.rows[0][1:3] == ("2.0 ms", "2.0 ms (first 500)")
    assert programs.rows == (("flip, 50%", "5.0e-01", "refused: reverses"),)
    assert all(len(row) == len(t.columns) for t in (agreement, times, programs) for row in t.rows)
    assert all(claim.passed for claim in peers.claims(results))
    assert "torch-pruning 1.6" in peers.notes(results)[0]


def test_groups_that_are_joined_are_listed_and_those_that_differ_fail_the_claim():
    axes = {"a": "q.weight[0]", "b": "v.weight[0]"}
    joined = {"peers vit 50%": _model(same=False, joined=True, axes=axes)}
    rows = [table.rows for table in peers.tables(joined) if table.title == "Groups that differ"]
    assert rows == [(("cnn, up.weight[0]", "q.weight[0]; v.weight[0]"),)]
    assert all(claim.passed for claim in peers.claims(joined))
    assert any("joins axes" in note for note in peers.notes(joined))
    other = {"peers cnn 50%": _model(same=False) | {"alone": ["b"]}}
    assert not peers.claims(other)[1].passed


def test_errors_fail_the_claims():
    wrong = _model(units=[{"axis": "a", "kept": 4, "common": 3}])
    found = peers.claims({"peers cnn 50%": wrong | {"error": 0.1, "unpruned": 0.1}})
    assert [claim.passed for claim in found] == [False, True, False, False]
    assert not peers.claims({"peers flip 50%": _program(error=0.1)})[0].passed


def test_without_torch_it_is_skipped_and_says_so(monkeypatch):
    found = importlib.util.find_spec
    absent = lambda name: None if name in peers.REQUIRES else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    assert not peers.cases(OPTIONS)
    assert peers.notes({}) == (peers.SKIPPED,)
    assert peers.tables({}) == peers.claims({}) == ()
    assert peers.SKIPPED not in peers.notes({"peers cnn 50%": _model()})


# Both


@with_torch
@quiet
@pytest.mark.parametrize("twin", [*TWINS, *PROGRAMS], ids=(*TWIN_IDS, *PROGRAM_IDS))
def test_twins_are_the_same_function(twin):
    from benchmarks.foreign.torch_pruner import outputs

    here = twin.apply(twin.params(), jnp.asarray(twin.inputs()))
    assert apart(np.asarray(here), outputs(twin.torch_module(), twin.inputs())) <= peers.OUTPUTS


@with_torch
@quiet
def test_claims_hold_of_a_run():
    # Two models of four, at one share: the rest is the benchmark's.
    chosen = ("grouped 50%", "vit 50%", "flip", "channel shuffle", "einsum", "LayerNorm")
    results = {
        case.name: json.loads(json.dumps(case.run(OPTIONS, Silent())))
        for case in peers.cases(OPTIONS)
        if case.name.removeprefix("peers ").startswith(chosen)
    }
    assert len(results) == len(chosen)
    for claim in peers.claims(results):
        assert claim.passed, f"{claim.text}: {claim.detail}"
    assert len(peers.tables(results)) == 4
