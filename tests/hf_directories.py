"""A model directory that needs neither PyTorch nor transformers: a small net and its plan."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import uscale_jax as us
from uscale_jax import _hf as hf
from uscale_jax._hf_files import read_directory
from uscale_jax._safetensors import DTYPES, NewTensor, in_order, write_file

INPUT = np.random.default_rng(5).standard_normal((4, 5)).astype(np.float32)
SMALL, BIG = (8, 12, 2), (16, 24, 3)
"""Width, width of layers, number of layers."""


def apply(params, x):
    h = x @ params["embed"]["weight"].T
    for name in sorted(params["layers"], key=int):
        layer = params["layers"][name]
        y = h / jnp.sqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-5)
        y = y * layer["norm"]["weight"][None]
        h = h + jnp.tanh(y @ layer["up"]["weight"].T) @ layer["down"]["weight"].T
    return h @ params["head"]["weight"].T


def shapes_of(width: int, mlp: int, layers: int) -> dict[str, Any]:
    weight = lambda *shape: {"weight": jax.ShapeDtypeStruct(shape, np.float32)}  # noqa: E731
    layer = {"up": weight(mlp, width), "down": weight(width, mlp), "norm": weight(width)}
    stack = {str(i): layer for i in range(layers)}
    return {"embed": weight(width, 5), "layers": stack, "head": weight(3, width)}


def filled(shapes: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    draw = lambda x: (0.4 * rng.standard_normal(x.shape) + 0.1).astype(x.dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


def named(params: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(part.key for part in path): leaf for path, leaf in pairs}


def write(path: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A directory with weights, a configuration, and files that are to be copied."""
    path.mkdir()
    codes = {dtype: code for code, dtype in DTYPES.items()}
    new = in_order([NewTensor(n, codes[x.dtype], x.shape) for n, x in tensors.items()])
    parts = [new[i::shards] for i in range(shards)]
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    for file, part in zip(files, parts, strict=True):
        write_file(path / file, part, (tensors[t.name] for t in part), {"format": "pt"})
    if shards > 1:
        places = {t.name: f for f, part in zip(files, parts, strict=True) for t in part}
        index = {"metadata": {}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({"width": 8, "note": "é"}))
    (path / "tokenizer.json").write_text('{"a": 1}')
    (path / "part").mkdir()
    (path / "part" / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"old")
    return path


def planned(source: Path, grows: bool = True, big: tuple[int, int, int] = BIG) -> hf.ModelPlan:
    """The plan, which us.hf.plan would make of a PyTorch program."""
    small, large = shapes_of(*SMALL), shapes_of(*big)
    plan = us.plan(apply, small, apply, large, INPUT, depth="interleave")
    stored = read_directory(source)
    return hf.ModelPlan(
        plan=plan,
        source=source.resolve(),
        grows=grows,
        sizes={"width": (SMALL[0], big[0])} if grows else {"width": (big[0], SMALL[0])},
        config={"width": big[0] if grows else SMALL[0], "note": "é"},
        notes=(),
        stored=stored,
        names={tuple(name.split(".")): name for name in stored.tensors if name != "steps"},
        copied=("steps",) if "steps" in stored.tensors else (),
    )


def weights(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in read_directory(path).tensors.items()}
