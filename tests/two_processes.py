"""Two processes with four devices each, over loopback; for tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300


def start(module: str, *arguments: Any, **env: str) -> subprocess.Popen[str]:
    """Returns ``python -m tests.MODULE ARGUMENTS`` as it runs."""
    command = [sys.executable, "-m", f"tests.{module}", *map(str, arguments)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, **piped)


def output(process: subprocess.Popen[str]) -> str:
    """Returns all that it prints; it has to end well."""
    out = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 0, out
    return out


def pair(module: str, *arguments: Any) -> list[str]:
    """Returns what two processes print that run ``module NUMBER PORT ARGUMENTS`` together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start(module, number, port, *arguments) for number in range(2)]
    try:
        return [output(process) for process in both]
    finally:
        for process in both:
            process.kill()
            process.communicate()


def join(number: str, port: str) -> None:
    """Makes this process one of the two; they exchange values by gloo."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number), initialization_timeout=60)
