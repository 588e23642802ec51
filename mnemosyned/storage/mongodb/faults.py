"""What a fault of MongoDB is called, and what to look at.

    exception ──> error (the server's name, or the kind), condition (in words), hint ──> `storage_failed`

Never the server's own text: that of a duplicate key quotes the key, which may be a token. How often the log
says so: `storage/fault_log.py`.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Final

from bson.errors import BSONError
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    ExecutionTimeout,
    InvalidOperation,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
    WriteConcernError,
)

from mnemosyned.storage.addresses import AddressError
from mnemosyned.storage.fault_log import system_reason


class NoPrimary(Exception):
    """No server can be written to; the text says what the driver knows of them, in words."""

    def __init__(self, text: str, causes: Sequence[BaseException] = ()) -> None:
        super().__init__(text)
        self.causes = causes


# What ends here as StorageUnavailable. Anything else, such as a TypeError, is a bug.
FAULTS: Final = (PyMongoError, BSONError, OSError, NoPrimary)
_AUTHENTICATION_FAILED: Final = 18
# Of Atlas, whose proxies have codes of their own.
_ATLAS_ERROR: Final = 8000
_UNAUTHORIZED: Final = 13
DUPLICATE_KEY: Final = 11000
# The server that was asked is no primary any more, or ends.
_STEPPED_DOWN: Final = ("the server is not the primary", "a new primary is elected within seconds")
_ENDS: Final = ("the server ends, or its primary steps down", "a new primary is elected within seconds")
_TOO_LONG: Final = (
    "the server did not finish in time",
    "it is overloaded, or too few members answer for a majority: see rs.status()",
)
_NOT_REPLICATED: Final = (
    "no majority of the members has confirmed a write",
    "see rs.status(): a majority of the members must answer, with their data",
)
_LOGIN: Final = ("wrong user or password", "see the address of -mongodb.address or its file, and authSource")

# By the server's code: what it means, and what to look at.
_MEANINGS: Final = {
    _UNAUTHORIZED: ("the user lacks a right", "docs/mongodb.md has the role that the daemon needs"),
    _AUTHENTICATION_FAILED: _LOGIN,
    _ATLAS_ERROR: ("Atlas refuses the user", "see the user, its password and its rights in Atlas"),
    11: ("the server does not know the user", "see authSource in the address"),
    20: ("the server is no replica set", "start it with --replSet, and run rs.initiate()"),
    50: _TOO_LONG,
    64: _NOT_REPLICATED,
    100: _NOT_REPLICATED,
    26: ("a collection is missing", "the daemon makes it again within seconds, if it may"),
    59: ("the server lacks a command", "MongoDB 7.0 or later is needed"),
    85: ("an index of this name has another form", "docs/mongodb.md has the indexes that the daemon needs"),
    86: ("an index of this name has another form", "docs/mongodb.md has the indexes that the daemon needs"),
    112: ("others write the same documents", ""),
    121: ("a validator of the collection refuses a session", "see db.getCollectionInfos()"),
    251: ("a transaction is not known any more", ""),
    10107: _STEPPED_DOWN,
    13435: _STEPPED_DOWN,
    13436: ("the server is not ready yet", "it is starting, or catching up"),
    10058: _STEPPED_DOWN,
    189: _ENDS,
    91: _ENDS,
    11600: _ENDS,
    11602: _ENDS,
    14031: ("the disk of the server is full", "see its log"),
    DUPLICATE_KEY: ("an index refuses a session as a duplicate", "only _id may be unique"),
    72: ("the server refuses an option", "MongoDB 7.0 or later is needed, as a replica set or with a mongos"),
}

# By the driver's kind, the first that fits.
_KINDS: Final = (
    (WaitQueueTimeoutError, "no connection is free"),
    (ConfigurationError, "the record of mongodb+srv cannot be looked up, or does not fit the address"),
    (ConnectionFailure, "the connection is closed"),
    (InvalidOperation, "the client was closed"),
    (OperationFailure, "the server refuses a command"),
)
_NOT_TRUSTED: Final = ssl.SSLCertVerificationError(1, "")
_NOT_TRUSTED.verify_message = "it is not trusted, or is for another name"
_WORDS: Final[Mapping[str, OSError]] = {
    "CERTIFICATE_VERIFY_FAILED": _NOT_TRUSTED,
    "SSL": ssl.SSLError(1, ""),
    "timed out": TimeoutError(),
    "not known": socket.gaierror(socket.EAI_NONAME, ""),
    "name resolution": socket.gaierror(socket.EAI_AGAIN, ""),
}


def is_refusal(exc: BaseException) -> bool:
    """Tell whether a retry ends the same way, until the configuration or the rights of the user change."""
    if _is_of_another_age(exc):
        return True
    return isinstance(exc, OperationFailure) and exc.code in {
        _UNAUTHORIZED,
        _AUTHENTICATION_FAILED,
        _ATLAS_ERROR,
        11,
        20,
        59,
        85,
        86,
    }


def is_login_failure(exc: BaseException) -> bool:
    """Tell whether the user or its password may have changed."""
    return isinstance(exc, OperationFailure) and exc.code in {_AUTHENTICATION_FAILED, _ATLAS_ERROR, 11}


def is_late(exc: BaseException) -> bool:
    """Tell whether the time was up."""
    return bool(getattr(exc, "timeout", False)) or isinstance(exc, TimeoutError | NoPrimary)


def error_of(exc: BaseException) -> str:
    """Return the server's name of an error, or the kind of one that has none."""
    name = str(_details(exc).get("codeName", ""))
    if re.fullmatch(r"[A-Za-z]{2,60}", name):
        return name
    return f"code {_code(exc)}" if _code(exc) else type(_cause(exc)).__name__


