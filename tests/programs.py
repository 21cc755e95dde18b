"""Random programs as text, over named sizes, so that each can be built at any sizes.

A :class:`Writer` appends lines of Python to a function ``apply(p, x, ids)``.  Every array it has
made is a :class:`Var` whose dimensions are products of factors; a factor is the name of a size, or
an expression in such names.  The text is the whole program: print it to reproduce what it does.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from uscale_jax.trace.tracing import Model

Dim = tuple[str, ...]
Sizes = dict[str, int]

DATA = ("B", "T", "I")
HIDDEN = ("H", "F", "N", "D")
LETTERS = "abcdefghijklmnop"


def size_of(dim: Dim, sizes: Sizes) -> int:
    """How long a dimension is."""
    return int(eval(text_of(dim), dict(sizes)))


def text_of(dim: Dim) -> str:
    """A dimension's size as an expression."""
    return " * ".join(dim) or "1"


def shape_text(dims: Sequence[Dim]) -> str:
    return "(" + "".join(f"{text_of(dim)}, " for dim in dims) + ")"


@dataclass(frozen=True)
class Var:
    """A floating array of a program."""

    name: str
    dims: tuple[Dim, ...]

    @property
    def ndim(self) -> int:
        return len(self.dims)

    def with_dim(self, axis: int, *dims: Dim) -> tuple[Dim, ...]:
        """The dimensions with one of them replaced."""
        return (*self.dims[:axis], *dims, *self.dims[axis + 1 :])


@dataclass
class Program:
    """Lines of an ``apply``, the shapes of its parameters, and the sizes it is meant for."""

    lines: list[str]
    params: dict[str, tuple[Dim, ...]]
    inputs: tuple[Dim, ...]
    sizes: Sizes
    ids: Dim = ("B",)

    def text(self) -> str:
        body = "\n".join(f"    {line}" for line in self.lines)
        return f"def apply(p, x, ids):\n{body}\n"

    def apply(self, sizes: Sizes) -> Callable[..., Any]:
        names: dict[str, Any] = {"jax": jax, "jnp": jnp, "lax": lax, "np": np, **sizes}
        exec(compile(self.text(), "<program>", "exec"), names)
        return names["apply"]

    def shapes(self, sizes: Sizes) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(tuple(size_of(d, sizes) for d in dims), np.float64)
            for name, dims in self.params.items()
        }

    def model(self, sizes: Sizes) -> Model:
        return Model(self.apply(sizes), self.shapes(sizes))

    def arrays(self, seed: int) -> tuple[Any, ...]:
        rng = np.random.default_rng(seed)
        shape = [size_of(dim, self.sizes) for dim in self.inputs]
        return rng.standard_normal(shape), rng.integers(0, 3, size_of(self.ids, self.sizes))

    def source(self, grown: Sizes) -> str:
        """The program as code that can be pasted."""
        params = "".join(f"\n    {k} = {shape_text(v)}" for k, v in self.params.items())
        comment = params.replace("\n    ", "\n#   ")
        return (
            f"# sizes {self.sizes}, grown {grown}, x {shape_text(self.inputs)}, ids in range(3)\n"
            f"# parameters:{comment}\n{self.text()}"
        )


class Unfit(Exception):
    """No array of a program fits an operation."""


