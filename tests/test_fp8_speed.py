"""The benchmark of float8 layers: contestants, what programs consist of, what is shown."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.registry import Options, discover
from benchmarks.suite import _fp8_contestants as layers
from benchmarks.suite import _fp8_lowering as lowering
from benchmarks.suite import fp8_speed
from benchmarks.suite._fp8_contestants import (
    BFLOAT16,
    EXACT,
    FLAX,
    OWN,
    PEERS,
    QWIX,
    QWIX_FIXED,
    STATIC,
    UNIT,
    Sizes,
)

pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed")  # qwix's own
OPTIONS = Options(full=False, seed=0, out=Path("unused"))
LAYER, MLP = Sizes(40, 48, 80), Sizes(40, 48, 80, 112)
NAMES = [BFLOAT16, *OWN, *PEERS]


class Silent:
    """Progress that is not shown."""

    def start(self, total: int, what: str) -> None:
        pass

    def advance(self, units: int = 1, note: str = "") -> None:
        pass


@pytest.fixture
def promotes(standard_promotion):
    """Flax's op and qwix multiply by scales of other dtypes and ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def needs_qwix(name):
    if "qwix" in name and not layers.has_qwix():
        pytest.skip(fp8_speed.NO_QWIX)


# Contestants


@pytest.mark.usefixtures("promotes")
@pytest.mark.parametrize("name", NAMES)
def test_layers_are_as_exact_as_float8_is(name):
    needs_qwix(name)
    found = layers.errors(name, LAYER, 0)
    assert set(found) == {"output", "input", "kernel"}
    if name == BFLOAT16:
        assert max(found.values()) < 0.005
    else:
        # Two operands of three bits; of gradients, one of two: uniform errors of half a last bit.
        assert 0.025 < found["output"] < 0.045
        assert 0.045 < found["input"] < fp8_speed.ROUNDING
        assert 0.045 < found["kernel"] < fp8_speed.ROUNDING


@pytest.mark.usefixtures("promotes")
def test_a_wrong_gradient_is_noticed(monkeypatch):
    step = layers.step

    def wrong(model):
        def both(*arguments):
            y, gradients, dx = step(model)(*arguments)
            return y, gradients, dx.at[..., 0].multiply(2.0)

        return both

    monkeypatch.setattr(layers, "step", wrong)
    assert layers.errors(STATIC, LAYER, 0)["input"] > fp8_speed.ROUNDING


@pytest.mark.usefixtures("promotes")
@pytest.mark.parametrize("name", NAMES)
def test_an_mlp_is_the_function_of_its_kernels_in_bfloat16(name):
    needs_qwix(name)
    model = layers.contestants()[name](MLP)
    variables, x, g = layers.arguments(model, MLP, 1)
    y, gradients, dx = jax.jit(layers.step(model))(variables, x, g)
    assert y.shape == g.shape == (layers.BATCH, 5, 80)
    assert dx.shape == x.shape
    kernels = variables["params"]
    assert {name: each["kernel"].shape for name, each in kernels.items()} == MLP.layers
    assert jax.tree.structure(gradients["params"]) == jax.tree.structure(kernels)
    h = np.asarray(x, np.float64)
    for i, layer in enumerate(("up", "down")):
        w = np.asarray(kernels[layer]["kernel"], np.float64)
        h = (np.asarray(jax.nn.gelu(h), np.float64) if i else h) @ w
        h /= w.shape[0] ** 0.5 if name in OWN[1:] else 1
    y = np.asarray(y, np.float64)
    similar = np.vdot(h, y) / np.linalg.norm(h) / np.linalg.norm(y)
    # Rounded factors move what GELU sees, by up to a root of two.
    assert similar > (0.95 if name == UNIT else 0.99)


def test_floating_point_operations_are_those_of_three_products():
    assert LAYER.flops == 3 * 2 * 40 * 48 * 80
    assert MLP.flops == 3 * 2 * 40 * (48 * 112 + 112 * 80)


# Programs


