"""The error tree, one level deep, split by whose fault it is.

Every subclass of MnemosyneError has a gRPC status in rpc/status.py; any other
exception is a bug of ours and reaches the client as INTERNAL, without its text.
Each class can be rebuilt from its args, so that the callers of one failed batch
get an exception of their own.
"""

from __future__ import annotations


class MnemosyneError(Exception):
    """Base of all errors that a caller may see; the text is sent to the caller."""


class InvalidArgument(MnemosyneError):
    """The caller sent something that no session could have."""


class SessionNotFound(MnemosyneError):
    """No such token, or its session has expired."""

    def __init__(self, text: str = "mnemosyned: storage: session not found") -> None:
        super().__init__(text)


class UnknownService(MnemosyneError):
    """A health check asked for a service that is not served here."""

    def __init__(self, text: str = "mnemosyned: unknown service") -> None:
        super().__init__(text)


class SessionAlreadyExists(MnemosyneError):
    """A live session already has the token that the caller chose."""

    def __init__(self, text: str = "mnemosyned: storage: access token is already in use") -> None:
        super().__init__(text)


class StorageUnavailable(MnemosyneError):
    """The storage gave no answer in its time; the call may be repeated."""


class CorruptBag(MnemosyneError):
    """A stored bag is in neither daemon's form; the rest of the storage is well."""


class Overloaded(MnemosyneError):
    """A bounded queue is full; the call was not begun and may be repeated later."""


class MessageTooLarge(MnemosyneError):
    """A request is over `-grpc.max-message`, or an answer over what is ever sent."""


class DeadlineExceeded(MnemosyneError):
    """The caller's deadline passed before the work was done."""

    def __init__(self, text: str = "mnemosyned: deadline exceeded") -> None:
        super().__init__(text)


class Unimplemented(MnemosyneError):
    """No such method, or a way of calling it that this server does not know."""


class Unauthenticated(MnemosyneError):
    """The caller is nobody that may call: no peer, or none with a key or certificate that is known."""


class PermissionDenied(MnemosyneError):
    """The caller is known, and may not call this."""


class NotOurCluster(MnemosyneError):
    """A peer of another cluster, or of one that stores its sessions elsewhere."""


class MalformedMessage(MnemosyneError):
    """The bytes of a request are not a message of the method's type."""
