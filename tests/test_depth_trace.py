"""Growth in depth: what is left is the small program, and new layers add nothing."""

from __future__ import annotations

import functools
from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.zoo.registry import Built, floats
from tests import depth_models as nets
from tests.depth_models import Pair, chain, flat_layers, grow, model, pair, residual, row
from tests.resizing import as_double, compiled, difference, grown, random_params
from uscale_jax import _jax, _tree
from uscale_jax.trace import flat, keep
from uscale_jax.trace.axes import analyse
from uscale_jax.trace.deepening import Steps
from uscale_jax.trace.depth import Deepened
from uscale_jax.trace.inline import program
from uscale_jax.trace.tracing import Traced, output_names

resnet_v2 = partial(nets.resnet, activated=False)

EXACT = {
    "encoder": pair(nets.encoder, 2, 5),
    "encoder remat": pair(partial(nets.encoder, remat=True), 2, 4, "stack"),
    "llama": pair(nets.llama, 2, 3, [0, 1, 1]),
    "nnx list": pair(nets.nnx_list, 2, 4),
    "dict": pair(chain, 3, 5),
    "dict to many": pair(chain, 2, 11),
    "dict in jit": pair(partial(chain, remat=True), 2, 4),
    "dict from one": pair(chain, 1, 2),
    "dict from one to three": pair(chain, 1, 3),
    "lists": pair(nets.lists, 2, 4),
    "resnet": pair(nets.resnet, 2, 4),
    "resnet pre-activation": pair(resnet_v2, 1, 3),
    "residual lstm": pair(partial(nets.lstm, residual=True), 2, 3),
    "encoder and decoder": Pair(nets.translator(2, 1), nets.translator(4, 3)),
    "decoder alone": Pair(nets.translator(2, 1), nets.translator(2, 2)),
    "scan": pair(nets.scan, 2, 4),
    "scan remat": pair(partial(nets.scan, remat=True), 2, 3, [0, 1, 0]),
    "scan from one": pair(nets.scan, 1, 2),
    "nnx scan": pair(nets.nnx_scan, 2, 3),
    "hand-written scan": pair(row, 3, 5),
    "scan of two inputs": pair(nets.twice, 2, 3),
}
COPIED = {
    "lstm": pair(nets.lstm, 2, 4, mode="copy"),
    "encoder post-norm": pair(partial(nets.encoder, pre=False), 2, 4, mode="copy"),
    "encoder copied": pair(nets.encoder, 2, 3, "stack", "copy"),
    "scan copied": pair(nets.scan, 2, 4, "stack", "copy"),
}
ALL = EXACT | COPIED


class Case:
    """A pair of models in float64, cut and compiled once."""

    def __init__(self, pair: Pair) -> None:
        with jax.enable_x64(True):
            self.small, self.big = double(pair.small), double(pair.big)
            self.d = grow(Pair(self.small, self.big, *pair[2:]))
            self.params = random_params(self.small.params)
        self.old = outputs(self.small, self.params)

    @functools.cached_property
    def run(self) -> Any:
        with jax.enable_x64(True):
            return compiled(self.big.apply, self.big.params, self.big.inputs)

    def error(self, spared: Collection[Any] = ()) -> float:
        """How far the big model is from the small one."""
        params = filled(self.d, self.params, self.big.params, spared)
        return difference(self.old, self.run(params))


@functools.cache
def case(name: str) -> Case:
    return Case(ALL[name])


def double(built: Built) -> Built:
    return built._replace(params=as_double(built.params), inputs=as_double(built.inputs))


def outputs(built: Built, params: Any) -> list[np.ndarray]:
    with jax.enable_x64(True):
        return compiled(built.apply, params, built.inputs)(params)


def filled(d: Deepened, small: Any, big: Any, spared: Collection[Any] = (), seed: int = 2) -> Any:
    """Parameters of the big model: kept leaves from ``small``, new ones random or zero."""
    leaves = dict(zip(*_tree.flatten_named(small)[:2], strict=True))
    keys, drawn, treedef = _tree.flatten_named(random_params(big, seed))
    kept = set(d.kept.values())
    out = []
    for key, leaf in zip(keys, drawn, strict=True):
        source = leaves[d.sources[key]]
        zero = () if key in spared else d.zero.get(key, ())
        if key in d.steps:
            leaf = filled_steps(d.steps[key], source, leaf, zero)
        elif key in kept:
            leaf = source
        out.append(np.zeros_like(leaf) if zero is True else leaf)
    return jax.tree.unflatten(treedef, out)


