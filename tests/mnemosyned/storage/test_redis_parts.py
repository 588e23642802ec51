"""The parts of the Redis engine that need no server: records, judgements, and the names of faults."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from redis.asyncio.connection import BaseParser
from redis.exceptions import ConnectionError as LostConnection

from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions.model import MAX_BAG_BYTES, DamagedSession, NewSession, Session
from mnemosyned.storage.fault_log import advice
from mnemosyned.storage.redis import faults, records, scripts
from mnemosyned.storage.redis.failures import Failures
from mnemosyned.storage.redis.faults import (
    NoPrimary,
    NotPrimary,
    NotReplicated,
    Uncovered,
    hint_of,
    is_elsewhere,
    is_not_done,
    is_refusal,
    moved_to,
    name_of,
)
from mnemosyned.storage.redis.link import Command
from mnemosyned.storage.redis.server import Sending, Server
from mnemosyned.storage.redis.server_check import Verdict, fields_of, judge

AT_US = 1_790_000_000_000_000
NEW = NewSession(
    access_token="t", subject_id="sż", subject_client="c", refresh_token="r", bag=b"bag", ttl_us=1
)


def record_of(new: NewSession) -> bytes:
    return f"{AT_US:016}".encode() + records.new_body(new, b"version1")


@given(st.text(), st.text(), st.text(), st.binary())
def test_a_record_is_read_as_it_was_written(subject: str, refresh: str, client: str, bag: bytes) -> None:
    new = NewSession(
        access_token="t", subject_id=subject, refresh_token=refresh, subject_client=client, bag=bag, ttl_us=1
    )
    session = records.session_of("t", record_of(new))

    assert isinstance(session, Session)
    assert session.is_from(new)
    assert session.expires_at_us == AT_US


def test_another_bag_has_another_version_and_leaves_the_rest() -> None:
    record = record_of(NEW)
    changed = record[:16] + records.body_with_bag(record, b"version2", b"another bag")
    session = records.session_of("t", changed)

    assert isinstance(session, Session)
    assert (session.subject_id, session.refresh_token, session.bag) == ("sż", "r", b"another bag")
    assert (records.version_of(record), records.version_of(changed)) == (b"version1", b"version2")
    assert records.state_of(record) != records.state_of(changed)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (1, "its key in Redis is not a string"),
        (b"", "its record has no valid head"),
        (b"x" * 39, "its record has no valid head"),
        (b"x" * 16 + record_of(NEW)[16:], "its record has no valid head"),
        (record_of(NEW)[:-1], "another length than its head says"),
        (record_of(NEW) + b"x", "another length than its head says"),
        (record_of(NEW).replace("ż".encode(), b"\xff\xfe"), "a field is not UTF-8"),
        (
            record_of(NewSession(access_token="t", subject_id="s", bag=bytes(MAX_BAG_BYTES + 1), ttl_us=1))[
                :40
            ],
            "a bag is longer than 4000000 bytes",
        ),
    ],
)
def test_a_damaged_record_is_called_so(record: object, reason: str) -> None:
    found = records.session_of("t", record)

    assert isinstance(found, DamagedSession)
    assert reason in found.reason


@given(st.binary(max_size=200))
def test_any_bytes_are_a_session_or_damaged(record: bytes) -> None:
    assert isinstance(records.session_of("t", record), Session | DamagedSession)


GOOD = {"redis_version": "7.0.15", "role": "master", "aof_enabled": "1", "maxmemory_policy": "noeviction"}


@pytest.mark.parametrize(
    ("info", "settings", "verdict"),
    [
        ({}, {}, Verdict()),
        ({}, {"appendfsync": "everysec"}, Verdict()),
        ({"redis_version": "6.2.6"}, {}, "Redis 7.0 or later, or Valkey, is needed"),
        ({"cluster_enabled": "1"}, {}, "Redis Cluster"),
        (
            {"maxmemory_policy": "volatile-lru", "maxmemory": "5"},
            {},
            "CONFIG SET maxmemory-policy noeviction",
        ),
        ({"role": "slave", "master_host": "h", "master_port": "1"}, {}, "the server is a replica of h:1"),
        ({"maxmemory_policy": "volatile-lru", "maxmemory": "0"}, {}, "if maxmemory were set"),
        ({"aof_enabled": "0"}, {"save": ""}, "loses all sessions"),
        ({"aof_enabled": "0"}, {}, "since its last snapshot"),
        ({}, {"appendfsync": "no"}, "often 30 s"),
    ],
)
def test_a_server_is_judged_by_what_it_says(
    info: dict[str, str], settings: dict[str, str], verdict: Verdict | str
) -> None:
    found = judge(GOOD | info, settings)

    if isinstance(verdict, Verdict):
        assert found == verdict
    else:
        assert verdict in found.refusal + found.unavailable + "".join(found.warnings)


def test_on_a_cluster_a_server_must_be_a_node_of_one_and_may_be_a_replica() -> None:
    node = GOOD | {"cluster_enabled": "1"}

    assert judge(node, {}, is_cluster=True) == Verdict()
    assert judge(node | {"role": "slave"}, {}, is_cluster=True) == Verdict()
    assert "redis+cluster://" in judge(node, {}).refusal
    assert "no node of a Redis Cluster" in judge(GOOD | {"cluster_enabled": "0"}, {}, is_cluster=True).refusal


def test_the_answer_to_info_is_read_by_name() -> None:
    assert fields_of(b"# Server\r\nredis_version:7.0.15\r\nos:a:b\r\n\r\n") == {
        "redis_version": "7.0.15",
        "os": "a:b",
    }


def lost(cause: OSError) -> LostConnection:
    """The library's error for an error of the system."""
    try:
        try:
            raise cause
        except OSError:
            raise LostConnection("10.0.0.1:6379 hunter2") from None
    except LostConnection as exc:
        return exc


