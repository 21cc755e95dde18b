"""trace_axes: tables, structures and reasons of small models, and what it takes and refuses."""

import os
from textwrap import dedent

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from jax import lax
from jax.extend.core import Primitive

import uscale_jax as us


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def shapes(axes: us.Axes) -> dict[str, str]:
    """The dimensions of every leaf, in words."""
    return {name: " × ".join(map(str, dims)) for name, dims in axes.leaves.items()}


def expected_table(text: str) -> str:
    return "\n".join(row.rstrip() for row in dedent(text).strip().splitlines())


def mlp(params, x):
    h = jax.nn.gelu(x @ params["in"] + params["bias"])
    return h @ params["out"]


MLP = {"in": f32(5, 7), "bias": f32(1, 7), "out": f32(7, 3)}


# What is printed.


def test_the_table_of_an_mlp():
    expected = """
        leaf  shape  dimensions
        bias  1 × 7  1 × a
        in    5 × 7  B × a
        out   7 × 3  a × C

        axis  size         places                  why
        a     7     free   bias[1], in[1], out[0]
        B     5     fixed  in[0]                   is an axis of input 0
        C     3     fixed  out[1]                  is an axis of the output
    """
    assert str(us.trace_axes(mlp, MLP, f32(2, 5))) == expected_table(expected)


def lstm(params, xs):
    def step(carry, x):
        h, c = carry
        gates = x @ params["wx"] + h @ params["wh"] + params["b"][None]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((xs.shape[1], params["wh"].shape[0]))
    return lax.scan(step, (start, start), xs)[1] @ params["out"]


def test_the_table_of_an_lstm():
    """Four gates, all of the hidden size, in one kernel."""
    params = {"wx": f32(3, 28), "wh": f32(7, 28), "b": f32(28), "out": f32(7, 2)}
    expected = """
        leaf  shape   dimensions
        b     28      (a | a | a | a)
        out   7 × 2   a × B
        wh    7 × 28  a × (a | a | a | a)
        wx    3 × 28  C × (a | a | a | a)

        axis  size         places                          why
        a     7     free   b[0], out[0], wh[0] and 2 more
        B     2     fixed  out[1]                          is an axis of the output
        C     3     fixed  wx[0]                           is an axis of input 0
    """
    axes = us.trace_axes(lstm, params, f32(6, 4, 3))
    assert str(axes) == expected_table(expected)
    assert axes.axes[0].places == (("b", 0), ("out", 0), ("wh", 0), ("wh", 1), ("wx", 1))


# Structures.


def attention(params, x, split):
    batch, length, _ = x.shape
    q, k, v = split(x @ params["qkv"], (batch, length))
    p = jax.nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k), axis=-1)
    mixed = jnp.einsum("bhst,bthd->bshd", p, v)
    return mixed.reshape(batch, length, 12) @ params["out"]


def parts_first(y, lead):
    return [part.reshape(*lead, 3, 4) for part in jnp.split(y, 3, axis=-1)]


def heads_first(y, lead):
    return jnp.split(y.reshape(*lead, 3, 12), 3, axis=-1)


@pytest.mark.parametrize(
    ("split", "fused"),
    [
        (parts_first, "(a·e | a·e | a·b)"),  # (q|k|v) · heads · size
        (heads_first, "a·(e | e | b)"),  # heads · (q|k|v) · size
    ],
)
def test_fused_queries_keys_and_values(split, fused):
    """Three heads of size four; queries and keys share a size that values need not have."""
    params = {"qkv": f32(5, 36), "out": f32(12, 5)}
    axes = us.trace_axes(lambda p, x: attention(p, x, split), params, f32(2, 6, 5))
    assert shapes(axes) == {"out": "a·b × C", "qkv": f"D × {fused}"}
    assert [(axis.name, axis.size) for axis in axes.free] == [("a", 3), ("b", 4), ("e", 4)]


def test_fused_by_a_reshape_alone():
    """A reshape says more than a split: all three have the same size."""
    split = lambda y, lead: jnp.moveaxis(y.reshape(*lead, 3, 3, 4), 2, 0)  # noqa: E731
    params = {"qkv": f32(5, 36), "out": f32(12, 5)}
    axes = us.trace_axes(lambda p, x: attention(p, x, split), params, f32(2, 6, 5))
    cut, *rest = axes.leaves["qkv"][1].factors
    assert str(cut).replace("(", "").replace(")", "") == "1 | 1 | 1"
    assert rest == list(axes.free)
    assert [axis.size for axis in axes.free] == [3, 4]


