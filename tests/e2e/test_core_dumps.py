"""What a daemon that crashes leaves behind: nothing, unless a core dump is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Daemon, processes_on

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def core_limits(pid: int) -> list[str]:
    (line,) = (one for one in Path(f"/proc/{pid}/limits").read_text().splitlines() if "core file size" in one)
    return line.split()[4:6]


def test_a_process_that_forbids_core_dumps_is_not_dumpable() -> None:
    code = "import ctypes, sys; from mnemosyned.security import core_dumps; core_dumps.forbid(); "
    code += "sys.exit(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_daemon_leaves_no_core_dump_and_shows_its_metrics() -> None:
    with Daemon("-storage=memory") as daemon:
        daemon.serving()

        assert core_limits(daemon.process.pid) == ["0", "0"]
        assert "process_resident_memory_bytes" in daemon.http("/metrics")[1]
        assert "process_open_fds" in daemon.http("/metrics")[1]
        assert "core_dumps_possible" not in daemon.log


def test_a_core_dump_can_be_asked_for() -> None:
    with Daemon("-storage=memory", "-core-dumps") as daemon:
        daemon.serving()

        assert core_limits(daemon.process.pid) == core_limits(os.getpid())


def test_a_private_postgresql_runs_and_leaves_no_core_dump_either(tmp_path: Path) -> None:
    with Daemon(f"-postgres.address=embedded://{tmp_path}/pg") as daemon:
        daemon.serving()

        assert core_limits(processes_on(tmp_path)[0]) == ["0", "0"]
        assert daemon.stop() == 0
