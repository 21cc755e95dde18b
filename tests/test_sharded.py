"""Trees over a mesh of 2 × 4 devices: values, places, and what compiled programs exchange."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import uscale_jax as us
from tests import sharded_models
from tests.sharded_models import BIG, SMALL, onto, params_of, planned, specs
from uscale_jax import _grow, _parts, _shrink, _state_arrays, _work

pytestmark = pytest.mark.usefixtures("standard_promotion")
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


def exchanged(text: str) -> dict[str, int]:
    """Returns the elements of results of collectives on a device, by collective."""
    found: dict[str, int] = {}
    for shapes, name in COLLECTIVE.findall(text):
        sizes = [n for dims in re.findall(r"\w\[([\d,]*)\]", shapes) for n in [dims]]
        count = sum(math.prod(int(n) for n in dims.split(",") if n) for dims in sizes)
        found[name] = found.get(name, 0) + count
    return found


@pytest.fixture
def programs(monkeypatch) -> list[str]:
    """The compiled programs that make arrays of the other model."""
    texts: list[str] = []

    def spied(run: Any, sharding: Any) -> Any:
        function = _work.compiled(run, sharding)

        def call(*args: Any) -> Any:
            texts.append(function.lower(*args).compile().as_text())
            return function(*args)

        return call

    caches = (_grow._program, _shrink._program, _state_arrays._compiled)
    for module in (_grow, _shrink, _state_arrays):
        monkeypatch.setattr(module, "compiled", spied)
    for cached in caches:
        cached.cache_clear()
    yield texts
    for cached in caches:
        cached.cache_clear()


def assert_near(got: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * np.max(np.abs(b), initial=1e-30))


def assert_equal(got: Any, wanted: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_everything_is_as_without_a_mesh():
    place = lambda tree: onto(sharded_models.mesh(), tree)  # noqa: E731
    found, wanted = sharded_models.results(place), sharded_models.results()
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_near(found[name], wanted[name])
    kept = specs(place(params_of(*BIG)))
    for name in ("scaled unlike", "grown", "fresh", "keep_decay", "clip_by_global_norm"):
        assert specs(found[name]) == kept, name
    assert specs(found["shrunk"]) == specs(found["pruned"]) == kept
    moments = found["state"][0]
    without = [spec for spec, name in zip(kept, sorted(sharded_models.SPECS), strict=True)]
    del without[sorted(sharded_models.SPECS).index("steps")]
    assert specs(moments.mu) == specs(moments.nu) == without


@KINDS
def test_nothing_is_exchanged_where_copies_lie_beside_their_units(programs, kind):
    plan, over = planned(), sharded_models.mesh(kind)
    small, host = onto(over, params_of(*SMALL)), params_of(*SMALL)
    grown = us.grow(small, plan, verify=False)
    assert_equal(grown, us.grow(host, plan))
    assert specs(grown) == specs(small)
    assert_equal(us.shrink(grown, plan), us.shrink(us.grow(host, plan), plan))
    assert specs(us.shrink(grown, plan)) == specs(small)
    weights = {name: x for name, x in small.items() if name != "steps"}
    state = optax.TraceState(weights)
    resized = us.resize_state(state, plan)
    assert specs(resized) == specs(state)
    assert_equal(us.resize_state(resized, plan), state)
    assert len(programs) > 20
    assert [exchanged(text) for text in programs] == [{}] * len(programs)


@KINDS
def test_scaling_exchanges_nothing(kind):
    params = onto(sharded_models.mesh(kind), params_of(*BIG))
    weights = {name: x for name, x in params.items() if name != "steps"}
    programs = {
        "scale": jax.jit(lambda p: us.scale_params(p, 1.3)).lower(params),
    }
    for tx in (us.unit_scale_lr(1.7), us.unit_scale_lr(1.7, keep_decay=1e-4)):
        programs[str(tx)] = jax.jit(lambda u, p, tx=tx: tx.update(u, tx.init(p), p)).lower(
            weights, weights
        )
    tx = us.scale_optimizer(optax.adamw(0.1), planned())
    update = jax.jit(lambda u, s, p: tx.update(u, s, p))
    if kind == AxisType.Auto:
        programs["frame"] = update.lower(weights, jax.jit(tx.init)(weights), weights)
    for name, lowered in programs.items():
        assert exchanged(lowered.compile().as_text()) == {}, name


def random_map(seed: int, size: int, big: int) -> np.ndarray:
    old = np.random.default_rng(seed).integers(-1, size, big)
    old[:size] = np.random.default_rng(seed).permutation(size)
    return old


@KINDS
@pytest.mark.parametrize("spec", [P(None, "model"), P(("data", "model"), None), P("model", "data")])
@pytest.mark.parametrize("seed", range(3))
def test_any_map_takes_what_numpy_takes(kind, spec, seed):
    """Along both dimensions, places in other parts and new ones."""
    x = np.random.default_rng(seed).standard_normal((8, 16)).astype(np.float32)
    maps = (random_map(seed, 8, 24), random_map(seed + 9, 16, 40))
    sharding = NamedSharding(sharded_models.mesh(kind), spec)
    placed = jax.device_put(x, sharding)
    local, ways = _parts.to_grow(placed, maps, (), sharding)
    assert [way.cut is not None for way in ways] == [e is not None for e in (*spec, None)[:2]]
    run = _work.compiled(lambda x, maps: _grow.taken(x, maps, ways=ways), sharding)
    wanted = x
    for axis, old in enumerate(maps):
        new = (old < 0).reshape([-1 if i == axis else 1 for i in range(2)])
        wanted = np.where(new, 0, np.take(wanted, np.maximum(old, 0), axis))
    found = run(placed, local)
    np.testing.assert_array_equal(found, wanted)
    assert found.sharding.is_equivalent_to(sharding, 2)


def test_parts_come_from_neighbours_that_have_them():
    """A shift by one unit: one message a part, of the part's size."""
    over = sharded_models.mesh()
    sharding = NamedSharding(over, P(None, "model"))
    x = jax.device_put(np.arange(48, dtype=np.float32).reshape(3, 16), sharding)
    old = np.repeat(np.roll(np.arange(16), -1), 2)
    (_, local), ways = _parts.to_grow(x, (None, old), (), sharding)
    run = _work.compiled(lambda x, old: _grow.taken(x, (None, old), ways=ways), sharding)
    text = run.lower(x, local).compile().as_text()
    assert exchanged(text) == {"collective-permute": 3 * 4}
    np.testing.assert_array_equal(run(x, local), np.asarray(x)[:, old])


