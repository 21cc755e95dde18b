"""Grown in the middle of training, with its optimizer: the same losses, step by step.

A small model is trained for 50 steps, grown, and both are trained for 50 more on the same batches,
the large one with ``scale_optimizer`` and a state from ``resize_state``, in float64.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uscale_jax import clip_by_global_norm, scale_optimizer
from uscale_jax._grow import grow
from uscale_jax._plan import Plan
from uscale_jax._planning import plan as make_plan
from uscale_jax._shrink import shrink
from uscale_jax._state import resize_state

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS = 50
LOSS, PARAMS = 1e-10, 1e-9  # relative, of the largest


class Net(NamedTuple):
    """A model, its sizes before and after, and what it is trained on."""

    apply: Callable[..., Any]
    shapes: Callable[..., dict[str, tuple[int, ...]]]
    small: tuple[int, ...]
    big: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    """Shape of the targets; those of language models are the next tokens."""


def norm(x, gain, axes=(-1,)):
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    variance = jnp.mean(jnp.square(centred), axes, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-3) * gain.reshape([1] * (x.ndim - 1) + [-1])


def mlp(p, x):
    h = x @ p["in"]
    y = norm(h, p["gain_a"]) @ p["up"] + p["bias"].reshape(1, -1)
    h = h + jnp.tanh(y) @ p["down"]
    return norm(h, p["gain"]) @ p["out"]


def rms_mlp(p, x):
    """Under RMSNorm lanes can be copied unequally often."""
    h = x @ p["in"]
    for i, gain in enumerate((p["gain_a"], p["gain"])):
        y = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-3)
        y = y * gain.reshape(1, -1)
        if i == 0:
            h = h + jnp.tanh(y @ p["up"] + p["bias"].reshape(1, -1)) @ p["down"]
    return y @ p["out"]


def mlp_shapes(width, n):
    return {
        "in": (5, width),
        "gain_a": (width,),
        "up": (width, n),
        "bias": (n,),
        "down": (n, width),
        "gain": (width,),
        "out": (width, 3),
    }


VOCABULARY, LENGTH, HEAD = 11, 6, 3


def transformer(p, tokens):
    h = p["tokens"][tokens] + p["positions"].reshape(1, LENGTH, -1)
    x = norm(h, p["gain_a"])
    q, k, v = (jnp.einsum("btd,dhc->bthc", x, p[name]) for name in ("q", "k", "v"))
    logits = jnp.einsum("bqhc,bkhc->bhqk", q, k) * HEAD**-0.5
    seen = jnp.tril(jnp.ones((1, 1, LENGTH, LENGTH), bool))
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30))
    h = h + jnp.einsum("bhqk,bkhc,hcd->bqd", weights, v, p["o"])
    h = h + jax.nn.gelu(norm(h, p["gain_b"]) @ p["up"]) @ p["down"]
    head = p["head"] if "head" in p else p["tokens"].T
    return norm(h, p["gain"]) @ head


def tied_shapes(width, heads, n):
    return {
        "tokens": (VOCABULARY, width),
        "positions": (LENGTH, width),
        "gain_a": (width,),
        **dict.fromkeys("qkv", (width, heads, HEAD)),
        "o": (heads, HEAD, width),
        "gain_b": (width,),
        "up": (width, n),
        "down": (n, width),
        "gain": (width,),
    }


def untied_shapes(*sizes):
    return {**tied_shapes(*sizes), "head": (sizes[0], VOCABULARY)}


def cnn(p, x):
    for i in "ab":
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, p[f"conv_{i}"], (1, 1), "SAME", dimension_numbers=dims)
        x = jax.nn.silu(norm(x, p[f"gain_{i}"], (0, 1, 2)) + p[f"bias_{i}"].reshape(1, 1, 1, -1))
    return jnp.mean(x, (1, 2)) @ p["out"]


def cnn_shapes(a, b):
    return {
        "conv_a": (3, 3, 2, a),
        "gain_a": (a,),
        "bias_a": (a,),
        "conv_b": (3, 3, a, b),
        "gain_b": (b,),
        "bias_b": (b,),
        "out": (b, 3),
    }


def lstm(p, x):
    width = p["recurrent"].shape[0]
    h = c = jnp.zeros((x.shape[0], width), x.dtype)
    for t in range(x.shape[1]):
        gates = x[:, t] @ p["in"] + h @ p["recurrent"] + p["bias"].reshape(1, -1)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return h @ p["out"]


def lstm_shapes(n):
    return {"in": (5, 4 * n), "recurrent": (n, 4 * n), "bias": (4 * n,), "out": (n, 3)}


NETS = {
    "mlp": Net(mlp, mlp_shapes, (4, 7), (8, 10), (13, 5), (13, 3)),
    "even mlp": Net(mlp, mlp_shapes, (4, 7), (8, 21), (13, 5), (13, 3)),
    "uneven lanes": Net(rms_mlp, mlp_shapes, (4, 7), (6, 10), (13, 5), (13, 3)),
    "transformer": Net(transformer, untied_shapes, (4, 2, 7), (8, 4, 10), (13, LENGTH), ()),
    "tied transformer": Net(transformer, tied_shapes, (4, 2, 7), (8, 6, 21), (13, LENGTH), ()),
    "cnn": Net(cnn, cnn_shapes, (3, 5), (6, 7), (13, 4, 4, 2), (13, 3)),
    "lstm": Net(lstm, lstm_shapes, (4,), (8,), (13, 3, 5), (13, 3)),
}


class Case(NamedTuple):
    """A net with parameters, batches, and a plan to grow it."""

    net: Net
    params: Any
    batches: Any
    plan: Plan


@cache
def case(name: str) -> Case:
    net, rng = NETS[name], np.random.default_rng(3)
    params = {
        key: jnp.asarray(rng.standard_normal(shape) * shape[0] ** -0.5 + ("gain" in key))
        for key, shape in net.shapes(*net.small).items()
    }
    if net.outputs:
        x, y = (rng.standard_normal((2 * STEPS, *shape)) for shape in (net.inputs, net.outputs))
    else:
        x = rng.integers(0, VOCABULARY, (2 * STEPS, *net.inputs))
        y = (3 * x + 1) % VOCABULARY
    big = {
        key: jax.ShapeDtypeStruct(shape, jnp.float64) for key, shape in net.shapes(*net.big).items()
    }
    batches = (jnp.asarray(x), jnp.asarray(y))
    return Case(net, params, batches, make_plan(net.apply, params, net.apply, big, batches[0][0]))


def loss(net: Net, params: Any, batch: Any) -> jax.Array:
    x, y = batch
    out = net.apply(params, x)
    if net.outputs:
        return jnp.mean(jnp.square(out - y))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, y))


@cache
def quick() -> dict[str, Any]:
    """Options under which XLA compiles several times faster, where it knows them."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative, compiler_options=options)(1.0)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