def test_flattened_features_of_a_convolution():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
            return nn.Dense(10)(nn.LayerNorm()(nn.Dense(7)(x.reshape(x.shape[0], -1))))

    image = np.ones((2, 8, 8, 1), np.float32)
    params = jax.eval_shape(Net().init, jax.random.key(0), image)["params"]
    axes = us.trace_axes(lambda p, x: Net().apply({"params": p}, x), params, image)
    assert shapes(axes)["Conv_0/kernel"] == "B × C × 1 × a"
    assert shapes(axes)["Dense_1/kernel"] == "F·G·a × e"
    assert [axis.size for axis in axes.free] == [6, 7]
    rows, columns = (axis for axis in axes.fixed if axis.places == (("Dense_1/kernel", 0),))
    assert rows.why == columns.why
    assert "windows slide over neighbours along it at " in rows.why


def test_a_residual_stream_is_one_axis():
    def apply(params, x):
        h = x @ params["embed"]
        for layer in params["layers"]:
            h = h + jnp.tanh(h @ layer["up"]) @ layer["down"]
        return h @ params["embed"].T

    layers = [{"up": f32(8, 11), "down": f32(11, 8)} for _ in range(3)]
    axes = us.trace_axes(apply, {"embed": f32(5, 8), "layers": layers}, f32(2, 5))
    assert [axis.size for axis in axes.free] == [8, 11, 11, 11]
    stream = axes.free[0]
    assert len(stream.places) == 7
    assert shapes(axes)["layers/1/up"] == "b × d"
    assert shapes(axes)["layers/2/down"] == "e × b"


def test_letters_do_not_run_out():
    params = [f32(n) for n in range(3, 33)]
    axes = us.trace_axes(lambda p: sum(w.sum() for w in p), params)
    assert [axis.name for axis in axes.axes[24:28]] == ["y", "z", "aa", "ab"]
    assert all(axis.free for axis in axes.axes)


# Reasons.


kernel = Primitive("our_kernel")
kernel.def_abstract_eval(lambda a: a)


def conv(w):
    return lax.conv(jnp.ones((1, 2, 9)), w, (1,), "SAME")


REASONS = {
    "`iota` counts it, so values depend on the place": lambda w: w * jnp.arange(7.0),
    "`gather` looks places up": lambda w: w[jnp.array([0, 2])],
    "`dynamic_slice` looks places up": lambda w: lax.dynamic_slice(w, (w.sum().astype(int),), (2,)),
    "`sort` orders": lambda w: jnp.sort(w),
    "`cumsum` mixes places": lambda w: jnp.cumsum(w),
    "`top_k` ranks": lambda w: lax.top_k(w, 2)[0],
    "`argmax` counts places": lambda w: lax.argmax(w, 0, jnp.int32),
    "`reduce_prod` multiplies": lambda w: w.prod(),
    "`rev` reverses": lambda w: w[::-1],
    "`fft` transforms": lambda w: jnp.fft.fft(w),
    "a loop steps through it": lambda w: lax.scan(lambda c, y: (c + y, None), w.sum(), w)[0],
    "a slice skips places": lambda w: lax.slice(w, (0,), (7,), (3,)),
    "`our_kernel (not JAX's own)`, for which there is no rule, is applied": lambda w: kernel.bind(
        w
    ),
    "random numbers are drawn": lambda w: w * jax.random.normal(jax.random.key(0), (7,)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_name_the_line(reason):
    fun = REASONS[reason]
    axes = us.trace_axes(lambda p: jnp.abs(fun(p["w"]).sum()), {"w": f32(7)})
    (axis,) = axes.axes
    assert not axis.free
    assert axes.fixed == (axis,)
    line = f"{os.path.relpath(__file__)}:{fun.__code__.co_firstlineno}"
    assert axis.why == f"{reason} along it at {line}"


def test_the_window_of_a_convolution_is_held():
    axes = us.trace_axes(lambda p: conv(p["w"]).sum(), {"w": f32(5, 2, 3)})
    line = f"{os.path.relpath(__file__)}:{conv.__code__.co_firstlineno + 1}"
    assert shapes(axes) == {"w": "a × b × C"}
    assert axes.fixed[0].why == f"a convolution slides over neighbours along it at {line}"


def test_regrouping_across_units_is_held():
    def apply(params):
        return (params["w"].reshape(3, 8) ** 2).sum(0).max()

    axes = us.trace_axes(apply, {"w": f32(4, 6)})
    line = f"{os.path.relpath(__file__)}:{apply.__code__.co_firstlineno + 1}"
    why = f"is regrouped in a way that cuts across its structure at {line}"
    assert [axis.why for axis in axes.axes] == [why, why]


def test_inputs_and_outputs_are_named_by_their_trees():
    def apply(params, x, extra):
        return {"logits": x["tokens"] @ params["a"], "score": [extra[0] @ params["b"]]}

    params = {"a": f32(5, 3), "b": f32(4, 6)}
    axes = us.trace_axes(apply, params, {"tokens": f32(2, 5)}, [f32(7, 4)])
    assert [axis.why for axis in axes.axes] == [
        "is an axis of input 0/tokens",
        "is an axis of output logits",
        "is an axis of input 1/0",
        "is an axis of output score/0",
    ]


def test_captured_arrays_hold_the_axes_along_which_they_vary():
    table = np.arange(5, dtype=np.float32)[:, None] * np.ones((5, 7), np.float32)
    axes = us.trace_axes(lambda p: (p["w"] * table).sum(), {"w": f32(5, 7)})
    assert shapes(axes) == {"w": "A × b"}
    assert axes.fixed[0].why == "indexes an array of numbers that the function closes over"
    even = np.full((5, 7), 0.5, np.float32)
    assert len(us.trace_axes(lambda p: (p["w"] * even).sum(), {"w": f32(5, 7)}).free) == 2


def test_leaves_that_are_not_read_are_free_and_say_so():
    axes = us.trace_axes(lambda p, x: x @ p["w"], {"w": f32(5, 3), "unused": f32(4, 9)}, f32(2, 5))
    unread = [axis for axis in axes.axes if axis.places[0][0] == "unused"]
    assert [axis.size for axis in unread] == [4, 9]
    assert all(axis.free and "does not read it" in axis.why for axis in unread)


def test_what_only_dead_code_reads_is_not_read():
    def apply(params):
        jnp.sort(params["w"])
        return jnp.zeros(())

    (axis,) = us.trace_axes(apply, {"w": f32(7)}).axes
    assert axis.free


# What it takes.


def test_shapes_and_arrays_give_the_same():
    arrays = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), MLP)
    found = [us.trace_axes(mlp, p, x) for p in (MLP, arrays) for x in (f32(2, 5), jnp.ones((2, 5)))]
    assert all(axes == found[0] for axes in found)


