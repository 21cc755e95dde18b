"""Recurrent networks: the cells of Flax, hand-written ones, state-space models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.zoo.registry import Built, Model, Sizes, built, floats, tokens
from benchmarks.zoo.vision import normalise

SEQUENCE = {"batch": 2, "time": 6, "features": 4, "out": 5}
VOCABULARY = 11

_kernel = nn.initializers.lecun_normal()
_normal = nn.initializers.normal(0.5)


def run(cell: nn.RNNCellBase, x: jax.Array) -> jax.Array:
    """Return the states of a cell over ``x`` float[batch, time, ...], from zeros like ``x``."""
    return nn.RNN(cell)(x, initial_carry=zero_carry(cell, x))


def zero_carry(cell: nn.RNNCellBase, x: jax.Array) -> object:
    """Return a carry of zeros in the dtype of ``x``: the cell's own has the parameters'."""
    shape = x.shape[:1] + x.shape[2:]
    shapes = jax.eval_shape(lambda: cell.initialize_carry(jax.random.key(0), shape))
    return jax.tree.map(lambda carry: jnp.zeros(carry.shape, x.dtype), shapes)


class Stacked(nn.Module):
    """Recurrent layers and a linear readout of every step."""

    cell: Callable[[int], nn.RNNCellBase]
    hidden: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, time, ..., out]."""
        for hidden in self.hidden:
            x = run(self.cell(hidden), x)
        return nn.Dense(self.out, name="readout")(x)


class Language(nn.Module):
    """An embedding, an LSTM, and logits over the vocabulary."""

    vocabulary: int
    embedding: int
    hidden: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Return float[batch, time, vocabulary]."""
        x = nn.Embed(self.vocabulary, self.embedding)(ids)
        x = run(nn.OptimizedLSTMCell(self.hidden), x)
        return nn.Dense(self.vocabulary, name="readout")(x)


class Bidirectional(nn.Module):
    """An LSTM forward and a GRU backward, their states concatenated."""

    forward: int
    backward: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, time, out]."""
        cells = nn.OptimizedLSTMCell(self.forward), nn.GRUCell(self.backward)
        carries = tuple(zero_carry(cell, x) for cell in cells)
        states = nn.Bidirectional(*map(nn.RNN, cells))(x, initial_carry=carries)
        return nn.Dense(self.out, name="readout")(states)


class FusedLSTM(nn.Module):
    """An LSTM with one kernel for inputs, state and all four gates; the last state is read."""

    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        kernel = self.param(
            "kernel", _kernel, (x.shape[-1] + self.hidden, 4 * self.hidden), x.dtype
        )
        bias = self.param("bias", nn.initializers.zeros, (4 * self.hidden,), x.dtype)

        def step(carry: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[object, None]:
            memory, state = carry
            gates = jnp.concatenate([x, state], axis=-1) @ kernel + bias[None]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            memory = nn.sigmoid(f + 1.0) * memory + nn.sigmoid(i) * jnp.tanh(g)
            return (memory, nn.sigmoid(o) * jnp.tanh(memory)), None

        zeros = jnp.zeros((x.shape[0], self.hidden), x.dtype)
        (_, state), _ = jax.lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))
        return nn.Dense(self.out, name="readout")(state)


