"""The command line: ``python -m benchmarks [list | run NAME ...] [options]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from benchmarks.registry import Benchmark, Options

DEFAULT_OUT = Path("benchmark-results")
OK, CLAIM_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with one line instead of the usage block."""
        self.exit(USAGE, f"benchmarks: error: {message}\n")


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**31 - 1")
    return value


_seed.__name__ = "integer"


def _run_options() -> argparse.ArgumentParser:
    """Return the options shared by the bare form and ``run``.

    They have no defaults here: the subcommand's would overwrite what stands before it.
    """
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    size = options.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", dest="full", action="store_false", help="minutes on two cores (default on CPU)"
    )
    size.add_argument(
        "--full", dest="full", action="store_true", help="larger (default on an accelerator)"
    )
    options.add_argument("--seed", type=_seed, metavar="N", help="seed of everything (default 0)")
    options.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder of the results (default {DEFAULT_OUT})"
    )
    options.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="text file or folder of text (default: the Python standard library)",
    )
    options.add_argument("--json", action="store_true", help="print only JSON on stdout")
    options.add_argument("--fresh", action="store_true", help="rerun cases that are finished")
    return options


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line with every option set; ``full`` is None if not given."""
    shared = _run_options()
    parser = _Parser(
        prog="python -m benchmarks",
        description="Benchmarks of uscale_jax. Without a command, runs the tour.",
        parents=[shared],
    )
    commands = parser.add_subparsers(dest="command", metavar="{list,run}", parser_class=_Parser)
    commands.add_parser("list", help="name the benchmarks")
    run = commands.add_parser("run", parents=[shared], help="run the named benchmarks")
    run.add_argument("names", nargs="+", metavar="NAME")
    defaults = argparse.Namespace(
        full=None, seed=0, out=DEFAULT_OUT, data=None, json=False, fresh=False, names=["tour"]
    )
    return parser.parse_args(arguments, defaults)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parse(arguments)
    try:
        return _list() if parsed.command == "list" else _run(parsed, arguments)
    except KeyboardInterrupt:
        message = f"interrupted; {parsed.out} keeps what is finished, the same command resumes"
        print(message, file=sys.stderr)
        return INTERRUPTED


def _list() -> int:
    from benchmarks.registry import discover

    benchmarks = discover()
    width = max(map(len, benchmarks))
    for name, benchmark in benchmarks.items():
        print(f"{name:{width}}  {benchmark.summary}")
    return OK


def _run(parsed: argparse.Namespace, arguments: list[str]) -> int:
    """Run the selected benchmarks; imports are late so that wrong usage is told at once."""
    from benchmarks.registry import UsageError, select

    try:
        _check_paths(parsed)
        benchmarks = select(parsed.names)
        options = _options(parsed, benchmarks)
    except UsageError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return USAGE
    return _run_all(benchmarks, options, parsed, arguments)


def _check_paths(parsed: argparse.Namespace) -> None:
    """Reject paths that cannot work before anything slow is imported."""
    from benchmarks.registry import UsageError

    if parsed.data is not None and not parsed.data.exists():
        raise UsageError(f"no data at {parsed.data}: no such file or folder")
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write results to {parsed.out}: {error.strerror}") from None


def _options(parsed: argparse.Namespace, benchmarks: Sequence[Benchmark]) -> Options:
    """Return the options, after a look at the data so that a bad corpus fails early."""
    import jax

    from benchmarks.data import load_corpus
    from benchmarks.registry import Options

    if parsed.data is not None or any(one.needs_data for one in benchmarks):
        load_corpus(parsed.data, parsed.seed)
    full = parsed.full if parsed.full is not None else jax.default_backend() != "cpu"
    return Options(full=full, seed=parsed.seed, out=parsed.out, data=parsed.data)


def _run_all(
    benchmarks: Sequence[Benchmark],
    options: Options,
    parsed: argparse.Namespace,
    arguments: list[str],
) -> int:
    from benchmarks.render import open_console
    from benchmarks.runner import run_benchmark
    from benchmarks.store import to_json

    console = open_console(to_stderr=parsed.json)
    command_line = ["python", "-m", "benchmarks", *arguments]
    records = [
        run_benchmark(benchmark, options, console, command_line, parsed.fresh)
        for benchmark in benchmarks
    ]
    if parsed.json:
        print(to_json(records), end="")
    return OK if all(record["passed"] for record in records) else CLAIM_FAILED