HLO = """HloModule jit_both

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %neg = f32[4]{0} negate(%p)
}

%command_buffer (p.1: f8e4m3fn[16,64]) -> bf16[16,32] {
  %p.1 = f8e4m3fn[16,64]{1,0} parameter(0)
  %w.1 = f8e4m3fn[32,64]{1,0} parameter(1)
  %one = f32[] constant(1)
  %cublas-gemm.1 = (bf16[16,32]{1,0}, s8[33554432]{0}) custom-call(%p.1, %w.1, %one, %one), \
custom_call_target="__cublas$lt$matmul$f8", backend_config={"alpha_real":1}
  ROOT %y.1 = bf16[16,32]{1,0} get-tuple-element(%cublas-gemm.1), index=0
}

ENTRY %main (x: bf16[16,64], w: f8e4m3fn[32,64]) -> (bf16[16,32], bf16[16,32]) {
  %x = bf16[16,64]{1,0} parameter(0)
  %w = f8e4m3fn[32,64]{1,0} parameter(1)
  %cast = (f8e4m3fn[16,64]{1,0}, f8e4m3fn[64,16]{1,0}) fusion(%x), kind=kInput, calls=%fused
  %x8 = f8e4m3fn[16,64]{1,0} get-tuple-element(%cast), index=0
  %call = bf16[16,32]{1,0} call(%x8, %w), to_apply=%command_buffer
  %gemm = (bf16[16,32]{1,0}, s8[1024]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  %triton = bf16[16,32]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm_fusion, \
backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %copy = f32[16,32]{0,1} copy(%call)
  ROOT %tuple = (bf16[16,32]{1,0}, f32[16,32]{0,1}) tuple(%call, %copy)
}
"""


def test_products_and_other_kernels_of_a_program_are_counted():
    found = lowering.calls(HLO)
    assert (found.f8, found.products, found.others) == (1, 3, 2)
    cast, copy = 16 * 64 * (2 + 1 + 1), 16 * 32 * (2 + 4)
    assert found.moved == cast + copy
    with pytest.raises(ValueError, match="no entry"):
        lowering.calls("HloModule empty")


def test_a_program_of_this_machine_has_products_too():
    f = jax.jit(lambda x: jnp.sin(x) @ jnp.ones((64, 32)))
    text = f.lower(jnp.ones((16, 64))).compile().as_text()
    assert lowering.calls(text).products == 0  # none by a GPU's library
    assert lowering.calls(text).others >= 1


@pytest.fixture(scope="module")
def programs():
    if not lowering.has_plugin():
        pytest.skip(fp8_speed.NO_PROGRAMS)
    return lowering.compiled((2048,), 4096)


def test_all_products_are_of_float8_and_bfloat16_has_none(programs):
    assert list(programs) == ["linear 2048", "MLP 2048"]
    for each in programs.values():
        assert set(each) == set(layers.contestants())
        for name, both in each.items():
            for found in both.values():
                assert found["f8"] == (0 if name == BFLOAT16 else found["products"])
            assert both["both"]["products"] == 3 * both["forward"]["products"]


# The benchmark


@pytest.mark.usefixtures("promotes")
@pytest.mark.parametrize("block", [LAYER, MLP], ids=["layer", "MLP"])
def test_steps_are_timed(block):
    """That the code runs; on a CPU the times say nothing."""
    result = json.loads(json.dumps(fp8_speed._timed(block, OPTIONS, Silent(), repeats=1)))
    names = set(layers.contestants())
    assert set(result["timings"]) == set(result["calls"]) == set(result["compile"]) == names
    assert result["timings"][BFLOAT16]["ratio"] == 1
    assert all(timing["best_s"] > 0 for timing in result["timings"].values())


@pytest.mark.usefixtures("promotes")
def test_without_a_gpu_and_its_compiler_only_errors_are_told(monkeypatch):
    monkeypatch.setattr(lowering, "has_plugin", lambda: False)
    benchmark = discover()["fp8_speed"]
    (case,) = benchmark.cases(OPTIONS)
    report = benchmark.report({case.name: case.run(OPTIONS, Silent())}, OPTIONS)
    assert fp8_speed.NO_TIMES in report.notes
    assert fp8_speed.NO_PROGRAMS in report.notes
    assert (fp8_speed.NO_QWIX in report.notes) == (not layers.has_qwix())
    assert len(report.tables) == len(report.claims) == 1
    assert report.passed


