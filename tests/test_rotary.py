"""Heads with rotary embeddings grow: old pairs at every k-th place, new ones that change nothing.

Functions are compared in float64.  Where tables are computed in float32, as most models do, small
and big ones differ by its rounding.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import uscale_jax as us
from tests import resizing
from tests.nets import f32
from tests.resizing import Prepared
from tests.zoo import ZOO, prepared
from uscale_jax.trace import growth, known, padded
from uscale_jax.trace.lanes import Fact
from uscale_jax.trace.tracing import Model, trace
from uscale_jax.trace.units import NEW_MEAN, NEW_ZERO, Units

EXACT, ROUNDED = 1e-12, 1e-6
TIME, BASE = 7, 100.0
X = np.random.default_rng(0).standard_normal((2, TIME, 5)).astype(np.float32)


@pytest.fixture(autouse=True)
def _as_most_models_are_written():
    """Ranks and dtypes are promoted."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


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


# Models of the zoo.

GROWN = [
    ("llama", {"head_dim": 24}),
    ("llama", {"head_dim": 36, "width": 22, "kv_heads": 10, "groups": 6, "hidden_0": 20}),
    ("llama query norm", {"head_dim": 36, "width": 22}),
    ("mistral", {"head_dim": 24}),
    ("palm", {"head_dim": 24, "width": 33}),
    ("rslora", {"head_dim": 24, "rank": 16}),
    ("gemma", {"head_dim": 36}),
    ("gemma one key", {"head_dim": 24, "groups": 10}),
    ("gpt-j", {"rotary": 12}),
    ("gpt-j", {"rotary": 18, "plain": 18, "value": 16}),
    ("gpt-neox", {"head_dim": 24}),
    ("gpt-neox", {"head_dim": 36, "heads": 10, "width": 14}),
    ("deepseek", {"rotary": 12}),
    ("deepseek", {"rotary": 18, "plain": 18, "heads": 10, "q_latent": 20}),
    ("nnx transformer", {"head_dim": 24, "kv_heads": 10}),
]


def zoo_big(name, changed):
    built = ZOO[name].build({**ZOO[name].sizes, **changed})
    return Model(built.apply, built.params)


def zoo_grown(name, changed, **options):
    return planned(prepared(name), zoo_big(name, changed), **options)


@pytest.mark.parametrize(("name", "changed"), GROWN)
def test_models_of_the_zoo(name, changed):
    check(zoo_grown(name, changed), ROUNDED)


def test_what_new_pairs_of_a_llama_are():
    grown = zoo_grown("llama", {"head_dim": 36})
    found = {name.removeprefix("params/"): of for name, of in facts(grown).items()}
    assert found == {
        f"Block_{i}/attention/{name}/kernel": {fact}
        for i in (0, 1)
        for name, fact in (("query", Fact.ZERO), ("key", Fact.ANY))
    }
    attention = "params/Block_0/attention"
    query, key = (grown.plan.leaves[f"{attention}/{name}/kernel"] for name in ("query", "key"))
    zeros = [n for i in range(12) for n in (i, NEW_ZERO, NEW_ZERO)]
    assert [*query.maps[2]] == zeros
    assert [*key.maps[2][::3]] == [*range(12)]
    assert [[*s] for s in key.averages[2]] == [[i] for i in range(12)]
    assert query.replicas == key.replicas == 1
    assert grown.plan.leaves[f"{attention}/value/kernel"].replicas == 3


