"""Strict JAX for every test: 8 CPU devices, no implicit promotion of dtypes or ranks."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Programs of tests run once or twice: compiling them well takes longer than running them.  XLA
# does not start with an option that it does not know.
_QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib").startswith(("0.9.", "0.10.")):
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_QUICK))

import jax

jax.config.update("jax_num_cpu_devices", 8)

from collections.abc import Iterator

import pytest
from hypothesis import settings

# Compilation makes the first example of a property slow; a deadline would measure that.
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """For every test; doctests run as a user's session would."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def standard_promotion(strict_promotion: None) -> Iterator[None]:
    """For tests that run optax's own optimizers: Adam's ``b1**count`` is float**int in them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Compiled programs of thousands of tests would fill the memory."""
    yield
    jax.clear_caches()
