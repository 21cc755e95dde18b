"""Layers of Equinox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.foreign.registry import by_name
from benchmarks.zoo.registry import Built, Model, Sizes, floats

REQUIRES = ("equinox",)

_SEQUENCE = {"batch": 2, "length": 5, "features": 4, "labels": 8}
_IMAGE = {"batch": 2, "side": 12, "colours": 3, "labels": 5}
Layers = dict[str, Any]


def _model(
    name: str,
    sizes: Sizes,
    layers: Callable[[Sizes, Callable[[], Any]], Layers],
    call: Callable[[Layers, Any], Any],
    data: Callable[[Sizes], np.ndarray],
    free: str,
    **fixed: str,
) -> Model:
    """Return a model of Equinox layers; ``call`` takes one example."""

    def build(s: Sizes) -> Built:
        keys = iter(jax.random.split(jax.random.key(0), 32))
        made = layers(s, lambda: next(keys))
        return by_name(made, lambda m, x: jax.vmap(lambda one: call(m, one))(x), data(s))

    return Model(f"equinox {name}", sizes, build, tuple(free.split()), fixed)


def _sequence(s: Sizes) -> np.ndarray:
    return floats(s["batch"], s["length"], s["features"])


def _mlp(s: Sizes, key: Callable[[], Any]) -> Layers:
    import equinox as eqx

    mlp = eqx.nn.MLP(s["features"], s["labels"], s["width"], 2, jax.nn.gelu, key=key())
    return {"mlp": mlp}


def _block(s: Sizes, key: Callable[[], Any]) -> Layers:
    import equinox as eqx

    width, heads = s["width"], s["heads"]
    return {
        "embed": eqx.nn.Linear(s["features"], width, key=key()),
        "norm": eqx.nn.LayerNorm(width),
        "attention": eqx.nn.MultiheadAttention(
            heads, width, qk_size=s["qk_dim"], vo_size=s["vo_dim"], use_key_bias=True, key=key()
        ),
        "rms": eqx.nn.RMSNorm(width),
        "mlp": eqx.nn.MLP(width, width, s["inner"], 1, jax.nn.silu, key=key()),
        "out": eqx.nn.Linear(width, s["labels"], key=key()),
    }


def _run_block(m: Layers, x: Any) -> Any:
    x = jax.vmap(m["embed"])(x)
    y = jax.vmap(m["norm"])(x)
    x = x + m["attention"](y, y, y, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
    x = x + jax.vmap(m["mlp"])(jax.vmap(m["rms"])(x))
    return jax.vmap(m["out"])(x)


def _rotary(s: Sizes, key: Callable[[], Any]) -> Layers:
    import equinox as eqx

    width, heads = s["heads"] * s["head_dim"], s["heads"]
    return {
        "embed": eqx.nn.Linear(s["features"], width, key=key()),
        "attention": eqx.nn.MultiheadAttention(heads, width, key=key()),
        "rope": eqx.nn.RotaryPositionalEmbedding(s["head_dim"]),
        "out": eqx.nn.Linear(width, s["labels"], key=key()),
    }


def _run_rotary(m: Layers, x: Any) -> Any:
    x = jax.vmap(m["embed"])(x)

    def rotate(q: Any, k: Any, v: Any) -> Any:
        turn = jax.vmap(m["rope"], in_axes=1, out_axes=1)
        return turn(q), turn(k), v

    return jax.vmap(m["out"])(x + m["attention"](x, x, x, process_heads=rotate))


def _cells(s: Sizes, key: Callable[[], Any]) -> Layers:
    import equinox as eqx

    return {
        "gru": eqx.nn.GRUCell(s["features"], s["width_0"], key=key()),
        "lstm": eqx.nn.LSTMCell(s["width_0"], s["width_1"], key=key()),
        "out": eqx.nn.Linear(s["width_1"], s["labels"], key=key()),
    }


def _run_cells(m: Layers, x: Any) -> Any:
    def step(state: Any, now: Any) -> tuple[Any, None]:
        first, second = state
        first = m["gru"](now, first)
        return (first, m["lstm"](first, second)), None

    zeros = [jnp.zeros(m[name].hidden_size, x.dtype) for name in ("gru", "lstm", "lstm")]
    (_, (hidden, _)), _ = jax.lax.scan(step, (zeros[0], (zeros[1], zeros[2])), x)
    return m["out"](hidden)


def _convs(s: Sizes, key: Callable[[], Any]) -> Layers:
    import equinox as eqx

    first = s["groups"] * s["per_group"]
    layers = [
        eqx.nn.Conv2d(s["colours"], first, 3, padding=1, key=key()),
        eqx.nn.GroupNorm(s["groups"], first),
        eqx.nn.Lambda(eqx.nn.PReLU()),
        eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Conv2d(first, s["channels"], 3, padding="SAME", key=key()),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.ConvTranspose2d(s["channels"], s["up"], 4, 2, key=key()),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.AdaptiveAvgPool2d((2, 2)),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(4 * s["up"], s["labels"], key=key()),
    ]
    return {"net": eqx.nn.Sequential(layers)}


MODELS = (
    _model(
        "MLP",
        {"batch": 4, "features": 5, "width": 7, "labels": 3},
        _mlp,
        lambda m, x: m["mlp"](x),
        lambda s: floats(s["batch"], s["features"]),
        "width",
        labels="output",
    ),
    _model(
        "MultiheadAttention",
        _SEQUENCE | {"width": 14, "heads": 3, "qk_dim": 6, "vo_dim": 7, "inner": 17},
        _block,
        _run_block,
        _sequence,
        "width heads qk_dim vo_dim inner",
        labels="output",
    ),
    _model(
        "RotaryPositionalEmbedding",
        _SEQUENCE | {"heads": 3, "head_dim": 6},
        _rotary,
        _run_rotary,
        _sequence,
        "heads",
        head_dim="array of numbers",
    ),
    _model(
        "GRUCell LSTMCell",
        _SEQUENCE | {"width_0": 7, "width_1": 9},
        _cells,
        _run_cells,
        _sequence,
        "width_0 width_1",
        labels="output",
    ),
    _model(
        "Conv2d GroupNorm",
        _IMAGE | {"groups": 4, "per_group": 6, "channels": 7, "up": 9},
        _convs,
        lambda m, x: m["net"](x),
        lambda s: floats(s["batch"], s["colours"], s["side"], s["side"]),
        "groups per_group channels up",
        labels="output",
    ),
)
