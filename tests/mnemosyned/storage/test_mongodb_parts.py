"""The parts of the MongoDB engine that need no server: documents, judgements, and the names of faults."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import pytest
from bson import Binary, Int64
from bson.datetime_ms import DatetimeMS
from hypothesis import given
from hypothesis import strategies as st
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    DuplicateKeyError,
    ExecutionTimeout,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    ServerSelectionTimeoutError,
    WriteConcernError,
)

from mnemosyned.sessions.model import MAX_BAG_BYTES, DamagedSession, Session
from mnemosyned.sessions.page_token import between
from mnemosyned.storage.mongodb import documents
from mnemosyned.storage.mongodb.faults import hint_of, is_late, is_refusal, name_of, no_primary
from mnemosyned.storage.mongodb.server_check import refusal

AT_US = 1_790_000_000_000_000
STORED = {
    "_id": "t", "s": "sż", "c": "c", "r": "r", "b": b"bag", "e": Int64(AT_US), "v": b"v" * 8, "w": b"w" * 8,
}  # fmt: skip


def shown(**fields: object) -> dict[str, Any]:
    stored = {name: value for name, value in (STORED | fields).items() if value is not None}
    return {"_id": "t", "d": stored, "z": 100, "now": DatetimeMS(AT_US // 1000 - 1)}


def test_a_document_is_read_as_a_session() -> None:
    assert documents.session_of(shown()) == Session(
        access_token="t",
        subject_id="sż",
        subject_client="c",
        refresh_token="r",
        bag=b"bag",
        expires_at_us=AT_US,
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"s": None}, "its subject is missing, or not a string"),
        ({"c": 5}, "its client is missing, or not a string"),
        ({"r": b"r"}, "its refresh token is missing, or not a string"),
        ({"s": "\udcff"}, "a field is not UTF-8"),
        ({"b": None}, "its bag is missing, or not a binary"),
        ({"b": "text"}, "its bag is missing, or not a binary"),
        ({"b": Binary(b"x", 5)}, "its bag is missing, or not a binary"),
        ({"b": bytes(MAX_BAG_BYTES + 1)}, "a bag is longer than 4000000 bytes"),
        ({"e": None}, "its expiry is missing, or not a whole number"),
        ({"e": 1.5}, "its expiry is missing, or not a whole number"),
        ({"e": True}, "its expiry is missing, or not a whole number"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_document_is_called_so(fields: dict[str, Any], reason: str) -> None:
    found = documents.session_of(shown(**fields))

    assert isinstance(found, DamagedSession)
    assert found.reason == reason


def test_a_document_that_is_too_long_is_not_read() -> None:
    found = documents.session_of({"_id": "t", "d": None, "z": 9_000_000, "now": DatetimeMS(0)})

    assert isinstance(found, DamagedSession)
    assert "its document is longer than" in found.reason


def test_a_version_holds_no_large_value() -> None:
    version = documents.version_of(shown(v="x" * 1000))

    assert version == {
        "_id": "t",
        "e": {"$eq": AT_US},
        "$expr": {"$eq": [{"$bsonSize": "$$ROOT"}, 100]},
    }


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 400))
def test_a_part_of_a_key_is_no_greater_than_the_key_as_a_string_either(key: str, length: int) -> None:
    start = key.encode()[:length]
    text = documents.least_text(start)

    assert start <= text.encode() <= key.encode()


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_a_page_that_begins_between_two_keys_begins_with_the_second(one: str, other: str) -> None:
    last, following = sorted((one.encode(), other.encode() + b"x"))
    if last == following:
        return
    text = documents.least_text(between(last, following))

    assert last < text.encode() <= following


@given(st.binary(max_size=20))
def test_any_bytes_are_the_beginning_of_some_string(start: bytes) -> None:
    documents.least_text(start).encode()


GOOD = {"versionArray": [7, 0, 12, 0], "version": "7.0.12"}


@pytest.mark.parametrize(
    ("hello", "build_info", "complaint"),
    [
        ({"setName": "rs0"}, GOOD, ""),
        ({"msg": "isdbgrid"}, {"versionArray": [8, 2, 0, 0]}, ""),
        (
            {"setName": "rs0"},
            {"versionArray": [6, 0, 1, 0], "version": "6.0.1"},
            "its version is 6.0.1: MongoDB 7.0",
        ),
        ({"setName": "rs0"}, {}, "its version is unknown"),
        ({}, GOOD, "it stands alone, and has no transactions: start it with --replSet"),
    ],
)
def test_a_server_is_judged_by_what_it_says(
    hello: dict[str, Any], build_info: dict[str, Any], complaint: str
) -> None:
    found = refusal(hello, build_info)

    assert found.startswith(complaint)
    assert bool(found) == bool(complaint)


def failure(code: int, name: str) -> OperationFailure:
    return OperationFailure("hunter2", code, {"codeName": name, "errmsg": "hunter2"})


def lost(cause: OSError) -> AutoReconnect:
    """The library's error for an error of the system."""
    error = AutoReconnect("10.0.0.1:27017: hunter2")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("exc", "name", "hint"),
    [
        (failure(13, "Unauthorized"), "Unauthorized: the user lacks a right", "docs/mongodb.md"),
        (failure(18, "AuthenticationFailed"), "wrong user or password", "authSource"),
        (failure(8000, "AtlasError"), "AtlasError: Atlas refuses the user", "its rights"),
        (failure(20, "IllegalOperation"), "the server is no replica set", "--replSet"),
        (failure(64, "WriteConcernFailed"), "no majority of the members has confirmed", "rs.status()"),
        (
            failure(10107, "NotWritablePrimary"),
            "NotWritablePrimary: the server is not the primary",
            "elected",
        ),
        (
            NotPrimaryError("hunter2", {"code": 10107, "codeName": "NotWritablePrimary"}),
            "NotWritablePrimary: the server is not the primary",
            "elected",
        ),
        (NotPrimaryError("hunter2"), "NotPrimaryError: the connection is closed", ""),
        (failure(91, "ShutdownInProgress"), "the server ends", "elected"),
        (failure(11600, "InterruptedAtShutdown"), "the server ends", "elected"),
        (failure(86, "IndexKeySpecsConflict"), "an index of this name has another form", "docs/mongodb.md"),
        (failure(121, "DocumentValidationFailure"), "a validator of the collection refuses", "getCollection"),
        (failure(40, "hunter2 $"), "code 40: the server refuses a command", ""),
        (ExecutionTimeout("hunter2", 50), "code 50: the server did not finish in time", "rs.status()"),
        (WriteConcernError("hunter2", 79), "no majority of the members", "rs.status()"),
        (DuplicateKeyError("hunter2", 11000), "an index refuses a session as a duplicate", "_id"),
        (
            BulkWriteError({"writeErrors": [], "writeConcernErrors": [{"code": 64, "errmsg": "hunter2"}]}),
            "no majority of the members has confirmed",
            "rs.status()",
        ),
        (lost(ConnectionRefusedError(111, "hunter2")), "connection refused", "hosts and ports"),
        (lost(socket.gaierror(-2, "hunter2")), "the name of the host cannot be resolved", ""),
        (lost(ssl.SSLError(1, "hunter2")), "TLS: the handshake failed", "tlsCAFile"),
        (AutoReconnect("hunter2"), "AutoReconnect: the connection is closed", ""),
        # As the driver keeps it of a server.
        (
            AutoReconnect("hunter2: [SSL: CERTIFICATE_VERIFY_FAILED] x"),
            "server's certificate: it is not",
            "CA",
        ),
        (AutoReconnect("hunter2: [SSL: WRONG_VERSION_NUMBER] x"), "TLS: the handshake failed", "tlsCAFile"),
        (AutoReconnect("hunter2: [Errno 111] Connection refused"), "connection refused", "no server listens"),
        (AutoReconnect("hunter2: [Errno 111] Connect call failed"), "connection refused", "hosts and ports"),
        (AutoReconnect("hunter2: [Errno 113] Connect call failed"), "no route to host", ""),
        (AutoReconnect("hunter2: [Errno -2] Name or service not known"), "host cannot be resolved", ""),
        (AutoReconnect("hunter2: timed out"), "TimeoutError: no answer in time", "firewall"),
        (NetworkTimeout("hunter2"), "NetworkTimeout: no answer in time", "firewall"),
        (ConfigurationError("hunter2"), "the record of mongodb+srv cannot be looked up", ""),
        (
            ConfigurationError("hunter2 reports wire version 6, but this version of PyMongo requires 9"),
            "the server is too old or too new for the driver",
            "MongoDB 7.0",
        ),
        (TimeoutError(), "TimeoutError: no answer in time", "firewall"),
        (
            no_primary(ServerSelectionTimeoutError("hunter2"), [], ["RSSecondary", "Unknown"]),
            "NoPrimary: no server can be written to: RSSecondary",
            "rs.status()",
        ),
        (
            no_primary(ServerSelectionTimeoutError("hunter2"), [], ["Unknown"]),
            "NoPrimary: no server can be written to: none has answered yet",
            "rs.status()",
        ),
        (
            no_primary(ServerSelectionTimeoutError("hunter2"), [], []),
            "NoPrimary: no server can be written to: none is of the replica set in the address",
            "and replicaSet in the address",
        ),
        (
            no_primary(
                ServerSelectionTimeoutError("hunter2"),
                [("h:1", lost(ConnectionRefusedError(111, "hunter2")))],
                ["Unknown"],
            ),
            "NoPrimary: no server can be written to: connection refused",
            "no server listens there",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_fault_has_a_name_and_what_to_look_at(exc: Exception, name: str, hint: str) -> None:
    assert name in name_of(exc)
    assert hint in hint_of(exc)
    assert "hunter2" not in name_of(exc) + hint_of(exc) + "".join(getattr(exc, "__notes__", ()))


def test_only_what_a_retry_cannot_mend_is_a_refusal() -> None:
    assert all(is_refusal(failure(code, "x")) for code in (11, 13, 18, 20, 59, 85, 86, 8000))
    assert not any(is_refusal(failure(code, "x")) for code in (50, 64, 91, 112, 189, 10107, 11600, 14031))
    assert is_refusal(ConfigurationError("reports wire version 6"))
    assert not any(
        map(
            is_refusal,
            (ConfigurationError("no name"), AutoReconnect("x"), NetworkTimeout("x"), TimeoutError()),
        )
    )


def test_what_has_run_out_of_time_is_told_from_what_has_failed() -> None:
    late = (NetworkTimeout("x"), ServerSelectionTimeoutError("x"), ExecutionTimeout("x", 50), TimeoutError())

    assert all(map(is_late, late))
    assert not any(map(is_late, (AutoReconnect("x"), failure(13, "x"), OSError())))
