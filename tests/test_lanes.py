"""What new lanes rest on: means and variances in programs, signs, and how lanes are decided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.nets import f32
from uscale_jax import _jax
from uscale_jax.trace import inline, lanes, two_pass
from uscale_jax.trace.lane_rules import domain
from uscale_jax.trace.lanes import CONSTANT, Fact, Lanes, Undecidable
from uscale_jax.trace.signs import Sign, signs

ZERO, MEAN, ANY = Fact.ZERO, Fact.MEAN, Fact.ANY


# Means and variances in programs.


def pair_of(fun, *shape):
    """The program of a function at two sizes of the dimension n."""
    shapes = [f32(*(n if size == "n" else size for size in shape)) for n in (4, 7)]
    return inline.program([_jax.closed_jaxpr(fun, shape)[0] for shape in shapes])


def names(program):
    return [eqn.name for eqn in program.equations]


def fast_variance(x):
    return (x * x).mean(-1) - x.mean(-1) ** 2


SAME_VARIANCE = {
    "squares": lambda x: jnp.square(x).sum(-1) / x.shape[-1] - lax.square(x.mean(-1)),
    "powers": lambda x: (x**2).mean(-1, keepdims=True) - x.mean(-1, keepdims=True) ** 2,
    "products": lambda x: (x * x).sum(1) * (1 / x.shape[1]) - x.mean(1) * x.mean(1),
    "converted": lambda x: fast_variance(x.astype(np.float16).astype(np.float32)),
    "laid out": lambda x: (x * x).mean(-1)[None, :, None] - (x.mean(-1) ** 2)[None, :, None],
    "moved": lambda x: (x * x).mean(0)[:, None] - (x.mean(0) ** 2).reshape(-1, 1),
}


@pytest.mark.parametrize("way", SAME_VARIANCE)
def test_variances_become_two_passes(way):
    fun = SAME_VARIANCE[way]
    program = pair_of(fun, *((2, "n") if way != "moved" else ("n", 2)))
    rewritten = two_pass.two_pass(program)
    assert names(rewritten).count("square") == 1
    assert names(rewritten).count("reduce_sum") == 2
    assert "sub" in names(rewritten)
    assert rewritten.outputs == program.outputs
    assert not two_pass.Means(rewritten).variances
    assert len(two_pass.Means(rewritten).centred) == 1


OTHER_DIFFERENCES = {
    "another axis": lambda x: (x * x).mean(0) - x.mean(1) ** 2,
    "another array": lambda x: (x * x).mean(-1) - jnp.tanh(x).mean(-1) ** 2,
    "another number": lambda x: (x * x).sum(-1) / (x.shape[-1] - 1) - x.mean(-1) ** 2,
    "no square": lambda x: jnp.abs(x).mean(-1) - x.mean(-1) ** 2,
    "another power": lambda x: (x**2).mean(-1) - x.mean(-1) ** 3,
    "the other way round": lambda x: x.mean(-1) ** 2 - (x * x).mean(-1),
    "transposed": lambda x: (x * x).mean(-1) - x.mean(-1).T ** 2,
    "the variance": lambda x: x.var(-1),
}


@pytest.mark.parametrize("way", OTHER_DIFFERENCES)
def test_other_differences_stay(way):
    program = pair_of(OTHER_DIFFERENCES[way], 3, 3, "n")
    assert two_pass.two_pass(program) is program


CENTRED = {
    "kept": (lambda x: x - x.mean(-1, keepdims=True), True),
    "in place": (lambda x: x - x.mean(-1)[..., None], True),
    "repeated": (lambda x: x - jnp.repeat(x.mean(-1)[..., None], x.shape[-1], -1), True),
    "turned": (lambda x: x.mean(-1, keepdims=True) - x, True),
    "there and back": (lambda x: x - x.mean(-1).T.T[..., None], True),
    "transposed": (lambda x: x - x.mean(-1).T[..., None], False),
    "two axes": (lambda x: x - x.mean((1, 2), keepdims=True), False),
    "the sum": (lambda x: x - x.sum(-1, keepdims=True), False),
    "fewer": (lambda x: x - x.sum(-1, keepdims=True) / (x.shape[-1] - 1), False),
    "another": (lambda x: x - jnp.tanh(x).mean(-1, keepdims=True), False),
    "squares": (lambda x: x * x - x.mean(-1, keepdims=True), False),
    "squared": (lambda x: x - x.mean(-1, keepdims=True) ** 2, False),
}


@pytest.mark.parametrize("way", CENTRED)
def test_means_that_are_subtracted(way):
    fun, found = CENTRED[way]
    means = two_pass.Means(pair_of(fun, 3, 3, "n"))
    assert [axis for _, axis in means.centred.values()] == ([2] if found else [])


# Signs and domains.

SIGNED = {
    "exp": (lambda x: jnp.exp(x), Sign.POSITIVE),
    "softmax": (lambda x: jax.nn.softmax(x), Sign.POSITIVE),
    "relu": (lambda x: jax.nn.relu(x), Sign.NONNEGATIVE),
    "square and more": (lambda x: (x * x).sum(-1) + 1e-3, Sign.POSITIVE),
    "even": (lambda x: x**4, Sign.NONNEGATIVE),
    "odd": (lambda x: x**3, Sign.ANY),
    "norm": (lambda x: jnp.sqrt(jnp.square(x).sum()), Sign.NONNEGATIVE),
    "less": (lambda x: jnp.exp(x) - 1, Sign.ANY),
    "chosen": (lambda x: jnp.where(x > 0, jnp.exp(x), 1.0), Sign.POSITIVE),
    "complex": (lambda x: lax.square(lax.complex(x, x)), Sign.ANY),
    "joined": (lambda x: jnp.concatenate([jnp.exp(x), x * x]), Sign.NONNEGATIVE),
    "less than nothing": (lambda x: jnp.abs(x) * -1.0, Sign.ANY),
}


@pytest.mark.parametrize("way", SIGNED)
def test_signs(way):
    fun, sign = SIGNED[way]
    program = pair_of(fun, 2, "n")
    assert signs(program).get(id(program.outputs[0]), Sign.ANY) is sign


def test_powers_are_defined_everywhere_unless_negative():
    program = pair_of(lambda x: (x**3, x**-3), 2, "n")
    found = {eqn.param("y"): domain(eqn) for eqn in program.equations if eqn.name == "integer_pow"}
    assert found[3] is None
    assert found[-3] is not None


# Decisions.


def test_facts_of_sums_and_products():
    assert lanes.both([ZERO, CONSTANT]) is ANY
    assert lanes.both([MEAN, CONSTANT]) is MEAN
    assert lanes.product([ZERO, ANY]) is ZERO
    assert lanes.product([MEAN, CONSTANT]) is MEAN
    assert lanes.product([MEAN, MEAN]) is ANY
    assert lanes.product([CONSTANT, CONSTANT]) == CONSTANT


def test_what_is_added_is_decided_together():
    a, b = lanes.undecided(), lanes.undecided()
    total = lanes.added(lanes.both, [a, b])
    assert lanes.could(total) == ZERO | MEAN
    lanes.need(total, MEAN)
    assert lanes.settled(a) == lanes.settled(b) == Lanes(MEAN)
    with pytest.raises(Undecidable):
        lanes.need(b, ZERO)


def test_what_is_added_to_known_lanes_is_of_their_kind():
    bias, gain = lanes.undecided(), lanes.undecided()
    lanes.added(lanes.both, [bias, Lanes(ZERO)])
    assert lanes.settled(bias).sure is ZERO
    shifted = lanes.added(lanes.both, [gain, Lanes(CONSTANT)])
    assert lanes.settled(gain).group is not None
    lanes.need(shifted, MEAN)
    assert lanes.settled(gain).sure is MEAN


def test_what_a_loop_carries_follows():
    first, following = lanes.undecided(), lanes.undecided()
    carried = lanes.undecided(lanes.could(first), [first])
    assert carried.group is not None
    lanes.tie(carried.group, following)
    lanes.need(carried, ZERO)
    assert lanes.settled(first).sure is lanes.settled(following).sure is ZERO


def test_a_loop_carries_only_what_follows_can_be():
    carried = lanes.undecided()
    assert carried.group is not None
    lanes.tie(carried.group, Lanes(ZERO))
    assert lanes.could(carried) is ZERO
    with pytest.raises(Undecidable):
        lanes.need(carried, MEAN)
