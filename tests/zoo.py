"""The models of the benchmarks' zoo, prepared once for all tests that run them."""

import functools

from benchmarks.zoo import registry
from tests import resizing
from tests.resizing import Prepared
from uscale_jax.trace.tracing import Model

ZOO = registry.models()

EXACT = 1e-12
# ``jax.nn.dot_product_attention`` computes its softmax in float32 whatever comes in.
LOOSE = dict.fromkeys(["nnx transformer"], 1e-6)


@functools.cache
def prepared(name: str) -> Prepared:
    built = ZOO[name].build(ZOO[name].sizes)
    return Prepared(Model(built.apply, built.params), built.inputs)


def big_model(name: str, factors: dict[str, int]) -> Model:
    built = ZOO[name].build(resizing.resized(ZOO[name].sizes, factors))
    return Model(built.apply, built.params)
