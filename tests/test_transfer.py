"""transfer: forms of one rule train alike, optimizers do what tables say, starts are measured."""

import math
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import uscale_jax as us
from tests.nets import f32

pytestmark = pytest.mark.usefixtures("standard_promotion")

BASE = {"width": 6, "heads": 2, "head": 3, "mlp": 8, "layers": 1}
TINY = {"width": 3, "heads": 1, "head": 3, "mlp": 4, "layers": 1}
TARGET = {"width": 12, "heads": 6, "head": 15, "mlp": 56, "layers": 1}
DEEP = TARGET | {"layers": 3}
TOKENS = np.random.default_rng(0).integers(0, 11, (12, 3, 6)).astype(np.int32)
IDS = TOKENS[0, :, :5]


def normed(h):
    h = h - jnp.mean(h, -1, keepdims=True)
    return h * lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-3)


def decoder(p, ids, divide=math.sqrt):
    h = p["tokens"][ids] + p["places"]
    for i in range(len(p) - 4):
        layer = p[f"h_{i}"]
        x = normed(h) * layer["gain"]
        q, k, v = (jnp.einsum("btw,whd->bthd", x, layer[name]) for name in "qkv")
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / divide(q.shape[-1])
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        h = h + jnp.einsum("bthd,hdw->btw", mixed, layer["o"])
        h = h + jnp.tanh(normed(h) @ layer["up"] + layer["bias"]) @ layer["down"] + layer["shift"]
    return normed(h) * p["gain"] @ p["out"]


def values(sizes: dict[str, int], seed: int = 0, size: float = 1.0) -> dict[str, Any]:
    """Kernels whose mean square is 1/fan_in, all else 1/4, and that times ``size``."""
    width, heads, head, mlp, layers = sizes.values()
    layer: dict[str, Any] = dict.fromkeys("qkv", (width, heads, head))
    layer |= {"o": (heads, head, width), "up": (width, mlp), "down": (mlp, width)}
    layer |= dict.fromkeys(("gain", "shift"), (1, 1, width)) | {"bias": (1, 1, mlp)}
    rest: dict[str, Any] = {"tokens": (11, width), "places": (1, 5, width), "gain": (1, 1, width)}
    rest |= {"out": (width, 11)} | {f"h_{i}": layer for i in range(layers)}
    rng = np.random.default_rng(seed)

    def draw(path: Any, shape: tuple[int, ...]) -> Any:
        name, x = path[-1].key, rng.standard_normal(shape)
        fan_in = math.prod(shape[:-1]) if name in ("down", "out", "o") else shape[0]
        n = fan_in if name in ("up", "down", "out", *"qkvo") else 4
        return size * x / math.sqrt(np.mean(x**2) * n)

    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree_util.tree_map_with_path(draw, rest, is_leaf=is_shape)


@cache
def planned(layers: int = 1) -> us.Plan:
    models = (decoder, values(BASE), decoder, values(TARGET | {"layers": layers}))
    with jax.enable_x64(True):
        return us.plan(*models, IDS, depth="stack" if layers > 1 else None)


def by_name(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in pairs}


def assert_close(got: Any, wanted: Any, tolerance: float) -> None:
    for (name, x), y in zip(by_name(wanted).items(), jax.tree.leaves(got), strict=True):
        apart = np.max(np.abs(x - y)) / np.max(np.abs(x))
        assert apart <= tolerance, f"{name}: {apart}"


# Forms


