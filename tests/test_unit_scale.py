"""unit_scale: the same function and gradients, from tensors of size one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import uscale_jax as us
from tests.zoo import prepared

MODELS = ("conv lstm", "custom derivatives", "scan remat attention")
ROUNDED = (2**-0.5 - 1e-6, 2**0.5 + 1e-6)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def compiled(run, args):
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(run).lower(*args).compile(compiler_options=options)(*args)


def sizes(unit, *inputs):
    """Root mean squares of values and gradients of a unit-scaled model, by name."""
    _, _, scales = compiled(us.track_scales(unit.apply).value_and_grad(), (unit.params, *inputs))
    found = jax.device_get((scales.values, scales.gradients))
    given = {row.name for row in scales.tracked if row.kind == "input"}
    return [
        {n: float(s.rms) for n, s in each.items() if s.zeros != 1 and n not in given}
        for each in found
    ]


def same(unit, loss, args, rtol=1e-6) -> None:
    """Values and restored gradients are the model's own."""
    value, grads = compiled(jax.value_and_grad(unit.apply), (unit.params, *args[1:]))
    expected, own = compiled(jax.value_and_grad(loss), args)
    np.testing.assert_allclose(value, expected, rtol)
    top = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(own))
    found = unit.gradients(grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 10 * rtol, rtol * top), found, own)


def within(found, low, high) -> None:
    off = {name: rms for name, rms in found.items() if not low <= rms <= high and not np.isnan(rms)}
    assert not off


def mlp(params, x):
    h = jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"][None]
    return jnp.mean(jnp.square(h - jnp.sin(x[:, :3])))


def mlp_args():
    params = {"up": 0.03 * normal(0, 13, 21), "down": 7 * normal(1, 21, 3), "bias": jnp.zeros(3)}
    return params, 40 * normal(2, 11, 13)


