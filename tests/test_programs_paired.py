"""Two programs in step: which pairs are one program at two sizes, and how others are refused."""

import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import uscale_jax as us
from tests.nets import f32, flat
from uscale_jax import _jax
from uscale_jax.trace.inline import program
from uscale_jax.trace.tracing import Model, trace

ROWS = Path(__file__).read_text().splitlines()


def line(mark: str) -> str:
    """Where in this file a line with a mark at its end is."""
    (number,) = [i for i, row in enumerate(ROWS, 1) if row.endswith(f"# line: {mark}")]
    return f"{Path(__file__).name}:{number}"


def test_two_programs_share_values_with_a_size_each():
    shapes = [({"w": f32(5, n)}, f32(2, 5)) for n in (6, 12)]
    fun = lambda p, x: jnp.tanh(x @ p["w"])[:, : p["w"].shape[1] // 2].sum(1)  # noqa: E731
    both = program([_jax.closed_jaxpr(fun, *s)[0] for s in shapes])
    assert both.count == 2
    assert both.inputs[0].shape == ((5, 5), (6, 12))
    (cut,) = [e for e in both.equations if e.name == "slice"]
    assert cut.sizes("limit_indices") == ((2, 2), (3, 6))
    one = flat(fun, *shapes[0])
    assert [e.name for e in one.equations] == [e.name for e in both.equations]


def test_constants_have_a_value_each():
    fun = lambda x: x.sum() / x.shape[0]  # noqa: E731
    both = program([_jax.closed_jaxpr(fun, f32(n))[0] for n in (6, 12)])
    assert both.equations[-1].inputs[1].uniform == (6, 12)


def refusal(small: Any, big: Any, *, sizes: tuple[Any, Any] = (f32(4), f32(8))) -> str:
    models = [Model(f, {"w": size}) for f, size in zip((small, big), sizes, strict=True)]
    with pytest.raises(ValueError, match="Expected|expected") as caught:
        trace(models, ())
    return str(caught.value)


def small_tanh(p):
    return jnp.tanh(p["w"]).sum()  # line: small


def big_sin(p):
    return jnp.sin(p["w"]).sum()  # line: big


def test_other_operations_are_refused_with_both_lines():
    lines = refusal(small_tanh, big_sin).splitlines()
    assert lines[0] == "the two models are different programs, not one program at two sizes."
    assert lines[1].startswith("  small: `tanh` of float32[4] at ")
    assert lines[1].endswith(line("small"))
    assert lines[2].startswith("  big: `sin` of float32[8] at ")
    assert lines[2].endswith(line("big"))
    assert "build both models from one definition" in lines[-1]


def test_other_parameters_of_an_operation_are_refused_by_name():
    text = refusal(lambda p: (p["w"] ** 3).sum(), lambda p: (p["w"] ** 5).sum())
    assert "`integer_pow`" in text
    assert "\n  y: 3 (small), 5 (big)\n" in text


def test_differences_inside_calls_and_loops_are_found():
    def loop(body):
        step = lambda _, c: jax.jit(body)(c)  # noqa: E731
        return lambda p: lax.fori_loop(0, 3, step, p["w"]).sum()

    text = refusal(loop(jnp.sin), loop(jnp.cos))
    assert "small: `sin`" in text
    assert "big: `cos`" in text


def test_the_same_operations_on_other_operands_are_refused():
    """The order of the operations is the same, but not what goes into them."""
    sizes = [{"a": f32(n), "b": f32(n)} for n in (4, 8)]

    def refused(small, big):
        with pytest.raises(ValueError, match="different programs") as caught:
            trace([Model(f, size) for f, size in zip((small, big), sizes, strict=True)], ())
        return str(caught.value)

    def difference(first, second):
        return lambda p: (p[first] - p[second]).sum()

    text = refused(difference("a", "b"), difference("b", "a"))
    assert "`sub` of float32[8], float32[8]" in text
    assert "  operand 0 comes from elsewhere in the big one\n  operand 1 comes" in text
    assert "operand 0" in refused(lambda p: p["a"].sum(), lambda p: p["b"].sum())
    assert "operand 1" in refused(lambda p: (p["a"] * 2).sum(), lambda p: (p["a"] * p["a"]).sum())
    both = lambda p: (p["a"].sum(), p["b"].sum())  # noqa: E731
    assert "result 0 comes from elsewhere" in refused(both, lambda p: both(p)[::-1])


COUNTS = {
    "operands": [lambda w, n=n: jnp.concatenate([w] * n).sum() for n in (2, 3)],
    "arrays": [
        lambda w: (w * np.arange(4, dtype=np.float32)).sum(),
        lambda w: (w * 2).sum(),
    ],
    "ranks": [lambda w, s=s: w.reshape(s).sum() for s in ((2, 2), (2, 2, 2))],
    "branches": [
        lambda w, n=n: lax.switch(w.sum().astype(int), [jnp.sin, jnp.cos, jnp.tan][:n], w).sum()
        for n in (2, 3)
    ],
    "carries": [
        lambda w: lax.fori_loop(0, 3, lambda _, c: c * 2, w).sum(),
        lambda w: lax.fori_loop(0, 3, lambda _, c: (c[0] * 2, c[1]), (w, w))[0].sum(),
    ],
}


@pytest.mark.parametrize("what", COUNTS)
def test_other_numbers_of_things_are_refused(what):
    small, big = COUNTS[what]
    text = refusal(lambda p: small(p["w"]), lambda p: big(p["w"]))
    assert text.startswith("the two models are different programs")


@pytest.mark.parametrize("swap", [False, True])
def test_a_program_that_ends_early_is_refused(swap):
    pair = [small_tanh, lambda p: jnp.tanh(p["w"]).sum() + 1]
    text = refusal(*(reversed(pair) if swap else pair))
    assert ("big" if swap else "small") + ": ends here" in text
    assert ("small" if swap else "big") + ": `add` of float32[], float32[] at " in text


def test_other_trees_of_parameters_are_refused():
    models = [Model(lambda p: jnp.zeros(()), {name: f32(4)}) for name in ("kernel", "weight")]
    with pytest.raises(ValueError, match="different parameters") as caught:
        trace(models, ())
    assert "only the small one has 'kernel'\n  only the big one has 'weight'" in str(caught.value)


@pytest.mark.parametrize("big", [f32(4, 2), jax.ShapeDtypeStruct((4,), jnp.bfloat16)])
def test_other_ranks_and_dtypes_of_parameters_are_refused(big):
    text = refusal(lambda p: p["w"].sum(), lambda p: p["w"].sum(), sizes=(f32(4), big))
    assert text.startswith("parameter 'w' is float32[4]")
    assert f"{big.dtype}[{','.join(map(str, big.shape))}]" in text
    assert "Expected: the same rank and dtype." in text


def test_other_outputs_are_refused():
    text = refusal(lambda p: {"y": p["w"] * 2}, lambda p: {"y": p["w"] * 2})
    assert text.startswith("output y is float32[4]")
    assert "float32[8]" in text
    total = lambda p: p["w"].sum()  # noqa: E731
    for outputs in (lambda p: {"z": total(p)}, lambda p: {"y": total(p), "z": total(p)}):
        assert "different trees of outputs" in refusal(lambda p: {"y": total(p)}, outputs)


def test_the_marks_of_this_file_are_lines_of_it():
    assert inspect.getsourcelines(small_tanh)[1] + 1 == int(line("small").split(":")[1])


def test_functions_inside_other_primitives_are_compared():
    def applying(fun):
        return lambda p: p["w"].at[1].apply(fun)

    text = refusal(applying(jnp.sin), applying(jnp.cos), sizes=(f32(4), f32(4)))
    assert "update_jaxpr" in text


def test_callbacks_and_meshes_are_compared():
    def calling(k):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return lambda p: jax.pure_callback(lambda a: k * a, shape, p["w"].sum())

    assert "callback" in refusal(calling(2), calling(3), sizes=(f32(4), f32(4)))

    def sharded(count):
        mesh = Mesh(jax.devices()[:count], ("d",))
        run = lambda a: lax.psum(a, "d")  # noqa: E731
        return jax.shard_map(
            run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )

    small, big = (lambda p, n=n: sharded(n)(p["w"].sum()) for n in (1, 2))
    assert "mesh" in refusal(small, big, sizes=(f32(4), f32(4)))


def test_integers_that_differ_are_said_without_an_equation():
    def apply(p):
        return jnp.where(p["w"].sum() > 0, p["w"].shape[0], 7).astype(jnp.float32)

    with pytest.raises(ValueError, match="Fix:") as error:
        us.trace_exponents(apply, {"w": f32(4)}, big=(apply, {"w": f32(8)}))
    text = str(error.value)
    assert "an integer is 4 (small), 8 (big)" in text
    assert "= 1" not in text
