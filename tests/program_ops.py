"""Operations that random programs are made of: gentle ones, and ones that mind how often or where.

Each takes a :class:`~tests.programs.Writer` and appends a line or a few.  It raises
:class:`~tests.programs.Unfit` where no array fits it.
"""

from collections.abc import Callable

from tests.programs import (
    Unfit,
    Var,
    Writer,
    dense,
    einsum,
    letters,
    shape_text,
    text_of,
)

Op = Callable[[Writer], object]

GENTLE: list[Op] = []
NASTY: list[Op] = []


def gentle(op: Op) -> Op:
    GENTLE.append(op)
    return op


def nasty(op: Op) -> Op:
    NASTY.append(op)
    return op


def every(*templates: str, into: list[Op]) -> None:
    """Operations of one array that keep its dimensions; ``{i}`` is one of its axes."""

    def op(w: Writer, template: str) -> None:
        var = w.var(lambda var: var.ndim > 0)
        axis = w.axis(var)
        dim = text_of(var.dims[axis])
        w.let(
            template.format(v=var.name, i=axis, n=f"({dim})", shape=f"{var.name}.shape"), var.dims
        )

    for template in templates:
        into.append(lambda w, template=template: op(w, template))


# Elementwise, and along an axis; all of them keep dimensions.
every(
    "jax.nn.relu({v})",
    "jnp.abs({v})",
    "jnp.sqrt(1 + {v} ** 2)",
    "jnp.tanh({v})",
    "jax.nn.gelu({v})",
    "{v} * jax.nn.sigmoid({v})",
    "jnp.where({v} > 0, {v}, 0.1 * {v})",
    "jnp.clip({v}, -1, 1)",
    "{v} / (1 + jnp.abs({v}))",
    "jax.nn.softmax({v}, {i})",
    "({v} - {v}.mean({i}, keepdims=True)) / jnp.sqrt({v}.var({i}, keepdims=True) + 1e-3)",
    "{v} / jnp.sqrt((({v} ** 2).mean({i}, keepdims=True)) + 1e-3)",
    "{v} / jnp.sqrt(0.1 + ({v} ** 2).sum({i}, keepdims=True))",
    "{v} / (0.1 + jnp.abs({v}).max({i}, keepdims=True))",
    "{v} / jnp.linalg.norm({v} + 0.01, axis={i}, keepdims=True)",
    "{v} / jnp.sqrt({n})",
    "{v} * {n} ** -0.25",
    "{v} / {n}",
    "{v} - {v}.mean({i}, keepdims=True)",
    "{v} - {v}.max({i}, keepdims=True)",
    "jax.jit(lambda a: jnp.tanh(a) * 2.0)({v})",
    "jax.checkpoint(lambda a: jnp.sin(a) * a)({v})",
    "jax.nn.leaky_relu({v})",
    "lax.cond(x.mean() > 0, lambda a: jnp.tanh(a), lambda a: a * 2.0, {v})",
    "lax.fori_loop(0, 3, lambda i, a: jnp.tanh(a) + 0.5, {v})",
    "lax.while_loop(lambda a: jnp.abs(a).mean() > 0.5, lambda a: a * 0.5, {v})",
    "lax.while_loop(lambda c: c[0] < ids.sum(), lambda c: (c[0] + 1, c[1] * 0.9), (0, {v}))[1]",
    "jnp.zeros({shape}) + {v}",
    "{v} + jnp.ones({shape}) * 0.5",
    into=GENTLE,
)
every(
    "jnp.cumsum({v}, {i}) / {n}",
    "jnp.sort({v}, {i})",
    "jnp.flip({v}, {i})",
    "jnp.roll({v}, 1, {i})",
    "{v} + jnp.roll({v}, 2, {i})",
    "{v} * (jnp.arange({n}) / {n})[0]",
    "{v} + jax.nn.logsumexp({v}, {i}, keepdims=True)",
    "{v} / (1 + {v}.var({i}, ddof=1 if {n} > 1 else 0, keepdims=True))",
    "{v} * {v}.sum({i}, keepdims=True)",
    "{v} + ({v} > 0).sum({i}, keepdims=True).astype({v}.dtype)",
    "{v} / (1 + ({v} > 0).sum({i}, keepdims=True)).astype({v}.dtype)",
    "{v} * ({v} > 0).any({i}, keepdims=True)",
    "{v} * ({v} > 0).astype({v}.dtype).mean({i}, keepdims=True)",
    "{v} + jnp.prod(jnp.tanh({v}), {i}, keepdims=True)",
    "jnp.where({v} > 0.5, {v}, 0.0)",
    "{v} - {v}.astype(jnp.int32)",
    "{v} + jnp.median({v}, {i}, keepdims=True)",
    "{v} + jnp.argmax({v}, {i}, keepdims=True).astype({v}.dtype)",
    "{v} * ({n} - 1)",
    "{v} + {n} ** 0.5",
    "{v} ** 2",
    "{v} / {v}.std({i}, keepdims=True)",
    "{v} - jnp.linalg.norm({v}, axis={i}, keepdims=True)",
    "jnp.where(jnp.cumsum(jnp.ones({shape}), {i}) < 2, {v}, 0.0)",
    "lax.associative_scan(jnp.add, {v}, axis={i})",
    "jnp.swapaxes(jnp.tril(jnp.swapaxes({v}, {i}, -1)), {i}, -1) if {v}.ndim > 1 else {v}",
    "lax.map(lambda a: a * 2, {v})",
    "jax.vmap(lambda a: a - a.mean(), {i}, {i})({v})",
    "{v} - 0.1 * jax.grad(lambda a: jnp.logaddexp(a, 0.0).mean())({v})",
    "{v} - jax.grad(lambda a: (a ** 2).sum({i}).mean())({v})",
    "{v}.at[0].set({v}[0] * 2)",
    "{v}.at[jnp.zeros(2, int)].add(0.5)",
    "jnp.swapaxes(jnp.swapaxes({v}, 0, {i})[::-1], 0, {i})",
    "jnp.abs({v}) ** 0.3",
    "jnp.exp(-jnp.abs({v}))",
    "jnp.sign({v}) * jnp.sqrt(jnp.abs({v}))",
    "jnp.nan_to_num({v})",
    "lax.reduce_precision({v}, 11, 52)",
    "jnp.maximum({v}, -0.2)",
    "{v} - {v}.min()",
    "{v} / jnp.abs({v}).sum()",
    "{v} * jnp.where(jnp.arange({v}.shape[-1]) < 1, 0.5, 1.0)",
    "{v} * np.float32(0.5).astype({v}.dtype)",
    into=NASTY,
)


