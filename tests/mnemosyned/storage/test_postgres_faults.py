"""What the log says of faults of PostgreSQL: their names, what to look at, and how often."""

from __future__ import annotations

import logging
import socket
import ssl
from typing import NamedTuple

import asyncpg
import pytest

from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.fault_log import FaultLog
from mnemosyned.storage.postgres import faults as postgres_faults
from mnemosyned.storage.postgres import session_settings
from mnemosyned.storage.postgres.address_in_use import AddressInUse, PostgresOptions
from mnemosyned.storage.postgres.faults import hint_of, name_of


def postgres_error(sqlstate: str) -> asyncpg.PostgresError:
    return asyncpg.PostgresError.new({"C": sqlstate, "M": "row of hunter2", "S": "ERROR"})


@pytest.mark.parametrize(
    ("exc", "name", "hint"),
    [
        (postgres_error("28P01"), "28P01 invalid_password", "-postgres.address"),
        (postgres_error("3D000"), "3D000 invalid_catalog_name", "create the database"),
        (postgres_error("53300"), "53300 too_many_connections", "max_connections"),
        (postgres_error("57P03"), "57P03 cannot_connect_now", "starts, stops or recovers"),
        (postgres_error("42501"), "42501 insufficient_privilege", "grant"),
        (postgres_error("42P01"), "42P01 undefined_table", "table is missing"),
        (postgres_error("25006"), "25006 read_only_sql_transaction", "read-only"),
        (postgres_error("08P01"), "08P01 protocol_violation", "pooler"),
        (postgres_error("57014"), "57014 query_canceled", "-postgres.statement.timeout"),
        (
            ConnectionRefusedError(111, "Connect call failed ('10.0.0.1', 5432)"),
            "connection refused",
            "host and",
        ),
        (ConnectionResetError(104, "x"), "connection reset by peer", ""),
        (socket.gaierror(-2, "Name or service not known"), "the name of the host cannot be resolved", "DNS"),
        (TimeoutError(), "no answer in time", "firewall"),
        (ConnectionError('server at "h:1" rejected SSL upgrade'), "TLS: the server has none", "sslmode"),
        (ssl.SSLError(1, "[SSL: TLSV1_ALERT_UNKNOWN_CA]"), "TLS: the handshake failed", "sslmode"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_fault_has_a_name_and_what_to_look_at(exc: Exception, name: str, hint: str) -> None:
    assert name_of(exc) == name
    assert hint in hint_of(exc)


def test_a_refusal_says_what_the_fault_says() -> None:
    options = PostgresOptions(dsn="", pool_size=1, connect_timeout_s=1, statement_timeout_s=1)
    in_use = AddressInUse(options, on_later=lambda: None)

    assert str(in_use.refused(TimeoutError())) == (
        "PostgreSQL: connect: no answer in time; the server is overloaded, or a firewall drops packets: "
        "see host and port in the address"
    )
    assert str(in_use.refused(ConnectionResetError(104, "Gone"))) == (
        "PostgreSQL: connect: connection reset by peer: [Errno 104] Gone"
    )


def test_a_fault_is_logged_at_its_beginning_and_once_a_minute_with_how_often(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = [0.0]
    faults = FaultLog(postgres_faults, lambda: now_s[0])
    faults.where = {"server": "h:5432", "database": "d", "user": "u"}
    # An outage of two minutes at 100 calls a second.
    for tick in range(12_000):
        now_s[0] = tick / 100
        faults.failed("load", ConnectionRefusedError(111, "x"))
    first, second = caplog.records

    assert (first.message, first.levelno) == ("storage_failed", logging.WARNING)
    assert first.query == "load"  # type: ignore[attr-defined]
    assert (first.server, first.database, first.user) == ("h:5432", "d", "u")  # type: ignore[attr-defined]
    assert not hasattr(first, "times")
    assert second.times == 6001  # type: ignore[attr-defined]
    assert second.since  # type: ignore[attr-defined]


def test_another_fault_and_a_fault_that_comes_back_are_logged_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = [0.0]
    faults = FaultLog(postgres_faults, lambda: now_s[0])
    for at_s, exc in (
        (0, TimeoutError()),
        (1, postgres_error("53300")),
        (2, TimeoutError()),
        (70, TimeoutError()),
        (200, TimeoutError()),
    ):
        now_s[0] = at_s
        faults.failed("load", exc)

    assert [record.error for record in caplog.records] == [  # type: ignore[attr-defined]
        "TimeoutError", "53300", "TimeoutError", "TimeoutError",
    ]  # fmt: skip
    assert "hunter2" not in str([vars(record) for record in caplog.records])


class Version(NamedTuple):
    major: int


class OldServer:
    def get_server_version(self) -> Version:
        return Version(11)


async def test_a_server_that_is_too_old_is_refused_with_its_version() -> None:
    with pytest.raises(
        StorageRefused, match="PostgreSQL 11 is too old: mnemosyned needs version 12 or later"
    ):
        await session_settings.apply(OldServer(), 1.0, {}, is_pooled=False, is_plain=False)  # type: ignore[arg-type]
