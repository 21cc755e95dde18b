"""What tests of resize_checkpoint run in other processes: ``python -m ... TASK ARGUMENTS``."""

import os
import resource
import signal
import sys
from pathlib import Path

import jax
import numpy as np

import uscale_jax as us
from tests.checkpoint_models import save
from uscale_jax import _checkpoint_write
from uscale_jax._checkpoint import resize_checkpoint
from uscale_jax._checkpoint_write import _Streaming


def chain(width: int, layers: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)  # noqa: E731
    inner = {f"w{i}": shape(width, width) for i in range(layers)}
    return {"in": shape(5, width), **inner, "out": shape(width, 3)}


def apply_chain(params, x):
    x = x @ params["in"]
    for name in sorted(params.keys() - {"in", "out"}):
        x = jax.numpy.tanh(x @ params[name])
    return x @ params["out"]


def peak() -> float:
    """The most memory this process has had, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def memory(folder: str, *counts: str) -> None:
    """Prints the peak after importing, and after resizing models of more and more equal layers."""
    print(peak())
    for layers in map(int, counts):
        small, big = chain(1024, layers), chain(2048, layers)
        x = jax.ShapeDtypeStruct((2, 5), np.float32)
        plan = us.plan(apply_chain, small, apply_chain, big, x)
        path = Path(folder, str(layers))
        resize_checkpoint(path, path.with_name(f"big {layers}"), plan)
        print(peak())


def models(folder: str, *counts: str) -> None:
    """Writes the checkpoints that ``memory`` reads."""
    for layers in map(int, counts):
        draw = lambda i, s: jax.random.normal(jax.random.key(i), s.shape, s.dtype)  # noqa: E731
        shapes = chain(1024, layers)
        save(Path(folder, str(layers)), {k: draw(i, s) for i, (k, s) in enumerate(shapes.items())})


def resize(moment: str, source: str, target: str, plan: str) -> None:
    """Resizes, and is killed at a moment (or by whoever reads that it begins)."""
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    rename, write = Path.rename, _Streaming._write
    written = []

    def write_some(self, batch):
        written.append(batch)
        return die() if len(written) > int(moment.split()[1]) else write(self, batch)

    def rename_target(path, to):
        if moment == "renaming" and to == Path(target):
            die()
        rename(path, to)
        if moment == "renamed" and to == Path(target):
            die()
        return to

    Path.rename = rename_target
    _checkpoint_write._BATCH = 2**10
    if moment.startswith("writing"):
        _Streaming._write = write_some
    read = us.Plan.from_json(Path(plan).read_text())
    print("begins", flush=True)
    resize_checkpoint(source, target, read)
    print("done", flush=True)


def one_of_two(number: str, port: str, source: str, target: str, plan: str) -> None:
    """One of two processes with four devices each, which resize together."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number), initialization_timeout=60)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(name, leaf):
        spec = ("model",) if "bias" in name else ("data", "model") if "up" in name else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    read = us.Plan.from_json(Path(plan).read_text())
    resize_checkpoint(source, target, read, shardings=sharding)
    try:
        resize_checkpoint(source, target, read)
    except FileExistsError:
        print("done", flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
