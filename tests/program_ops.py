"""Operations that random programs are made of: gentle ones, and ones that mind how often or where.

Each takes a :class:`~tests.programs.Writer` and appends a line or a few.  It raises IndexError
where no array fits it.
"""

from collections.abc import Callable

from tests.programs import Dim, Var, Writer, dense, einsum, letters, shape_text, text_of

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
        w.let(template.format(v=var.name, i=axis, n=f"({dim})", shape=f"{var.name}.shape"), var.dims)

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
    "{v} * ({v} > 0).mean({i}, keepdims=True)",
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
        raise IndexError
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
        raise IndexError
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
        ["{a} + {b}", "{a} * {b}", "jnp.maximum({a}, {b})", "jnp.where({a} > {b}, {a}, {b})"]
        + ["jnp.where({a} > 0, {b}, 0.0)", "{a} - {b}", "jnp.hypot({a}, {b})"]
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
        raise IndexError
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
        raise IndexError
    return w.let(f"jnp.concatenate([{a.name}, {b.name}], {i})", a.with_dim(i, new))


# Layout.


@gentle
def transposed(w: Writer) -> Var:
    var = w.var(lambda var: var.ndim > 1)
    order = list(range(var.ndim))
    w.rng.shuffle(order)
    return w.let(f"{var.name}.transpose({order})", [var.dims[i] for i in order])


@gentle
def merged(w: Writer) -> Var:
    var = w.var(lambda var: var.ndim > 1)
    i = w.rng.randrange(var.ndim - 1)
    dims = (*var.dims[:i], var.dims[i] + var.dims[i + 1], *var.dims[i + 2 :])
    return w.let(f"{var.name}.reshape{shape_text(dims)}", dims)


@gentle
def unmerged(w: Writer) -> Var:
    var = w.var(lambda var: any(len(dim) > 1 for dim in var.dims) and var.ndim < 4)
    i = w.axis(var, lambda dim: len(dim) > 1)
    at = w.rng.randrange(1, len(var.dims[i]))
    dims = var.with_dim(i, var.dims[i][:at], var.dims[i][at:])
    return w.let(f"{var.name}.reshape{shape_text(dims)}", dims)


@gentle
def split_kernel(w: Writer) -> Var:
    """A dense layer to a product, taken apart: heads."""
    var = w.var(lambda var: var.ndim > 0)
    a, b = w.hidden(), w.hidden()
    if not w.small(*var.dims[:-1], a + b) or var.ndim > 3:
        raise IndexError
    out = dense(w, var, var.ndim - 1, a + b)
    dims = (*out.dims[:-1], a, b)
    return w.let(f"{out.name}.reshape{shape_text(dims)}", dims)


@gentle
def fused(w: Writer) -> Var:
    """A dense layer to several parts, which are split again."""
    var = w.var(lambda var: var.ndim > 0)
    new, n = w.hidden(), w.rng.choice([2, 3])
    inside = w.rng.random() < 0.5
    out = dense(w, var, var.ndim - 1, (str(n), *new))
    w.pool.pop()
    if inside:
        parts = w.bind(f"jnp.split({out.name}, {n}, -1)")
        each = [f"{parts.name}[{i}]" for i in range(n)]
    else:
        each = [f"{out.name}[..., {i}::{n}]" for i in range(n)]
    how = w.rng.choice([" * ", " + "])
    return w.let(how.join(f"jnp.tanh({e})" for e in each), (*out.dims[:-1], new))


@nasty
def ambiguous(w: Writer) -> Var:
    """A reshape to the same dimensions in another order, which is no transposition."""
    var = w.var(lambda var: var.ndim > 1)
    dims = list(var.dims)
    i = w.rng.randrange(var.ndim - 1)
    dims[i], dims[i + 1] = dims[i + 1], dims[i]
    return w.let(f"{var.name}.reshape{shape_text(dims)}", dims)


@nasty
def flat_bias(w: Writer) -> Var:
    var = w.var(lambda var: var.ndim > 1)
    flat: Dim = sum(var.dims, ())
    return w.let(f"({var.name}.reshape(-1) + {w.param(flat)}).reshape({var.name}.shape)", var.dims)


@nasty
def cut(w: Writer) -> Var:
    """Part of an axis."""
    var = w.var(lambda var: var.ndim > 0)
    i = w.axis(var, lambda dim: w.size(dim) > 1)
    n, rows = text_of(var.dims[i]), ":, " * i
    even = w.size(var.dims[i]) % 2 == 0
    half = (f"({n} // 2)",)
    options: list[tuple[str, Dim]] = [("1:", (f"({n} - 1)",)), (":2", ("2",)), (":-1", (f"({n} - 1)",))]
    if even:
        options += [(f":{half[0]}", half), ("::2", half), ("1::2", half), (f"{half[0]}:", half)] * 2
    where, new = w.rng.choice(options)
    return w.let(f"{var.name}[{rows}{where}]", var.with_dim(i, new))


@nasty
def padded(w: Writer) -> Var:
    var = w.var(lambda var: var.ndim > 0)
    i = w.axis(var)
    widths = [(1, w.rng.choice([0, 1])) if k == i else (0, 0) for k in range(var.ndim)]
    new = (f"({text_of(var.dims[i])} + {sum(widths[i])})",)
    value = w.rng.choice(["", ", constant_values=1.0"])
    return w.let(f"jnp.pad({var.name}, {widths}{value})", var.with_dim(i, new))