def condition_of(exc: BaseException) -> str:
    """Return what has happened, in words."""
    meaning, _ = _meaning(exc)
    if meaning:
        return meaning
    cause = _cause(exc)
    if isinstance(exc, NoPrimary | AddressError):
        return str(exc)
    if isinstance(cause, TimeoutError | NetworkTimeout):
        return "no answer in time"
    if isinstance(cause, OSError):
        return system_reason(cause)
    kinds = (text for kind, text in _KINDS if isinstance(exc, kind))
    return next(kinds, "no valid answer")


def name_of(exc: BaseException) -> str:
    """Return both in a few words: `NotWritablePrimary: the server is not the primary`."""
    return f"{error_of(exc)}: {condition_of(exc)}"


def hint_of(exc: BaseException) -> str:
    """Return what to look at; empty: the name says it."""
    _, hint = _meaning(exc)
    if hint:
        return hint
    causes = [_cause(one) for one in exc.causes] if isinstance(exc, NoPrimary) else [_cause(exc)]
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return "see tls and tlsCAFile in the address, the name of the host, and net.tls of the server"
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return "no server listens there: see hosts and ports in the address, and net.bindIp of the server"
    if isinstance(exc, NoPrimary):
        return "see rs.status(): a majority of the members must answer; and replicaSet in the address"
    if any(isinstance(cause, TimeoutError | NetworkTimeout) for cause in causes):
        return "the server is overloaded, or a firewall drops packets: see hosts and ports in the address"
    return ""


def no_primary(
    exc: BaseException, failures: Sequence[tuple[str, BaseException]], roles: Sequence[str]
) -> NoPrimary:
    """Return what a failed wait for a primary means; `failures` are by server."""
    reasons = sorted({condition_of(cause) for _, cause in failures})
    known = [role for role in roles if role != "Unknown"]
    # The driver drops servers that belong to another replica set than that of the address.
    nothing = "none has answered yet" if roles else "none is of the replica set in the address"
    text = "no server can be written to: " + (", ".join([*reasons, *known]) or nothing)
    failure = NoPrimary(text, [cause for _, cause in failures] or [exc])
    if failures:
        failure.add_note("; ".join(f"{server}: {name_of(cause)}" for server, cause in failures))
    return failure


def _meaning(exc: BaseException) -> tuple[str, str]:
    if isinstance(exc, ExecutionTimeout):
        return _TOO_LONG
    if _is_of_another_age(exc):
        return "the server is too old or too new for the driver", "MongoDB 7.0 or later is needed"
    known = _MEANINGS.get(_code(exc))
    if known is not None:
        return known
    return _NOT_REPLICATED if isinstance(exc, WriteConcernError) or _lacks_majority(exc) else ("", "")


def _is_of_another_age(exc: BaseException) -> bool:
    return isinstance(exc, ConfigurationError) and "wire version" in str(exc)


def _details(exc: BaseException) -> Mapping[str, Any]:
    """Return the server's answer, if there is one."""
    found = exc.details if isinstance(exc, OperationFailure | NotPrimaryError) else None
    return found if isinstance(found, Mapping) else {}


def _code(exc: BaseException) -> int:
    """Return the server's code, or 0; of a bulk write, that of its first failure."""
    details = _details(exc)
    failures = [*details.get("writeErrors", ()), *details.get("writeConcernErrors", ()), details]
    if isinstance(exc, OperationFailure) and exc.code:
        failures.append({"code": exc.code})
    return next((int(one["code"]) for one in failures if one.get("code")), 0)


def _lacks_majority(exc: BaseException) -> bool:
    return isinstance(exc, BulkWriteError) and bool(exc.details.get("writeConcernErrors"))


def _cause(exc: BaseException) -> BaseException:
    """Return the error of the system that the library has wrapped, if it has."""
    if not isinstance(exc, ConnectionFailure):
        return exc
    cause = exc.__cause__ or exc.__context__
    # One without a number is the library's own, of a connection that was closed.
    if isinstance(cause, OSError) and (cause.errno is not None or type(cause) is not OSError):
        return cause
    # What it keeps of a server has lost its cause, and has its number or its words.
    number = re.search(r"\[Errno ([1-9]\d{0,3})\]", str(exc))
    if number is not None:
        return OSError(int(number[1]), "")
    return next((known for words, known in _WORDS.items() if words in str(exc)), exc)


def is_no_primary(exc: BaseException) -> bool:
    """Tell whether the driver has found no server to write to."""
    return isinstance(exc, ServerSelectionTimeoutError)
