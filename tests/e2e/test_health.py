"""What the pages of health say of a daemon in trouble."""

from __future__ import annotations

import resource
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from probes import dialled
from processes import Daemon
from waiting import until

ENGINES = ["h2", "grpcio"]
STALL_S = 3  # a port that is silent for longer ends the life of the process


@pytest.mark.parametrize("engine", ENGINES)
def test_a_daemon_without_a_file_left_answers_its_probes(engine: str) -> None:
    with Daemon("-storage=memory", f"-grpc.engine={engine}", f"-health.stall={STALL_S}s") as daemon:
        daemon.serving()
        assert daemon.http("/healthz")[0] == 200
        files = Path(f"/proc/{daemon.process.pid}/fd")
        limit = max(int(one.name) for one in files.iterdir()) + 20
        _, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (limit, hard))
        with ExitStack() as stack:
            for _ in range(limit):
                stack.enter_context(dialled(daemon.address))
            until(lambda: len(list(files.iterdir())) >= limit - 2)
            until_s = time.monotonic() + 2 * STALL_S
            while time.monotonic() < until_s:
                assert daemon.http("/healthz")[0] == 200
