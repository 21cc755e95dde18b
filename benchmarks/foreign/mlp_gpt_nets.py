"""The language model of mlp-gpt-jax: gated mixing of places, written with Haiku."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.zoo.registry import Built, Model, Sizes, tokens

REQUIRES = ("mlp_gpt_jax",)


def _build(s: Sizes) -> Built:
    import haiku as hk
    from mlp_gpt_jax.mlp_gpt_jax import LayerNorm, gMLP

    def forward(x: Any) -> Any:
        x = hk.Embed(s["vocabulary"], s["width"])(x)
        for i in range(2):
            x += gMLP(
                dim=s["width"],
                dim_ff=2 * s["inner"],
                seq_len=s["length"],
                attn_dim=s["attention"],
                name=f"gmlp{i}",
            )(x)
        return hk.Linear(s["vocabulary"])(LayerNorm()(x))

    net = hk.without_apply_rng(hk.transform(forward))
    ids = tokens(s["length"], vocabulary=s["vocabulary"])
    return Built(net.apply, jax.eval_shape(net.init, jax.random.key(0), ids), (ids,))


MODELS = (
    Model(
        "mlp_gpt_jax gMLP",
        {"length": 5, "vocabulary": 11, "width": 12, "inner": 7, "attention": 6},
        _build,
        ("width", "inner", "attention"),
        {"vocabulary": "output"},
    ),
)