def filled_steps(steps: Steps, source: Any, drawn: Any, zero: Any) -> Any:
    source, drawn = (np.moveaxis(a, steps.dim, 0) for a in (source, drawn.copy()))
    for i, old in enumerate(steps.sources):
        if old not in steps.sources[:i]:
            drawn[i] = source[old]
        elif i in zero:
            drawn[i] = 0.0
    return np.moveaxis(drawn, 0, steps.dim)


@pytest.mark.parametrize("name", EXACT)
def test_new_layers_add_nothing(name):
    assert case(name).d.exact
    assert case(name).d.why == ""
    assert case(name).error() == 0


@pytest.mark.parametrize("name", EXACT)
def test_each_zero_is_needed(name):
    assert case(name).d.zero
    for key in case(name).d.zero:
        assert case(name).error([key]) > 1e-6, _tree.name(key)


@pytest.mark.parametrize("name", ALL)
def test_what_is_left_is_the_small_program(name):
    d, small = case(name).d, case(name).small
    program((d.small, d.closed))  # refuses programs that differ
    run = lambda *args: _jax.evaluate(d.closed, *jax.tree.leaves(args))  # noqa: E731
    new = outputs(small._replace(apply=run), case(name).params)
    assert difference(case(name).old, new) <= 1e-14


@pytest.mark.parametrize("name", COPIED)
def test_copies_are_not_exact(name):
    d = case(name).d
    assert not d.exact
    assert d.why == "copies of layers are not the identity"
    assert not d.zero


NORMED = ["attend/out/bias", "attend/out/kernel", "mlp/down/bias", "mlp/down/kernel"]
ZERO = {
    "encoder": [f"params/Layer_{i}/{leaf}" for i in (1, 2, 4) for leaf in NORMED],
    "llama": ["params/Block_2/attention/out/kernel", "params/Block_2/mlp/down/kernel"],
    "dict from one": ["block2/down", "block2/shift"],
    "resnet": [f"stages/{i}/norm_b/{leaf}" for i in (1, 3) for leaf in ("bias", "scale")],
    "resnet pre-activation": ["stages/1/conv_b", "stages/2/conv_b"],
    "encoder and decoder": [
        *(f"dec_{i}_{attend}/o" for i in (1, 2) for attend in ("attend", "cross")),
        "enc_1_attend/o",
        "enc_3_attend/o",
    ],
    "lists": ["kernels/1", "kernels/3"],
    "hand-written scan": ["layers/down", "layers/shift"],
}


@pytest.mark.parametrize("name", ZERO)
def test_only_the_last_leaves_are_zero(name):
    zero = case(name).d.zero
    assert sorted(map(_tree.name, zero)) == ZERO[name]
    assert set(zero.values()) in ({True}, {frozenset((1, 3))})


def test_which_leaf_comes_from_which():
    d = case("llama").d
    layer = lambda i: ("params", f"Block_{i}", "mlp", "up", "kernel")  # noqa: E731
    assert [d.sources[layer(i)] for i in range(3)] == [layer(0), layer(1), layer(1)]
    assert [d.kept[layer(i)] for i in range(2)] == [layer(0), layer(1)]
    [family] = d.families
    assert (family.name, family.small, family.big) == ("params/Block_*", 2, 3)
    assert (family.sources, family.kept, family.new) == ((0, 1, 1), (0, 1), (2,))
    assert not d.steps


def test_which_step_comes_from_which():
    d = case("hand-written scan").d
    assert d.steps[("layers", "up")] == Steps(0, (0, 0, 1, 1, 2))
    assert d.zero[("layers", "down")] == {1, 3}
    assert d.sources[("layers", "up")] == ("layers", "up")
    assert [family.name for family in d.families] == ["layers"]


def test_layers_stacked_on_another_axis():
    d = grow(pair(partial(nets.stacked, body=inner, axis=1), 2, 3))
    assert d.steps[("layers", "up")].dim == 1
    assert d.closed.jaxpr.invars[0].aval.shape == d.small.jaxpr.invars[0].aval.shape


def inner(p: Any, x: jax.Array) -> jax.Array:
    return x + jax.nn.gelu(x @ p["up"] + p["bias"][None]) @ p["down"]


