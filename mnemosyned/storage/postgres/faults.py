"""What a fault of PostgreSQL is called, what to look at, and how often the log says so.

Errors fall into four classes:

- Refusals (`REFUSALS`): wrong password, no such database, no right. A retry ends the same way.
- Item faults (`ITEM_FAULTS`): the data of one item, or the lock on its row. The batch is run item by item.
- Transient (`TRANSIENT`) and all other errors of PostgreSQL: StorageUnavailable. Even an unknown SQLSTATE is
  no bug of the caller, and the caller may retry.
- Anything else, such as a TypeError: a bug, which passes through and becomes INTERNAL.

Naming them:

    exception ──> error (SQLSTATE or kind), condition (PostgreSQL's name), hint ──> `storage_failed`

Never the server's own text: it may quote a row, and so a token. The SQLSTATE and its name say enough,
together with which server, which database and user, and what was being done.

A fault is logged when it begins. While it lasts it is logged once a minute, with how often it has happened
since when: an outage at ten thousand calls a second is two lines a minute. A fault that has not happened for
a minute begins again. `storage/health.py` logs the end of an outage.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeGuard

import asyncpg

from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres.address import AddressError

log = logging.getLogger(__name__)

# Not the fault of one item; a retry may succeed.
TRANSIENT: Final = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    # What the end of a transaction raises if its connection broke in between.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.TransactionRollbackError,
    asyncpg.PostgresSystemError,
)
Faults = tuple[type[Exception], ...]
# Caused by one item or its row, so the other items of the batch can succeed without it. LockNotAvailable is
# here though a batch cannot tell whose lock it was: run alone, each item waits for its own row only.
ITEM_FAULTS: Final = (
    asyncpg.LockNotAvailableError,
    asyncpg.UniqueViolationError,
    # Of constraints that were added under the daemon; a start refuses them (`table_check.py`).
    asyncpg.CheckViolationError,
    asyncpg.ForeignKeyViolationError,
    asyncpg.ExclusionViolationError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.DataError,
)

# At the start of a connection: a value in the address that the server does not take.
CONFIGURED_WRONG: Final = (
    asyncpg.DataError,
    asyncpg.SyntaxOrAccessError,
    asyncpg.CantChangeRuntimeParamError,
)
# What PgBouncer answers to a start-up that it will always refuse. Its other answers with the same SQLSTATE
# are those of a server that is unavailable.
_POOLER_REFUSALS: Final = (
    "unsupported startup parameter",
    "no such database",
    "no such user",
    "authentication failed",
    "SSL required",
)

# A retry ends the same way until the configuration or the server's grants change.
REFUSALS: Final = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
)

_PERIOD_S: Final = 60.0
# SQLSTATEs are few, but a server may invent some.
_MAX_FAULTS: Final = 200
_HINTS: Final = {
    "08P01": "a pooler or proxy may refuse the start-up: see its log, and `options` in the address",
    "22P05": "the database's encoding cannot hold the text: use a database in UTF8",
    "25006": "the server is read-only, perhaps a standby: name the primary, or all hosts and "
    "target_session_attrs=read-write",
    "25P03": "this process was stalled within a transaction",
    "26000": "a pooler in front of the server does not keep prepared statements: use its session mode",
    "42P05": "a pooler in front of the server shares prepared statements: use its session mode",
    "28000": "see pg_hba.conf of the server: the user, database, address of this node, or TLS is not allowed",
    "28P01": "wrong password or user: see the address of -postgres.address or its file",
    "3D000": "create the database, or correct its name in the address",
    "3F000": "create the schema, or grant the right to create it: see docs/storage.md",
    "40001": "transactions of others run in a stricter isolation, or the server is a standby",
    "40P01": "other statements on the table lock rows in another sequence",
    "42501": "grant the user the rights that docs/storage.md lists",
    "42703": "the table has other columns: storage_lost says which SQL mends it",
    "42704": "the server does not know a parameter: see `options` in the address",
    "22023": "the server does not take a value: see `options` in the address",
    "42P01": "the table is missing: the daemon makes it again after some seconds, empty, if it may",
    "42P10": "the table has no primary key on access_token: storage_lost says how to make it",
    "53100": "the server's disk is full",
    "53200": "the server is out of memory",
    "53300": "all connections of the server are in use: raise max_connections, or lower -postgres.pool.size",
    "53400": "a limit of the server's configuration is reached",
    "55P03": "another transaction holds the row or table: see pg_locks",
    "57014": "the statement took longer than -postgres.statement.timeout: see pg_stat_activity and locks",
    "57P01": "the server was stopped, or an administrator ended the connection",
    "57P02": "the server crashed and recovers: see its log",
    "57P03": "the server starts, stops or recovers: see its log",
    "57P05": "the server ends idle sessions: see idle_session_timeout",
    "58030": "the server cannot use its disk: see its log",
}


# Classes of SQLSTATE that the table itself causes. Others, such as a full disk, may pass.
_OF_THE_TABLE: Final = (
    "0A",
    "21",
    "22",
    "23",
    "27",
    "2F",
    "38",
    "39",
    "3F",
    "42",
    "44",
    "P0",
    "55000",
    "XX000",
)


def is_of_the_table(exc: BaseException | None) -> bool:
    """Tell whether what the table is, or who may use it, is the likely cause."""
    return (getattr(exc, "sqlstate", None) or "").startswith(_OF_THE_TABLE)


def is_refusal_of_a_pooler(exc: BaseException | None) -> TypeGuard[asyncpg.ProtocolViolationError]:
    """Tell whether a pooler refuses the start-up of a connection for good."""
    return isinstance(exc, asyncpg.ProtocolViolationError) and any(
        words in str(exc) for words in _POOLER_REFUSALS
    )


def error_of(exc: BaseException) -> str:
    """Return the SQLSTATE, or the kind of an error that has none."""
    return getattr(exc, "sqlstate", None) or type(exc).__name__


def condition_of(exc: BaseException) -> str:
    """Return PostgreSQL's name of the condition, such as invalid_password; or the reason in words."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"TLS: the server's certificate: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError):
        # A constant of OpenSSL; the whole text names its source files.
        reason = getattr(exc, "reason", None) or "the handshake failed"
        return f"TLS: {reason.lower().replace('_', ' ')}"
    if isinstance(exc, socket.gaierror):
        return "the name of the host cannot be resolved"
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    if isinstance(exc, OSError):
        return _system_reason(exc)
    if isinstance(exc, asyncpg.TargetServerAttributeNotMatched):
        return "no server that can be written to"
    if isinstance(exc, asyncpg.PostgresError):
        name = type(exc).__name__.removesuffix("Error")
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    # Ours have texts of their own.
    return str(exc) if isinstance(exc, StorageRefused | AddressError) else "the connection cannot be used"


