"""What a fault of PostgreSQL is called, and what to look at.

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

How often the log says so: `storage/fault_log.py`.
"""

from __future__ import annotations

import re
import socket
import ssl
from typing import Final, TypeGuard

import asyncpg

from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.fault_log import system_reason
from mnemosyned.storage.postgres.address import AddressError
from mnemosyned.storage.postgres.timeline import FormerPrimaryError


class NotPostgresqlError(ConnectionError):
    """What answers a new connection says what asyncpg cannot make sense of."""


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
    "40003": "the server does not know whether it has committed the statement",
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

# The first that fits.
_HINT_BY_KIND: Final = (
    (
        ssl.SSLCertVerificationError,
        "see sslrootcert and the name of the host in the address, and the server's certificate",
    ),
    (ssl.SSLError, "see sslmode in the address, and ssl in the server's configuration"),
    (socket.gaierror, "see the host in the address, and this machine's DNS"),
    (
        FormerPrimaryError,
        (
            "it was the primary before a failover: make it a standby of the new one (pg_rewind), "
            "or restart this daemon to use it all the same"
        ),
    ),
    (NotPostgresqlError, "another program answers there: see host and port in the address"),
    (
        ConnectionRefusedError,
        "no server listens there: see host and port in the address, and listen_addresses",
    ),
    (
        TimeoutError,
        "the server is overloaded, or a firewall drops packets: see host and port in the address",
    ),
)

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
    if isinstance(exc, OSError):
        return system_reason(exc)
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
    if type(exc) is ConnectionError:
        return "the server has no TLS: see sslmode in the address, and ssl in the server's configuration"
    return next((hint for kind, hint in _HINT_BY_KIND if isinstance(exc, kind)), "")
