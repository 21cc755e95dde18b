"""track_scales: sizes are NumPy's, and what is tracked computes what it computed before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import uscale_jax as us
from tests.zoo import prepared
from uscale_jax import _track_numbers
from uscale_jax.numerics import number_format

E4M3 = number_format("float8_e4m3fn")
MODELS = (
    "conv lstm",
    "custom derivatives",
    "mamba",
    "nnx scan",
    "scan remat attention",
)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def of_numpy(x, fmt=E4M3) -> np.ndarray:
    """Sizes by NumPy, in float64, with the format's own rounding."""
    x = np.abs(np.asarray(x, np.float64)).ravel()
    rounded = x.astype(np.float32).astype(fmt.dtype).astype(np.float64)
    nonzero = np.count_nonzero(x)
    return np.array(
        [
            np.sqrt(np.mean(np.square(x))),
            x.max(),
            np.count_nonzero((x != 0) & (rounded == 0)) / max(nonzero, 1),
            np.mean(x > fmt.max),
            1 - nonzero / x.size,
        ]
    )


def close(sizes, expected, rtol=3e-6) -> None:
    np.testing.assert_allclose(np.array([*sizes], np.float64), expected, rtol=rtol, atol=1e-12)


class TestNumbers:
    @pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e-9, 0.003, 1.0, 300.0, 1e9, 1e18, 1e30])
    def test_sizes_are_numpys_at_every_scale(self, scale):
        x = np.array(scale * normal(0, 13, 17))
        x[2, 3:9] = 0
        close(_track_numbers.sizes(_track_numbers.measured(jnp.asarray(x), E4M3)), of_numpy(x))

    def test_numbers_of_every_scale_together(self):
        x = np.float32([3e-30, 2e-12, 0.5, -7.0, 4e12, 0.0])
        close(_track_numbers.sizes(_track_numbers.measured(jnp.asarray(x), E4M3)), of_numpy(x))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_what_is_not_finite_stays_visible(self, bad):
        x = normal(0, 5, 7).at[2, 3].set(bad)
        found = _track_numbers.sizes(_track_numbers.measured(x, E4M3))
        assert not np.isfinite(found.rms)
        assert not np.isfinite(found.max)

    def test_many_together_are_one(self):
        x = 5 * normal(0, 6, 11, 7)
        rows = jax.vmap(lambda row: _track_numbers.measured(row, E4M3))(x)
        close(_track_numbers.sizes(_track_numbers.together(rows)), of_numpy(x))
        two = _track_numbers.merged(rows[0], rows[1])
        close(_track_numbers.sizes(two), of_numpy(x[:2]))

    def test_narrow_numbers_are_summed_wide(self):
        x = normal(0, 300, 70).astype(jnp.bfloat16)
        close(
            _track_numbers.sizes(_track_numbers.measured(x, E4M3)), of_numpy(x.astype(jnp.float32))
        )

    def test_complex_numbers_by_their_modulus(self):
        x = jax.lax.complex(normal(0, 5, 7), normal(1, 5, 7))
        found = _track_numbers.sizes(_track_numbers.measured(x, E4M3))
        close(found, of_numpy(np.abs(np.asarray(x))), 1e-5)


def mlp(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]
    return jnp.mean(jnp.square(h))


def mlp_inputs():
    params = {"up": {"kernel": 0.2 * normal(0, 5, 11)}, "down": 1e-3 * normal(1, 11, 3)}
    return params, normal(2, 7, 5)