def name_of(exc: BaseException) -> str:
    """Return both in a few words: `28P01 invalid_password`."""
    sqlstate = getattr(exc, "sqlstate", None)
    return f"{sqlstate} {condition_of(exc)}" if sqlstate else condition_of(exc)


def hint_of(exc: BaseException) -> str:
    """Return what to look at; empty: the name says it."""
    sqlstate = getattr(exc, "sqlstate", None)
    if sqlstate:
        return _HINTS.get(sqlstate, "")
    if isinstance(exc, ssl.SSLCertVerificationError):
        return "see sslrootcert and the name of the host in the address, and the server's certificate"
    if isinstance(exc, ssl.SSLError):
        return "see sslmode in the address, and ssl in the server's configuration"
    if isinstance(exc, socket.gaierror):
        return "see the host in the address, and this machine's DNS"
    if isinstance(exc, ConnectionRefusedError):
        return "no server listens there: see host and port in the address, and listen_addresses"
    if isinstance(exc, TimeoutError):
        return "the server is overloaded, or a firewall drops packets: see host and port in the address"
    if type(exc) is ConnectionError:
        return "the server has no TLS: see sslmode in the address, and ssl in the server's configuration"
    return ""


def _system_reason(exc: OSError) -> str:
    if exc.errno:
        # Not `strerror`: asyncio puts the address into it.
        return os.strerror(exc.errno).lower()
    if "rejected SSL upgrade" in str(exc):
        return "TLS: the server has none"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(exc).__name__.removesuffix("Error")).lower()
    return words or "the system refuses"


@dataclass(slots=True)
class _Lasting:
    """One fault: since when, how often, and when it was logged last."""

    since: str
    last_s: float
    logged_s: float
    count: int = 0


class FaultLog:
    """Logs each fault when it begins, and once a minute while it lasts."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._lasting: dict[tuple[str, str], _Lasting] = {}
        self.where: dict[str, str] = {}  # fields of each line

    def described(self, doing: str, exc: BaseException) -> str:
        """Return a fault in one line: what was being done, what happened, and where."""
        where = ", ".join(f"{name} {value}" for name, value in self.where.items())
        return f"{doing}: {name_of(exc)} ({where})"

    def failed(self, doing: str, exc: BaseException) -> None:
        """Log a fault of what was being done, unless the log has it."""
        now_s, error = self._now_s(), error_of(exc)
        # One key for all statements: an outage concerns them all.
        key = (error, condition_of(exc))
        lasting = self._lasting.get(key)
        if lasting is None or now_s - lasting.last_s > _PERIOD_S:
            if len(self._lasting) >= _MAX_FAULTS:
                self._lasting.clear()
            since = datetime.now(tz=UTC).isoformat(timespec="seconds")
            lasting = self._lasting[key] = _Lasting(since=since, last_s=now_s, logged_s=-_PERIOD_S + now_s)
        lasting.last_s = now_s
        lasting.count += 1
        if now_s - lasting.logged_s < _PERIOD_S:
            return
        lasting.logged_s = now_s
        lasts = {"times": lasting.count, "since": lasting.since} if lasting.count > 1 else {}
        tried = "; ".join(getattr(exc, "__notes__", ()))
        log.warning(
            "storage_failed",
            extra={
                "query": doing,
                "error": error,
                "condition": condition_of(exc),
                **self.where,
                **({"tried": tried} if tried else {}),
                **({"hint": hint} if (hint := hint_of(exc)) else {}),
                **lasts,
            },
        )
