"""Operations of random programs that move elements, and that look at where they are."""

from tests.program_ops import gentle, nasty
from tests.programs import HIDDEN, Dim, Unfit, Var, Writer, dense, shape_text, text_of


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
        raise Unfit
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
@nasty
def coinciding(w: Writer) -> Var:
    """Arrays whose sizes are equal though nothing says that they must be."""
    a = w.var(lambda var: var.ndim > 0)
    sizes = [w.size(dim) for dim in a.dims]
    b = w.var(lambda var: [w.size(dim) for dim in var.dims] == sizes and var.dims != a.dims)
    how = w.rng.choice(["{a} + jnp.tanh({b})", "{a} * {b}", "jnp.concatenate([{a}, {b}], 0)"])
    first: Dim = (f"({text_of(a.dims[0])} + {text_of(b.dims[0])})",)
    dims = a.with_dim(0, first) if "concatenate" in how else a.dims
    if not w.small(*dims):
        raise Unfit
    return w.let(how.format(a=a.name, b=b.name), dims)


@nasty
def regrouped(w: Writer) -> Var:
    """A reshape to dimensions of other names with as many elements."""
    var = w.var(lambda var: var.ndim > 0)
    i = w.axis(var)
    total = w.size(var.dims[i])
    pairs = [(a, b) for a in HIDDEN for b in HIDDEN if w.size((a,), (b,)) == total]
    a, b = w.one_of(pairs)
    dims = var.with_dim(i, (a,), (b,)) if var.ndim < 4 else var.with_dim(i, (a, b))
    return w.let(f"{var.name}.reshape{shape_text(dims)}", dims)


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
    options: list[tuple[str, Dim]] = [
        ("1:", (f"({n} - 1)",)),
        (":2", ("2",)),
        (":-1", (f"({n} - 1)",)),
    ]
    if even:
        options += [(f":{half[0]}", half), ("::2", half), ("1::2", half), (f"{half[0]}:", half)] * 2
    below = [name for name in HIDDEN if w.size((name,)) < w.size(var.dims[i])]
    options += [(f":{name}", (name,)) for name in below]
    options += [(f"{name}:", (f"({n} - {name})",)) for name in below]
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
        raise Unfit
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
            (
                "jnp.swapaxes(jnp.swapaxes({v}, 0, {i})[ids % ({n})], 0, {i})",
                var.with_dim(i, ("B",)),
            ),
            ("jnp.sum(jax.nn.one_hot(ids, {n}), 0).sum() * {v}", var.dims),
            ("lax.top_k(jnp.moveaxis({v}, {i}, -1), 1)[0]", (*var.with_dim(i), ("1",))),
        ]
    )
    if not w.small(*dims):
        raise Unfit
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
        raise Unfit
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
        raise Unfit
    return w.let(
        f"jax.vmap(lambda a, k: jnp.tanh(a @ k))({var.name}, {kernel})", (*var.dims[:-1], new)
    )
