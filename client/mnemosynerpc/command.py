"""How the programs of this package end: what goes wrong outside them is one line, and an exit code."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable

import grpc

_FAILED = 1
_WRONG_USAGE = 2


def run(main: Callable[..., None], usage: str, *checks: Callable[[str], object], start: str) -> int:
    """Call main with the command line's arguments; return the exit code.

    Each check raises ValueError for an argument that is wrong. `start` is the command that starts what
    main calls.
    """
    arguments = sys.argv[1:]
    try:
        for check, argument in zip(checks[: len(arguments)], arguments, strict=True):
            check(argument)
    except ValueError:
        sys.stderr.write(f"usage: python -m {usage}\n")
        return _WRONG_USAGE
    try:
        main(*arguments)
    except grpc.RpcError as error:
        sys.stderr.write(_complaint(error, start))
        return _FAILED
    except KeyboardInterrupt:
        sys.stdout.write("\n")
    return 0


def host_port(text: str) -> None:
    """Raise ValueError for what is no host:port."""
    host, _, port = text.rpartition(":")
    if not host or not 0 < int(port) < 2**16:
        raise ValueError(text)


def ip_ports(text: str) -> None:
    """Raise ValueError for what is no list of ip:port, separated by commas."""
    for address in text.split(","):
        host_port(address)
        ipaddress.IPv4Address(address.rpartition(":")[0])


def _complaint(error: grpc.RpcError, start: str) -> str:
    code, text = error.code(), " ".join((error.details() or "").split())
    is_of_the_daemon = text.startswith("mnemosyned: ")
    if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED} and not is_of_the_daemon:
        return f"no server answers; start one with `{start}` ({text})\n"
    return f"the server refused a call: {code.name} {text}\n"