@dataclass
class Writer:
    """Appends lines to a program, and knows what every array in it is."""

    rng: random.Random
    sizes: Sizes
    lines: list[str] = field(default_factory=list)
    params: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    pool: list[Var] = field(default_factory=list)
    count: int = 0

    # Choices.

    def one_of(self, options: Sequence[Any]) -> Any:
        if not options:
            raise Unfit
        return self.rng.choice(options)

    def var(self, ok: Callable[[Var], bool] = lambda var: True) -> Var:
        """An array, most often a recent one."""
        fitting = [var for var in self.pool if ok(var)]
        return self.one_of(fitting[-3:] if self.rng.random() < 0.8 else fitting)

    def axis(self, var: Var, ok: Callable[[Dim], bool] = lambda dim: True) -> int:
        return self.one_of([i for i, dim in enumerate(var.dims) if ok(dim)])

    def hidden(self) -> Dim:
        return (self.rng.choice(HIDDEN),)

    def size(self, *dims: Dim) -> int:
        total = 1
        for dim in dims:
            total *= size_of(dim, self.sizes)
        return total

    # Lines.

    def let(self, expression: str, dims: Sequence[Dim]) -> Var:
        """Binds an expression to a new array."""
        var = self.bind(expression, dims)
        self.pool.append(var)
        return var

    def bind(self, expression: str, dims: Sequence[Dim] = ()) -> Var:
        """Binds an expression to a name that is not chosen again."""
        self.count += 1
        var = Var(f"v{self.count}", tuple(dims))
        self.lines.append(f"{var.name} = {expression}")
        return var

    def param(self, *dims: Dim) -> str:
        """A parameter; now and then one that was there, as it is or transposed."""
        if len(dims) > 1 and self.rng.random() < 0.2:
            for name, known in self.params.items():
                if known == dims:
                    return f"p['{name}']"
                if known == dims[::-1]:
                    return f"p['{name}'].T"
        name = f"w{len(self.params)}"
        self.params[name] = tuple(dims)
        return f"p['{name}']"

    def small(self, *dims: Dim) -> bool:
        """Whether an array stays small enough for a test."""
        return len(dims) <= 4 and self.size(*dims) <= 400

    def align(self, axis: int, ndim: int) -> str:
        """Indexing that lays a vector along one axis of an array of ``ndim``."""
        return "[" + ", ".join(":" if i == axis else "None" for i in range(ndim)) + "]"


def einsum(operands: Sequence[str]) -> str:
    """A specification out of operands; the last one is the result."""
    return f"'{','.join(operands[:-1])}->{operands[-1]}'"


def letters(ndim: int, start: int = 0) -> str:
    return LETTERS[start : start + ndim]


def dense(w: Writer, var: Var, axis: int, new: Dim) -> Var:
    """Contracts one axis with a kernel, whose other axis comes last."""
    left = letters(var.ndim)
    kernel = w.param(var.dims[axis], new)
    out = left[:axis] + left[axis + 1 :] + "z"
    spec = einsum([left, left[axis] + "z", out])
    return w.let(f"jnp.einsum({spec}, {var.name}, {kernel})", (*var.with_dim(axis), new))


def finish(w: Writer) -> None:
    """Returns what nothing else uses, without the dimensions that are not the data's."""
    if w.rng.random() < 0.02:
        w.lines.append(f"return {w.pool[-1].name}")
        return
    text = "\n".join(w.lines)
    unused = [var for var in w.pool if not re.search(rf"\b{var.name}\b(?! =)", text)]
    names = [_on_data(w, var).name for var in unused[-3:]]
    w.lines.append(f"return jnp.concatenate([{', '.join(f'{name}.ravel()' for name in names)}])")


def _on_data(w: Writer, var: Var) -> Var:
    while any(_is_hidden(dim) for dim in var.dims):
        axis = next(i for i, dim in enumerate(var.dims) if _is_hidden(dim))
        if w.rng.random() < 0.75:
            var = dense(w, var, axis, ("3",))
        else:
            var = w.let(f"{var.name}.mean({axis})", var.with_dim(axis))
    return var


def _is_hidden(dim: Dim) -> bool:
    return any(name in factor for factor in dim for name in HIDDEN)


def draw_sizes(rng: random.Random) -> Sizes:
    """Distinct sizes, or ones that coincide."""
    choices = rng.choice([(2, 3, 4, 6), (2, 4), (4,), (1, 2, 3), (2, 2, 6)])
    hidden = {name: rng.choice(choices) for name in HIDDEN}
    return {"B": rng.choice((2, 3, 4)), "T": rng.choice((3, 4)), "I": rng.choice((2, 4)), **hidden}


def write(
    rng: random.Random, ops: Sequence[Callable[[Writer], Any]], weights: Sequence[float]
) -> Program:
    """Returns a program of a few random operations, some of them favoured in this one."""
    weights = [weight * rng.choice((0.1, 0.1, 1, 3)) for weight in weights]
    w = Writer(rng, draw_sizes(rng))
    inputs: tuple[Dim, ...] = rng.choice([(("B",), ("I",)), (("B",), ("T",), ("I",))])
    w.pool.append(Var("x", inputs))
    dense(w, w.pool[0], len(inputs) - 1, w.hidden())
    for _ in range(rng.randint(3, 12)):
        kept = len(w.lines), dict(w.params), list(w.pool)
        try:
            rng.choices(ops, weights)[0](w)
        except Unfit:
            w.lines, w.params, w.pool = w.lines[: kept[0]], kept[1], kept[2]
    finish(w)
    return Program(w.lines, w.params, inputs, w.sizes)
