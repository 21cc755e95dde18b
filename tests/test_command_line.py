"""``python -m uscale_jax``: what it does, what it prints, and its exit codes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import uscale_jax as us
from tests.hf_directories import BIG, SMALL, filled, named, planned, shapes_of, weights, write
from uscale_jax import _hf
from uscale_jax._command_line import OK, REFUSED, USAGE, main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "small", named(filled(shapes_of(*SMALL))))


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Plans come from a net of JAX; the rest is as it is.  Returns what was asked for."""
    asked: dict = {}

    def plan(source, **sizes):
        asked.update(sizes)
        return planned(Path(source))

    monkeypatch.setattr(_hf, "plan", plan)
    return asked


def usage(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code)


def test_grow_writes_the_model(source, without_torch, tmp_path, capsys):
    how = ["--width", "3/2", "--depth", "4", "--set", "intermediate_size=61", "--layers", "0,0,1,1"]
    assert main(["grow", str(source), str(tmp_path / "big"), *how]) == OK
    assert capsys.readouterr().out == f"wrote {tmp_path / 'big'}\n"
    assert without_torch == {
        "width": 1.5,
        "depth": [0, 0, 1, 1],
        "new_layers": "identity",
        "architecture": None,
        "num_hidden_layers": 4,
        "intermediate_size": 61,
    }
    whole = _hf.grow(source, tmp_path / "other", planned(source))
    for name, x in weights(whole).items():
        np.testing.assert_array_equal(weights(tmp_path / "big")[name], x)


def test_symmetry_and_seed(source, without_torch, tmp_path):
    for seed in ("3", "4"):
        how = ["--width", "2", "--symmetry", "noise", "--seed", seed, "--quiet"]
        assert main(["grow", str(source), str(tmp_path / seed), *how]) == OK
    three, four = (weights(tmp_path / seed)["head.weight"] for seed in ("3", "4"))
    assert not np.array_equal(three, four)


def test_plan_prints_and_writes_nothing(source, without_torch, tmp_path, capsys):
    assert main(["plan", str(source), "--width", "2"]) == OK
    out = capsys.readouterr().out
    assert out.startswith("width: 8 → 16\n\nleaf")
    assert "layers/1/down/weight" in out
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_refusals_are_one_message_on_stderr(source, without_torch, tmp_path, capsys):
    target = str(tmp_path / "small")
    assert main(["grow", str(source), target, "--width", "2"]) == REFUSED
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith(f"refused: target={target!r} is there already")
    assert main(["shrink", str(source), str(tmp_path / "x"), "--width", "2"]) == REFUSED
    assert "these sizes grow: width 8 → 16. Fix: us.hf.grow." in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("stretch", "a", "b"),
        ("grow", "a"),
        ("grow", "a", "b"),
        ("grow", "a", "b", "--width", "-1"),
        ("grow", "a", "b", "--width", "wide"),
        ("grow", "a", "b", "--depth", "0"),
        ("grow", "a", "b", "--set", "intermediate_size"),
        ("grow", "a", "b", "--set", "intermediate_size=x"),
        ("grow", "a", "b", "--depth", "3", "--layers", "some"),
        ("grow", "a", "b", "--width", "2", "--plan", "plan.json"),
        ("shrink", "a", "b", "--width", "1/2", "--symmetry", "noise"),
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments, capsys):
    assert usage(*arguments) == USAGE
    found = capsys.readouterr().err
    assert "usage: python -m uscale_jax" in found
    assert "Traceback" not in found


@pytest.mark.parametrize("command", [(), ("grow",), ("shrink",), ("plan",)], ids=str)
def test_help_has_examples(command, capsys):
    assert usage(*command, "--help") == OK
    out = capsys.readouterr().out
    assert "python -m uscale_jax grow models/llama models/wide --width 2 --depth 24" in out
    assert "exit codes: 0 done, 1 refused" in out


def test_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "uscale_jax", "grow", "nowhere", str(tmp_path / "big")]
    run = lambda *more: subprocess.run(  # noqa: E731
        [*command, *more], capture_output=True, text=True, cwd=ROOT
    )
    refused = run("--width", "2")
    assert (refused.returncode, refused.stdout) == (REFUSED, "")
    assert refused.stderr.startswith("refused: source='nowhere' is no directory.")
    assert "Traceback" not in refused.stderr
    assert run().returncode == USAGE


# Checkpoints of Orbax


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Path, us.Plan]:
    ocp = pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")
    directory = write(tmp_path / "hf", named(filled(shapes_of(*SMALL))))
    plan = planned(directory).plan
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "small", {"params": filled(shapes_of(*SMALL))})
    return tmp_path / "small", tmp_path / "plan.json", plan


def restored(path: Path, sizes: tuple[int, int, int]) -> dict:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return named(checkpointer.restore(path, {"params": filled(shapes_of(*sizes))})["params"])


def test_orbax_there_and_back(checkpoint, tmp_path, capsys):
    source, file, plan = checkpoint
    how = ["--plan", str(file)]
    assert main(["plan", str(source), *how]) == OK
    assert f"{source} grows, by this plan:\n\nleaf" in capsys.readouterr().out
    assert main(["grow", str(source), str(tmp_path / "big"), *how]) == OK
    wanted = named(us.grow(filled(shapes_of(*SMALL)), plan, verify=False))
    for name, x in restored(tmp_path / "big", BIG).items():
        np.testing.assert_array_equal(x, wanted[name])
    assert main(["shrink", str(tmp_path / "big"), str(tmp_path / "back"), *how]) == OK
    for name, x in restored(tmp_path / "back", SMALL).items():
        np.testing.assert_array_equal(x, named(filled(shapes_of(*SMALL)))[name])


def test_orbax_the_other_way_is_refused(checkpoint, tmp_path, capsys):
    source, file, _ = checkpoint
    how = [str(source), str(tmp_path / "x"), "--plan", str(file)]
    assert main(["shrink", *how]) == REFUSED
    assert (
        "is of the plan's small model. Fix: python -m uscale_jax grow." in capsys.readouterr().err
    )
    assert main(["shrink", *how, "--importance", "random"]) == REFUSED
    file.write_text("{}")
    assert main(["grow", *how]) == REFUSED
    assert not (tmp_path / "x").exists()
