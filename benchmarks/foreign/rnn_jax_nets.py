"""State space models of rnn-jax."""

from __future__ import annotations

import jax

from benchmarks.foreign.registry import by_name
from benchmarks.zoo.registry import Built, Model, Sizes, floats

REQUIRES = ("rnn_jax",)


def _model(name: str) -> Model:
    def build(s: Sizes) -> Built:
        from rnn_jax.ssm import lru, mixers, models, s5

        kinds = {"LRU": lru.LinearRecurrentUnit, "S5": s5.SimplifiedStateSpaceLayer}
        layer = kinds[name]
        keys = jax.random.split(jax.random.key(0), 5)
        width = s["state"]
        layers = [layer(width, width, width, key=key) for key in keys[:2]]
        mixing = [mixers.GLUMixer(width, width, key=key) for key in keys[2:4]]
        net = models.DeepStateSpaceModelEncoder(
            s["features"], layers, mixing, out_dim=s["out"], pool_method="mean", key=keys[4]
        )
        series = floats(s["length"], s["features"])
        return by_name(net, lambda m, x: m(x), series)

    sizes = {"length": 6, "features": 5, "state": 8, "out": 3}
    return Model(f"rnn_jax {name}", sizes, build, ("state",), {"out": "output"})


MODELS = (_model("LRU"), _model("S5"))