@pytest.mark.parametrize(
    ("exc", "name", "hint"),
    [
        (
            BaseParser.parse_error("LOADING x hunter2"),
            "LOADING: the server loads its data",
            "when that is done",
        ),
        (BaseParser.parse_error("READONLY x"), "READONLY: the server is a replica", "Sentinels"),
        (BaseParser.parse_error("OOM x"), "OOM: maxmemory is reached", "raise maxmemory"),
        (BaseParser.parse_error("NOAUTH x"), "NOAUTH: the server wants a password", "-redis.address"),
        (BaseParser.parse_error("WRONGPASS x"), "WRONGPASS: wrong user or password", "-redis.address"),
        (BaseParser.parse_error("MISCONF x"), "MISCONF: the server cannot write to its disk", "see its log"),
        (BaseParser.parse_error("NOREPLICAS x"), "NOREPLICAS: too few replicas follow", "min-replicas"),
        (BaseParser.parse_error("BUSY x"), "BUSY: another script", "SCRIPT KILL"),
        (BaseParser.parse_error("CLUSTERDOWN x"), "CLUSTERDOWN: the cluster is down", "CLUSTER INFO"),
        (BaseParser.parse_error("MOVED 1 h:1"), "MOVED: another node of the cluster", "redis+cluster://"),
        (BaseParser.parse_error("ASK 1 h:1"), "ASK: a slot is being moved", "wait"),
        (BaseParser.parse_error("TRYAGAIN x"), "TRYAGAIN: a slot is being moved", "wait"),
        (BaseParser.parse_error("MASTERDOWN x"), "MASTERDOWN: the server is a replica", "primary"),
        (
            BaseParser.parse_error("NOPERM run the 'get' command"),
            "NOPERM: the user lacks a right: +get",
            "ACL",
        ),
        (BaseParser.parse_error("ERR unknown command 'hunter2'"), "ERR: the server lacks a command", "7.0"),
        (
            BaseParser.parse_error(
                "ERR Unknown Redis command called from script script: 1, on @user_script:1."
            ),
            "ERR: the server lacks a command",
            "rename-command",
        ),
        (BaseParser.parse_error("ERR hunter2"), "ERR: the server refuses a command", ""),
        (
            BaseParser.parse_error("ERR max number of clients reached"),
            "the server has no connection left",
            "max",
        ),
        (
            lost(ConnectionRefusedError(111, "hunter2")),
            "ConnectionRefusedError: connection refused",
            "host and port",
        ),
        (lost(socket.gaierror(-2, "hunter2")), "the name of the host cannot be resolved", ""),
        (lost(ssl.SSLError(1, "hunter2")), "TLS: the handshake failed", "cacert"),
        (LostConnection("hunter2"), "ConnectionError: the connection is closed", ""),
        (TimeoutError(), "TimeoutError: no answer in time", "firewall"),
        (NotReplicated(), "NotReplicated: too few replicas have confirmed", "-redis.wait"),
        (NoPrimary("no Sentinel names the primary"), "NoPrimary: no Sentinel names the primary", ""),
        (NotPrimary("it is a replica of h:1"), "NotPrimary: it is a replica of h:1", ""),
        (Uncovered("slot 7 has no primary"), "Uncovered: slot 7 has no primary", ""),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_fault_has_a_name_and_what_to_look_at(exc: Exception, name: str, hint: str) -> None:
    assert name in name_of(exc)
    assert hint in hint_of(exc)
    assert "hunter2" not in name_of(exc) + hint_of(exc)


def test_a_fault_without_a_hint_is_told_by_its_name_alone() -> None:
    assert advice(faults, LostConnection()) == "ConnectionError: the connection is closed"
    assert advice(faults, NotReplicated()) == (
        "NotReplicated: too few replicas have confirmed a write; "
        "see -redis.wait, and connected_slaves of INFO replication"
    )


def test_what_a_node_has_refused_is_sent_again_and_nothing_else() -> None:
    refused = (
        "MOVED 1 h:1",
        "ASK 1 h:1",
        "TRYAGAIN x",
        "CLUSTERDOWN x",
        "MASTERDOWN x",
        "READONLY x",
        "LOADING x",
    )
    others = (
        "OOM x",
        "ERR x",
        "NOSCRIPT x",
        "MISCONF x",
        "NOREPLICAS x",
        "UNBLOCKED x",
        "BUSY x",
        "NOPERM x",
    )

    assert all(is_not_done(BaseParser.parse_error(text)) for text in refused)
    assert is_not_done(NotPrimary())
    assert not any(is_not_done(BaseParser.parse_error(text)) for text in others)
    assert not any(
        map(is_not_done, (NotReplicated(), LostConnection(), TimeoutError(), OSError(), Uncovered()))
    )
    assert [text for text in refused if is_elsewhere(BaseParser.parse_error(text))] == list(refused[:3])
    assert [
        moved_to(BaseParser.parse_error(text))
        for text in ("MOVED 1 10.0.0.1:7", "MOVED 1 :7", "MOVED 1 ?:7", "ASK 1 h:1")
    ] == [
        ("10.0.0.1", 7),
        ("", 7),
        ("", 7),
        None,
    ]


class LinkOfANodeThatHandsItsSlotsOver:
    """Stands for a connection to a node that does the scripts, and has refused each mark behind them."""

    def __init__(self, refusal: str) -> None:
        self.refusal = refusal
        self.identity, self.epoch = "", 0

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        return [self._reply(command) for command in commands]

    def _reply(self, command: Command) -> object:
        if command[0] == "WAIT":
            return 5
        return BaseParser.parse_error(self.refusal) if command[1] == scripts.MARK.sha else [1]

    async def is_usable(self) -> bool:
        return True

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("refusal", ["MOVED 1 h:1", "TRYAGAIN x", "READONLY x", "CLUSTERDOWN x"])
async def test_a_script_that_was_done_is_not_taken_for_refused_with_the_mark_behind_it(refusal: str) -> None:
    async def connect() -> Any:  # noqa: ANN401  # stands for a Link
        return LinkOfANodeThatHandsItsSlotsOver(refusal)

    metrics = QueryMetrics(CollectorRegistry(), "redis")
    server = Server(connect, size=1, failures=Failures(metrics), metrics=metrics)
    spaces = [((2, f"{bucket}x", f"{bucket}none"), ("name",)) for bucket in "abcde"]
    replies = await server.run(scripts.TOUCH, spaces, Sending(timeout_s=1, wait=1, is_write=True))

    assert len(replies) == 5
    assert not any(map(is_not_done, replies))
    assert all(isinstance(reply, NotReplicated) for reply in replies)


async def test_a_server_whose_place_another_has_taken_keeps_no_connection() -> None:
    opened, closed = [], []

    class Link(LinkOfANodeThatHandsItsSlotsOver):
        async def close(self) -> None:
            closed.append(self)

    async def connect() -> Any:  # noqa: ANN401  # as above
        opened.append(Link("READONLY x"))
        return opened[-1]

    async def work(_: object) -> None:
        has_begun.set()
        await may_end.wait()

    metrics = QueryMetrics(CollectorRegistry(), "redis")
    server = Server(connect, size=1, failures=Failures(metrics), metrics=metrics)
    has_begun, may_end = asyncio.Event(), asyncio.Event()
    using = [asyncio.create_task(server.use("work", work, timeout_s=5)) for _ in range(2)]
    await has_begun.wait()
    # The second call waits for the connection of the first, and will need one of its own.
    await server.retire()
    assert closed == []
    may_end.set()
    await asyncio.gather(*using)

    assert len(opened) == 2
    assert closed == opened
    assert not server.idle


def test_only_what_a_retry_cannot_mend_is_a_refusal() -> None:
    refused = ("NOAUTH x", "WRONGPASS x", "NOPERM x", "ERR DB index is out of range")
    passing = ("LOADING x", "OOM x", "READONLY x", "ERR x", "MISCONF x")

    assert all(is_refusal(BaseParser.parse_error(text)) for text in refused)
    assert not any(is_refusal(BaseParser.parse_error(text)) for text in passing)
