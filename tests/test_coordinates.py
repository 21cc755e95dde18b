"""Coordinate checks: right rules pass, planted wrong ones fail where they are wrong."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import uscale_jax as us
from uscale_jax._coordinate_report import CoordinateCheck, Row

pytestmark = pytest.mark.usefixtures("standard_promotion")

GROWTH = (1, 2, 4, 8)
ENDS = (1, 8)
EPS = 1.0
"""An ε far above gradients, so that it matters."""


def cross_entropy(logits, inputs, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def draws(key, /, **shapes):
    """Kernels with variances of 1/fan_in, which is the first number."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    scaled = {
        name: rng.standard_normal(shape) / fan_in**0.5 for name, (fan_in, *shape) in shapes.items()
    }
    return {name: kernel.astype(np.float32) for name, kernel in scaled.items()}


# Two models; no two of their sizes are equal


def mlp(params, x):
    h = jnp.tanh(x @ params["in"] + params["bias"][None])
    return jnp.tanh(h @ params["mid"]) @ params["out"]


def mlp_params(key, r):
    n, m = 32 * r, 40 * r
    kernels = draws(key, **{"in": (7, 7, n), "mid": (n, n, m), "out": (m, m, 5)})
    return {**kernels, "bias": np.zeros(n, np.float32)}


def mlp_batches():
    rng = np.random.default_rng(0)
    draw = lambda: rng.standard_normal((11, 7)).astype(np.float32)  # noqa: E731
    return [(draw(), rng.integers(0, 5, 11)) for _ in range(3)]


HEADS, LAYERS, VOCABULARY, TOKENS = 5, 2, 13, 6


def normed(x, gain):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * gain[None, None]


def block(x, p, power):
    y = normed(x, p["norm_1"])
    q, k, v = (jnp.einsum("btd,dhe->bthe", y, p[name]) for name in ("query", "key", "value"))
    scores = jnp.einsum("bthe,bshe->bhts", q, k) / q.shape[-1] ** power
    seen = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))[None, None]
    mixed = jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(jnp.where(seen, scores, -1e9)), v)
    x = x + jnp.einsum("bthe,hed->btd", mixed, p["join"])
    return x + jax.nn.gelu(normed(x, p["norm_2"]) @ p["up"]) @ p["down"]


def transformer(params, tokens, power=0.5):
    x = params["embed"][tokens]
    x = jax.lax.scan(lambda x, p: (block(x, p, power), None), x, params["layers"])[0]
    return normed(x, params["norm"]) @ params["head"]


def transformer_params(key, r):
    d, e, f, n = 40 * r, 8 * r, 56 * r, LAYERS
    layers = dict.fromkeys(("query", "key", "value"), (d, n, d, HEADS, e))
    layers |= {"join": (HEADS * e, n, HEADS, e, d), "up": (d, n, d, f), "down": (f, n, f, d)}
    rest = {"embed": (1, VOCABULARY, d), "head": (d, d, VOCABULARY)}
    kernels = draws(key, **layers, **rest)
    gains = {name: np.ones((n, d), np.float32) for name in ("norm_1", "norm_2")}
    return {
        "layers": gains | {name: kernels[name] for name in layers},
        "norm": np.ones(d, np.float32),
        **{name: kernels[name] for name in rest},
    }


def transformer_batches():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (4, 3, TOKENS + 1))
    return [(each[:, :-1], each[:, 1:]) for each in tokens]


class Model(NamedTuple):
    apply: Callable[..., Any]
    params: Callable[..., Any]
    batches: list[Any]
    size: int


MODELS = {
    "mlp": Model(mlp, mlp_params, mlp_batches(), 32),
    "transformer": Model(transformer, transformer_params, transformer_batches(), 40),
    "transformer of 1/d": Model(
        partial(transformer, power=1.0), transformer_params, transformer_batches(), 40
    ),
}


@cache
def plan(name, r):
    model = MODELS[name]
    base, target = (model.params(jax.random.key(0), each) for each in (1, r))
    return us.plan(model.apply, base, model.apply, target, model.batches[0][0])


def width(name, r, rule, tx):
    model = MODELS[name]
    start = lambda key: rule.start(model.params(key, r))  # noqa: E731
    return us.Width(rule.apply(model.apply), start, us.scale_optimizer(tx, rule))


