"""The same Transformer in Flax linen; parameter names match the nnx module's."""

from __future__ import annotations

import jax
from flax import linen as nn

from benchmarks.models.functional import (
    EMBEDDING_STDDEV,
    TransformerConfig,
    causal_attention,
    swiglu,
)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the mixed values, shaped like ``x``."""
        c = self.config
        query = nn.DenseGeneral((c.heads, c.head_dim), use_bias=False, name="query")(x)
        key = nn.DenseGeneral((c.kv_heads, c.head_dim), use_bias=False, name="key")(x)
        value = nn.DenseGeneral((c.kv_heads, c.head_dim), use_bias=False, name="value")(x)
        mixed = causal_attention(query, key, value, c.rope_base)
        return nn.DenseGeneral(c.hidden, axis=(-2, -1), use_bias=False, name="out")(mixed)


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array shaped like ``x``."""
        gate = nn.Dense(self.config.mlp, use_bias=False, name="gate")(x)
        up = nn.Dense(self.config.mlp, use_bias=False, name="up")(x)
        return nn.Dense(self.config.hidden, use_bias=False, name="down")(swiglu(gate, up))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the residual stream after the block."""
        normed = nn.RMSNorm(name="attention_norm")(x)
        x = x + Attention(self.config, name="attention")(normed)
        return x + MLP(self.config, name="mlp")(nn.RMSNorm(name="mlp_norm")(x))


class Transformer(nn.Module):
    """Token ids (batch, seq) to next-token logits (batch, seq, vocab)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits."""
        c = self.config
        embedding_init = nn.initializers.normal(EMBEDDING_STDDEV)
        x = nn.Embed(c.vocab, c.hidden, embedding_init=embedding_init, name="embed")(tokens)
        for layer in range(c.layers):
            x = Block(c, name=f"blocks_{layer}")(x)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(c.vocab, use_bias=False, name="readout")(x)
