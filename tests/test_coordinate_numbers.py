"""Coordinate checks: sizes and changes against numbers by hand, and what counts as a module."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import uscale_jax as us
from tests.test_coordinates import draws

pytestmark = pytest.mark.usefixtures("standard_promotion")


def two_layers(params, x):
    return jnp.tanh(x @ params["in"] + params["bias"][None]) @ params["out"]


def two_layers_params(key, n):
    kernels = draws(key, **{"in": (7, 7, n), "out": (n, n, 3)})
    return {**kernels, "bias": np.linspace(-1, 1, n, dtype=np.float32)}


def squared(outputs, inputs, wanted):
    return jnp.mean(jnp.square(outputs - wanted))


def by_hand(params, batches, lr, steps):
    """Mean squares of outputs and of their changes on the first batch, in float64."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    first, found = None, []
    for step in range(steps + 1):
        x, wanted = batches[0]
        a = x @ p["in"] + p["bias"]
        outputs = [a, np.tanh(a) @ p["out"]]
        first = first or outputs
        pairs = zip(outputs, first, strict=True)
        found.append([(np.mean(y**2), np.mean((y - start) ** 2)) for y, start in pairs])
        x, wanted = batches[step % len(batches)]
        h = np.tanh(x @ p["in"] + p["bias"])
        slope = 2 * (h @ p["out"] - wanted) / wanted.size
        inner = slope @ p["out"].T * (1 - h**2)
        slopes = {"in": x.T @ inner, "bias": inner.sum(0), "out": h.T @ slope}
        p = {name: p[name] - lr * slopes[name] for name in p}
    return np.array(found)