def test_parts_are_gathered_where_most_of_them_are_needed():
    """Eight devices, and units of all of them in every part: the dimension of one leaf."""
    over = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(over, P("d"))
    x = jax.device_put(np.arange(64, dtype=np.float32), sharding)
    old = np.random.default_rng(0).integers(0, 64, 128)
    (local,), (way,) = _parts.to_grow(x, (old,), (), sharding)
    assert way.cut.sends is None
    run = _work.compiled(lambda x, old: _grow.taken(x, (old,), ways=(way,)), sharding)
    assert exchanged(run.lower(x, local).compile().as_text()) == {"all-gather": 64}
    np.testing.assert_array_equal(run(x, local), np.asarray(x)[old])


def test_copies_in_other_parts_are_summed():
    """Units whose copies lie in other parts than they: shrinking leaves it to the compiler."""
    over = sharded_models.mesh()
    sharding = NamedSharding(over, P("model"))
    x = jax.device_put(np.arange(16, dtype=np.float32), sharding)
    old = np.tile(np.arange(8), 2)
    assert _parts.to_shrink(x, (old,), (8,), sharding) == (None,)
    assert _parts.to_shrink(x, (np.repeat(np.arange(8), 2),), (8,), sharding) != (None,)


def test_places_can_be_asked_for():
    """From one device onto a mesh; by a function, by a tree, for the state too."""
    plan, over = planned(), sharded_models.mesh()
    host = params_of(*SMALL)
    where = onto(over, params_of(*BIG))
    by_name = lambda name, leaf: where[name.split("/")[-1]].sharding  # noqa: E731
    tree = jax.tree.map(lambda x: x.sharding, where)
    for asked in (by_name, tree):
        grown = us.grow(host, plan, shardings=asked)
        assert specs(grown) == specs(where)
        assert_equal(grown, us.grow(host, plan))
        back = us.shrink(grown, plan, shardings=NamedSharding(over, P()))
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(back))
        assert_near(back, host)
    weights = {name: jnp.asarray(x) for name, x in host.items() if name != "steps"}
    state = us.resize_state(optax.adam(0.1).init(weights), plan, shardings=by_name)
    wanted = specs({name: x for name, x in where.items() if name != "steps"})
    assert specs(state[0].mu) == wanted
    like = optax.adam(0.1).init({name: where[name] for name in weights})
    asked = jax.tree.map(lambda x: x.sharding, like)
    state = us.resize_state(optax.adam(0.1).init(weights), plan, shardings=asked)
    assert specs(state[0].nu) == wanted