class TestModel:
    def test_every_tensor_is_of_size_one(self):
        params, x = mlp_args()
        before = us.track_scales(mlp).value_and_grad()(params, x)[2]
        off = [s.rms for s in (*before.values.values(), *before.gradients.values())]
        assert min(off) < 1e-2 < 50 < max(off)  # so there is something to do
        for rounded, low, high in ((True, *ROUNDED), (False, 0.9999, 1.0001)):
            unit = us.unit_scale(mlp, params, x, rounded=rounded)
            values, gradients = sizes(unit, x)
            within(values, low, high)
            within(gradients, low, high)
            assert {"up", "down", "up/dot_general", "down/dot_general", "bias"} <= {*gradients}
            same(unit, mlp, (params, x), 1e-6 if rounded else 1e-5)

    def test_powers_of_two_change_no_bit(self):
        params, x = mlp_args()
        unit = us.unit_scale(mlp, params, x)
        with jax.disable_jit():  # compilers may multiply and add in one rounding
            assert float(unit.apply(unit.params, x)) == float(mlp(params, x))
            grads = unit.gradients(jax.grad(unit.apply)(unit.params, x))
            own = jax.grad(mlp)(params, x)
        assert jax.tree.all(jax.tree.map(np.array_equal, grads, own))
        assert all(np.log2(s) % 1 == 0 for s in jax.tree.leaves(unit.units))
        assert jax.tree.all(jax.tree.map(np.array_equal, unit.restore(unit.params), params))

    def test_factors_are_those_of_unit_scaling_where_its_assumptions_hold(self):
        """Independent weights of size σ: s of a product is σ·√fan_in times that of its input."""
        x, w, v = normal(0, 800, 400), 0.02 * normal(1, 400, 300), 0.05 * normal(2, 300, 200)
        apply = lambda params, x: x @ params["w"] @ params["v"]  # noqa: E731
        unit = us.unit_scale(apply, {"w": w, "v": v}, x, rounded=False)
        size = {row.name: float(unit.scales.values[row.name].rms) for row in unit.scales.tracked}
        np.testing.assert_allclose(unit.units["w"], 0.02, rtol=0.02)
        np.testing.assert_allclose(size["w/dot_general"], 0.02 * 400**0.5, rtol=0.02)
        np.testing.assert_allclose(
            size["v/dot_general"], 0.02 * 0.05 * (400 * 300) ** 0.5, rtol=0.03
        )
        # ρ of w is s times the size of its gradient, which is a sum over 800 rows and 200 outputs.
        expected = 0.02 * 0.05 * (800 * 200) ** 0.5
        np.testing.assert_allclose(unit.gradient_units["w"], expected, rtol=0.03)

    def test_other_batches_and_sizes(self):
        params, x = mlp_args()
        unit = us.unit_scale(mlp, params, x)
        other = 40 * normal(5, 29, 13)
        same(unit, mlp, (params, other))
        values, _ = sizes(unit, other)
        within(values, 0.3, 3)

    def test_gradients_of_inputs_are_true(self):
        params, x = mlp_args()
        unit = us.unit_scale(mlp, params, x)
        found = jax.grad(unit.apply, 1)(unit.params, x)
        own = jax.grad(mlp, 1)(params, x)
        np.testing.assert_allclose(found, own, 1e-5, 1e-6 * np.abs(own).max())

    def test_outputs_and_their_gradients(self):
        apply = lambda params, x: {"h": jnp.tanh(x @ params), "n": jnp.argmax(x, -1)}  # noqa: E731
        params, x = 0.02 * normal(0, 13, 7), normal(1, 9, 13)
        unit = us.unit_scale(apply, params, x)
        found, own = unit.apply(unit.params, x), apply(params, x)
        np.testing.assert_allclose(found["h"], own["h"], 1e-6)
        assert np.array_equal(found["n"], own["n"])
        loss = lambda apply: lambda params: jnp.sum(apply(params, x)["h"] ** 3)  # noqa: E731
        grads = unit.gradients(jax.grad(loss(unit.apply))(unit.params))
        np.testing.assert_allclose(grads, jax.grad(loss(apply))(params), 1e-5, 1e-9)

    def test_objective_of_a_loss_with_more(self):
        params, x = mlp_args()
        both = lambda params, x: (mlp(params, x), {"x": x})  # noqa: E731
        unit = us.unit_scale(both, params, x, objective=lambda outputs: outputs[0])
        grads = jax.grad(unit.apply, has_aux=True)(unit.params, x)[0]
        within({name: float(jnp.sqrt(jnp.mean(g**2))) for name, g in grads.items()}, *ROUNDED)

    def test_training_is_that_of_the_model(self, standard_promotion):
        params, x = mlp_args()
        unit = us.unit_scale(mlp, params, x)
        tx = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(0.01, weight_decay=0.1))

        def train(loss, tx, params):
            def step(carry, _):
                params, state = carry
                value, grads = jax.value_and_grad(loss)(params, x)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), value

            (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), length=8)
            return params, losses

        own, losses = jax.jit(lambda p: train(mlp, tx, p))(params)
        scaled = us.scale_optimizer(tx, unit)
        found, same_losses = jax.jit(lambda p: train(unit.apply, scaled, p))(unit.params)
        assert losses[-1] < losses[0]
        np.testing.assert_allclose(same_losses, losses, 1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), unit.restore(found), own
        )

    def test_narrow_formats_hold_it(self):
        """What float8 loses of the model as it is, and of the unit-scaled one."""
        w = [0.02 * normal(i, 128, 128) / 40 for i in range(3)]
        x = normal(9, 64, 128)

        def loss(params, x):
            for each in params:
                x = jnp.tanh(x @ each * 40)
            return jnp.mean(x * normal(11, 64, 128))

        own = jax.grad(loss)(w, x)
        unit = us.unit_scale(loss, w, x)

        def error(apply, params, restore):
            grads = restore(jax.grad(us.simulate_format(apply, "float8_e4m3fn"))(params, x))
            return float(jnp.linalg.norm(grads[0] - own[0]) / jnp.linalg.norm(own[0]))

        assert error(loss, w, lambda g: g) > 0.9
        assert error(unit.apply, unit.params, unit.gradients) < 0.2


