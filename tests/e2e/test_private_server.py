"""The private PostgreSQL dies under a daemon that goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from clusters import until
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from processes import Daemon, processes_on, wait_until_gone

pytestmark = pytest.mark.timeout(120)


@contextmanager
def restarting(directory: Path) -> Iterator[tuple[Daemon, list[int]]]:
    """Lend a daemon that waits for what its killed server left behind, and these processes: stopped ones."""
    with Daemon(f"-postgres.address=embedded:{directory}", "-cache.ttl=1m") as daemon:
        daemon.serving()
        server = int((directory / "data" / "postmaster.pid").read_text().splitlines()[0])
        backends = [pid for pid in processes_on(directory) if pid != server]
        for pid in backends:
            os.kill(pid, signal.SIGSTOP)
        try:
            os.kill(server, signal.SIGKILL)
            daemon.wait_for("private_server_died")
            yield daemon, backends
        finally:
            for pid in backends:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


async def test_calls_and_probes_are_answered_while_the_server_starts_again(tmp_path: Path) -> None:
    directory = tmp_path / "pg"
    with restarting(directory) as (daemon, backends), daemon.stub() as stub:
        answers = [daemon.http("/healthz"), daemon.http("/healthr")]
        with pytest.raises(Exception, match="UNAVAILABLE"):
            stub.Start(StartRequest(session=Session(subject_id="s")), timeout=5)
        for pid in backends:
            os.kill(pid, signal.SIGCONT)
        token = ""

        def is_started() -> bool:
            nonlocal token
            with suppress(grpc.RpcError):
                token = stub.Start(
                    StartRequest(session=Session(subject_id="s")), timeout=5
                ).session.access_token
            return bool(token)

        # Readiness does not tell: it may be some seconds old, from before the end of the former server.
        await until(is_started)
        await until(lambda: daemon.http("/healthr")[0] == 200)
        assert stub.Get(GetRequest(access_token=token), timeout=5).session.subject_id == "s"

        assert answers[0][0] == 200
        assert "grpc" not in answers[1][1]
        assert "event_loop_stalled" not in daemon.log
        # The new server was started by another thread, and ends with the daemon all the same.
        daemon.process.kill()
    wait_until_gone(directory)


def test_a_stop_does_not_wait_for_a_server_that_does_not_start(tmp_path: Path) -> None:
    with restarting(tmp_path / "pg") as (daemon, _):
        begun_s = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - begun_s < 10
