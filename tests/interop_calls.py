"""What every client and every proxy must be able to do, with grpcio as the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from mnemosynerpc.session_pb2 import ExistsRequest, GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from secrecy import CANARY

# Over two and three retirements of a connection (RETIRE_AFTER_STREAMS).
ALONE, TOGETHER, AT_ONCE = 7_000, 12_000, 100
_TIMEOUT_S = 20.0
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
BAG = {"name": f"{CANARY}-Ada", "long": "x" * 20_000}
NOT_FOUND_TEXT = "mnemosyned: storage: session not found"


def check_kinds(address: str) -> None:
    """Make each kind of call once: unary, compressed, a failure, a stream, a deadline that passes."""
    with grpc.insecure_channel(address, _OPTIONS, grpc.Compression.Gzip) as channel:
        stub, health = SessionManagerStub(channel), HealthStub(channel)
        new = StartRequest(session=Session(subject_id="s", bag=BAG))
        token = stub.Start(new, timeout=_TIMEOUT_S).session.access_token
        assert stub.Get(GetRequest(access_token=token), timeout=_TIMEOUT_S).session.bag == BAG
        with failure(grpc.StatusCode.NOT_FOUND) as text:
            stub.Get(GetRequest(access_token=f"{CANARY}-unknown"), timeout=_TIMEOUT_S)
        assert text() == NOT_FOUND_TEXT
        with failure(grpc.StatusCode.UNIMPLEMENTED):
            channel.unary_unary("/mnemosynerpc.SessionManager/No")(b"", timeout=_TIMEOUT_S)
        watching = health.Watch(HealthCheckRequest(), timeout=0.5)
        assert next(watching).status == HealthCheckResponse.SERVING
        with failure(grpc.StatusCode.DEADLINE_EXCEEDED):
            next(watching)
        cancelled = health.Watch(HealthCheckRequest(), timeout=_TIMEOUT_S)
        assert next(cancelled).status == HealthCheckResponse.SERVING
        cancelled.cancel()


@contextmanager
def failure(code: grpc.StatusCode) -> Iterator[Callable[[], str]]:
    with pytest.raises(grpc.RpcError) as caught:
        yield lambda: str(caught.value.details())  # type: ignore[attr-defined]  # a call's error has a text
    assert caught.value.code() is code  # type: ignore[attr-defined]  # and a code


async def call_often(address: str, *, alone: int = ALONE, together: int = TOGETHER) -> None:
    """Make many calls on one channel, one by one and a hundred at once; raise the first failure."""
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        stub: Any = SessionManagerStub(channel)
        new = StartRequest(session=Session(subject_id="s", bag={"k": f"{CANARY}-v"}))
        token = (await stub.Start(new, timeout=_TIMEOUT_S)).session.access_token

        async def call(times: int) -> None:
            for number in range(times):
                if number % 2:
                    answer = await stub.Get(GetRequest(access_token=token), timeout=_TIMEOUT_S)
                    assert answer.session.access_token == token
                else:
                    assert (await stub.Exists(ExistsRequest(access_token=token), timeout=_TIMEOUT_S)).value

        await call(alone)
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(call(together // AT_ONCE))


def call_often_blocking(address: str, *, alone: int = ALONE) -> None:
    """Make many calls one by one on a channel of the blocking interface."""
    with grpc.insecure_channel(address, _OPTIONS) as channel:
        stub = SessionManagerStub(channel)
        for _ in range(alone):
            assert not stub.Exists(ExistsRequest(access_token=f"{CANARY}-unknown"), timeout=_TIMEOUT_S).value
