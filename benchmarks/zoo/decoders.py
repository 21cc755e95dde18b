"""Decoder-only language models: GPT-2, NeoX, GPT-J, PaLM, BLOOM, Llama, Gemma, LoRA, DeepSeek."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models.functional import rotary
from benchmarks.zoo.attention import MLP, Gated, Layers
from benchmarks.zoo.registry import Built, Model, Sizes, built, tokens
from benchmarks.zoo.vision import normalise

VOCABULARY = 19
_WIDTHS = {"width": 11, "hidden_0": 13, "hidden_1": 17}
_GROUPED = {"kv_heads": 5, "groups": 3}
_BASE = 10_000.0

_normal = nn.initializers.normal(0.5)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int = 0, bias: jax.Array | None = None
) -> jax.Array:
    """Return causal attention over ``window`` steps (0: all) of float[batch, time, heads, size]."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    seen = jnp.tril(jnp.ones(logits.shape[2:], bool))
    seen = seen & jnp.triu(seen, 1 - window) if window else seen
    weights = nn.softmax(jnp.where(seen[None, None], logits, jnp.finfo(logits.dtype).min))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def rotate(x: jax.Array) -> jax.Array:
    """Return ``x`` float[batch, time, heads, size], halves rotated by the step."""
    return rotary(x, jnp.arange(x.shape[1]), _BASE)


def rotate_pairs(x: jax.Array) -> jax.Array:
    """Return ``x`` float[batch, time, heads, size], neighbours rotated by the step (GPT-J)."""
    rates = _BASE ** (-jnp.arange(0, x.shape[-1], 2, dtype=jnp.float32) / x.shape[-1])
    angle = jnp.outer(jnp.arange(x.shape[1], dtype=jnp.float32), rates)
    angle = jnp.repeat(angle, 2, axis=1)[None, :, None]
    other = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return x * jnp.cos(angle).astype(x.dtype) + other * jnp.sin(angle).astype(x.dtype)


def alibi(heads: int, x: jax.Array) -> jax.Array:
    """Return float[1, heads, time, time]: minus the distance, times a slope per head."""
    slopes = 2.0 ** (-8.0 * jnp.arange(1, heads + 1, dtype=x.dtype) / heads)
    places = jnp.arange(x.shape[1], dtype=x.dtype)
    return slopes[None, :, None, None] * (places[None] - places[:, None])[None, None]


class Fused(nn.Module):
    """Queries, keys and values from one kernel: laid out whole after whole, or head by head."""

    heads: int
    head_dim: int
    by_head: bool
    positions: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        shape = (*x.shape[:-1], self.heads, -1)
        qkv = nn.Dense(3 * self.heads * self.head_dim, name="c_attn")(x)
        if self.by_head:
            q, k, v = jnp.split(qkv.reshape(shape), 3, axis=-1)
        else:
            q, k, v = (part.reshape(shape) for part in jnp.split(qkv, 3, axis=-1))
        if self.positions == "rotary":
            q, k = rotate(q), rotate(k)
        y = attend(q, k, v, bias=alibi(self.heads, x) if self.positions == "alibi" else None)
        return nn.Dense(x.shape[-1], name="c_proj")(y.reshape(*x.shape[:-1], -1))


class Grouped(nn.Module):
    """Llama's attention: rotary positions, keys and values for groups of queries."""

    kv_heads: int
    groups: int
    head_dim: int
    normed: bool = False
    window: int = 0
    adapted: Callable[..., nn.Module] = partial(nn.DenseGeneral, use_bias=False)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``; ``normed`` normalises every query and key."""
        dense, shape = partial(nn.DenseGeneral, use_bias=False), (self.kv_heads, self.head_dim)
        q = self.adapted((self.kv_heads * self.groups, self.head_dim), name="query")(x)
        k, v = dense(shape, name="key")(x), self.adapted(shape, name="value")(x)
        if self.normed:
            q = normalise(nn.RMSNorm(name="query_norm"), q)
            k = normalise(nn.RMSNorm(name="key_norm"), k)
        k, v = self._repeated(rotate(k)), self._repeated(v)
        y = attend(rotate(q), k, v, self.window)
        return dense(x.shape[-1], (-2, -1), name="out")(y)

    def _repeated(self, x: jax.Array) -> jax.Array:
        """Repeat every head of ``x`` for the queries of its group."""
        batch, time, heads, size = x.shape
        x = jnp.broadcast_to(x[:, :, :, None], (batch, time, heads, self.groups, size))
        return x.reshape(batch, time, heads * self.groups, size)


class Adapted(nn.Module):
    """A projection with a low-rank addition, times ``alpha / rank**power``."""

    features: tuple[int, int]
    rank: int
    alpha: float
    power: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[..., *features]."""
        size = self.features[0] * self.features[1]
        a = self.param("a", _normal, (x.shape[-1], self.rank), x.dtype)
        b = self.param("b", _normal, (self.rank, size), x.dtype)
        y = nn.Dense(size, use_bias=False, name="base")(x)
        y = y + (x @ a @ b) * (self.alpha / self.rank**self.power)
        return y.reshape(*x.shape[:-1], *self.features)


