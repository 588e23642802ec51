"""What a fault of Redis is called, and what to look at.

    exception ──> error (the server's code, or the kind), condition (in words), hint ──> `storage_failed`

Never the server's own text, though it quotes no session today: the code and its meaning say enough.
How often the log says so: `storage/fault_log.py`.
"""

from __future__ import annotations

import re
import ssl
from typing import Final

from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,  # noqa: A004  # its own; those of Python are OSError
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004  # likewise
    TryAgainError,
)

from mnemosyned.storage.addresses import AddressError
from mnemosyned.storage.fault_log import system_reason


class NotReplicated(Exception):
    """Too few replicas have confirmed a write in time; it may be lost if the primary ends now."""


class NoPrimary(Exception):
    """The Sentinels name no primary; the text is the reason."""


class UnknownService(Exception):
    """A Sentinel does not know the service of the address; the text names it."""


class NotPrimary(Exception):
    """A node of a cluster is no primary any more; the text says whose replica it is."""


class Uncovered(Exception):
    """No primary of a cluster serves a slot; the text says which."""


# What ends here as StorageUnavailable. Anything else, such as a TypeError, is a bug.
FAULTS: Final = (RedisError, OSError, NotReplicated, NoPrimary, UnknownService, NotPrimary, Uncovered)
# The slot is, or will be, at another node.
_ELSEWHERE: Final = (MovedError, AskError, TryAgainError)
_REFUSALS: Final = (*_ELSEWHERE, ClusterDownError, ReadOnlyError, BusyLoadingError, NotPrimary)
_OTHER_SERVER: Final = (ReadOnlyError, MasterDownError, ConnectionError, OSError, NotReplicated, NotPrimary)
_NO_DATABASE: Final = "DB index is out of range"
_NO_CLUSTER: Final = "cluster support disabled"

# By the server's code: what it means, and what to look at.
_MEANINGS: Final = {
    "LOADING": ("the server loads its data", "it answers when that is done"),
    "READONLY": ("the server is a replica", "name the primary, or the Sentinels (redis+sentinel://)"),
    "MASTERDOWN": ("the server is a replica without its primary", "name the primary, or the Sentinels"),
    "OOM": ("maxmemory is reached", "raise maxmemory: sessions must not be evicted"),
    "NOAUTH": ("the server wants a password", "see the address of -redis.address or its file"),
    "WRONGPASS": ("wrong user or password", "see the address of -redis.address or its file"),
    "NOPERM": ("the user lacks a right", "docs/redis.md has the ACL that the daemon needs"),
    "MISCONF": (
        "the server cannot write to its disk",
        "it refuses writes until it can: see its log and its disk",
    ),
    "NOREPLICAS": ("too few replicas follow the server", "see min-replicas-to-write"),
    "BUSY": ("another script blocks the server", "see SLOWLOG and SCRIPT KILL"),
    "CLUSTERDOWN": (
        "the cluster is down, or a slot is not served",
        "see CLUSTER INFO, and cluster-require-full-coverage",
    ),
    "MOVED": ("another node of the cluster has the slot", "name the cluster: redis+cluster://"),
    "ASK": ("a slot is being moved", "calls to its sessions wait until it has been moved"),
    "TRYAGAIN": ("a slot is being moved", "calls to its sessions wait until it has been moved"),
    "WRONGTYPE": ("a key has another type", "another program writes keys under -redis.prefix"),
    "UNKILLABLE": ("another script blocks the server", "see its log"),
}
_LACKS_COMMAND: Final = (
    "the server lacks a command",
    "Redis 7.0 or later, or Valkey, is needed, without rename-command",
)
_ERR: Final = {
    "max number of clients reached": ("the server has no connection left", "see maxclients"),
    _NO_DATABASE: (
        "there is no such database",
        "see the database in the address, and `databases`",
    ),
    _NO_CLUSTER: ("it is no node of a Redis Cluster", "write redis:// in the address"),
    "unknown command": _LACKS_COMMAND,
    "Unknown Redis command": _LACKS_COMMAND,  # in a script
    "without any password configured": ("the server has no password", "leave it out of the address"),
}
_NOT_REPLICATED: Final = (
    "too few replicas have confirmed a write",
    "see -redis.wait, and connected_slaves of INFO replication",
)


def is_refusal(exc: BaseException) -> bool:
    """Tell whether a retry ends the same way, until the configuration or the rights of the user change."""
    if isinstance(exc, AuthenticationError | UnknownService) or _lacks_right(exc):
        return True
    return isinstance(exc, ResponseError) and any(words in str(exc) for words in (_NO_DATABASE, _NO_CLUSTER))


