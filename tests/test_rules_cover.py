"""Every primitive of the zoo's models and of Flax's layers has a rule."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax

from benchmarks.zoo.registry import models
from uscale_jax import _jax
from uscale_jax.trace.inline import program
from uscale_jax.trace.primitives import RULES

# The primitives that models are made of.


def linen(module: nn.Module, *inputs: np.ndarray, **options: Any) -> tuple[Any, ...]:
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.eval_shape(partial(module.init, **options), keys, *inputs)
    rngs = {"dropout": keys["dropout"]}
    return partial(module.apply, rngs=rngs, mutable=["batch_stats"], **options), params, *inputs


ACTIVATIONS = (
    "celu elu gelu glu hard_sigmoid hard_silu hard_tanh leaky_relu log_sigmoid log_softmax "
    "logsumexp normalize relu relu6 selu sigmoid silu soft_sign softmax softplus standardize tanh"
)
SEQUENCE = np.ones((2, 5, 6), np.float32)
IMAGE = np.ones((2, 8, 8, 6), np.float32)
TOKENS = np.ones((2, 5), np.int32)
CELLS = [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.MGUCell, nn.SimpleCell]


def linen_layers() -> list[tuple[Any, ...]]:
    attention = nn.MultiHeadDotProductAttention(3, dropout_rate=0.1, normalize_qk=True)
    mask = nn.make_causal_mask(SEQUENCE[..., 0])
    normed = [nn.LayerNorm(), nn.RMSNorm(), nn.InstanceNorm(), nn.GroupNorm(3)]
    return [
        *(linen(nn.RNN(cell(4)), SEQUENCE) for cell in CELLS),
        linen(nn.Bidirectional(nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.GRUCell(4))), SEQUENCE),
        linen(nn.RNN(nn.ConvLSTMCell(4, (3, 3))), IMAGE[:, None]),
        linen(nn.Dense(7), SEQUENCE),
        linen(nn.DenseGeneral((2, 7), axis=(-2, -1)), SEQUENCE),
        linen(nn.Einsum((6, 3, 4), "bsd,dhk->bshk"), SEQUENCE),
        linen(nn.Conv(4, (3, 3), strides=2, padding="CIRCULAR"), IMAGE),
        linen(nn.Conv(6, (3,), feature_group_count=3, kernel_dilation=2), SEQUENCE),
        linen(nn.ConvLocal(4, (3,)), SEQUENCE),
        linen(nn.ConvTranspose(4, (3,), strides=(2,)), SEQUENCE),
        linen(nn.Embed(11, 4), TOKENS),
        *(linen(norm, IMAGE) for norm in normed),
        *(linen(nn.BatchNorm(), IMAGE, use_running_average=stored) for stored in (True, False)),
        *(linen(attention, SEQUENCE, mask=mask, deterministic=d) for d in (True, False)),
        linen(nn.MultiHeadAttention(3), SEQUENCE, SEQUENCE),
        linen(nn.WeightNorm(nn.Dense(7)), SEQUENCE),
        linen(nn.SpectralNorm(nn.Dense(7)), SEQUENCE, update_stats=True),
        linen(nn.Dropout(0.5), SEQUENCE, deterministic=False),
        linen(nn.PReLU(), SEQUENCE),
        (partial(nn.max_pool, window_shape=(2, 2)), IMAGE),
        (partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False), IMAGE),
        (lambda a: nn.pool(a, np.inf, lax.min, (2, 2), (2, 2), "SAME"), IMAGE),
        *((getattr(nn, name), SEQUENCE) for name in ACTIVATIONS.split()),
        (partial(nn.one_hot, num_classes=7), TOKENS),
    ]


def graph(make: Callable[..., Any], *inputs: np.ndarray) -> tuple[Any, ...]:
    """An NNX module as a function of its state; rng streams and statistics advance with it."""
    module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    definition, state = nnx.split(module)

    def apply(state: Any, *inputs: Any) -> Any:
        merged = nnx.merge(definition, state)
        return merged(*inputs), nnx.state(merged)

    return apply, state, *inputs


def nnx_layers() -> list[tuple[Any, ...]]:
    normed = [nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.InstanceNorm]
    cells = [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell]
    options = {"dropout_rate": 0.1, "deterministic": False, "decode": False}
    return [
        graph(partial(nnx.Linear, 6, 7), SEQUENCE),
        graph(partial(nnx.LinearGeneral, (5, 6), (2, 7), axis=(-2, -1)), SEQUENCE),
        graph(partial(nnx.Einsum, "bsd,dhk->bshk", (6, 3, 4)), SEQUENCE),
        graph(partial(nnx.Conv, 6, 4, (3, 3)), IMAGE),
        graph(partial(nnx.ConvTranspose, 6, 4, (3, 3)), IMAGE),
        graph(partial(nnx.Embed, 11, 4), TOKENS),
        *(graph(partial(norm, 6), IMAGE) for norm in normed),
        graph(partial(nnx.GroupNorm, 6, num_groups=3), IMAGE),
        graph(partial(nnx.MultiHeadAttention, 3, 6, **options), SEQUENCE),
        graph(partial(nnx.LoRA, 6, 2, 7), SEQUENCE),
        graph(partial(nnx.LoRALinear, 6, 7, lora_rank=2), SEQUENCE),
        *(graph(lambda rngs, c=cell: nnx.RNN(c(6, 4, rngs=rngs)), SEQUENCE) for cell in cells),
        graph(partial(nnx.Dropout, 0.5), SEQUENCE),
    ]


OPAQUE: dict[str, str] = {}
"""Primitives of models that have no rule, and why not."""


def without_rule(fun: Callable[..., Any], *args: Any) -> set[str]:
    found = program([_jax.closed_jaxpr(fun, *args)[0]])
    return {eqn.name for eqn in found.equations} - RULES.keys() - OPAQUE.keys()


@pytest.mark.usefixtures("standard_promotion")
def test_every_primitive_of_the_zoo_has_a_rule():
    for model in models().values():
        built = model.build(model.sizes)
        assert not without_rule(built.apply, built.params, *built.inputs), model.name


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("layers", [linen_layers, nnx_layers])
def test_every_primitive_of_flax_has_a_rule(layers):
    for fun, *args in layers():
        assert not without_rule(fun, *args), fun
