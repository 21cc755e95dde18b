"""distillation_loss in use: dtypes, transformations, training, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

from tests.test_distill import ALL, LABELS, STATES, STUDENT, TARGETS, TEACHER, WHERE, reference
from uscale_jax._distill import distillation_loss


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_computed_in_float32(dtype):
    narrow = lambda x: jnp.asarray(x).astype(dtype)  # noqa: E731
    states, targets = ([narrow(x) for x in xs] for xs in (STATES, TARGETS))
    kwargs = ALL | {"hidden": states, "teacher_hidden": targets}
    z, t = narrow(STUDENT), narrow(TEACHER)
    found, grad = jax.value_and_grad(distillation_loss)(z, t, **kwargs)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference(z, t, **kwargs), rtol=3e-6)
    assert grad.dtype == dtype


def test_dtypes_may_differ():
    with jax.enable_x64(True):
        z = jnp.asarray(STUDENT).astype(jnp.bfloat16)
        states = [jnp.asarray(x, jnp.float64) for x in STATES]
        kwargs = ALL | {"hidden": [states[0], STATES[1]], "labels": LABELS.astype(np.uint8)}
        found = distillation_loss(z, TEACHER, **kwargs)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, reference(z, TEACHER, **kwargs), rtol=3e-6)


def test_it_runs_under_jit_with_everything_traced():
    arrays = {**ALL, "temperature": 3.0, "label_weight": 0.3}
    found = jax.jit(distillation_loss)(STUDENT, TEACHER, **arrays)
    np.testing.assert_allclose(found, reference(STUDENT, TEACHER, **ALL), rtol=3e-6)


def test_it_maps_over_examples():
    fun = lambda z, t, w, h, th, y: distillation_loss(  # noqa: E731
        z, t, where=w, hidden=h, teacher_hidden=th, labels=y, label_weight=0.3, temperature=2.0
    )
    args = (STUDENT, TEACHER, WHERE, STATES, TARGETS, LABELS)
    found = jax.vmap(fun)(*args)
    wanted = [fun(*jax.tree.map(lambda x: x[i], args)) for i in range(2)]  # noqa: B023
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_it_runs_where_shardings_are_types():
    kind = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        args = jax.device_put((STUDENT, TEACHER, STATES, TARGETS, LABELS), rows)
        kwargs = {"temperature": 3.0, "where": WHERE, "hidden_weight": 0.7, "label_weight": 0.3}
        fun = lambda z, t, h, th, y: distillation_loss(  # noqa: E731
            z, t, hidden=h, teacher_hidden=th, labels=y, **kwargs
        )
        found, grad = jax.jit(jax.value_and_grad(fun))(*args)
    np.testing.assert_allclose(found, reference(STUDENT, TEACHER, **ALL), rtol=3e-6)
    assert grad.sharding.spec[0] == "data"


def test_hidden_states_meet_by_name():
    states = {"mlp": STATES[0], "attention": STATES[1]}
    targets = FrozenDict({"attention": TARGETS[1], "mlp": TARGETS[0]})
    found = distillation_loss(STUDENT, TEACHER, hidden=states, teacher_hidden=targets)
    wanted = reference(STUDENT, TEACHER, hidden=STATES, teacher_hidden=TARGETS)
    np.testing.assert_allclose(found, wanted, rtol=3e-6)
    found = distillation_loss(STUDENT, TEACHER, hidden=tuple(STATES), teacher_hidden=list(TARGETS))
    np.testing.assert_allclose(found, wanted, rtol=3e-6)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("with_hidden", [False, True])
def test_a_student_trains_towards_its_teacher(with_hidden):
    def apply(params, x):
        h = jnp.tanh(x @ params["up"])
        return h @ params["down"], h

    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    x, kept = draw(13, 5), jnp.array([0, 2, 5])
    big = {"up": draw(5, 7), "down": draw(7, 3)}
    small = {"up": big["up"][:, kept], "down": big["down"][kept]}
    targets, wide = apply(big, x)
    states = jnp.take(wide, kept, axis=-1) if with_hidden else ()

    def loss(params):
        logits, h = apply(params, x)
        own = h if with_hidden else ()
        return distillation_loss(
            logits, targets, temperature=2.0, hidden=own, teacher_hidden=states
        )

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = small, optimizer.init(small), []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.6 * losses[0]
    assert losses == sorted(losses, reverse=True)


BOTH = {"hidden": STATES, "teacher_hidden": TARGETS}
WIDE = {"hidden": [STATES[0]], "teacher_hidden": [TARGETS[1]]}
REFUSALS = {
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature must be in the range 0 < T"),
    "temperature < 0": ({"temperature": -2.0}, ValueError, "got -2.0"),
    "temperature inf": ({"temperature": np.inf}, ValueError, "got inf"),
    "temperature nan": ({"temperature": jnp.float32(np.nan)}, ValueError, "got nan"),
    "temperatures": ({"temperature": np.ones(5)}, ValueError, "must be a scalar, got shape (5,)"),
    "label_weight": ({"labels": LABELS, "label_weight": 1.1}, ValueError, "range 0 to 1, got 1.1"),
    "label_weight < 0": ({"labels": LABELS, "label_weight": -0.1}, ValueError, "got -0.1"),
    "no labels": ({"label_weight": 0.5}, ValueError, "label_weight=0.5 needs labels"),
    "labels": ({"labels": LABELS[0], "label_weight": 0.5}, ValueError, "Expected: (2, 5)"),
    "one-hot": ({"labels": STUDENT, "label_weight": 0.5}, TypeError, "labels must be integers"),
    "hidden_weight": (BOTH | {"hidden_weight": -1.0}, ValueError, "range 0 or more, got -1.0"),
    "where": ({"where": WHERE[:, :3]}, ValueError, "where has shape (2, 3). Expected: what"),
    "where rank": ({"where": WHERE[None]}, ValueError, "the shape (2, 5) of logits without"),
    "where weights": ({"where": STUDENT[..., 0]}, TypeError, "where must be booleans"),
    "axis": ({"axis": 3}, ValueError, "axis=3 is no dimension of logits of shape (2, 5, 7)"),
    "no teacher": (
        {"hidden": STATES},
        ValueError,
        "hidden holds 2 states (0, 1), teacher_hidden 0",
    ),
    "no student": ({"teacher_hidden": STATES}, ValueError, "hidden holds 0 states (none)"),
    "number": (
        {"hidden": STATES, "teacher_hidden": TARGETS[:1]},
        ValueError,
        "sequences of equal length",
    ),
    "names": (
        {"hidden": {"a": STATES[0]}, "teacher_hidden": {"b": TARGETS[0]}},
        ValueError,
        "1 states (a), teacher_hidden 1 (b)",
    ),
    "width": (
        WIDE,
        ValueError,
        (
            "'0' has shape (2, 5, 3), that of the teacher (2, 5, 11). Expected: equal shapes. Fix: "
            "take the 3 units of the teacher that the student has kept, jnp.take(state, "
            "jnp.asarray(kept), axis=2)"
        ),
    ),
    "state rank": (
        {"hidden": STATES[0], "teacher_hidden": TARGETS[0][0]},
        ValueError,
        "take the same states",
    ),
    "integer states": (
        {"hidden": LABELS, "teacher_hidden": LABELS},
        TypeError,
        "hidden state '(the tree itself)' must be floating",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_it_refuses(case):
    kwargs, kind, words = REFUSALS[case]
    with pytest.raises(kind) as error:
        distillation_loss(STUDENT, TEACHER, **kwargs)
    assert words in str(error.value)


def test_it_refuses_logits_that_are_no_pair():
    with pytest.raises(ValueError, match=r"shape \(2, 5, 7\), teacher_logits \(2, 5, 6\)"):
        distillation_loss(STUDENT, TEACHER[..., :6])
    with pytest.raises(ValueError, match="the same positions"):
        distillation_loss(STUDENT, TEACHER[:1])
    with pytest.raises(TypeError, match="teacher_logits must be floating, got int"):
        distillation_loss(STUDENT[:, 0], LABELS)
    with pytest.raises(ValueError, match=r"no dimension of logits of shape \(\)"):
        distillation_loss(1.0, 2.0)


def test_traced_numbers_are_not_looked_at():
    run = jax.jit(lambda t, w: distillation_loss(STUDENT, TEACHER, temperature=t, hidden_weight=w))
    assert np.isfinite(run(2.0, -1.0))
    with pytest.raises(ValueError, match="needs labels"):
        jax.jit(lambda w: distillation_loss(STUDENT, TEACHER, label_weight=w))(0.0)