def is_login_refused(exc: BaseException) -> bool:
    """Tell whether the server refuses user and password."""
    return isinstance(exc, AuthenticationError)


def is_missing_script(reply: object) -> bool:
    """Tell whether the server does not know the script; nothing was done."""
    return isinstance(reply, NoScriptError)


def is_not_done(exc: BaseException) -> bool:
    """Tell whether a node has refused a script before it ran, and it or another node will take it."""
    return isinstance(exc, _REFUSALS)


def is_elsewhere(exc: BaseException) -> bool:
    """Tell whether the slot of a script has moved to another node, or is being moved."""
    return isinstance(exc, _ELSEWHERE)


def moved_to(exc: BaseException) -> tuple[str, int] | None:
    """Return the node that has the slot by now; the host is empty if it is that of the node that says so."""
    if not isinstance(exc, MovedError):
        return None
    # A node that is to tell the names of others may not know one.
    return ("" if exc.host == "?" else exc.host, exc.port)


def is_other_server(exc: BaseException) -> bool:
    """Tell whether a fault shows that the server is another one by now, or gone."""
    return isinstance(exc, _OTHER_SERVER)


def error_of(exc: BaseException) -> str:
    """Return the server's code, or the kind of an error that has none."""
    if _lacks_right(exc):
        return "NOPERM"
    code = getattr(exc, "status_code", None)
    if code:
        return str(code)
    if isinstance(exc, ResponseError):
        word = str(exc).partition(" ")[0]
        return word if re.fullmatch(r"[A-Z]{2,20}", word) else "ERR"
    return type(_cause(exc)).__name__


def condition_of(exc: BaseException) -> str:
    """Return what has happened, in words."""
    meaning, _ = _meaning(exc)
    if meaning:
        return meaning
    cause = _cause(exc)
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    if isinstance(cause, OSError):
        return system_reason(cause)
    if isinstance(exc, NoPrimary | UnknownService | NotPrimary | Uncovered | AddressError):
        return str(exc)
    if isinstance(exc, ConnectionError):
        return "the connection is closed"
    return "the server refuses a command" if isinstance(exc, ResponseError) else "no valid answer"


def name_of(exc: BaseException) -> str:
    """Return both in a few words: `OOM: maxmemory is reached`."""
    return f"{error_of(exc)}: {condition_of(exc)}"


def hint_of(exc: BaseException) -> str:
    """Return what to look at; empty: the name says it."""
    _, hint = _meaning(exc)
    if hint:
        return hint
    cause = _cause(exc)
    if isinstance(cause, ssl.SSLError):
        return "see the scheme and cacert in the address, the name of the host, and tls-port of the server"
    if isinstance(cause, ConnectionRefusedError):
        return "no server listens there: see host and port in the address, and bind of the server"
    if isinstance(cause, TimeoutError | OSError) and "time" in condition_of(exc):
        return "the server is overloaded, or a firewall drops packets: see host and port in the address"
    return ""


def _meaning(exc: BaseException) -> tuple[str, str]:
    if isinstance(exc, NotReplicated):
        return _NOT_REPLICATED
    if isinstance(exc, UnknownService):
        return str(exc), "see the name behind the hosts in the address, and `sentinel monitor`"
    if not isinstance(exc, RedisError):
        return "", ""
    known = _MEANINGS.get(error_of(exc))
    if _lacks_right(exc):
        return f"the user lacks a right: {_right(str(exc))}", _MEANINGS["NOPERM"][1]
    if known:
        return known
    found = [meaning for words, meaning in _ERR.items() if words in str(exc)]
    return found[0] if found else ("", "")


def _lacks_right(exc: BaseException) -> bool:
    # Within a script, servers say it in words.
    return isinstance(exc, NoPermissionError) or (
        isinstance(exc, ResponseError)
        and bool(re.search(r"ACL failure in script|user executing the script", str(exc)))
    )


def _right(text: str) -> str:
    command = re.search(r"run the '([a-z|]{1,40})' command", text)
    if command is not None:
        return f"+{command[1]}"
    return "to use the keys of -redis.prefix" if "key" in text else "that a script needs"


def _cause(exc: BaseException) -> BaseException:
    """Return the error of the system that the library has wrapped, if it has."""
    context = exc.__context__
    return context if isinstance(exc, ConnectionError) and isinstance(context, OSError) else exc