class Mamba(nn.Module):
    """A Mamba block without its residual; ``joined`` projects step, input and output at once."""

    inner: int
    state: int
    rank: int
    joined: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x`` float[batch, time, width]."""
        y, gate = jnp.split(nn.Dense(2 * self.inner, use_bias=False, name="in")(x), 2, axis=-1)
        y = nn.Conv(
            self.inner, (3,), padding="CAUSAL", feature_group_count=self.inner, name="conv"
        )(y)
        y = self._scan(nn.silu(y)) * nn.silu(gate)
        return nn.Dense(x.shape[-1], use_bias=False, name="out")(y)

    def _projections(self, u: jax.Array) -> list[jax.Array]:
        widths = self.rank, self.state, self.state
        if self.joined:
            projected = nn.Dense(sum(widths), use_bias=False, name="x_proj")(u)
            return jnp.split(projected, (self.rank, self.rank + self.state), axis=-1)
        dense = partial(nn.Dense, use_bias=False)
        return [dense(w, name=n)(u) for w, n in zip(widths, ("rank", "b", "c"), strict=True)]

    def _scan(self, u: jax.Array) -> jax.Array:
        rank, b, c = self._projections(u)
        dt = nn.softplus(nn.Dense(self.inner, name="dt")(rank))
        rates = -jnp.exp(self.param("A_log", _normal, (self.inner, self.state), u.dtype))
        skip = self.param("D", nn.initializers.ones, (self.inner,), u.dtype)

        def step(h: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            u, dt, b, c = now
            h = jnp.exp(dt[..., None] * rates[None]) * h + (dt * u)[..., None] * b[:, None]
            return h, jnp.einsum("bin,bn->bi", h, c)

        h = jnp.zeros((u.shape[0], self.inner, self.state), u.dtype)
        _, y = jax.lax.scan(step, h, tuple(a.swapaxes(0, 1) for a in (u, dt, b, c)))
        return y.swapaxes(0, 1) + u * skip[None, None]


class RGLRU(nn.Module):
    """The real-gated linear recurrence of Griffin, by an associative scan."""

    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x`` float[batch, time, width]."""
        y, gate = nn.Dense(self.inner, name="y")(x), nn.gelu(nn.Dense(self.inner, name="gate")(x))
        r = nn.sigmoid(nn.Dense(self.inner, name="recurrence_gate")(y))
        i = nn.sigmoid(nn.Dense(self.inner, name="input_gate")(y))
        rate = nn.softplus(self.param("rate", _normal, (self.inner,), x.dtype))
        decay = jnp.exp(-2.0 * r * rate[None, None])
        y = jnp.sqrt(1.0 - decay**2) * (i * y)
        _, y = jax.lax.associative_scan(_compose, (decay, y), axis=1)
        return nn.Dense(x.shape[-1], name="out")(y * gate)


def _compose(
    first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return the affine map that applies ``first``, then ``second``."""
    return first[0] * second[0], first[1] * second[0] + second[1]


class LinearAttention(nn.Module):
    """Causal attention with elu + 1 features, its matrix state carried by a scan."""

    key: int
    value: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x`` float[batch, time, width]."""
        q = nn.elu(nn.Dense(self.key, name="query")(x)) + 1.0
        k = nn.elu(nn.Dense(self.key, name="key")(x)) + 1.0
        v = nn.Dense(self.value, name="value")(x)

        def step(carry: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]) -> tuple:
            state, total = carry
            q, k, v = now
            state, total = state + k[:, :, None] * v[:, None], total + k
            sums = jnp.sum(q * total, axis=-1, keepdims=True)
            return (state, total), jnp.einsum("bk,bkv->bv", q, state) / sums

        state = jnp.zeros((x.shape[0], self.key, self.value), x.dtype)
        carry = (state, state[..., 0])
        _, y = jax.lax.scan(step, carry, tuple(a.swapaxes(0, 1) for a in (q, k, v)))
        return nn.Dense(x.shape[-1], name="out")(y.swapaxes(0, 1))


class RWKV(nn.Module):
    """The time mixing of RWKV-4: token shift, a decaying weighted mean, a receptance gate."""

    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x`` float[batch, time, width]."""
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        r, k, v = (self._project(name, x, before) for name in ("receptance", "key", "value"))
        decay = -jnp.exp(self.param("decay", _normal, (self.inner,), x.dtype))[None]
        bonus = self.param("bonus", _normal, (self.inner,), x.dtype)[None]

        def step(carry: tuple[jax.Array, ...], now: tuple[jax.Array, jax.Array]) -> tuple:
            top, bottom, highest = carry
            k, v = now
            y = _sums(top, bottom, highest, k + bonus, v)
            carry = _sums(top, bottom, highest + decay, k, v)
            return carry, y[0] / y[1]

        zeros = jnp.zeros((x.shape[0], self.inner), x.dtype)
        _, y = jax.lax.scan(step, (zeros, zeros, zeros - 1e4), (k.swapaxes(0, 1), v.swapaxes(0, 1)))
        return nn.Dense(x.shape[-1], use_bias=False, name="out")(nn.sigmoid(r) * y.swapaxes(0, 1))

    def _project(self, name: str, x: jax.Array, before: jax.Array) -> jax.Array:
        mix = nn.sigmoid(self.param(f"mix_{name}", _normal, x.shape[-1:], x.dtype))[None, None]
        return nn.Dense(self.inner, use_bias=False, name=name)(x * mix + before * (1.0 - mix))


def _sums(
    top: jax.Array, bottom: jax.Array, highest: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return weighted sums with one more value, and the exponent both are divided by."""
    highest, before = jnp.maximum(highest, key), highest
    old, new = jnp.exp(before - highest), jnp.exp(key - highest)
    return old * top + new * value, old * bottom + new, highest


