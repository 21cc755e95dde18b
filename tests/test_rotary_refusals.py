"""Tables of numbers along which heads cannot grow, and what is said of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nets import f32
from tests.rotary_models import (
    BASE,
    X,
    attention,
    attention_shapes,
    by_halves,
    check,
    counted,
    facts,
    grown,
    layer_norm,
    rates,
    rms,
    zoo_grown,
)
from uscale_jax.trace.lanes import Fact


@pytest.fixture(autouse=True)
def _as_most_models_are_written():
    """Ranks and dtypes are promoted."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


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
    assert "apart) at tests/test_rotary_refusals.py:" in str(refusal.value)
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
