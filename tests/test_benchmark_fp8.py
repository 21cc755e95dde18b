"""The FP8 benchmark and its unit-scaled Transformer: scales, FLOPs, claims, and a tiny run."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import plots
from benchmarks.models import transformer_linen, transformer_unit
from benchmarks.models.functional import TransformerConfig
from benchmarks.registry import Options
from benchmarks.suite import _fp8_products as products
from benchmarks.suite import _fp8_report as report
from benchmarks.suite import _fp8_train as training
from benchmarks.suite import fp8
from benchmarks.suite._fp8_train import DOTS, Setting, Variant
from tests import test_benchmark_grow as growing
from uscale_jax import numerics as un

corpus, Silent = growing.corpus, growing.Silent

# No two sizes are alike, nor is one the product of others.
SIZES = TransformerConfig(vocab=256, hidden=24, layers=2, heads=6, kv_heads=3, head_dim=10, mlp=52)
TINY = Setting(
    SIZES,
    steps=10,
    batch=3,
    seq=11,
    held_out=2,
    seeds=3,
    unit_rate=0.5,
    standard_rate=0.01,
    standard_float8_rate=0.001,
)
UNIT, STANDARD = Variant("unit-scaled", "float8"), Variant("standard", "float8")


def windows(setting: Setting, seed: int = 0) -> jax.Array:
    shape = setting.batch, setting.seq + 1
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.int32)


def initial(variant: Variant, sizes: TransformerConfig):
    return jax.jit(training.model(variant, sizes).init)(jax.random.key(0))


# The unit-scaled Transformer


WIDE = replace(TINY, sizes=replace(SIZES, hidden=120, head_dim=26, mlp=330), batch=8, seq=48)


@pytest.fixture(scope="module")
def looked_at() -> dict[str, dict]:
    """What the linear layers of an untrained model read and get back, of both kinds."""
    return {
        variant.model: products.census(variant, WIDE)(initial(variant, WIDE.sizes), windows(WIDE))
        for variant in (UNIT, STANDARD)
    }


def test_every_product_starts_near_scale_one(looked_at):
    """Activations to a factor of 3, weights to 5 %, gradients of queries and keys below one."""
    for name, kinds in looked_at["unit-scaled"].items():
        assert 1 / 3 < kinds["activations"]["rms"] < 3, name
        assert kinds["weights"]["rms"] == pytest.approx(1, abs=0.05), name
        low = 1 / 32 if name.endswith(("query", "key")) else 1 / 4
        assert low < kinds["cotangents"]["rms"] < 8, name
        assert max(kind["flushed"] for kind in kinds.values()) < 0.02, name
    assert len(looked_at["unit-scaled"]) == 14


def test_the_standard_one_does_not(looked_at):
    """Its gradients are those of a mean: of scale 1/(tokens) and less."""
    for name, kinds in looked_at["standard"].items():
        assert kinds["cotangents"]["rms"] < 1e-3, name
        assert kinds["weights"]["rms"] < 0.15, name
    flushed = [kinds["cotangents"]["flushed"] for kinds in looked_at["standard"].values()]
    assert max(flushed) > 0.1


def test_gradients_of_parameters_start_near_scale_one():
    found = training.model(Variant("unit-scaled", "float32"), WIDE.sizes)
    params, batch = initial(UNIT, WIDE.sizes), windows(WIDE)
    loss, grads = jax.jit(jax.value_and_grad(training.batch_loss, 1), static_argnums=0)(
        found, params, batch
    )
    assert float(loss) == pytest.approx(math.log(256), rel=0.02)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        rms = float(jnp.sqrt(jnp.mean(jnp.square(leaf))))
        low = 1 / 32 if path[-2].key in ("query", "key") else 1 / 4
        assert low < rms < 8, jax.tree_util.keystr(path)


def test_unit_scaled_gradients_are_true_but_for_their_size():
    config = transformer_unit.UnitConfig(SIZES)
    module = transformer_unit.UnitTransformer(config)
    tokens = windows(TINY)[:, :-1]
    params = module.init(jax.random.key(0), tokens)
    found = un.verify_gradients(jax.jit(module.apply), params, tokens, tolerance=1e-4)
    assert len(found) == 2 * 7 + 2


def test_multipliers_do_what_they_say():
    """Each changes the loss; that of the loss is a temperature."""
    tokens = windows(TINY)

    def logits(multipliers):
        config = transformer_unit.UnitConfig(SIZES, multipliers)
        module = transformer_unit.UnitTransformer(config)
        params = module.init(jax.random.key(0), tokens[:, :-1])
        return config, jax.jit(module.apply)(params, tokens[:, :-1])

    config, plain = logits(transformer_unit.Multipliers())
    for name in ("ffn_act", "attn_softmax", "residual", "residual_attn_ratio"):
        _, other = logits(transformer_unit.Multipliers(**{name: 3.0}))
        assert float(jnp.max(jnp.abs(other - plain))) > 0.01, name
    hot, same = logits(transformer_unit.Multipliers(loss_softmax=3.0))
    np.testing.assert_array_equal(same, plain)
    targets = tokens[:, 1:]
    found = [transformer_unit.loss(c, z, targets) for c, z in ((hot, plain), (config, 3 * plain))]
    assert found[0] == pytest.approx(float(found[1]), rel=1e-6)


def test_learning_rates_are_those_of_u_mup():
    config = transformer_unit.UnitConfig(SIZES)
    params = jax.eval_shape(
        transformer_unit.UnitTransformer(config).init, jax.random.key(0), windows(TINY)
    )
    divisors = transformer_unit.rate_divisors(config, params)["params"]
    assert divisors["embed"]["embedding"] == pytest.approx(24**0.5)
    assert divisors["readout"]["kernel"] == 1
    block = {
        name: leaf["kernel"]
        for part in ("attention", "mlp")
        for name, leaf in divisors["blocks_1"][part].items()
    }
    fan_in = {"query": 24, "key": 24, "value": 24, "out": 60, "gate": 24, "up": 24, "down": 52}
    assert block == pytest.approx({name: (2 * n) ** 0.5 for name, n in fan_in.items()})


def test_both_parametrizations_have_the_same_linear_layers(standard_promotion):
    unit, standard = (jax.eval_shape(lambda v=v: initial(v, SIZES)) for v in (UNIT, STANDARD))
    shapes = [
        {jax.tree_util.keystr(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (unit, standard)
    ]
    norms = {name for name in shapes[1] if "norm" in name}
    assert shapes[0] == {k: v for k, v in shapes[1].items() if k not in norms}


def test_the_standard_transformer_is_unchanged_by_its_new_options():
    tokens = windows(TINY)[:, :-1]
    models = [
        transformer_linen.Transformer(SIZES, *how)
        for how in ((), (jax.lax.dot_general, jnp.float32))
    ]
    params = models[0].init(jax.random.key(0), tokens)
    plain, same = (jax.jit(model.apply)(params, tokens) for model in models)
    np.testing.assert_allclose(plain, same, rtol=1e-6, atol=1e-6)


# Products


def test_flops_are_counted_by_role_and_format(standard_promotion):
    found = {v: products.flops_by_role(v, TINY) for v in DOTS if "32" not in v.products}
    for counted in found.values():
        assert counted["flops"] == counted["formula"]
    assert report.share(found[UNIT], "hidden") == 1
    assert report.share(found[UNIT], "readout", "attention") == 0
    by_astype = found[Variant("standard", training.BY_ASTYPE)]
    assert report.share(by_astype, "hidden") == pytest.approx(1 / 3)
    assert sum(found[Variant("standard", "bfloat16")]["float8"].values()) == 0


def test_a_census_is_of_what_products_read(standard_promotion):
    """Against the tensors themselves, and weights that float8 flushes."""
    variant = Variant("standard", "bfloat16")
    params = initial(variant, SIZES)
    kernels = params["params"]["blocks_1"]["mlp"]
    kernels["up"]["kernel"] = kernels["up"]["kernel"].at[:, :13].set(1e-4)
    seen = products.census(variant, TINY)(params, windows(TINY))
    assert [*seen] == [f"{layer}/{name}" for layer in range(2) for name in products.PRODUCTS]
    for name in ("gate", "up", "down"):
        wanted = np.sqrt(np.mean(np.square(np.asarray(kernels[name]["kernel"]))))
        assert seen[f"1/{name}"]["weights"]["rms"] == pytest.approx(wanted, rel=1e-3)
    flushed = seen["1/up"]["weights"]["flushed"], seen["1/gate"]["weights"]["flushed"]
    assert flushed[0] == pytest.approx(13 / 52 + 39 / 52 * flushed[1], abs=0.01)


def test_cotangents_of_a_census_are_gradients_of_results():
    """In the last layer's ``down`` they are those of the stream before the last norm."""
    variant = Variant("unit-scaled", "bfloat16")
    params, batch = initial(variant, SIZES), windows(TINY)
    seen = products.census(variant, TINY)(params, batch)
    found = training.model(Variant("unit-scaled", "float32"), SIZES)
    grads = jax.grad(lambda p: training.batch_loss(found, p, batch))(params)["params"]
    down = grads["blocks_1"]["mlp"]["down"]["kernel"]
    kinds = seen["1/down"]
    # Of independent activations and cotangents, the unit-scaled gradient has the scale of both.
    product = kinds["activations"]["rms"] * kinds["cotangents"]["rms"]
    assert float(jnp.sqrt(jnp.mean(jnp.square(down)))) == pytest.approx(product, rel=0.5)


