"""State space layers of long-range-models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.zoo.registry import Built, Model, Sizes, built, floats

REQUIRES = ("long_range_models",)


def _model(name: str, layer: Callable[[Any, Sizes], Any], free: str) -> Model:
    def build(s: Sizes) -> Built:
        from long_range_models import lru, s5
        from long_range_models.sequence_models import ContinuousSequenceModel

        layers = {"S5": s5, "LRU": lru}[name]
        net = ContinuousSequenceModel(layer(layers, s), s["out"], s["width"])
        return built(net, floats(s["batch"], s["length"], s["features"]))

    sizes = {"batch": 2, "length": 6, "features": 5, "width": 8, "state": 4, "out": 3}
    fixed = {"out": "output"}
    return Model(f"long_range_models {name}", sizes, build, tuple(free.split()), fixed)


MODELS = (
    _model("S5", lambda m, s: m.S5Layer(s["width"], s["state"]), "width state"),
    _model("LRU", lambda m, s: m.LRULayer(s["width"], s["state"]), "width state"),
)