def test_sizes_and_changes_are_those_by_hand():
    """Batches are of unlike sizes, so that the first one cannot be taken for another."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    batches = [(draw(11, 7), draw(11, 3)), (2 * draw(4, 7), draw(4, 3))]
    sizes, steps, seeds = (6, 9), 3, (5, 8)
    starts = {n: partial(two_layers_params, n=n) for n in sizes}
    models = {n: us.Width(two_layers, starts[n], optax.sgd(0.7)) for n in (9, 6)}
    check = us.coordinate_check(models, batches, squared, steps=steps, seeds=seeds)
    assert check.widths == sizes
    wanted = np.sqrt(
        [
            np.mean([by_hand(starts[n](jax.random.key(s)), batches, 0.7, steps) for s in seeds], 0)
            for n in sizes
        ]
    )
    for i, name in ((0, "in"), (1, "out"), (1, "the output")):
        np.testing.assert_allclose(check.sizes[name], wanted[:, :, i, 0], rtol=1e-5)
        np.testing.assert_allclose(check.changes[name], wanted[:, :, i, 1], rtol=1e-5, atol=1e-12)
        slope = np.log(wanted[1, -1, i, 1] / wanted[0, -1, i, 1]) / np.log(9 / 6)
        np.testing.assert_allclose(check.slopes[name].change, slope, rtol=1e-3, atol=1e-5)


def small(apply, params, *batches, loss=None, **options):
    """The check of one model as of two widths, for what it finds."""
    models = {n: (apply, params, optax.sgd(0.5)) for n in (2, 3)}
    loss = loss or (lambda y, *batch: jnp.mean(jnp.square(y - 1)))
    return us.coordinate_check(models, batches, loss, steps=2, **options)


def residual(h, kernel):
    return h + jnp.tanh(h @ kernel)


def test_layers_of_a_scan_are_those_of_a_loop():
    params = draws(jax.random.key(0), kernel=(5, 3, 5, 5), last=(5, 5, 2))
    x = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)

    def scanned(params, x):
        h = jax.lax.scan(lambda h, w: (residual(h, w), None), x, params["kernel"])[0]
        return h @ params["last"]

    def unrolled(params, x):
        for i in range(3):
            x = residual(x, params["kernel"][i])
        return x @ params["last"]

    one, other = (small(apply, params, x) for apply in (scanned, unrolled))
    names = ["kernel[0]", "kernel[1]", "kernel[2]", "last", "the output"]
    assert [*one.modules] == names
    assert [*other.modules] == ["kernel", "kernel #2", "kernel #3", *names[3:]]
    for a, b in zip(one.modules, other.modules, strict=True):
        np.testing.assert_allclose(one.sizes[a], other.sizes[b], rtol=1e-5)
        np.testing.assert_allclose(one.changes[a], other.changes[b], rtol=1e-4, atol=1e-7)


def test_all_turns_through_time_count():
    params = draws(jax.random.key(0), state=(5, 5, 5), read=(3, 3, 5))
    xs = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)

    def scanned(params, xs):
        def step(h, x):
            h = jnp.tanh(h @ params["state"] + x @ params["read"])
            return h, h

        return jax.lax.scan(step, xs[0] @ jnp.ones((3, 5)), xs)[1]

    def unrolled(params, xs):
        h = xs[0] @ jnp.ones((3, 5))
        for i in range(6):
            h = jnp.tanh(h @ params["state"] + xs[i] @ params["read"])
        return h

    one = small(scanned, params, xs, loss=lambda y, xs: jnp.mean(jnp.square(y[-1] - 1)))
    other = small(unrolled, params, xs)
    assert [*one.modules] == ["state", "read", "the output"]
    for name in ("state", "read"):
        turns = [name, *(f"{name} #{i}" for i in range(2, 7))]
        for a, b in ((one.sizes, other.sizes), (one.changes, other.changes)):
            wanted = np.sqrt(np.mean([b[turn] ** 2 for turn in turns], 0))
            np.testing.assert_allclose(a[name], wanted, rtol=1e-4, atol=1e-7)


def test_a_branch_that_is_not_taken_does_not_count():
    params = draws(jax.random.key(0), kernel=(5, 3, 5, 5))
    x = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)

    def apply(params, x):
        def layer(h, each):
            w, deep = each
            return jax.lax.cond(deep, lambda: residual(h, w), lambda: 2 * h), None

        return jax.lax.scan(layer, x, (params["kernel"], jnp.array([True, False, True])))[0]

    check = small(apply, params, x)
    first = np.sqrt(np.mean((x @ params["kernel"][0]) ** 2))
    np.testing.assert_allclose(check.sizes["kernel[0]"][:, 0], first, rtol=1e-5)
    assert not check.sizes["kernel[1]"].any()
    assert check.ok
    assert "does not move" in str(check)


def test_modules_are_products_lookups_meetings_and_outputs():
    params = draws(
        jax.random.key(0), table=(1, 13, 6), conv=(18, 3, 6, 5), plain=(5, 5, 7), gain=(1, 4)
    )

    def apply(params, tokens):
        x = params["table"][tokens]
        x = jax.lax.conv_general_dilated(
            x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        y = x @ jnp.ones((5, 5)) @ params["plain"][:, :6] * params["gain"][None, None, :1]
        scores = jnp.einsum("btd,bsd->bts", y, y) / 6
        mask = jnp.where(jnp.tri(8, dtype=bool), 0.0, -1e9)[None]
        return {"scores": jax.nn.softmax(scores + mask), "logits": y @ params["table"].T}

    loss = lambda outputs, tokens: jnp.mean(outputs["logits"])  # noqa: E731
    tokens = np.random.default_rng(0).integers(0, 13, (3, 8))
    check = small(apply, params, tokens, loss=loss)
    kinds = {name: row.kind for name, row in check.modules.items()}
    meeting = next(name for name in kinds if name.startswith("activations"))
    assert kinds == {
        "table": "lookup",
        "conv": "product",
        "plain": "product",
        meeting: "activations",
        "table #2": "product",
        "output logits": "output",
        "output scores": "output",
    }
    assert "test_coordinate_numbers.py" in meeting
    assert check.sizes[meeting][:, 0].max() < 1e3  # without the mask
    np.testing.assert_allclose(check.sizes["table #2"], check.sizes["output logits"], rtol=1e-6)
    assert check.modules["plain"].readers == (meeting, "table #2")
    assert check.modules["conv"].readers == ("plain",)


def test_what_is_ruled_out_does_not_count_and_what_is_no_float_does_not_learn():
    params = {"kernel": jnp.ones((2, 5)), "count": jnp.array(3)}
    x = np.ones((4, 2), np.float32)
    ruled_out = jnp.arange(5)[None] == params["count"]
    apply = lambda p, x: jnp.where(ruled_out, -jnp.inf, x @ p["kernel"])  # noqa: E731
    loss = lambda y, x: jnp.mean(jnp.where(ruled_out, 0.0, jnp.square(y)))  # noqa: E731
    check = small(apply, params, x, loss=loss)
    np.testing.assert_allclose(check.sizes["the output"][:, 0], 2.0)


@partial(jax.tree_util.register_dataclass, data_fields=["kernel"], meta_fields=[])
@dataclass
class Called:
    """A tree of parameters that can be called, as Equinox's modules can."""

    kernel: Any

    def __call__(self, x):
        return jnp.tanh(x @ self.kernel)


def test_parameters_that_can_be_called_are_parameters():
    check = small(Called.__call__, Called(jnp.ones((3, 5))), np.ones((4, 3), np.float32))
    assert [*check.modules] == ["kernel", "the output"]


def test_what_is_in_a_while_loop_is_said_to_be_left_out():
    def apply(params, x):
        going, step = lambda h: jnp.sum(h) < 3, lambda h: h + jnp.abs(h @ params["inner"])
        return x @ params["outer"] + jax.lax.stop_gradient(jax.lax.while_loop(going, step, x))

    params = draws(jax.random.key(0), inner=(5, 5, 5), outer=(5, 5, 5))
    check = small(apply, params, np.ones((4, 5), np.float32))
    assert [*check.modules] == ["outer", "the output"]
    assert any("while" in note and "test_coordinate_numbers.py" in note for note in check.notes)
    assert check.notes[0] in str(check)