@pytest.mark.parametrize("name", ["llama query norm", "gpt-j"])
def test_gradients_reach_all_that_is_new(name):
    """Were queries and keys both 0, neither would ever be anything else."""
    grown = zoo_grown(name, {"rotary" if "rotary" in ZOO[name].sizes else "head_dim": 24})
    params = grown.params()
    with jax.enable_x64(True):
        loss = lambda p: jnp.sum(jnp.square(grown.big.apply(p, *grown.small.inputs)))  # noqa: E731
        gradients = jax.tree.leaves(jax.grad(loss)(params))
    zero = {name for name, of in facts(grown).items() if of == {Fact.ZERO}}
    assert zero
    for leaf, gradient in zip(grown.plan.leaves.values(), gradients, strict=True):
        for axis, old in enumerate(leaf.maps if leaf.name in zero else ()):
            if old is not None and np.any(old == NEW_ZERO):
                new = np.take(np.asarray(gradient), np.flatnonzero(old == NEW_ZERO), axis)
                assert np.abs(new).max() > 1e-8


@pytest.mark.parametrize("name", ["gpt-2", "nnx scan", "bloom", "llama"])
def test_nothing_changes_where_nothing_rotates(name):
    changed = {size: 2 * ZOO[name].sizes[size] for size in ZOO[name].free}
    with_it, without = (zoo_grown(name, changed, rotary=rotary).plan for rotary in (True, False))
    assert with_it == without


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


@pytest.mark.parametrize(("rotate", "factor"), [*zip(ROTATIONS, itertools.cycle([2, 3]))])
def test_rotations(rotate, factor):
    size = 18 if rotate is partly else 8
    apply = functools.partial(attention, rotate)
    check(grown(apply, attention_shapes, (size,), (factor * size, 6)))


def test_verified_in_float32():
    apply = functools.partial(attention, by_halves)
    params = resizing.random_params(attention_shapes(8), dtype=np.float32)
    plan = us.plan(apply, params, apply, attention_shapes(16), X, rotary=True)
    us.grow(params, plan)


@pytest.mark.parametrize("rotate", [by_half_turns, by_complex_numbers, by_numpy])
def test_positions_as_inputs(rotate):
    apply = functools.partial(attention, rotate)
    at = np.asarray([0, 1, 3, 4, 7, 9, 12], np.float32)
    check(grown(apply, attention_shapes, (8,), (24,), (X, at)))


@pytest.mark.parametrize("outside", [False, True])
def test_layers_in_a_scan(outside):
    """Tables are computed in every step, or once before."""

    def apply(p, x):
        at = counted(x)
        table = jnp.exp(1j * jnp.outer(at, rates(p["q"].shape[-1])))[:, None, :]

        def turned(x, at):
            a, b = jnp.split(x, 2, -1)
            y = lax.complex(a, b) * table
            return jnp.concatenate([y.real, y.imag], -1)

        step = lambda h, own: (h + attention(turned if outside else by_halves, own, h), None)  # noqa: E731
        return lax.scan(step, x, p)[0]

    def shapes(size, heads=3):
        layer = attention_shapes(size, heads)
        return jax.tree.map(lambda leaf: f32(4, *leaf.shape), layer)

    check(grown(apply, shapes, (8,), (16, 6)))


def deep(p, x):
    for name in sorted(p):
        x = x + attention(by_halves, p[name], x)
    return x


def deep_shapes(size, layers):
    return {f"layer_{i}": attention_shapes(size) for i in range(layers)}


def test_layers_are_added_at_the_same_time():
    found = grown(deep, deep_shapes, (8, 2), (16, 4), depth="interleave")
    params = found.params()
    assert found.error(params) <= EXACT


# Norms of queries and keys, and kernels that hold more than one of them.


def rms(x, gain):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-2) * gain


def rms_from_one(x, gain):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-2) * (1 + gain)


def layer_norm(x, gain):
    x = x - jnp.mean(x, -1, keepdims=True)
    return rms(x, gain)


def normed(norm, p, x):
    q, k, v = (jnp.einsum("btc,chd->bthd", x, p[name]) for name in "qkv")
    q, k = (by_halves(norm(each, p[name]), counted(x)) for each, name in ((q, "qn"), (k, "kn")))
    return jnp.einsum("bthd,hdc->btc", attend(q, k, v), p["o"])


def normed_shapes(size, heads=3):
    return attention_shapes(size, heads) | {"qn": f32(size), "kn": f32(size)}


