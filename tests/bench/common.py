"""What the benchmarks share: cores, the CPU of a process, h2load, a private PostgreSQL."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import Daemon

SERVER_CORE, LOAD_CORE = 0, 1
# The daemon asks a client for a new connection after 3,400 calls (http2/core.py), and h2load opens none.
CONNECTIONS, CALLS_A_CONNECTION = 4, 3000
SERVICE = "mnemosynerpc.SessionManager"


def statements(daemon: Daemon, query: str) -> float:
    _, page = daemon.http("/metrics")
    found = re.search(rf'queries_total{{query="{query}"}} (\S+)', page)
    return float(found[1]) if found else 0.0


def request_body(directory: Path, message: bytes) -> Path:
    path = directory / f"{len(message)}.body"
    path.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    return path


def portions(calls: int) -> list[int]:
    """Return how many calls each run of h2load makes."""
    most = CONNECTIONS * CALLS_A_CONNECTION
    return [min(calls - done, most) for done in range(0, calls, most)]


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def pin(pid: int, core: int) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})