class TestValues:
    def test_names_kinds_and_sizes(self):
        params, x = mlp_inputs()
        value, grads, scales = jax.jit(us.track_scales(mlp).value_and_grad())(params, x)
        assert [(row.name, row.kind) for row in scales.tracked[:4]] == [
            ("down", "parameter"),
            ("up/kernel", "parameter"),
            ("x", "input"),
            ("up/kernel/dot_general", "product"),
        ]
        up, down, x64 = (
            np.asarray(a, np.float64) for a in (params["up"]["kernel"], params["down"], x)
        )
        pre = x64 @ up
        h = np.tanh(pre)
        g = 2 * (h @ down) / (7 * 3)
        close(scales.values["x"], of_numpy(x))
        close(scales.values["up/kernel/dot_general"], of_numpy(pre))
        close(scales.values["down/dot_general"], of_numpy(h @ down))
        e5m2 = number_format("float8_e5m2")
        close(scales.gradients["down/dot_general"], of_numpy(g, e5m2), 1e-5)
        close(scales.gradients["down"], of_numpy(h.T @ g, e5m2), 1e-5)
        close(
            scales.gradients["up/kernel/dot_general"], of_numpy(g @ down.T * (1 - h**2), e5m2), 1e-5
        )
        assert "x" not in scales.gradients  # nobody asked for it
        assert np.array_equal(value, jax.jit(mlp)(params, x))
        assert jax.tree.all(jax.tree.map(np.array_equal, grads, jax.jit(jax.grad(mlp))(params, x)))

    def test_inputs_have_gradients_where_they_are_asked_for(self):
        params, x = mlp_inputs()
        _, (own, of_x), scales = us.track_scales(mlp).value_and_grad((0, -1))(params, x)
        close(scales.gradients["x"], of_numpy(of_x, number_format("float8_e5m2")), 1e-5)
        assert set(own) == {"up", "down"}

    def test_scopes_under_transformations(self):
        def loss(w, x):
            with jax.named_scope("head"):
                return jnp.sum(jax.vmap(lambda row: jnp.sin(row @ w))(x))

        scales = us.track_scales(loss)(normal(0, 5, 3), normal(1, 7, 5))[1]
        assert [r.name for r in scales.tracked if r.kind == "product"] == ["head/dot_general"]

    def test_values_alone_are_an_aux_of_gradients(self):
        params, x = mlp_inputs()
        tracked = us.track_scales(mlp)
        (value, scales), grads = jax.jit(jax.value_and_grad(tracked, has_aux=True))(params, x)
        assert scales.gradients == {}
        assert float(value) == float(jax.jit(mlp)(params, x))
        assert jax.tree.structure(grads) == jax.tree.structure(params)

    def test_aux_and_arguments_by_name(self):
        def loss(params, x, *, factor, mode):
            assert mode == "train"
            return factor * mlp(params, x), {"x": x}

        params, x = mlp_inputs()
        run = us.track_scales(loss).value_and_grad(has_aux=True)
        (value, aux), _, scales = run(params, x, factor=np.float32(3), mode="train")
        assert np.allclose(value, 3 * mlp(params, x))
        assert np.array_equal(aux["x"], x)
        assert "factor" in scales.values

    def test_where_says_what_is_tracked(self):
        params, x = mlp_inputs()
        tracked = us.track_scales(mlp, where=lambda value: value.kind == "product")
        _, _, scales = tracked.value_and_grad()(params, x)
        assert (
            [*scales.values] == ["up/kernel/dot_general", "down/dot_general"] == [*scales.gradients]
        )

    def test_formats(self):
        params, x = mlp_inputs()
        scales = us.track_scales(mlp, "bfloat16")(params, x)[1]
        assert scales.forward.name == scales.backward.name == "bfloat16"
        with pytest.raises(ValueError, match="float8_e9m9"):
            us.track_scales(mlp, "float8_e9m9")

    def test_scopes_are_module_paths(self):
        import flax.linen as nn

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                return x + nn.Dense(5, name="down")(nn.gelu(nn.Dense(7, name="up")(x)))

        model, x = nn.Sequential([Block(), Block()]), normal(0, 3, 5)
        params = model.init(jax.random.key(0), x)
        scales = us.track_scales(model.apply)(params, x)[1]
        products = [row.name for row in scales.tracked if row.kind == "product"]
        assert products == [
            f"Sequential/layers_{i}/{name}/dot_general" for i in (0, 1) for name in ("up", "down")
        ]


