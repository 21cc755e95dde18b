"""What products do to leaves, and the roles that follow, against answers written by hand."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import uscale_jax as us
from tests.nets import f32
from uscale_jax._transfer_result import LeafTransfer
from uscale_jax.trace.tracing import Model, trace
from uscale_jax.trace.uses import uses

X, IDS = f32(3, 5), jax.ShapeDtypeStruct((3,), jnp.int32)
SMALL, BIG = (4, 6), (8, 18)
LETTERS = {"summed": "s", "free": "f", "shared": "="}


def words(leaf: LeafTransfer) -> str:
    """'hidden 4>8 6>18 sf': role, fan-in, fan-out, and what is done along every dimension."""
    fans = (str(a) if a == b else f"{a}>{b}" for a, b in (leaf.facts.fan_in, leaf.facts.fan_out))
    return " ".join([leaf.role, *fans, "".join(LETTERS[kind] for kind in leaf.dims)]).rstrip()


def transferred(apply: Any, shapes: Any, *inputs: Any, small=SMALL, big=BIG) -> us.Transfer:
    return us.transfer(us.plan(apply, shapes(*small), apply, shapes(*big), *inputs, exact=False))


def roles(apply: Any, shapes: Any, *inputs: Any, **sizes: Any) -> dict[str, str]:
    found = transferred(apply, shapes, *inputs, **sizes)
    return {name: words(leaf) for name, leaf in found.leaves.items()}


def module_roles(make: Any, *inputs: Any, small=SMALL, big=BIG) -> dict[str, str]:
    """Of a linen module, by the last two parts of their names."""

    def shapes(*sizes: int) -> Any:
        return jax.eval_shape(make(*sizes).init, jax.random.key(0), *inputs)

    plan = us.plan(make(*small).apply, shapes(*small), make(*big).apply, shapes(*big), *inputs)
    leaves = us.transfer(plan).leaves.items()
    return {"/".join(name.split("/")[-2:]): words(leaf) for name, leaf in leaves}


# Layouts


def net(p, x, of=lambda w: w):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ of(p["b"])) @ p["c"]


NET = {"a": "input 5 4>8 sf", "b": "hidden 4>8 6>18 sf", "c": "output 6>18 7 sf"}


READ_AS = {
    "it is": lambda w: w,
    "bfloat16": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "a constant times it": lambda w: w * np.float32(1.7),
    "a function with its own derivative": jax.nn.relu,
    "laid out twice": lambda w: w.T.reshape(-1).reshape(w.shape[::-1]).T,
    "its softplus, rematerialised": jax.checkpoint(lambda w: jax.nn.softplus(w) * 0.3),
}


@pytest.mark.parametrize("of", READ_AS)
def test_a_kernel_is_followed_to_its_product(of):
    shapes = lambda n, m: {"a": f32(5, n), "b": f32(n, m), "c": f32(m, 7)}  # noqa: E731
    assert roles(jax.jit(jax.checkpoint(partial(net, of=READ_AS[of]))), shapes, X) == NET


SIZES = {"i": (5, 5), "n": (4, 8), "m": (6, 18), "o": (7, 7), "k": (2, 2), "b": (3, 3)}
CHAINS = {  # of products: what the kernel's dimensions are, and those of what comes out
    "in bn, nm bm, mo bo": "input 5 4>8 sf, hidden 4>8 6>18 sf, output 6>18 7 sf",
    "ni nb, mn mb, om ob": "input 5 4>8 fs, hidden 4>8 6>18 fs, output 6>18 7 fs",
    "nik kbn, mnk bm, mo ob": "input 5 8>16 fsf, hidden 8>16 6>18 fss, output 6>18 7 sf",
    "inm mbn, nkm bkn, onk bo": "input 5 24>144 sff, output 6>18 2 =fs, output 8>16 7 fss",
    "bin nb, bkmn bmk, kmo bo": "input 5 4>8 =sf, hidden 4>8 12>36 =ffs, output 12>36 7 ssf",
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
def test_kernels_are_told_by_what_is_summed_whatever_the_order(chain, first):
    steps = [step.split() for step in chain.split(", ")]

    def apply(kernels, x):
        at = "bi"
        for kernel, (dims, out) in zip(kernels, steps, strict=True):
            sides = [(dims, kernel), (at, x)][:: 1 if first else -1]
            x = jnp.einsum(f"{sides[0][0]},{sides[1][0]}->{out}", sides[0][1], sides[1][1])
            x, at = jnp.tanh(x) if out != steps[-1][1] else x, out
        return x

    shapes = [[f32(*(SIZES[d][i] for d in dims)) for dims, _ in steps] for i in (0, 1)]
    assert ", ".join(roles(apply, lambda *sizes: shapes[sizes == BIG], X).values()) == CHAINS[chain]


def parts(p, x):
    h = (jnp.tanh(x @ p["a"]) + p["bias"]) * p["gain"] * (1 + p["plus"])
    before = sum(jnp.tanh(h @ w) for w in jnp.split(p["before"], 3, 1))
    after = sum(jnp.split(jnp.tanh(h @ p["after"]), 3, 1))
    return (before + after + h @ p["down"] @ p["up"]) @ p["c"]


def test_parts_of_kernels_vectors_and_what_nothing_reads():
    def shapes(n, m):
        kernels = {"a": f32(5, n), "before": f32(n, 3 * m), "after": f32(n, 3 * m), "c": f32(m, 7)}
        vectors = dict.fromkeys(("bias", "gain", "plus"), f32(1, n))
        return kernels | vectors | {"down": f32(n, 3), "up": f32(3, m), "unused": f32(n, m)}

    assert roles(parts, shapes, X) == {
        "a": "input 5 4>8 sf",
        "before": "hidden 4>8 6>18 sf",
        "after": "hidden 4>8 18>54 sf",
        "c": "output 6>18 7 sf",
        "down": "output 4>8 3 sf",
        "up": "input 3 6>18 sf",
        "unused": "fixed 1 1",
        **dict.fromkeys(("bias", "gain", "plus"), "vector 1 4>8"),
    }


def looped(p, x):
    step = lambda h, w: (h + jnp.tanh(h @ w["up"] + w["bias"]) @ w["down"], None)  # noqa: E731
    h, _ = lax.scan(step, x @ p["a"], p["layers"])
    h, _ = lax.fori_loop(0, 3, lambda _, c: (jnp.tanh(c[0] @ c[1]), c[1]), (h, p["carried"]))
    h = lax.cond(x[0, 0] > 0, lambda h: h @ p["one"], lambda h: jnp.sin(h @ p["one"]), h)
    return jax.vmap(lambda up, down: jnp.tanh(h @ up) @ down)(*p["experts"]).sum(0) @ p["c"]


def test_loops_branches_and_experts():
    def shapes(n, m):
        layers = {"up": f32(9, n, m), "bias": f32(9, 1, m), "down": f32(9, m, n)}
        experts = (f32(2, n, m), f32(2, m, n))
        kernels = {"a": f32(5, n), "carried": f32(n, n), "one": f32(n, n), "c": f32(n, 7)}
        return kernels | {"layers": layers, "experts": experts}

    assert roles(looped, shapes, X) == {
        "a": "input 5 4>8 sf",
        "c": "output 4>8 7 sf",
        **dict.fromkeys(("carried", "one"), "hidden 4>8 4>8 sf"),
        "layers/bias": "vector 1 54>162",
        "layers/up": "hidden 4>8 6>18 =sf",
        "layers/down": "hidden 6>18 4>8 =sf",
        "experts/0": "hidden 4>8 12>36 fsf",  # of inputs that all share: outputs like any
        "experts/1": "hidden 6>18 4>8 =sf",
    }


class Several(nn.Module):
    n: int
    m: int

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.DenseGeneral((self.n, 3), name="many")(x))
        x = nn.tanh(nn.DenseGeneral((2, self.m), axis=(-2, -1), name="both")(x))
        return nn.DenseGeneral(7, axis=-1, name="out")(x.sum(1))


def test_dense_layers_of_several_dimensions():
    assert module_roles(Several, X) == {
        "many/kernel": "input 5 12>24 sff",
        "many/bias": "vector 1 12>24",
        "both/kernel": "hidden 12>24 12>36 ssff",
        "both/bias": "vector 1 12>36",
        "out/kernel": "output 6>18 7 sf",
        "out/bias": "fixed 1 7",
    }


class Convolutions(nn.Module):
    n: int
    m: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3 * self.m, (3, 2), name="plain")(x))
        x = nn.relu(nn.Conv(6 * self.m, (5, 2), feature_group_count=3, name="grouped")(x))
        x = nn.relu(nn.ConvTranspose(self.n, (2, 2), name="back")(x))
        x = nn.relu(nn.Conv(3 * self.n, (2, 3), feature_group_count=self.n, name="depthwise")(x))
        return nn.Dense(7, name="out")(x.mean((1, 2)))


def test_convolutions():
    found = module_roles(Convolutions, f32(2, 5, 4, 3))
    assert found["plain/kernel"] == "input 18 18>54 sssf"
    assert found["grouped/kernel"].startswith("hidden 60>180 ")
    assert found["back/kernel"] == "hidden 144>432 4>8 sssf"
    assert found["depthwise/kernel"] == "input 6 12>24 ssff"  # as a vector: no fan-in that grows


def grouped_attention(p, x):
    x = x[None] @ p["embed"]
    q = jnp.einsum("btw,wkgd->bktgd", x, p["q"])
    k, v = (jnp.einsum("btw,wkd->bktd", x, p[name]) for name in "kv")
    scores = jax.nn.softmax(jnp.einsum("bktgd,bksd->bkgts", q, k) / q.shape[-1])
    mixed = jnp.einsum("bkgts,bksd->btkgd", scores, v)
    return jnp.tanh(jnp.einsum("btkgd,kgdw->btw", mixed, p["o"])) @ p["out"]


def test_attention_with_grouped_queries():
    def shapes(w, k, d, e):
        heads = {"q": f32(w, k, 3, d), "k": f32(w, k, d), "v": f32(w, k, e), "o": f32(k, 3, e, w)}
        return heads | {"embed": f32(5, w), "out": f32(w, 7)}

    sizes = {"small": (4, 2, 6, 5), "big": (8, 6, 12, 20)}
    assert roles(grouped_attention, shapes, X, **sizes) == {
        "embed": "input 5 4>8 sf",
        "q": "hidden 4>8 36>216 sfff",
        "k": "hidden 4>8 12>72 sff",
        "v": "hidden 4>8 10>120 sff",
        "o": "hidden 30>360 4>8 sssf",
        "out": "output 4>8 7 sf",
    }


class Recurrent(nn.Module):
    cell: Any
    n: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(7, name="out")(nn.RNN(self.cell(self.n, name="cell"))(x))


CELLS = {"LSTM": "if hf", "OptimizedLSTM": "ii ho", "GRU": "ir hn", "Simple": "i h"}


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_cells(cell):
    """One of them puts the kernels of all gates into one product."""
    found = module_roles(lambda n, m: Recurrent(getattr(nn, f"{cell}Cell"), n), f32(2, 6, 5))
    inside, state = CELLS[cell].split()
    assert found[f"{inside}/kernel"].startswith("input 5 ")
    assert found[f"{state}/kernel"].startswith("hidden 4>8 ")
    assert {found[name] for name in found if "bias" in name} <= {"vector 1 4>8", "fixed 1 7"}


class Tied(nn.Module):
    n: int
    m: int

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, self.n, name="embed")
        h = nn.Dense(self.n, use_bias=False, name="mix")(embed(ids))
        return embed.attend(nn.RMSNorm(name="norm")(jnp.tanh(h)))


def test_a_tied_embedding_is_what_comes_in_and_one_hot_rows_are_a_product():
    tied = {"embed/embedding": "input 1 4>8 fs", "norm/scale": "vector 1 4>8"}
    assert module_roles(Tied, IDS) == tied | {"mix/kernel": "hidden 4>8 4>8 sf"}
    apply = lambda p, ids: jnp.tanh(jax.nn.one_hot(ids, 11) @ p["a"]) @ p["c"]  # noqa: E731
    found = transferred(apply, lambda n, m: {"a": f32(11, n), "c": f32(n, 7)}, IDS)
    assert (words(found.leaves["a"]), found.leaves["a"].facts.lookup) == ("input 11 4>8 sf", False)


def test_uses_are_in_the_order_of_the_program_each_with_its_line():
    def apply(p, ids):
        h = jnp.tanh(p["table"][ids] @ p["kernel"] + p["bias"])
        return jnp.sin(h @ p["kernel"].T) @ p["table"].T

    shapes = lambda n, m: {"table": f32(11, n), "kernel": f32(n, m), "bias": f32(1, m)}  # noqa: E731
    traced = trace([Model(apply, shapes(*SMALL)), Model(apply, shapes(*BIG))], [IDS])
    found = {key[-1]: found for key, found in zip(traced.keys, uses(traced), strict=True)}
    lookup, product = found["table"]
    assert (lookup.name, lookup.is_lookup, lookup.is_product) == ("gather", True, False)
    assert (lookup.fan_in, lookup.fan_out) == ((1, 1), (4, 8))
    assert (product.is_lookup, product.dims) == (False, ("free", "summed"))
    assert (product.fan_in, product.fan_out) == ((4, 8), (11, 11))
    there, back = found["kernel"]
    assert (there.fan_in, there.fan_out) == (back.fan_out, back.fan_in) == ((4, 8), (6, 18))
    assert there.visit < back.visit < product.visit
    lines = [int(str(use.source).split(":")[-1]) for use in (lookup, there, back, product)]
    assert lines == [lines[0], lines[0], lines[0] + 1, lines[0] + 1]
    (bias,) = found["bias"]
    assert (bias.name, bias.fan_in, bias.fan_out, bias.dims) == ("add", (1, 1), (6, 18), ())


# What leaves make together


def sharded(p, h):
    mesh, spec = jax.sharding.Mesh(np.array(jax.devices()[:2]), "i"), jax.sharding.PartitionSpec
    run = lambda h, w: lax.psum(h @ w, "i")  # noqa: E731
    specs: Any = {"in_specs": (spec(None, "i"), spec("i", None)), "out_specs": spec()}
    return jax.shard_map(run, mesh=mesh, **specs)(h, p["v"])


def stepped(p, h, i):
    return lax.fori_loop(0, 3, lambda i, h: h @ p["experts"][i], h)


def of_heads(p, h, i):
    return jnp.tensordot(jnp.tensordot(h, p["lift"], 1), p["heads"], 2)


KERNEL, ROWS = "hidden 4>8", ("vector 1 ", "input 1 ")
TOGETHER = {
    "v stacked": (lambda p, h, i: jnp.sum(h @ jnp.stack([p["v"], p["w"]]), 0), KERNEL),
    "v second of a sum": (lambda p, h, i: h @ (p["w"] + p["v"]), KERNEL),
    "v chosen by data": (lambda p, h, i: h @ jnp.where(i > 0, p["w"], p["v"]), KERNEL),
    "v split over devices": (lambda p, h, i: sharded(p, h), "hidden"),
    "v multiplied and summed": (lambda p, h, i: jnp.sum(h[..., None] * p["v"][None], 1), "hidden"),
    "experts picked by data": (lambda p, h, i: h @ p["experts"][i], KERNEL),
    "experts by step": (stepped, KERNEL),
    "experts halved": (lambda p, h, i: h @ (p["experts"][i] / 2), KERNEL),
    "tasks picked by data": (lambda p, h, i: h @ p["tasks"][i], "output 4>8"),
    "tokens that are learned": (lambda p, h, i: jnp.tanh(p["tokens"] @ p["w"]) @ h.T @ h, ROWS),
    "state that is learned": (lambda p, h, i: p["state"].repeat(3, 0) @ p["w"] + h, ROWS),
    "heads of which there was one": (of_heads, "hidden 6>36 4>8 ssf"),
}


@pytest.mark.parametrize(("of", "wanted"), TOGETHER.values(), ids=TOGETHER)
def test_leaves_are_followed_through_what_is_computed_of_them_alone(of, wanted, request):
    def shapes(n, m):
        kernels = {"a": f32(5, n), "v": f32(n, n), "w": f32(n, n), "c": f32(n, 7)}
        heads = {"lift": f32(n, n // 4, m), "heads": f32(n // 4, m, n)}
        kernels |= {"experts": f32(3, n, n), "tasks": f32(3, n, 7)}
        return kernels | heads | {"tokens": f32(9, n), "state": f32(1, n)}

    def apply(p, x, i):
        h = of(p, jnp.tanh(x @ p["a"]), i)
        return h if h.shape[-1] == 7 else jnp.sin(h) @ p["c"]

    found = transferred(apply, shapes, X, jax.ShapeDtypeStruct((), jnp.int32))
    assert words(found.leaves[request.node.callspec.id.split()[0]]).startswith(wanted)


def test_biases_of_heads_whose_number_and_size_grow():
    attention = partial(nn.MultiHeadDotProductAttention, out_features=7)
    found = module_roles(lambda n, m: attention(n // 2, qkv_features=n // 2 * m), f32(2, 6, 5))
    assert {role[:6] for name, role in found.items() if "bias" in name} == {"vector", "fixed "}


def test_rows_that_are_looked_up_and_weighed():
    apply = lambda p, ids, x: jnp.sin(jnp.einsum("bt,btn->bn", x, p["a"][ids])) @ p["c"]  # noqa: E731
    shapes, ids = lambda n, m: {"a": f32(11, n), "c": f32(n, 7)}, IDS.update(shape=(3, 5))
    found = transferred(apply, shapes, ids, X).leaves["a"]
    assert (words(found), found.facts.lookup) == ("input 1 4>8", True)
