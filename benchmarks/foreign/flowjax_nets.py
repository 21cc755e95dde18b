"""Normalising flows of flowjax; the function is the log density."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.foreign.registry import by_name
from benchmarks.zoo.registry import Built, Model, Sizes, floats

REQUIRES = ("flowjax",)


def _model(name: str, size: str, fixed: str = "", **options: Any) -> Model:
    """Return a flow of the kind ``name``, whose networks have the width ``size``."""

    def build(s: Sizes) -> Built:
        from flowjax import bijections, flows
        from flowjax.distributions import Normal

        more = dict(options)
        if more.pop("spline", False):
            more["transformer"] = bijections.RationalQuadraticSpline(knots=4, interval=3)
        make = getattr(flows, name.split()[0])
        base = Normal(jnp.zeros(s["features"]))
        flow = make(jax.random.key(0), base_dist=base, flow_layers=2, **{size: s[size]}, **more)
        return by_name(flow, lambda f, x: f.log_prob(x), floats(s["batch"], s["features"]))

    sizes = {"batch": 3, "features": 4, size: 9}
    free = () if fixed else (size,)
    return Model(f"flowjax {name}", sizes, build, free, {size: fixed} if fixed else {})


MODELS = (
    _model("coupling_flow", "nn_width"),
    _model("coupling_flow spline", "nn_width", spline=True),
    _model("masked_autoregressive_flow", "nn_width", "array of numbers"),
    _model("block_neural_autoregressive_flow", "nn_block_dim", "looks places up"),
)
