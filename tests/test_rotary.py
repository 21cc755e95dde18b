"""Heads with rotary embeddings grow: old pairs at every k-th place, new ones that change nothing.

Functions are compared in float64.  Where tables are computed in float32, as most models do, small
and big ones differ by its rounding.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import uscale_jax as us
from tests import resizing
from tests.nets import f32
from tests.rotary_models import (
    EXACT,
    ROTATIONS,
    ROUNDED,
    X,
    attend,
    attention,
    attention_shapes,
    by_complex_numbers,
    by_half_turns,
    by_halves,
    by_numpy,
    check,
    counted,
    facts,
    grown,
    layer_norm,
    partly,
    rates,
    rms,
    rms_from_one,
    zoo_grown,
)
from tests.zoo import ZOO
from uscale_jax.trace import growth, known
from uscale_jax.trace.lanes import Fact
from uscale_jax.trace.units import NEW_ZERO, Units


@pytest.fixture(autouse=True)
def _as_most_models_are_written():
    """Ranks and dtypes are promoted."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


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
