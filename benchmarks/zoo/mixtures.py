"""Mixtures of experts (soft, routed to the best few, switched), ensembles, products."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.zoo.registry import Built, Model, Sizes, built, floats

_normal = nn.initializers.normal(0.5)
_kernel = nn.initializers.lecun_normal(batch_axis=0)


class Experts(nn.Module):
    """As many two-layer networks as there are experts, in stacked kernels."""

    experts: int
    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[expert, rows, out] for float[expert, rows, width]."""
        shapes = (x.shape[-1], self.hidden), (self.hidden, self.out)
        up, down = (
            self.param(name, _kernel, (self.experts, *shape), x.dtype)
            for name, shape in zip(("up", "down"), shapes, strict=True)
        )
        zeros = nn.initializers.zeros
        bias = self.param("up_bias", zeros, (self.experts, self.hidden), x.dtype)
        end = self.param("down_bias", zeros, (self.experts, self.out), x.dtype)
        y = nn.gelu(jnp.einsum("erw,ewh->erh", x, up) + bias[:, None])
        return jnp.einsum("erh,eho->ero", y, down) + end[:, None]


class Soft(nn.Module):
    """All experts, weighted by a softmax."""

    experts: int
    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[rows, out]."""
        weights = nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(x))
        everything = jnp.broadcast_to(x[None], (self.experts, *x.shape))
        y = Experts(self.experts, self.hidden, self.out, name="experts")(everything)
        return jnp.einsum("re,ero->ro", weights, y)


class TopK(nn.Module):
    """The best few experts, their weights renormalised, by dense one-hot dispatch."""

    experts: int
    hidden: int
    out: int
    chosen: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[rows, out]."""
        logits, ids = jax.lax.top_k(nn.Dense(self.experts, name="router")(x), self.chosen)
        hot = jax.nn.one_hot(ids, self.experts, dtype=x.dtype)
        weights = jnp.einsum("rk,rke->re", nn.softmax(logits), hot)
        everything = jnp.broadcast_to(x[None], (self.experts, *x.shape))
        y = Experts(self.experts, self.hidden, self.out, name="experts")(everything)
        return jnp.einsum("re,ero->ro", weights, y)


class TopKGather(nn.Module):
    """The best few experts, their kernels gathered for each row."""

    experts: int
    hidden: int
    out: int
    chosen: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[rows, out]."""
        shares = nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(x))
        shares, ids = jax.lax.top_k(shares, self.chosen)
        shares = shares / shares.sum(-1, keepdims=True)
        up = self.param("up", _kernel, (self.experts, x.shape[-1], self.hidden), x.dtype)
        down = self.param("down", _kernel, (self.experts, self.hidden, self.out), x.dtype)
        y = nn.silu(jnp.einsum("rw,rkwh->rkh", x, up[ids]))
        return jnp.einsum("rkh,rkho->ro", shares[..., None] * y, down[ids])


class Switch(nn.Module):
    """One expert per row, each with room for ``capacity`` rows; the rest pass by."""

    experts: int
    hidden: int
    capacity: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x`` float[rows, width]."""
        shares = nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(x))
        hot = jax.nn.one_hot(jnp.argmax(shares, axis=-1), self.experts, dtype=x.dtype)
        place = jnp.sum((jnp.cumsum(hot, axis=0) - 1.0) * hot, axis=-1).astype(jnp.int32)
        room = jax.nn.one_hot(place, self.capacity, dtype=x.dtype)  # zeros beyond the capacity
        dispatch = jnp.einsum("re,rc->rec", hot, room)
        y = jnp.einsum("rec,rw->ecw", dispatch, x)
        y = Experts(self.experts, self.hidden, x.shape[-1], name="experts")(y)
        return jnp.einsum("rec,ecw->rw", dispatch, y) * shares.max(-1, keepdims=True)


