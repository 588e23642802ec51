"""Whether this process can open files: a connection is one, and so is a listening socket."""

from __future__ import annotations

import os
from typing import Final

# What a listener needs, or a probe and the port that it asks, while others take and give back files too.
_COUNT: Final = 8


def need_files() -> None:
    """Raise an OSError if this process has not a few files left."""
    spare: list[int] = []
    try:
        for _ in range(_COUNT):
            spare.append(os.open(os.devnull, os.O_RDONLY))  # noqa: PERF401  # those before a failure count
    finally:
        for number in spare:
            os.close(number)