# Parameters.


@gentle
@gentle
@gentle
@gentle
def project(w: Writer) -> Var:
    var = w.var(lambda var: var.ndim > 0)
    axis = w.axis(var)
    new = w.hidden() if w.rng.random() < 0.9 else (w.rng.choice(("T", "I")),)
    if not w.small(*var.with_dim(axis), new):
        raise Unfit
    return dense(w, var, axis, new)


@gentle
@gentle
def mlp(w: Writer) -> Var:
    """Up, nonlinear, down, and a residual."""
    var = w.var(lambda var: var.ndim > 1)
    up = dense(w, var, var.ndim - 1, w.hidden())
    fun = w.rng.choice(["jnp.tanh", "jax.nn.relu", "jax.nn.gelu", "jnp.abs"])
    mid = w.bind(f"{fun}({up.name})", up.dims)
    down = dense(w, mid, mid.ndim - 1, var.dims[-1])
    return w.let(f"{var.name} + {down.name}", var.dims)


@gentle
@gentle
def vector(w: Writer) -> Var:
    """A bias or a gain along one axis, or a scalar."""
    var = w.var(lambda var: var.ndim > 0)
    axis = w.axis(var)
    sign = w.rng.choice(["+", "*", "-", "+", "* (1 +"])
    end = ")" if "(" in sign else ""
    if w.rng.random() < 0.2:
        return w.let(f"{var.name} {sign} {w.param()}{end}", var.dims)
    along = w.align(axis, var.ndim)
    return w.let(f"{var.name} {sign} {w.param(var.dims[axis])}{along}{end}", var.dims)


