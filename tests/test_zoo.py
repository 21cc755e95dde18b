"""Every model of the zoo: each free size grows exactly, each fixed one is refused, and why."""

import numpy as np
import pytest

import uscale_jax as us
from tests import resizing
from tests.zoo import EXACT, LOOSE, ZOO, big_model, prepared
from uscale_jax.trace import sizes
from uscale_jax.trace.tracing import Model, trace

FREE = [(name, size) for name, model in ZOO.items() for size in model.free]
FIXED = [(name, size) for name, model in ZOO.items() for size in model.fixed]

# Axes that no size of these models reaches: the module ties the head size of values, which is
# free, to that of rotated queries and keys, which is not.
TIED = ("attention/value/kernel", "attention/out/kernel")


def ratio(name: str, size: str) -> int:
    """2 and 3 in turn, so that growing together is not growing alike."""
    return 2 + ZOO[name].free.index(size) % 2


@pytest.mark.parametrize(("name", "size"), FREE)
def test_a_free_size_grows_with_the_function_kept(name, size):
    big = big_model(name, {size: ratio(name, size)})
    assert resizing.growth_error(prepared(name), big) <= LOOSE.get(name, EXACT)


@pytest.mark.parametrize("name", [name for name, model in ZOO.items() if len(model.free) > 1])
def test_all_free_sizes_grow_together(name):
    big = big_model(name, {size: ratio(name, size) for size in ZOO[name].free})
    assert resizing.growth_error(prepared(name), big) <= LOOSE.get(name, EXACT)


@pytest.mark.parametrize(("name", "size"), FIXED)
def test_a_fixed_size_is_refused_for_its_reason(name, size):
    with pytest.raises(ValueError, match=ZOO[name].fixed[size]) as refusal:
        us.trace_exponents(*prepared(name).given, big=tuple(big_model(name, {size: 2})))
    assert "Fix:" in str(refusal.value)


@pytest.mark.parametrize("name", ZOO)
def test_every_axis_called_free_grows_with_some_size(name):
    """So the axes that ``trace_axes`` calls free are the ones tested numerically above."""
    axes = us.trace_axes(*prepared(name).given)
    grown = {place for size in ZOO[name].free for place in grown_places(name, size)}
    missing = [axis for axis in axes.free if axis.why == "" and not grown & set(axis.places)]
    assert axes.free
    assert all(leaf.endswith(TIED) for axis in missing for leaf, _ in axis.places)


def grown_places(name: str, size: str) -> set[tuple[str, int]]:
    """Leaves and dimensions that change when a size does."""
    apply, params, *inputs = prepared(name).given
    traced = trace([Model(apply, params), big_model(name, {size: 2})], inputs)
    where = sizes.places(traced)
    return {place for atom in sizes.changing(traced) for place in where.get(atom, [])}


@pytest.mark.parametrize("name", ZOO)
def test_outputs_vary(name):
    """Outputs are not one number, which any growth would keep."""
    assert all(np.ptp(out) > 0 for out in prepared(name).outputs)
