"""Growth to sizes that are no multiples under LayerNorm: copies, and new units that change nothing.

Every function is checked in float64 on random parameters, gains and biases among them, by an
applier of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests import resizing
from tests.nets import f32
from tests.resizing import Prepared
from tests.zoo import ZOO, prepared
from uscale_jax.trace import padded, sizes
from uscale_jax.trace.growth import leaf_growths, product
from uscale_jax.trace.keep import Solution
from uscale_jax.trace.lanes import Fact
from uscale_jax.trace.padding import Unpaddable, pads
from uscale_jax.trace.tracing import Model, trace
from uscale_jax.trace.units import NEW_MEAN

EXACT = 1e-12
X = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 9, (3, 7)).astype(np.int32)
ZERO, MEAN, ANY = Fact.ZERO, Fact.MEAN, Fact.ANY


# What the growths say, element by element.


def along(w, axis, growth, facts, rng, means=True):
    """One dimension of a leaf made larger."""
    maps = growth.maps[axis]
    if maps is None:
        return w
    w, out = np.moveaxis(w, axis, 0), []
    free = all(fact in (None, ANY) for cell in facts for fact in cell)
    for old in maps:
        if old < 0 and free and rng is not None:
            out.append(rng.standard_normal(w.shape[1:]))
        elif old <= NEW_MEAN:
            out.append(w[growth.averages[axis][NEW_MEAN - old]].mean(0) * means)
        else:
            out.append(w[old] if old >= 0 else 0 * w[0])
    return np.moveaxis(np.stack(out), 0, axis)


def grown(solution, params, rng=None, means=True):
    """The parameters of the big model; ``rng`` fills what does not matter."""
    values = solution.traced.structure.program.inputs
    rows = zip(
        jax.tree.leaves(params),
        values,
        leaf_growths(solution),
        solution.lanes,
        strict=False,
    )
    out = []
    for w, value, growth, facts in rows:
        big = np.asarray(w) + growth.shift
        for axis in range(w.ndim):
            big = along(big, axis, growth, facts[axis], rng, means)
        out.append((big * product(growth.factors) - growth.shift).astype(w.dtype))
        assert out[-1].shape == tuple(size[1] for size in value.shape)
        assert np.broadcast_shapes(big.shape, *(term.shape for term in growth.copies)) == big.shape
    return jax.tree.unflatten(jax.tree.structure(params), out)


def traced_pair(small: Prepared, big: Model):
    with jax.enable_x64(True):
        big = Model(big.apply, resizing.as_double(big.params))
        return trace([small.model, big], small.inputs)


def solved(small: Prepared, big: Model) -> Solution:
    return padded.solve(traced_pair(small, big))


def errors(small: Prepared, big: Model, *fillings) -> list[float]:
    """For every way of filling new lanes, the largest difference of the outputs."""
    solution = solved(small, big)
    with jax.enable_x64(True):
        larger = [grown(solution, small.params, **options) for options in fillings]
        run = resizing.compiled(big.apply, larger[0], small.inputs)
        return [resizing.difference(small.outputs, run(params)) for params in larger]


def worst(small: Prepared, big: Model) -> float:
    """With zeros, and with random numbers where it should not matter."""
    return max(errors(small, big, {}, {"rng": np.random.default_rng(1)}))


def has_new_lanes(solution: Solution) -> bool:
    each = (fact for leaf in solution.lanes for dim in leaf for cell in dim for fact in cell)
    return any(fact is not None for fact in each)


def facts(solution: Solution) -> dict[str, list]:
    """Per leaf and dimension, what its new lanes are, where there is one cell of one atom."""
    named = zip(solution.traced.keys, solution.lanes, strict=True)
    return {"/".join(key): [dim[0][0] if dim[0] else None for dim in leaf] for key, leaf in named}


# LayerNorms as they are written.


def by_hand(x, epsilon):
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    return centred / jnp.sqrt((centred * centred).mean(-1, keepdims=True) + epsilon)


def by_var(x, epsilon):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + epsilon)


def by_unbiased_var(x, epsilon):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True, ddof=1) + epsilon)


def standardized(x, epsilon):
    return jax.nn.standardize(x, epsilon=epsilon)


def fast(x, epsilon):
    mean, square = jnp.mean(x, axis=-1), jnp.mean(x * x, axis=-1)
    variance = jnp.maximum(0.0, square - mean**2)
    return (x - mean[:, None]) * lax.rsqrt(variance[:, None] + epsilon)


def transposed(x, epsilon):
    """The same along the other axis of the transposed stream."""
    y = x.T
    mean = y.sum(0) * (1.0 / y.shape[0])
    squares = lax.integer_pow(y, 2).sum(0, keepdims=True) / y.shape[0]
    variance = squares - lax.square(mean).reshape(1, -1)
    return ((y - mean[None]) / jnp.sqrt(variance + epsilon)).T


NORMS = [by_hand, by_var, by_unbiased_var, standardized, fast, transposed]


def affine(p, y):
    return y * p["gain"][None] + p["bias"][None]


def stream(norm, epsilon, p, x):
    """Two pre-norm layers on a stream, and a normalised readout."""
    h = x @ p["in"]["w"] + p["in"]["b"][None]
    for layer in (p["one"], p["two"]):
        y = affine(layer, norm(h, epsilon))
        h = h + jax.nn.gelu(y @ layer["up"]) @ layer["down"] + layer["b"][None]
    return affine(p["norm"], norm(h, epsilon)) @ p["out"]


def stream_shapes(n, hidden=6):
    norm = {"gain": f32(n), "bias": f32(n)}
    layer = {**norm, "up": f32(n, hidden), "down": f32(hidden, n), "b": f32(n)}
    return {
        "in": {"w": f32(5, n), "b": f32(n)},
        "one": layer,
        "two": layer,
        "norm": norm,
        "out": f32(n, 3),
    }


def models(apply, shapes, small, big):
    return Prepared(Model(apply, shapes(*small)), (X,)), Model(apply, shapes(*big))


def stream_models(norm, epsilon, small, big):
    apply = functools.partial(stream, norm, epsilon)
    return models(apply, stream_shapes, (small,), (big,))


SIZES = [(norm, 48, 77) for norm in NORMS] + [(fast, 12, 25), (by_hand, 7, 31)]


@pytest.mark.parametrize(("norm", "small", "big"), SIZES)
def test_layer_norm_is_kept_with_its_epsilon(norm, small, big):
    pair = stream_models(norm, 1e-2, small, big)
    assert has_new_lanes(solved(*pair))
    assert worst(*pair) < EXACT


def test_what_new_lanes_are():
    solution = solved(*stream_models(fast, 1e-2, 7, 11))
    found = facts(solution)
    assert found["in/w"] == [None, MEAN]
    assert found["in/b"] == found["one/b"] == [MEAN]
    assert found["one/down"] == [None, MEAN]
    assert found["one/up"] == [ANY, None]
    assert found["one/gain"] == [ANY]
    assert found["one/bias"] == found["norm/bias"] == [ZERO]
    assert found["out"] == [ANY, None]


def test_factors_and_maps():
    solution = solved(*stream_models(by_hand, 1e-2, 7, 17))
    named = zip(solution.traced.keys, leaf_growths(solution), strict=True)
    growths = {"/".join(key): growth for key, growth in named}
    shrink = np.sqrt(17 / 14)
    copies = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert growths["in/w"].maps[0] is None
    assert list(growths["in/w"].maps[1]) == [*copies, -2, -2, -2]
    assert list(growths["one/up"].maps[0]) == [*copies, -2, -2, -2]
    assert list(growths["one/bias"].maps[0]) == [*copies, -1, -1, -1]
    assert product(growths["in/w"].factors) == pytest.approx(shrink)
    assert product(growths["one/gain"].factors) == pytest.approx(1 / shrink)
    assert product(growths["one/up"].factors) == pytest.approx(1 / 2)
    assert list(product(growths["one/up"].copies)[:, 0]) == [2.0] * 14 + [1.0] * 3


def test_pairs_of_copies():
    """The second and third copy of a unit are a pair; new units are in none."""
    solution = solved(*stream_models(by_hand, 1e-2, 2, 7))
    growth = leaf_growths(solution)[-1]
    assert list(growth.maps[0]) == [0, 0, 0, 1, 1, 1, -2]
    assert list(growth.partners[0]) == [-1, 1, 1, -1, 4, 4, -2]


def test_zeros_in_place_of_means_change_the_function():
    pair = stream_models(by_var, 1e-2, 7, 11)
    exact, broken = errors(*pair, {}, {"means": False})
    assert exact < EXACT
    assert broken > 1e-3


def test_other_axes_grow_unevenly_at_the_same_time():
    apply = functools.partial(stream, standardized, 1e-2)
    assert worst(*models(apply, stream_shapes, (7, 6), (11, 8))) < EXACT


def test_a_stream_without_gains_may_be_normalised_last():
    def post(p, x):
        h = x @ p["in"]
        for layer in (p["one"], p["two"]):
            h = by_var(h + jnp.tanh(h @ layer["up"]) @ layer["down"], 1e-2)
        return h @ p["out"]

    def shapes(n):
        layer = {"up": f32(n, 6), "down": f32(6, n)}
        return {"in": f32(5, n), "one": layer, "two": layer, "out": f32(n, 3)}

    assert worst(*models(post, shapes, (7,), (11,))) < EXACT


def test_means_within_parts_of_a_kernel():
    """One kernel writes the stream, scaled by head, and hidden units."""

    def apply(p, x):
        both = x @ p["w"]
        h, hidden = both[:, :-6], both[:, -6:]
        y = by_hand(h.reshape(4, 2, -1).sum(1) + p["b"][None], 1e-2)
        return jnp.tanh(hidden) @ p["o"] + y @ p["v"]

    def shapes(n):
        return {"w": f32(5, 2 * n + 6), "b": f32(n), "o": f32(6, 3), "v": f32(n, 3)}

    pair = models(apply, shapes, (7,), (11,))
    assert worst(*pair) < EXACT
    growth = leaf_growths(solved(*pair))[-1]
    old = growth.maps[1]
    means = {i: [*growth.averages[1][NEW_MEAN - n]] for i, n in enumerate(old) if n <= NEW_MEAN}
    assert means == {
        **{place: [*range(7)] for place in range(7, 11)},
        **{place: [*range(7, 14)] for place in range(18, 22)},
    }


def normalised(p, x):
    """With the variance of each unit as a parameter."""
    return (x @ p["w"]) * lax.rsqrt(p["var"] + 1e-5)[None]


def normalised_shapes(n):
    return {"w": f32(5, n), "var": f32(n), "out": f32(n, 3)}


def test_a_variance_becomes_the_mean_so_that_its_root_is_defined():
    apply = lambda p, x: jnp.tanh(normalised(p, x)) @ p["out"]  # noqa: E731
    small, big = models(apply, normalised_shapes, (7,), (11,))
    traced = traced_pair(small, big)
    out, var, w = pads(traced, sizes.uneven(traced)).leaves
    assert out[0] == [[ZERO]]
    assert var == [[[MEAN]]]
    assert w[1] == [[ANY]]


def test_means_cannot_be_multiplied():
    apply = lambda p, x: by_hand(normalised(p, x), 1e-2) @ p["out"]  # noqa: E731
    with pytest.raises(ValueError, match="neither 0 nor the mean"):
        solved(*models(apply, normalised_shapes, (7,), (11,)))


# Models of the zoo.

PADDED = [
    ("encoder pre-norm", {"width": 16}),
    ("encoder pre-norm", {"width": 23, "hidden_0": 20, "heads": 7}),
    ("gpt-2", {"width": 23}),
    ("gpt-neox", {"width": 14}),
    ("vit", {"width": 13}),
    ("nnx scan", {"width": 15}),
    ("unet layer norm", {"bottom": 15, "down_0": 4}),
]


def zoo_big(name, changed):
    built = ZOO[name].build({**ZOO[name].sizes, **changed})
    return Model(built.apply, built.params)


@pytest.mark.parametrize(("name", "changed"), PADDED)
def test_models_with_layer_norms(name, changed):
    assert worst(prepared(name), zoo_big(name, changed)) < EXACT


EVERYWHERE = ["lstm", "gru", "llama tied", "cnn batch norm", "grouped conv", "channel shuffle"]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_any_axis_may_be_padded(name, monkeypatch):
    """Also those that need not be; a recurrent kernel has one twice."""
    monkeypatch.setattr(padded, "needing", sizes.uneven)
    model = ZOO[name]
    changed = {size: 2 * model.sizes[size] + 1 for size in model.free}
    assert worst(prepared(name), zoo_big(name, changed)) < EXACT


REFUSED = [
    ("encoder post-norm", {"width": 16}, "`reduce_sum` adds up over new units of 11 → 16"),
    ("bert", {"width": 16}, "neither 0 nor the mean of the others at benchmarks/zoo/vision.py"),
    ("cnn group norm", {"per_group_0": 8}, "`reduce_sum` adds up over new units of 7 → 8"),
    ("convnext", {"channels": 8}, "`reduce_sum` adds up over new units of 7 → 8"),
    ("soft mixture", {"experts": 7}, "`reduce_max` reduces over new units of 6 → 7 too"),
]


@pytest.mark.parametrize(("name", "changed", "text"), REFUSED)
def test_refusals_say_what_is_in_the_way(name, changed, text):
    with pytest.raises(ValueError, match=text) as refusal:
        solved(prepared(name), zoo_big(name, changed))
    assert "Fix: choose one, or keep that size." in str(refusal.value)
    assert "dimension" in str(refusal.value)


def test_a_stream_that_a_loop_carries():
    def apply(p, x):
        def step(_, h):
            return h + jnp.tanh(fast(h, 1e-2) @ p["up"]) @ p["down"]

        return standardized(lax.fori_loop(0, 3, step, x @ p["in"]), 1e-2) @ p["out"]

    def shapes(n):
        return {"in": f32(5, n), "up": f32(n, 6), "down": f32(6, n), "out": f32(n, 3)}

    assert worst(*models(apply, shapes, (7,), (11,))) < EXACT


def test_what_a_loop_makes_of_a_stream_must_stay_the_mean():
    def apply(p, x):
        def step(_, h):
            return jnp.tanh(h + jnp.tanh(by_hand(h, 1e-2) @ p["up"]) @ p["down"])

        return lax.fori_loop(0, 3, step, x @ p["in"]) @ p["out"]

    def shapes(n):
        return {"in": f32(5, n), "up": f32(n, 6), "down": f32(6, n), "out": f32(n, 3)}

    with pytest.raises(ValueError, match="`loop_close` makes new units of 7 → 11 neither"):
        solved(*models(apply, shapes, (7,), (11,)))


def test_fixed_axes_cannot_be_padded():
    pair = models(lambda p, x: jnp.cumsum(x @ p, -1)[:, -1], lambda n: f32(5, n), (7,), (11,))
    traced = traced_pair(*pair)
    with pytest.raises(Unpaddable, match="`cumsum` mixes places along it at"):
        pads(traced, frozenset(sizes.changing(traced)))


UNDEFINED = {
    "1/w": lambda p, x: (x @ p["w"]) / p["g"][None],
    "log w": lambda p, x: (x @ p["w"]) + jnp.log(jnp.abs(p["g"]))[None],
    "w^-2": lambda p, x: (x @ p["w"]) * p["g"][None] ** -2,
}


@pytest.mark.parametrize("way", UNDEFINED)
def test_functions_are_defined_on_new_units(way):
    """With gains that are the mean, where with zeros there would be no numbers."""
    pair = models(
        lambda p, x: jnp.tanh(UNDEFINED[way](p, x)) @ p["out"],
        lambda n: {"w": f32(5, n), "g": f32(n), "out": f32(n, 3)},
        (7,),
        (11,),
    )
    traced = traced_pair(*pair)
    if way == "log w":
        with pytest.raises(Unpaddable, match="`log` may not be defined on new units of 7 → 11"):
            pads(traced, sizes.uneven(traced))
    else:
        assert pads(traced, sizes.uneven(traced)).leaves[0] == [[[MEAN]]]
