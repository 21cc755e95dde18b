"""Networks of brax's training code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.zoo.registry import Built, Model, Sizes, built, floats

REQUIRES = ("brax",)

_SIZES = {"batch": 4, "features": 5, "width_0": 7, "width_1": 9, "out": 3}


def _model(
    name: str,
    sizes: Sizes,
    options: Callable[[Sizes], dict[str, Any]],
    data: Callable[[Sizes], Any],
    free: str,
    **fixed: str,
) -> Model:
    def build(s: Sizes) -> Built:
        from brax.training import networks

        return built(getattr(networks, name.split()[0])(**options(s)), data(s))

    return Model(f"brax {name}", sizes, build, tuple(free.split()), fixed)


def _rows(s: Sizes) -> np.ndarray:
    return floats(s["batch"], s["features"])


def _mlp(s: Sizes) -> dict[str, Any]:
    widths = (s["width_0"], s["width_1"], s["out"])
    return {"layer_sizes": widths, "activation": jax.nn.swish}


MODELS = (
    _model("MLP", _SIZES, _mlp, _rows, "width_0 width_1", out="output"),
    _model("MLP norm", _SIZES, lambda s: _mlp(s) | {"layer_norm": True}, _rows, "width_0 width_1"),
    _model(
        "CNN",
        {"batch": 2, "side": 8, "colours": 3, "channels_0": 7, "channels_1": 9, "out": 4},
        lambda s: {
            "num_filters": (s["channels_0"], s["channels_1"], s["out"]),
            "kernel_sizes": ((3, 3),) * 3,
            "strides": ((1, 1), (2, 2), (1, 1)),
        },
        lambda s: floats(s["batch"], s["side"], s["side"], s["colours"]),
        "channels_0 channels_1",
        out="output",
    ),
)
