"""BERT in Flax linen, as sentence-transformers uses it: one unit vector for every sentence."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

EPSILON = 1e-12


@dataclass(frozen=True)
class BertConfig:
    """Sizes of an encoder; ``heads * head_dim`` need not be ``hidden``."""

    vocab: int
    positions: int
    types: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    mlp: int


def layer_norm(name: str) -> nn.LayerNorm:
    """Return BERT's LayerNorm, its variance computed from the differences to the mean."""
    return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Self-attention in both directions, to the places where ``mask`` is true."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the mixed values, shaped like ``x``; ``mask`` is bool[batch, length]."""
        c = self.config
        query = nn.DenseGeneral((c.heads, c.head_dim), name="query")(x)
        key = nn.DenseGeneral((c.heads, c.head_dim), name="key")(x)
        value = nn.DenseGeneral((c.heads, c.head_dim), name="value")(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / c.head_dim**0.5
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
        return nn.DenseGeneral(c.hidden, axis=(-2, -1), name="out")(mixed)


class Layer(nn.Module):
    """Attention, then a perceptron, a LayerNorm after each sum."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        c = self.config
        x = layer_norm("attention_norm")(x + Attention(c, name="attention")(x, mask))
        y = nn.gelu(nn.Dense(c.mlp, name="up")(x), approximate=False)
        return layer_norm("mlp_norm")(x + nn.Dense(c.hidden, name="down")(y))


class Bert(nn.Module):
    """Token ids and a mask, (batch, length) each, to one unit vector per sentence.

    ``apply(params, tokens, mask, method="states")`` gives the vectors of the tokens instead, and
    ``method="similarities"`` the cosines of all pairs of sentences. All tokens are of type 0.
    """

    config: BertConfig

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Return float[batch, hidden], the means of the tokens' vectors, of length 1."""
        states = self.states(tokens, mask)
        weights = mask.astype(states.dtype)[..., None]
        mean = jnp.sum(states * weights, 1) / jnp.maximum(jnp.sum(weights, 1), 1)
        length = jnp.sqrt(jnp.sum(mean**2, -1, keepdims=True))
        return mean / jnp.maximum(length, EPSILON)

    def similarities(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Return float[batch, batch], the cosines of the sentences."""
        vectors = self(tokens, mask)
        return vectors @ vectors.T

    @nn.compact
    def states(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Return float[batch, length, hidden]; what stands where the mask is false is no use."""
        c = self.config
        if tokens.shape[1] > c.positions:
            raise ValueError(f"{tokens.shape[1]} tokens, but only {c.positions} positions")
        places = nn.Embed(c.positions, c.hidden, name="positions")(jnp.arange(tokens.shape[1]))
        types = nn.Embed(c.types, c.hidden, name="types")(jnp.zeros_like(tokens))
        x = nn.Embed(c.vocab, c.hidden, name="tokens")(tokens) + places[None] + types
        x = layer_norm("norm")(x)
        for layer in range(c.layers):
            x = Layer(c, name=f"layers_{layer}")(x, mask.astype(bool))
        return x
