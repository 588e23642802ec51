"""Readers, writers and an executioner on the same sessions: nobody may see the past.

Each session has one writer, who counts up a value in its bag and at last abandons it, while many
readers look on. A read that begins after a write was acknowledged must see that write or a later one;
after the Abandon it must see nothing. Entries age within milliseconds, so that loads, fills, touches
and drops race all the time.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from random import Random

import grpc
import pytest
from mnemosynerpc.session_pb2 import AbandonRequest, GetRequest, Session, SetValueRequest, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from prometheus_client import CollectorRegistry
from serving import serving

from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

SECONDS = 5.0
MIN_READS, MIN_LIVES, MAX_EXTRA_S = 1000, 20, 30.0
ENDED = 10**9  # a version that no writer reaches


@dataclass
class Subject:
    """A session and the least version that a read beginning now may see."""

    token: str
    acknowledged: int = 0


class History:
    def __init__(self, stub: SessionManagerStub, seed: int) -> None:
        self.stub = stub
        self.rng = Random(seed)
        self.subjects: list[Subject] = []
        self.reads = 0
        self.lives = 0
        self.violations: list[str] = []
        self.ends_s = time.monotonic() + SECONDS

    @property
    def is_over(self) -> bool:
        # A busy machine does less in the time, and gets more of it.
        has_enough = self.reads > MIN_READS and self.lives > MIN_LIVES
        left_s = self.ends_s - time.monotonic()
        return left_s < (0.0 if has_enough else -MAX_EXTRA_S)

    async def write(self, at: int) -> None:
        while not self.is_over:
            self.lives += 1
            new = Session(subject_id="s", bag={"version": "0"})
            token = (await self.stub.Start(StartRequest(session=new))).session.access_token
            subject = self.subjects[at] = Subject(token)
            for version in range(1, self.rng.randint(2, 30)):
                change = SetValueRequest(access_token=token, key="version", value=str(version))
                await self.stub.SetValue(change)
                subject.acknowledged = version
                await asyncio.sleep(self.rng.random() * 0.01)
            await self.stub.Abandon(AbandonRequest(access_token=token))
            subject.acknowledged = ENDED

    async def read(self) -> None:
        while not self.is_over:
            subject = self.rng.choice(self.subjects)
            least = subject.acknowledged
            try:
                session = (await self.stub.Get(GetRequest(access_token=subject.token))).session
                seen = int(session.bag["version"])
            except grpc.aio.AioRpcError as exc:
                assert exc.code() is grpc.StatusCode.NOT_FOUND, exc  # noqa: PT017  # the loop goes on
                seen = ENDED
            self.reads += 1
            if seen < least:
                self.violations.append(f"saw {seen} after {least} was acknowledged")


@pytest.mark.parametrize("cache_ms", [0, pytest.param(3, marks=pytest.mark.slow), 5000])
async def test_no_read_sees_what_an_acknowledged_write_replaced(postgres_dsn: str, cache_ms: int) -> None:
    options = PostgresOptions(dsn=postgres_dsn, pool_size=8, connect_timeout_s=5, statement_timeout_s=5)
    store = PostgresStore(
        PostgresPool(options, QueryMetrics(CollectorRegistry())),
        Table(schema="mnemosyne", name="session"),
    )
    await store.open()
    flags = (f"-cache.ttl={cache_ms}ms", "-touch.interval=20ms")
    async with serving(store, flags=flags) as node:
        touching = asyncio.create_task(node.touches.run(0.02))
        history = History(node.stub, seed=cache_ms)
        history.subjects = [Subject("none", ENDED) for _ in range(8)]
        async with asyncio.TaskGroup() as everybody:
            for at in range(len(history.subjects)):
                everybody.create_task(history.write(at))
            for _ in range(24):
                everybody.create_task(history.read())
        touching.cancel()
    await store.close()

    assert not history.violations
    assert history.reads > MIN_READS
    assert history.lives > MIN_LIVES
