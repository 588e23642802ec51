"""Our errors as gRPC statuses: the one table, in both directions.

    handler ── MnemosyneError ──> GRPC_STATUS ──> client, with the error's text
    owner ── code, text, over the hop ──> error_of ──> the same error at the entry node ──> client

A test proves that every subclass of MnemosyneError is in the table. Which status an error gets decides what
clients do:

- UNAVAILABLE is what clients retry. Many of them retry nothing else.
- DEADLINE_EXCEEDED and UNAVAILABLE of an owner make the entry node ask the storage itself (api/router.py).
- INTERNAL is what a bug becomes, and what an unreadable message becomes, because gRPC's own servers say so.
"""

from __future__ import annotations

from typing import Final

from http2.status import StatusCode
from mnemosyned.errors import (
    CorruptSession,
    DeadlineExceeded,
    InvalidArgument,
    MalformedMessage,
    MessageTooLarge,
    MnemosyneError,
    NotJoined,
    NotOurCluster,
    Overloaded,
    PermissionDenied,
    SessionAlreadyExists,
    SessionNotFound,
    StorageUnavailable,
    Unauthenticated,
    Unimplemented,
    UnknownService,
)

GRPC_STATUS: Final[dict[type[MnemosyneError], StatusCode]] = {
    InvalidArgument: StatusCode.INVALID_ARGUMENT,
    SessionNotFound: StatusCode.NOT_FOUND,
    UnknownService: StatusCode.NOT_FOUND,
    SessionAlreadyExists: StatusCode.ALREADY_EXISTS,
    StorageUnavailable: StatusCode.UNAVAILABLE,
    NotJoined: StatusCode.UNAVAILABLE,
    # Not UNAVAILABLE: a retry reads the same bytes.
    CorruptSession: StatusCode.DATA_LOSS,
    # Not RESOURCE_EXHAUSTED: it was not begun, and a retry may succeed, perhaps on another node.
    Overloaded: StatusCode.UNAVAILABLE,
    MessageTooLarge: StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    Unimplemented: StatusCode.UNIMPLEMENTED,
    Unauthenticated: StatusCode.UNAUTHENTICATED,
    PermissionDenied: StatusCode.PERMISSION_DENIED,
    NotOurCluster: StatusCode.FAILED_PRECONDITION,
    # gRPC's own servers answer so to a message that they cannot parse.
    MalformedMessage: StatusCode.INTERNAL,
}

# Two errors may share a status. Reversed, the one that the table names first wins.
_ERROR_BY_CODE: Final = {code.value: error for error, code in reversed(GRPC_STATUS.items())}


def error_of(code: int, text: str) -> MnemosyneError:
    """Return the error that the owner of a token has answered with.

    The text is taken as it is, so that a client sees the same text wherever its call was handled. A code
    that no error of this release has, perhaps of a later release, becomes INTERNAL.
    """
    return _ERROR_BY_CODE.get(code, MalformedMessage)(text)