class TestPrograms:
    @pytest.mark.parametrize("name", MODELS)
    def test_models(self, name):
        model = prepared(name)

        def loss(params, *inputs):
            outputs = jax.tree.leaves(model.model.apply(params, *inputs))
            return sum(jnp.mean(jnp.sin((i + 1.5) * x)) for i, x in enumerate(outputs))

        args = (model.params, *model.inputs)
        with jax.enable_x64(True):
            unit = us.unit_scale(loss, *args, strict=False)
            same(unit, loss, args, 1e-11)
            products = [row.name for row in unit.scales.tracked if row.kind == "product"]
            values, gradients = sizes(unit, *model.inputs)
        within({name: values[name] for name in products}, 0.5, 2)
        within({name: gradients[name] for name in products if name in gradients}, 0.3, 3)

    def test_masks_are_no_sizes(self):
        w = 0.1 * normal(0, 3, 24, 24)

        def loss(w, x, mask):
            q, k, v = (x @ each for each in w)
            scores = jnp.where(mask, q @ k.T / 24**0.5, -1e30)
            return jnp.mean(jnp.square(jax.nn.softmax(scores) @ v - 1))

        def added(w, x, mask):
            q, k, v = (x @ each for each in w)
            scores = q @ k.T / 24**0.5 + jnp.where(mask, 0, jnp.finfo(jnp.float32).min)
            exp = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
            return jnp.mean(jnp.square(exp / exp.sum(-1, keepdims=True) @ v - 1))

        x, mask = normal(1, 10, 24), np.tril(np.ones((10, 10), bool))
        for each in (loss, added):
            unit = us.unit_scale(each, w, x, mask)
            same(unit, each, (w, x, mask))
            _, gradients = sizes(unit, x, mask)
            within({n: g for n, g in gradients.items() if "dot_general" in n}, *ROUNDED)

    def test_loops_branches_and_shards(self):
        mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

        def loss(params, x, which):
            def layer(h, w):
                return h + jax.lax.cond(which, jnp.tanh, jnp.sin, h @ w), jnp.sum(h)

            h, sums = jax.lax.scan(jax.checkpoint(layer), x, params["stack"], reverse=True)
            split = jax.shard_map(
                lambda h, w: h @ w, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a")
            )
            return jnp.mean(jnp.square(split(h, params["out"]))) + 0.001 * jnp.sum(sums)

        params = {"stack": 0.02 * normal(0, 4, 12, 12), "out": 30 * normal(1, 12, 5)}
        args = (params, normal(2, 16, 12), np.bool_(True))
        unit = us.unit_scale(loss, *args)
        same(unit, loss, args, 3e-6)
        values, _ = sizes(unit, *args[1:])
        within({n: v for n, v in values.items() if "dot_general" in n}, 0.6, 1.6)

    def test_what_starts_at_zero_learns(self):
        params, x = mlp_args()
        params = {**params, "down": jnp.zeros_like(params["down"])}
        unit = us.unit_scale(mlp, params, x)
        same(unit, mlp, (params, x))
        moved = {**params, "down": normal(3, 21, 3)}
        same_moved = unit.gradients(jax.grad(unit.apply)(unit.scale(moved), x))
        own = jax.grad(mlp)(moved, x)
        np.testing.assert_allclose(same_moved["up"], own["up"], 1e-5, 1e-6)

    def test_numbers_among_the_parameters(self):
        """What is no array has no place among the program's inputs."""

        def loss(params, x):
            return jnp.mean(jnp.square(x @ params["w"])) * params["factor"]

        params, x = {"factor": 3.0, "w": 0.01 * normal(0, 12, 10)}, 50 * normal(1, 7, 12)
        unit = us.unit_scale(loss, params, x)
        assert unit.params["factor"] == 3.0
        np.testing.assert_allclose(unit.apply(unit.params, x), loss(params, x), 1e-6)
        within({"w": float(jnp.sqrt(jnp.mean(unit.params["w"] ** 2)))}, *ROUNDED)

    def test_complex_parameters_stay_as_they_are(self):
        def loss(params, x):
            return jnp.mean(jnp.abs((x @ params["w"]).astype(jnp.complex64) * params["c"]) ** 2)

        c = 30 * jax.lax.complex(normal(3, 7, 10), normal(4, 7, 10))
        args = ({"c": c, "w": 0.01 * normal(0, 12, 10)}, normal(1, 7, 12))
        unit = us.unit_scale(loss, *args)
        assert np.array_equal(unit.params["c"], c)
        same(unit, loss, args)

    def test_complex_values_pass(self):
        loss = lambda w, x: jnp.mean(jnp.abs(jnp.fft.fft(x @ w)) ** 2)  # noqa: E731
        args = (0.01 * normal(0, 12, 10), normal(1, 7, 12))
        same(us.unit_scale(loss, *args), loss, args)

    def test_numbers_and_objects_among_the_arguments(self):
        def loss(params, x, factor, how):
            return jnp.mean(jnp.square(x @ params["w"])) * factor * {"twice": 2.0}[how]

        args = ({"w": 0.01 * normal(0, 12, 10), "b": None}, normal(1, 7, 12), 3.0, "twice")
        unit = us.unit_scale(loss, *args)
        np.testing.assert_allclose(unit.apply(unit.params, *args[1:]), loss(*args), 1e-6)

    def test_while_loops_without_products(self):
        def loss(w, x):
            steps = jax.lax.while_loop(lambda i: i < jnp.sum(x[0] > 0), lambda i: i + 1, 0)
            return jnp.mean(jnp.square(x @ w)) * steps

        args = (0.01 * normal(0, 12, 10), normal(1, 7, 12))
        same(us.unit_scale(loss, *args), loss, args)


