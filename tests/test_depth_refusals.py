"""Growth in depth that would be another function is refused, and the text says why."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.zoo.registry import Built
from tests import depth_models as nets
from tests.depth_models import Pair, chain, flat_layers, grow, model, pair, residual, row


def test_a_norm_behind_the_sum_is_refused():
    with pytest.raises(ValueError, match="cannot add nothing") as refusal:
        grow(pair(partial(nets.encoder, pre=False), 2, 4))
    assert "layer 1 of params/Layer_*" in str(refusal.value)
    assert "lost at `sub` at benchmarks/zoo/" in str(refusal.value)
    assert "new_layers='copy'" in str(refusal.value)


def test_a_norm_behind_the_sum_in_a_scan_is_refused():
    post = lambda p, x: nets.rms(nets.mlp(p, x))  # noqa: E731
    with pytest.raises(ValueError, match="a step of layers cannot add nothing"):
        grow(pair(partial(nets.stacked, body=post), 2, 3))


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        ("deeper", "depth is 'deeper'. Expected: 'interleave', 'stack'"),
        ([0, 1], "which grows from 2 to 3 layers: got [0, 1]. Expected: 3 numbers"),
        ([0, 0, 0], "in which each of 0 to 1 occurs"),
        ([0, 1, 2], "in which each of 0 to 1 occurs"),
        ([1, 0, 0], "layers that first occur in their order"),
        ({"blocks": [0, 0, 1]}, "depth says nothing of block*, got entries for ['blocks']"),
        ({"block*": [0, 0, 1], "rows": [0]}, "depth has entries ['rows'] for no family"),
    ],
)
def test_sources_that_do_not_fit_are_refused(depth, expected):
    assert expected in refusal(chain(2), chain(3), depth)


def test_new_layers_are_one_of_two():
    with pytest.raises(ValueError, match="new_layers is 'zero'. Expected: 'identity' or 'copy'"):
        grow(pair(chain, 2, 3, mode="zero"))


def test_models_of_one_depth_are_refused():
    with pytest.raises(ValueError, match="nothing to deepen"):
        grow(pair(chain, 2, 2))


@pytest.mark.parametrize(("make", "what"), [(chain, "block*"), (row, "`scan`")])
def test_fewer_layers_are_refused(make, what):
    with pytest.raises(ValueError, match="Expected: at least as many") as refusal:
        grow(pair(make, 3, 2))
    assert what in str(refusal.value)


def refusal(small: Built, big: Built, depth: Any = "interleave", mode: str = "identity") -> str:
    with pytest.raises(ValueError, match="Fix:") as caught:
        grow(Pair(small, big, depth, mode))
    assert "Expected:" in str(caught.value)
    return str(caught.value)


def test_leaves_outside_of_layers_must_be_the_same():
    text = refusal(
        model(flat_layers(2), residual), model(flat_layers(3) | {"extra": (4,)}, residual)
    )
    assert "only the big one has 'extra'" in text


def test_layers_must_have_the_leaves_of_their_sources():
    big = flat_layers(3)
    big["h_2"] = big["h_2"] | {"bias": (4,)}
    text = refusal(model(flat_layers(2), residual), model(big, residual))
    assert "layer 2 of h_* is to be a copy of layer 1, but only one of them has 'h_2/bias'" in text


def test_layers_must_have_the_sizes_of_what_they_copy():
    big = flat_layers(3) | {"h_1": {"up": (4, 7), "down": (7, 4)}}
    text = refusal(model(flat_layers(2), residual), model(big, residual))
    assert "'h_1/down' of the big model is float32[7,4]" in text
    assert "'h_0/down', of which it is a copy, is float32[5,4]" in text


def test_an_output_for_every_layer_is_refused():
    def states(p: Any, x: jax.Array) -> list[jax.Array]:
        return [residual({f"h_{j}": p[f"h_{j}"] for j in range(i)}, x) for i in range(len(p))]

    text = refusal(model(flat_layers(2), states), model(flat_layers(3), states))
    assert "return different arrays" in text


def test_a_sum_over_the_states_of_all_layers_is_refused():
    def total(p: Any, x: jax.Array) -> jax.Array:
        states = x
        for i in range(len(p)):
            x = residual({"h_0": p[f"h_{i}"]}, x)
            states = states + x
        return states

    small, big = (model(flat_layers(n), total) for n in (2, 4))
    assert "after layer 1 takes in float32[3,4], float32[3,4]." in refusal(small, big)


def test_layers_side_by_side_are_refused():
    def ensemble(p: Any, x: jax.Array) -> jax.Array:
        states = [residual({"h_0": layer}, x) for layer in p.values()]
        return jnp.concatenate(states, axis=1).sum(1)

    small, big = (model(flat_layers(n), ensemble) for n in (2, 3))
    assert "after layer 1 takes in float32[3,4], float32[3,4]." in refusal(small, big)


def test_layers_of_different_widths_are_refused():
    def funnel(p: Any, x: jax.Array) -> jax.Array:
        for i in range(len(p)):
            x = jnp.tanh(x @ p[f"h_{i}"])
        return x.sum()

    small = model({f"h_{i}": (4, 4) for i in range(2)}, funnel)
    big = model({"h_0": (4, 6), "h_1": (6, 5), "h_2": (5, 4)}, funnel)
    assert "of which it is a copy" in refusal(small, big, mode="copy")


def test_all_layers_in_one_operation_are_refused():
    def together(p: Any, x: jax.Array) -> jax.Array:
        kernels = jnp.stack([p[f"h_{i}"] for i in range(len(p))])
        return jax.lax.scan(lambda x, k: (x + jnp.tanh(x) @ k, None), x, kernels)[0]

    small, big = (model({f"h_{i}": (4, 4) for i in range(n)}, together) for n in (2, 3))
    text = refusal(small, big)
    assert "leaves of layers 0, 1, 2 of h_* meet in one operation" in text


def test_layers_applied_twice_are_refused():
    small, big = (model(flat_layers(n), lambda p, x: residual(p, residual(p, x))) for n in (2, 4))
    assert "Expected: layers in a chain" in refusal(small, big)


def test_a_scan_over_the_number_of_the_layer_is_refused():
    def numbered(p: Any, x: jax.Array) -> jax.Array:
        xs = (p["k"], jnp.arange(len(p["k"]), dtype=np.float32))
        return jax.lax.scan(lambda x, s: (x + jnp.tanh(x * s[1]) @ s[0], None), x, xs)[0]

    text = refusal(model({"k": (2, 4, 4)}, numbered), model({"k": (3, 4, 4)}, numbered))
    assert "makes 3 steps in the big model" in text
    assert "goes through what `iota` at" in text


def test_a_loop_that_looks_layers_up_is_refused():
    def looked_up(p: Any, x: jax.Array) -> jax.Array:
        step = lambda i, x: x + jnp.tanh(x) @ p["k"][i]  # noqa: E731
        return jax.lax.fori_loop(0, len(p["k"]), step, x)

    text = refusal(model({"k": (2, 4, 4)}, looked_up), model({"k": (3, 4, 4)}, looked_up))
    assert "no parameters" in text


def test_what_scanned_layers_give_out_besides_is_refused():
    def penalised(p: Any, x: jax.Array) -> Any:
        x, sizes = jax.lax.scan(lambda x, k: (x + jnp.tanh(x) @ k, jnp.sum(x)), x, p["k"])
        return x, jnp.sum(sizes)

    text = refusal(model({"k": (2, 4, 4)}, penalised), model({"k": (3, 4, 4)}, penalised))
    assert "what every step of `scan` at" in text


def test_stacked_leaves_that_are_read_elsewhere_are_refused():
    def decayed(p: Any, x: jax.Array) -> Any:
        x, _ = jax.lax.scan(lambda x, k: (x + jnp.tanh(x) @ k, None), x, p["k"])
        return x, jnp.sum(p["k"] ** 2)

    text = refusal(model({"k": (2, 4, 4)}, decayed), model({"k": (3, 4, 4)}, decayed))
    assert "depends on how many layers there are" in text


def test_a_list_that_does_not_fit_all_families_is_refused():
    models = nets.translator(2, 1), nets.translator(3, 2)
    assert "does not fit dec_*, which grows from 1 to 2" in refusal(*models, [0, 1, 0])
