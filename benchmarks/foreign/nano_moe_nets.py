"""The mixture of experts of nano-moe-jax."""

from __future__ import annotations

from benchmarks.zoo.registry import Built, Model, Sizes, built, tokens

REQUIRES = ("nano_moe",)


def _build(s: Sizes) -> Built:
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    config = NanoMoEConfig(
        vocab_size=s["vocabulary"],
        n_layers=2,
        n_heads=s["heads"],
        d_model=s["heads"] * s["head_dim"],
        d_ff=s["inner"],
        n_experts=s["experts"],
        top_k=2,
        block_size=s["places"],
    )
    return built(
        NanoMoE(config),
        tokens(s["batch"], s["length"], vocabulary=s["vocabulary"]),
        deterministic=True,
    )


MODELS = (
    Model(
        "nano_moe NanoMoE",
        {"batch": 2, "length": 5, "vocabulary": 11, "heads": 3, "head_dim": 4, "inner": 21}
        | {"experts": 8, "places": 9},
        _build,
        ("heads", "head_dim", "inner"),
        {"vocabulary": "output", "experts": "different parameters"},
    ),
)
