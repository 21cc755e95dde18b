"""Transfer from shapes alone, and what no leaf can carry: multipliers at lines of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import uscale_jax as us

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
IDS = np.array([[1, 4, 2], [0, 3, 10]])


def drawn(shapes):
    keys = iter(jax.random.split(jax.random.key(0), len(shapes)))
    return {name: jax.random.normal(next(keys), leaf.shape) for name, leaf in shapes.items()}


# Shapes alone


def shapes(n):
    net = {"in": f32(5, n), "bias": f32(n), "mid": f32(n, 2 * n), "out": f32(2 * n, 3)}
    return net | {"conv": f32(3, 3, n, 2 * n), "scale": f32()}


def apply(p, x):
    h = jnp.tanh(jnp.tanh(x @ p["in"] + p["bias"][None]) @ p["mid"]) @ p["out"]
    image = jnp.ones((1, 4, 4, p["in"].shape[1]))
    conv = jax.lax.conv_general_dilated(
        image, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return h * p["scale"] + jnp.sin(conv).mean()


@pytest.mark.parametrize("rule", ["mup", "mup_multipliers", "spectral", "standard_lr"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
def test_shapes_alone_say_what_the_trace_says(rule, optimizer):
    traced = us.transfer(
        us.plan(apply, shapes(4), apply, shapes(12), f32(2, 5)), rule, optimizer=optimizer
    )
    found = us.transfer((shapes(4), shapes(12)), rule, optimizer=optimizer)
    for name, leaf in traced.leaves.items():
        if name not in ("scale", "conv"):
            own = found.leaves[name]
            assert own.learning_rate == pytest.approx(leaf.learning_rate), name
            assert own.init == pytest.approx(leaf.init), name
            assert own.factors.eps == pytest.approx(leaf.factors.eps), name
    assert found.leaves["conv"].facts.fan_in == (36, 108)
    assert "nothing was traced" in found.notes[0]


def test_an_optimizer_takes_a_rule_from_shapes(standard_promotion):
    rule, params = us.transfer((shapes(4), shapes(12))), drawn(shapes(12))
    tx = us.scale_optimizer(optax.adam(0.1), rule)
    updates, _ = tx.update(params, tx.init(params), params)
    size = {name: float(jnp.abs(x).mean()) for name, x in updates.items()}
    assert size["mid"] == pytest.approx(0.1 / 3, rel=1e-3)
    assert size["in"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("trees", "rule", "words"),
    [
        (({"q": f32(8, 2, 4)}, {"q": f32(16, 4, 4)}), "mup", "'q' grows.*not to be told.*Fix"),
        (({"q": f32(8, 2)}, {"k": f32(8, 2)}), "mup", "different leaves: k, q.*Fix"),
        (({"q": f32(8, 2)}, {"q": f32(8)}), "mup", "'q' is .*same rank.*Fix"),
        ((shapes(4), shapes(8)), "u_mup", "looked up.*us.plan"),
        ((shapes(4), shapes(8)), "completep", "residual branches end.*us.plan"),
        ((shapes(4),), "mup", "two trees.*Fix"),
    ],
)
def test_what_shapes_do_not_tell_is_refused(trees, rule, words):
    with pytest.raises(ValueError, match=words):
        us.transfer(trees, rule)


# Places


def tied(p, ids):
    h = p["table"][ids]
    h = jax.jit(lambda h: h + jnp.tanh(h @ p["mid"]))(h)
    return jax.checkpoint(lambda h: h @ p["table"].T)(h)


def table(n):
    return {"table": f32(11, n), "mid": f32(n, n)}


def planned(small=4, big=12):
    return us.plan(tied, table(small), tied, table(big), IDS, exact=False)


def test_a_tied_readout_without_a_norm_is_multiplied_where_it_is():
    rule, params = us.transfer(planned()), drawn(table(12))
    (place,) = rule.places
    assert place.factor == pytest.approx(1 / 3)
    assert "test_transfer_places.py" in place.source
    assert f"the result at {place.source} must be multiplied" in str(rule)
    multiplied = jax.jit(rule.apply(tied))
    np.testing.assert_allclose(multiplied(params, IDS), tied(params, IDS) / 3, rtol=1e-5)
    got = jax.grad(lambda p: multiplied(p, IDS).sum())(params)
    wanted = jax.grad(lambda p: tied(p, IDS).sum() / 3)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)
    assert rule.leaves["table"].learning_rate == 1
    assert rule.leaves["mid"].learning_rate == pytest.approx(1 / 3)


def test_rules_that_leave_readouts_alone_multiply_nothing():
    rule, params = us.transfer(planned(), "standard_lr"), drawn(table(12))
    assert not rule.places
    np.testing.assert_array_equal(rule.apply(tied)(params, IDS), tied(params, IDS))


def test_in_a_loop_a_result_is_multiplied_in_every_turn():
    def looped(p, ids):
        h = p["table"][ids]
        turn = lambda h, _: (h + jnp.tanh(h @ p["mid"]), (h @ p["table"].T).sum())  # noqa: E731
        h, sums = jax.lax.scan(turn, h, None, length=3)
        return sums

    rule = us.transfer(us.plan(looped, table(4), looped, table(12), IDS, exact=False))
    params = drawn(table(12))
    got, wanted = rule.apply(looped)(params, IDS), looped(params, IDS) / 3
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_a_norm_behind_the_embedding_carries_it_and_nothing_is_multiplied():
    def normed(p, ids):
        h = p["table"][ids]
        h = h + jnp.tanh(h @ p["mid"])
        h = p["gain"][None, None] * h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-6)
        return h @ p["table"].T

    sizes = lambda n: {**table(n), "gain": f32(n)}  # noqa: E731
    rule = us.transfer(us.plan(normed, sizes(4), normed, sizes(12), IDS))
    assert not rule.places
    assert rule.leaves["gain"].learning_rate == pytest.approx(1 / 3)


# Kernels that are normalised


def test_of_a_weight_norm_the_gain_learns_and_the_kernel_starts_as_it_does():
    def normalised(p, x):
        kernel = p["gain"][None] * p["mid"] / jnp.linalg.norm(p["mid"], axis=0, keepdims=True)
        return jnp.tanh(jnp.tanh(x @ p["in"]) @ kernel) @ p["out"]

    sizes = lambda n: {  # noqa: E731
        "in": f32(5, n),
        "mid": f32(n, n),
        "gain": f32(n),
        "out": f32(n, 2),
    }
    rule = us.transfer(us.plan(normalised, sizes(4), normalised, sizes(16), f32(3, 5)))
    assert rule.leaves["gain"].init == pytest.approx(1)
    assert rule.leaves["gain"].learning_rate == pytest.approx(1 / 2)