class Residuals(nn.Module):
    """A projection, a pre-norm residual block, and a normalised readout of every step."""

    block: Callable[[], nn.Module]
    width: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, time, out]."""
        x = nn.Dense(self.width, name="embed")(x)
        x = x + self.block(name="block")(normalise(nn.RMSNorm(name="norm"), x))
        return nn.Dense(self.out, name="readout")(normalise(nn.RMSNorm(name="final"), x))


def _model(name: str, hidden: Sizes, make: Callable[[Sizes], nn.Module]) -> Model:
    """Return a model on sequences in which every hidden size is free."""

    def build(sizes: Sizes) -> Built:
        return built(make(sizes), floats(sizes["batch"], sizes["time"], sizes["features"]))

    return Model(name, SEQUENCE | dict(hidden), build, tuple(hidden), {"out": "output"})


def _stacked(name: str, cell: Callable[[int], nn.RNNCellBase], *hidden: int) -> Model:
    names = {f"hidden_{i}": size for i, size in enumerate(hidden)}
    return _model(name, names, lambda s: Stacked(cell, (*(s[n] for n in names),), s["out"]))


def _block(name: str, hidden: Sizes, block: Callable[[Sizes], Callable[[], nn.Module]]) -> Model:
    sizes = {"width": 7, **hidden}
    return _model(name, sizes, lambda s: Residuals(block(s), s["width"], s["out"]))


def _mamba(name: str, joined: bool) -> Model:
    def block(s: Sizes) -> Callable[[], nn.Module]:
        return partial(Mamba, s["inner"], s["state"], s["rank"], joined)

    return _block(name, {"inner": 9, "state": 8, "rank": 3}, block)


def _conv_lstm() -> Model:
    """Return a convolutional LSTM on short films."""
    sizes = {"batch": 2, "time": 3, "side": 6, "colours": 4, "hidden": 7, "out": 5}
    cell = partial(nn.ConvLSTMCell, kernel_size=(3, 3))

    def build(s: Sizes) -> Built:
        film = floats(s["batch"], s["time"], s["side"], s["side"], s["colours"])
        return built(Stacked(cell, (s["hidden"],), s["out"]), film)

    return Model("conv lstm", sizes, build, ("hidden",), {"out": "output"})


def _language() -> Model:
    sizes = {"batch": 2, "time": 6, "vocabulary": VOCABULARY, "embedding": 7, "hidden": 9}

    def build(s: Sizes) -> Built:
        # Ids stay below the smallest vocabulary, so that a larger one gets the same inputs.
        ids = tokens(s["batch"], s["time"], vocabulary=VOCABULARY)
        return built(Language(s["vocabulary"], s["embedding"], s["hidden"]), ids)

    free = ("embedding", "hidden")
    return Model("lstm language", sizes, build, free, {"vocabulary": "output"})


MODELS = (
    _stacked("lstm", nn.LSTMCell, 7),
    _stacked("optimized lstm", nn.OptimizedLSTMCell, 7),
    _stacked("gru", nn.GRUCell, 7),
    _stacked("simple rnn", nn.SimpleCell, 7),
    _stacked("mgu", nn.MGUCell, 7),
    _stacked("stacked lstm", nn.OptimizedLSTMCell, 7, 9),
    _model(
        "bidirectional",
        {"forward": 7, "backward": 9},
        lambda s: Bidirectional(s["forward"], s["backward"], s["out"]),
    ),
    _model("fused lstm", {"hidden": 7}, lambda s: FusedLSTM(s["hidden"], s["out"])),
    _conv_lstm(),
    _language(),
    _mamba("mamba", joined=True),
    _mamba("mamba separate projections", joined=False),
    _block("rg-lru", {"inner": 9}, lambda s: partial(RGLRU, s["inner"])),
    _block("rwkv", {"inner": 9}, lambda s: partial(RWKV, s["inner"])),
    _block(
        "linear attention",
        {"key": 8, "value": 9},
        lambda s: partial(LinearAttention, s["key"], s["value"]),
    ),
)
