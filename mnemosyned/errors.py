"""The errors that a caller may see, in a tree of one level, split by whose fault they are.

    the caller's           InvalidArgument, MalformedMessage, MessageTooLarge, Unimplemented, UnknownService,
                           Unauthenticated, PermissionDenied, NotOurCluster, SessionAlreadyExists
    not a mistake          SessionNotFound, DeadlineExceeded, NotJoined
    the world's, may pass  StorageUnavailable, Overloaded
    the stored data's      CorruptSession
    ours                   any other exception: a bug

- Every subclass of MnemosyneError has a gRPC status in transport/status.py; a test proves it.
- Any other exception reaches the client as INTERNAL, without its text, and the log with its traceback.
- The text is sent to the caller as it is. It names a field or a setting, never a value: no token, no bag, no
  message of the database. Texts that clients of the Go daemon compare are defaults here, exact.
- Each class can be rebuilt from its `args`. The callers of one failed batch each get an exception of their
  own: one that is raised in many tasks would collect all of their tracebacks.
- `cluster` and `cache` have small trees of their own, since they may not import this one. What calls them
  translates (api/router.py, api/peer.py).
"""

from __future__ import annotations


class MnemosyneError(Exception):
    """Base of all errors that a caller may see; the text is sent to the caller, and begins `mnemosyned: `."""


class InvalidArgument(MnemosyneError):
    """A field of the request is missing, over its limit, or not storable; the text names it."""


class SessionNotFound(MnemosyneError):
    """The token has no session, or its session has expired: a caller cannot tell which."""

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
    """The storage did not answer in time, or the connection broke.

    A read may be repeated. Whether a write was done is not known (api/rpc.py has what a retry does
    about that).
    """

    # Whether the storage may still be doing the work, at the latest when the call's time is up.
    is_under_way = True
    # For the log, never for a caller: what was being done, where, and what happened; and what to look at.
    detail = ""
    hint = ""


class CorruptSession(MnemosyneError):
    """What is stored of a session is damaged, or no daemon wrote it. Other sessions are not affected."""


class NotJoined(MnemosyneError):
    """A peer calls this node before it takes part in the cluster, as nodes do that start together."""

    def __init__(self, text: str = "mnemosyned: this node has not opened its storage yet") -> None:
        super().__init__(text)


class Overloaded(MnemosyneError):
    """A bounded queue is full. The call was not begun and may be repeated later."""


class MessageTooLarge(MnemosyneError):
    """A request is larger than `-grpc.max-message`, or a response larger than the largest that is sent."""


class DeadlineExceeded(MnemosyneError):
    """The caller's deadline passed before the work was done. A write may be done all the same."""

    def __init__(self, text: str = "mnemosyned: deadline exceeded") -> None:
        super().__init__(text)


class Unimplemented(MnemosyneError):
    """The method does not exist, or the call uses a form of it that this server does not have."""


class Unauthenticated(MnemosyneError):
    """The caller has not shown who it is: no valid key or certificate, or no valid signature of a peer."""


class PermissionDenied(MnemosyneError):
    """The caller has shown who it is, and its role does not allow the method."""


class NotOurCluster(MnemosyneError):
    """The calling node is of another cluster or another storage, or means another node than this one."""


class MalformedMessage(MnemosyneError):
    """The bytes of a request are not a message of the method's type, or a header cannot be read."""