def test_one_mesh_to_another():
    """Parts of four devices become parts of eight others in all."""
    plan = planned()
    four = jax.make_mesh((4,), ("m",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    spread = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(four, P(*[None] * (np.ndim(x) - 1)))),
        params_of(*SMALL),
    )
    where = onto(sharded_models.mesh(), params_of(*BIG))
    grown = us.grow(spread, plan, shardings=jax.tree.map(lambda x: x.sharding, where))
    assert specs(grown) == specs(where)
    assert_equal(grown, us.grow(params_of(*SMALL), plan))


@pytest.mark.parametrize("function", ["grow", "shrink", "resize_state"])
def test_sizes_that_do_not_divide_are_refused(function):
    plan = planned((16, 30))
    over, small = sharded_models.mesh(), params_of(*SMALL)
    trees = {
        "grow": lambda: us.grow(onto(over, small), plan),
        "shrink": lambda: us.shrink(
            us.grow(small, plan), plan, shardings=NamedSharding(over, P(("data", "model")))
        ),
        "resize_state": lambda: us.resize_state(
            optax.trace(0.9).init({k: v for k, v in onto(over, small).items() if k != "steps"}),
            plan,
        ),
    }
    with pytest.raises(ValueError, match=f"{function}: not all") as caught:
        trees[function]()
    wanted = {
        "grow": "'up' is float32[16,30], the sharding P('data', 'model') cuts dimension 1 into 4 "
        "parts: 32 is a size that fits",
        "shrink": "'bias' is float32[12], the sharding P(('data', 'model'),) cuts dimension 0 into "
        "8 parts: 16 is a size that fits",
        "resize_state": "'trace/bias' is float32[30]",
    }
    assert wanted[function] in str(caught.value).replace("PartitionSpec", "P")


def test_what_is_no_named_sharding_is_refused():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(TypeError, match="the sharding for 'bias' is SingleDevice"):
        us.grow(params_of(*SMALL), planned(), shardings=one)


def column_parallel(params: Any, x: Any) -> Any:
    """A model for Explicit axes: where parts meet it says so."""
    h = jnp.tanh(x @ params["up"] + params["bias"][None])
    h = jax.sharding.reshard(h, P())
    return h @ params["down"]


def test_an_explicit_mesh_in_training_and_under_jit():
    over = sharded_models.mesh(AxisType.Explicit)
    draw = lambda i, *s: jax.random.normal(jax.random.key(i), s)  # noqa: E731
    sizes = lambda n: {"up": draw(0, 5, n), "bias": draw(1, n), "down": draw(2, n, 4)}  # noqa: E731
    where = {"up": P(None, "model"), "bias": P("model"), "down": P(None, "model")}
    with jax.set_mesh(over):
        plan = us.plan(column_parallel, sizes(8), column_parallel, sizes(16), draw(3, 6, 5))
        small = {name: jax.device_put(x, where[name]) for name, x in sizes(8).items()}
        grown = us.grow(small, plan)  # and verified
        traced = jax.jit(lambda p: us.grow(p, plan))(small)
        back = jax.jit(lambda p: us.shrink(p, plan))(grown)
        assert_equal(traced, us.grow(sizes(8), plan))
        assert_equal(grown, traced)
        assert_equal(back, small)
        assert specs(grown) == specs(traced) == specs(back) == specs(small)
        tx = us.scale_optimizer(optax.adam(0.1), plan)

        @jax.jit
        def step(params, state):
            loss = lambda p: jnp.mean(jnp.square(column_parallel(p, draw(3, 6, 5)) - 1))  # noqa: E731
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        after, _, value = step(grown, tx.init(grown))
        assert specs(after) == specs(small)
    plain = us.grow(sizes(8), plan, verify=False)
    hidden = jnp.tanh(draw(3, 6, 5) @ plain["up"] + plain["bias"][None])
    loss = jnp.mean(jnp.square(hidden @ plain["down"] - 1))
    np.testing.assert_allclose(value, loss, rtol=1e-6)
