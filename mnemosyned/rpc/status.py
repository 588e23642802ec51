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
    Overloaded,
    SessionAlreadyExists,
    SessionNotFound,
    StorageUnavailable,
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
    # As gRPC's own servers answer what they cannot parse.
    MalformedMessage: StatusCode.INTERNAL,
}
