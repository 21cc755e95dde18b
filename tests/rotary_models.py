"""Models with rotary embeddings, and their growth checked element by element."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import uscale_jax as us
from tests import resizing
from tests.nets import f32
from tests.resizing import Prepared
from tests.zoo import ZOO, prepared
from uscale_jax.trace import padded
from uscale_jax.trace.lanes import Fact
from uscale_jax.trace.tracing import Model, trace
from uscale_jax.trace.units import NEW_MEAN, NEW_ZERO

EXACT, ROUNDED = 1e-12, 1e-6
TIME, BASE = 7, 100.0
X = np.random.default_rng(0).standard_normal((2, TIME, 5)).astype(np.float32)


class Grown(NamedTuple):
    """A small model, a big one, and the plan between them."""

    small: Prepared
    big: Model
    plan: us.Plan

    def error(self, params) -> float:
        with jax.enable_x64(True):
            run = resizing.compiled(self.big.apply, params, self.small.inputs)
            return resizing.difference(self.small.outputs, run(params))

    def params(self):
        with jax.enable_x64(True):
            return us.grow(self.small.params, self.plan, verify=False)


def planned(small: Prepared, big: Model, *, rotary: bool = True, **options) -> Grown:
    with jax.enable_x64(True):
        big = Model(big.apply, resizing.as_double(big.params))
        plan = us.plan(*small.model, *big, *small.inputs, rotary=rotary, **options)
    return Grown(small, big, plan)


def facts(grown: Grown) -> dict[str, set[Fact]]:
    """What new lanes are, by leaf."""
    with jax.enable_x64(True):
        traced = trace([grown.small.model, grown.big], grown.small.inputs, rotary=True)
        lanes = padded.solve(traced).lanes
    each = {
        "/".join(key): {f for dim in leaf for cell in dim for f in cell if f is not None}
        for key, leaf in zip(traced.keys, lanes, strict=True)
    }
    return {name: found for name, found in each.items() if found}


def filled(grown: Grown, params):
    """Random numbers on new lanes where they do not matter: that are neither 0 nor read as copies.

    Returns them, and how many there are.
    """
    copied = {name for name, found in facts(grown).items() if Fact.MEAN in found}
    rng, out, count = np.random.default_rng(1), [], 0
    for leaf, w in zip(grown.plan.leaves.values(), jax.tree.leaves(params), strict=True):
        new, zero = np.zeros(w.shape, bool), np.zeros(w.shape, bool)
        for axis, old in enumerate(leaf.maps):
            if old is not None and leaf.name not in copied:
                along = np.expand_dims(old, [i for i in range(w.ndim) if i != axis])
                new, zero = new | (along <= NEW_MEAN), zero | (along == NEW_ZERO)
        out.append(np.where(new & ~zero, rng.standard_normal(w.shape), w))
        count += np.sum(new & ~zero)
    return jax.tree.unflatten(jax.tree.structure(params), out), count


def check(grown: Grown, exact: float = EXACT) -> None:
    """The function is the same, whatever is on lanes that do not matter; and back."""
    params = grown.params()
    assert grown.error(params) <= exact
    random, count = filled(grown, params)
    assert count > 0
    assert grown.error(random) <= exact
    with jax.enable_x64(True):
        for back in (us.shrink(params, grown.plan), us.shrink(random, grown.plan)):
            pairs = zip(*map(jax.tree.leaves, (back, grown.small.params)), strict=True)
            for a, b in pairs:
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    assert us.Plan.from_json(grown.plan.to_json()) == grown.plan


# Rotations as they are written: float[batch, time, heads, size] and positions.


def rates(size):
    return BASE ** (-jnp.arange(0, size, 2, dtype=float) / size)


def by_halves(x, at):
    angle = (at[:, None] * rates(x.shape[-1])[None])[None, :, None]
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def by_half_turns(x, at):
    angle = jnp.outer(at, rates(x.shape[-1]))
    angle = jnp.concatenate([angle, angle], -1)[None, :, None]
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], -1)
    return x * jnp.cos(angle) + turned * jnp.sin(angle)


def by_pairs(x, at):
    angle = jnp.einsum("t,d->td", at, rates(x.shape[-1]))[:, None, :]
    a, b = x[..., ::2], x[..., 1::2]
    both = a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)
    return jnp.stack(both, -1).reshape(x.shape)


def by_complex_numbers(x, at):
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = lax.complex(pairs[..., 0], pairs[..., 1])
    turned = turned * jnp.exp(1j * jnp.outer(at, rates(x.shape[-1])))[:, None, :]
    return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape)


def by_jitted_parts(x, at):
    return jax.jit(jax.checkpoint(by_halves))(x, at)


def by_signs(x, at):
    """The halves swapped, with signs from an array of numbers."""
    half = x.shape[-1] // 2
    signs = np.repeat([-1.0, 1.0], half)
    angle = jnp.tile(jnp.outer(at, rates(x.shape[-1])), 2)[None, :, None]
    swapped = jnp.concatenate([x[..., half:], x[..., :half]], -1)
    return x * jnp.cos(angle) + swapped * signs * jnp.sin(angle)


def by_numpy(x, at):
    """Tables made by NumPy for more steps than there are, and looked up."""
    size = x.shape[-1]
    angle = np.outer(np.arange(2 * TIME), BASE ** (-np.arange(0, size, 2) / size))
    cos, sin = (jnp.asarray(table)[at.astype(int)] for table in (np.cos(angle), np.sin(angle)))
    a, b = x[..., : size // 2], x[..., size // 2 :]
    cos, sin = cos[None, :, None], sin[None, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def partly(x, at):
    """A third of the head rotates."""
    size = x.shape[-1] // 3
    return jnp.concatenate([by_halves(x[..., :size], at), x[..., size:]], -1)


ROTATIONS = [
    by_halves,
    by_half_turns,
    by_pairs,
    by_complex_numbers,
    by_jitted_parts,
    by_signs,
    by_numpy,
    partly,
]


def attend(q, k, v):
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    seen = jnp.tril(jnp.ones(logits.shape[2:], bool))
    weights = jax.nn.softmax(jnp.where(seen[None, None], logits, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def counted(x):
    return jnp.arange(x.shape[1], dtype=x.dtype)


def attention(rotate, p, x, at=None):
    at = counted(x) if at is None else at
    q, k, v = (jnp.einsum("btc,chd->bthd", x, p[name]) for name in "qkv")
    return jnp.einsum("bthd,hdc->btc", attend(rotate(q, at), rotate(k, at), v), p["o"])


def attention_shapes(size, heads=3):
    return dict.fromkeys("qkv", f32(5, heads, size)) | {"o": f32(heads, size, 5)}


def grown(apply, shapes, small, big, inputs=(X,), **options):
    start = Prepared(Model(apply, shapes(*small)), inputs)
    return planned(start, Model(apply, shapes(*big)), **options)


def zoo_big(name, changed):
    built = ZOO[name].build({**ZOO[name].sizes, **changed})
    return Model(built.apply, built.params)


def zoo_grown(name, changed, **options):
    return planned(prepared(name), zoo_big(name, changed), **options)


def rms(x, gain):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-2) * gain


def rms_from_one(x, gain):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-2) * (1 + gain)


def layer_norm(x, gain):
    x = x - jnp.mean(x, -1, keepdims=True)
    return rms(x, gain)
