"""Coordinate checks: verdicts on exponents, messages, pictures, and what is refused."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import uscale_jax as us
from tests.test_coordinate_numbers import squared, two_layers, two_layers_params
from uscale_jax._coordinate_report import CoordinateCheck, Row

pytestmark = pytest.mark.usefixtures("standard_promotion")


def judged(*rows, tolerance=0.25):
    """A check of modules with exponents of size and of change after both of two steps."""
    widths = np.array([32, 64, 128])
    powers = {str(i): (size, changes) for i, (_, size, changes) in enumerate(rows)}
    law = lambda power: 0.5 * (widths / 32.0) ** power  # noqa: E731
    return CoordinateCheck(
        widths=(*widths.tolist(),),
        modules={str(i): row for i, (row, *_) in enumerate(rows)},
        sizes={name: np.stack([law(size)] * 3, 1) for name, (size, _) in powers.items()},
        changes={
            name: np.stack([0 * widths, *map(law, changes)], 1)
            for name, (_, changes) in powers.items()
        },
        tolerance=tolerance,
    )


HIDDEN = Row("product", "model.py:3", 1e-7, fades=False)
READOUT = Row("product", "model.py:9", 1e-7, fades=True)
SCORES = Row("activations", "model.py:5", 1e-7, fades=True)


@pytest.mark.parametrize(
    ("row", "size", "changes", "wanted"),
    [
        (HIDDEN, 0.0, (0.2, -0.2), []),
        (HIDDEN, 0.5, (0.0, 0.0), [("starts larger", 0)]),
        (HIDDEN, -0.5, (0.0, 0.0), [("starts smaller", 0)]),
        (HIDDEN, 0.0, (0.5, 0.1), [("grows", 1)]),
        (HIDDEN, 0.0, (0.0, 0.5), [("grows", 2)]),
        (HIDDEN, 0.0, (-0.5, 0.0), []),
        (HIDDEN, 0.0, (-0.5, -0.5), [("vanishes", 1)]),
        (HIDDEN, 0.0, (0.0, -0.5), [("vanishes", 2)]),
        (READOUT, -1.0, (0.0, 0.0), []),
        (READOUT, 0.5, (0.0, 0.0), [("starts larger", 0)]),
        (READOUT, -0.5, (-0.5, -0.5), [("vanishes", 1)]),
        (SCORES, -0.5, (-0.5, -0.5), []),
        (SCORES, -0.5, (-1.0, -1.0), [("vanishes", 1)]),
        (SCORES, 0.0, (0.5, 0.5), [("grows", 1)]),
    ],
)
def test_verdicts(row, size, changes, wanted):
    check = judged((row, size, changes))
    assert [(fault.what, fault.since) for fault in check.faults["0"]] == wanted
    assert check.ok == (not wanted)
    assert all(f"{row.source}" in text and "Fix:" in text for text in check.failures.values())


def test_a_module_in_its_own_units_is_judged_by_what_reads_it():
    own = HIDDEN._replace(readers=("1",))
    assert judged((own, -0.5, (-0.5, -0.5)), (HIDDEN, 0.0, (0.0, 0.0))).ok
    assert "ok, by what reads it" in str(
        judged((own, -0.5, (-0.5, -0.5)), (HIDDEN, 0.0, (0.0, 0.0)))
    )
    assert not judged((own, 0.0, (-0.5, -0.5)), (HIDDEN, 0.0, (0.0, 0.0))).ok
    assert not judged((own, -0.5, (-0.5, -0.5)), (HIDDEN, -0.5, (0.0, 0.0))).ok
    assert not judged((HIDDEN, -0.5, (-0.5, -0.5)), (HIDDEN, 0.0, (0.0, 0.0))).ok


def test_a_change_that_is_rounding_proves_nothing():
    (fault,) = judged((HIDDEN._replace(rounding=0.6), 0.0, (0.0, 0.0))).faults["0"]
    assert fault.what == "is rounded away"


def test_what_went_wrong_first_comes_first():
    check = judged((HIDDEN, 0.0, (0.0, -0.5)), (HIDDEN, 0.0, (0.5, 0.5)), (HIDDEN, 0.5, (0.0, 0.0)))
    assert [*check.failures] == ["2", "1", "0"]


def test_a_message():
    check = judged((HIDDEN, 0.0, (0.5, 0.1)), (HIDDEN, 0.0, (0.0, 0.0)))
    wanted = (
        "1 of 2 modules do not train alike at widths 32 to 128.\n"
        "  '0' (product at model.py:3): its change after step 1 grows with width, as "
        "width^+0.50: 0.5 at 32 to 1 at 128. Fix: let its leaves learn more slowly with width, "
        "or multiply it by less\n"
        "Expected: changes of outputs that are the same at all widths, exponents of ±0.25. Fix: "
    )
    with pytest.raises(ValueError, match=re.escape(wanted)):
        check.raise_if_failed()


def test_a_module_that_moves_at_some_widths_only():
    check = judged((HIDDEN, 0.0, (0.0, 0.0)), (HIDDEN, 0.0, (0.0, 0.0)))
    check.changes["0"][0], check.changes["1"][-1] = 0, 0
    assert [check.faults[name][0].what for name in ("0", "1")] == ["grows", "vanishes"]


def test_a_plot(tmp_path):
    rows = [(HIDDEN, 0.0, (0.0, 0.0))] * 10 + [(HIDDEN, 0.0, (0.5, 0.5))]
    judged(*rows).plot(tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        judged((HIDDEN, 0.0, (0.0, 0.0))).plot(tmp_path / "check.png")


# What is refused


def tiny(n=4, lr=0.1):
    return us.Width(two_layers, two_layers_params(jax.random.key(0), n), optax.sgd(lr))


BATCH = (np.ones((11, 7), np.float32), np.ones((11, 3), np.float32))
PAIR = {4: tiny(4), 8: tiny(8)}


@pytest.mark.parametrize(
    ("models", "batches", "loss", "options", "text"),
    [
        ({4: tiny()}, [BATCH], squared, {}, r"models are of widths \[4\]. Expected: .* two widths"),
        ({4: tiny(), 0: tiny()}, [BATCH], squared, {}, "positive integers"),
        ({4: tiny(), 8: two_layers}, [BATCH], squared, {}, "the model of width 8 is .*us.Width"),
        (PAIR, [], squared, {}, "there are 0 batches"),
        (PAIR, [BATCH], squared, {"inputs": 3}, "apply takes 3"),
        (PAIR, [BATCH], squared, {"steps": 0}, "steps=0"),
        (PAIR, [BATCH], squared, {"seeds": ()}, "seeds=()"),
        (PAIR, [BATCH], None, {}, "loss is None"),
        (PAIR, [BATCH], lambda y, *_: jnp.square(y), {}, r"loss\(outputs.* is float32\[11,3\]"),
        ({4: tiny(), 8: tiny(8, 1e38)}, [BATCH], squared, {}, "not finite at width 8 after step 1"),
        ({4: tiny(), 8: tiny(8, np.nan)}, [BATCH], squared, {}, "lower the learning rate"),
        (PAIR, [(np.nan * BATCH[0], BATCH[1])], squared, {}, r"'in' \(product at .*step 0.*NaN"),
    ],
)
def test_refusals(models, batches, loss, options, text):
    with pytest.raises(ValueError, match=text):
        us.coordinate_check(models, batches, loss, **options)


def test_models_that_differ_are_refused_with_the_difference():
    other = tiny(8)._replace(apply=lambda p, x: two_layers(p, x @ (p["in"] @ p["in"].T)))
    with pytest.raises(ValueError, match="widths 4 and 8 do not have the same modules") as error:
        us.coordinate_check({4: tiny(), 8: other}, [BATCH], squared)
    assert "'in #2'" in str(error.value)
    assert "of width 8 only" in str(error.value)


def test_errors_of_the_model_say_how_it_was_called():
    with pytest.raises(TypeError) as error:
        us.coordinate_check(PAIR, [BATCH], squared, inputs=2)
    assert any("inputs=" in note for note in error.value.__notes__)