def test_containers_do_not_matter():
    plain = us.trace_axes(mlp, MLP, f32(2, 5))
    assert us.trace_axes(mlp, freeze(MLP), f32(2, 5)) == plain
    assert us.trace_axes(mlp, {**MLP, "none": None}, f32(2, 5)) == plain


def test_nnx_states():
    graph, state = nnx.split(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
    axes = us.trace_axes(lambda s, x: nnx.merge(graph, s)(x), state, f32(2, 5))
    assert shapes(axes) == {"bias": "A", "kernel": "B × A"}
    assert us.trace_axes(lambda s, x: nnx.merge(graph, s)(x), state, np.ones((2, 5))) == axes


def test_scalars_integers_and_a_bare_array():
    def apply(params, x):
        return x @ params["w"] * params["gain"] + params["steps"].astype(jnp.float32)

    params = {"w": f32(5, 3), "gain": 2.0, "steps": np.int32(4)}
    axes = us.trace_axes(apply, params, f32(2, 5))
    assert shapes(axes) == {"gain": "", "steps": "", "w": "A × B"}
    assert "gain   scalar  scalar" in str(axes)
    bare = us.trace_axes(lambda w: (w * 2).sum(), f32(4))
    assert shapes(bare) == {"(the tree itself)": "a"}


def test_integer_tables_have_axes_too():
    axes = us.trace_axes(
        lambda p, x: x @ jnp.take(p["w"], p["index"], axis=1),
        {"w": f32(5, 8), "index": jax.ShapeDtypeStruct((3,), jnp.int32)},
        f32(2, 5),
    )
    assert shapes(axes) == {"index": "A", "w": "B × C"}
    assert axes.axes[2].why.startswith("`gather` looks places up")


@pytest.mark.parametrize("wrap", [jax.jit, jax.grad, jax.vmap])
def test_within_transformations(wrap):
    """Parameters may be traced: only their shapes count."""
    found = []

    def loss(params, x):
        found.append(us.trace_axes(mlp, params, x))
        return mlp(params, x).sum()

    params = jax.tree.map(lambda s: jnp.ones(s.shape), MLP)
    x = jnp.ones((2, 5))
    if wrap is jax.vmap:
        params, x = jax.tree.map(lambda leaf: leaf[None], (params, x))
    wrap(loss)(params, x)
    assert found == [us.trace_axes(mlp, MLP, f32(2, 5))]


def test_traced_arrays_that_are_closed_over_are_held():
    """Nothing is known of their numbers."""
    found = []

    @jax.jit
    def outer(table):
        found.append(us.trace_axes(lambda p: (p["w"] * table).sum(), {"w": f32(7)}))
        return table

    outer(jnp.ones(7))
    assert [axis.free for axis in found[0].axes] == [False]


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_wrapped_functions_give_the_same(wrap):
    assert us.trace_axes(wrap(mlp), MLP, f32(2, 5)) == us.trace_axes(mlp, MLP, f32(2, 5))


def test_errors_of_the_model_surface_unchanged():
    error = KeyError("mine")

    def apply(params, x):
        raise error

    with pytest.raises(KeyError) as caught:
        us.trace_axes(apply, MLP, f32(2, 5))
    assert caught.value is error
    with pytest.raises(TypeError, match="dot_general"):
        us.trace_axes(mlp, MLP, f32(2, 6))
