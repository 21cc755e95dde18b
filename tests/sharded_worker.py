"""What tests run in two processes together: ``python -m tests.sharded_worker NUMBER PORT FOLDER``.

Everything of ``tests.sharded_models`` over a mesh of the devices of both, and two checkpoints.
"""

import hashlib
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import optax

import uscale_jax as us
from tests import sharded_models
from tests.two_processes import join
from uscale_jax import _jax

NO_COLLECTIVES = "no collectives"


def main(number: str, port: str, folder: str) -> None:
    """Prints the digest of the plan, and what specs are not kept; writes values."""
    warnings.simplefilter("error")
    try:
        join(number, port)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        print(f"{NO_COLLECTIVES}: {error}")
        return
    plan = sharded_models.planned()
    print("plan", hashlib.sha256(plan.to_json().encode()).hexdigest())
    mesh = sharded_models.mesh()
    place = lambda tree: sharded_models.onto(mesh, tree)  # noqa: E731
    found = sharded_models.results(place)
    kept = sharded_models.specs(place(sharded_models.params_of(*sharded_models.BIG)))
    for name in ("scaled unlike", "grown", "noise", "shrunk", "unit_scale_lr", "scale_optimizer"):
        assert sharded_models.specs(found[name]) == kept, name
    small = place(sharded_models.params_of(*sharded_models.SMALL))
    try:
        us.grow({**small, "up": small["up"] * np.float32("nan")}, plan)
    except ValueError as error:
        print("refused", str(error).splitlines()[0])
    values = jax.tree_util.tree_flatten_with_path(_jax.fetched(found))[0]
    if number == "0":
        named = {jax.tree_util.keystr(path): value for path, value in values}
        np.savez(Path(folder, "values.npz"), **named)
    saved(Path(folder), place, found)
    print("done", flush=True)
    jax.distributed.shutdown()


def saved(folder: Path, place: sharded_models.Place, found: dict) -> None:
    """Checkpoints of the small model and of the grown one, where Orbax is installed."""
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError:
        return
    small = place(sharded_models.params_of(*sharded_models.SMALL))
    weights = {name: x for name, x in small.items() if name != "steps"}
    state = jax.tree.map(  # what init makes without parameters, a count, is in every process
        lambda x: place(x) if x.ndim == 0 else x, optax.adam(sharded_models.LR).init(weights)
    )
    trees = {
        "small": {"params": small, "opt_state": state},
        "grown": {"params": found["grown"], "opt_state": found["state"]},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Orbax
        for name, tree in trees.items():
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder / name, tree)


if __name__ == "__main__":
    main(*sys.argv[1:])
