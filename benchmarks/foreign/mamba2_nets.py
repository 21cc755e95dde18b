"""The language model of mamba2-jax."""

from __future__ import annotations

from benchmarks.foreign.nnx_modules import nnx_built
from benchmarks.zoo.registry import Built, Model, Sizes, tokens

REQUIRES = ("mamba2_jax",)


def _build(s: Sizes) -> Built:
    from flax import nnx
    from mamba2_jax import modeling

    config = modeling.Mamba2Config(
        vocab_size=s["vocabulary"],
        hidden_size=s["width"],
        state_size=s["state"],
        head_dim=s["head_dim"],
        chunk_size=3,
        expand=(s["heads"] * s["head_dim"] + 0.5) / s["width"],  # is rounded down
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )
    net = modeling.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    ids = tokens(s["batch"], s["length"], vocabulary=s["vocabulary"])
    return nnx_built(net, lambda m, x: m(x)["logits"], ids)


MODELS = (
    Model(
        "mamba2_jax Mamba2",
        {"batch": 2, "length": 6, "vocabulary": 11, "width": 10, "heads": 4, "head_dim": 7}
        | {"state": 5},
        _build,
        ("width", "heads", "head_dim"),
        # `state` could grow, but an einsum of three arrays chooses its order by the sizes.
        {"vocabulary": "output", "state": "einsum"},
    ),
)
