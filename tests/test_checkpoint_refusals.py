"""resize_checkpoint: what is refused before any work, and what is shown."""

import hashlib
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import uscale_jax as us
from tests.checkpoint_models import BIG, SMALL, params_of, planned, save, train_state
from uscale_jax import _checkpoint_files, _progress
from uscale_jax._checkpoint import resize_checkpoint
from uscale_jax._checkpoint_files import building
from uscale_jax._frame import UnitScaleFrameWarning

ocp = pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def plan() -> us.Plan:
    return planned()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the small model, which nothing may change."""
    path = tmp_path_factory.mktemp("source") / "small"
    with jax.numpy_dtype_promotion("standard"):
        save(path, train_state(SMALL))
    before = fingerprint(path)
    yield path
    assert fingerprint(path) == before


def fingerprint(path: Path) -> dict[str, tuple[str, int]]:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    digest = lambda p: hashlib.sha256(p.read_bytes()).hexdigest()  # noqa: E731
    return {str(p): (digest(p), p.stat().st_mtime_ns) for p in files}


def refused(
    error: type[Exception], words: str, source: Path, target: Path, plan: us.Plan, **options: Any
) -> None:
    """It is refused with these words, and nothing is written."""
    before = sorted(target.parent.rglob("*")) if target.parent.exists() else None
    with pytest.raises(error, match=words):
        resize_checkpoint(source, target, plan, **options)
    after = sorted(target.parent.rglob("*")) if target.parent.exists() else None
    assert after == before


def test_paths(checkpoint, plan, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    refused(FileExistsError, "is there already", checkpoint, there, plan)
    refused(FileNotFoundError, "is no directory", tmp_path / "none", tmp_path / "big", plan)
    refused(ValueError, "lies in source", checkpoint, checkpoint / "big", plan)
    refused(FileExistsError, "is there already", checkpoint, checkpoint, plan)
    with pytest.raises(ValueError, match="is no local path"):
        resize_checkpoint(checkpoint, "gs://bucket/big", plan)


def test_what_is_no_checkpoint(checkpoint, plan, tmp_path):
    empty, big = tmp_path / "empty", tmp_path / "big"
    empty.mkdir()
    refused(ValueError, "is no checkpoint of Orbax: it has no file", empty, big, plan)
    shutil.copytree(checkpoint, tmp_path / "steps" / "20")
    refused(ValueError, r"holds 20\..*Fix: one of its steps", tmp_path / "steps", big, plan)
    unfinished = tmp_path / "5.orbax-checkpoint-tmp"
    shutil.copytree(checkpoint, unfinished)
    refused(ValueError, "was not finished", unfinished, big, plan)


def test_other_models(checkpoint, plan, tmp_path):
    big = tmp_path / "big"
    other = planned((24, 28, 3))
    wider = tmp_path / "wider"
    save(wider, {"params": params_of(9, 12, 2)})
    refused(ValueError, r"'embed' is float32\[5,9\].*, the plan is for shape", wider, big, other)
    lacking = params_of(*SMALL)
    del lacking["out"]
    save(tmp_path / "lacking", {"params": lacking, "step": 1})
    refused(ValueError, "it has no 'out'", tmp_path / "lacking", big, plan)
    integers = jax.tree.map(lambda x: x.astype(jnp.int32), params_of(*SMALL))
    save(tmp_path / "integers", integers)
    refused(ValueError, "the plan is for float32", tmp_path / "integers", big, plan)
    save(tmp_path / "nothing", {"a": jnp.ones(3)})
    refused(ValueError, "nowhere are leaves named", tmp_path / "nothing", big, plan)
    mixed = {"params": params_of(*SMALL), "opt_state": optax.trace(0.9).init(params_of(*BIG))}
    save(tmp_path / "mixed", mixed)
    refused(ValueError, "does not fit the plan: the parameters are", tmp_path / "mixed", big, plan)
    refused(ValueError, "nothing at 'weights'", checkpoint, big, plan, params="weights")
    refused(ValueError, "is to the model is not clear", checkpoint, big, plan, opt_state=())


def test_options(checkpoint, plan, tmp_path):
    big = tmp_path / "big"
    refused(ValueError, "needs a key", checkpoint, big, plan, symmetry="noise")
    refused(ValueError, "neither 'mapped' nor", checkpoint, big, plan, new_layers="copied")
    save(tmp_path / "large", {"params": params_of(*BIG)})
    refused(ValueError, "tells new copies apart", tmp_path / "large", big, plan, symmetry="uneven")


def test_shardings(checkpoint, plan, tmp_path):
    big = tmp_path / "big"
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = lambda name, leaf: NamedSharding(mesh, P("model"))  # noqa: E731
    refused(ValueError, "'extra/key' is .*, for 1 dim", checkpoint, big, plan, shardings=cut)
    cut = lambda name, leaf: NamedSharding(mesh, P("model")) if leaf.ndim else None  # noqa: E731
    words = r"cannot be cut into 4 parts as .*or size \d+ there"
    refused(ValueError, words, checkpoint, big, plan, shardings=cut)
    words = "no entry of shardings covers"
    refused(ValueError, words, checkpoint, big, plan, shardings={"step": NamedSharding(mesh, P())})
    refused(TypeError, "Expected: a Named", checkpoint, big, plan, shardings=lambda *_: P("model"))


def test_no_room(checkpoint, plan, tmp_path, monkeypatch):
    full = lambda path: SimpleNamespace(free=1000)  # noqa: E731
    monkeypatch.setattr(_checkpoint_files.shutil, "disk_usage", full)
    refused(OSError, "needs up to .* nothing was done", checkpoint, tmp_path / "big", plan)


def test_64_bits_that_are_switched_off(plan, tmp_path):
    with jax.enable_x64(True):
        save(tmp_path / "small", jax.tree.map(lambda x: x.astype(float), params_of(*SMALL)))
    refused(ValueError, "'embed' is float64", tmp_path / "small", tmp_path / "big", plan)


def test_no_orbax(checkpoint, plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    words = re.escape("pip install 'uscale_jax[checkpoints]'")
    refused(ModuleNotFoundError, words, checkpoint, tmp_path / "big", plan)


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_nan_is_seen_when_it_is_read(plan, tmp_path, part):
    tree = train_state(SMALL)
    node = tree["params"] if part == "params" else tree["opt_state"][0].nu
    node["layers"][1]["up"] = node["layers"][1]["up"].at[2, 3].set(jnp.nan)
    save(tmp_path / "small", tree)
    words = f"hold.* NaN: '{part}.*layers/1/up'"
    refused(ValueError, words, tmp_path / "small", tmp_path / "big", plan)


def test_a_target_that_another_process_is_at(checkpoint, plan, tmp_path):
    with building(tmp_path / "big") as data:
        data.mkdir()
        refused(RuntimeError, "another process is writing", checkpoint, tmp_path / "big", plan)
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


def test_numbers_per_leaf_are_warned_of_where_it_is_called(plan, tmp_path):
    params = params_of(*SMALL)
    save(tmp_path / "small", {"params": params, "opt_state": optax.novograd(0.1).init(params)})
    with pytest.warns(UnitScaleFrameWarning, match="one number a leaf") as caught:
        resize_checkpoint(tmp_path / "small", tmp_path / "big", plan)
    assert caught[0].filename == __file__


def test_progress_is_shown_where_it_is_asked_for(checkpoint, plan, tmp_path, capsys):
    resize_checkpoint(checkpoint, tmp_path / "quiet", plan)
    assert capsys.readouterr() == ("", "")
    resize_checkpoint(checkpoint, tmp_path / "big", plan, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"(resize big: [\d.]+ of [\d.]+ MiB \S+\n){2}", err)


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with _progress.progress("resize big", 2**20, None) as advance:
        advance(2**20, "params/up")
    assert "resize big" in capsys.readouterr().err
    monkeypatch.setattr(_progress, "_rich_bar", lambda: None)
    with _progress.progress("resize big", 2**20, None) as advance:
        advance(2**20, "params/up")
    assert capsys.readouterr().err == "resize big: 1.0 of 1.0 MiB params/up\n"