def test_lines_are_those_of_the_models():
    """Of helpers that JAX has traced before, too: gelu is its own."""
    d = case("dict in jit").d
    sources = {flat.line(eqn).rpartition("/")[2].rpartition(":")[0] for eqn in d.closed.jaxpr.eqns}
    assert sources == {"depth_models.py"}


WIDER = {
    "encoder": (partial(nets.encoder, 2), partial(nets.encoder, 3, width=8)),
    "llama": (partial(nets.llama, 2), partial(nets.llama, 4, width=12, hidden=15)),
    "nnx list": (partial(nets.nnx_list, 1), partial(nets.nnx_list, 2, width=8)),
    "scan": (partial(nets.scan, 2), partial(nets.scan, 3, width=12)),
    "nnx scan": (partial(nets.nnx_scan, 2), partial(nets.nnx_scan, 4, width=8)),
}


@pytest.mark.parametrize("name", WIDER)
def test_growth_in_depth_and_width(name):
    with jax.enable_x64(True):
        small, big = (double(make()) for make in WIDER[name])
        d = grow(Pair(small, big))
        params = random_params(small.params)
        cut = grown(keep.solve(traced(d, small)), params)
    new = outputs(big, filled(d, cut, big.params))
    assert difference(outputs(small, params), new) <= 1e-12


def traced(d: Deepened, small: Built) -> Traced:
    """What the pair analysis makes of the small and the cut program."""
    names = [f"input {i}" for i in range(len(jax.tree.leaves(small.inputs)))]
    structure = analyse(program((d.small, d.closed)), names, output_names(d.outputs))
    return Traced(structure, *_tree.flatten_named(small.params), d.outputs)


def test_sources_by_family():
    models = nets.translator(2, 1), nets.translator(3, 2)
    d = grow(Pair(*models, {"enc_*": [0, 1, 0], "dec_*": [0, 0]}))
    assert {family.name: family.sources for family in d.families} == {
        "enc_*": (0, 1, 0),
        "dec_*": (0, 0),
    }


def test_a_sum_of_what_layers_give_out_is_a_stream():
    def ensemble(p: Any, x: jax.Array) -> jax.Array:
        return sum(jnp.tanh(x @ layer["up"]) @ layer["down"] for layer in p.values())

    d = grow(Pair(*(model(flat_layers(n), ensemble) for n in (2, 3))))
    assert [*map(_tree.name, d.zero)] == ["h_1/down"]


@pytest.mark.parametrize("first", [True, False])
def test_activations_before_or_behind_layers(first):
    def plain(p: Any, x: jax.Array) -> jax.Array:
        for layer in p.values():
            x = jnp.tanh(x) @ layer if first else jnp.tanh(x @ layer)
        return x

    models = (model({f"h{i}": (4, 4) for i in range(n)}, plain) for n in (2, 4))
    d = grow(Pair(*models, mode="copy"))
    program((d.small, d.closed))
    assert len(d.closed.jaxpr.eqns) == 4


@pytest.mark.usefixtures("standard_promotion")
def test_a_stream_may_be_wider_than_the_layers():
    def mixed(p: Any, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.bfloat16)
        for i in range(len(p)):
            y = jnp.tanh(x @ p[f"h_{i}"]["up"].astype(x.dtype)).astype(np.float32)
            x = (x.astype(np.float32) + y @ p[f"h_{i}"]["down"]).astype(jnp.bfloat16)
        return x

    d = grow(Pair(model(flat_layers(2), mixed), model(flat_layers(3), mixed)))
    assert [*map(_tree.name, d.zero)] == ["h_1/down"]


def test_a_stream_may_be_laid_out_anew():
    def rows(p: Any, x: jax.Array) -> jax.Array:
        for i in range(len(p)):
            y = x.reshape(-1, 4) * 1.0
            x = (y + jnp.tanh(y @ p[f"h_{i}"]["up"]) @ p[f"h_{i}"]["down"]).reshape(x.shape)
        return x

    small, big = (model(flat_layers(n), rows, floats(2, 3, 4)) for n in (2, 3))
    assert [*map(_tree.name, grow(Pair(small, big)).zero)] == ["h_1/down"]


def test_leaves_cast_before_all_layers_are_zero_in_the_same_order():
    def cast(p: Any, x: jax.Array) -> jax.Array:
        p = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)
        return residual(p, x.astype(jnp.bfloat16))

    d = grow(Pair(model(flat_layers(2), cast), model(flat_layers(3), cast)))
    assert [*map(_tree.name, d.zero)] == ["h_1/down"]
