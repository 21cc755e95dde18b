"""What products read: as matrices, their grams, and the least squares that come of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from tests import shrink_models as models
from tests.shrink_models import dense_inputs, draw, normal
from tests.test_importance import Measured, states
from tests.zoo import prepared
from uscale_jax import _tree
from uscale_jax.trace import readings, tapped
from uscale_jax.trace.readings import Reading
from uscale_jax.trace.tracing import Model, Traced, trace


def read_of(apply: Any, params: Any, *inputs: Any) -> tuple[Traced, list[Reading]]:
    traced = trace([Model(apply, params)], inputs)
    return traced, readings.readings(traced)


def taken(traced: Traced, found: list[Reading], take: Any, *args: Any) -> list[Any]:
    """What is taken at every reading; None of those that are not met."""
    taps = {}
    for visit in {r.visit for r in found}:
        own = {i: r for i, r in enumerate(found) if r.visit == visit}
        taps[visit] = lambda xs, own=own: {i: take(r, xs) for i, r in own.items()}
    run = jax.jit(lambda args: tapped.run(traced.closed[-1], taps, args)[1])
    by_visit = jax.device_get(run(jax.tree.leaves(args)))
    return [by_visit[r.visit][i] if r.visit in by_visit else None for i, r in enumerate(found)]


def error(reading: Reading, operands: Any) -> Any:
    """How far X @ W is from what the equation itself gives, and how large that is."""
    x, w = readings.matrices(reading, operands)
    params = reading.eqn.params[-1]
    if reading.is_convolution:
        out = jax.lax.conv_general_dilated(
            *operands,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            params["dimension_numbers"],
        )
        out = out.transpose(params["dimension_numbers"].out_spec)
        out = jnp.moveaxis(out, 1, -1).reshape(1, -1, out.shape[1])
    else:
        out = jax.lax.dot_general(*operands, params["dimension_numbers"])
        shape = x.shape[1], w.shape[2]
        out = out.reshape(x.shape[0], *(shape if reading.side == 0 else shape[::-1]))
        out = out if reading.side == 0 else out.swapaxes(1, 2)
    return jnp.max(jnp.abs(x @ w - out)), jnp.max(jnp.abs(out))


SOME = ["gpt-2", "gpt-2 by head", "llama", "lstm", "bidirectional", "dilated conv", "resnet"]
MORE = ["top-k mixture", "bilinear", "memory slots", "unet layer norm", "mlp-mixer", "cond"]


def check_matrices(apply: Any, params: Any, inputs: Any, least: int) -> None:
    with jax.enable_x64(True):
        traced, found = read_of(apply, params, *inputs)
        found = [r for r in found if r.groups == 1]
        errors = taken(traced, found, error, params, inputs)
    met = [each for each in errors if each is not None]
    assert len(met) >= least
    for apart, size in met:
        assert apart <= 1e-12 * max(float(size), 1.0)


@pytest.mark.parametrize("name", [*SOME, *MORE])
def test_matrices_multiply_to_what_the_product_is(name):
    model = prepared(name)
    check_matrices(model.model.apply, model.params, model.inputs, least=3)


def test_windows_of_other_strides_dilations_and_paddings_along_both_sides():
    check_matrices(models.conv, draw(models.CONV), (normal(9, 3, 9, 8, 2),), least=2)


def test_recurrent_products_are_readings():
    """What a loop carries is an activation, though it starts as zeros."""
    x = normal(9, 5, 7, 4)
    with jax.enable_x64(True):
        traced, found = read_of(models.lstm, draw(models.LSTM), x)
    read = {traced.keys[r.view.leaf] for r in found if r.view}
    assert read == {("in",), ("state",), ("read",)}


@pytest.mark.parametrize("name", ["encoder pre-norm", "llama", "perceiver", "vit"])
def test_grams_are_those_of_what_layers_are_called_with(name):
    model = prepared(name)
    wanted = dense_inputs(model.model.apply, model.params, model.inputs)
    with jax.enable_x64(True):
        traced, found = read_of(model.model.apply, model.params, *model.inputs)
        found = [r for r in found if r.view and not r.is_convolution]
        grams = taken(traced, found, readings.gram, model.params, model.inputs)
        sums = taken(traced, found, readings.energies, model.params, model.inputs)
    met = set()
    for reading, gram, energy in zip(found, grams, sums, strict=True):
        kernel = _tree.name(traced.keys[reading.view.leaf])
        (x,) = wanted[kernel]
        met.add(kernel)
        np.testing.assert_allclose(gram[0], x.T @ x, rtol=1e-4, atol=1e-4 * np.abs(x).max() ** 2)
        np.testing.assert_allclose(energy["sum"][0], x.sum(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(energy["abs"][0], np.abs(x).sum(0), rtol=1e-5)
        np.testing.assert_allclose(energy["square"][0], (x**2).sum(0), rtol=1e-5)
    # Queries of learned latents: they are the same for all inputs, and no activations.
    assert {kernel for kernel in wanted if kernel not in met} <= {"params/cross/query/kernel"}


def test_queries_keys_and_values_read_the_same():
    model = prepared("encoder pre-norm")
    with jax.enable_x64(True):
        traced, found = read_of(model.model.apply, model.params, *model.inputs)
    of = {_tree.name(traced.keys[r.view.leaf]): r for r in found if r.view}
    parts = [of[f"params/Layer_0/attend/{p}/kernel"] for p in ("query", "key", "value")]
    assert len({r.first for r in parts}) == 1
    assert parts[0].first in [r.visit for r in parts]
    assert parts[0].first != of["params/Layer_0/mlp/up/kernel"].first


# Models whose outputs are linear in one leaf, which reads the units that go.
LINEAR = {
    "conv": (
        models.conv,
        models.CONV,
        "second",
        [(3, 9, 8, 2)],
        {"first": [(3, 4)], "second": [(2, 4)]},
    ),
    "experts": (
        models.experts,
        models.EXPERTS,
        "down",
        [(40, 5)],
        {"up": [(2, 5)], "down": [(1, 5)]},
    ),
    "heads": (
        models.attention,
        models.ATTENTION,
        "out",
        [(6, 8, 7)],
        {name: [(1, 3)] for name in ("q", "k", "v")} | {"out": [(0, 3)]},
    ),
    "mlp": (
        models.mlp,
        models.MLP,
        "down",
        [(40, 5)],
        {"middle": [(1, 6)], "shift": [(0, 6)], "down": [(0, 6)]},
    ),
    "parts": (
        models.whole_and_part,
        models.SIAMESE,
        "down",
        [(20, 5), (30, 5)],
        {"up": [(1, 5)], "down": [(0, 5)]},
    ),
    "siamese": (
        models.siamese,
        models.SIAMESE,
        "down",
        [(20, 5), (30, 5)],
        {"up": [(1, 5)], "down": [(0, 5)]},
    ),
}


def linear(name: str) -> tuple[Measured, str, tuple]:
    apply, sizes, leaf, shapes, small = LINEAR[name]
    inputs = (*(normal(20 + i, *shape) for i, shape in enumerate(shapes)),)
    return Measured(apply, draw(sizes), inputs, **small), leaf, inputs


def flat(outputs: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(outputs)])


@pytest.mark.parametrize("method", ["activation", "reconstruction"])
@pytest.mark.parametrize("name", LINEAR)
def test_no_other_leaf_would_give_outputs_closer_to_the_big_models(name, method):
    """By least squares on the outputs themselves, which are linear in the leaf."""
    model, leaf, inputs = linear(name)
    importance = model.importance(method, refit=True)
    refitted, params = model.shrunk(importance), model.shrunk(importance)
    with jax.enable_x64(True):
        plain = jax.device_get(us.shrink(model.params, us.select(model.plan, importance)))
        of = lambda p: flat(model.apply(p, *inputs))  # noqa: E731
        target = flat(model.apply(model.params, *inputs))
        with_leaf = lambda x: jnp.concatenate(  # noqa: E731
            [jnp.ravel(y) for y in jax.tree.leaves(model.apply({**params, leaf: x}, *inputs))]
        )
        matrix = np.asarray(jax.jacobian(with_leaf)(params[leaf])).reshape(len(target), -1)
        losses = [((of(p) - target) ** 2).sum() for p in (plain, refitted)]
    best = np.linalg.lstsq(matrix, target, rcond=None)[0]
    least = ((matrix @ best - target) ** 2).sum()
    assert least <= losses[1] <= least * (1 + 1e-3) < losses[0]
    for other in set(params) - {leaf}:
        np.testing.assert_array_equal(refitted[other], plain[other])


def test_an_expert_that_nothing_is_sent_to_stays_as_it_is():
    """What it would read has no gram to solve with."""
    params, x = draw(models.EXPERTS), normal(9, 40, 5)
    params["up"][1] = 0
    model = Measured(models.experts, params, x, up=[(2, 5)], down=[(1, 5)])
    importance = model.importance("reconstruction")
    kept, shrunk = model.kept("down", 1, importance), model.shrunk(importance)
    np.testing.assert_allclose(shrunk["down"][1], params["down"][1][kept], rtol=1e-12)
    h = np.maximum(x @ params["up"][2], 0)
    best = np.linalg.lstsq(h[:, kept], h @ params["down"][2], rcond=None)[0]
    np.testing.assert_allclose(shrunk["down"][2], best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("index", [0, 1])
def test_a_branch_that_is_never_taken_stays_as_it_is(index):
    def apply(p, x):
        branches = [lambda x, n=n: jnp.tanh(x @ p[f"up{n}"]) @ p[f"down{n}"] for n in "01"]
        return jax.lax.switch(jnp.int32(jnp.sum(x) > 0), branches, x)

    params = draw({"up0": (5, 8), "down0": (8, 3), "up1": (5, 7), "down1": (7, 3)})
    x = np.abs(normal(9, 40, 5)) * (1, -1)[1 - index]
    sizes = {"up0": [(1, 5)], "down0": [(0, 5)], "up1": [(1, 4)], "down1": [(0, 4)]}
    model = Measured(apply, params, x, **sizes)
    importance = model.importance("reconstruction")
    shrunk = model.shrunk(importance)
    for n in (0, 1):
        up, down = params[f"up{n}"], params[f"down{n}"]
        kept, h = model.kept(f"down{n}", 0, importance), np.tanh(x @ up)
        best = np.linalg.lstsq(h[:, kept], h @ down, rcond=None)[0] if n == index else down[kept]
        np.testing.assert_allclose(shrunk[f"down{n}"], best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("index", [0, 1])
def test_branches_that_read_the_same_are_read_when_they_are_taken(index):
    def apply(p, x, index):
        h = jnp.tanh(x @ p["up"])
        return jax.lax.switch(index, [lambda h, n=n: h @ p[f"down{n}"] for n in "01"], h)

    params = draw({"up": (5, 8), "down0": (8, 3), "down1": (8, 3)})
    x, turns = normal(9, 60, 5), [(0, 1), (1, 1)]
    parts = [x[:30], x[30:]]
    batches = [(x, np.int32(turn)) for x, turn in zip(parts, turns[index], strict=True)]
    sizes = {"up": [(1, 5)], "down0": [(0, 5)], "down1": [(0, 5)]}
    model = Measured(apply, params, *batches, **sizes)
    importance = model.importance("reconstruction")
    kept, shrunk = model.kept("up", 1, importance), model.shrunk(importance)
    for n in (0, 1):
        rows = [x for x, turn in batches if turn == n]
        down = params[f"down{n}"]
        h = np.tanh(np.concatenate([np.zeros((0, 5)), *rows]) @ params["up"])
        best = np.linalg.lstsq(h[:, kept], h @ down, rcond=None)[0] if rows else down[kept]
        np.testing.assert_allclose(shrunk[f"down{n}"], best, rtol=1e-3, atol=1e-4)


def test_every_layer_of_a_scan_has_a_solution_of_its_own():
    params, x = draw(models.LAYERS), normal(9, 50, 4)
    model = Measured(models.layers, params, x, up=[(2, 4)], down=[(1, 4)])
    importance = model.importance("reconstruction")
    kept, shrunk = model.kept("down", 1, importance), model.shrunk(importance)
    for i in range(3):
        h = np.tanh(x @ params["up"][i])
        best = np.linalg.lstsq(h[:, kept], h @ params["down"][i], rcond=None)[0]
        np.testing.assert_allclose(shrunk["down"][i], best, rtol=1e-3, atol=1e-4)
        x = x + h @ params["down"][i]


@pytest.mark.parametrize("first", [False, True])
def test_a_kernel_of_all_layers_beside_one_of_each(first):
    """Both read the same: for one it is added up over the layers, for the other it is not."""
    params, x = draw({**models.LAYERS, "shared": (7, 4)}), normal(9, 50, 4)
    small = {"up": [(2, 4)], "down": [(1, 4)], "shared": [(0, 4)]}
    model = Measured(partial(models.shared_layers, shared_first=first), params, x, **small)
    importance = model.importance("reconstruction")
    kept, shrunk, seen = model.kept("down", 1, importance), model.shrunk(importance), []
    for i in range(3):
        h = np.tanh(x @ params["up"][i])
        best = np.linalg.lstsq(h[:, kept], h @ params["down"][i], rcond=None)[0]
        np.testing.assert_allclose(shrunk["down"][i], best, rtol=1e-3, atol=1e-4)
        seen.append(h)
        x = x + h @ params["down"][i] + h @ params["shared"]
    h = np.concatenate(seen)
    best = np.linalg.lstsq(h[:, kept], h @ params["shared"], rcond=None)[0]
    np.testing.assert_allclose(shrunk["shared"], best, rtol=1e-3, atol=1e-4)


def test_every_kernel_that_reads_a_state_has_a_solution():
    params, x = draw(models.LSTM), normal(9, 5, 30, 4)
    sizes = {"in": [(1, 16)], "state": [(0, 4), (1, 16)], "bias": [(0, 16)], "read": [(0, 4)]}
    model = Measured(models.lstm, params, x, **sizes)
    importance = model.importance("reconstruction")
    kept, shrunk = model.kept("read", 0, importance), model.shrunk(importance)
    gates = np.concatenate([np.array(kept) + 6 * gate for gate in range(4)])
    for h, leaf, columns in zip(
        states(params, x), ("state", "read"), (gates, np.arange(3)), strict=True
    ):
        best = np.linalg.lstsq(h[:, kept], h @ params[leaf][:, columns], rcond=None)[0]
        np.testing.assert_allclose(shrunk[leaf], best, rtol=1e-3, atol=1e-4)


def test_a_table_that_is_looked_up_is_not_solved_for():
    params, ids = draw(models.TIED), np.arange(22).reshape(2, 11) % 11
    sizes = {"table": [(1, 5)], "up": [(0, 5)], "down": [(1, 5)]}
    model = Measured(models.tied, params, ids, **sizes)
    importance = model.importance("reconstruction")
    kept, shrunk = model.kept("table", 1, importance), model.shrunk(importance)
    np.testing.assert_array_equal(shrunk["table"], params["table"][:, kept])
    np.testing.assert_array_equal(shrunk["down"], params["down"][:, kept])
    x = params["table"][ids.reshape(-1)]
    best = np.linalg.lstsq(x[:, kept], x @ params["up"], rcond=None)[0]
    np.testing.assert_allclose(shrunk["up"], best, rtol=1e-3, atol=1e-4)
