"""Decoder-only Transformer language model in Flax nnx."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx

from benchmarks.models.functional import (
    EMBEDDING_STDDEV,
    TransformerConfig,
    causal_attention,
    swiglu,
)


class Attention(nnx.Module):
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        """Create the four projections, none with a bias."""
        project = partial(nnx.LinearGeneral, config.hidden, use_bias=False, rngs=rngs)
        self.query = project((config.heads, config.head_dim))
        self.key = project((config.kv_heads, config.head_dim))
        self.value = project((config.kv_heads, config.head_dim))
        self.out = nnx.LinearGeneral(
            (config.heads, config.head_dim), config.hidden, axis=(-2, -1), use_bias=False, rngs=rngs
        )
        self.rope_base = config.rope_base

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the mixed values, shaped like ``x``."""
        mixed = causal_attention(self.query(x), self.key(x), self.value(x), self.rope_base)
        return self.out(mixed)


class MLP(nnx.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        """Create the gate, up and down projections, none with a bias."""
        self.gate = nnx.Linear(config.hidden, config.mlp, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(config.hidden, config.mlp, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(config.mlp, config.hidden, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array shaped like ``x``."""
        return self.down(swiglu(self.gate(x), self.up(x)))


class Block(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        """Create both sublayers and their norms."""
        self.attention_norm = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the residual stream after the block."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nnx.Module):
    """Token ids (batch, seq) to next-token logits (batch, seq, vocab)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        """Create the embedding, the blocks and an untied readout."""
        embedding_init = nnx.initializers.normal(EMBEDDING_STDDEV)
        self.embed = nnx.Embed(
            config.vocab, config.hidden, embedding_init=embedding_init, rngs=rngs
        )
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.readout = nnx.Linear(config.hidden, config.vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))
