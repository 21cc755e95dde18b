"""The transformer of Google DeepMind's gemma."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.foreign.registry import floating
from benchmarks.zoo.registry import Built, Model, Sizes, tokens

REQUIRES = ("gemma",)


def _build(s: Sizes) -> Built:
    from gemma import gm
    from gemma.gm.nn import _config, _modules, _transformer

    config = _config.TransformerConfig(
        num_embed=s["vocabulary"],
        embed_dim=s["width"],
        hidden_dim=s["inner"],
        num_heads=s["kv_heads"] * s["per_kv"],
        head_dim=s["head_dim"],
        num_kv_heads=s["kv_heads"],
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        attention_types=(
            _modules.AttentionType.LOCAL_SLIDING,
            _modules.AttentionType.GLOBAL,
        ),
        sliding_window_size=3,
    )
    del gm

    def module() -> Any:
        return _transformer.Transformer(config=config, dtype=floating())

    ids = tokens(s["batch"], s["length"], vocabulary=s["vocabulary"])
    params = jax.eval_shape(lambda: module().init(jax.random.key(0), ids))
    return Built(lambda p, x: module().apply(p, x).logits, params, (ids,))


MODELS = (
    Model(
        "gemma Transformer",
        {"batch": 2, "length": 5, "vocabulary": 11, "width": 12, "kv_heads": 3, "per_kv": 4}
        | {"head_dim": 6, "inner": 21},
        _build,
        ("width", "kv_heads", "per_kv", "inner"),
        {"vocabulary": "output", "head_dim": "counts it"},
    ),
)
