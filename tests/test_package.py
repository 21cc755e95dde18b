"""What a user meets first: imports, public names, the README's code."""

import ast
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import uscale_jax as us

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_importing_the_library_does_not_import_flax_or_matplotlib():
    code = "import sys, uscale_jax; print(sorted({m.split('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = ast.literal_eval(out.stdout)
    assert {"jax", "optax", "uscale_jax"} <= set(modules)
    assert not {"flax", "matplotlib", "rich", "orbax", "scipy.optimize"} & set(modules)


def public_names() -> list[str]:
    return [
        name
        for name, what in vars(us).items()
        if not name.startswith("_") and not isinstance(what, types.ModuleType)
    ]


def test_every_public_name_is_documented_and_in_the_readme():
    for name in public_names():
        assert getattr(us, name).__doc__, name
        assert f"`{name}" in README or f"us.{name}" in README, f"{name} is not in the README"


def test_public_functions_are_annotated_and_show_an_example():
    for name in public_names():
        function = getattr(us, name)
        if isinstance(function, type):
            continue
        assert "return" in function.__annotations__, name
        assert ">>>" in function.__doc__, name
        assert "Raises:" in function.__doc__, name


def readme_blocks() -> list[tuple[str, str | None]]:
    """Every python block of the README with the text block that follows it at once, if any."""
    pattern = r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?"
    return [(code, output or None) for code, output in re.findall(pattern, README, re.DOTALL)]


@pytest.mark.filterwarnings("ignore::uscale_jax.UnitScaleOrderWarning")
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("block", range(len(readme_blocks())))
def test_the_readmes_code_runs_and_prints_what_it_says(block, capsys):
    code, output = readme_blocks()[block]
    exec(compile(code, f"README.md block {block}", "exec"), {"__name__": "readme"})
    if output is not None:
        assert capsys.readouterr().out.split() == output.split()


def test_the_readmes_first_example_is_short():
    code, output = readme_blocks()[0]
    assert len(code.strip().splitlines()) <= 20
    assert output
