"""The two verbs, constraints, the check of validity; every operation under transformations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uscale_jax import numerics as un

X = jnp.array([1.5, -2.0, 0.25])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_each_verb_works_in_its_own_direction_only():
    for verb, forward, backward in ((un.scale_fwd, 4.0, 1.0), (un.scale_bwd, 1.0, 4.0)):
        y, pull = jax.vjp(lambda x, verb=verb: verb(x, 4.0), X)
        np.testing.assert_array_equal(y, forward * X)
        np.testing.assert_array_equal(pull(X)[0], backward * X)


def test_scaled_puts_a_factor_on_each_gradient_and_passes_the_rest_on():
    f = un.scaled(lambda a, b, c, power=1: (a * b * c) ** power, 2.0, 3.0, 5.0)
    y, (ga, gb, gc) = jax.value_and_grad(f, (0, 1, 2))(2.0, 3.0, 5.0)
    assert [float(v) for v in (y, ga, gb, gc)] == [60.0, 3 * 15.0, 5 * 10.0, 6.0]
    assert f(2.0, 3.0, 5.0, power=2) == 1800
    with pytest.raises(ValueError, match="given 2 factors for gradients, the function 1 operands"):
        f(2.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float32])
@pytest.mark.parametrize("verb", [un.scale_fwd, un.scale_bwd])
def test_narrow_dtypes_stay_and_are_rounded_once(verb, dtype):
    x, g = normal(0, 257).astype(dtype), normal(1, 257).astype(dtype)
    s = 0.3719  # rounding it to the narrow dtype first would show
    y, pull = jax.vjp(lambda x: verb(x, s), x)
    wanted = lambda v: (v.astype(jnp.float32) * jnp.float32(s)).astype(dtype)  # noqa: E731
    out, gradient = (wanted(x), g) if verb is un.scale_fwd else (x, wanted(g))
    assert y.dtype == pull(g)[0].dtype == dtype
    as_float = lambda v: np.asarray(v, np.float32)  # noqa: E731
    np.testing.assert_array_equal(as_float(y), as_float(out))
    np.testing.assert_array_equal(as_float(pull(g)[0]), as_float(gradient))


def test_weak_types_stay_and_a_factor_of_one_costs_nothing():
    assert un.scale_fwd(3.0, 2.0).weak_type
    for verb in (un.scale_fwd, un.scale_bwd):
        assert not jax.make_jaxpr(lambda x, verb=verb: verb(x, 1.0))(X).eqns


def test_static_factors_are_literals_of_the_program():
    f = lambda x: jnp.sum(un.scale_bwd(un.scale_fwd(x, 0.5), 3.0))  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(f))(X))
    assert "mul" in program
    assert "3.0" in program


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
@pytest.mark.parametrize("verb", [un.scale_fwd, un.scale_bwd])
def test_factors_are_positive_and_finite(verb, bad):
    with pytest.raises(ValueError, match=rf"{verb.__name__}'s s must be positive and finite"):
        verb(X, bad)
    with pytest.raises(ValueError, match="scaled's"):
        un.scaled(jnp.sin, 1.0, bad) if verb is un.scale_bwd else un.scaled(jnp.sin, bad)


def test_arrays_are_floating_and_factors_scalars():
    with pytest.raises(TypeError, match=r"scale_fwd's x must be floating, got int32\[3\].*Fix:"):
        un.scale_fwd(jnp.arange(3), 2.0)
    with pytest.raises(ValueError, match="must be a scalar"):
        un.scale_bwd(X, jnp.ones(3))


def test_traced_factors_work_by_layer_under_scan_and_get_no_gradient():
    def layers(x, taus):
        step = jax.checkpoint(lambda x, tau: (un.scale_bwd(un.scale_fwd(x, tau), 2 * tau), None))
        return jnp.sum(jax.lax.scan(step, x, taus)[0])

    taus = jnp.array([2.0, 3.0])
    y, (gx, gt) = jax.jit(jax.value_and_grad(layers, (0, 1)))(X, taus)
    np.testing.assert_allclose(y, 6 * jnp.sum(X), rtol=1e-6)
    np.testing.assert_array_equal(gx, jnp.full(3, 24.0))
    np.testing.assert_array_equal(gt, jnp.zeros(2))


def cube(x):
    return un.scale_fwd(un.scale_bwd(x, 10.0) ** 3, 2.0)


def test_forward_mode_raises_unless_gradients_are_true():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(cube, (2.0,), (1.0,))
    with un.true_gradients():
        assert jax.jvp(cube, (2.0,), (1.0,))[1] == 24


WRAPPED = {
    "eager": cube,
    "jit": jax.jit(cube),
    "remat": jax.checkpoint(cube),
    "scan": lambda x: jax.lax.scan(lambda c, _: (cube(c), None), x, length=1)[0],
    "cond": lambda x: jax.lax.cond(x > 0, cube, cube, x),
    "vmap": lambda x: jax.vmap(cube)(x[None])[0],
}


@pytest.mark.parametrize("how", WRAPPED)
def test_no_cache_mixes_the_two_kinds_of_gradients(how):
    gradient = jax.grad(WRAPPED[how])
    x = jnp.float32(2.0)
    for _ in range(2):
        assert gradient(x) == 120
        with un.true_gradients():
            assert gradient(x) == 24
    with pytest.raises(KeyError), un.true_gradients():
        raise KeyError
    assert gradient(x) == 120


@pytest.mark.parametrize(
    ("name", "wanted"),
    {
        None: (0.25, 1.0),
        "to_output_scale": (0.25, 0.25),
        "to_grad_input_scale": (1.0, 1.0),
        "gmean": (0.5, 0.5),
        "hmean": (0.4, 0.4),
        "amean": (0.625, 0.625),
        max: (1.0, 1.0),
    }.items(),
)
def test_constraints_of_an_output_and_one_gradient(name, wanted):
    np.testing.assert_allclose(un.constrained(name, 0.25, 1.0), wanted, rtol=1e-12)


def test_constraints_of_two_gradients():
    factors = (0.125, 1.0, 8.0)
    for name, one in {"to_left_grad_scale": 1.0, "to_right_grad_scale": 8.0, "gmean": 1.0}.items():
        assert un.constrained(name, *factors) == (one,) * 3
    assert un.constrained(None, *factors) == factors


def test_constraints_that_are_none_raise():
    with pytest.raises(ValueError, match=r"no constraint 'gmaen'. Expected: .*'gmean'.*Fix:"):
        un.constrained("gmaen", 1.0, 1.0)
    with pytest.raises(ValueError, match="picks the gradient factor of one of 2 operands"):
        un.linear(X[None], jnp.ones((3, 2)), constraint="to_left_grad_scale")
    with pytest.raises(ValueError, match="picks the gradient factor of one of 1 operands"):
        un.matmul(X[None], jnp.ones((3, 2)), constraint="to_grad_input_scale")
    with pytest.raises(ValueError, match="returned must be positive"):
        un.constrained(lambda *s: -1.0, 1.0, 1.0)


def block(params, tau=0.5, up="to_output_scale", down="to_output_scale"):
    """A residual branch of two linear layers, 256 → 1024 → 256."""
    branch, skip = un.residual_split(params["x"], tau)
    branch = un.linear(branch, params["up"], constraint=up)
    return un.residual_add(un.linear(branch, params["down"], constraint=down), skip, tau)


SIZES = {"x": (48, 256), "up": (256, 1024), "down": (1024, 256)}
PARAMS = {name: normal(i, *shape) for i, (name, shape) in enumerate(SIZES.items())}


def test_one_constraint_in_a_residual_branch_gives_the_direction_of_the_true_gradient():
    found = un.verify_gradients(jax.jit(block), PARAMS)
    assert set(found) == set(SIZES)
    assert all(match.cosine > 1 - 1e-6 for match in found.values())
    # The true gradient of "down" has the factors 1024^-½ and, of the branch, τ / √(1 + τ²).
    expected = 48**-0.5 / (1024**-0.5 * 0.5 / 1.25**0.5)
    assert found["down"].ratio == pytest.approx(expected, rel=1e-4)
    assert found["x"].ratio == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("tau", [0.2, 0.5, 1.0])
def test_a_free_factor_in_a_residual_branch_is_caught(tau):
    """It halves the gradient of the branch, which is τ times as large as that around it."""
    half = partial(block, tau=tau, up=None)
    with pytest.raises(ValueError, match=r"(?s)leaf 'x': cosine 0\.9\d+, ratio .*Fix:") as caught:
        un.verify_gradients(half, PARAMS)
    assert "'up'" not in str(caught.value)  # nothing leads around it
    found = un.verify_gradients(half, PARAMS, tolerance=1.0)
    true, seen = np.array([1, tau]), np.array([1, tau / 2])
    cosine = true @ seen / np.linalg.norm(true) / np.linalg.norm(seen)
    assert found["x"].cosine == pytest.approx(cosine, abs=2e-3)


def test_what_counts_is_the_product_along_a_path():
    found = un.verify_gradients(partial(block, up=None, down=None), PARAMS)  # ½ and 2
    assert found["x"].cosine > 1 - 1e-6


def test_verification_is_of_floating_leaves_and_outputs_of_any_tree():
    def model(params, x):
        h = un.linear(x, params["w"]) + 0 * params["unused"][None]
        return {"h": h, "n": jnp.argmax(h), "loss": jnp.sum(jnp.square(h))}

    params = {"w": PARAMS["up"], "steps": jnp.array(3), "unused": jnp.ones(1024)}
    found = un.verify_gradients(model, params, PARAMS["x"])
    assert set(found) == {"w", "unused"}
    assert found["unused"].cosine == 1
    assert np.isnan(found["unused"].ratio)


def test_verification_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="no floating leaf among 1"):
        un.verify_gradients(lambda p: jnp.float32(1), {"a": jnp.arange(3)})
    with pytest.raises(ValueError, match="returns nothing floating"):
        un.verify_gradients(lambda p: jnp.argmax(p["a"]), {"a": X})
    with pytest.raises(ValueError, match="leaf 'a': cosine nan"):
        un.verify_gradients(lambda p: jnp.sum(p["a"]) * jnp.nan, {"a": X})
    turned = un.scaled(jnp.negative, 1.0)
    upside_down = jax.custom_vjp(lambda x: un.scale_fwd(x, 2.0))
    upside_down.defvjp(lambda x: (turned(x), None), lambda _, g: (g,))
    assert un.verify_gradients(lambda p: upside_down(p["a"]), {"a": X})["a"].cosine > 0.999


NHC = ("NHC", "HIO", "NHC")
SEQUENCE = (4, 6, 2, 8)
OPERATIONS = {
    "linear": (un.linear, (6, 8), (8, 5), (5,)),
    "matmul": (un.matmul, (6, 8), (8, 5)),
    "einsum": (partial(un.einsum, "sd,dhk->hsk"), (6, 8), (8, 2, 3)),
    "conv": (lambda x, w: un.conv(x, w, (2,), "SAME", dimension_numbers=NHC), (3, 9, 4), (3, 4, 5)),
    "gelu": (partial(un.gelu, mult=2.0), (6, 8)),
    "silu_glu": (un.silu_glu, (6, 8), (6, 8)),
    "softmax": (un.softmax, (6, 8)),
    "attention": (partial(un.attention, is_causal=True), *[SEQUENCE] * 3),
    "dropout": (lambda x: un.dropout(x, 0.3, jax.random.key(0)), (6, 8)),
    "layer_norm": (un.layer_norm, (6, 8), (8,), (8,)),
    "embedding": (partial(un.embedding, np.array([1, 0, 1, 3])), (5, 8)),
    "add": (un.add, (6, 8), (8,)),
    "residual": (lambda x: un.residual_add(*un.residual_split(x, 0.5), 0.5), (6, 8)),
    "cross_entropy": (lambda z: un.cross_entropy(z, np.array([1, 0, 1])), (3, 8)),
    "mse": (un.mse, (6, 8), (6, 8)),
}


def weighed(f):
    """A scalar of f, in float32, that depends on every element of its output."""

    def loss(*operands):
        out = f(*operands)
        weights = np.random.default_rng(0).standard_normal(out.shape).astype(np.float32)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    return loss


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_under_jit_vmap_scan_remat(name):
    f, *shapes = OPERATIONS[name]
    loss = jax.value_and_grad(lambda xs: weighed(f)(*xs)[0])
    stacked = [normal(i, 3, *shape) for i, shape in enumerate(shapes)]
    batched = jax.jit(jax.vmap(loss))(stacked)
    remat = jax.value_and_grad(lambda xs: jax.checkpoint(weighed(f))(*xs)[0])
    looped = jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, remat(x)), None, xs)[1])(stacked)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), batched, looped)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_narrow_dtypes(name):
    f, *shapes = OPERATIONS[name]
    both = jax.jit(jax.value_and_grad(lambda xs: weighed(f)(*xs), has_aux=True))
    is_loss = name in ("cross_entropy", "mse")
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = [normal(i, *shape).astype(dtype) for i, shape in enumerate(shapes)]
        (_, out), gradients = both(narrow)
        assert out.dtype == (jnp.float32 if is_loss else dtype)
        assert {g.dtype for g in gradients} == {jnp.dtype(dtype)}
        (_, wanted), wanted_gradients = both([x.astype(jnp.float32) for x in narrow])
        for a, b in zip([out, *gradients], [wanted, *wanted_gradients], strict=True):
            error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
            assert error < 4 * float(jnp.finfo(dtype).eps), f"{name}: {error}"


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_its_derivative_under_true_gradients(name):
    f, *shapes = OPERATIONS[name]
    operands = [normal(i, *shape) for i, shape in enumerate(shapes)]
    loss = lambda xs: weighed(f)(*xs)[0]  # noqa: E731
    with un.true_gradients():
        gradients = jax.jit(jax.grad(loss))(operands)
        slope = jax.jit(lambda xs: jax.jvp(loss, (xs,), (xs,))[1])(operands)
    along = sum(jnp.sum(g * x) for g, x in zip(gradients, operands, strict=True))
    np.testing.assert_allclose(along, slope, rtol=1e-4, atol=1e-4)
    if name != "dropout":
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jit(lambda xs: jax.jvp(loss, (xs,), (xs,))).lower(operands)


Q, LABELS = jnp.ones((2, 5, 4, 8)), jnp.arange(4)
REFUSALS = {
    r"activation's x must be floating": lambda: un.gelu(jnp.arange(3)),
    "mult must be known while tracing": lambda: jax.jit(lambda m: un.silu(X, mult=m))(2.0),
    r"mult must be positive": lambda: un.softmax(X, mult=-1.0),
    r"is not finite at -12.*clip": lambda: un.activation(jnp.log),
    r"has no scale: .*custom_jvp": lambda: un.activation(jnp.sign),
    r"axis=1 is no dimension of softmax's x": lambda: un.softmax(X, 1),
    r"attention got query .*jnp.swapaxes": lambda: un.attention(Q, Q[:, :4], Q),
    r"mask must be of booleans": lambda: un.attention(Q, Q, Q, mask=jnp.ones((5, 5))),
    r"mask or bias of shape \(3, 5, 5\)": lambda: un.attention(Q, Q, Q, jnp.ones((3, 5, 5))),
    r"records no weights": lambda: un.attention(Q, Q, Q, module=object()),
    r"length must be positive": lambda: un.attention_scale(0, 8),
    r"rate must be from 0 to below 1, got 1": lambda: un.dropout(X, 1.0),
    r"rate must be positive and finite": lambda: un.dropout(X, -0.1),
    r"rate=0.5 needs a key. Fix": lambda: un.dropout(X, 0.5),
    r"layer_norm got axis=\(0, 1\)": lambda: un.layer_norm(X, axis=(0, 1)),
    r"rms_norm's weight has shape \(2,\)": lambda: un.rms_norm(X, X[:2]),
    r"ids must be integers": lambda: un.embedding(X, jnp.ones((5, 2))),
    r"residual_add got a branch of shape \(1,\)": lambda: un.residual_add(X[:1], X, 0.5),
    r"tau must be positive": lambda: un.residual_split(X, 0.0),
    r"layers must be positive": lambda: un.residual_taus(0),
    r"labels must be integers": lambda: un.cross_entropy(Q[0, 0], jnp.ones(4)),
    r"labels have shape \(1, 4\).*one-hot": lambda: un.cross_entropy(Q[0, 0], LABELS[None]),
    r"axis=2 is no dimension": lambda: un.cross_entropy(Q[0, 0], LABELS, axis=2),
    r"'mean', 'sum' or 'none', got 'avg'": lambda: un.mse(X, X, reduction="avg"),
    r"mse got a prediction of shape \(3,\)": lambda: un.mse(X, X[:, None]),
}
"""Parts of the message, and what it is raised for."""


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_say_what_and_where(message):
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        REFUSALS[message]()