def trained(rule: us.Transfer, tx: Any, params: Any) -> list[Any]:
    """What the model reads, A·W, at the start and after every step."""
    apply, framed = rule.apply(decoder), us.scale_optimizer(tx, rule)
    seen, state = [us.scale_params(params, rule.multipliers)], framed.init(params)

    def loss(params: Any, ids: Any) -> Any:
        logits = jax.nn.log_softmax(apply(params, ids[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logits, ids[:, 1:, None], -1))

    @jax.jit
    def step(params: Any, state: Any, ids: Any) -> Any:
        updates, state = framed.update(jax.grad(loss)(params, ids), state, params)
        return optax.apply_updates(params, updates), state

    for ids in TOKENS:
        params, state = step(params, state, ids)
        seen.append(us.scale_params(params, rule.multipliers))
    return seen


@pytest.mark.parametrize(("rule", "layers"), [("mup", 1), ("completep", 3)])
def test_a_rule_trains_the_same_with_multipliers(rule, layers):
    tx = optax.adamw(0.02, eps=1e-6, weight_decay=0.1)
    rules = [us.transfer(planned(layers), name) for name in (rule, f"{rule}_multipliers")]
    assert any(factor != 1 for factor in by_name(rules[1].multipliers).values())
    fresh = values(TARGET | {"layers": layers}, seed=1)
    with jax.enable_x64(True):
        runs = [trained(each, tx, each.start(fresh)) for each in rules]
    for one, other in zip(*runs, strict=True):
        assert_close(other, one, 1e-12)
    assert np.max(np.abs(runs[0][-1]["out"] - runs[0][0]["out"])) > 0.05  # it did train


def test_u_mup_trains_as_mup_does_from_a_base_that_is_in_it_too():
    """Both on plans from one smaller model; but for what is looked up, which learns with 1/√d."""
    with jax.enable_x64(True):
        plans = [us.plan(decoder, values(TINY), decoder, values(n), IDS) for n in (BASE, TARGET)]
        base, rule = (us.transfer(plan, "u_mup") for plan in plans)
    mup = us.transfer(planned())
    rates = {name: x.factors.multiplier * x.factors.lr for name, x in base.leaves.items()}
    rates["tokens"] *= math.sqrt(BASE["width"] / TARGET["width"])

    def as_base(updates: Any, params: Any) -> Any:
        scaled = [rates[name] * u for name, u in by_name(updates).items()]
        return jax.tree.unflatten(jax.tree.structure(updates), scaled)

    tx = optax.chain(optax.scale_by_adam(eps=1e-200), optax.scale(-0.03))
    with jax.enable_x64(True):
        start = rule.start(values(TARGET, seed=2))
        run = trained(rule, tx, start)
        plain = us.scale_params(start, rule.multipliers)
        wanted = trained(mup, optax.chain(tx, optax.stateless(as_base)), plain)
    for one, other in zip(run, wanted, strict=True):
        assert_close(one, other, 1e-10)


# Optimizers


@pytest.mark.parametrize(
    ("kind", "tx"),
    [
        ("adam", optax.adam(0.1, eps=1e-2)),
        ("adam", optax.adamw(0.1, weight_decay=0.3)),
        ("adam", optax.rmsprop(0.1, eps=1e-3)),
        ("lion", optax.lion(0.1, weight_decay=0.3)),
        ("sgd", optax.sgd(0.1, momentum=0.9)),
        ("sgd", optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.1))),
    ],
)
def test_it_has_the_effect_of_growth(kind, tx):
    rule = us.transfer(planned(), optimizer=kind)
    params, grads = values(TARGET), values(TARGET, seed=3, size=0.01)
    with jax.enable_x64(True):
        frames = [us.scale_optimizer(tx, how, check=False) for how in (rule, planned())]
        got, wanted = (frame.update(grads, frame.init(params), params)[0] for frame in frames)
    assert_close(got, wanted, 1e-12)


@pytest.mark.parametrize("rule", ["mup", "mup_multipliers", "u_mup", "completep", "standard_lr"])
def test_rate_epsilon_and_decay_of_every_leaf_are_those_of_an_optimizer_of_its_own(rule):
    """Gradients are about as large as ε, so that it matters."""
    made = us.transfer(planned(3), rule, batch=3.0, tokens=5.0)
    rates, epsilons, decays = map(by_name, (made.learning_rate, made.epsilon, made.weight_decay))
    alone = {
        name: optax.adamw(0.1 * rates[name], eps=1e-3 * epsilons[name], weight_decay=0.3 * decay)
        for name, decay in decays.items()
    }
    params, grads = values(DEEP), values(DEEP, seed=4, size=0.001)
    names = jax.tree.unflatten(jax.tree.structure(params), list(alone))
    with jax.enable_x64(True):
        tx = optax.partition(alone, names)
        wanted, _ = tx.update(grads, tx.init(params), params)
        tx = us.scale_optimizer(optax.adamw(0.1, eps=1e-3, weight_decay=0.3), made)
        got, _ = tx.update(grads, tx.init(params), params)
    assert_close(got, wanted, 1e-12)
    for name, leaf in us.transfer(planned(3), rule).leaves.items():
        np.testing.assert_allclose(epsilons[name], leaf.factors.eps * math.sqrt(5 / 3), rtol=1e-12)