# Reports


def run(variant: Variant, seed: int, last: float | None) -> dict:
    return {
        "model": variant.model,
        "products": variant.products,
        "seed": seed,
        "steps": [0, 5, 10],
        "bits": [8.0, 4.0, last],
        "seconds": 1.0,
    }


def _numbers(flushed: float) -> dict:
    return {"rms": 0.5, "largest": 0.1, "flushed": flushed, "zero": flushed + 0.25}


def look(weights: float, cotangents: float) -> dict:
    kinds = {"weights": weights, "activations": 0.001, "cotangents": cotangents}
    one = {kind: _numbers(x) for kind, x in kinds.items()}
    return {f"{layer}/{name}": one for layer in range(2) for name in products.PRODUCTS}


def given(last: dict[str, tuple[float, float]]) -> dict:
    losses = {
        Variant("unit-scaled", "float32"): (3.0, 3.2),
        Variant("unit-scaled", "bfloat16"): (3.01, 3.19),
        UNIT: (3.05, 3.16),
        Variant("standard", "bfloat16"): (3.1, 3.3),
        STANDARD: (4.1, 4.2),
        Variant("standard", training.OWN_RATE): (3.5, 3.6),
        Variant("standard", training.BY_ASTYPE): (4.5, 4.6),
        Variant("standard", training.BY_HAND): (3.1, 3.31),
    }
    counted = {"flops": {"hidden": 6, "readout": 2, "attention": 2}}
    narrow = {"hidden": 6, "readout": 0, "attention": 0}
    counts = {"products": {UNIT.name: {**counted, "float8": narrow, "formula": counted["flops"]}}}
    runs = {}
    for variant, bits in {**losses, **last}.items():
        for seed, each in enumerate(bits, 1):
            runs[f"{variant.name}, {seed}"] = run(variant, seed, each)
    for variant, lost in ((UNIT, 0.001), (STANDARD, 0.5)):
        ends = {"first": look(0.001, lost), "last": look(0.001, lost)}
        runs[f"{variant.name}, 1"]["census"] = ends
    return {**counts, **runs}


