"""What a result depends on: versions, device, sources, git commit, and their fingerprint."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

import uscale_jax
from benchmarks.registry import Benchmark, Options

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "uscale_jax")
BENCHMARKS_ROOT = Path(__file__).parent


def package_versions() -> dict[str, str | None]:
    """Return the installed version of each package a number may depend on."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # A checkout on the path is importable without being installed.
        return getattr(sys.modules.get(name), "__version__", None)


def source_digest(files: Iterable[Path]) -> str:
    """Return the sha256 of the files' names and contents, whatever their order."""
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _sources(benchmark: Benchmark) -> Iterator[Path]:
    """Yield the sources that the benchmark runs: all but the other benchmarks of the suite.

    The library's count too: in a checkout they change while the version does not.
    """
    yield from Path(uscale_jax.__file__).parent.rglob("*.py")
    for path in BENCHMARKS_ROOT.rglob("*.py"):
        in_suite = path.parent.name == "suite" and not path.stem.startswith("_")
        if not in_suite or benchmark.module in ("", f"benchmarks.suite.{path.stem}"):
            yield path


def device() -> dict[str, Any]:
    """Return what JAX computes on."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "machine": platform.machine(),
    }


def git_commit() -> str | None:
    """Return the checkout's commit, marked "-dirty" if files changed; None outside git."""
    command = ["git", "-C", str(BENCHMARKS_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def describe(options: Options, command_line: list[str]) -> dict[str, Any]:
    """Return the record of where and how a run was made."""
    return {
        "command_line": command_line,
        "mode": options.mode,
        "seed": options.seed,
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": package_versions(),
        "device": device(),
        "git_commit": git_commit(),
    }


def fingerprint(benchmark: Benchmark, options: Options, data_sha256: str | None) -> str:
    """Return a hash of everything that decides the benchmark's results."""
    parts = {
        "benchmark": benchmark.name,
        "mode": options.mode,
        "seed": options.seed,
        "data": data_sha256 if benchmark.needs_data else None,
        "versions": package_versions(),
        "device": device(),
        "sources": source_digest(_sources(benchmark)),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
