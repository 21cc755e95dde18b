"""Two processes with four devices each do what one does: values, losses, plans, checkpoints."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import uscale_jax as us
from tests import sharded_models, two_processes
from tests.checkpoint_models import load
from tests.sharded_worker import NO_COLLECTIVES

pytestmark = pytest.mark.usefixtures("standard_promotion")
EXACT = ("scaled", "scaled unlike", "grown", "uneven", "shrunk")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[list[str], Path]:
    """What the processes print, and the folder that they write into."""
    folder = tmp_path_factory.mktemp("processes")
    printed = two_processes.pair("sharded_worker", folder)
    for text in printed:
        if NO_COLLECTIVES in text:
            pytest.skip(f"two processes cannot exchange values here: {text}")
    return printed, folder


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same without a mesh, in this process."""
    with jax.numpy_dtype_promotion("standard"):
        return sharded_models.results()


def assert_close(got: Any, wanted: Any, *, exact: bool = False) -> None:
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    if exact:
        np.testing.assert_array_equal(got, wanted)
    else:
        size = np.max(np.abs(wanted), initial=1e-30)
        np.testing.assert_allclose(got / size, wanted / size, atol=2e-6)


def test_values_and_losses_are_those_of_one_process(both, alone):
    found = np.load(both[1] / "values.npz")
    pairs = jax.tree_util.tree_flatten_with_path(alone)[0]
    assert len(pairs) == len(found.files)
    for path, wanted in pairs:
        assert_close(found[jax.tree_util.keystr(path)], wanted, exact=path[0].key in EXACT)
    assert alone["losses grown"][-1] < alone["losses grown"][0] < alone["losses"][-1]


def test_the_plan_is_the_same_everywhere_and_NaN_is_refused(both):
    digest = hashlib.sha256(sharded_models.planned().to_json().encode()).hexdigest()
    for text in both[0]:
        assert f"plan {digest}\n" in text
        assert "refused the parameters hold NaN: up." in text
        assert "done\n" in text


def test_one_process_restores_what_two_saved(both, alone):
    pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")
    wanted = {"params": jax.tree.map(jax.numpy.asarray, alone["grown"])}
    wanted["opt_state"] = alone["state"]
    got = load(both[1] / "grown", wanted)
    jax.tree.map(lambda a, b: assert_close(a, b, exact=True), got["params"], wanted["params"])
    jax.tree.map(assert_close, got["opt_state"], wanted["opt_state"])


def test_one_process_resizes_what_two_saved(both, alone, tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")
    us.resize_checkpoint(both[1] / "small", tmp_path / "big", sharded_models.planned())
    wanted = {"params": jax.tree.map(jax.numpy.asarray, alone["grown"])}
    wanted["opt_state"] = jax.tree.map(jax.numpy.zeros_like, alone["state"])
    got = load(tmp_path / "big", wanted)
    jax.tree.map(lambda a, b: assert_close(a, b, exact=True), got, wanted)