class Training:
    """An optimizer on a net, compiled once."""

    def __init__(self, one: Case, tx: Any) -> None:
        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(lambda p: loss(one.net, p, batch))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        self.batches = one.batches
        self.run = jax.jit(
            lambda carry, batches: jax.lax.scan(step, carry, batches),
            compiler_options=quick(),
        )

    def half(self, which: int, params: Any, state: Any) -> tuple[Any, Any, np.ndarray]:
        """The parameters, the state, and the losses of one half of the steps."""
        batches = jax.tree.map(lambda x: x[which * STEPS : (which + 1) * STEPS], self.batches)
        (params, state), losses = self.run((params, state), batches)
        return params, state, np.asarray(losses)


def apart(got: Any, wanted: Any) -> float:
    """The largest difference, relative to the largest value, over the leaves of two trees."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


class Trained(NamedTuple):
    """A small model half-way and at the end."""

    params: Any
    state: Any
    losses: np.ndarray
    """Of the second half."""
    final: Any


@cache
def trained(name: str, tx: Any) -> Trained:
    one = case(name)
    training = Training(one, tx)
    params, state, _ = training.half(0, one.params, tx.init(one.params))
    final, _, losses = training.half(1, params, state)
    assert np.all(np.isfinite(losses))
    assert np.ptp(losses) > 0.01 * losses[0], "it does not train"
    return Trained(params, state, losses, final)


def lock_step(name: str, tx: Any, **options: Any) -> tuple[float, float]:
    """How far the losses and the parameters of the grown model are from the small one's."""
    with jax.enable_x64(True):
        one, small = case(name), trained(name, tx)
        grown = grow(small.params, one.plan, verify=False)
        training = Training(one, scale_optimizer(tx, one.plan, **options))
        grown, _, losses = training.half(1, grown, resize_state(small.state, one.plan))
        return apart(losses, small.losses), apart(shrink(grown, one.plan), small.final)


def decayed(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def by_rank(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


ELEMENTWISE = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.02, momentum=0.9),
    "nesterov": optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.01),
    "adam with a large epsilon": optax.adam(0.01, eps=1e-3),
    "decoupled decay": optax.adamw(0.01, weight_decay=0.1),
    "decay before adam": optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.01)),
    "masked decay": optax.adamw(0.01, weight_decay=0.1, mask=decayed),
    "lion": optax.lion(0.003, weight_decay=0.1),
    "rmsprop": optax.rmsprop(0.003, initial_scale=1.0),
    "adagrad": optax.adagrad(0.03),
    "accumulation": optax.MultiSteps(optax.adam(0.01), 4),
    "injected schedule": optax.inject_hyperparams(optax.adam)(
        optax.cosine_decay_schedule(0.01, 2 * STEPS)
    ),
    "partition": optax.partition({"matrix": optax.adam(0.01), "vector": optax.sgd(0.05)}, by_rank),
    "if finite": optax.apply_if_finite(optax.adam(0.01), 3),
    "schedule-free": optax.contrib.schedule_free_adamw(0.01),
}


