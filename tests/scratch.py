"""Where tests and their servers write what nobody keeps: in memory, if there is room.

A test's database is 300 files, and a server waits for the disk at each commit. In memory the same calls cost
a fraction. A server that is killed loses as little as on a disk, since the kernel keeps what it has written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

MEMORY: Final = Path("/dev/shm")  # noqa: S108  # pytest makes a directory of its own there
# `make test` takes less than 1 GB of it at a time. A container has 64 MB there by default.
_ROOM_BYTES: Final = 4 << 30


def choose(environ: MutableMapping[str, str], memory: Path = MEMORY, room_bytes: int = _ROOM_BYTES) -> None:
    """Set TMPDIR, for this process and those that it starts, unless it is set."""
    if "TMPDIR" not in environ and _is_suitable(memory, room_bytes):
        environ["TMPDIR"] = str(memory)
        # What it has found before.
        tempfile.tempdir = None


def _is_suitable(directory: Path, room_bytes: int) -> bool:
    try:
        found = os.statvfs(directory)
    except OSError:
        return False
    # Some tests write programs.
    return found.f_bavail * found.f_frsize >= room_bytes and not found.f_flag & os.ST_NOEXEC
