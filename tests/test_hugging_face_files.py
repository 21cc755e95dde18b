"""Model directories without PyTorch: the file format, names, and what is written when."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from tests.hf_directories import (
    BIG,
    INPUT,
    SMALL,
    apply,
    filled,
    named,
    planned,
    shapes_of,
    weights,
    write,
)
from uscale_jax import _hf as hf
from uscale_jax._hf_files import name_like, names_in_files
from uscale_jax._safetensors import DTYPES, NewTensor, in_order, in_shards, read_header, write_file


def small(path: Path, dtype=np.float32, **how) -> Path:
    tensors = {n: x.astype(dtype) for n, x in named(filled(shapes_of(*SMALL))).items()}
    return write(path, {**tensors, "steps": np.array([7, 8, 9])}, **how)


def digest(folder: Path) -> str:
    sums = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        sums.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return sums.hexdigest()


def double(path: Path) -> dict:
    """The function of a directory in float64, by NumPy alone."""
    return {name: np.asarray(x).astype(np.float64) for name, x in weights(path).items()}


def outputs(path: Path, layers: int) -> np.ndarray:
    w = double(path)
    h = INPUT.astype(np.float64) @ w["embed.weight"].T
    for i in range(layers):
        y = h / np.sqrt(np.mean(h * h, -1, keepdims=True) + 1e-5) * w[f"layers.{i}.norm.weight"]
        h = h + np.tanh(y @ w[f"layers.{i}.up.weight"].T) @ w[f"layers.{i}.down.weight"].T
    return h @ w["head.weight"].T


# The format


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_dtype_is_read_as_it_was_written(tmp_path, code):
    rng = np.random.default_rng(1)
    dtype = DTYPES[code]
    values = rng.integers(0, 2, (3, 5)).astype(bool) if code == "BOOL" else None
    values = rng.uniform(1, 100, (3, 5)).astype(dtype) if values is None else values
    other = np.arange(7, dtype=np.int16)
    new = in_order([NewTensor("a", code, (3, 5)), NewTensor("b", "I16", (7,))])
    write_file(tmp_path / "x", new, ({"a": values, "b": other}[t.name] for t in new), {"k": "v"})
    found = read_header(tmp_path / "x")
    assert found.metadata == {"k": "v"}
    np.testing.assert_array_equal(found.tensors["a"].read().view(np.uint8), values.view(np.uint8))
    np.testing.assert_array_equal(found.tensors["b"].read(), other)
    assert all(t.start % DTYPES[t.dtype].itemsize == 0 for t in found.tensors.values())


def test_files_are_those_of_the_package_safetensors(tmp_path):
    package = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([1, 2], np.int64)}
    package.save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    theirs = read_header(tmp_path / "theirs")
    assert theirs.metadata == {"format": "pt"}
    for name, x in arrays.items():
        np.testing.assert_array_equal(theirs.tensors[name].read(), x)
    new = in_order([NewTensor("a", "F64", (2, 3)), NewTensor("b", "I64", (2,))])
    write_file(tmp_path / "ours", new, (arrays[t.name] for t in new), {})
    ours = package.load_file(tmp_path / "ours")
    for name, x in arrays.items():
        np.testing.assert_array_equal(ours[name], x)


def test_broken_files_are_refused(tmp_path):
    source = small(tmp_path / "small") / "model.safetensors"
    whole = source.read_bytes()
    source.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="before the end of 'steps'|before the end of 'layers"):
        read_header(source)
    source.write_bytes(b"no such file at all")
    with pytest.raises(ValueError, match="is no complete file of safetensors: its header"):
        read_header(source)
    source.write_bytes((9).to_bytes(8, "little") + b"not JSON!" + whole)
    with pytest.raises(ValueError, match="its header is no JSON"):
        read_header(source)


def test_shards_have_at_most_the_size_asked_for():
    tensors = [NewTensor(str(i), "F32", (size,)) for i, size in enumerate((3, 4, 20, 1, 1))]
    shards = [[t.name for t in shard] for shard in in_shards(tensors, 30)]
    assert shards == [["0", "1"], ["2"], ["3", "4"]]


# Names


STATES = ("base.h.0.norm.weight", "base.h.0.norm.bias", "head.weight")


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (STATES, STATES),
        (("h.0.norm.weight", "h.0.norm.bias", "head.weight"), None),
        (("base.h.0.norm.gamma", "base.h.0.norm.beta", "head.weight"), None),
        (("base.h.0.norm.weight", "base.h.0.norm.bias", "base.embed.weight"), None),
    ],
)
def test_names_in_files_with_and_without_the_prefix(files, wanted):
    tied = {"base.embed.weight": "head.weight"}
    found = names_in_files(STATES, tied, files, "base")
    assert tuple(found[name] for name in STATES) == (wanted or files)


def test_names_of_a_base_model_in_the_files_of_one_with_a_head():
    files = ["base.h.0.weight", "base.h.1.weight", "head.weight"]
    found = names_in_files(["h.0.weight", "h.1.weight"], {}, files, "base")
    assert found == {"h.0.weight": files[0], "h.1.weight": files[1]}


def test_missing_tensors_are_refused():
    with pytest.raises(ValueError, match="the files lack 2 of the model's 3 tensors: base.h.0.no"):
        names_in_files(STATES, {}, ["base.h.0.norm.weight"], "base")


def test_names_of_new_layers():
    stored = name_like("base.h.5.norm.weight", "base.h.2.norm.weight", "h.2.norm.gamma")
    assert stored == "h.5.norm.gamma"


# Writing


def test_a_grown_directory_is_the_same_function(tmp_path):
    source = small(tmp_path / "small", shards=3)
    before = digest(source)
    target = hf.grow(source, tmp_path / "big", planned(source))
    assert target == tmp_path / "big"
    assert digest(source) == before
    assert {n: x.shape for n, x in weights(target).items() if n != "steps"} == {
        n: x.shape for n, x in named(shapes_of(*BIG)).items()
    }
    wanted = outputs(source, SMALL[2])
    assert np.abs(outputs(target, BIG[2]) - wanted).max() < 2e-6 * np.abs(wanted).max()
    np.testing.assert_array_equal(weights(target)["steps"], [7, 8, 9])
    assert json.loads((target / "config.json").read_text()) == {"width": 16, "note": "é"}
    assert (target / "tokenizer.json").read_text() == '{"a": 1}'
    assert (target / "part" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "small"]
    assert not (target / "pytorch_model.bin").exists()
    assert not (target / "model.safetensors.index.json").exists()


def test_shrinking_undoes_it_bit_for_bit(tmp_path):
    source = small(tmp_path / "small")
    big = hf.grow(source, tmp_path / "big", planned(source))
    back = hf.shrink(big, tmp_path / "back", planned(big, grows=False))
    for name, x in weights(source).items():
        np.testing.assert_array_equal(weights(back)[name], x)


def test_many_shards_and_their_index(tmp_path):
    source = small(tmp_path / "small")
    one = hf.grow(source, tmp_path / "one", planned(source))
    many = hf.grow(source, tmp_path / "many", planned(source), shard_size=1600)
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in weights(one).values())
    assert set(index["weight_map"].values()) == set(files)
    for name, x in weights(one).items():
        np.testing.assert_array_equal(weights(many)[name], x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, jnp.float8_e5m2, np.float32])
def test_dtypes_stay_and_values_are_those_of_grow(tmp_path, dtype):
    source = small(tmp_path / "small", dtype)
    plan = planned(source)
    target = hf.grow(source, tmp_path / "big", plan)
    wanted = named(us.grow(hf.load(plan), plan.plan, verify=False))
    found = weights(target)
    assert set(wanted) == {*found} - {"steps"}
    for name, x in wanted.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], np.asarray(x))


def test_float8_is_refused_where_factors_would_round_it(tmp_path):
    source = small(tmp_path / "small", jnp.float8_e5m2)
    thrice = (24, 36, 3)
    with pytest.raises(ValueError, match="(?s)no powers of 2:\n  '.*weight' × 1/3"):
        hf.grow(source, tmp_path / "big", planned(source, big=thrice))
    assert not (tmp_path / "big").exists()
    hf.grow(small(tmp_path / "b16", jnp.bfloat16), tmp_path / "big", planned(tmp_path / "b16"))


def test_float8_is_refused_where_values_are_lost(tmp_path):
    tensors = named(filled(shapes_of(*SMALL)))
    tensors = {name: np.round(x + 1).astype(jnp.float8_e4m3fn) for name, x in tensors.items()}
    tensors["head.weight"][2, 3] = 2.0**-9  # the smallest number that there is
    source = write(tmp_path / "small", tensors)
    with pytest.raises(ValueError, match="'head.weight' is float8_e4m3fn, and some of"):
        hf.grow(source, tmp_path / "big", planned(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_noise_keeps_the_function(tmp_path):
    import jax

    source = small(tmp_path / "small")
    how = {"symmetry": "noise", "key": jax.random.key(3)}
    plain = hf.grow(source, tmp_path / "plain", planned(source))
    noisy = hf.grow(source, tmp_path / "noisy", planned(source), **how)
    assert not np.array_equal(weights(plain)["head.weight"], weights(noisy)["head.weight"])
    wanted = outputs(source, SMALL[2])
    assert np.abs(outputs(noisy, BIG[2]) - wanted).max() < 2e-6 * np.abs(wanted).max()


def test_importance_chooses_units(tmp_path):
    tensors = named(filled(shapes_of(*BIG)))
    tensors["layers.0.up.weight"][:12] = 0  # these do nothing
    tensors["layers.0.down.weight"][:, :12] = 0
    source = write(tmp_path / "big", tensors)
    plan = planned(source, grows=False)
    target = hf.shrink(source, tmp_path / "small", plan, importance="magnitude")
    found = weights(target)["layers.0.up.weight"]
    assert found.shape == (SMALL[1], SMALL[0])
    assert np.all(np.abs(found).sum(1) > 0)


def test_what_was_measured_is_refitted(tmp_path):
    source = write(tmp_path / "big", named(filled(shapes_of(*BIG))))
    plan = planned(source, grows=False)
    params, models = hf.load(plan), plan.plan.models
    found = us.importance(models.big, params, [INPUT], plan.plan)
    target = hf.shrink(source, tmp_path / "small", plan, importance=found)
    wanted = named(us.shrink(params, plan.plan, importance=found))
    for name, x in weights(target).items():
        np.testing.assert_array_equal(x, np.asarray(wanted[name]))


# All or nothing


@pytest.mark.parametrize("values", ["0", "5", "-1"])
def test_a_killed_process_leaves_no_target_and_the_next_one_finishes(tmp_path, values):
    source = small(tmp_path / "small")
    before = digest(source)
    command = [sys.executable, "-m", "tests.hf_worker", str(source), str(tmp_path / "big"), values]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "big").exists()
    assert digest(source) == before
    whole = hf.grow(source, tmp_path / "other", planned(source))
    hf.grow(source, tmp_path / "big", planned(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "other", "small"]
    for path in whole.rglob("*"):
        if path.is_file():
            assert (tmp_path / "big" / path.relative_to(whole)).read_bytes() == path.read_bytes()


def test_nothing_is_left_of_what_fails(tmp_path):
    tensors = named(filled(shapes_of(*SMALL)))
    tensors["layers.1.up.weight"][3, 2] = np.nan
    source = write(tmp_path / "small", tensors)
    with pytest.raises(ValueError, match="NaN: 'layers.1.up.weight' in 'model.safetensors'"):
        hf.grow(source, tmp_path / "big", planned(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_a_wrong_model_is_found_out_before_the_target_is_there(tmp_path):
    source = small(tmp_path / "small")
    plan = planned(source)
    models = plan.plan.models
    wrong = lambda params, x: 2 * apply(params, x)  # noqa: E731
    object.__setattr__(plan.plan, "models", models._replace(big=wrong))
    with pytest.raises(ValueError, match="not the same function"):
        hf.grow(source, tmp_path / "big", plan)
    assert not (tmp_path / "big").exists()
    hf.grow(source, tmp_path / "big", plan, verify=False)


def test_refusals_before_any_work(tmp_path):
    source = small(tmp_path / "small")
    plan = planned(source)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there already"):
        hf.grow(source, tmp_path / "there", plan)
    with pytest.raises(FileNotFoundError, match="is no directory. Expected: a model"):
        hf.grow(tmp_path / "nowhere", tmp_path / "big", plan)
    with pytest.raises(ValueError, match="these sizes grow: width 8 → 16. Fix: us.hf.grow"):
        hf.shrink(source, tmp_path / "big", plan)
    with pytest.raises(ValueError, match="both a plan and hidden_size"):
        hf.grow(source, tmp_path / "big", plan, hidden_size=3)
    other = shutil.copytree(source, tmp_path / "other")
    with pytest.raises(ValueError, match="the plan is for"):
        hf.grow(other, tmp_path / "big", plan)
    back = planned(write(tmp_path / "back", named(filled(shapes_of(*BIG)))), grows=False)
    with pytest.raises(ValueError, match="importance='taylor' needs data"):
        hf.shrink(tmp_path / "back", tmp_path / "big", back, importance="taylor")
    assert not (tmp_path / "big").exists()


def test_directories_that_are_none(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ValueError, match="it has no 'config.json'"):
        hf.plan(folder, width=2)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds neither 'model.safetensors' nor"):
        hf.plan(folder, width=2)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="its index names model-00001-of-00002.safetensors"):
        hf.plan(folder, width=2)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(ValueError, match="is quantised"):
        hf.plan(folder, width=2)
