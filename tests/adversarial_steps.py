"""Models among the adversarial programs that step through time, train inside, or are sharded."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from tests.adversarial import SEQUENCE, X, batch, exact, refused
from tests.adversarial_models import SQUARE, hidden

RECURRENT = {"up": "I H4", "k": "H H4", "down": "H O"}


@exact(params=RECURRENT, grown={"H": (3, 6), "H4": (12, 24)}, x=SEQUENCE)
def lstm(p, x, H, H4):
    def step(carry, a):
        c, h = carry
        i, f, g, o = jnp.split(a @ p["up"] + h @ p["k"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    zeros = jnp.zeros((len(x), H))
    return lax.scan(step, (zeros, zeros), x.swapaxes(0, 1), reverse=True)[1] @ p["down"]


@exact(params=RECURRENT, grown={"H": (3, 5), "H4": (12, 20)}, x=SEQUENCE)
def lstm_of_no_multiple(p, x, H, H4):
    return lstm(p, x, H, H4)


@exact(params=SQUARE, x=SEQUENCE)
def nested_scans(p, x, H):
    def step(h, a):
        h = lax.scan(lambda h, _: (jnp.tanh(h @ p["k"]), None), h + a, None, length=2)[0]
        return h, h

    return lax.scan(step, jnp.zeros((len(x), H)), (x @ p["up"]).swapaxes(0, 1))[1] @ p["down"]


@refused("must agree", params={"up": "I H", "a": "H", "down": "H O"}, x=SEQUENCE)
def carry_that_adds_up(p, x, H):
    """The factor of what is carried is another in every step."""

    def step(c, a):
        return jnp.tanh(a) + c.sum(-1, keepdims=True) * jnp.tanh(p["a"]), None

    return lax.scan(step, jnp.zeros((5, H)), (x @ p["up"]).swapaxes(0, 1))[0] @ p["down"]


@exact(params={"up": "I H", "a": "H", "down": "H O"}, x=SEQUENCE)
def linear_recurrence(p, x, H):
    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    decay = jnp.broadcast_to(jax.nn.sigmoid(p["a"]), (6, 5, H))
    states = lax.associative_scan(combine, (decay, (x @ p["up"]).swapaxes(0, 1)))[1]
    return jnp.tanh(states) @ p["down"]


@exact(x=SEQUENCE)
def token_shift(p, x, H):
    h = hidden(p, x)
    return (h + jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]) @ p["down"]


@exact(x=batch(2, 300, 4))
def shift_over_many_steps(p, x, H):
    """A part of the axis for every place would be 300 sums within each other."""
    h = hidden(p, x)
    shifted = jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return (h + shifted + jnp.roll(h, 1, 1)) @ p["down"]


@exact(x=batch(2, 130, 4))
def slice_for_every_step(p, x, H):
    h = hidden(p, x)
    return sum(h[:, t] for t in range(130)) @ p["down"]


# Inner training, sharding, other numbers.


@refused("must agree")
def fast_weights(p, x, H):
    """Gradients of replicated weights are smaller than those of the weights."""
    loss = lambda up: (jnp.tanh(x @ up) ** 2).mean()  # noqa: E731
    return jnp.tanh(x @ (p["up"] - 0.1 * jax.grad(loss)(p["up"]))) @ p["down"]


@exact()
def fast_weights_of_summed_units(p, x, H):
    loss = lambda up: (jnp.tanh(x @ up) ** 2).sum(-1).mean()  # noqa: E731
    return jnp.tanh(x @ (p["up"] - 0.1 * jax.grad(loss)(p["up"]))) @ p["down"]


@exact(x=np.concatenate([X, X])[:8])
def sharded_batch(p, x, H):
    return over_mesh(lambda a: hidden(p, a) @ p["down"], PartitionSpec("d"), PartitionSpec("d"))(x)


@exact(grown={"H": (8, 16)})
def sharded_units(p, x, H):
    both = PartitionSpec(None, "d"), PartitionSpec("d")

    def body(up, down):
        return lax.psum(jnp.tanh(x @ up) @ down, "d")

    return over_mesh(body, both, PartitionSpec())(p["up"], p["down"])


@exact(grown={"H": (8, 16)})
def sharded_units_by_shard(p, x, H):
    """``down`` takes the factor of its sum over units, of which every shard has its part."""
    both = PartitionSpec(None, "d"), PartitionSpec("d")

    def body(up, down):
        gain = 1.0 + lax.axis_index("d")
        return lax.psum(jnp.tanh(x @ up).max() * jnp.tanh(down.sum()) * gain, "d")

    return over_mesh(body, both, PartitionSpec())(p["up"], p["down"])[None, None]


def over_mesh(fun, ins, outs):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(fun, mesh=mesh, in_specs=ins, out_specs=outs)


@exact(dtypes={"up": np.complex128, "down": np.complex128})
def complex_parameters(p, x, H):
    h = x.astype(complex) @ p["up"]
    return jnp.abs((h / (1 + jnp.abs(h))) @ p["down"])


@exact(params={"a": "H", "up": "I H", "down": "H O"}, x=SEQUENCE)
def diagonal_state_space(p, x, H):
    """``float(1j)`` is silently 0 where a constant is taken for a real one."""
    a = jnp.exp(-jnp.exp(p["a"]) + 1j * p["a"])
    step = lambda s, u: (a * s + u, None)  # noqa: E731
    u = (x @ p["up"]).astype(complex).swapaxes(0, 1)
    return jnp.real(lax.scan(step, jnp.zeros((5, H), complex), u)[0]) @ p["down"]


@exact(params={"up": "I H", "steps": "H", "down": "H O"}, dtypes={"steps": np.int32})
def integer_parameters(p, x, H):
    return (hidden(p, x) * (1 + p["steps"])) @ p["down"]


@exact(params={"gain": "H", "bias": "H", "mean": "H", "var": "H", "up": "I H", "down": "H O"})
def batch_statistics(p, x, H):
    h = x @ p["up"]
    trained = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)
    stored = (h - p["mean"]) / jnp.sqrt(p["var"] + 1e-5)
    return jax.nn.relu((trained + stored) * p["gain"] + p["bias"]) @ p["down"]


@refused(
    "must agree", params={"a": "I H", "b": "I F", "down": "H O"}, grown={"H": (4, 8), "F": (4, 4)}
)
def mean_over_parts_of_which_one_grows(p, x, H, F):
    both = jnp.concatenate([jnp.tanh(x @ p["a"]), jnp.tanh(x @ p["b"])], -1)
    return jnp.tanh(both.mean(-1, keepdims=True)) + jnp.tanh(x @ p["a"]) @ p["down"]


@exact(
    params={"a": "I H", "b": "I F", "down": "S O"}, grown={"H": (4, 8), "F": (4, 4), "S": (8, 12)}
)
def kernel_over_parts_of_which_one_grows(p, x, H, F, S):
    return jnp.concatenate([jnp.tanh(x @ p["a"]), jnp.tanh(x @ p["b"])], -1) @ p["down"]


@refused(
    "cuts across",
    params={"a": "I H", "b": "I F", "down": "S O"},
    grown={"H": (4, 8), "F": (4, 4), "S": (8, 12)},
)
def kernel_over_parts_that_are_swapped(p, x, H, F, S):
    """Both orders of two parts of equal size meet in one sum."""
    a, b = jnp.tanh(x @ p["a"]), jnp.tanh(x @ p["b"])
    return (jnp.concatenate([a, b], -1) + jnp.concatenate([b, a], -1)) @ p["down"]
