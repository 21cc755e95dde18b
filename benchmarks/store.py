"""Files that are either the old version or the complete new one, and results kept in them."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.registry import Result


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        # mkstemp makes private files; results should be as readable as any other output.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """Return ``value`` with every non-finite float as None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def to_json(value: Any) -> str:
    """Return strict, readable JSON ending in a newline."""
    return json.dumps(finite(value), indent=1, allow_nan=False) + "\n"


class CaseStore:
    """Finished case results of one benchmark, valid for one fingerprint only."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Keep results in ``folder``, tagged with ``fingerprint``."""
        self.folder = folder
        self.fingerprint = fingerprint

    def _path(self, case: str) -> Path:
        return self.folder / f"{case}.json"

    def load(self, case: str) -> Result | None:
        """Return the saved result, or None if there is none of this fingerprint."""
        try:
            record = json.loads(self._path(case).read_text(encoding="utf-8"))
            return record["result"] if record["fingerprint"] == self.fingerprint else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def save(self, case: str, result: Result) -> Result:
        """Save the result and return it as a later ``load`` will."""
        text = to_json({"fingerprint": self.fingerprint, "result": result})
        write_atomic(self._path(case), text.encode())
        return json.loads(text)["result"]