@pytest.mark.parametrize("optimizer", ELEMENTWISE)
def test_an_mlp_under_any_elementwise_optimizer(optimizer):
    losses, params = lock_step("mlp", ELEMENTWISE[optimizer], check=False)
    assert losses < LOSS
    assert params < PARAMS


@pytest.mark.parametrize("optimizer", ["decoupled decay", "nesterov", "lion"])
@pytest.mark.parametrize("net", ["uneven lanes", "transformer", "tied transformer", "cnn", "lstm"])
def test_other_models(net, optimizer):
    losses, params = lock_step(net, ELEMENTWISE[optimizer], check=False)
    assert losses < LOSS
    assert params < PARAMS


PER_LEAF = {
    "lamb": optax.lamb(0.01),
    "lars": optax.lars(0.1),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=3),
    "plain adafactor": optax.adafactor(
        0.01,
        min_dim_size_to_factor=3,
        multiply_by_parameter_scale=False,
        clipping_threshold=None,
    ),
    "clip per leaf": optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.5)),
}


@pytest.mark.parametrize("optimizer", PER_LEAF)
def test_norms_and_means_per_leaf_where_units_are_copied_equally_often(optimizer):
    losses, params = lock_step("even mlp", PER_LEAF[optimizer])
    assert losses < LOSS
    assert params < PARAMS


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_with_its_ratio_divided_out(decay):
    """Muon adds 1e-8 to norms of gradients, which are larger by √n: that is what is left."""
    tx = optax.contrib.muon(0.01, weight_decay=decay)
    losses, params = lock_step("even mlp", tx)
    assert losses < 1e-6
    assert params < 1e-5
    assert lock_step("even mlp", tx, check=False)[0] > 1e-3


@pytest.mark.parametrize("net", ["mlp", "tied transformer"])
def test_clipping_by_the_small_models_global_norm(net):
    with jax.enable_x64(True):
        clip = clip_by_global_norm(0.05, case(net).plan)
    losses, params = lock_step(net, optax.chain(clip, optax.sgd(0.5, momentum=0.9)))
    assert losses < LOSS
    assert params < PARAMS


@pytest.mark.parametrize("net", NETS)
def test_without_the_frame_training_is_another(net):
    """The negative twin: the same state, the optimizer as the large model sees it."""
    with jax.enable_x64(True):
        one, tx = case(net), ELEMENTWISE["nesterov"]
        small = trained(net, tx)
        grown = grow(small.params, one.plan, verify=False)
        _, _, losses = Training(one, tx).half(1, grown, resize_state(small.state, one.plan))
    assert np.max(np.abs(losses / small.losses - 1)) > 0.01


def test_a_bare_optimizer_with_a_state_of_the_large_model():
    """Adam by hand: α·m, no ε, moments divided by powers of m·n.  50 steps, without a frame."""
    with jax.enable_x64(True):
        one = case("mlp")
        adam = optax.scale_by_adam(eps=0.0)
        small = optax.chain(adam, optax.scale(-0.01))
        half = trained("mlp", small)
        grown = grow(half.params, one.plan, verify=False)
        grown_state = resize_state(half.state, one.plan, optimizer=small)
        by_factor = optax.stateless(
            lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, one.plan.lr_factors)
        )
        big = optax.chain(adam, by_factor, optax.scale(-0.01))
        carried = (grown_state[0], optax.EmptyState(), optax.EmptyState())
        _, _, losses = Training(one, big).half(1, grown, carried)
    assert apart(losses, half.losses) < LOSS


def replicas_differ(kernel):
    """How far the two copies of every unit are apart, relative to the units."""
    return float(jnp.linalg.norm(kernel[:, ::2] - kernel[:, 1::2]) / jnp.linalg.norm(kernel))


@pytest.mark.parametrize("symmetry", [None, "noise"])
def test_copies_become_different_units_only_where_something_tells_them_apart(symmetry):
    with jax.enable_x64(True):
        one, tx = case("mlp"), optax.adam(0.01)
        key = jax.random.key(0)
        grown = grow(one.params, one.plan, symmetry=symmetry, key=key, verify=False)
        framed = scale_optimizer(tx, one.plan, check=False)
        assert replicas_differ(grown["in"]) == 0
        grown, _, losses = Training(one, framed).half(0, grown, framed.init(grown))
        rank = np.linalg.matrix_rank(grown["in"], tol=1e-3)
        differ = replicas_differ(grown["in"])
    if symmetry is None:
        assert differ == 0
        assert rank == 4
    else:
        assert differ > 0.01
        assert rank == 5
    assert losses[-1] < losses[0]


def main() -> None:
    """Prints, for every model and optimizer, how far grown training departs."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    print(f"{'largest relative difference of':30}{'losses':>10}{'parameters':>13}")
    for net in NETS:
        for name, tx in ELEMENTWISE.items():
            losses, params = lock_step(net, tx, check=False)
            print(f"{net + ', ' + name:30}{losses:13.1e}{params:13.1e}", flush=True)


if __name__ == "__main__":
    main()
