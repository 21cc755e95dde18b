"""Summary networks of BayesFlow with Keras on JAX (``KERAS_BACKEND=jax``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.foreign.keras_nets import keras_built
from benchmarks.zoo.registry import Built, Model, Sizes, floats

REQUIRES = ("keras", "bayesflow")


def _model(name: str, hidden: Sizes, options: Callable[[Sizes], dict[str, Any]]) -> Model:
    def build(s: Sizes) -> Built:
        import bayesflow

        x = floats(s["batch"], s["set"], s["features"])

        def make() -> Any:
            net = getattr(bayesflow.networks, name)(summary_dim=s["out"], dropout=0.0, **options(s))
            net(x)
            return net

        return keras_built(make, x)

    sizes = {"batch": 2, "set": 5, "features": 3, "out": 10, **hidden}
    return Model(f"bayesflow {name}", sizes, build, tuple(hidden), {"out": "output"})


MODELS = (
    _model(
        "SetTransformer",
        {"heads": 4, "head_dim": 6, "expansion": 7},
        lambda s: {
            "embed_dims": (s["heads"] * s["head_dim"],) * 2,
            "num_heads": (s["heads"],) * 2,
            "expansion_factor": s["expansion"],
        },
    ),
    _model(
        "DeepSet",
        {"embedded": 9, "width": 7, "heads": 4, "head_dim": 8, "expansion": 6},
        lambda s: {
            "embed_dim": s["embedded"],
            "mlp_widths": (s["width"], s["heads"] * s["head_dim"]),
            "num_heads": s["heads"],
            "expansion_factor": s["expansion"],
        },
    ),
)
