"""resize_checkpoint: peak memory, processes that are killed, meshes, and several processes."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import uscale_jax as us
from tests.checkpoint_models import BIG, SMALL, load, planned, resized, save, train_state
from tests.test_checkpoint import assert_same
from uscale_jax import _checkpoint_tree
from uscale_jax._checkpoint import resize_checkpoint

ocp = pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")
pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def plan() -> us.Plan:
    return planned()


@pytest.fixture
def saved(plan, tmp_path) -> tuple[Path, Path, Any]:
    """A checkpoint, the plan as a file, and what its target is to hold."""
    tree = train_state(SMALL)
    save(tmp_path / "small", tree)
    (tmp_path / "plan.json").write_text(plan.to_json())
    return tmp_path / "small", tmp_path / "plan.json", resized(tree, plan)


def start(*arguments: Any, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.checkpoint_worker", *map(str, arguments)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, **piped)


def output(process: subprocess.Popen[str]) -> str:
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    return out


def test_peak_memory_is_that_of_the_largest_leaf(tmp_path):
    """Twenty more layers of 4 MiB, 16 MiB when grown, need no more memory."""
    counts = (4, 24)
    output(start("models", tmp_path, *counts))
    # One arena: memory that glibc keeps for threads differs from run to run.
    out = output(start("memory", tmp_path, *counts, MALLOC_ARENA_MAX="1"))
    imported, few, many = map(float, out.splitlines()[-3:])
    assert few - imported < 200
    assert many - few < 60  # of 400


MOMENTS = ("writing 4", "writing 20", "renaming", "renamed", "0.1", "0.5", "1")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_that_is_killed_leaves_all_or_nothing(saved, plan, tmp_path, moment):
    """Killed in the first and the second tree, around the last step, some time after the start."""
    _, text, wanted = saved
    small = manager(tmp_path / "steps", train_state(SMALL))
    target = tmp_path / "big"
    process = start("resize", moment, small, target, text)
    assert "begins\n" in iter(process.stdout)
    if moment[0].isdigit():
        time.sleep(float(moment))
        process.kill()
    process.wait(timeout=300)
    process.stdout.close()
    if not moment[0].isdigit():
        assert process.returncode == -9
    if target.exists():
        assert moment == "renamed" or moment[0].isdigit()
        with pytest.raises(FileExistsError):
            resize_checkpoint(small, target, plan)
    else:
        assert moment != "renamed"
        resize_checkpoint(small, target, plan)
    for name in ("opt_state", "params"):
        assert_same(load(target / name, wanted[name]), wanted[name])
    assert {path.name for path in tmp_path.iterdir()} == {"small", "plan.json", "steps", "big"}


def manager(path: Path, tree: Any) -> Path:
    """A step with two trees."""
    items = {name: ocp.args.StandardSave(tree[name]) for name in ("params", "opt_state")}
    with ocp.CheckpointManager(path) as kept:
        kept.save(7, args=ocp.args.Composite(**items))
    return path / "7"


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def onto(over: jax.sharding.Mesh, tree: Any) -> Any:
    """Shardings for a tree: larger arrays over both axes, vectors over one."""
    specs = {1: P("data"), 2: P("data", "model")}

    def one(x: Any) -> NamedSharding:
        fits = x.ndim and all(n % count == 0 for n, count in zip(x.shape, (2, 4), strict=False))
        return NamedSharding(over, specs[x.ndim] if fits else P())

    return jax.tree.map(one, tree)


def described(path: Path) -> Any:
    """What Orbax says of the parameters."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(path).item_metadata["params"]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("form", ["tree", "function"])
def test_onto_a_mesh(saved, plan, tmp_path, kind, form, monkeypatch):
    """Every shard is read, made and written where it belongs."""
    small, _, wanted = saved
    read, places = _checkpoint_tree.read, {}

    def note(leaf: Any, *place: Any) -> Any:
        places[leaf.key] = place
        return read(leaf, *place)

    monkeypatch.setattr(_checkpoint_tree, "read", note)
    model = {name: wanted[name] for name in ("params", "opt_state")}
    shardings = {**onto(mesh(kind), model), "extra": NamedSharding(mesh(kind), P())}
    by_function = lambda name, leaf: onto(mesh(kind), leaf)  # noqa: E731
    given = by_function if form == "function" else shardings
    resize_checkpoint(small, tmp_path / "big", plan, shardings=given)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        model,
        onto(mesh(kind), model),
    )
    got = load(tmp_path / "big", {**wanted, **like})
    assert_same(got, wanted)
    assert got["params"]["layers"][2]["up"].sharding.spec == P("data", "model")
    assert places["params", "layers", "0", "up"][0].spec == P("data", "model")
    assert described(tmp_path / "big")["layers"][2]["up"].storage.chunk_shape == (8, 7)


@pytest.mark.parametrize("way", ["grow", "shrink"])
def test_the_mesh_of_the_checkpoint_is_kept(plan, tmp_path, way):
    """Resized on the mesh that it was saved from, in both directions."""
    tree = train_state(SMALL if way == "grow" else BIG)
    model = {name: tree[name] for name in ("params", "opt_state")}
    tree = {**tree, **jax.tree.map(jax.device_put, model, onto(mesh(AxisType.Auto), model))}
    save(tmp_path / "from", tree)
    resize_checkpoint(tmp_path / "from", tmp_path / "to", plan)
    wanted = resized(tree, plan, us.grow if way == "grow" else us.shrink)
    assert_same(load(tmp_path / "to", wanted), wanted)
    stored = described(tmp_path / "to")["layers"][0]
    assert stored["up"].sharding.to_jax_sharding().spec == P("data", "model")
    assert stored["up"].storage.chunk_shape == tuple(
        n // count for n, count in zip(stored["up"].shape, (2, 4), strict=True)
    )


def test_two_processes_write_what_one_restores(saved, tmp_path):
    small, text, wanted = saved
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [start("one_of_two", i, port, small, tmp_path / "big", text) for i in range(2)]
    try:
        assert ["done" in output(process) for process in pair] == [True, True]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert_same(load(tmp_path / "big", wanted), wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"small", "plan.json", "big"}
