"""distillation_loss: against NumPy in float64, gradients, masks, dtypes, training, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uscale_jax._distill import distillation_loss

RNG = np.random.default_rng(11)
STUDENT = (RNG.standard_normal((2, 5, 7)) * 2).astype(np.float32)
TEACHER = (STUDENT + RNG.standard_normal((2, 5, 7))).astype(np.float32)
LABELS = RNG.integers(0, 7, (2, 5))
WHERE = np.array([[True, False, True, True, False], [False, True, True, False, True]])
STATES = [RNG.standard_normal((2, 5, n)).astype(np.float32) for n in (3, 11)]
TARGETS = [(x + RNG.standard_normal(x.shape)).astype(np.float32) for x in STATES]


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def reference(
    student,
    teacher,
    temperature=1.0,
    where=None,
    hidden=(),
    teacher_hidden=(),
    hidden_weight=1.0,
    labels=None,
    label_weight=0.0,
):
    """The formula, position by position, in float64."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    where = np.ones(student.shape[:-1], bool) if where is None else where
    soft, hard = [], []
    for at in zip(*np.nonzero(where), strict=True):
        p, q = softmax(teacher[at] / temperature), softmax(student[at] / temperature)
        some = p > 0
        soft.append(temperature**2 * np.sum(p[some] * np.log(p[some] / q[some])))
        if labels is not None:
            hard.append(-np.log(softmax(student[at])[labels[at]]))
    total = (1 - label_weight) * np.mean(soft)
    if labels is not None:
        total += label_weight * np.mean(hard)
    errors = []
    for h, t in zip(hidden, teacher_hidden, strict=True):
        h, t = np.asarray(h, np.float64)[where], np.asarray(t, np.float64)[where]
        errors.append(np.mean((h - t) ** 2) / np.mean(t**2))
    return total + (hidden_weight * np.mean(errors) if errors else 0.0)


ALL = {
    "temperature": 3.0,
    "where": WHERE,
    "hidden": STATES,
    "teacher_hidden": TARGETS,
    "hidden_weight": 0.7,
    "labels": LABELS,
    "label_weight": 0.3,
}
CASES = {
    "logits": {},
    "temperature": {"temperature": 2.5},
    "cold": {"temperature": 0.2},
    "where": {"where": WHERE, "temperature": 1.5},
    "hidden": {"hidden": STATES, "teacher_hidden": TARGETS},
    "labels": {"labels": LABELS, "label_weight": 0.25, "temperature": 4.0},
    "labels alone": {"labels": LABELS, "label_weight": 1.0},
    "all": ALL,
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case):
    found = distillation_loss(STUDENT, TEACHER, **CASES[case])
    assert found.shape == ()
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference(STUDENT, TEACHER, **CASES[case]), rtol=3e-6)


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_classes_may_be_any_dimension(axis):
    moved = [np.moveaxis(x, -1, axis) for x in (STUDENT, TEACHER)]
    found = distillation_loss(*moved, axis=axis, **ALL)
    np.testing.assert_allclose(found, reference(STUDENT, TEACHER, **ALL), rtol=3e-6)


def test_one_position_needs_no_batch():
    found = distillation_loss(STUDENT[0, 0], TEACHER[0, 0], labels=3, label_weight=0.5)
    wanted = reference(STUDENT[0, :1], TEACHER[0, :1], labels=np.array([3]), label_weight=0.5)
    np.testing.assert_allclose(found, wanted, rtol=3e-6)


def test_every_case_moves_the_loss():
    losses = [float(distillation_loss(STUDENT, TEACHER, **kwargs)) for kwargs in CASES.values()]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("noise", [1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 20.0, 100.0])
def test_float32_is_accurate_near_the_teacher_and_at_high_temperatures(noise, temperature):
    """Where the sum of p·log(p/q) alone is rounding: off by 16 times, and negative."""
    teacher = (RNG.standard_normal((3, 997)) * 3).astype(np.float32)
    student = (teacher + RNG.standard_normal(teacher.shape) * noise).astype(np.float32)
    found = distillation_loss(student, teacher, temperature=temperature)
    np.testing.assert_allclose(found, reference(student, teacher, temperature), rtol=3e-4)


