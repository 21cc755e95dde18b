"""Coordinate checks: right rules pass, planted wrong ones fail where they are wrong."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import uscale_jax as us

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