class TestRefusals:
    def test_hidden_products(self):
        @jax.custom_vjp
        def own(x, w):
            return x @ w

        own.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
        loss = lambda w, x: jnp.mean(own(x, w))  # noqa: E731
        args = (0.01 * normal(0, 12, 10), normal(1, 7, 12))
        with pytest.raises(ValueError, match=r"custom_vjp_call at .*test_unit_scale.py:\d+"):
            us.unit_scale(loss, *args)
        same(us.unit_scale(loss, *args, strict=False), loss, args)

        def looped(w, x):
            return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]

        with pytest.raises(ValueError, match=r"dot_general at .*test_unit_scale.py:\d+"):
            us.unit_scale(looped, normal(0, 12, 12), normal(1, 7, 12))

    def test_another_program(self):
        def apply(w, x, train):
            h = jnp.tanh(x @ w)
            return h * 2 if train else jnp.sin(h)

        unit = us.unit_scale(lambda w, x: apply(w, x, True), normal(0, 5, 3), normal(1, 7, 5))
        object.__setattr__(unit, "_apply", lambda w, x: apply(w, x, False))
        with pytest.raises(
            ValueError, match=r"another program here: .*'sin'.* at .*\.py:\d+ where"
        ):
            unit.apply(unit.params, normal(1, 7, 5))

    def test_numbers_that_are_not_finite(self):
        params, x = mlp_args()
        with pytest.raises(ValueError, match=r"input 'x': root mean square nan"):
            us.unit_scale(mlp, params, x.at[2, 3].set(jnp.nan))

    def test_trees_of_another_model(self):
        params, x = mlp_args()
        unit = us.unit_scale(mlp, params, x)
        with pytest.raises(ValueError, match="'upp'.* are no parameters"):
            unit.scale({"upp": params["up"]})
        assert "up" in str(unit)