def central_differences(fun, x, step=1e-5):
    grad = np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * step
            grad[at] += sign * float(fun(moved)) / (2 * step)
    return grad


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_finite_differences(case):
    with jax.enable_x64(True):
        kwargs = {k: v for k, v in CASES[case].items() if k != "hidden"}
        states = CASES[case].get("hidden", [])

        def of_logits(z):
            return distillation_loss(z, TEACHER, **kwargs, hidden=states)

        z = STUDENT.astype(np.float64)
        wanted = central_differences(jax.jit(of_logits), z)
        np.testing.assert_allclose(jax.grad(of_logits)(z), wanted, rtol=1e-6, atol=1e-9)
        assert np.any(wanted != 0)
        if states:

            def of_state(h):
                return distillation_loss(z, TEACHER, **kwargs, hidden=[states[0], h])

            h = states[1].astype(np.float64)
            wanted = central_differences(jax.jit(of_state), h)
            np.testing.assert_allclose(jax.grad(of_state)(h), wanted, rtol=1e-6, atol=1e-9)


def test_the_temperature_has_a_gradient():
    """With classes that are ruled out, whose −inf / T would make it NaN."""
    out = np.arange(7) == 2
    student, teacher = (np.where(out, -np.inf, x.astype(float)) for x in (STUDENT, TEACHER))
    with jax.enable_x64(True):
        loss = lambda t: distillation_loss(student, teacher, temperature=t)  # noqa: E731
        wanted = (loss(1.7 + 1e-5) - loss(1.7 - 1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(loss)(1.7), wanted, rtol=1e-6)


def test_gradients_keep_their_size_at_high_temperatures():
    """Hinton et al. 2015, Eq. 4: (z - v) / C, of logits with mean 0, times the T² of the loss."""
    student, teacher = (x[0] - x[0].mean(-1, keepdims=True) for x in (STUDENT, TEACHER))
    limit = (student - teacher) / 7 / len(student)
    errors = []
    for temperature in (1e2, 1e3, 1e4):
        with jax.enable_x64(True):
            wide = [x.astype(np.float64) for x in (student, teacher)]
            grad = np.asarray(jax.grad(distillation_loss)(*wide, temperature=temperature))
        errors.append(np.abs(grad - limit).max() / np.abs(limit).max())
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 8
    assert errors[2] < errors[1] / 8


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0, 300.0])
def test_the_teacher_itself_is_the_minimum(temperature):
    ruled_out = np.where(np.arange(7) == 4, -np.inf, TEACHER)
    for teacher in (TEACHER, ruled_out):
        fun = partial(distillation_loss, temperature=temperature, teacher_hidden=TARGETS)
        loss = lambda z, h: fun(z, teacher, hidden=h)  # noqa: B023, E731
        value, grads = jax.value_and_grad(loss, (0, 1))(teacher, TARGETS)
        assert value == 0
        assert not any(np.any(g) for g in jax.tree.leaves(grads))
        moved = np.where(np.isfinite(teacher), teacher + STUDENT / 100, teacher)
        assert fun(moved, teacher, hidden=TARGETS) > 0
        assert fun(teacher, teacher, hidden=[TARGETS[0], TARGETS[1] * 1.01]) > 0


@pytest.mark.parametrize("size", [80.0, 95.0, 100.0, 3e4])
def test_models_that_are_sure_of_different_classes(size):
    """Probabilities at the end of float32's range, and beyond it."""
    student, teacher = np.float32([[0, size, -1]]), np.float32([[size, 0, 2]])
    found, grad = jax.value_and_grad(distillation_loss)(student, teacher)
    np.testing.assert_allclose(found, size, rtol=1e-6)
    np.testing.assert_allclose(grad, [[-1, 1, 0]], atol=1e-6)


