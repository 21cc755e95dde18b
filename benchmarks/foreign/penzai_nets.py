"""Transformers of penzai, whose axes have names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.foreign.registry import by_name
from benchmarks.zoo.registry import Built, Model, Sizes, floats, tokens

REQUIRES = ("penzai",)


def _llama(s: Sizes) -> Built:
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common as common

    config = common.LlamalikeTransformerConfig(
        num_kv_heads=s["kv_heads"],
        query_head_multiplier=s["per_kv"],
        embedding_dim=s["width"],
        projection_dim=s["head_dim"],
        mlp_hidden_dim=s["inner"],
        num_decoder_blocks=2,
        vocab_size=s["vocabulary"],
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
        parameter_dtype=jnp.float32,
        activation_dtype=jnp.float32,
    )
    net = common.build_llamalike_transformer(config, jax.random.key(0))
    slots, variables = pz.unbind_params(net, freeze=True)

    def call(given: Any, ids: Any) -> Any:
        model = pz.bind_variables(slots, given)
        return model(pz.nx.wrap(ids, "batch", "seq")).unwrap("batch", "seq", "vocabulary")

    return by_name(variables, call, tokens(s["batch"], s["length"], vocabulary=s["vocabulary"]))


def _mlp(s: Sizes) -> Built:
    from penzai import pz
    from penzai.models.simple_mlp import MLP

    widths = [s["features"], s["width_0"], s["width_1"], s["out"]]
    slots, variables = pz.unbind_params(MLP.from_config(jax.random.key(0), widths), freeze=True)

    def call(given: Any, x: Any) -> Any:
        model = pz.bind_variables(slots, given)
        return model(pz.nx.wrap(x, "batch", "features")).unwrap("batch", "features")

    return by_name(variables, call, floats(s["batch"], s["features"]))


MODELS = (
    Model(
        "penzai Llama",
        {"batch": 2, "length": 5, "vocabulary": 11, "width": 15, "kv_heads": 3, "per_kv": 4}
        | {"head_dim": 6, "inner": 21},
        _llama,
        ("width", "kv_heads", "per_kv", "inner"),
        {"vocabulary": "output", "head_dim": "counts it"},
    ),
    Model(
        "penzai MLP",
        {"batch": 4, "features": 5, "width_0": 7, "width_1": 9, "out": 3},
        _mlp,
        ("width_0", "width_1"),
        {"out": "output"},
    ),
)
