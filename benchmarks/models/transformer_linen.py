"""The same Transformer in Flax linen; parameter names match the nnx module's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from benchmarks.models.functional import (
    EMBEDDING_STDDEV,
    TransformerConfig,
    causal_attention,
    swiglu,
)

DotGeneral = Callable[..., jax.Array]


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions."""

    config: TransformerConfig
    dot_general: DotGeneral | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the mixed values, shaped like ``x``."""
        c = self.config
        project = partial(
            nn.DenseGeneral, use_bias=False, dot_general=self.dot_general, dtype=self.dtype
        )
        query = project((c.heads, c.head_dim), name="query")(x)
        key = project((c.kv_heads, c.head_dim), name="key")(x)
        value = project((c.kv_heads, c.head_dim), name="value")(x)
        mixed = causal_attention(query, key, value, c.rope_base)
        return project(c.hidden, axis=(-2, -1), name="out")(mixed)


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    config: TransformerConfig
    dot_general: DotGeneral | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array shaped like ``x``."""
        dense = partial(nn.Dense, use_bias=False, dot_general=self.dot_general, dtype=self.dtype)
        gate = dense(self.config.mlp, name="gate")(x)
        up = dense(self.config.mlp, name="up")(x)
        return dense(self.config.hidden, name="down")(swiglu(gate, up))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    config: TransformerConfig
    dot_general: DotGeneral | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the residual stream after the block."""
        how = self.config, self.dot_general, self.dtype
        normed = nn.RMSNorm(dtype=self.dtype, name="attention_norm")(x)
        x = x + Attention(*how, name="attention")(normed)
        normed = nn.RMSNorm(dtype=self.dtype, name="mlp_norm")(x)
        return x + MLP(*how, name="mlp")(normed)


class Transformer(nn.Module):
    """Token ids (batch, seq) to next-token logits (batch, seq, vocab).

    ``dot_general`` multiplies in the linear layers of blocks, not in the readout; ``dtype`` is that
    of activations, by default that of the parameters.
    """

    config: TransformerConfig
    dot_general: DotGeneral | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits."""
        c = self.config
        embedding_init = nn.initializers.normal(EMBEDDING_STDDEV)
        x = nn.Embed(c.vocab, c.hidden, embedding_init=embedding_init, name="embed")(tokens)
        x = x.astype(self.dtype or x.dtype)
        for layer in range(c.layers):
            x = Block(c, self.dot_general, self.dtype, name=f"blocks_{layer}")(x)
        x = nn.RMSNorm(dtype=self.dtype, name="norm")(x)
        return nn.Dense(c.vocab, use_bias=False, dtype=self.dtype, name="readout")(x)