def test_a_constant_added_to_logits_changes_nothing():
    found = distillation_loss(STUDENT + 300, TEACHER - 200, temperature=0.5)
    np.testing.assert_allclose(found, reference(STUDENT, TEACHER, 0.5), rtol=1e-3)


def test_no_gradient_reaches_the_teacher():
    def loss(teacher, targets):
        kwargs = ALL | {"teacher_hidden": targets}
        return distillation_loss(STUDENT, teacher, **kwargs)

    for grad in jax.tree.leaves(jax.grad(loss, (0, 1))(TEACHER, TARGETS)):
        assert not np.any(grad)


def test_the_teacher_may_be_the_student():
    """Of one array used for both, only the student's part has a gradient."""
    grad = jax.grad(lambda z: distillation_loss(z, 2 * z))(jnp.asarray(STUDENT))
    wanted = jax.grad(distillation_loss)(STUDENT, 2 * STUDENT)
    np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_masked_has_no_influence(kind):
    def loss(z, h, teacher, targets):
        labels = np.where(WHERE, LABELS, -100)
        kwargs = ALL | {"hidden": h, "teacher_hidden": targets, "labels": labels}
        return distillation_loss(z, teacher, **kwargs)

    run = jax.value_and_grad(loss, (0, 1))
    clean = (STUDENT, STATES, TEACHER, TARGETS)
    value, grads = run(*clean)
    spoil = lambda x: np.where(WHERE[..., None], x, np.float32(kind))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, (value, grads), run(*jax.tree.map(spoil, clean)))
    assert np.isfinite(value)
    for grad in jax.tree.leaves(grads):
        assert not np.any(grad[~WHERE])


def test_where_broadcasts_to_positions():
    for mask in (WHERE[:1], WHERE[0], np.array([[True], [False]]), np.array(True)):
        full = np.broadcast_to(mask, (2, 5))
        found = distillation_loss(STUDENT, TEACHER, **(ALL | {"where": mask}))
        np.testing.assert_allclose(
            found, reference(STUDENT, TEACHER, **(ALL | {"where": full})), rtol=3e-6
        )


def test_nothing_kept_gives_0():
    kwargs = ALL | {"where": np.array(False)}
    loss = lambda z, h: distillation_loss(z, TEACHER, **(kwargs | {"hidden": h}))  # noqa: E731
    value, grads = jax.value_and_grad(loss, (0, 1))(STUDENT, STATES)
    assert value == 0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_states_with_other_leading_dimensions_are_averaged_whole():
    pooled, target = STATES[0][:, 0], TARGETS[0][:, 0]
    kwargs = {"where": WHERE, "hidden": (pooled,), "teacher_hidden": (target,)}
    found = distillation_loss(STUDENT, TEACHER, **kwargs)
    error = np.mean((pooled - target) ** 2) / np.mean(target**2)
    wanted = reference(STUDENT, TEACHER, where=WHERE) + error
    np.testing.assert_allclose(found, wanted, rtol=3e-6)


def test_states_of_one_number_a_position_are_masked():
    state, target = STATES[0][..., 0], TARGETS[0][..., 0]
    kwargs = {"where": WHERE, "hidden": state, "teacher_hidden": target}
    found = distillation_loss(STUDENT, TEACHER, **kwargs)
    wanted = reference(STUDENT, TEACHER, where=WHERE, hidden=[state], teacher_hidden=[target])
    np.testing.assert_allclose(found, wanted, rtol=3e-6)