def test_with_the_compiler_programs_are_told_and_with_a_gpu_times(monkeypatch):
    monkeypatch.setattr(lowering, "has_plugin", lambda: True)
    names = [case.name for case in fp8_speed.cases(OPTIONS)]
    assert names == [fp8_speed.NUMERICS, fp8_speed.COMPILED]
    monkeypatch.setattr(fp8_speed, "has_gpu", lambda: True)
    names = [case.name for case in fp8_speed.cases(OPTIONS)]
    assert names[1:] == ["linear 1024", "MLP 1024", "linear 2048", "MLP 2048"]
    full = Options(full=True, seed=0, out=Path("unused"))
    assert len(fp8_speed.cases(full)) == 7


@pytest.mark.parametrize(
    ("platform", "capability", "wanted"),
    [("gpu", "9.0", True), ("gpu", "8.9", True), ("gpu", "8.0", False), ("cpu", None, False)],
)
def test_a_gpu_counts_if_it_has_float8_units(monkeypatch, platform, capability, wanted):
    class Device:
        compute_capability = capability

    Device.platform = platform
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert fp8_speed.has_gpu() == wanted


def _calls(f8=3, others=4, moved=1000):
    return {"f8": f8, "products": 3, "others": others, "moved": moved}


def _timing(ratio):
    return {"best_s": 0.01 * ratio, "ratio": ratio}


def _results(own=0.7, others=4):
    ratios = {BFLOAT16: 1.0, STATIC: own + 0.05, UNIT: own, EXACT: 0.9}
    ratios |= {FLAX: 0.85, QWIX: 0.95, QWIX_FIXED: 0.75}
    calls = {name: _calls(others=others) for name in ratios}
    calls |= {name: _calls(others=6, moved=2000) for name in PEERS}
    timings = {name: _timing(ratio) for name, ratio in ratios.items()}
    compiled = dict.fromkeys(ratios, 1.5)
    step = {"tokens": 8192, "flops": int(1e12), "compile": compiled}
    errors = {name: {"output": 0.03, "input": 0.05, "kernel": 0.05} for name in ratios}
    return {
        fp8_speed.NUMERICS: {"errors": errors, "versions": {"flax": "1", "qwix": "2"}},
        "linear 4096": {**step, "calls": calls, "timings": timings},
    }


def test_tables_and_claims_of_times():
    report = fp8_speed.report(_results(), OPTIONS)
    times, errors = report.tables
    row = (f"linear 4096: {UNIT}", "0.700", "1.43", "1429", "3 of 3", "4", "0", "1.5")
    assert row in times.rows
    assert errors.rows[0] == (BFLOAT16, "0.0300", "0.0500", "0.0500")
    assert report.passed
    texts = [claim.text for claim in report.claims]
    assert any("1.3× as fast" in text for text in texts)
    assert fp8_speed.NO_TIMES not in report.notes


def test_what_is_slower_or_less_exact_fails_the_claims():
    results = _results(own=0.8, others=7)
    results["linear 4096"]["calls"][UNIT]["f8"] = 2
    results["linear 4096"]["calls"][FLAX]["moved"] = 999
    results[fp8_speed.NUMERICS]["errors"][STATIC]["input"] = 0.1
    report = fp8_speed.report(results, OPTIONS)
    assert not any(claim.passed for claim in report.claims)


def test_tables_and_claims_of_programs():
    calls = _results()["linear 4096"]["calls"]
    block = {name: {"forward": _calls(f8=1), "both": each} for name, each in calls.items()}
    results = _results()
    del results["linear 4096"]
    results[fp8_speed.COMPILED] = {"tokens": 8192, "programs": {"linear 2048": block}}
    report = fp8_speed.report(results, OPTIONS)
    programs, _ = report.tables
    cells = ("1 of 3", "4", "0", "3 of 3", "6", "0")
    assert (f"linear 2048: {FLAX}", *cells) in programs.rows
    assert report.passed
    assert len(report.claims) == 4
    assert {fp8_speed.NO_TIMES, fp8_speed.NOT_TIMED} <= set(report.notes)
