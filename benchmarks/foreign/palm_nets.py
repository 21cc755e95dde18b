"""The language model of PaLM-jax: multi-query attention beside a gated network."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks.foreign.registry import by_name
from benchmarks.zoo.registry import Built, Model, Sizes, tokens

REQUIRES = ("palm_jax",)


def _build(s: Sizes) -> Built:
    from palm_jax.palm_lite import PaLM

    net = PaLM(
        num_tokens=s["vocabulary"],
        dim=s["width"],
        dim_head=s["head_dim"],
        depth=2,
        heads=s["heads"],
        key=jax.random.PRNGKey(0),
        ff_mult=s["inner_per_width"],
        max_seq_len=s["length"],
    )
    ids = tokens(s["batch"], s["length"], vocabulary=s["vocabulary"])

    def call(m: Any, x: Any) -> Any:
        return jax.vmap(lambda one: type(m).__call__.__wrapped__(m, one))(x)

    object.__setattr__(net, "attn_bias", np.asarray(net.attn_bias))
    return by_name(net, call, ids)


MODELS = (
    Model(
        "palm_jax PaLM",
        {"batch": 2, "length": 5, "vocabulary": 11, "width": 12, "heads": 4, "head_dim": 6}
        | {"inner_per_width": 3},
        _build,
        ("width", "head_dim", "inner_per_width"),
        {"vocabulary": "output", "heads": "array of numbers"},
    ),
)