def test_a_dead_state_of_the_teacher_is_not_divided_by():
    dead = np.zeros_like(TARGETS[0])
    loss = lambda h: distillation_loss(TEACHER, TEACHER, hidden=h, teacher_hidden=dead)  # noqa: E731
    value, grad = jax.value_and_grad(loss)(STATES[0])
    np.testing.assert_allclose(value, np.mean(STATES[0] ** 2), rtol=1e-6)
    np.testing.assert_allclose(grad, 2 * STATES[0] / dead.size, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("value", [-np.inf, np.finfo(np.float32).min])
def test_classes_ruled_out_in_both_are_left_out(value, temperature):
    out = np.zeros((2, 5, 7), bool)
    out[:, :, 2] = out[0, 1, 5] = True
    student, teacher = (np.where(out, value, x).astype(np.float32) for x in (STUDENT, TEACHER))
    loss = partial(distillation_loss, temperature=temperature)
    found, grad = jax.value_and_grad(loss)(student, teacher)
    np.testing.assert_allclose(found, reference(student, teacher, temperature), rtol=3e-6)
    assert not np.any(grad[out])
    assert np.all(grad[~out] != 0)


def test_a_class_that_only_the_teacher_rules_out_costs_its_share():
    teacher = np.where(np.arange(7) == 3, -np.inf, TEACHER).astype(np.float32)
    found, grad = jax.value_and_grad(distillation_loss)(STUDENT, teacher)
    np.testing.assert_allclose(found, reference(STUDENT, teacher), rtol=3e-6)
    q = jax.nn.softmax(STUDENT)
    np.testing.assert_allclose(grad, (q - jax.nn.softmax(teacher)) / 10, rtol=1e-4, atol=1e-7)


def test_a_class_that_only_the_student_rules_out_is_infinitely_far():
    student = np.where(np.arange(7) == 3, -np.inf, STUDENT).astype(np.float32)
    found, grad = jax.value_and_grad(distillation_loss)(student, TEACHER)
    assert found == np.inf
    assert np.all(np.isfinite(grad))


def test_labels_alone_do_not_look_at_the_teacher():
    """0 times an infinite divergence would be NaN."""
    student = np.where(np.arange(7) == 3, -np.inf, STUDENT).astype(np.float32)
    labels = np.where(LABELS == 3, 1, LABELS)
    found = distillation_loss(student, TEACHER, labels=labels, label_weight=1.0)
    wanted = -np.mean([np.log(softmax(student[at])[labels[at]]) for at in np.ndindex(2, 5)])
    np.testing.assert_allclose(found, wanted, rtol=3e-6)


def test_positions_without_a_target_do_not_count():
    teacher, student = TEACHER.copy(), STUDENT.copy()
    teacher[~WHERE] = student[0, 1] = -np.inf
    found, grad = jax.value_and_grad(distillation_loss)(student, teacher)
    np.testing.assert_allclose(found, reference(STUDENT, TEACHER, where=WHERE), rtol=3e-6)
    assert not np.any(grad[~WHERE])
    assert np.all(np.isfinite(grad))


def test_nothing_on_the_way_is_nan():
    """As ``jax_debug_nans`` sees it, where classes, positions and labels are left out."""
    student, teacher = (np.where(np.arange(7) == 2, -np.inf, x) for x in (STUDENT, TEACHER))
    teacher[1, 4] = -np.inf
    kwargs = ALL | {"labels": np.where(LABELS == 2, 1, LABELS)}
    with jax.debug_nans(True):
        jax.grad(distillation_loss)(jnp.asarray(student), jnp.asarray(teacher), **kwargs)


def test_nan_in_what_counts_is_not_hidden():
    spoilt = STUDENT.copy()
    spoilt[0, 0, 3] = np.nan
    assert np.isnan(distillation_loss(spoilt, TEACHER, where=WHERE))
    assert np.isnan(distillation_loss(STUDENT, spoilt, where=WHERE))


@pytest.mark.parametrize("label", [-1, -100, 7])
def test_labels_that_are_no_class_are_not_read_as_another(label):
    labels = LABELS.copy()
    labels[0, 0] = label
    run = jax.jit(partial(distillation_loss, label_weight=0.5))
    assert np.isnan(run(STUDENT, TEACHER, labels=labels))
    where = np.ones((2, 5), bool)
    where[0, 0] = False
    found = run(STUDENT, TEACHER, labels=labels, where=where)
    wanted = reference(STUDENT, TEACHER, labels=LABELS, label_weight=0.5, where=where)
    np.testing.assert_allclose(found, wanted, rtol=3e-6)
