"""A call that was answered with a failure is over: nothing of it is done later."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
import grpc
import pytest
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon
from serving import ENGINES
from waiting import until

pytestmark = pytest.mark.timeout(60)
EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
SHORT_S = 0.3
LONGER_S = 10.0
# Longer than a write that was told to have failed could still be under way.
AFTERWARDS_S = 1.5
MANY = 900
# So long a call may lie in the socket of a busy process unseen (aio/stalls.py): its deadline is later then.
UNSEEN_S = 0.1

Write = Callable[[SessionManagerStub, float], object]


def start(stub: SessionManagerStub, timeout_s: float) -> object:
    return stub.Start(StartRequest(session=Session(access_token="new", subject_id="s")), timeout=timeout_s)


def set_value(stub: SessionManagerStub, timeout_s: float) -> object:
    return stub.SetValue(SetValueRequest(access_token="held", key="k", value="late"), timeout=timeout_s)


def abandon(stub: SessionManagerStub, timeout_s: float) -> object:
    return stub.Abandon(AbandonRequest(access_token="held"), timeout=timeout_s)


def delete_by_subject(stub: SessionManagerStub, timeout_s: float) -> object:
    return stub.Delete(DeleteRequest(subject_id="s"), timeout=timeout_s)


def delete_by_token(stub: SessionManagerStub, timeout_s: float) -> object:
    return stub.Delete(DeleteRequest(access_token="held"), timeout=timeout_s)


def delete_by_refresh_token(stub: SessionManagerStub, timeout_s: float) -> object:
    return stub.Delete(DeleteRequest(refresh_token="r"), timeout=timeout_s)


def delete_by_expiry(stub: SessionManagerStub, timeout_s: float) -> object:
    request = DeleteRequest()
    request.expire_at_from.FromSeconds(1)
    return stub.Delete(request, timeout=timeout_s)


WRITES: tuple[Write, ...] = (
    start,
    set_value,
    abandon,
    delete_by_subject,
    delete_by_token,
    delete_by_refresh_token,
    delete_by_expiry,
)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def daemon(engine: str, postgres_dsn: str) -> Iterator[Daemon]:
    flags = (f"-grpc.engine={engine}", f"-postgres.address={postgres_dsn}", "-cache.ttl=0s")
    with Daemon(*flags) as daemon:
        with daemon.serving().stub() as stub:
            held = Session(access_token="held", subject_id="s", refresh_token="r", bag={"k": "first"})
            stub.Start(StartRequest(session=held), timeout=LONGER_S)
        yield daemon
        assert daemon.stop() == 0


class Holder:
    """A connection of PostgreSQL that holds a lock, and sets a bag before it lets go."""

    def __init__(self, dsn: str, write: Write) -> None:
        self._dsn = dsn
        self._is_start = write is start
        self._release = threading.Event()
        self._is_held = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._hold()))

    async def _hold(self) -> None:
        connection = await asyncpg.connect(self._dsn)
        transaction = connection.transaction()
        await transaction.start()
        if self._is_start:
            await connection.execute(
                "INSERT INTO mnemosyne.session (access_token, subject_id, bag, expire_at) "
                "VALUES ('new', 'other', '', now() + interval '1 h')"
            )
        else:
            await connection.execute("SELECT 1 FROM mnemosyne.session FOR UPDATE")
        self._is_held.set()
        await asyncio.to_thread(self._release.wait, LONGER_S)
        await transaction.rollback()
        await connection.close()

    def __enter__(self) -> None:
        self._thread.start()
        assert self._is_held.wait(LONGER_S)

    def __exit__(self, *_: object) -> None:
        self._release.set()
        self._thread.join()


def code_of(write: Write, stub: SessionManagerStub, timeout_s: float = SHORT_S) -> Any:  # noqa: ANN401  # of grpcio
    try:
        write(stub, timeout_s)
    except grpc.RpcError as exc:
        return exc.code()
    return None


def calls_under_way(daemon: Daemon) -> float:
    of_clients = 'grpc_server_requests{handler="'
    lines = daemon.http("/metrics")[1].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(of_clients))


def state(stub: SessionManagerStub) -> tuple[bool, dict[str, str]]:
    """Whether the new session is there, and the bag of the other one."""
    is_there = stub.Exists(ExistsRequest(access_token="new"), timeout=LONGER_S).value
    held = stub.Get(GetRequest(access_token="held"), timeout=LONGER_S)
    return is_there, dict(held.session.bag)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_waits_for_a_lock_is_not_done_after_its_caller_was_told_so(
    engine: str, daemon: Daemon, postgres_dsn: str, write: Write
) -> None:
    with daemon.stub() as stub:
        with Holder(postgres_dsn, write):
            assert code_of(write, stub) is EXCEEDED
            time.sleep(UNSEEN_S)
            if engine == "grpcio":
                # It does not say how long a call has waited for its thread: by so much its deadline is later.
                until(lambda: calls_under_way(daemon) == 0)
        acknowledged = SetValueRequest(access_token="held", key="k", value="acknowledged")
        stub.SetValue(acknowledged, timeout=LONGER_S)
        time.sleep(AFTERWARDS_S)

        assert state(stub) == (False, {"k": "acknowledged"})


def test_writes_that_waited_in_the_socket_of_a_stopped_process_are_not_done(daemon: Daemon) -> None:
    with daemon.stub() as stub, ThreadPoolExecutor(len(WRITES)) as pool:
        state(stub)
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(0.3)
            codes = list(pool.map(lambda write: code_of(write, stub), WRITES))
        finally:
            daemon.process.send_signal(signal.SIGCONT)

        assert codes == [EXCEEDED] * len(WRITES)
        time.sleep(AFTERWARDS_S)
        assert state(stub) == (False, {"k": "first"})


def test_none_of_many_writes_that_waited_is_done(daemon: Daemon) -> None:
    """More of them than are taken in a moment: in the socket, and behind it with the client."""
    with daemon.stub() as stub:
        state(stub)
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            late = SetValueRequest(access_token="held", key="k", value="late" * 200)
            calls = [stub.SetValue.future(late, timeout=1.0) for _ in range(MANY)]
            codes = {call.code() for call in calls}
        finally:
            daemon.process.send_signal(signal.SIGCONT)

        assert codes == {EXCEEDED}
        time.sleep(AFTERWARDS_S)
        assert state(stub) == (False, {"k": "first"})


@pytest.mark.parametrize("write", [start, set_value])
def test_calls_with_time_left_after_a_stop_succeed(daemon: Daemon, write: Write) -> None:
    with daemon.stub() as stub, ThreadPoolExecutor(2) as pool:
        state(stub)
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            written = pool.submit(code_of, write, stub, LONGER_S)
            read = pool.submit(state, stub)
            time.sleep(1)
        finally:
            daemon.process.send_signal(signal.SIGCONT)

        assert written.result() is None
        assert "k" in read.result()[1]
