"""The statuses of gRPC, with their numbers on the wire.

https://github.com/grpc/grpc/blob/master/doc/statuscodes.md

grpcio has the same enumeration, and takes longer to import than the rest of the daemon.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class StatusCode(Enum):
    """How a call of gRPC has ended."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_BY_NUMBER: Final = {str(code.value).encode(): code for code in StatusCode}


def parse_status(text: bytes | None) -> StatusCode:
    """Read the header `grpc-status`; UNKNOWN if it is missing, or no status."""
    return _BY_NUMBER.get(text or b"", StatusCode.UNKNOWN)
