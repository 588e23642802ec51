"""What the supervisor opens for its workers: the sockets for clients, and a directory for all others.

The sockets for clients are opened once, and each worker inherits them. They outlive every worker, so a
connection that waits to be accepted is not lost with one: a sibling accepts it.

The other sockets are files in a directory of its own, mode 0700, in the first place that can be written, and
where no other user can replace it:
`$XDG_RUNTIME_DIR`, `$RUNTIME_DIRECTORY`, `$TMPDIR`, `/tmp`, `/dev/shm`. The last one can be written even in a
container whose file system is read-only.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from mnemosyned.transport.acceptor import open_sockets
from mnemosyned.transport.engine import ListenFailed, host_port
from mnemosyned.transport.turns import Rows, table_bytes

_VARIABLES: Final = ("XDG_RUNTIME_DIR", "RUNTIME_DIRECTORY", "TMPDIR")
# The new directory is this user's alone.
_DIRECTORIES: Final = ("/tmp", "/dev/shm")  # noqa: S108 # nosec B108
# The kernel takes 103 bytes or more as the name of a socket, of which ours has at most the last 30.
_MAX_PARENT_BYTES: Final = 72


class Sockets:
    """The open sockets, the directory, and the table of turns; `close` ends all of them."""

    def __init__(self, listeners: Sequence[socket.socket], directory: str, count: int) -> None:
        self.directory = directory
        # A file without a name.
        self._table = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  # `close` closes it
        self._table.truncate(table_bytes(count))
        self.rows_file = self._table.fileno()
        self.rows = Rows(self.rows_file, count)
        self._listeners = list(listeners)
        self._paths = [one.getsockname() for one in listeners if one.family == socket.AF_UNIX]

    @classmethod
    async def open(cls, host: str, port: int, count: int, environ: Mapping[str, str]) -> Sockets:
        """Listen for clients of so many workers. Raises ListenFailed."""
        directory = _new_directory(environ)
        try:
            listeners = await open_sockets(host, port)
        except OSError as exc:
            shutil.rmtree(directory, ignore_errors=True)
            # The text of `socket.create_server` repeats the address.
            reason = (exc.strerror or str(exc)).partition(" (while ")[0]
            raise ListenFailed(f"cannot listen on {host_port(host, port)}: {reason}") from exc
        return cls(listeners, directory, count)

    @property
    def port(self) -> int:
        """The gRPC port; 0 for a Unix socket."""
        address = self._listeners[0].getsockname()
        return int(address[1]) if isinstance(address, tuple) else 0

    @property
    def files(self) -> tuple[int, ...]:
        """The sockets for clients, as workers inherit them."""
        return tuple(one.fileno() for one in self._listeners)

    def stop_listening(self) -> None:
        """Leave the sockets for clients to the workers, whose drain closes them."""
        for one in self._listeners:
            one.close()
        self._listeners.clear()

    def close(self) -> None:
        """Close everything, and remove the directory; the workers have ended."""
        self.stop_listening()
        for path in self._paths:
            with suppress(OSError):
                Path(path).unlink()
        self.rows.close()
        self._table.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def _new_directory(environ: Mapping[str, str]) -> str:
    """Return a new directory that only this user can enter. Raises ListenFailed."""
    given = [environ[name] for name in _VARIABLES if environ.get(name)]
    for place in (*given, *_DIRECTORIES):
        with suppress(OSError):
            parent = Path(place).resolve(strict=True)
            if _is_safe(parent) and len(os.fsencode(parent)) <= _MAX_PARENT_BYTES:
                return tempfile.mkdtemp(prefix="mnemosyned-", dir=parent)
    raise ListenFailed(
        "cannot make a directory for the sockets of the workers in any of "
        f"{', '.join((*given, *_DIRECTORIES))}: set TMPDIR"
    )


def _is_safe(parent: Path) -> bool:
    """Tell whether no other user can put a directory in the place of one of ours."""
    found = parent.stat()
    if found.st_uid not in {0, os.geteuid()}:
        return False
    return bool(found.st_mode & stat.S_ISVTX) or not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
