"""The benchmarks package: command line, resuming, corpus and timing."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import cli, data, plots, registry, runner, timing
from benchmarks.registry import Benchmark, Case, Claim, Options, Panel, Plot, Report, Series, Table
from benchmarks.store import CaseStore, write_atomic
from benchmarks.suite import tour


def text_folder(folder: Path, files: int = 12) -> Path:
    for index in range(files):
        path = folder / f"part{index % 3}" / f"file{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"line of file {index}\n" * 600, encoding="utf-8")
    return folder


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code and the only line on stderr; nothing may be on stdout."""
    try:
        code = cli.main(arguments)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return code, captured.err


# Command line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--seed", "-1"], "seed"),
        (["--seed", "x"], "seed"),
        (["--seed"], "seed"),
        (["--quick", "--full"], "not allowed"),
        (["run"], "NAME"),
        (["run", "nothing"], "unknown benchmark 'nothing'"),
        (["dance"], "invalid choice"),
        (["--data", "/no/such/path"], "no data"),
        (["--wrong"], "unrecognized"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, line = error_line(capsys, *arguments)
    assert code == 2
    assert word in line


@pytest.mark.parametrize("content", [b"", b"short", b"\xff\xfe\x00" * 50_000])
def test_useless_data_is_one_line_and_code_2(content, capsys, tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    code, line = error_line(capsys, "--data", str(path), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "bytes" in line


def test_empty_folder_and_out_that_is_a_file(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    out = ["--out", str(tmp_path / "out")]
    assert error_line(capsys, "--data", str(tmp_path / "empty"), *out)[0] == 2
    assert error_line(capsys, "--out", str(tmp_path / "file"))[0] == 2
    assert error_line(capsys, "--out", str(tmp_path / "file" / "below"))[0] == 2


def test_options_before_and_after_run():
    parsed = cli.parse(["--seed", "3", "run", "tour", "--quick", "--json"])
    assert (parsed.seed, parsed.full, parsed.json, parsed.names) == (3, False, True, ["tour"])
    assert cli.parse([]).names == ["tour"]
    assert cli.parse([]).full is None


def test_list_and_discovery(capsys):
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out.startswith("tour ")
    assert registry.discover()["tour"].cases is tour.BENCHMARK.cases
    with pytest.raises(registry.UsageError):
        registry.select(["tour", "missing"])


# Running and resuming


class Fake:
    """A benchmark of two cases whose second can be interrupted."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.interrupt = True
        self.value = 1.5

    def run(self, name: str, options: Options, progress: registry.Progress) -> dict:
        self.ran.append(name)
        progress.start(2, "steps")
        progress.advance(1, "half")
        if name == "second" and self.interrupt:
            raise KeyboardInterrupt
        progress.advance(1)
        return {"value": self.value, "broken": float("nan")}

    def report(self, results: dict, options: Options) -> Report:
        value = results["first"]["value"]
        series = Series("values", (0.0, 1.0), (value, None))
        return Report(
            tables=(Table("values [b]", ("case", "value"), (("first", f"{value}"),)),),
            plots=(Plot("line", "a plot", (Panel("panel", "x", "y", (series,)),)),),
            claims=(Claim("the value is small", value < 2, f"{value} < 2"),),
        )

    def benchmark(self) -> Benchmark:
        cases = [Case(name, partial(self.run, name)) for name in ("first", "second")]
        return Benchmark("fake", "two cases", lambda options: cases, self.report)


@pytest.fixture
def fake(monkeypatch) -> Iterator[Fake]:
    fake = Fake()
    module = SimpleNamespace(BENCHMARK=fake.benchmark())
    monkeypatch.setattr(
        registry.pkgutil,
        "iter_modules",
        lambda path: [SimpleNamespace(name="fake"), SimpleNamespace(name="_helper")],
    )
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: module)
    return fake


def test_interrupt_then_resume(fake, capsys, tmp_path):
    command = ["run", "fake", "--quick", "--out", str(tmp_path)]
    assert cli.main(command) == 130
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "resume" in captured.err
    assert [path.name for path in tmp_path.rglob("*.*")] == ["first.json"]

    fake.interrupt = False
    assert cli.main(command) == 0
    assert fake.ran == ["first", "second", "second"]
    out = capsys.readouterr().out
    assert "loaded from" in out
    assert "PASS  the value is small" in out
    assert "values [b]" in out
    files = {path.name for path in (tmp_path / "fake").rglob("*") if path.is_file()}
    assert files == {"first.json", "second.json", "line.png", "report.json"}

    assert cli.main([*command, "--fresh"]) == 0
    assert fake.ran[3:] == ["first", "second"]
    assert cli.main([*command, "--seed", "7"]) == 0
    assert fake.ran[5:] == ["first", "second"]


def test_json_alone_on_stdout_and_failed_claim(fake, capsys, tmp_path):
    fake.interrupt, fake.value = False, 3.0
    assert cli.main(["run", "fake", "--json", "--full", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    (record,) = json.loads(captured.out)
    assert record == json.loads((tmp_path / "fake" / "report.json").read_text())
    assert record["passed"] is False
    assert record["results"]["first"] == {"value": 3.0, "broken": None}
    assert record["environment"]["mode"] == "full"
    assert record["environment"]["versions"]["jax"] == jax.__version__
    assert record["environment"]["command_line"][3:5] == ["run", "fake"]
    assert "FAIL" in captured.err


def test_store_ignores_other_fingerprints_and_damage(tmp_path):
    store = CaseStore(tmp_path, "a")
    assert store.save("case", {"x": (1, float("inf"))}) == {"x": [1, None]}
    assert store.load("case") == {"x": [1, None]}
    assert CaseStore(tmp_path, "b").load("case") is None
    (tmp_path / "case.json").write_text('{"fingerprint": "a", "resu')
    assert store.load("case") is None


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result"
    write_atomic(path, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprint_depends_on_data_only_where_it_is_used(tmp_path):
    options = Options(full=False, seed=0, out=tmp_path)
    plain = Fake().benchmark()
    reads = Benchmark("fake", "", plain.cases, plain.report, needs_data=True)
    fingerprint = runner.environment.fingerprint
    assert fingerprint(plain, options, "x") == fingerprint(plain, options, "y")
    assert fingerprint(reads, options, "x") != fingerprint(reads, options, "y")


def test_sources_leave_out_the_other_benchmarks(tmp_path):
    tour_files = {path.name for path in runner.environment._sources(registry.discover()["tour"])}
    assert {"tour.py", "_tour_report.py", "training.py", "_values.py"} <= tour_files
    alone = {path.name for path in runner.environment._sources(replace(tour.BENCHMARK, module="x"))}
    assert "tour.py" not in alone
    (tmp_path / "a.py").write_text("x = 1")
    before = runner.environment.source_digest(tmp_path.iterdir())
    (tmp_path / "a.py").write_text("x = 2")
    assert runner.environment.source_digest(tmp_path.iterdir()) != before


def test_bar_progress_on_a_terminal(tmp_path):
    console = Console(file=(tmp_path / "log").open("w"), force_terminal=True)
    fake = Fake()
    fake.interrupt = False
    results = runner.run_cases(
        fake.benchmark(), Options(False, 0, tmp_path), CaseStore(tmp_path, "f"), console
    )
    console.file.close()
    assert list(results) == ["first", "second"]


def test_bar_plot_is_a_png():
    series = Series("cost", ("a", "b"), (1.0, None), color=2)
    panel = Panel("panel", "", "bits", (series,), kind="bar", levels=((0.5, "level"),))
    assert plots.draw(Plot("bars", "title", (panel, panel))).startswith(b"\x89PNG")


# Corpus


def test_held_out_files_are_whole_disjoint_and_fixed_by_seed(tmp_path):
    path = text_folder(tmp_path)
    corpus = data.load_corpus(path, seed=3)
    held_out, train = set(corpus.held_out_files), set(corpus.train_files)
    assert held_out
    assert not held_out & train
    assert len(held_out | train) == 12
    whole = b"".join((path / name).read_bytes() for name in corpus.held_out_files)
    assert corpus.held_out.tobytes() == whole
    assert data.load_corpus(path, seed=3).held_out_files == corpus.held_out_files
    others = [data.load_corpus(path, seed=seed).held_out_files for seed in range(4, 12)]
    assert any(other != corpus.held_out_files for other in others)
    assert corpus.sha256 == data.load_corpus(path, seed=4).sha256


def test_corpus_skips_tests_hidden_and_unreadable_files(tmp_path):
    path = text_folder(tmp_path)
    for name in ("test/a.txt", "tests/b.txt", "site-packages/c.txt", ".git/d.txt"):
        (path / name).parent.mkdir()
        (path / name).write_text("x")
    (path / "binary").write_bytes(b"\xff\x00")
    (path / "empty").touch()
    assert {file.name.split("/")[0] for file in data.read_files(path)} == {
        "part0",
        "part1",
        "part2",
    }


def test_one_file_is_split_after_a_line(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("a line of text\n" * 6000)
    corpus = data.load_corpus(path, seed=0)
    assert corpus.train.tobytes() + corpus.held_out.tobytes() == path.read_bytes()
    assert corpus.train[-1] == ord("\n")


def test_windows_and_unigram_entropy():
    tokens = np.arange(100, dtype=np.uint8)
    windows = data.random_windows(tokens, (3, 5), 9, np.random.default_rng(0))
    assert windows.shape == (3, 5, 9)
    assert np.all(np.diff(windows.astype(int), axis=-1) == 1)
    spread = data.spread_windows(tokens, (2, 2), 10)
    assert spread[0, 0, 0] == 0
    assert spread[-1, -1, -1] == 99
    assert data.unigram_bits(np.array([1, 1, 2, 2, 3, 3, 4, 4])) == pytest.approx(2.0)


# Timing


def test_measure_interleaves_and_compares():
    x = jnp.ones((40, 30))
    small, large = jax.jit(jnp.sin), jax.jit(lambda x: jnp.linalg.matrix_power(x @ x.T, 60))
    timings = timing.measure(
        {"large": lambda: large(x), "small": lambda: {"out": small(x)}},
        repeats=4,
        budget_s=5,
        reference="small",
    )
    assert timings["small"].ratio == 1.0
    assert timings["large"].ratio > 1.0
    for one in timings.values():
        assert 0 < one.best_s <= one.median_s
        assert one.rounds == 4
    with pytest.raises(ValueError, match="reference"):
        timing.measure({"a": lambda: x}, reference="b")


def test_compile_stats_of_a_donating_function():
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    stats = timing.compile_stats(jax.jit(lambda x: 2.0 * x, donate_argnums=0), x)
    assert stats.compile_s > 0
    assert stats.argument_bytes == stats.output_bytes == stats.alias_bytes == 64 * 32 * 4
    assert stats.kernels == 1
    assert timing.compile_stats(lambda x: x, x).kernels <= 1
    assert stats.flops is None or stats.flops == 64 * 32


def test_entry_opcodes_reads_tuples_and_layouts():
    hlo = """HloModule m
%fused (p: f32[2]) -> f32[2] {
  ROOT %s = f32[2]{0} sine(%p)
}

ENTRY %main (a: f32[2]) -> (f32[2], s32[]) {
  %a = f32[2]{0:T(128)} parameter(0)
  %f.1 = f32[2]{0} fusion(%a), kind=kLoop, calls=%fused
  %w = (f32[2]{0}, /*index=1*/s32[]) while(%t), condition=%c, body=%b
  ROOT %t = (f32[2]{0}, s32[]) tuple(%f.1, %k)
}
"""
    assert timing.entry_opcodes(hlo) == ["parameter", "fusion", "while", "tuple"]
