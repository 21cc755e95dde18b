"""Where in the user's files an equation comes from."""

from __future__ import annotations

import os
import sysconfig
from dataclasses import dataclass
from functools import cache
from typing import Any

from uscale_jax import _jax

# Packages whose frames say how the user's line was carried out, not what the user wrote.
_LIBRARIES = ("jax", "jaxlib", "flax", "haiku", "equinox", "einops", "uscale_jax")


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """What made an equation: its own trace, and the call it was inlined from."""

    info: Any
    caller: Source | None = None
    called: str | None = None
    """Name of the jitted function that ``caller`` calls and this equation is in."""

    def __str__(self) -> str:
        """Return ``model.py:31``."""
        frame = self._user_frame()
        return "an unknown line" if frame is None else f"{_short(frame[0])}:{frame[2]}"

    def _user_frame(self) -> tuple[str, str, int] | None:
        own = [frame for frame in _jax.frames(self.info) if not _is_library(frame[0])]
        if self.caller is None or (own and self._traced_here(own)):
            return own[0] if own else None
        return self.caller._user_frame() or (own[0] if own else None)

    def _traced_here(self, own: list[tuple[str, str, int]]) -> bool:
        """JAX caches the programs of its own jitted helpers with the line of the first call.

        The line inside is right where the jitted function is the user's; ``called`` is then the
        name of a function on the way.
        """
        return self.called is None or any(f[1].split(".")[-1] == self.called for f in own)


@cache
def _is_library(file: str) -> bool:
    path = file.replace(os.sep, "/")
    standard = sysconfig.get_paths()["stdlib"].replace(os.sep, "/")
    if "site-packages/" in path or "dist-packages/" in path:
        return path.rpartition("-packages/")[2].split("/")[0] in _LIBRARIES
    ours = os.path.dirname(os.path.dirname(__file__)).replace(os.sep, "/")
    return path.startswith((standard, ours + "/"))


def _short(file: str) -> str:
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative
