"""importance: every method as NumPy computes it, and what refitting makes of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from tests import resizing
from tests import shrink_models as models
from tests.shrink_models import axis, dense_inputs, draw, narrowed, normal, zoo_pair
from tests.zoo import ZOO


class Measured:
    """A model in float64, a plan from one with some sizes less, and what is measured of it."""

    def __init__(self, apply: Callable, params: Any, *batches: Any, **sizes: Any) -> None:
        self.apply, self.params, self.batches = apply, params, list(batches)
        first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
        with jax.enable_x64(True):
            shapes = narrowed(params, **sizes)
            self.plan = us.plan(apply, shapes, apply, params, *first, exact=False)

    def importance(self, method: str, batches: Any = None, **how: Any) -> us.Importance:
        given = self.batches if batches is None else batches
        with jax.enable_x64(True):
            return us.importance(self.apply, self.params, given, self.plan, method=method, **how)

    def scores(self, leaf: str, dim: int, method: str, **how: Any) -> np.ndarray:
        return self.importance(method, **how).scores[axis(self.plan, leaf, dim)]

    def shrunk(self, importance: us.Importance) -> Any:
        with jax.enable_x64(True):
            return jax.device_get(us.shrink(self.params, self.plan, importance=importance))

    def kept(self, leaf: str, dim: int, importance: us.Importance) -> list[int]:
        with jax.enable_x64(True):
            return list(us.select(self.plan, importance).kept[axis(self.plan, leaf, dim)])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def units_of_mlp(p, x):
    first = np.tanh(x @ p["up"] + p["bias"])
    return first, gelu(first @ p["middle"] + p["shift"])


def mixed_heads(p, x):
    """Queries, keys, and what the output projection reads, float[batch, time, heads, size]."""
    q, k, v = (np.einsum("btw,whd->bthd", x, p[name]) for name in ("q", "k", "v"))
    weights = softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]))
    return q, k, np.einsum("bhqk,bkhd->bqhd", weights, v)


def states(p, x):
    """The states before and after every step, (batch · time, hidden) each."""
    c = h = np.zeros((len(x), len(p["state"])))
    before, after = [], []
    for t in range(x.shape[1]):
        before.append(h)
        i, f, g, o = np.split(x[:, t] @ p["in"] + h @ p["state"] + p["bias"], 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        after.append(h)
    return np.concatenate(before), np.concatenate(after)


def channels(p, x):
    """What the second convolution reads: tanh of the first, by loops over its window."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    total = 0.0
    for i in range(3):
        for j in range(3):
            total = total + padded[:, i : i + height, j : j + width] @ p["first"][i, j]
    return np.tanh(total)


def share(values):
    return values / values.sum()


OF_ROWS = {
    "mean": lambda x, w: np.abs(x).sum(0),
    "activation": lambda x, w: (x**2).sum(0),
    "variance": lambda x, w: ((x - x.mean(0)) ** 2).sum(0) * (w**2).sum(1),
    "wanda": lambda x, w: (x**2).sum(0) * (w**2).sum(1),
}


@pytest.fixture(scope="module")
def mlp() -> Measured:
    params = draw(models.MLP)
    sizes = {"up": [(1, 5)], "bias": [(0, 5)], "middle": [(0, 5), (1, 6)], "shift": [(0, 6)]}
    return Measured(models.mlp, params, normal(9, 40, 5) + 0.3, **sizes, down=[(0, 6)])


@pytest.mark.parametrize("method", OF_ROWS)
def test_units_of_a_perceptron(mlp, method):
    first, second = units_of_mlp(mlp.params, mlp.batches[0])
    of = OF_ROWS[method]
    found = mlp.importance(method).scores
    wanted = share(of(first, mlp.params["middle"])), share(of(second, mlp.params["down"]))
    np.testing.assert_allclose(found[axis(mlp.plan, "bias", 0)], wanted[0], rtol=1e-4)
    np.testing.assert_allclose(found[axis(mlp.plan, "shift", 0)], wanted[1], rtol=1e-4)


@pytest.mark.parametrize("method", OF_ROWS)
def test_batches_of_other_sizes_are_one_large_batch(mlp, method):
    """A stream of them: each is looked at once."""
    x = mlp.batches[0]
    x = x + np.linspace(0, 3, len(x))[:, None]  # so that means of batches differ
    parts = (x[a:b] for a, b in ((0, 7), (7, 14), (14, 40)))
    pieces, whole = mlp.importance(method, parts).scores, mlp.importance(method, [x]).scores
    for name, each in whole.items():
        np.testing.assert_allclose(pieces[name], each, rtol=1e-4, err_msg=method)


def test_reconstruction_in_batches_is_that_of_one_large_batch(mlp):
    x = mlp.batches[0]
    found = [mlp.importance("reconstruction", batches) for batches in ([x], [x[:11], x[11:]])]
    for name, each in found[0].scores.items():
        np.testing.assert_allclose(found[1].scores[name], each, rtol=1e-2)
    a, b = map(mlp.shrunk, found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), a, b)


def test_magnitudes(mlp):
    p = mlp.params
    first = (p["up"] ** 2).sum(0) + p["bias"] ** 2 + (p["middle"] ** 2).sum(1)
    np.testing.assert_allclose(mlp.scores("bias", 0, "magnitude"), np.sqrt(first), rtol=1e-5)


def test_the_slope_of_a_loss_along_all_that_belongs_to_a_unit(mlp):
    p, x, y = mlp.params, mlp.batches[0], normal(8, 40, 3)

    def loss(out, x, y):
        return jnp.mean((out - y) ** 2)

    total = 0.0
    batches = [(x[:13], y[:13]), (x[13:], y[13:])]
    for batch in batches:
        with jax.enable_x64(True):
            g = jax.grad(lambda p, x, y: loss(models.mlp(p, x), x, y))(p, *batch)
        g = jax.device_get(g)
        into = (g["up"] * p["up"]).sum(0) + g["bias"] * p["bias"]
        total = total + (into + (g["middle"] * p["middle"]).sum(1)) ** 2
    found = mlp.scores("bias", 0, "taylor", batches=batches, loss=loss)
    np.testing.assert_allclose(share(found), share(total), rtol=1e-4)


def test_random_numbers_are_those_of_the_key(mlp):
    found = [mlp.importance("random", key=jax.random.key(k)).scores for k in (1, 1, 2)]
    for name, each in found[0].items():
        np.testing.assert_array_equal(each, found[1][name])
        assert len(set(each)) == len(each)
        assert np.all(each != found[2][name])


def heads_model() -> Measured:
    """Fewer heads, smaller values, smaller keys."""
    params = draw(models.ATTENTION)
    sizes = {name: [(1, 3), (2, 2)] for name in ("q", "k", "v")} | {"out": [(0, 3), (1, 2)]}
    return Measured(models.attention, params, normal(9, 3, 8, 7), **sizes)