class PartlyRotary(nn.Module):
    """GPT-J's attention: only the first places of a head have rotary positions."""

    heads: int
    rotary: int
    plain: int
    value: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        dense, size = partial(nn.DenseGeneral, use_bias=False), self.rotary + self.plain
        q, k = (self._rotated(dense((self.heads, size), name=name)(x)) for name in ("query", "key"))
        v = dense((self.heads, self.value), name="value")(x)
        return dense(x.shape[-1], (-2, -1), name="out")(attend(q, k, v))

    def _rotated(self, x: jax.Array) -> jax.Array:
        turned = rotate_pairs(x[..., : self.rotary])
        return jnp.concatenate([turned, x[..., self.rotary :]], axis=-1)


class Latent(nn.Module):
    """DeepSeek's attention: keys and values from one latent vector, one rotary key for all."""

    heads: int
    plain: int
    rotary: int
    value: int
    q_latent: int
    kv_latent: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        dense = partial(nn.DenseGeneral, use_bias=False)
        latent = normalise(nn.RMSNorm(name="q_norm"), dense(self.q_latent, name="q_down")(x))
        q = dense((self.heads, self.plain + self.rotary), name="q_up")(latent)
        q = jnp.concatenate([q[..., : self.plain], rotate(q[..., self.plain :])], axis=-1)
        down = dense(self.kv_latent + self.rotary, name="kv_down")(x)
        latent = normalise(nn.RMSNorm(name="kv_norm"), down[..., : self.kv_latent])
        kv = dense((self.heads, self.plain + self.value), name="kv_up")(latent)
        k, v = jnp.split(kv, (self.plain,), axis=-1)
        shared = rotate(down[..., None, self.kv_latent :])
        shared = jnp.broadcast_to(shared, (*k.shape[:-1], self.rotary))
        y = attend(q, jnp.concatenate([k, shared], axis=-1), v)
        return dense(x.shape[-1], (-2, -1), name="out")(y)


class OnePlus(nn.Module):
    """Gemma's RMSNorm, whose parameter is how far the scale is from one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        scale = self.param("scale", _normal, x.shape[-1:], x.dtype)
        x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return x * (1.0 + scale.reshape(1, 1, -1))


class Block(nn.Module):
    """Attention, then a multilayer perceptron; or both side by side behind one norm."""

    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    parallel: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        attention, mlp = self.attention(name="attention"), self.mlp(name="mlp")
        y = normalise(self.norm(name="attention_norm"), x)
        if self.parallel:
            return x + attention(y) + mlp(y)
        x = x + attention(y)
        return x + mlp(normalise(self.norm(name="mlp_norm"), x))


class Decoder(nn.Module):
    """Token vectors, blocks, a norm, and logits from the token vectors or a kernel of their own."""

    vocabulary: int
    width: int
    blocks: Layers
    norm: Callable[..., nn.Module]
    tied: bool
    context: int = 0
    multiplied: bool = False
    cap: float = 0.0

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Return float[batch, time, vocabulary]."""
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        x = embed(ids) * self.width**0.5 if self.multiplied else embed(ids)
        if self.context:
            table = self.param("positions", _normal, (self.context, self.width), x.dtype)
            x = x + table[: x.shape[1]][None]
        for block in self.blocks:
            x = block()(x)
        x = normalise(self.norm(name="norm"), x)
        readout = nn.Dense(self.vocabulary, use_bias=False, name="readout")
        logits = embed.attend(x) if self.tied else readout(x)
        return self.cap * jnp.tanh(logits / self.cap) if self.cap else logits


def _model(
    name: str,
    hidden: Sizes,
    attention: Callable[[Sizes], Callable[..., nn.Module]],
    *,
    fixed: Mapping[str, str] | None = None,
    unsaid: tuple[str, ...] = (),
    mlp: Callable[..., nn.Module] = Gated,
    norm: Callable[..., nn.Module] = nn.RMSNorm,
    parallel: bool = False,
    **options: Any,
) -> Model:
    """Return a model whose hidden sizes are all free but those in ``fixed`` and ``unsaid``."""
    hidden = _WIDTHS | dict(hidden)
    sizes = {"batch": 4, "time": 7, "vocabulary": VOCABULARY, **hidden}

    def build(s: Sizes) -> Built:
        widths = s["hidden_0"], s["hidden_1"]
        blocks = (*(partial(Block, attention(s), partial(mlp, w), norm, parallel) for w in widths),)
        context = s.get("context", 0)
        module = Decoder(s["vocabulary"], s["width"], blocks, norm, context=context, **options)
        return built(module, tokens(s["batch"], s["time"], vocabulary=VOCABULARY))

    held = {"vocabulary": "output", **(fixed or {})}
    free = tuple(size for size in hidden if size not in held and size not in unsaid)
    return Model(name, sizes, build, free, held)


