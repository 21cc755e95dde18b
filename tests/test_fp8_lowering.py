"""What an H200 gets: programs compiled ahead of time for one, without a GPU.

Needs JAX's CUDA plugin (``pip install "jax[cuda12]"``).  Programs are compiled in a process of its
own, for XLA reads its options once.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "targets" / "h200.txtpb"
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# Without autotuning XLA would take Triton's kernels, which multiply in float16.
OPTIONS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
GEMM = "__cublas$lt$matmul"
F8 = "__cublas$lt$matmul$f8"
FREE = ("bitcast", "constant", "get-tuple-element", "parameter", "tuple")


def scalars(entry: str) -> dict[str, float]:
    """Constants of a compiled program by name, those that barriers hand on too."""
    found = {n: float(x) for n, x in re.findall(r"%(\S+) = f32\[\] constant\((\S+)\)", entry)}
    tuples = {
        name: re.findall(r"%([\w.-]+)", inside)
        for name, inside in re.findall(r"%(\S+) = \(.*?\) tuple\((.*?)\)", entry)
    }
    pattern = r"%(\S+) = f32\[\] get-tuple-element\(%([\w.-]+)\), index=(\d+)"
    for name, of, index in re.findall(pattern, entry):
        if of in tuples and tuples[of][int(index)] in found:
            found[name] = found[tuples[of][int(index)]]
    return found


def kernels(text: str) -> dict[str, Any]:
    """The library's products of a compiled program, and its other kernels.

    Of a product its target, what it multiplies sums by, alpha and scales of operands, and the type
    of its result.
    """
    entry = text[text.index("\nENTRY") :]
    scales = scalars(entry)
    products, others = [], []
    pattern = r"^  (?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$"
    for name, kind, operation, rest in re.findall(pattern, entry, re.MULTILINE):
        target = re.search(r'custom_call_target="([^"]+)"', rest)
        if target and target[1].startswith(GEMM):
            alpha = float(re.search(r'"alpha_real":([^,}]+)', rest)[1])
            dtype = re.match(r"\(?(\w+)", kind)[1]
            operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
            factor = alpha * math.prod(scales.get(name, 1.0) for name in operands)
            products.append([target[1], factor, dtype])
        elif operation not in FREE:
            others.append(name)
    return {"products": products, "others": others}


def programs() -> dict[str, tuple]:
    """Functions of shapes and dtypes, by name."""
    import jax
    import jax.numpy as jnp

    from uscale_jax.numerics._fp8 import fp8_dot_general
    from uscale_jax.numerics._fp8_unit import unit_fp8_dot_general

    dims, bf16 = (((1,), (0,)), ((), ())), jnp.bfloat16
    operands = ((8192, 4096), bf16), ((4096, 16384), bf16)
    wide = tuple((shape, jnp.float32) for shape, _ in operands)

    def linear(**settings):
        dot = fp8_dot_general(**settings)
        return lambda x, w: dot(x, w, dims)

    def backward(product):
        return lambda x, w, g: jax.vjp(product, x, w)[1](g)

    def cost(product, act=lambda y: y):
        return lambda x, w: jnp.sum(act(product(x, w)).astype(jnp.float32))

    def tanh_loss(product):
        return jax.value_and_grad(cost(product, jnp.tanh), (0, 1))

    def mlp(product):
        layers = lambda x, up, down: product(jax.nn.gelu(product(x, up)), down)  # noqa: E731
        return jax.value_and_grad(
            lambda *args: jnp.sum(jnp.tanh(layers(*args)).astype(jnp.float32)), (0, 1, 2)
        )

    scaled = linear(rhs_scale=64.0, lhs_scale=2.0, grad_scale=4.0)
    unit = linear(out_multiplier=0.0123, lhs_grad_multiplier=0.3, rhs_grad_multiplier=0.7)
    unit_scaled = lambda x, w: unit_fp8_dot_general()(x, w, dims)  # noqa: E731
    plain = lambda x, w: jax.lax.dot_general(x, w, dims)  # noqa: E731
    mlp_operands = (*operands, ((16384, 4096), bf16))
    gradient = ((8192, 16384), bf16)
    return {
        "forward": (scaled, operands),
        "backward": (backward(scaled), (*operands, gradient)),
        "linear loss": (jax.grad(cost(scaled), (0, 1)), operands),
        "tanh loss": (tanh_loss(scaled), operands),
        "tanh loss in bfloat16": (tanh_loss(plain), operands),
        "unit forward": (unit, operands),
        "unit backward in float32": (backward(unit), (*wide, ((8192, 16384), jnp.float32))),
        "unit-scaled backward": (backward(unit_scaled), (*operands, gradient)),
        "unit-scaled tanh loss": (tanh_loss(unit_scaled), operands),
        "unit-scaled mlp": (mlp(unit_scaled), mlp_operands),
        "mlp": (mlp(scaled), mlp_operands),
        "mlp in bfloat16": (mlp(plain), mlp_operands),
        "attention": (
            lambda q, k: fp8_dot_general()(q, k, (((3,), (3,)), ((0, 1), (0, 1)))),
            (((4, 16, 1024, 128), bf16),) * 2,
        ),
        "three of a shape": (
            lambda x, *ws: [scaled(x, w) for w in ws],
            (((8192, 4096), bf16), *(((4096, 4096), bf16),) * 3),
        ),
        "three backward": (
            jax.value_and_grad(
                lambda x, *ws: sum(cost(scaled, jnp.tanh)(x, w) for w in ws), (0, 1, 2, 3)
            ),
            (((8192, 4096), bf16), *(((4096, 4096), bf16),) * 3),
        ),
        "odd sizes": (scaled, (((101, 4101), bf16), ((4101, 37), bf16))),
        "e5m2 twice": (linear(forward="float8_e5m2"), operands),
    }


def compile_all() -> dict[str, Any]:
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    device = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topo=device, mesh_shape=(1,), axis_names=("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def compiled(fun: Any, operands: Any) -> dict[str, Any]:
        args = [jax.ShapeDtypeStruct(*each, sharding=sharding) for each in operands]
        return kernels(jax.jit(fun).lower(*args).compile().as_text())

    return {name: compiled(*each) for name, each in programs().items()}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if not any(map(importlib.util.find_spec, PLUGINS)):
        pytest.skip('no CUDA plugin: pip install "jax[cuda12]" to compile for an H200')
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.test_fp8_lowering"],
        cwd=ROOT,
        env={**kept, "XLA_FLAGS": OPTIONS},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_all_products_are_of_float8(found):
    for name, program in found.items():
        if name == "e5m2 twice" or "bfloat16" in name:
            continue
        assert {target for target, *_ in program["products"]} == {F8}, (name, program)
    counts = {name: len(program["products"]) for name, program in found.items()}
    assert counts["forward"] == counts["unit forward"] == 1
    assert counts["backward"] == counts["linear loss"] == 2  # forward, nothing reads it
    assert counts["tanh loss"] == 3
    assert counts["mlp"] == 6


def test_scales_and_multipliers_are_parts_of_products(found):
    """What is computed before and after a product multiplies no more."""
    factors = lambda name: [factor for _, factor, _ in found[name]["products"]]  # noqa: E731
    assert factors("forward") == [1 / 128]
    assert sorted(factors("backward")) == [1 / 256, 1 / 8]
    assert sorted(factors("tanh loss")) == [1 / 256, 1 / 128, 1 / 8]
    assert factors("unit forward") == pytest.approx([0.0123])
    assert sorted(factors("unit backward in float32")) == pytest.approx([0.3, 0.7])
    # Where products share a shape and a factor, XLA would fold it into none of them.
    assert factors("three of a shape") == [1 / 128] * 3
    assert len(found["three of a shape"]["others"]) <= 1 + 3
    assert sorted(factors("three backward")) == [*[1 / 256] * 3, *[1 / 128] * 3, *[1 / 8] * 3]


def test_results_leave_a_product_in_bfloat16_where_factors_are_powers_of_two(found):
    dtypes = lambda name: {dtype for *_, dtype in found[name]["products"]}  # noqa: E731
    assert dtypes("forward") == dtypes("tanh loss") == dtypes("mlp") == {"bf16"}
    assert dtypes("unit forward") == {"f32"}


@pytest.mark.parametrize("name", ["backward", "tanh loss", "mlp"])
def test_factors_of_unit_scaling_cost_nothing(found, name):
    """Powers of two in products, results in bfloat16, no more kernels than static scales have."""
    unit, static = found[f"unit-scaled {name}"], found[name]
    assert len(unit["products"]) == len(static["products"])
    assert len(unit["others"]) <= len(static["others"]), unit
    assert {dtype for *_, dtype in unit["products"]} == {"bf16"}
    assert all(factor < 1 and math.frexp(factor)[0] == 0.5 for _, factor, _ in unit["products"])


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("forward", 2),  # a cast an operand; with delayed scaling of Flax 7
        ("backward", 3),
        ("linear loss", 4),  # with delayed scaling of Flax 21
        ("tanh loss", 6),  # 2 of them are the loss; with delayed scaling of Flax 27
        ("unit forward", 3),
        ("unit backward in float32", 3),
    ],
)
def test_kernels_besides_products(found, name, most):
    assert len(found[name]["others"]) <= most, found[name]


def test_plain_products_are_not_of_float8_and_neither_are_those_of_e5m2_alone(found):
    """That the names above can tell."""
    for name in ("e5m2 twice", "tanh loss in bfloat16", "mlp in bfloat16"):
        assert F8 not in {target for target, *_ in found[name]["products"]}


if __name__ == "__main__":
    print(json.dumps(compile_all()))