@gentle
def repeated(w: Writer) -> Var:
    """Repeated along a new axis, or each place, or all of an axis."""
    var = w.var(lambda var: 0 < var.ndim < 4)
    new = w.hidden()
    if not w.small(*var.dims, new):
        raise IndexError
    n = text_of(new)
    how, dims = w.rng.choice(
        [
            (f"jnp.broadcast_to({{v}}[..., None], (*{{v}}.shape, {n}))", (*var.dims, new)),
            (f"jnp.repeat({{v}}, {n}, -1)", (*var.dims[:-1], var.dims[-1] + new)),
            (f"jnp.tile({{v}}, {n})", (*var.dims[:-1], new + var.dims[-1])),
        ]
    )
    return w.let(how.format(v=var.name), dims)


@gentle
def reduced(w: Writer) -> Var:
    var = w.var(lambda var: var.ndim > 1)
    i = w.axis(var)
    how = w.rng.choice(["mean", "mean", "max", "sum", "min", "var", "std", "any", "all"])
    cast = f".astype({var.name}.dtype)" if how in ("any", "all") else ""
    source = f"({var.name} > 0)" if cast else var.name
    return w.let(f"{source}.{how}({i}){cast}", var.with_dim(i))


# Places.


@nasty
def positions(w: Writer) -> Var:
    """Something that depends on the place along an axis."""
    var = w.var(lambda var: var.ndim > 0)
    i = w.axis(var)
    n, along = text_of(var.dims[i]), w.align(i, var.ndim)
    how = w.rng.choice(
        [
            f"{{v}} + jnp.sin(jnp.arange({n}) * 1.0){along}",
            f"jnp.where((jnp.arange({n}) < 2){along}, {{v}}, 0.0)",
            f"{{v}} * np.linspace(0.5, 1.0, {n}){along}",
            f"{{v}} * np.full({n}, 0.7){along}",
            f"{{v}} + jnp.linspace(0.0, 1.0, {n}){along}",
            f"{{v}} * jnp.ones({n}).at[0].set(0.5){along}",
            f"{{v}} * jax.random.bernoulli(jax.random.key(0), 0.5, ({n},)){along}",
        ]
    )
    return w.let(how.format(v=var.name), var.dims)


@nasty
def looked_up(w: Writer) -> Var:
    """Places that integers of the input choose."""
    var = w.var(lambda var: var.ndim > 0)
    i = w.axis(var)
    n = text_of(var.dims[i])
    how, dims = w.rng.choice(
        [
            ("jnp.take({v}, ids % ({n}), {i})", var.with_dim(i, ("B",))),
            ("lax.dynamic_slice_in_dim({v}, ids[0], 1, {i})", var.with_dim(i, ("1",))),
            ("jnp.take_along_axis({v}, jnp.argsort({v}, {i}), {i})", var.dims),
            ("lax.dynamic_update_slice_in_dim({v}, {v} * 0.5, ids[0], {i})", var.dims),
            ("jnp.swapaxes(jnp.swapaxes({v}, 0, {i})[ids % ({n})], 0, {i})", var.with_dim(i, ("B",))),
            ("jnp.sum(jax.nn.one_hot(ids, {n}), 0).sum() * {v}", var.dims),
            ("lax.top_k(jnp.moveaxis({v}, {i}, -1), 1)[0]", (*var.with_dim(i), ("1",))),
        ]
    )
    if not w.small(*dims):
        raise IndexError
    return w.let(how.format(v=var.name, i=i, n=n), dims)


@nasty
def segments(w: Writer) -> Var:
    """Sums of the places of one axis in three groups."""
    var = w.var(lambda var: var.ndim > 0)
    n = text_of(var.dims[0])
    group = w.rng.choice([f"jnp.arange({n}) % 3", f"jnp.zeros({n}, int)"])
    dims = var.with_dim(0, ("3",))
    return w.let(f"jax.ops.segment_sum({var.name}, {group}, 3)", dims)


@gentle
def convolved(w: Writer) -> Var:
    """Along the second of three axes, in groups or not."""
    var = w.var(lambda var: var.ndim == 3)
    channels = var.dims[2]
    groups: Dim = channels[:1] if w.rng.random() < 0.5 else ()
    out = (*groups, *w.hidden())
    kernel = w.param(("3",), channels[len(groups) :], out)
    if "'].T" in kernel or not w.small(*var.dims[:2], out):
        raise IndexError
    options = f"dimension_numbers=('NWC', 'WIO', 'NWC'), feature_group_count={text_of(groups)}"
    return w.let(
        f"lax.conv_general_dilated({var.name}, {kernel}, (1,), 'SAME', {options})",
        (*var.dims[:2], out),
    )


@nasty
def pooled(w: Writer) -> Var:
    var = w.var(lambda var: var.ndim > 0)
    i = w.axis(var)
    window = tuple(2 if k == i else 1 for k in range(var.ndim))
    kind, start = w.rng.choice([("max", "-jnp.inf"), ("add", "0.0")])
    ones = (1,) * var.ndim
    return w.let(
        f"lax.reduce_window({var.name}, {start}, lax.{kind}, {window}, {ones}, 'SAME')", var.dims
    )


@gentle
def mapped(w: Writer) -> Var:
    """A kernel for every place of the first axis."""
    var = w.var(lambda var: var.ndim > 1)
    new = w.hidden()
    kernel = w.param(var.dims[0], var.dims[-1], new)
    if "'].T" in kernel:
        raise IndexError
    return w.let(
        f"jax.vmap(lambda a, k: jnp.tanh(a @ k))({var.name}, {kernel})", (*var.dims[:-1], new)
    )