def checked(name, rule_of, tx, growth=GROWTH, **options):
    """The check of a model under a rule, a function of a plan."""
    model = MODELS[name]
    models = {model.size * r: width(name, r, rule_of(plan(name, r)), tx) for r in growth}
    return us.coordinate_check(models, model.batches, cross_entropy, seeds=(0, 1), **options)


# Rules that are right


# Widths in between change nothing but the time it takes: all of these pass at 1, 2, 4, 8 too.
@pytest.mark.parametrize(
    ("name", "rule", "optimizer", "steps", "growth"),
    [
        ("mlp", "mup", "adam", 4, GROWTH),
        ("mlp", "mup_multipliers", "adam", 4, ENDS),
        ("mlp", "mup", "sgd", 4, ENDS),
        ("transformer", "mup", "adam", 4, GROWTH),
        ("transformer", "mup_multipliers", "adam", 4, ENDS),
        ("transformer", "mup", "sgd", 30, ENDS),
    ],
)
def test_right_rules_pass_with_a_margin(name, rule, optimizer, steps, growth):
    tx = optax.sgd(0.3) if optimizer == "sgd" else optax.adam(1e-2)
    rule_of = partial(us.transfer, rule=rule, optimizer=optimizer)
    check = checked(name, rule_of, tx, growth, steps=steps)
    check.raise_if_failed()
    assert check.ok
    assert not check.failures
    assert len(check.modules) == {"mlp": 4, "transformer": 3 + 8 * LAYERS}[name]
    assert replace(check, tolerance=0.2).ok


def test_unscaled_epsilon_that_matters_passes_where_it_is_scaled():
    checked("mlp", us.transfer, optax.adam(1e-2, eps=EPS), ENDS).raise_if_failed()


# Planted wrong rules: what is wrong, and the module that is first to show it


def changed(rule, **fields):
    """The rule with other factors, by functions of a leaf."""
    leaves = {
        name: replace(leaf, **{field: of(leaf) for field, of in fields.items()})
        for name, leaf in rule.leaves.items()
    }
    return replace(rule, leaves=leaves)


def swapped_fans(plan):
    kernels = ("hidden", "input", "output")
    lr = lambda leaf: (  # noqa: E731
        1 / leaf.facts.fan_out.ratio if leaf.role in kernels and leaf.dims else leaf.learning_rate
    )
    return changed(us.transfer(plan), learning_rate=lr)


def plain_readout(plan):
    unless = lambda leaf, factor: 1.0 if leaf.role == "output" else factor  # noqa: E731
    return changed(
        us.transfer(plan),
        learning_rate=lambda leaf: unless(leaf, leaf.learning_rate),
        init=lambda leaf: unless(leaf, leaf.init),
    )


def readout_that_learns_too_fast(plan):
    lr = lambda leaf: 1.0 if leaf.role == "output" else leaf.learning_rate  # noqa: E731
    return changed(us.transfer(plan), learning_rate=lr)


def unscaled_epsilon(plan):
    return changed(us.transfer(plan), factors=lambda leaf: replace(leaf.factors, eps=1.0))


def factors_of_sgd(plan):
    sgd = us.transfer(plan, optimizer="sgd").leaves
    return changed(us.transfer(plan), learning_rate=lambda leaf: sgd[leaf.name].learning_rate)


def hidden_init(power):
    def rule_of(plan):
        init = lambda leaf: (  # noqa: E731
            leaf.init * leaf.facts.fan_in.ratio**power if leaf.role == "hidden" else leaf.init
        )
        return changed(us.transfer(plan), init=init)

    return rule_of


ADAM = optax.adam(1e-2)
WRONG = {
    "standard": (partial(us.transfer, rule="standard"), ADAM, "mid", "grows"),
    "swapped fans": (swapped_fans, ADAM, "in", "vanishes"),
    "plain readout": (plain_readout, ADAM, "out", "grows"),
    "readout too fast": (readout_that_learns_too_fast, ADAM, "out", "grows"),
    "unscaled ε": (unscaled_epsilon, optax.adam(1e-2, eps=EPS), "in", "vanishes"),
    "factors of SGD": (factors_of_sgd, ADAM, "in", "grows"),
    "hidden starts large": (hidden_init(0.5), ADAM, "mid", "starts larger"),
    "hidden starts small": (hidden_init(-0.5), ADAM, "mid", "starts smaller"),
}