def test_heads_and_what_is_in_them():
    model = heads_model()
    q, k, mixed = mixed_heads(model.params, model.batches[0])
    found = model.importance("wanda").scores
    read = (mixed**2).sum((0, 1)) * (model.params["out"] ** 2).sum(2)
    # A place of queries and keys is read where both meet: it adds q·k to every logit.
    met = ((q**2).sum(1) * (k**2).sum(1)).sum((0, 1))
    np.testing.assert_allclose(found[axis(model.plan, "out", 0)], share(read.sum(1)), rtol=1e-4)
    np.testing.assert_allclose(found[axis(model.plan, "out", 1)], share(read.sum(0)), rtol=1e-4)
    twice = [(x**2).sum((0, 1, 2)) for x in (q, k)]
    activation = model.scores("q", 2, "activation")
    np.testing.assert_allclose(found[axis(model.plan, "q", 2)], share(met), rtol=1e-4)
    np.testing.assert_allclose(activation, np.mean([*map(share, twice)], 0), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "sizes", "leaf"),
    [
        ("llama", ("kv_heads", "groups"), "attention/out"),
        ("gpt-2", ("heads", "head_dim"), "attention/c_proj"),
        ("gpt-2 by head", ("heads", "head_dim"), "attention/c_proj"),
    ],
)
def test_heads_that_are_cut_in_two_sizes(name, sizes, leaf):
    """Groups of queries that share a key, and places of heads, both within one dimension."""
    small, big = zoo_pair(name, sizes)
    old = ZOO[name].sizes
    params = resizing.random_params(big.params, dtype=np.float32)
    plan = us.plan(small.apply, small.params, big.apply, big.params, *big.inputs, exact=False)
    found = us.importance(big.apply, params, [tuple(big.inputs)], plan, method="activation")
    seen = dense_inputs(big.apply, params, big.inputs)
    energy = {i: (seen[f"params/Block_{i}/{leaf}/kernel"][0] ** 2).sum(0) for i in (0, 1)}
    within = len(energy[0]) // (old[sizes[0]] * old[sizes[1]])  # places of a head that stay
    cut = {i: x.reshape(old[sizes[0]], old[sizes[1]], within) for i, x in energy.items()}
    wanted = {
        **{(sizes[0], i): share(x.sum((1, 2))) for i, x in cut.items()},
        **{(sizes[1], i): share(x.sum((0, 2))) for i, x in cut.items()},
    }
    for (size, i), each in wanted.items():
        near = [name for name, x in found.scores.items() if np.shape(x) == each.shape]
        close = [np.allclose(share(found.scores[name]), each, rtol=1e-3) for name in near]
        assert any(close), (size, i)


def lstm_model() -> Measured:
    params = draw(models.LSTM)
    sizes = {"in": [(1, 16)], "state": [(0, 4), (1, 16)], "bias": [(0, 16)], "read": [(0, 4)]}
    return Measured(models.lstm, params, normal(9, 5, 30, 4), **sizes)


@pytest.mark.parametrize("method", ["mean", "activation", "wanda"])
def test_hidden_units_are_read_in_every_step_and_behind_them(method):
    model = lstm_model()
    before, after = states(model.params, model.batches[0])
    of, p = OF_ROWS[method], model.params
    wanted = (share(of(before, p["state"])) + share(of(after, p["read"]))) / 2
    np.testing.assert_allclose(model.scores("read", 0, method), wanted, rtol=1e-4)


def conv_model() -> Measured:
    sizes = {"first": [(3, 4)], "second": [(2, 4)]}
    return Measured(models.conv, draw(models.CONV), normal(9, 3, 9, 8, 2), **sizes)


@pytest.mark.parametrize("method", OF_ROWS)
def test_channels(method):
    model = conv_model()
    pixels = channels(model.params, model.batches[0]).reshape(-1, 6)
    kernel = model.params["second"].transpose(2, 0, 1, 3).reshape(6, -1)
    wanted = share(OF_ROWS[method](pixels, kernel))
    np.testing.assert_allclose(model.scores("first", 3, method), wanted, rtol=1e-4)


def test_complex_units_by_their_absolute_values():
    def apply(p, x):
        return jnp.abs(x.astype(p["up"].dtype) @ p["up"] @ p["down"])

    parts = [draw(models.SIAMESE, seed) for seed in (0, 9)]
    params = {name: (parts[0][name] + 1j * x).astype(np.complex64) for name, x in parts[1].items()}
    x = np.float32(normal(9, 40, 5))
    plan = us.plan(apply, narrowed(params, up=[(1, 5)], down=[(0, 5)]), apply, params, x)
    found = us.importance(apply, params, [x], plan, method="activation")
    wanted = share((np.abs(x @ params["up"]) ** 2).sum(0))
    np.testing.assert_allclose(found.scores[axis(plan, "up", 1)], wanted, rtol=1e-4)