def claims(results: dict) -> list[bool]:
    return [claim.passed for claim in report.report(results).claims]


def test_claims_follow_from_results():
    assert all(claims(given({})))
    assert claims(given({UNIT: (3.05, 3.2)}))[0] is False  # +0.8 %
    assert claims(given({UNIT: (3.0, 3.13)}))[0] is False  # −1.1 %
    assert claims(given({STANDARD: (3.1, 3.3)}))[1] is False
    assert claims(given({STANDARD: (None, 3.3)}))[1] is True  # not finite
    assert claims(given({Variant("standard", training.OWN_RATE): (3.2, 3.4)}))[2] is False
    assert claims(given({Variant("standard", training.BY_HAND): (3.2, 3.4)}))[4] is False
    half = given({})
    half["products"][UNIT.name]["float8"]["hidden"] = 3
    assert claims(half)[5] is False
    wrong = given({})
    wrong["products"][UNIT.name]["formula"] = {"hidden": 5, "readout": 2, "attention": 2}
    assert claims(wrong)[6] is False
    flushed = given({})
    flushed[f"{UNIT.name}, 1"]["census"]["last"] = look(0.001, 0.03)
    assert claims(flushed)[7] is False


def test_losses_are_compared_on_the_seeds_of_both():
    results = given({})
    results["more"] = run(UNIT, 3, 9.0)
    runs = report.runs_of(results)
    assert len(runs[UNIT]) == 3
    above, each = report.against(runs, UNIT, Variant("unit-scaled", "bfloat16"))
    assert above == pytest.approx(6.21 / 6.2 - 1)
    assert each == pytest.approx([3.05 / 3.01 - 1, 3.16 / 3.19 - 1])


def test_reports_have_every_variant_and_are_drawn():
    found = report.report(given({}))
    losses, shares, flushed = found.tables
    assert [row[0] for row in losses.rows] == [variant.name for variant in DOTS]
    assert losses.rows[2][-1] == "+0.16%"
    assert found.notes[0].endswith("+0.33%, -0.31%")
    assert shares.rows == ((UNIT.name, "100.0%", "75.0%", "60.0%"),)
    assert len(flushed.rows) == 6
    assert flushed.rows[-1][2:5] == ("0.5–0.5", "50.0% (50%)", "75.0%")
    for plot in found.plots:
        assert plots.draw(plot).startswith(b"\x89PNG")


# Runs


def test_a_tiny_benchmark_runs(tmp_path, corpus, monkeypatch, standard_promotion):
    monkeypatch.setattr(fp8, "QUICK", TINY)
    options = Options(full=False, seed=0, out=tmp_path, data=corpus)
    chosen = (UNIT, STANDARD, Variant("standard", training.BY_ASTYPE))
    names = {f"{variant.name}, seed 1" for variant in chosen}
    cases = {case.name: case for case in fp8.cases(options)}
    assert len(cases) == 1 + 2 * 3 + 6 * 2  # of FLOPs, of what is compared, of others
    results = {
        name: json.loads(json.dumps(cases[name].run(options, Silent()))) for name in sorted(names)
    }
    for result in results.values():
        assert len(result["bits"]) == len(result["steps"]) == training.LOOKS + 1
        assert result["steps"][-1] == TINY.steps
        assert all(map(math.isfinite, result["bits"]))
    assert results[f"{UNIT.name}, seed 1"]["bits"][0] == pytest.approx(8, abs=0.1)
    last = {name: result["bits"][-1] for name, result in results.items()}
    assert last[f"{UNIT.name}, seed 1"] < 7.5
    assert {name for name, result in results.items() if "census" in result} == {
        f"{UNIT.name}, seed 1",
        f"{STANDARD.name}, seed 1",
    }
    training.program.cache_clear()