class Ensemble(nn.Module):
    """Networks side by side under ``jax.vmap``; their mean, or all of them."""

    members: int
    hidden: int
    out: int
    mean: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out], or float[members, batch, out]."""
        up = self.param("up", _normal, (self.members, x.shape[-1], self.hidden), x.dtype)
        down = self.param("down", _normal, (self.members, self.hidden, self.out), x.dtype)
        y = jax.vmap(lambda u, d: jnp.tanh(x @ u) @ d)(up, down)
        return y.mean(0) if self.mean else y


class Memory(nn.Module):
    """Slots that are weighted by a softmax over their keys, and summed."""

    query: int
    slots: int
    value: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        query = nn.Dense(self.query, name="query")(x)
        keys = self.param("keys", _normal, (self.slots, self.query), x.dtype)
        values = self.param("values", _normal, (self.slots, self.value), x.dtype)
        read = nn.softmax(query @ keys.T) @ values
        return nn.Dense(self.out, name="readout")(nn.relu(read))


class Bilinear(nn.Module):
    """Products of two hidden layers, contracted by one kernel of three axes."""

    left: int
    right: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        a = nn.tanh(nn.Dense(self.left, name="left")(x))
        b = nn.tanh(nn.Dense(self.right, name="right")(x))
        kernel = self.param("kernel", _normal, (self.left, self.right, self.out), x.dtype)
        return jnp.einsum("bj,bjo->bo", b, jnp.einsum("bi,ijo->bjo", a, kernel))


class Mixture(nn.Module):
    """A hidden layer, a mixture (or two) on a residual stream, and a readout."""

    width: int
    make: Callable[[int, str], nn.Module]
    hidden: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[rows, out]."""
        x = nn.Dense(self.width, name="embed")(x)
        for i, hidden in enumerate(self.hidden):
            x = x + self.make(hidden, f"mixture_{i}")(x)
        return nn.Dense(self.out, name="readout")(nn.relu(x))


def _model(
    name: str,
    more: Sizes,
    make: Callable[[Sizes], Callable[[int, str], nn.Module]],
    free: tuple[str, ...] = (),
    fixed: Mapping[str, str] | None = None,
) -> Model:
    """Return a model of two mixtures; width and the experts' widths are free in all."""
    widths = {"width": 7, "hidden_0": 8, "hidden_1": 9}
    sizes = {"rows": 11, "features": 4, **widths, **more, "out": 5}

    def build(s: Sizes) -> Built:
        module = Mixture(s["width"], make(s), (s["hidden_0"], s["hidden_1"]), s["out"])
        return built(module, floats(s["rows"], s["features"]))

    return Model(name, sizes, build, (*widths, *free), {"out": "output", **(fixed or {})})


def _soft(s: Sizes) -> Callable[[int, str], nn.Module]:
    return lambda hidden, name: Soft(s["experts"], hidden, s["width"], name=name)


def _top_k(
    kind: Callable[..., nn.Module],
) -> Callable[[Sizes], Callable[[int, str], nn.Module]]:
    def make(s: Sizes) -> Callable[[int, str], nn.Module]:
        sizes = s["experts"], s["width"], s["chosen"]
        return lambda hidden, name: kind(sizes[0], hidden, *sizes[1:], name=name)

    return make


def _switch(s: Sizes) -> Callable[[int, str], nn.Module]:
    return lambda hidden, name: Switch(s["experts"], hidden, s["capacity"], name=name)


def _table(name: str, hidden: Sizes, make: Callable[[Sizes], nn.Module], **fixed: str) -> Model:
    """Return a model on rows of features whose hidden sizes are all free but those in ``fixed``."""

    def build(s: Sizes) -> Built:
        return built(make(s), floats(s["rows"], s["features"]))

    free = tuple(size for size in hidden if size not in fixed)
    sizes = {"rows": 4, "features": 5, **hidden, "out": 3}
    return Model(name, sizes, build, free, {"out": "output", **fixed})


def _ensemble(mean: bool) -> Callable[[Sizes], nn.Module]:
    return lambda s: Ensemble(s["members"], s["hidden"], s["out"], mean)


_CHOICE = {"experts": 6, "chosen": 2}

MODELS = (
    _table(
        "soft mixture",
        {"experts": 6, "hidden": 7},
        lambda s: Soft(s["experts"], s["hidden"], s["out"]),
    ),
    _model("soft mixture stack", {"experts": 6}, _soft, free=("experts",)),
    _model("top-k mixture", _CHOICE, _top_k(TopK), fixed={"experts": "top_k"}),
    _model("top-k mixture gathered", _CHOICE, _top_k(TopKGather), fixed={"experts": "top_k"}),
    # `experts` is in neither: of equal copies argmax takes the first, so the function can be
    # kept, but only by the order of the copies.  `capacity` decides which rows are dropped.
    _model("switch mixture", {"experts": 6, "capacity": 3}, _switch),
    _table("ensemble", {"members": 6, "hidden": 7}, _ensemble(mean=True)),
    _table("ensemble apart", {"members": 6, "hidden": 7}, _ensemble(mean=False), members="output"),
    _table(
        "bilinear", {"left": 7, "right": 9}, lambda s: Bilinear(s["left"], s["right"], s["out"])
    ),
    _table(
        "memory slots",
        {"query": 7, "slots": 8, "value": 9},
        lambda s: Memory(s["query"], s["slots"], s["value"], s["out"]),
    ),
)