def test_slopes_of_layers_that_have_integers():
    params = draw(models.LAYERS) | {"on": np.arange(21).reshape(3, 7) % 2}
    small = narrowed(params, up=[(0, 2), (2, 4)], down=[(0, 2), (1, 4)], on=[(0, 2), (1, 4)])
    apply, x = models.gated_layers, normal(9, 6, 4)
    with jax.enable_x64(True):
        plan = us.plan(apply, small, apply, params, x, depth="interleave", exact=False)
        how = {"method": "taylor", "loss": lambda out, x: jnp.mean(out**2)}
        found = us.importance(apply, params, [x], plan, **how)
    (scores,) = found.scores.values()
    assert scores.shape == (7,)
    assert scores.max() > 0 <= scores.min()  # 0 of units that the layers that stay have off


def lost(readers, gone) -> float:
    """What products lose, of all there is, when columns go and least squares make up for it."""
    total = 0.0
    for x, w, unit in readers:
        left = ~np.isin(unit, gone)
        best = np.linalg.lstsq(x[:, left], x @ w, rcond=None)[0]
        total += ((x[:, left] @ best - x @ w) ** 2).sum() / ((x @ w) ** 2).sum()
    return total


def one_by_one(readers, count: int, keep: int) -> list[int]:
    """Which units are left when always the one goes without which least is lost."""
    left = list(range(count))
    while len(left) > keep:
        gone = [i for i in range(count) if i not in left]
        left.remove(min(left, key=lambda i: lost(readers, [*gone, i])))
    return left


def cases() -> dict[str, tuple]:
    """Models, where their units are, and what reads them."""
    mlp_params, x = draw(models.MLP), normal(9, 60, 5)
    down = Measured(models.mlp, mlp_params, x, middle=[(1, 6)], shift=[(0, 6)], down=[(0, 6)])
    second = units_of_mlp(mlp_params, x)[1]
    heads = {name: [(1, 3)] for name in ("q", "k", "v")} | {"out": [(0, 3)]}
    attend = Measured(models.attention, draw(models.ATTENTION), normal(9, 6, 8, 7), **heads)
    p = attend.params
    mixed = mixed_heads(p, attend.batches[0])[2].reshape(-1, 15)
    lstm = lstm_model()
    before, after = states(lstm.params, lstm.batches[0])
    return {
        "mlp": (down, "shift", 0, [(second, mlp_params["down"], np.arange(9))], 9, 6),
        "heads": (attend, "out", 0, [(mixed, p["out"].reshape(15, 6), np.arange(15) // 3)], 5, 3),
        "lstm": (
            lstm,
            "read",
            0,
            [
                (before, lstm.params["state"], np.arange(6)),
                (after, lstm.params["read"], np.arange(6)),
            ],
            6,
            4,
        ),
    }


@pytest.mark.parametrize("name", ["mlp", "heads", "lstm"])
def test_units_go_that_the_others_can_best_make_up_for(name):
    model, leaf, dim, readers, count, keep = cases()[name]
    found = model.importance("reconstruction")
    scores = found.scores[axis(model.plan, leaf, dim)]
    alone = [lost(readers, [i]) for i in range(count)]
    assert scores.argmin() == np.argmin(alone)
    np.testing.assert_allclose(scores.min(), min(alone), rtol=1e-2)
    assert model.kept(leaf, dim, found) == one_by_one(readers, count, keep)


@pytest.mark.parametrize("name", ["mlp", "heads"])
def test_what_reads_the_units_that_stay_is_the_least_squares_solution(name):
    model, leaf, dim, readers, _, _ = cases()[name]
    found = model.importance("reconstruction")
    kept = model.kept(leaf, dim, found)
    ((x, w, unit),) = readers
    wanted = np.linalg.lstsq(x[:, np.isin(unit, kept)], x @ w, rcond=None)[0]
    out = {"mlp": "down", "heads": "out"}[name]
    refitted = model.shrunk(found)[out].reshape(wanted.shape)
    np.testing.assert_allclose(refitted, wanted, rtol=1e-3, atol=1e-4)
