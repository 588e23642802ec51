"""An event loop that stands still, and the whole process: what probes are told, and that it goes on."""

from __future__ import annotations

import asyncio
import signal
import ssl
import time
from pathlib import Path

import pytest
from certificates import Authority
from clusters import until
from mnemosynerpc.session_pb2 import Session, StartRequest
from processes import Daemon
from serving import ENGINES

NEW = StartRequest(session=Session(subject_id="s"))
BLOCK = signal.SIGRTMIN + 5
# Python runs it at the start: the signal then keeps the thread of the event loop busy for seconds.
BLOCKING = """
import signal, time
signal.signal(signal.SIGRTMIN + 5, lambda *_: time.sleep(6))
"""


def blockable(directory: Path, *flags: str) -> Daemon:
    (directory / "sitecustomize.py").write_text(BLOCKING)
    return Daemon("-storage=memory", *flags, environ={"PYTHONPATH": str(directory)})


@pytest.mark.parametrize("engine", ENGINES)
async def test_an_event_loop_that_stands_still_is_neither_ready_nor_alive(
    tmp_path: Path, engine: str
) -> None:
    with blockable(tmp_path, f"-grpc.engine={engine}", "-health.stall=2s") as daemon:
        await asyncio.to_thread(daemon.serving)
        assert (daemon.http("/healthz")[0], daemon.http("/healthr")[0]) == (200, 200)

        daemon.process.send_signal(BLOCK)
        await until(lambda: daemon.http("/healthr")[0] == 503)
        await until(lambda: daemon.http("/healthz")[0] == 503)
        line = daemon.wait_for("event_loop_stalled")
        await until(lambda: daemon.http("/healthz")[0] == 200)

        assert daemon.http("/healthr")[0] == 200
        assert any("sitecustomize.py" in frame for frame in line["stack"])
        assert daemon.wait_for("event_loop_goes_on")["stalled_s"] > 2
        assert daemon.stop() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_that_was_stopped_is_alive_at_once_when_it_goes_on(engine: str) -> None:
    with Daemon("-storage=memory", f"-grpc.engine={engine}", "-health.stall=1s") as daemon:
        daemon.serving()
        daemon.process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        daemon.process.send_signal(signal.SIGCONT)

        assert daemon.http("/healthz")[0] == 200


@pytest.mark.parametrize("client_auth", ["none", "require"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_port_is_asked_over_tls_too(tmp_path: Path, engine: str, client_auth: str) -> None:
    authority = Authority(tmp_path)
    flags = authority.flags("localhost", "127.0.0.1")
    with Daemon(
        "-storage=memory", f"-grpc.engine={engine}", f"-tls.client-auth={client_auth}", *flags
    ) as daemon:
        daemon.serving()
        daemon.context = ssl.create_default_context(cafile=str(authority.path))

        assert (daemon.http("/healthz")[0], daemon.http("/healthr")[0]) == (200, 200)


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_node_whose_own_certificate_is_no_client_certificate_is_ready(
    tmp_path: Path, engine: str
) -> None:
    clients, public = Authority(tmp_path / "clients"), Authority(tmp_path / "public")
    files = public.files("localhost", "127.0.0.1")
    tls = ["-tls", f"-tls.crt={files.certificate}", f"-tls.key={files.private_key}"]
    tls += [f"-tls.ca={clients.path}", "-tls.client-auth=require"]
    with Daemon("-storage=memory", f"-grpc.engine={engine}", *tls) as daemon:
        await asyncio.to_thread(daemon.serving)
        daemon.context = ssl.create_default_context(cafile=str(public.path))

        # The port is asked each time, and a busy machine may be late with an answer.
        await until(lambda: (daemon.http("/healthz")[0], daemon.http("/healthr")[0]) == (200, 200))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_port_is_asked_at_a_socket_too(tmp_path: Path, engine: str) -> None:
    flags = [f"-host=unix:{tmp_path}/grpc", "-port=0", f"-grpc.engine={engine}"]
    with Daemon("-storage=memory", *flags) as daemon:
        daemon.serving()

        assert (daemon.http("/healthz")[0], daemon.http("/healthr")[0]) == (200, 200)


def test_a_full_node_is_alive_and_not_ready() -> None:
    with Daemon("-storage=memory", "-grpc.max-connections=1") as daemon, daemon.serving().stub() as stub:
        stub.Start(NEW, timeout=5)

        assert (daemon.http("/healthz")[0], daemon.http("/healthr")[0]) == (200, 503)
        assert stub.Start(NEW, timeout=5).session.access_token