def _fused(name: str, positions: str = "learned", by_head: bool = True, **options: Any) -> Model:
    """Return a model with queries, keys and values from one kernel, LayerNorms and GELU."""
    hidden = {"heads": 5, "head_dim": 12} | ({"context": 9} if positions == "learned" else {})
    fixed = {"rotary": {"head_dim": "iota"}, "alibi": {"heads": "iota"}}.get(positions)

    def attention(s: Sizes) -> Callable[..., nn.Module]:
        return partial(Fused, s["heads"], s["head_dim"], by_head, positions)

    # `context` is in neither: rows that are never read may have any size.
    options = {"fixed": fixed, "mlp": MLP, "norm": nn.LayerNorm, "unsaid": ("context",)} | options
    return _model(name, hidden, attention, **options)


def _grouped(
    name: str,
    hidden: Sizes = _GROUPED,
    attention: Callable[..., nn.Module] = Grouped,
    **options: Any,
) -> Model:
    """Return a model with rotary positions, and keys and values for groups of queries."""

    def make(s: Sizes) -> Callable[..., nn.Module]:
        return partial(attention, s["kv_heads"], s["groups"], s["head_dim"])

    hidden = dict(hidden) | {"head_dim": 12}
    return _model(name, hidden, make, **{"tied": False, **options}, fixed={"head_dim": "iota"})


def _adapted(name: str, power: float) -> Model:
    """Return a Llama with low-rank additions to queries and values, divided by ``rank**power``."""

    def make(s: Sizes) -> Callable[..., nn.Module]:
        adapted = partial(Adapted, rank=s["rank"], alpha=16.0, power=power)
        sizes = s["kv_heads"], s["groups"], s["head_dim"]
        return partial(Grouped, *sizes, adapted=adapted)

    hidden = {**_GROUPED, "head_dim": 12, "rank": 8}
    return _model(name, hidden, make, tied=False, fixed={"head_dim": "iota"})


def _partly(name: str, attention: Callable[..., nn.Module], hidden: Sizes, **options: Any) -> Model:
    """Return a model in which only the ``rotary`` places of a head have positions."""

    def make(s: Sizes) -> Callable[..., nn.Module]:
        return partial(attention, *(s[name] for name in hidden))

    return _model(name, hidden, make, tied=False, fixed={"rotary": "iota"}, **options)


_GEGLU = partial(Gated, activation=nn.gelu)
_GEMMA = {"mlp": _GEGLU, "norm": OnePlus, "multiplied": True, "cap": 5.0}
_ONE_KEY = {"kv_heads": 1, "groups": 5}

MODELS = (
    _fused("gpt-2", by_head=False, tied=True),
    _fused("gpt-2 by head", tied=True),
    _fused("gpt-neox", "rotary", parallel=True, tied=False),
    _fused("bloom", "alibi", tied=True),
    _partly(
        "gpt-j",
        PartlyRotary,
        {"heads": 5, "rotary": 6, "plain": 9, "value": 8},
        mlp=MLP,
        norm=nn.LayerNorm,
        parallel=True,
    ),
    _grouped(
        "palm", _ONE_KEY, norm=partial(nn.LayerNorm, use_bias=False), parallel=True, tied=True
    ),
    _grouped("llama"),
    _grouped("llama tied", tied=True),
    _grouped("llama query norm", attention=partial(Grouped, normed=True)),
    _grouped("mistral", attention=partial(Grouped, window=3)),
    _adapted("lora", power=1.0),
    _adapted("lora alpha", power=0.0),
    _adapted("rslora", power=0.5),
    _grouped("gemma untied", **_GEMMA),
    # Tied, the last norm's ``1 + w`` takes a factor: ``w' = (1 + w) / c - 1``.
    _grouped("gemma", tied=True, **_GEMMA),
    _grouped("gemma one key", _ONE_KEY, tied=True, **_GEMMA),
    _partly(
        "deepseek",
        Latent,
        {"heads": 5, "plain": 9, "rotary": 6, "value": 14, "q_latent": 10, "kv_latent": 12},
    ),
)
