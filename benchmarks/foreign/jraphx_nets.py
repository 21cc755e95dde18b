"""Graph networks of jraphx."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.foreign.nnx_modules import nnx_built
from benchmarks.zoo.registry import Built, Model, Sizes, floats

REQUIRES = ("jraphx",)


def _edges(s: Sizes) -> np.ndarray:
    return np.random.default_rng(0).integers(0, s["nodes"], (2, s["edges"])).astype(np.int32)


def _model(name: str, **more: Any) -> Model:
    def build(s: Sizes) -> Built:
        from flax import nnx
        from jraphx.nn import models

        options = more | ({"heads": s["heads"]} if "heads" in s else {})
        net = getattr(models, name)(
            s["features"], s["hidden"], 2, s["out"], rngs=nnx.Rngs(0), **options
        )
        net.eval()
        inputs = floats(s["nodes"], s["features"]), _edges(s)
        return nnx_built(net, lambda m, x, edges: m(x, edges), *inputs)

    sizes = {"nodes": 6, "edges": 14, "features": 5, "hidden": 8, "out": 3}
    heads = {"heads": 2} if name == "GAT" else {}
    free = ("hidden",)
    return Model(f"jraphx {name}", sizes | heads, build, free, {"out": "output"})


MODELS = (
    _model("GCN", norm="layer_norm"),
    _model("GAT"),
    _model("GraphSAGE", jk="cat"),
    _model("GIN"),
)
