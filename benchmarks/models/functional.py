"""The Transformer's arithmetic as pure functions, shared by the nnx and the linen module."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

EMBEDDING_STDDEV = 0.5


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a decoder-only Transformer; no two need to be equal."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        """Reject sizes that grouped-query attention or RoPE cannot use."""
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs")


def rotary(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotate the halves of the last axis of ``x`` (batch, seq, heads, head_dim) by position.

    Returns an array like ``x`` whose dot products depend on positions only through their
    difference.
    """
    half = x.shape[-1] // 2
    inverse_wavelength = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.outer(positions.astype(jnp.float32), inverse_wavelength)[None, :, None, :]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, rope_base: float
) -> jax.Array:
    """Return grouped-query attention outputs (batch, seq, heads, head_dim), no look-ahead."""
    positions = jnp.arange(query.shape[1])
    query, key = rotary(query, positions, rope_base), rotary(key, positions, rope_base)
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return the gated activation SiLU(gate) · up."""
    return jax.nn.silu(gate) * up