def compiled(run, args):
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(run).lower(*args).compile(compiler_options=options)(*args)


def same_but_for_order(x, y) -> None:
    np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13 * (1 + np.abs(y).max()))


class TestPrograms:
    @pytest.mark.parametrize("name", MODELS)
    def test_gradients_are_those_of_the_model(self, name):
        """In float64, to the rounding of sums that a compiler may join otherwise."""
        model = prepared(name)

        def loss(params, *inputs):
            outputs = jax.tree.leaves(model.model.apply(params, *inputs))
            return sum(jnp.sum(jnp.sin((i + 1.5) * x)) for i, x in enumerate(outputs))

        args = (model.params, *model.inputs)
        with jax.enable_x64(True):
            value, grads, scales = compiled(us.track_scales(loss).value_and_grad(), args)
            expected, own = compiled(jax.value_and_grad(loss), args)
            sizes = jax.device_get(scales.gradients)
        jax.tree.map(same_but_for_order, (value, grads), (expected, own))
        products = [row.name for row in scales.tracked if row.kind == "product"]
        assert products
        assert all(np.isfinite(sizes[name].rms) for name in products)

    def test_turns_of_a_scan_are_kept_apart(self):
        stack, x = 0.4 * normal(0, 4, 6, 6), normal(1, 3, 6)

        def loss(stack, x):
            h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)
            return jnp.sum(jnp.square(h))

        _, grads, scales = jax.jit(us.track_scales(loss).value_and_grad())(stack, x)
        h, every = np.asarray(x, np.float64), []
        for w in np.asarray(stack, np.float64):
            every.append(h @ w)
            h = np.tanh(h @ w)
        turns = scales.turns("stack/dot_general")
        for i, pre in enumerate(every):
            close([leaf[i] for leaf in turns], of_numpy(pre), 1e-5)
        close(scales.values["stack/dot_general"], of_numpy(np.stack(every)), 1e-5)
        e5m2 = number_format("float8_e5m2")
        close(scales.gradients["stack"], of_numpy(grads, e5m2), 1e-5)
        assert scales.turns("stack/dot_general", gradient=True).rms.shape == (4,)
        with pytest.raises(KeyError, match="nothing tracked is called 'stck'"):
            scales.turns("stck")

    def test_gradients_in_a_scan_by_turn(self):
        """Largest gradients of turns: they must not be added up."""
        w, xs = normal(0, 5, 5), normal(1, 3, 7, 5)

        def loss(w, xs):
            step = lambda total, x: (total + jnp.sum(jnp.square(x @ w)), None)  # noqa: E731
            return jax.lax.scan(step, jnp.float32(0), xs)[0]

        _, _, scales = us.track_scales(loss).value_and_grad()(w, xs)
        g = 2 * np.asarray(xs, np.float64) @ np.asarray(w, np.float64)
        turns = scales.turns("w/dot_general", gradient=True)
        np.testing.assert_allclose(turns.max, np.abs(g).max((1, 2)), 1e-5)
        np.testing.assert_allclose(scales.gradients["w/dot_general"].max, np.abs(g).max(), 1e-5)

    def test_a_branch_that_is_not_taken_has_no_sizes(self):
        def loss(w, x, which):
            branches = [lambda x: jnp.sum(jnp.sin(x @ w)), lambda x: jnp.sum(jnp.exp(x @ w))]
            return jax.lax.switch(which, branches, x)

        w, x = normal(0, 5, 3), normal(1, 7, 5)
        _, _, scales = us.track_scales(loss).value_and_grad()(w, x, jnp.int32(1))
        sin = next(row.name for row in scales.tracked if row.operation == "sin")
        exp = next(row.name for row in scales.tracked if row.operation == "exp")
        assert np.isnan(scales.values[sin].rms)
        close(scales.values[exp], of_numpy(np.exp(np.asarray(x, np.float64) @ w)), 1e-5)
        assert "-" in next(line for line in str(scales.table(True)).splitlines() if "sin" in line)

    def test_while_loops_have_values_and_no_gradients(self):
        def apply(w, x):
            going = lambda state: state[0] < 4  # noqa: E731
            step = lambda state: (state[0] + 1, jnp.tanh(state[1] @ w))  # noqa: E731
            return jax.lax.while_loop(going, step, (0, x))[1]

        w, x = normal(0, 5, 5), normal(1, 7, 5)
        outputs, scales = jax.jit(us.track_scales(apply))(w, x)
        h, every = np.asarray(x, np.float64), []
        for _ in range(4):
            every.append(h @ np.asarray(w, np.float64))
            h = np.tanh(every[-1])
        close(scales.values["w/dot_general"], of_numpy(np.stack(every)), 1e-5)
        np.testing.assert_allclose(outputs, h, 1e-4)

    def test_rules_of_the_user_are_kept(self):
        @jax.custom_vjp
        def odd(x):
            return jnp.sin(x)

        odd.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (3 * g * x,))
        loss = lambda w, x: jnp.sum(odd(x @ w))  # noqa: E731
        w, x = normal(0, 5, 3), normal(1, 7, 5)
        _, grads, scales = jax.jit(us.track_scales(loss).value_and_grad())(w, x)
        np.testing.assert_allclose(grads, x.T @ (3 * (x @ w)), 1e-5)
        close(
            scales.gradients["w/dot_general"],
            of_numpy(3 * (x @ w), number_format("float8_e5m2")),
            1e-5,
        )
        assert not any(row.operation in ("sin", "mul") for row in scales.tracked)

    def test_shards_are_together(self):
        mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

        def loss(w, x):
            def local(w, x):
                return jax.lax.psum(jnp.sum(jnp.square(x @ w)), ("a", "b"))

            return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(("a", "b"))), out_specs=P())(
                w, x
            )

        w, x = normal(0, 5, 3), normal(1, 16, 5)
        _, grads, scales = jax.jit(us.track_scales(loss).value_and_grad())(w, x)
        pre = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
        close(scales.values["w/dot_general"], of_numpy(pre), 1e-5)
        close(
            scales.gradients["w/dot_general"], of_numpy(2 * pre, number_format("float8_e5m2")), 1e-5
        )
        np.testing.assert_allclose(grads, jax.grad(loss)(w, x), 1e-6)

    def test_under_vmap(self):
        w, x = normal(0, 4, 5, 3), normal(1, 7, 5)
        loss = lambda w, x: jnp.sum(jnp.square(x @ w))  # noqa: E731
        _, _, scales = jax.vmap(us.track_scales(loss).value_and_grad(), (0, None))(w, x)
        pre = np.einsum("bi,nio->nbo", np.asarray(x, np.float64), np.asarray(w, np.float64))
        close(scales.values["w/dot_general"], of_numpy(pre), 1e-5)


class TestReport:
    def test_table(self):
        params, x = mlp_inputs()
        _, _, scales = us.track_scales(mlp).value_and_grad()(params, x)
        lines = str(scales).splitlines()
        assert lines[0] == "float8_e4m3fn for values, float8_e5m2 for gradients"
        assert lines[2].split()[:4] == ["name", "at", "rms", "max"]
        assert any(line.startswith("up/kernel/dot_general") for line in lines)
        assert "test_track.py:" in str(scales)
        assert len(scales.table(every=True).splitlines()) == len(scales.tracked) + 1

    def test_picture(self, tmp_path):
        params, x = mlp_inputs()
        _, _, scales = us.track_scales(mlp).value_and_grad()(params, x)
        scales.plot(tmp_path / "scales.png", "one", {"the same": scales})
        assert (tmp_path / "scales.png").stat().st_size > 10_000
