"""Wave functions of NetKet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.zoo.registry import Built, Model, Sizes, built

REQUIRES = ("netket",)


def _spins(s: Sizes) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (2.0 * rng.integers(0, 2, (s["batch"], s["sites"])) - 1.0).astype(np.float32)


def _model(
    name: str, make: Callable[[Any, Sizes], Any], hidden: Sizes, free: str, **fixed: str
) -> Model:
    def build(s: Sizes) -> Built:
        import netket

        return built(make(netket, s), _spins(s))

    sizes = {"batch": 3, "sites": 4, **hidden}
    return Model(f"netket {name}", sizes, build, tuple(free.split()), fixed)


def _arnn(netket: Any, s: Sizes) -> Any:
    space = netket.hilbert.Spin(0.5, s["sites"])
    return netket.models.ARNNDense(
        hilbert=space, layers=2, features=s["features"], param_dtype=np.float32
    )


def _gcnn(netket: Any, s: Sizes) -> Any:
    graph = netket.graph.Chain(s["sites"])
    return netket.models.GCNN(
        symmetries=graph, layers=2, features=(s["width_0"], s["width_1"]), param_dtype=np.float32
    )


MODELS = (
    _model(
        "RBM",
        lambda n, s: n.models.RBM(alpha=s["alpha"], param_dtype=np.complex64),
        {"alpha": 2},
        "",
        alpha="stays as it is",
    ),
    _model("ARNNDense", _arnn, {"features": 5}, "", features="array of numbers"),
    _model("GCNN", _gcnn, {"width_0": 5, "width_1": 7}, "width_0", width_1="log"),
    _model(
        "MLP",
        lambda n, s: n.models.MLP(hidden_dims=(s["width_0"], s["width_1"]), param_dtype=np.float32),
        {"width_0": 7, "width_1": 9},
        "width_0 width_1",
    ),
)
