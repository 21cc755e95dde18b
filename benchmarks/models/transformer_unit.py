"""The Transformer unit-scaled, in Flax linen, with u-µP's few hyperparameters.

Every tensor starts at scale one, forward and backward, at every width and depth. Layers are
Flax's own: they get their products through ``dot_general=``, and their initialisers. Parameter
names match ``transformer_linen``'s, but norms have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.models.functional import TransformerConfig, rotary
from benchmarks.models.transformer_linen import DotGeneral
from uscale_jax import numerics as un

UNIT = nn.initializers.normal(1.0)


@dataclass(frozen=True)
class Multipliers:
    """u-µP's hyperparameters but for the learning rate: how non-linear operations start.

    Each is 1 unless tuned, and what is tuned on a small model fits a large one.
    """

    ffn_act: float = 1.0
    """Of the gate before SiLU: the larger, the more like ReLU."""
    attn_softmax: float = 1.0
    """Of logits, over head_dim: the larger, the sharper attention starts."""
    residual: float = 1.0
    """What branches add to the stream over what the embedding does."""
    residual_attn_ratio: float = 1.0
    """What attention adds over what MLPs do."""
    loss_softmax: float = 1.0
    """Of the readout's logits."""


@dataclass(frozen=True)
class UnitConfig:
    """Sizes and multipliers, and what is computed with."""

    sizes: TransformerConfig
    multipliers: Multipliers = Multipliers()
    dot_general: DotGeneral = un.dot_general
    """Of linear layers in blocks; not of the readout."""
    dtype: Any = None
    """Of activations; None: that of the parameters."""


def linear(config: UnitConfig, layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return one of Flax's linear layers at scale one."""
    how = {"dot_general": config.dot_general, "kernel_init": UNIT, "dtype": config.dtype}
    return partial(layer, use_bias=False, **how)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions."""

    config: UnitConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the mixed values, shaped like ``x``."""
        c, project = self.config.sizes, linear(self.config, nn.DenseGeneral)
        query = project((c.heads, c.head_dim), name="query")(x)
        key = project((c.kv_heads, c.head_dim), name="key")(x)
        value = project((c.kv_heads, c.head_dim), name="value")(x)
        positions = jnp.arange(x.shape[1])
        query, key = (rotary(each, positions, c.rope_base) for each in (query, key))
        mult = self.config.multipliers.attn_softmax
        mixed = un.attention(query, key, value, is_causal=True, mult=mult)
        return project(c.hidden, axis=(-2, -1), name="out")(mixed)


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    config: UnitConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array shaped like ``x``."""
        c, dense = self.config.sizes, linear(self.config, nn.Dense)
        gate, up = dense(c.mlp, name="gate")(x), dense(c.mlp, name="up")(x)
        gated = un.silu_glu(up, gate, mult=self.config.multipliers.ffn_act)
        return dense(c.hidden, name="down")(gated)


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP, each at its share of the stream."""

    config: UnitConfig
    taus: tuple[float, float]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the residual stream after the block."""
        sublayers = Attention(self.config, name="attention"), MLP(self.config, name="mlp")
        for sublayer, tau in zip(sublayers, self.taus, strict=True):
            branch, skip = un.residual_split(x, tau)
            x = un.residual_add(sublayer(un.rms_norm(branch)), skip, tau)
        return x


class Embed(nn.Module):
    """Rows of a table."""

    config: UnitConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return a row for each token."""
        c = self.config.sizes
        table = self.param("embedding", UNIT, (c.vocab, c.hidden))
        rows = un.embedding(tokens, table)  # whose gradients are added up before they are rounded
        return rows.astype(self.config.dtype or rows.dtype)


class Readout(nn.Module):
    """The last linear layer, at scale hidden^-½ at first."""

    config: UnitConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits."""
        kernel = self.param("kernel", UNIT, (x.shape[-1], self.config.sizes.vocab))
        return un.linear_readout(x, kernel.astype(x.dtype))


class UnitTransformer(nn.Module):
    """Token ids (batch, seq) to next-token logits (batch, seq, vocab)."""

    config: UnitConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits; what they mean, :func:`loss` says."""
        m = self.config.multipliers
        x = Embed(self.config, name="embed")(tokens)
        taus = un.residual_taus(self.config.sizes.layers, m.residual, m.residual_attn_ratio)
        for layer, each in enumerate(taus):
            x = Block(self.config, each, name=f"blocks_{layer}")(x)
        return Readout(self.config, name="readout")(un.rms_norm(x))


def loss(config: UnitConfig, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean cost in nats per token, whose gradient has scale one."""
    return un.cross_entropy(logits, targets, mult=config.multipliers.loss_softmax)


def rate_divisors(config: UnitConfig, params: Any) -> Any:
    """Return what every leaf's learning rate is divided by under Adam, for ``us.unit_scale_lr``.

    √fan_in in blocks, and √layers as all are on residual branches; √hidden for the embedding; 1 for
    the readout.
    """
    sizes = config.sizes
    fan_in = {"out": sizes.heads * sizes.head_dim, "down": sizes.mlp}

    def divisor(path: Any, leaf: Any) -> float:
        del leaf
        names = [entry.key for entry in path]
        if "readout" in names:
            return 1.0
        depth = 1 if "embed" in names else sizes.layers
        return math.sqrt(fan_in.get(names[-2], sizes.hidden) * depth)

    return jax.tree_util.tree_map_with_path(divisor, params)
