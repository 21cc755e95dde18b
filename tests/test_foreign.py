"""Models of other packages, as far as these are installed: free sizes grow, others are refused."""

import functools
from collections.abc import Iterator

import jax
import pytest

import uscale_jax as us
from benchmarks.foreign.registry import foreign_models
from tests import resizing
from tests.resizing import Prepared
from uscale_jax.trace.tracing import Model

MODELS, MISSING = foreign_models()

# Many compute in float32 inside, whatever comes in (attention scores and norms, mostly), so this
# is for all; what a model's error really is stands in the report (``--junitxml``).
FLOAT32 = 2e-6


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def as_users_run_them(strict_promotion: None) -> Iterator[None]:
    promotes = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with promotes[0], promotes[1], jax.enable_x64(False):  # some packages switch it on
        yield


@functools.cache
def prepared(name: str) -> Prepared:
    built = MODELS[name].build(MODELS[name].sizes)
    return Prepared(Model(built.apply, built.params), built.inputs)


def big_model(name: str, factors: dict[str, int]) -> Model:
    built = MODELS[name].build(resizing.resized(MODELS[name].sizes, factors))
    return Model(built.apply, built.params)


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, model in MODELS.items() for size in model.free]
)
def test_a_free_size_grows_with_the_function_kept(name, size, record_property):
    error = resizing.growth_error(prepared(name), big_model(name, {size: 2}))
    record_property("error", error)
    assert error <= FLOAT32


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, model in MODELS.items() for size in model.fixed]
)
def test_a_fixed_size_is_refused_for_its_reason(name, size):
    model = MODELS[name]
    with pytest.raises(ValueError, match=model.fixed[size]):
        us.trace_exponents(*prepared(name).given, big=tuple(big_model(name, {size: 2})))
