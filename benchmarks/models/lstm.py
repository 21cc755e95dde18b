"""LSTM language model in Flax nnx."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models.functional import EMBEDDING_STDDEV


@dataclass(frozen=True)
class LSTMConfig:
    """Sizes of a stacked LSTM; no two need to be equal."""

    vocab: int
    embedding: int
    hidden: int
    layers: int


class LSTMLayer(nnx.Module):
    """One LSTM layer from zero state: (batch, seq, features) to (batch, seq, hidden)."""

    def __init__(self, features: int, hidden: int, rngs: nnx.Rngs) -> None:
        """Create the input and the recurrent kernel of all four gates."""
        self.input = nnx.Linear(features, 4 * hidden, rngs=rngs)
        orthogonal = nnx.initializers.orthogonal()
        self.recurrent = nnx.Linear(
            hidden, 4 * hidden, use_bias=False, kernel_init=orthogonal, rngs=rngs
        )
        self.hidden = hidden

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the hidden states of all positions."""
        recurrent_kernel = self.recurrent.kernel[...]

        def step(
            carry: tuple[jax.Array, jax.Array], from_input: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            hidden, cell = carry
            gates = from_input + hidden @ recurrent_kernel
            in_gate, forget, candidate, out_gate = jnp.split(gates, 4, axis=-1)
            # The usual forget-gate offset of one: remember by default.
            cell = jax.nn.sigmoid(forget + 1.0) * cell
            cell = cell + jax.nn.sigmoid(in_gate) * jnp.tanh(candidate)
            hidden = jax.nn.sigmoid(out_gate) * jnp.tanh(cell)
            return (hidden, cell), hidden

        # All input projections in one product; only the recurrence has to be sequential.
        from_inputs = jnp.swapaxes(self.input(x), 0, 1)
        zeros = jnp.zeros((x.shape[0], self.hidden), x.dtype)
        _, hiddens = jax.lax.scan(step, (zeros, zeros), from_inputs)
        return jnp.swapaxes(hiddens, 0, 1)


class LSTM(nnx.Module):
    """Token ids (batch, seq) to next-token logits (batch, seq, vocab)."""

    def __init__(self, config: LSTMConfig, rngs: nnx.Rngs) -> None:
        """Create the embedding, the stack of layers and an untied readout."""
        embedding_init = nnx.initializers.normal(EMBEDDING_STDDEV)
        self.embed = nnx.Embed(
            config.vocab, config.embedding, embedding_init=embedding_init, rngs=rngs
        )
        features = [config.embedding] + [config.hidden] * (config.layers - 1)
        self.layers = nnx.List([LSTMLayer(width, config.hidden, rngs) for width in features])
        self.readout = nnx.Linear(config.hidden, config.vocab, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.readout(x)
