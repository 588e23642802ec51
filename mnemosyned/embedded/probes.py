"""What a process can see of a PostgreSQL server that need not be its own child. Changes nothing.

Three views, none of which is enough alone:

- `postmaster.pid`, which the server writes into its data directory: its process, port and state. A server
  that was killed leaves the file as it was, so the file may be stale.
- `/proc`, on Linux: which processes work in the data directory. A backend may outlive its killed server by
  some time, and holds the shared memory without which a new server does not start.
- The port: something listens there, but nothing says that it is this server.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

# Lines of postmaster.pid: pid, data directory, start time, port, socket directory, address, shared memory,
# state. The server appends the state last, so a shorter file is of a server that is just starting.
PID_FILE_PORT: Final = 3
_PID_FILE_STATE: Final = 7
# For a server on this machine; only one that is stopped by SIGSTOP or swapped out takes that long.
_CONNECT_TIMEOUT_S: Final = 1


def pid_file(data: Path) -> list[str]:
    """Return the lines of `postmaster.pid`; none if there is no such file."""
    try:
        return (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return []


def is_ready(lines: list[str]) -> bool:
    """Tell whether these lines of `postmaster.pid` say that the server accepts connections, or did."""
    return len(lines) > _PID_FILE_STATE and lines[_PID_FILE_STATE].strip() == "ready"


def servers_on(data: Path) -> list[int]:
    """Return PostgreSQL's processes on this data: a server, or what a killed one left behind.

    They have their data directory as working directory, and a zombie has none. A process of another program
    that got a dead server's number is therefore never among them. Without `/proc` the result is empty.
    """
    home = str(data.resolve())
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # The process has ended meanwhile, or belongs to another user.
        with suppress(OSError):
            if str((process / "cwd").readlink()) == home and (process / "comm").read_text() == "postgres\n":
                found.append(int(process.name))
    return found


def accepts_connections(port: int) -> bool:
    """Tell whether a process listens on this port of 127.0.0.1; waits for at most 1 s."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def is_taken(port: int) -> bool:
    """Tell whether a server could not listen on this port of 127.0.0.1 now."""
    with socket.socket() as probe:
        # As PostgreSQL does: a port whose former connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