@pytest.mark.parametrize("norm", [rms, rms_from_one, layer_norm])
def test_norms_of_queries_and_keys(norm):
    """Kernels make copies, which norms keep; the gain of the queries is 0 on new pairs."""
    found = grown(functools.partial(normed, norm), normed_shapes, (8,), (24, 6))
    what = facts(found)
    assert what["qn"] == {Fact.ZERO}
    assert what["q"] == what["k"] == {Fact.MEAN}
    check(found)


def test_norms_behind_the_rotation():
    """Turned copies are no copies, so kernels make zeros."""

    def apply(p, x):
        q, k, v = (jnp.einsum("btc,chd->bthd", x, p[name]) for name in "qkv")
        q = rms(by_halves(q, counted(x)), p["qn"])
        k = rms(by_halves(k, counted(x)), p["kn"])
        return jnp.einsum("bthd,hdc->btc", attend(q, k, v), p["o"])

    check(grown(apply, normed_shapes, (8,), (16,)))


def split(qkv, heads):
    parts = jnp.split(qkv, 3, -1)
    return [part.reshape(*qkv.shape[:-1], heads, -1) for part in parts]


def reshaped(qkv, heads):
    return jnp.unstack(qkv.reshape(*qkv.shape[:-1], 3, heads, -1), axis=2)


def fused(parts, p, x):
    """Values rotate too, so that they are of the same axis."""
    q, k, v = (by_halves(part, counted(x)) for part in parts(x @ p["qkv"], p["o"].shape[0]))
    return jnp.einsum("bthd,hdc->btc", attend(q, k, v), p["o"])


def fused_shapes(size, heads=3):
    return {"qkv": f32(5, 3 * heads * size), "o": f32(heads, size, 5)}


def test_one_kernel_of_all_and_values_on_the_axis():
    found = grown(functools.partial(fused, split), fused_shapes, (8,), (24, 6))
    assert facts(found) == {"qkv": {Fact.ZERO, Fact.ANY}, "o": {Fact.ZERO}}
    check(found)


def test_a_dimension_of_its_own_for_queries_keys_and_values():
    """What is along a head is one for all three then, so that all are 0: exact, but stuck there."""
    found = grown(functools.partial(fused, reshaped), fused_shapes, (8,), (24, 6))
    assert facts(found) == {"qkv": {Fact.ZERO}, "o": {Fact.ANY}}
    check(found)


# What is refused.