@gentle
def gated(w: Writer) -> Var:
    var = w.var(lambda var: var.ndim > 0)
    new = w.hidden()
    a, b = dense(w, var, var.ndim - 1, new), dense(w, var, var.ndim - 1, new)
    return w.let(f"jax.nn.silu({a.name}) * {b.name}", a.dims)


@gentle
def two_axes(w: Writer) -> Var:
    """A kernel contracted over two axes, or over one with the other as a batch."""
    var = w.var(lambda var: var.ndim > 1)
    i, j = sorted(w.rng.sample(range(var.ndim), 2))
    left, new = letters(var.ndim), w.hidden()
    kernel = w.param(var.dims[i], var.dims[j], new)
    keep = left[i] if w.rng.random() < 0.5 else ""
    rest = "".join(c for k, c in enumerate(left) if k not in (i, j))
    dims = [d for k, d in enumerate(var.dims) if k not in (i, j)]
    spec = einsum([left, left[i] + left[j] + "z", rest + keep + "z"])
    kept = [var.dims[i]] if keep else []
    if not w.small(*dims, *kept, new):
        raise Unfit
    return w.let(f"jnp.einsum({spec}, {var.name}, {kernel})", (*dims, *kept, new))


@gentle
def weight_normalised(w: Writer) -> Var:
    var = w.var(lambda var: var.ndim > 0)
    new = w.hidden()
    k = w.bind(w.param(var.dims[-1], new))
    over = w.rng.choice(["(%s ** 2).sum(0)", "(%s ** 2).mean(0)", "(%s ** 2).sum()"]) % k.name
    return w.let(
        f"{var.name} @ ({k.name} / jnp.sqrt({over}))",
        (*var.dims[:-1], new),
    )


@nasty
def square(w: Writer) -> Var:
    """A square kernel, used in ways that tie both its sides."""
    var = w.var(lambda var: var.ndim > 0)
    k = w.bind(w.param(var.dims[-1], var.dims[-1]), ())
    n = text_of(var.dims[-1])
    how = w.rng.choice(
        [
            "{v} @ {k} @ {k}",
            "{v} @ ({k} + {k}.T)",
            "{v} * jnp.trace({k})",
            "{v} * jnp.diagonal({k})",
            "{v} * jnp.einsum('ii->i', {k})",
            "{v} @ ({k} + jnp.eye({n}))",
            "{v} @ ({k} @ {k}.T)",
            "{v} @ ({k} - {k}.T)",
            "{v} @ jnp.linalg.inv(jnp.eye({n}) + 0.1 * {k} @ {k}.T)",
            "{v} @ jnp.triu({k})",
        ]
    )
    return w.let(how.format(v=var.name, k=k.name, n=n), var.dims)


@nasty
def fast_weights(w: Writer) -> Var:
    """One step of gradient descent inside the model."""
    var = w.var(lambda var: var.ndim > 0)
    new = w.hidden()
    k = w.bind(w.param(var.dims[-1], new))
    total = w.rng.choice([".mean()", ".sum()", ".sum(-1).mean()"])
    loss = f"lambda k: ((jnp.tanh({var.name} @ k)) ** 2){total}"
    return w.let(
        f"{var.name} @ ({k.name} - 0.1 * jax.grad({loss})({k.name}))", (*var.dims[:-1], new)
    )


@gentle
def layers(w: Writer) -> Var:
    """Stacked kernels, scanned over."""
    var = w.var(lambda var: var.ndim > 0)
    k = w.param(("3",), var.dims[-1], var.dims[-1])
    return w.let(
        f"lax.scan(lambda c, k: (c + jnp.tanh(c @ k), None), {var.name}, {k})[0]", var.dims
    )


