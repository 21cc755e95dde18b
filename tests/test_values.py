"""scale_params: numbers against float64, what it refuses, what it compiles to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

import uscale_jax as us

K = 1.3


def make_params() -> dict:
    rng = np.random.default_rng(3)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "embedding": normal(11, 5),
        "block": {"kernel": normal(5, 7), "bias": normal(7).astype(jnp.bfloat16)},
        "steps": jnp.arange(1, 4),
        "mask": jnp.array([True, False]),
        "rng": jax.random.key(2),
    }


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def test_floating_leaves_are_multiplied_and_the_others_pass_through():
    params = make_params()
    scaled = us.scale_params(params, K)
    np.testing.assert_allclose(
        wide(scaled["embedding"]), K * wide(params["embedding"]), rtol=2e-7, atol=0
    )
    np.testing.assert_array_equal(scaled["steps"], params["steps"])
    np.testing.assert_array_equal(scaled["mask"], params["mask"])
    assert scaled["rng"] is params["rng"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_leaves_are_multiplied_in_float32_and_rounded_once(dtype):
    values = np.linspace(-3.1, 2.7, 41).astype(dtype)
    scaled = us.scale_params({"w": jnp.asarray(values)}, K)["w"]
    expected = (values.astype(np.float32) * np.float32(K)).astype(dtype)
    np.testing.assert_array_equal(np.asarray(scaled), expected)
    in_own_dtype = (values * np.asarray(K, dtype)).astype(dtype)
    assert not np.array_equal(in_own_dtype, expected)  # the values can tell the two apart


def test_float64_leaves_keep_their_precision():
    with jax.enable_x64(True):
        values = np.random.default_rng(1).standard_normal((3, 5))
        scaled = us.scale_params({"w": jnp.asarray(values)}, K)["w"]
        assert scaled.dtype == jnp.float64
        np.testing.assert_array_equal(np.asarray(scaled), K * values)


def test_complex_leaves_are_scaled():
    scaled = us.scale_params({"w": jnp.array([1 + 2j, -3j])}, 2.0)["w"]
    np.testing.assert_array_equal(scaled, np.array([2 + 4j, -6j], np.complex64))


def test_prefix_of_factors_fits_by_name():
    params = make_params()
    factors = {"embedding": 3.0, "block": {"kernel": 0.5, "bias": 1.0}, "steps": 1.0, "mask": 1.0}
    scaled = us.scale_params(params, factors | {"rng": 1.0})
    np.testing.assert_allclose(scaled["embedding"], 3 * params["embedding"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["block"]["kernel"], params["block"]["kernel"] / 2)
    np.testing.assert_array_equal(scaled["block"]["bias"], params["block"]["bias"])


def test_plain_dict_of_factors_fits_an_nnx_state():
    state = nnx.state(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), nnx.Param)
    scaled = us.scale_params(state, {"kernel": 2.0, "bias": 1.0})
    assert type(scaled) is type(state)
    np.testing.assert_array_equal(scaled["kernel"][...], 2 * state["kernel"][...])


def test_exponents_are_powers_of_k():
    params = {"a": jnp.array([3.0]), "b": [jnp.array([5.0]), jnp.array([7.0])]}
    scaled = us.scale_params(params, 2.0, exponents={"a": 3, "b": {"0": -1, "1": 0.5}})
    np.testing.assert_allclose(scaled["a"], [24.0])
    np.testing.assert_allclose(scaled["b"], [[2.5], [7 * np.sqrt(2)]], rtol=1e-6)


def test_where_chooses_leaves_by_name_and_by_leaf():
    params = make_params()
    scaled = us.scale_params(params, 2.0, where=lambda name, leaf: name.startswith("block"))
    assert scaled["embedding"] is params["embedding"]
    np.testing.assert_array_equal(scaled["block"]["kernel"], 2 * params["block"]["kernel"])
    matrices = us.scale_params(params, 2.0, where=lambda name, leaf: len(leaf.shape) == 2)
    assert matrices["block"]["bias"] is params["block"]["bias"]


def test_weak_types_survive_concrete_and_traced_factors():
    weak = jnp.asarray(3.0)
    assert weak.weak_type
    for scaled in (
        us.scale_params({"w": weak}, 2.0)["w"],
        jax.jit(us.scale_params)({"w": weak}, jnp.float32(2.0))["w"],
    ):
        assert scaled.weak_type
        assert float(scaled) == 6.0


def test_shapes_come_back_as_they_are():
    shapes = {"w": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16), "n": jax.ShapeDtypeStruct((), int)}
    assert us.scale_params(shapes, 2.0) == shapes


def test_one_program_serves_every_factor_and_the_whole_tree():
    params = make_params()
    us.scale_params(params, 2.0)
    with jax.log_compiles(False), jax.no_tracing():
        us.scale_params(params, 0.3)


def test_runs_in_place_when_donated():
    params = {"w": jnp.ones((300, 500)), "v": jnp.ones((7, 11), jnp.bfloat16)}
    size = sum(leaf.nbytes for leaf in params.values())
    scale = jax.jit(lambda tree: us.scale_params(tree, 2.0), donate_argnums=0)
    memory = scale.lower(params).compile().memory_analysis()
    assert memory.argument_size_in_bytes == memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes == 0
    scaled = scale(params)
    assert all(leaf.is_deleted() for leaf in params.values())
    assert float(scaled["w"][0, 0]) == 2.0


def test_leaves_on_different_devices_stay_where_they_are():
    first, second = jax.devices()[:2]
    params = {"a": jax.device_put(jnp.ones(3), first), "b": jax.device_put(jnp.ones(5), second)}
    scaled = us.scale_params({**params, "c": jnp.ones(7)}, 2.0)
    assert scaled["a"].sharding == SingleDeviceSharding(first)
    assert scaled["b"].sharding == SingleDeviceSharding(second)


def test_traced_factors_beside_concrete_ones_and_concrete_leaves():
    params = {"a": jnp.array([3.0]), "b": jnp.array([5.0], jnp.float16)}
    scaled = jax.jit(lambda k: us.scale_params(params, {"a": k, "b": 2.0}))(4.0)
    assert (float(scaled["a"][0]), float(scaled["b"][0])) == (12.0, 10.0)


def test_does_not_touch_the_host_inside_jit():
    params = {"w": jnp.ones((3, 5), jnp.float16)}
    scale = jax.jit(us.scale_params)
    k = jnp.float32(2.0)
    scale(params, k)
    with jax.transfer_guard("disallow"):
        scale(params, k)


BAD_FACTORS = [
    (0, ValueError, "positive and finite"),
    (-2.0, ValueError, r"got -2\.0"),
    (float("nan"), ValueError, "got nan"),
    (np.inf, ValueError, "got inf"),
    (1e-40, ValueError, "normal range of float32"),
    (1e300, ValueError, "normal range of float32"),
    (jnp.float32(-3), ValueError, r"got -3\.0"),
    (2j, TypeError, "must be real"),
    (jnp.complex64(2), TypeError, "must be real"),
    (True, TypeError, "type bool"),
    (jnp.array(True), TypeError, "must be real"),
    ("2", TypeError, "type str"),
    (None, TypeError, "type NoneType"),
    (np.ones(2), ValueError, r"shape \(2,\)"),
    (jnp.ones((1, 1)), ValueError, r"shape \(1, 1\)"),
]


@pytest.mark.parametrize(("k", "error", "message"), BAD_FACTORS)
def test_bad_factors_are_refused(k, error, message):
    with pytest.raises(error, match=message):
        us.scale_params({"w": jnp.ones(3)}, k)


@pytest.mark.parametrize(
    ("k", "error", "message"), [row for row in BAD_FACTORS if row[0] is not None]
)
def test_bad_entries_of_a_prefix_are_refused_naming_the_leaf(k, error, message):
    with pytest.raises(error, match=f"'block/kernel'.*{message}"):
        us.scale_params({"block": {"kernel": jnp.ones(3)}}, {"block": {"kernel": k}})


def test_traced_factors_of_wrong_shape_or_dtype_are_refused():
    scale = jax.jit(us.scale_params)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        scale({"w": jnp.ones(3)}, jnp.ones(3))
    with pytest.raises(TypeError, match="must be real"):
        scale({"w": jnp.ones(3)}, jnp.complex64(2))


def test_prefixes_that_do_not_fit_name_both_sides():
    params = {"Dense_0": {"kernel": jnp.ones((3, 5))}, "Dense_1": {"kernel": jnp.ones((5, 2))}}
    with pytest.raises(ValueError, match=r"covers leaf 'Dense_1/kernel'(.|\n)*entry 'Dense_2'"):
        us.scale_params(params, {"Dense_0": 2.0, "Dense_2": 0.5})
    with pytest.raises(ValueError, match="covers leaf 'Dense_0/kernel'"):
        us.scale_params(params, {"Dense_0": {"kernel": {"too deep": 2.0}}, "Dense_1": 1.0})


def test_none_in_a_prefix_covers_no_leaf():
    with pytest.raises(ValueError, match="no entry of k covers leaf 'b'"):
        us.scale_params({"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": 2.0, "b": None})


def test_entries_over_empty_subtrees_are_no_mistake():
    params = {"Dense_0": jnp.ones(3), "Dropout_0": {}, "absent": None}
    scaled = us.scale_params(params, {"Dense_0": 2.0, "Dropout_0": 1.0, "absent": 1.0})
    np.testing.assert_array_equal(scaled["Dense_0"], 2 * np.ones(3))


def test_where_that_selects_nothing_is_refused_with_the_names():
    with pytest.raises(ValueError, match="none of the 3 floating leaves(.|\n)*'block/kernel'"):
        us.scale_params(make_params(), 2.0, where=lambda name, leaf: name == "kernel")
    with pytest.raises(TypeError, match="where must return a Python bool"):
        us.scale_params(make_params(), 2.0, where=lambda name, leaf: leaf.shape)


@pytest.mark.parametrize("leaf", [1.0, "text", object(), [1, 2], lambda x: x])
def test_leaves_that_are_no_arrays_are_refused_by_path(leaf):
    with pytest.raises(TypeError, match="leaf 'head/scale"):
        us.scale_params({"head": {"scale": leaf}, "w": jnp.ones(3)}, 2.0)


def test_numpy_leaves_keep_their_dtype_or_are_refused():
    scaled = us.scale_params({"w": np.full(3, 2.0, np.float32)}, 2.0)["w"]
    assert isinstance(scaled, jax.Array)
    np.testing.assert_array_equal(scaled, np.full(3, 4.0))
    with pytest.raises(ValueError, match=r"leaf 'w': got float64\[3\](.|\n)*jax_enable_x64"):
        us.scale_params({"w": np.ones(3)}, 2.0)


def test_exponents_must_be_numbers():
    with pytest.raises(TypeError, match="exponents must be finite(.|\n)*'w'"):
        us.scale_params({"w": jnp.ones(3)}, 2.0, exponents={"w": "two"})
    with pytest.raises(ValueError, match=r"k\*\*200"):
        us.scale_params({"w": jnp.ones(3)}, 2.0, exponents=200)


@pytest.mark.parametrize(
    ("dtype", "value", "k", "safe"),
    [
        ("float16", 40000.0, 2.0, 1.5),
        ("float8_e4m3fn", 400.0, 2.0, 1.1),
        ("float8_e5m2", 50000.0, 2.0, 1.1),
        ("float8_e4m3", 200.0, 2.0, 1.1),
        ("float4_e2m1fn", 4.0, 3.0, 1.5),
        ("bfloat16", 1e38, 1e30, 2.0),
        ("float32", 3.0, 2e38, 1e38),
    ],
)
def test_overflow_is_reported_with_the_leaf_and_a_factor_that_fits(dtype, value, k, safe):
    params = {"ok": jnp.ones(2), "big": jnp.full((3,), value, dtype)}
    with pytest.raises(ValueError, match=r"leaf 'big'.*overflows(.|\n)*expected k ≤"):
        us.scale_params(params, {"ok": 1.0, "big": k})
    scaled = us.scale_params(params, {"ok": 1.0, "big": safe})["big"]
    assert np.all(np.isfinite(np.asarray(scaled, np.float32)))


def test_overflow_of_constants_is_reported_while_tracing():
    params = {"w": jnp.full((3,), 300.0, jnp.float16)}
    run = lambda k: jax.jit(lambda x: us.scale_params(params, k)["w"] + x)(jnp.float16(1))  # noqa: E731
    np.testing.assert_array_equal(run(2.0), np.full(3, 601.0))
    with pytest.raises(ValueError, match="leaf 'w'.*overflows"):
        run(1000.0)


def test_infinities_that_were_there_before_are_no_overflow():
    params = {"w": jnp.array([np.inf, 2.0], jnp.float16)}
    np.testing.assert_array_equal(us.scale_params(params, 2.0)["w"], [np.inf, 4.0])


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float4_e2m1fn", "float32"])
def test_a_leaf_that_would_vanish_is_reported(dtype):
    params = {"w": jnp.full((3,), 1.0, dtype), "zeros": jnp.full((3,), 0.0, dtype)}
    us.scale_params({"zeros": params["zeros"]}, 1e-12)
    if dtype == "float32":
        params["w"] = params["w"] * 1e-30
    with pytest.raises(ValueError, match=r"leaf 'w'.*vanishes(.|\n)*expected k ≥"):
        us.scale_params(params, 1e-20)


def test_gradients_of_both_arguments():
    params = {"w": jnp.array([1.0, -2.0, 5.0])}
    loss = lambda p, k: jnp.sum(us.scale_params(p, k)["w"] ** 2)  # noqa: E731
    by_params, by_k = jax.grad(loss, argnums=(0, 1))(params, 3.0)
    np.testing.assert_allclose(by_params["w"], 2 * 9 * np.asarray(params["w"]), rtol=1e-6)
    np.testing.assert_allclose(by_k, 2 * 3 * 30.0, rtol=1e-6)


def test_equals_optax_tree_scale_where_that_is_defined():
    params = {"a": jnp.linspace(-1.0, 2.0, 15).reshape(3, 5)}
    np.testing.assert_array_equal(
        us.scale_params(params, K)["a"], optax.tree.scale(jnp.float32(K), params)["a"]
    )
