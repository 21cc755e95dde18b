"""Whole models among the adversarial programs: parameters of other shapes, used in other ways."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.adversarial import SEQUENCE, X, exact, refused

SQUARE = {"up": "I H", "k": "H H", "down": "H O"}
ATTENTION = {"q": "I N D", "k": "I N D", "v": "I N D", "o": "N D O"}


def hidden(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["up"])


# Square kernels.


@exact(params=SQUARE)
def twice_the_kernel(p, x, H):
    return jnp.tanh(hidden(p, x) @ p["k"] @ p["k"]) @ p["down"]


@exact(params=SQUARE)
def symmetric_kernel(p, x, H):
    return jnp.tanh(hidden(p, x) @ (p["k"] + p["k"].T)) @ p["down"]


@refused("`iota` counts it", params=SQUARE)
def trace_of_kernel(p, x, H):
    return (hidden(p, x) * jnp.trace(p["k"])) @ p["down"]


@refused("`iota` counts it", params=SQUARE)
def einsum_diagonal(p, x, H):
    return (hidden(p, x) * jnp.einsum("ii->i", p["k"])) @ p["down"]


@refused("`iota` counts it", params=SQUARE)
def residual_in_kernel(p, x, H):
    return hidden(p, x) @ (p["k"] + jnp.eye(H)) @ p["down"]


@refused("works on whole matrices", params=SQUARE)
def orthogonal_kernel(p, x, H):
    return hidden(p, x) @ jnp.linalg.qr(p["k"])[0] @ p["down"]


@refused("works on whole matrices", params=SQUARE)
def solved_kernel(p, x, H):
    return jnp.linalg.solve(p["k"], hidden(p, x).T).T @ p["down"]


@refused("works on whole matrices", params=SQUARE)
def cholesky_kernel(p, x, H):
    k = p["k"] @ p["k"].T + jnp.ones((H, H))
    return hidden(p, x) @ jnp.linalg.cholesky(k) @ p["down"]


@refused("`iota` counts it", params=SQUARE)
def triangular_kernel(p, x, H):
    return hidden(p, x) @ jnp.tril(p["k"]) @ p["down"]


@refused("works on whole matrices", params=SQUARE)
def matrix_exponential(p, x, H):
    return hidden(p, x) @ jax.scipy.linalg.expm(p["k"]) @ p["down"]


@exact(params={"up": "I H", "k": "two two", "down": "H O"})
def inverse_of_what_stays(p, x, H):
    k = jnp.linalg.inv(p["k"] @ p["k"].T + jnp.eye(2))
    return (hidden(p, x) @ p["down"]) * k[0, 1] + jnp.linalg.det(p["k"])


@exact(params={"up": "I H", "k": "H H O"})
def bilinear(p, x, H):
    h = hidden(p, x)
    return jnp.einsum("bi,ijo,bj->bo", h, p["k"], h, optimize=[(0, 1), (0, 1)])


@exact(params={"up": "I H", "flat": "H2 O"}, grown={"H": (4, 8), "H2": (16, 64)})
def outer_product_flattened(p, x, H, H2):
    h = hidden(p, x)
    return (h[:, :, None] * h[:, None, :]).reshape(-1, H2) @ p["flat"]


# Reshapes.


@exact(params={"up": "I H", "flat": "BH", "down": "H O"}, grown={"H": (4, 8), "BH": (20, 40)})
def flat_parameter(p, x, H, BH):
    h = (hidden(p, x).reshape(-1) + p["flat"]).reshape(-1, H)
    return h @ p["down"]


@refused("cuts across")
def swapped_by_a_reshape(p, x, H):
    h = hidden(p, x)
    return h.reshape(H, len(x)).T @ p["down"]


@refused("different programs", x=X[:4])
def swapped_by_a_reshape_where_sizes_coincide(p, x, H):
    return hidden(p, x).reshape(H, 4).T @ p["down"]


@exact(params={"up": "I HF", "down": "F H O"}, grown={"H": (4, 8), "F": (4, 8), "HF": (16, 64)})
def heads_taken_for_sizes(p, x, H, F, HF):
    """Equal sizes: reading the axis as H·F here and as F·H there ties the two, which both grow."""
    h = hidden(p, x)
    a = h.reshape(-1, H, F)
    return jnp.einsum("bfh,fho->bo", a + h.reshape(-1, F, H), p["down"])


@exact(params={"up": "I HF", "down": "H F O"}, grown={"H": (4, 4), "F": (4, 8), "HF": (16, 32)})
def one_of_two_equal_sizes(p, x, H, F, HF):
    return jnp.einsum("bhf,hfo->bo", jnp.sin(hidden(p, x).reshape(-1, H, F)), p["down"])


@refused(
    "different programs",
    params={"up": "I HF", "down": "H F O"},
    grown={"H": (4, 4), "F": (4, 8), "HF": (16, 32)},
)
def transposed_without_a_transposition(p, x, H, F, HF):
    a = jnp.sin(hidden(p, x).reshape(-1, H, F))
    return jnp.einsum("bhf,hfo->bo", a + a.reshape(-1, F, H).mT, p["down"])


@exact(params={"up": "I H", "down": "H O"}, grown={"H": (1, 3)})
def one_unit(p, x, H):
    return hidden(p, x) @ p["down"]


@exact(params=ATTENTION, grown={"N": (1, 3), "D": (4, 4)}, x=SEQUENCE)
def one_head(p, x, N, D):
    return attention(p, x, D)


@exact(params=ATTENTION, grown={"N": (2, 2), "D": (4, 8)}, x=SEQUENCE)
def size_of_heads(p, x, N, D):
    return attention(p, x, D)


@exact(params=ATTENTION, grown={"N": (4, 8), "D": (4, 12)}, x=SEQUENCE)
def heads_and_their_size_coincide(p, x, N, D):
    return attention(p, x, D)


@refused(
    "`exp` needs", params={**ATTENTION, "k": "I N D"}, grown={"N": (2, 2), "D": (4, 8)}, x=SEQUENCE
)
def size_of_bounded_heads(p, x, N, D):
    p = p | {"q": jnp.tanh(p["q"]), "k": jnp.tanh(p["k"])}
    return attention(p, x, 4)


def attention(p, x, size):
    q, k, v = (jnp.einsum("bti,ind->btnd", x, p[name]) for name in "qkv")
    logits = jnp.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(size)
    logits = jnp.where(np.tri(x.shape[1], dtype=bool), logits, -jnp.inf)
    mixed = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(logits), v)
    return jnp.einsum("btnd,ndo->bto", mixed, p["o"])


@refused("`iota` counts it", params={"q": "I D", "k": "I D"}, grown={"D": (4, 8)}, x=SEQUENCE)
def rotary(p, x, D):
    angle = jnp.arange(6)[:, None] / 100.0 ** (jnp.arange(D // 2) / (D // 2))

    def turned(a):
        c, d = jnp.split(a, 2, -1)
        parts = [c * jnp.cos(angle) - d * jnp.sin(angle), c * jnp.sin(angle) + d * jnp.cos(angle)]
        return jnp.concatenate(parts, -1)

    q, k = turned(x @ p["q"]), turned(x @ p["k"])
    return jax.nn.softmax(q @ k.mT / np.sqrt(D)) @ x


@refused(
    "`iota` counts it",
    params={"q": "I N D", "k": "I N D", "o": "N O"},
    grown={"N": (2, 4), "D": (4, 4)},
    x=SEQUENCE,
)
def alibi(p, x, N, D):
    q, k = (jnp.einsum("bti,ind->bntd", x, p[name]) for name in "qk")
    slopes = 2.0 ** (-8 * (jnp.arange(N) + 1) / N)
    bias = slopes[:, None, None] * jnp.arange(6)[None, None] * 1.0
    return jnp.einsum("bnts,no->bto", jax.nn.softmax(q @ k.mT + bias) ** 2, p["o"])


@exact(params={"q": "I D", "keys": "N D", "values": "N O"}, grown={"N": (4, 12), "D": (3, 3)})
def attention_over_slots(p, x, N, D):
    """Each replica of a slot gets a part of the attention."""
    return jax.nn.softmax(x @ p["q"] @ p["keys"].T / np.sqrt(D)) @ p["values"]


@refused("`top_k` ranks", params={"router": "I N", "experts": "N I O"}, grown={"N": (4, 8)})
def experts_chosen(p, x, N):
    weight, place = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    return jnp.einsum("bk,bkio,bi->bo", weight, p["experts"][place], x, optimize=[(0, 1), (0, 1)])


@exact(params={"router": "I N", "experts": "N I O"}, grown={"N": (4, 8)})
def experts_mixed(p, x, N):
    each = jnp.einsum("bi,nio->bno", x, p["experts"])
    return jnp.einsum("bn,bno->bo", jax.nn.softmax(x @ p["router"]), jnp.tanh(each))


@exact(params={"k": "N I O", "b": "N O"}, grown={"N": (2, 6)})
def ensemble(p, x, N):
    return jax.vmap(lambda k, b: jnp.tanh(x @ k + b))(p["k"], p["b"]).mean(0)


@refused("must agree", params={"k": "N I O", "b": "N O"}, grown={"N": (2, 6)})
def ensemble_with_its_spread(p, x, N):
    each = jax.vmap(lambda k, b: jnp.tanh(x @ k + b))(p["k"], p["b"])
    return each.mean(0) + each.std(0, ddof=1)


@refused("`gather` looks places up", params={"table": "V I", "up": "I O"}, grown={"V": (6, 12)})
def vocabulary(p, x, V):
    return (x + p["table"][jnp.argmax(x, 1)]) @ p["up"]


@refused("`exp` needs", params={"table": "T H", "gain": "H"})
def tied_and_bounded(p, x, H):
    """The table is a kernel and an embedding, and neither can take the factor of the other."""
    h = jnp.tanh(p["table"][jnp.argmax(x, 1)])
    return jax.nn.softmax(h @ jnp.tanh(p["table"]).T)[:, :3] + jnp.tanh(p["gain"]).max()


@exact(params={"table": "T H", "gain": "H"})
def tied(p, x, H):
    h = p["table"][jnp.argmax(x, 1)]
    h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * p["gain"]
    return jax.nn.softmax(h @ p["table"].T)