def update_ratios(rule: us.Transfer, tx: Any, size: Any) -> dict[str, float]:
    """Sizes of first updates: those of the target, as it starts, to those of the base."""
    sides = []
    with jax.enable_x64(True):
        fresh = ((values(BASE), tx), (rule.start(values(TARGET)), us.scale_optimizer(tx, rule)))
        for sizes, (params, framed) in zip((BASE, TARGET), fresh, strict=True):
            grads = values(sizes, seed=5)
            updates, _ = jax.jit(framed.update)(grads, framed.init(params), params)
            sides.append({name: size(name, u) for name, u in by_name(updates).items()})
    return {name: sides[1][name] / sides[0][name] for name in sides[0]}


def rms(name: str, x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize(
    ("kind", "tx"),
    [
        ("lion", optax.lion(0.1, weight_decay=0.0)),
        ("adafactor", optax.adafactor(0.1, min_dim_size_to_factor=1000)),
        ("adafactor", optax.lars(0.1)),
    ],
)
def test_updates_of_size_one_and_as_large_as_weights(kind, tx):
    rule = us.transfer(planned(), optimizer=kind)
    for name, ratio in update_ratios(rule, tx, rms).items():
        wanted = rule.leaves[name].factors.lr
        np.testing.assert_allclose(ratio, wanted, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["muon", "muon_rms"])
def test_norms_of_muon_s_updates(kind):
    """All but orthogonal after so many steps, for hidden kernels as they are summed over."""
    rule = us.transfer(planned(), optimizer=kind)
    dims = by_name(rule.muon_dimension_numbers, lambda node: hasattr(node, "output_axis"))
    axes = {name: (each.reduction_axis, each.output_axis) for name, each in dims.items()}
    wanted = dict.fromkeys("qkv", ((0,), (1, 2))) | dict.fromkeys(("up", "down"), ((0,), (1,)))
    assert axes == {f"h_0/{name}": x for name, x in (wanted | {"o": ((0, 1), (2,))}).items()}
    how: dict[str, Any] = {"consistent_rms": 0.2} if kind == "muon_rms" else {}
    how |= {"ns_coeffs": (1.5, -0.5, 0.0), "ns_steps": 9, "eps": 1e-30}
    numbers = rule.muon_dimension_numbers
    tx = optax.contrib.muon(0.1, **how, muon_weight_dimension_numbers=numbers)

    def norm(name: str, x: Any) -> float:
        if name not in dims:
            return rms(name, x)
        rows = math.prod(x.shape[i] for i in dims[name].reduction_axis)
        return float(np.linalg.norm(np.reshape(x, (rows, -1)), 2))

    for name, ratio in update_ratios(rule, tx, norm).items():
        leaf = rule.leaves[name]
        ones = math.sqrt(leaf.facts.fan_in.ratio * leaf.facts.fan_out.ratio) if name in dims else 1
        wanted = leaf.factors.lr * ones
        np.testing.assert_allclose(ratio, wanted, rtol=1e-5, err_msg=name)


# Starts


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(11, self.width, name="embed")(ids)
        return nn.Dense(7, name="out")(jnp.tanh(nn.Dense(self.width, name="mix")(h)))


def test_deviations_that_are_measured():
    """Flax starts ``Embed`` at 1/√features, biases at 0."""
    nets = [Net(width) for width in (8, 24)]
    base, target = (net.init(jax.random.key(i), IDS) for i, net in enumerate(nets))
    plan = us.plan(nets[0].apply, base, nets[1].apply, target, IDS)
    guessed, measured = (us.transfer(plan, initial=each) for each in (None, (base, target)))
    old, new = by_name(base), by_name(measured.start(target))
    for name, ratio in {"embed/embedding": 1, "mix/kernel": 3**-0.5, "out/kernel": 1 / 3}.items():
        found = np.std(new[f"params/{name}"]) / np.std(old[f"params/{name}"])
        np.testing.assert_allclose(found, ratio, rtol=1e-6, err_msg=name)
    assert not new["params/mix/bias"].any()
    assert guessed.init["params"]["embed"]["embedding"] == 1
    assert "initial=(base, target)" in guessed.notes[-1]
    assert "initial" not in "".join(measured.notes)


def fused(p, ids):
    """Queries, keys and values in one kernel and one bias; a tied readout behind a gain 1 + w."""
    h = p["tokens"][ids]
    q, k, v = (x.reshape(3, 5, 2, -1) for x in jnp.split(h @ p["qkv"] + p["bias"], 3, -1))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(3, 5, -1)
    return (normed(h + mixed @ p["o"]) * (1 + p["plus"])) @ p["tokens"].T


def fused_values(width: int, n: int) -> dict[str, Any]:
    shapes: dict[str, Any] = {"tokens": (11, width), "qkv": (width, 3 * n), "o": (n, width)}
    shapes |= {"bias": (1, 1, 3 * n), "plus": (1, 1, width)}
    draw = np.random.default_rng(n).standard_normal
    return {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}


SMALL, BIG = fused_values(6, 6), fused_values(12, 24)


def test_parts_of_a_leaf_and_gains_read_as_1_plus_w():
    plan = us.plan(fused, SMALL, fused, BIG, IDS)
    rule, apart = (us.transfer(plan, name) for name in ("mup", "mup_multipliers"))
    start, by_hand = rule.start(BIG), us.scale_params(BIG, rule.init)
    for name in ("qkv", "bias"):
        assert set(np.unique(rule.init[name]).round(6)) == {0.5, 1.0}  # 1/√d of one of q and k
        np.testing.assert_allclose(start[name], BIG[name] * rule.init[name], rtol=1e-6)
        np.testing.assert_array_equal(start[name], by_hand[name])
    assert rule.init["plus"] == apart.multipliers["plus"] == 0.5
    np.testing.assert_allclose(1 + start["plus"], (1 + BIG["plus"]) / 2, rtol=1e-5, atol=1e-6)
    assert "plus; rule.start(params) does that" in "".join(rule.notes)
    got = apart.apply(fused)(apart.start(BIG), IDS)
    np.testing.assert_allclose(got, fused(start, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_scores_of_larger_heads(power):
    """Copies meet r times as often, of which the model divides by a power: the rest is in m."""
    apply = partial(decoder, divide=lambda n: n**power)
    with jax.enable_x64(True):
        plan = us.plan(apply, values(BASE), apply, values(TARGET), IDS)
        rule, grown = us.transfer(plan), us.grow(values(BASE), plan, verify=False)
        np.testing.assert_allclose(apply(grown, IDS), apply(values(BASE), IDS), rtol=1e-9)
    q, k, gain = (rule.leaves[f"h_0/{name}"] for name in ("q", "k", "gain"))
    found = q.learning_rate * k.learning_rate * gain.learning_rate**2
    np.testing.assert_allclose(found, 5 ** (power - 1) / 2**2, rtol=1e-6)
    np.testing.assert_allclose(q.init * k.init * gain.init**2, 5 ** (power - 1), rtol=1e-6)
    (note,) = (note for note in rule.notes if "activations meet over 3 → 15" in note)
    assert f"test_transfer.py:{decoder.__code__.co_firstlineno + 6} " in note
    assert ("nothing beyond" in note) == (power == 1)


def sandwich(p, x):
    """Every branch ends with a norm whose gain is read as 1 + w."""
    for i in range(len(p)):
        y = jnp.tanh(normed(x) @ p[f"h_{i}"]["up"]) @ p[f"h_{i}"]["down"]
        x = x + normed(y) * (1 + p[f"h_{i}"]["plus"])
    return x


def test_branches_that_a_norm_makes_as_large_as_ever_are_refused():
    layer = {"up": f32(5, 7), "down": f32(7, 5), "plus": f32(1, 5)}
    small, big = ({f"h_{i}": layer for i in range(n)} for n in (1, 3))
    plan = us.plan(sandwich, small, sandwich, big, f32(2, 5), depth="stack")
    for rule in ("depth_mup", "completep", "completep_multipliers"):
        with pytest.raises(ValueError, match="a norm behind h_0/down takes that off.*Fix"):
            us.transfer(plan, rule)


def test_branches_of_new_layers_that_are_copies_are_not_known():
    models = (decoder, values(BASE), decoder, values(DEEP))
    plan = us.plan(*models, IDS, depth="stack", new_layers="copy")
    for rule in ("depth_mup", "completep", "completep_multipliers", "u_mup"):
        with pytest.raises(ValueError, match="new layers are not made identities.*Fix"):
            us.transfer(plan, rule)
    assert "'depth_mup' and 'completep' do" in "".join(us.transfer(plan).notes)
