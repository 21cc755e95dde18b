"""What a GPU's program consists of: products by library and operands, and other kernels.

Compiles for an H200 without one where JAX's CUDA plugin is installed, in a process of its own,
``python -m benchmarks.suite._fp8_lowering``: XLA reads its options once.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks.registry import Result
from benchmarks.suite import _fp8_contestants as layers
from benchmarks.suite._fp8_contestants import Sizes
from benchmarks.timing import NOT_KERNELS

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "targets" / "h200.txtpb"
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# Without autotuning, which needs the device, XLA would take Triton's kernels: those multiply float8
# operands in float16.
OPTIONS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
LIBRARY = "__cublas$"
F8 = "__cublas$lt$matmul$f8"
PASSES = ("forward", "both")


BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
"""Of an element; 1 of types that are not named: integers and floats of 8 bits."""


@dataclass(frozen=True)
class Calls:
    """The instructions of a compiled program that do work."""

    f8: int
    """Products of float8 operands, by cuBLASLt."""
    products: int
    """All products: by a library, or compiled by Triton."""
    others: int
    """All that is no product: fusions, copies, reductions."""
    moved: int
    """The bytes of operands and results of these others."""


def has_plugin() -> bool:
    """Return whether programs for NVIDIA's GPUs can be compiled here."""
    return any(map(importlib.util.find_spec, PLUGINS))


def calls(text: str) -> Calls:
    """Return what an optimised HLO module runs, in its entry and the command buffers it calls."""
    f8 = products = others = moved = 0
    types: dict[str, str] = {}
    for name, kind, operation, rest in _instructions(text):
        types[name] = kind
        if operation in (*NOT_KERNELS, "call"):
            continue
        target = re.search(r'custom_call_target="([^"]+)"', rest)
        library = target is not None and target[1].startswith(LIBRARY)
        if library or ("__triton" in rest and "gemm" in rest):
            products += 1
            f8 += target is not None and target[1] == F8
            continue
        others += 1
        operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
        moved += sum(map(_bytes, (kind, *(types.get(operand, "") for operand in operands))))
    return Calls(f8, products, others, moved)


def _instructions(text: str) -> list[tuple[str, str, str, str]]:
    """The name, type, operation and the rest, in the entry computation and command buffers."""
    head = r"^(?:ENTRY|%?command_buffer)[^\n]*\{\n(.*?)^\}"
    bodies = re.findall(head, text, re.MULTILINE | re.DOTALL)
    if not bodies:
        raise ValueError("the HLO text has no entry computation")
    line = r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$"
    return [found for body in bodies for found in re.findall(line, body, re.MULTILINE)]


def _bytes(kind: str) -> int:
    """Of a type, or all of a tuple's."""
    shapes = re.findall(r"([a-z]\w*)\[([\d,]*)\]", kind)
    return sum(BYTES.get(t, 1) * math.prod(map(int, filter(None, n.split(",")))) for t, n in shapes)


def programs(name: str, sizes: Sizes, seed: int = 0) -> dict[str, tuple[Any, Any]]:
    """Return a contestant's forward pass and its step, and the shapes of their arguments."""
    model = layers.contestants()[name](sizes)
    shapes = jax.eval_shape(lambda: layers.arguments(model, sizes, seed))
    return {
        "forward": (layers.forward(model), shapes[:2]),
        "both": (layers.step(model), shapes),
    }


def compiled(widths: tuple[int, ...], tokens: int) -> dict[str, dict[str, Result]]:
    """Return, by block and contestant, the calls of both programs compiled for an H200."""
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps([widths, tokens])],
        cwd=ROOT.parent,
        env={**kept, "XLA_FLAGS": OPTIONS, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"compiling for an H200 failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _compile_all(widths: list[int], tokens: int) -> dict[str, dict[str, Result]]:
    sharding = _on_h200()
    return {
        block: {
            name: {
                which: _compiled(f, shapes, sharding)
                for which, (f, shapes) in programs(name, sizes).items()
            }
            for name in layers.contestants()
        }
        for block, sizes in layers.blocks(widths, tokens).items()
    }


def _on_h200() -> Any:
    from jax.experimental import topologies

    device = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(encoding="utf-8"), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topo=device, mesh_shape=(1,), axis_names=("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _compiled(f: Any, shapes: Any, sharding: Any) -> Result:
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    return asdict(calls(jax.jit(f).lower(*placed).compile().as_text()))


if __name__ == "__main__":
    print(json.dumps(_compile_all(*json.loads(sys.argv[1]))))