@gentle
def recurrent(w: Writer) -> Var:
    """A recurrence along the second axis."""
    var = w.var(lambda var: var.ndim > 2)
    new = w.hidden()
    inner, outer = w.param(var.dims[-1], new), w.param(new, new)
    dims = [d for i, d in enumerate(var.dims) if i != 1]
    zeros = f"jnp.zeros({shape_text([*dims[:-1], new])})"
    reverse = w.rng.choice(["", ", reverse=True"])
    step = f"lambda c, a: (jnp.tanh(a @ {inner} + c @ {outer}),) * 2"
    out = f"lax.scan({step}, {zeros}, jnp.moveaxis({var.name}, 1, 0){reverse})"
    if w.rng.random() < 0.5:
        return w.let(f"{out}[0]", [*dims[:-1], new])
    return w.let(f"jnp.moveaxis({out}[1], 0, 1)", (*var.dims[:-1], new))


@gentle
def embedding(w: Writer) -> Var:
    table = w.param(("3",), w.hidden())
    name = table.split("'")[1]
    return w.let(f"p['{name}'][ids]", (("B",), w.params[name][1]))


# Two arrays.


@gentle
def together(w: Writer) -> Var:
    """Sums, products and choices of arrays with the same dimensions."""
    a = w.var(lambda var: var.ndim > 0)
    b = w.var(lambda var: var.dims == a.dims and var.name != a.name)
    how = w.rng.choice(
        [
            "{a} + {b}",
            "{a} * {b}",
            "{a} - {b}",
            "jnp.maximum({a}, {b})",
            "jnp.where({a} > {b}, {a}, {b})",
            "jnp.where({a} > 0, {b}, 0.0)",
            "jnp.hypot({a}, {b})",
        ]
    )
    return w.let(how.format(a=a.name, b=b.name), a.dims)


@gentle
def contract(w: Writer) -> Var:
    """Over an axis that two arrays have, with another as a batch or not: attention, Gram."""
    a = w.var(lambda var: var.ndim > 1)
    b = w.var(lambda var: var.ndim > 1 and set(var.dims) & set(a.dims))
    i = w.axis(a, lambda dim: dim in b.dims)
    j = b.dims.index(a.dims[i])
    left, right = letters(a.ndim), list(letters(b.ndim, 8))
    right[j] = left[i]
    for n, dim in enumerate(b.dims):
        free = [m for m, d in enumerate(a.dims) if d == dim and left[m] not in right]
        if n != j and free and (dim[0] in ("B", "T") or w.rng.random() < 0.3):
            right[n] = left[free[0]]
    out = "".join(dict.fromkeys(c for c in left + "".join(right) if c != left[i]))
    where = dict(zip([*left, *right], [*a.dims, *b.dims], strict=True))
    dims = [where[c] for c in out]
    if not w.small(*dims):
        raise Unfit
    spec = einsum([left, "".join(right), out])
    return w.let(f"jnp.einsum({spec}, {a.name}, {b.name})", dims)


@gentle
def joined(w: Writer) -> Var:
    """One after the other along an axis, or stacked."""
    a = w.var(lambda var: var.ndim > 0)
    i = w.axis(a)
    b = w.var(lambda var: var.ndim == a.ndim and var.with_dim(i) == a.with_dim(i))
    if w.rng.random() < 0.3 and a.dims == b.dims and a.ndim < 4:
        return w.let(f"jnp.stack([{a.name}, {b.name}], {i})", a.with_dim(i, ("2",), a.dims[i]))
    new = (f"({text_of(a.dims[i])} + {text_of(b.dims[i])})",)
    if not w.small(*a.with_dim(i, new)):
        raise Unfit
    return w.let(f"jnp.concatenate([{a.name}, {b.name}], {i})", a.with_dim(i, new))
