"""One model grown in a process of its own: ``python -m benchmarks.suite._resize_grow ...``.

Its peak memory is then that of this growth and of nothing before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import uscale_jax as us
from benchmarks.models.functional import TransformerConfig
from benchmarks.models.transformer_linen import Transformer
from benchmarks.registry import Result
from benchmarks.timing import measure

ROOT = Path(__file__).resolve().parents[2]
COPY, GROW, PEER = "copy of the output", "us.grow", "ml-hypercloning"
PEER_NEEDS = ("hypercloning", "hf_olmo", "torch", "transformers")
HEAD = 64
VOCAB = 16_000


@dataclass(frozen=True)
class Size:
    """A Llama-like decoder that becomes twice as wide; parameters in millions when grown."""

    millions: int
    layers: int
    hidden: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Return what it is called."""
        return f"{self.millions} M parameters, {self.dtype}"

    def config(self, widening: int) -> TransformerConfig:
        """Return its sizes, as they are or wider."""
        heads = self.hidden // HEAD
        return TransformerConfig(
            vocab=VOCAB,
            hidden=self.hidden * widening,
            layers=self.layers,
            heads=heads * widening,
            kv_heads=max(1, heads // 2) * widening,
            head_dim=HEAD,
            mlp=self.hidden * 8 // 3 * widening,
        )


def model(size: Size, widening: int) -> tuple[Callable[..., Any], Any]:
    """Return a decoder and its parameter shapes."""
    module = Transformer(size.config(widening))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), np.zeros((1, 3), np.int32)))
    cast = lambda s: jax.ShapeDtypeStruct(s.shape, size.dtype)  # noqa: E731
    return module.apply, jax.tree.map(cast, shapes)


def count(shapes: Any) -> int:
    """Return how many parameters there are."""
    return sum(x.size for x in jax.tree.leaves(shapes))


def drawn(shapes: Any, seed: int) -> Any:
    """Return normal numbers."""
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    return jax.tree.unflatten(
        treedef, [draw(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    )


def used_bytes(what: str) -> int:
    """Return the memory that this process has ("VmRSS"), or the most it had ("VmHWM")."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the most since the process began, which says less
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    [line] = [line for line in status.read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let the most that was used count from now on, where the system can do that.

    What was freed is given back first: else it would be used again, and seem to cost nothing.
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def grown(size: Size, budget_s: float, seed: int) -> Result:
    """Measure memory on the first call, times on later ones."""
    (small, shapes), (big, wide) = model(size, 1), model(size, 2)
    plan = us.plan(small, shapes, big, wide, jax.ShapeDtypeStruct((3, 17), np.int32))
    params = jax.block_until_ready(drawn(shapes, seed))
    grow = partial(us.grow, params, plan, verify=False)
    forget_peak()
    before = used_bytes("VmRSS")
    first = jax.block_until_ready(grow())
    peak = used_bytes("VmHWM") - before
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    times = measure({COPY: lambda: copy(first), GROW: grow}, 15, budget_s, min_sample_s=0.02)
    out = sum(x.nbytes for x in jax.tree.leaves(first))
    largest = max(x.nbytes for x in jax.tree.leaves(first))
    return {
        "parameters": [count(shapes), count(wide)],
        "output_bytes": out,
        "largest_leaf_bytes": largest,
        "peak_bytes": peak,
        "timings": {name: asdict(timing) for name, timing in times.items()},
        "backend": jax.default_backend(),
    }


def peer_missing() -> list[str]:
    """Return what the peer needs and is not installed."""
    return [name for name in PEER_NEEDS if find_spec(name) is None]


def against_peer(size: Size, budget_s: float, seed: int) -> Result:
    """Measure ml-hypercloning on the Llama of the same sizes, and us.grow beside it."""
    import torch  # type: ignore[import-not-found,unused-ignore]
    from hypercloning import cloneModel  # type: ignore[import-not-found,unused-ignore]
    from transformers import (  # type: ignore[import-not-found,unused-ignore]
        LlamaConfig,
        LlamaForCausalLM,
    )
    from transformers.models.llama.modeling_llama import (  # type: ignore[import-not-found,unused-ignore]
        LlamaAttention,
    )

    # Since transformers 4.48 sizes are in the configuration only, where the peer does not look.
    names = {"num_heads": "num_attention_heads", "num_key_value_heads": "num_key_value_heads"}
    for old, new in names.items():
        if not hasattr(LlamaAttention, old):
            setattr(LlamaAttention, old, property(partial(_of_config, name=new)))
    torch.manual_seed(seed)
    own = size.config(1)
    config = LlamaConfig(
        vocab_size=own.vocab,
        hidden_size=own.hidden,
        num_hidden_layers=own.layers,
        num_attention_heads=own.heads,
        num_key_value_heads=own.kv_heads,
        intermediate_size=own.mlp,
        tie_word_embeddings=False,
    )
    source = LlamaForCausalLM(config)
    (small, shapes), (big, wide) = model(size, 1), model(size, 2)
    plan = us.plan(small, shapes, big, wide, jax.ShapeDtypeStruct((3, 17), np.int32))
    params = drawn(shapes, seed)
    clone = partial(cloneModel, source, embedding_dim_multiplier=2, up_project_multiplier=2)
    contestants = {PEER: clone, GROW: partial(us.grow, params, plan, verify=False)}
    times = measure(contestants, 5, budget_s, min_sample_s=0.0)
    made = sum(x.numel() for x in clone().parameters())
    return {
        "parameters": [count(shapes), count(wide)],
        "peer_parameters": made,
        "timings": {name: asdict(timing) for name, timing in times.items()},
    }


def _of_config(module: Any, name: str) -> Any:
    return getattr(module.config, name)


TASKS = {"grow": grown, "peer": against_peer}


def in_own_process(task: str, size: Size, budget_s: float, seed: int) -> Result:
    """Return what the task returns, done by a process of its own."""
    given = json.dumps({"size": asdict(size), "budget_s": budget_s, "seed": seed})
    command = [sys.executable, "-m", "benchmarks.suite._resize_grow", task, given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{task} of {size.name} failed.\n{done.stderr[-2000:]}")
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


def main(task: str, given: str) -> None:
    """Print the result as JSON."""
    options = json.loads(given)
    result = TASKS[task](Size(**options["size"]), options["budget_s"], options["seed"])
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
