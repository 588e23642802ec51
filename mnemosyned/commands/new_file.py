"""A file with secrets that is either complete or not there.

    FILE.partial ── written, and on the disk ──> FILE
         └── failed, discarded or interrupted ──> removed

After SIGKILL, FILE.partial is left. Both are created for this user alone (0600). Another file is replaced
only if that was asked for, and a link never followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_BUFFER_BYTES: Final = 1024 * 1024


class FileFailed(Exception):
    """The file cannot be written; the text is one line that names it."""


class NewFile:
    """A file that has no name yet, or another one."""

    def __init__(self, file: IO[str]) -> None:
        self.write = file.write  # ASCII text
        self.is_discarded = False

    def discard(self) -> None:
        """Let it not come into being."""
        self.is_discarded = True


@contextmanager
def new_file(name: str, *, may_replace: bool) -> Iterator[NewFile]:
    """Lend a file, which has its name when the block ends without an exception.

    Raises:
        FileFailed: there is one of this name already, or the system refuses to write it.
    """
    path, partial = Path(name), Path(f"{name}.partial")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise FileFailed(f"{name} is not a regular file")
    if os.path.lexists(path) and not may_replace:
        raise FileFailed(f"{name} exists already")
    descriptor = _opened(partial, may_replace=may_replace)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii", buffering=_BUFFER_BYTES) as file:
            lent = NewFile(file)
            yield lent
            file.flush()
            os.fsync(file.fileno())
        if not lent.is_discarded:
            _give_name(partial, path, may_replace=may_replace)
    except OSError as exc:
        raise FileFailed(f"{name}: {exc.strerror}") from exc
    finally:
        partial.unlink(missing_ok=True)


def _opened(partial: Path, *, may_replace: bool) -> int:
    try:
        if may_replace:
            partial.unlink(missing_ok=True)
        return os.open(partial, _FLAGS, 0o600)
    except FileExistsError:
        raise FileFailed(f"{partial} exists already: another export may be writing it") from None
    except OSError as exc:
        raise FileFailed(f"{partial}: {exc.strerror}") from exc


def _give_name(partial: Path, path: Path, *, may_replace: bool) -> None:
    if may_replace:
        partial.replace(path)
    else:
        # Unlike a renaming, it fails if another process has made a file of this name meanwhile.
        path.hardlink_to(partial)
