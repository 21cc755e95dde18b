"""The benchmarks' models: causality, rotary embeddings, nnx against linen, exact scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.models import transformer_linen
from benchmarks.models.functional import TransformerConfig, causal_attention, rotary
from benchmarks.models.lstm import LSTM, LSTMConfig
from benchmarks.models.transformer import Transformer
from benchmarks.suite import tour
from benchmarks.training import Setting, Trainer, linen_model, nnx_model

CONFIG = TransformerConfig(vocab=29, hidden=10, layers=2, heads=6, kv_heads=3, head_dim=4, mlp=14)
LSTM_CONFIG = LSTMConfig(vocab=29, embedding=6, hidden=11, layers=2)


# Models


TRANSFORMER = nnx_model(lambda rngs: Transformer(CONFIG, rngs))
LSTM_MODEL = nnx_model(lambda rngs: LSTM(LSTM_CONFIG, rngs))


def linen_names(params: nnx.State) -> dict:
    """The nnx parameters as linen names them."""
    renamed: dict = {}
    for path, leaf in nnx.to_flat_state(params):
        names = [str(part) for part in path]
        if names[0] == "blocks":
            names[:2] = [f"blocks_{names[1]}"]
        node = renamed
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = leaf[...]
    return {"params": renamed}


def test_nnx_and_linen_transformers_agree():
    params = TRANSFORMER.initialised(0)
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab, (3, 7))
    linen = linen_model(transformer_linen.Transformer(CONFIG))
    same = linen_names(params)
    assert jax.tree.structure(same) == jax.tree.structure(
        jax.eval_shape(linen.init, jax.random.key(0))
    )
    logits = jax.jit(TRANSFORMER.apply)(params, tokens)
    np.testing.assert_allclose(logits, jax.jit(linen.apply)(same, tokens), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("model", [TRANSFORMER, LSTM_MODEL], ids=["transformer", "lstm"])
def test_future_tokens_do_not_change_past_logits(model):
    params = model.initialised(0)
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab, (2, 9))
    changed = np.concatenate([tokens[:, :5], (tokens[:, 5:] + 1) % CONFIG.vocab], axis=1)
    logits = jax.jit(model.apply)
    before, after = np.array(logits(params, tokens)), np.array(logits(params, changed))
    assert before.shape == (2, 9, CONFIG.vocab)
    np.testing.assert_allclose(before[:, :5], after[:, :5], rtol=1e-6, atol=1e-6)
    assert np.all(np.abs(before - after)[:, 5:].max(axis=-1) > 1e-4)


def test_rotary_products_depend_on_distance_only():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 3, 8)).astype(np.float32)

    @jax.jit
    def score(m: int, n: int) -> jax.Array:
        rotated = [rotary(x, jnp.array([at]), 100.0) for x, at in ((query, m), (key, n))]
        return jnp.sum(rotated[0] * rotated[1])

    np.testing.assert_allclose(score(3, 1), score(13, 11), rtol=1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3
    unmoved = jax.jit(rotary)(query, jnp.array([0]), 100.0)
    np.testing.assert_allclose(unmoved, query, rtol=1e-6)


def test_query_heads_share_key_heads_in_groups():
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.normal(size=(2, 5, heads, 4)).astype(np.float32) for heads in (6, 3, 3)
    )
    attention = jax.jit(causal_attention)
    grouped = attention(query, key, value, 100.0)
    full = attention(query, key.repeat(2, axis=2), value.repeat(2, axis=2), 100.0)
    np.testing.assert_allclose(grouped, full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"kv_heads": 4}, {"head_dim": 5}])
def test_impossible_sizes_are_refused(wrong):
    sizes = {"vocab": 29, "hidden": 10, "layers": 2, "heads": 6, "kv_heads": 3, "head_dim": 4}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransformerConfig(**(sizes | {"mlp": 14} | wrong))


# The tour


@pytest.mark.usefixtures("standard_promotion")
def test_exact_branch_follows_the_unchanged_one():
    trainer = Trainer(LSTM_MODEL)
    base = Setting(0.03)
    windows = np.random.default_rng(0).integers(0, 29, (4, 3, 8))
    state, _ = trainer.train(trainer.init(0, base), base, windows)
    losses = {}
    for branch in (tour.BRANCHES[0], tour.exact_scaling(2.0), tour.value_scaling(2.0)):
        params = tour.us.scale_params(state.params, branch.weights)
        moments = tour.rescale_moments(state.opt_state, branch.gradient_divisor)
        start = tour.TrainState(params, moments)
        losses[branch.kind] = trainer.train(start, branch.setting(base), windows)[1]
    np.testing.assert_allclose(losses["exact"], losses["unchanged"], rtol=1e-6)
    assert abs(losses["alone"][0] - losses["unchanged"][0]) > 1e-3