@cache
def wrong(name):
    rule_of, tx, *_ = WRONG[name]
    return checked("mlp", rule_of, tx, ENDS)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_caught_where_they_are_wrong(name):
    check, (*_, module, fault) = wrong(name), WRONG[name]
    assert not check.ok
    assert next(iter(check.failures)) == module
    assert check.faults[module][0].what == fault
    assert not replace(check, tolerance=0.35).ok
    with pytest.raises(ValueError, match=f"'{module}' .*test_coordinates.py.*width"):
        check.raise_if_failed()


def test_modules_that_are_right_are_not_blamed():
    assert [*wrong("plain readout").failures] == ["out", "the output"]


def test_scores_without_their_factor_are_caught():
    """Under the rule of a model that divides scores by d, in one that divides them by √d."""

    def rule_of(given):
        grown = given.leaves["norm"].big != given.leaves["norm"].small
        return us.transfer(plan("transformer of 1/d", 8) if grown else given)

    check = checked("transformer", rule_of, ADAM, ENDS)
    assert next(iter(check.failures)).startswith("activations at tests/test_coordinates.py")


# Numbers


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
    assert "test_coordinates.py" in meeting
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
    assert any("while" in note and "test_coordinates.py" in note for note in check.notes)
    assert check.notes[0] in str(check)


# Verdicts on exponents


def judged(*rows, tolerance=0.25):
    """A check of modules with exponents of size and of change after both of two steps."""
    widths = np.array([32, 64, 128])
    powers = {str(i): (size, changes) for i, (_, size, changes) in enumerate(rows)}
    law = lambda power: 0.5 * (widths / 32.0) ** power  # noqa: E731
    return CoordinateCheck(
        widths=(*widths.tolist(),),
        modules={str(i): row for i, (row, *_) in enumerate(rows)},
        sizes={name: np.stack([law(size)] * 3, 1) for name, (size, _) in powers.items()},
        changes={
            name: np.stack([0 * widths, *map(law, changes)], 1)
            for name, (_, changes) in powers.items()
        },
        tolerance=tolerance,
    )


HIDDEN = Row("product", "model.py:3", 1e-7, fades=False)
READOUT = Row("product", "model.py:9", 1e-7, fades=True)
SCORES = Row("activations", "model.py:5", 1e-7, fades=True)


@pytest.mark.parametrize(
    ("row", "size", "changes", "wanted"),
    [
        (HIDDEN, 0.0, (0.2, -0.2), []),
        (HIDDEN, 0.5, (0.0, 0.0), [("starts larger", 0)]),
        (HIDDEN, -0.5, (0.0, 0.0), [("starts smaller", 0)]),
        (HIDDEN, 0.0, (0.5, 0.1), [("grows", 1)]),
        (HIDDEN, 0.0, (0.0, 0.5), [("grows", 2)]),
        (HIDDEN, 0.0, (-0.5, 0.0), []),
        (HIDDEN, 0.0, (-0.5, -0.5), [("vanishes", 1)]),
        (HIDDEN, 0.0, (0.0, -0.5), [("vanishes", 2)]),
        (READOUT, -1.0, (0.0, 0.0), []),
        (READOUT, 0.5, (0.0, 0.0), [("starts larger", 0)]),
        (READOUT, -0.5, (-0.5, -0.5), [("vanishes", 1)]),
        (SCORES, -0.5, (-0.5, -0.5), []),
        (SCORES, -0.5, (-1.0, -1.0), [("vanishes", 1)]),
        (SCORES, 0.0, (0.5, 0.5), [("grows", 1)]),
    ],
)
def test_verdicts(row, size, changes, wanted):
    check = judged((row, size, changes))
    assert [(fault.what, fault.since) for fault in check.faults["0"]] == wanted
    assert check.ok == (not wanted)
    assert all(f"{row.source}" in text and "Fix:" in text for text in check.failures.values())


def test_a_module_in_its_own_units_is_judged_by_what_reads_it():
    own = HIDDEN._replace(readers=("1",))
    assert judged((own, -0.5, (-0.5, -0.5)), (HIDDEN, 0.0, (0.0, 0.0))).ok
    assert "ok, by what reads it" in str(
        judged((own, -0.5, (-0.5, -0.5)), (HIDDEN, 0.0, (0.0, 0.0)))
    )
    assert not judged((own, 0.0, (-0.5, -0.5)), (HIDDEN, 0.0, (0.0, 0.0))).ok
    assert not judged((own, -0.5, (-0.5, -0.5)), (HIDDEN, -0.5, (0.0, 0.0))).ok
    assert not judged((HIDDEN, -0.5, (-0.5, -0.5)), (HIDDEN, 0.0, (0.0, 0.0))).ok


