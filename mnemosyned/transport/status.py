"""Our errors as gRPC statuses: the one table."""

from __future__ import annotations

from typing import Final

from grpc import StatusCode

from mnemosyned.errors import (
    CorruptBag,
    DeadlineExceeded,
    InvalidArgument,
    MalformedMessage,
    MessageTooLarge,
    MnemosyneError,
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
    CorruptBag: StatusCode.DATA_LOSS,
    Overloaded: StatusCode.UNAVAILABLE,
    MessageTooLarge: StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    Unimplemented: StatusCode.UNIMPLEMENTED,
    Unauthenticated: StatusCode.UNAUTHENTICATED,
    PermissionDenied: StatusCode.PERMISSION_DENIED,
    NotOurCluster: StatusCode.FAILED_PRECONDITION,
    # As gRPC's own servers answer what they cannot parse.
    MalformedMessage: StatusCode.INTERNAL,
}

_KIND_BY_CODE: Final = {code.value[0]: kind for kind, code in reversed(GRPC_STATUS.items())}


def error_of(code: int, text: str) -> MnemosyneError:
    """Return the error that another node of ours has answered with; the text stays as it is."""
    return _KIND_BY_CODE.get(code, MalformedMessage)(text)
