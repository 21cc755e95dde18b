"""resize_checkpoint: values bit for bit those in memory, whatever wrote the checkpoint."""

import asyncio
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import uscale_jax as us
from tests.checkpoint_models import (
    ADAM,
    BIG,
    INPUT,
    SMALL,
    apply,
    load,
    params_of,
    planned,
    resized,
    save,
    state_of,
    train_state,
)
from uscale_jax import _checkpoint_write
from uscale_jax._checkpoint import resize_checkpoint

ocp = pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def plan() -> us.Plan:
    return planned()


def bits(x: Any) -> Any:
    if not isinstance(x, jax.Array | np.ndarray):
        return x
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if key else x)


def assert_same(got: Any, wanted: Any) -> None:
    """Equal structures, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert getattr(a, "dtype", type(a)) == getattr(b, "dtype", type(b))
        np.testing.assert_array_equal(bits(a), bits(b))


def described(path: Path) -> Any:
    return json.loads((path / "_METADATA").read_text())["tree_metadata"]


def manager(path: Path, **items: Any) -> Path:
    with ocp.CheckpointManager(path) as kept:
        kept.save(7, args=ocp.args.Composite(**items))
    return path / "7"


def test_grown_and_shrunk_values_and_all_that_is_described(plan, tmp_path):
    """Orbax describes the target as it does what it saves from memory."""
    tree = train_state(SMALL)
    big, small = resized(tree, plan), tmp_path / "small"
    save(small, tree)
    found = resize_checkpoint(small, tmp_path / "big", plan)
    assert found == tmp_path / "big"
    assert_same(load(found, big), big)
    save(tmp_path / "wanted", big)
    assert described(found) == described(tmp_path / "wanted")

    back = resize_checkpoint(found, tmp_path / "back", plan)
    assert_same(load(back, tree), resized(big, plan, us.shrink))
    assert described(back) == described(small)


def test_values_are_those_of_the_maps(plan, tmp_path):
    """Against indexing and one division in NumPy."""
    tree = train_state(SMALL)
    save(tmp_path / "small", tree)
    resize_checkpoint(tmp_path / "small", tmp_path / "big", plan)
    got = load(tmp_path / "big", resized(tree, plan))
    up, down = np.asarray(tree["params"]["layers"][1]["up"]), np.asarray(tree["params"]["out"])
    rows, columns = plan.leaves["layers/1/up"].maps
    np.testing.assert_array_equal(got["params"]["layers"][1]["up"] * 2, up[rows][:, columns])
    np.testing.assert_array_equal(got["params"]["out"] * 2, down[plan.leaves["out"].maps[0]])
    nu = np.asarray(tree["opt_state"][0].nu["layers"][1]["up"])
    np.testing.assert_array_equal(got["opt_state"][0].nu["layers"][1]["up"], nu[rows][:, columns])


def pytree(path: Path, tree: Any) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def without_ocdbt(path: Path, tree: Any) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    return path


def zarr3(path: Path, tree: Any) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    return path


@pytest.mark.parametrize("write", [pytree, without_ocdbt, zarr3])
def test_other_ways_to_write(plan, tmp_path, write):
    tree = train_state(SMALL)
    big = resized(tree, plan)
    resize_checkpoint(write(tmp_path / "small", tree), tmp_path / "big", plan)
    assert_same(load(tmp_path / "big", big), big)


def test_a_step_of_a_manager_and_its_json(plan, tmp_path):
    """Parameters and optimizer apart, beside notes; the target is a step of another manager."""
    tree = train_state(SMALL)
    parts = {name: ocp.args.StandardSave(tree[name]) for name in ("params", "opt_state")}
    small = manager(tmp_path / "small", **parts, notes=ocp.args.JsonSave({"tokens": 5}))
    resize_checkpoint(small, tmp_path / "big" / "7", plan)
    big = resized(tree, plan)
    wanted = {name: ocp.args.StandardRestore(big[name]) for name in parts}
    with ocp.CheckpointManager(tmp_path / "big") as kept:
        assert kept.latest_step() == 7
        got = kept.restore(7, args=ocp.args.Composite(**wanted, notes=ocp.args.JsonRestore()))
    assert got["notes"] == {"tokens": 5}
    assert_same({name: got[name] for name in wanted}, {name: big[name] for name in wanted})


def test_the_api_v1(plan, tmp_path):
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1", reason="no v1 in this Orbax")
    write, read, tell = (  # the latter are the names until Orbax 0.12
        getattr(v1, name, None) or getattr(v1, old)
        for name, old in (
            ("save", "save_pytree"),
            ("load", "load_pytree"),
            ("metadata", "pytree_metadata"),
        )
    )
    tree = {**train_state(SMALL), "name": "a model"}
    write(tmp_path / "small", tree, custom_metadata={"run": 3})
    resize_checkpoint(tmp_path / "small", tmp_path / "big", plan)
    big = resized(tree, plan)
    assert_same(read(tmp_path / "big", big), big)
    assert tell(tmp_path / "big").custom_metadata == {"run": 3}


OPTIONS = {
    "noise": {"symmetry": "noise", "key": jax.random.key(3), "amount": 0.5},
    "uneven": {"symmetry": "uneven"},
    "zeros": {"new_layers": "zeros"},
    "optimizer": {"optimizer": ADAM},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_grow_and_resize_state(plan, tmp_path, name):
    tree, options = train_state(SMALL), OPTIONS[name]
    of_grow = {k: v for k, v in options.items() if k in ("symmetry", "key", "amount")}
    of_state = {k: v for k, v in options.items() if k not in of_grow}
    save(tmp_path / "small", tree)
    resize_checkpoint(tmp_path / "small", tmp_path / "big", plan, **options)
    big = resized(tree, plan, lambda *args: us.grow(*args, **of_grow), **of_state)
    assert_same(load(tmp_path / "big", big), big)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_narrow_parameters(plan, tmp_path, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), params_of(*SMALL))
    big = us.grow(params, plan, verify=False)
    save(tmp_path / "small", params)
    resize_checkpoint(tmp_path / "small", tmp_path / "big", plan)
    assert_same(load(tmp_path / "big", big), big)


def test_a_plan_from_json_keeps_lists(plan, tmp_path):
    tree = train_state(SMALL)
    big = resized(tree, plan)
    save(tmp_path / "small", tree)
    read = us.Plan.from_json(plan.to_json())
    resize_checkpoint(tmp_path / "small", tmp_path / "big", read)
    assert_same(load(tmp_path / "big", big), big)


def test_numpy_arrays_and_a_masked_state(plan, tmp_path):
    params = jax.tree.map(np.asarray, params_of(*SMALL))
    matrices = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)  # noqa: E731
    tx = optax.chain(optax.clip(1.0), optax.masked(optax.scale_by_adam(), matrices))
    tree = {"params": params, "opt_state": state_of(params_of(*SMALL), tx), "table": np.arange(4)}
    pytree(tmp_path / "small", tree)
    resize_checkpoint(tmp_path / "small", tmp_path / "big", plan)
    big = resized({**tree, "params": params_of(*SMALL)}, plan)
    assert_same(load(tmp_path / "big", big), big)


def test_units_that_were_chosen(plan, tmp_path):
    tree = train_state(BIG)
    importance = us.importance(apply, tree["params"], [(INPUT,)], plan, method="activation")
    chosen = us.select(plan, importance)
    save(tmp_path / "big", tree)
    resize_checkpoint(tmp_path / "big", tmp_path / "small", chosen)
    wanted = {
        **tree,
        "params": us.shrink(tree["params"], plan, importance=importance),
        "opt_state": us.resize_state(tree["opt_state"], chosen),
    }
    assert_same(load(tmp_path / "small", wanted), wanted)


class Net(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(5, width, rngs=rngs)
        self.last = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.first(x)))


def test_the_states_of_nnx(tmp_path):
    models = [Net(width, nnx.Rngs(width)) for width in (7, 17)]
    graph, small = nnx.split(models[0])
    apply = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    plan = us.plan(apply, small, apply, nnx.state(models[1]), INPUT)
    tree, wanted = (
        {"model": nnx.state(net), "optimizer": nnx.state(nnx.Optimizer(net, ADAM, wrt=nnx.Param))}
        for net in models
    )
    save(tmp_path / "small", tree)
    resize_checkpoint(tmp_path / "small", tmp_path / "big", plan)
    big = {
        "model": us.grow(small, plan),
        "optimizer": us.resize_state(tree["optimizer"], plan),
    }
    assert_same(load(tmp_path / "big", wanted), big)


def test_it_runs_where_an_event_loop_is_running(plan, tmp_path):
    """In a notebook."""
    tree = {"params": params_of(*SMALL), "table": np.arange(4)}
    pytree(tmp_path / "small", tree)

    async def cell() -> Path:
        return resize_checkpoint(tmp_path / "small", tmp_path / "big", plan)

    big = {**tree, "params": us.grow(tree["params"], plan)}
    assert_same(load(asyncio.run(cell()), big), big)


def test_zeros_that_the_optimizer_does_not_know_of(plan, tmp_path):
    """Their power is not measured, which does not matter as long as they are zeros."""
    tree = train_state(SMALL)
    zeros = jax.tree.map(jnp.zeros_like, tree["params"])
    tree["opt_state"] = {"adam": tree["opt_state"], "sums": zeros}
    save(tmp_path / "small", tree)
    resize_checkpoint(tmp_path / "small", tmp_path / "big", plan, optimizer=ADAM)
    big = resized(tree, plan, optimizer=ADAM)
    assert_same(load(tmp_path / "big", big), big)
    ones = jax.tree.map(jnp.ones_like, tree["params"])
    save(tmp_path / "other", {**tree, "opt_state": {**tree["opt_state"], "sums": ones}})
    with pytest.raises(ValueError, match="'sums/embed' does not scale with a power"):
        resize_checkpoint(tmp_path / "other", tmp_path / "two", plan, optimizer=ADAM)
    assert not (tmp_path / "two").exists()


def test_a_part_of_the_variables_and_averages(plan, tmp_path):
    """A plan of {"params": ...} on a tree that has more in it; averages are told of."""
    inner = lambda variables, x: apply(variables["params"], x)  # noqa: E731
    tree = train_state(SMALL)
    wrapped = lambda sizes: {"params": params_of(*sizes)}  # noqa: E731
    of_all = us.plan(inner, wrapped(SMALL), inner, wrapped(BIG), INPUT, depth="stack")
    save(tmp_path / "small", tree)
    resize_checkpoint(tmp_path / "small", tmp_path / "big", of_all)
    big = resized(tree, plan)
    assert_same(load(tmp_path / "big", big), big)

    average = jax.tree.map(lambda x: x / 2, tree["params"])
    save(tmp_path / "averaged", {**tree, "ema": average})
    with pytest.raises(ValueError, match=r"what 'ema/embed'.* is to the model is not clear"):
        resize_checkpoint(tmp_path / "averaged", tmp_path / "two", plan, params="params")
    places = {"params": ["params", "ema"], "opt_state": "opt_state"}
    resize_checkpoint(tmp_path / "averaged", tmp_path / "two", plan, **places)
    big = {**big, "ema": us.grow(average, plan)}
    assert_same(load(tmp_path / "two", big), big)


def test_a_state_alone(plan, tmp_path):
    state = train_state(SMALL)["opt_state"]
    save(tmp_path / "small", state)
    with pytest.raises(ValueError, match=r"named as in the plan at '0/mu', '0/nu'"):
        resize_checkpoint(tmp_path / "small", tmp_path / "big", plan)
    resize_checkpoint(tmp_path / "small", tmp_path / "big", plan, params=(), opt_state="")
    big = us.resize_state(state, plan)
    assert_same(load(tmp_path / "big", big), big)


def test_large_arrays_are_cut_into_chunks(tmp_path, monkeypatch):
    """As many as it takes to compress one at a time, unless sizes have no divisors."""
    monkeypatch.setattr(_checkpoint_write, "_CHUNK", 2**12)
    monkeypatch.setattr(_checkpoint_write, "_FEWEST_IN_A_CHUNK", 2**8)
    monkeypatch.setattr(_checkpoint_write, "_BATCH", 2**14)
    linear = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]  # noqa: E731
    sizes = lambda n: {"up": jnp.ones((5, n)), "down": jnp.ones((n, 48))}  # noqa: E731
    plan = us.plan(linear, sizes(50), linear, sizes(150), INPUT)
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), sizes(50))
    save(tmp_path / "small", params)
    resize_checkpoint(tmp_path / "small", tmp_path / "big", plan)
    big = us.grow(params, plan)
    assert_same(load(tmp_path / "big", big), big)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(tmp_path / "big").item_metadata
    shape = {name: stored[name].storage.chunk_shape for name in ("up", "down")}
    assert shape["up"] == (5, 150)
    assert np.prod(shape["down"]) * 4 <= 2**12
    assert _checkpoint_write._chunk_bytes((7919, 40), np.dtype(np.float32)) is None


def test_leaves_that_do_not_change_stay(tmp_path):
    """A plan that grows nothing copies the checkpoint."""
    tree = train_state(SMALL)
    same = us.plan(apply, tree["params"], apply, tree["params"], INPUT)
    save(tmp_path / "small", tree)
    resize_checkpoint(tmp_path / "small", tmp_path / "same", same)
    assert_same(load(tmp_path / "same", tree), tree)
    assert described(tmp_path / "same") == described(tmp_path / "small")