def test_a_change_that_is_rounding_proves_nothing():
    (fault,) = judged((HIDDEN._replace(rounding=0.6), 0.0, (0.0, 0.0))).faults["0"]
    assert fault.what == "is rounded away"


def test_what_went_wrong_first_comes_first():
    check = judged((HIDDEN, 0.0, (0.0, -0.5)), (HIDDEN, 0.0, (0.5, 0.5)), (HIDDEN, 0.5, (0.0, 0.0)))
    assert [*check.failures] == ["2", "1", "0"]


def test_a_message():
    check = judged((HIDDEN, 0.0, (0.5, 0.1)), (HIDDEN, 0.0, (0.0, 0.0)))
    wanted = (
        "1 of 2 modules do not train alike at widths 32 to 128.\n"
        "  '0' (product at model.py:3): its change after step 1 grows with width, as "
        "width^+0.50: 0.5 at 32 to 1 at 128. Fix: let its leaves learn more slowly with width, "
        "or multiply it by less\n"
        "Expected: changes of outputs that are the same at all widths, exponents of ±0.25. Fix: "
    )
    with pytest.raises(ValueError, match=re.escape(wanted)):
        check.raise_if_failed()


def test_a_module_that_moves_at_some_widths_only():
    check = judged((HIDDEN, 0.0, (0.0, 0.0)), (HIDDEN, 0.0, (0.0, 0.0)))
    check.changes["0"][0], check.changes["1"][-1] = 0, 0
    assert [check.faults[name][0].what for name in ("0", "1")] == ["grows", "vanishes"]


def test_a_plot(tmp_path):
    rows = [(HIDDEN, 0.0, (0.0, 0.0))] * 10 + [(HIDDEN, 0.0, (0.5, 0.5))]
    judged(*rows).plot(tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        judged((HIDDEN, 0.0, (0.0, 0.0))).plot(tmp_path / "check.png")


# What is refused


def tiny(n=4, lr=0.1):
    return us.Width(two_layers, two_layers_params(jax.random.key(0), n), optax.sgd(lr))


BATCH = (np.ones((11, 7), np.float32), np.ones((11, 3), np.float32))
PAIR = {4: tiny(4), 8: tiny(8)}


@pytest.mark.parametrize(
    ("models", "batches", "loss", "options", "text"),
    [
        ({4: tiny()}, [BATCH], squared, {}, r"models are of widths \[4\]. Expected: .* two widths"),
        ({4: tiny(), 0: tiny()}, [BATCH], squared, {}, "positive integers"),
        ({4: tiny(), 8: two_layers}, [BATCH], squared, {}, "the model of width 8 is .*us.Width"),
        (PAIR, [], squared, {}, "there are 0 batches"),
        (PAIR, [BATCH], squared, {"inputs": 3}, "apply takes 3"),
        (PAIR, [BATCH], squared, {"steps": 0}, "steps=0"),
        (PAIR, [BATCH], squared, {"seeds": ()}, "seeds=()"),
        (PAIR, [BATCH], None, {}, "loss is None"),
        (PAIR, [BATCH], lambda y, *_: jnp.square(y), {}, r"loss\(outputs.* is float32\[11,3\]"),
        ({4: tiny(), 8: tiny(8, 1e38)}, [BATCH], squared, {}, "not finite at width 8 after step 1"),
        ({4: tiny(), 8: tiny(8, np.nan)}, [BATCH], squared, {}, "lower the learning rate"),
        (PAIR, [(np.nan * BATCH[0], BATCH[1])], squared, {}, r"'in' \(product at .*step 0.*NaN"),
    ],
)
def test_refusals(models, batches, loss, options, text):
    with pytest.raises(ValueError, match=text):
        us.coordinate_check(models, batches, loss, **options)


def test_models_that_differ_are_refused_with_the_difference():
    other = tiny(8)._replace(apply=lambda p, x: two_layers(p, x @ (p["in"] @ p["in"].T)))
    with pytest.raises(ValueError, match="widths 4 and 8 do not have the same modules") as error:
        us.coordinate_check({4: tiny(), 8: other}, [BATCH], squared)
    assert "'in #2'" in str(error.value)
    assert "of width 8 only" in str(error.value)


def test_errors_of_the_model_say_how_it_was_called():
    with pytest.raises(TypeError) as error:
        us.coordinate_check(PAIR, [BATCH], squared, inputs=2)
    assert any("inputs=" in note for note in error.value.__notes__)
