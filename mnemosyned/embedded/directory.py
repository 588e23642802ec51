"""The directory of a private server: whether it may be used, and which process owns its server.

The lock is a file with a name for each kind of server, so that none takes the directory of another kind.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from mnemosyned.embedded.programs import EmbeddedError


def prepare(directory: Path, lock_name: str, *, is_known: bool = False) -> None:
    """Make the directory, for this user alone.

    One that holds files is taken only if it has the lock, or `is_known` to be such a server's: what another
    application keeps there would be overwritten, or given to another user.

    Raises:
        EmbeddedError: it holds other files.
        OSError: it cannot be made or read.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    names = {path.name for path in directory.iterdir()} - {"lost+found"}
    if names and lock_name not in names and not is_known:
        raise EmbeddedError(f"{directory} holds other files: name an empty or new directory")
    if directory.stat().st_uid == os.geteuid():
        directory.chmod(0o700)


def take_lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock until it is closed; None: another process has it."""
    # O_CLOEXEC: a child that inherited the descriptor would hold the lock after the owner's death.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(path, flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