def misfit(x, at, rate):
    angle = (at[:, None] * rate(x.shape[-1] // 2)[None])[None, :, None]
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


WRONG = {
    "end to end": lambda n: BASE ** (-jnp.arange(n, dtype=float) / (n - 1)),
    "equal steps": lambda n: jnp.linspace(1.0, 1 / BASE, n),
    "one after the other": lambda n: 0.9 ** jnp.arange(n, dtype=float),
    "another base": lambda n: (BASE * (1 + 0.01 * n)) ** (-jnp.arange(n, dtype=float) / n),
    "by NumPy": lambda n: BASE ** (-np.arange(1, n + 1) / n),
}


@pytest.mark.parametrize("rate", WRONG.values(), ids=WRONG)
def test_tables_that_do_not_nest(rate):
    apply = functools.partial(attention, functools.partial(misfit, rate=rate))
    with pytest.raises(ValueError, match="cannot grow to") as refusal:
        grown(apply, attention_shapes, (8,), (16,))
    assert "4 (small), 8 (big): numbers differ along it, and those of the" in str(refusal.value)
    assert "not at places 0, 2, 4, ..." in str(refusal.value)
    assert "apart) at tests/test_rotary.py:" in str(refusal.value)
    assert "rotary=True" not in str(refusal.value)


def test_sizes_that_are_no_multiples():
    with pytest.raises(ValueError, match="can only grow by a whole factor"):
        zoo_grown("llama", {"head_dim": 18})


def test_the_refusal_says_how():
    advice = "for rotary embeddings, say rotary=True to `plan`"
    with pytest.raises(ValueError, match=advice):
        zoo_grown("llama", {"head_dim": 24}, rotary=False)
    with pytest.raises(ValueError, match="cannot grow to") as refusal:
        zoo_grown("llama", {"head_dim": 18}, rotary=False)
    assert advice not in str(refusal.value)


def test_one_step_says_nothing_of_the_rates():
    apply = functools.partial(attention, by_halves)
    with pytest.raises(ValueError, match="`iota` counts it"):
        grown(apply, attention_shapes, (8,), (16,), (X[:, :1],))


def test_another_reason_holds_the_axis_still():
    def apply(p, x):
        return attention(by_halves, p, x) + jnp.cumsum(p["q"], -1)[..., -1].sum()

    with pytest.raises(ValueError, match="`cumsum` mixes places along it"):
        grown(apply, attention_shapes, (8,), (16,))


def test_slopes_of_heads():
    with pytest.raises(ValueError, match="numbers differ along it, and those of the small model"):
        zoo_grown("bloom", {"heads": 10})


def sinusoids(norm, p, x):
    h = x @ p["in"]
    angle = jnp.outer(counted(x), rates(h.shape[-1]))
    h = h + jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[None]
    return jnp.tanh(norm(h, p["gain"]) @ p["up"]) @ p["out"]


def sinusoid_shapes(size):
    return {"in": f32(5, size), "gain": f32(size), "up": f32(size, 6), "out": f32(6, 3)}


@pytest.mark.parametrize("norm", [rms, layer_norm])
def test_positions_in_a_normalised_stream(norm):
    apply = functools.partial(sinusoids, norm)
    with pytest.raises(ValueError, match="neither 0 nor the mean of the others") as refusal:
        grown(apply, sinusoid_shapes, (8,), (16,))
    assert "Fix: keep that size." in str(refusal.value)
    assert "multiple" not in str(refusal.value)


def test_positions_in_a_stream_that_kernels_read():
    check(grown(functools.partial(sinusoids, lambda x, gain: x), sinusoid_shapes, (8,), (16,)))


@pytest.mark.parametrize("norm", [rms, layer_norm])
def test_rates_of_normalised_units(norm):
    """Units of one dimension that are copies less their mean are copies, and not 0."""

    def apply(p, x):
        return jnp.tanh(norm(x @ p["in"], p["gain"]) * rates(2 * p["gain"].size) @ p["up"])

    def shapes(size):
        return {"in": f32(5, size), "gain": f32(size), "up": f32(size, 6)}

    found = grown(apply, shapes, (8,), (24,))
    assert facts(found) == {"in": {Fact.MEAN}, "gain": {Fact.ANY}, "up": {Fact.ZERO}}
    check(found)


# That the tests can fail.


def test_other_places_are_another_function(monkeypatch):
    def last(atom, fact=None, *, strided=False):
        found = real(atom, fact, strided=strided)
        if not strided:
            return found
        order = np.argsort(found.new != 0, kind="stable")
        return Units(*(column[order] for column in found))

    real = growth.units
    monkeypatch.setattr(growth, "units", last)
    found = zoo_grown("llama", {"head_dim": 24})
    assert found.error(found.params()) > 1e-3


def test_new_pairs_that_are_not_zero_are_another_function():
    found = zoo_grown("llama", {"head_dim": 24})
    leaf = found.plan.leaves["params/Block_0/attention/query/kernel"]
    params = jax.tree.map(np.array, found.params())
    params["params"]["Block_0"]["attention"]["query"]["kernel"][..., leaf.maps[2] < 0] = 0.1
    assert found.error(params) > 1e-3


def test_large_tables_are_not_computed(monkeypatch):
    monkeypatch.setattr(known, "_LIMIT", 10)
    with pytest.raises(ValueError, match="`iota` counts it"):
        zoo_grown("llama", {"head_dim": 24})
