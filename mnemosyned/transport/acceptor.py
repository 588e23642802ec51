"""Listens, and accepts connections until it is closed, whatever `accept` says.

    addresses ── open() ──> sockets ── accept ──> a connection, non-blocking
                               ^          |
                               └── pause ─┴── an error: counted, logged

A server must outlive what `accept` can fail with. The process is out of files, a client has gone before its
turn, a firewall refuses, an interface goes down: each of these passes, and none harms the connections
that are open. So every error is followed by a pause, and then by another try. asyncio's own servers end for
good after most of these errors, which is why the accepting is done here.

A Unix socket is a file. One that a dead process has left is replaced; one that a process listens on is not.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from aio.rate_limit import LogRateLimiter
from mnemosyned.transport.engine import UNIX_PREFIX

log = logging.getLogger(__name__)

_BACKLOG: Final = 1024
_AT_ONCE: Final = 64  # then other things of the event loop have their turn
_PAUSE_S: Final = 0.1
_BUSY_PAUSE_S: Final = 0.01
# The connection that was to be accepted is at fault, and is gone; the next one may be there already.
_OF_ONE_CONNECTION: Final = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EINTR})
# Of an address.
_NOT_OURS: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})

# A connection, and the address of its other end: host and port, or a text for a Unix socket.
Accepted = Callable[[socket.socket, Any], None]


class Acceptor:
    """The listening sockets of one address."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        accepted: Accepted,
        failures: Counter[str],
        *,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """Own sockets that listen; nothing is accepted before `begin`.

        - `failures` counts those of `accept`, by the name of the error.
        - While `is_busy` says so, new connections wait in the kernel.
        """
        self._is_busy = is_busy
        self._failures = failures
        self._sockets = list(sockets)
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._paused: dict[socket.socket, asyncio.TimerHandle] = {}
        self._limiter = LogRateLimiter()

    @property
    def port(self) -> int:
        """The port that is listened on; 0 for a Unix socket."""
        address = self._sockets[0].getsockname()
        return int(address[1]) if isinstance(address, tuple) else 0

    def begin(self) -> None:
        """Accept connections from now on."""
        for listener in self._sockets:
            self._loop.add_reader(listener, self._accept, listener)

    def close(self) -> None:
        """Accept what waits to be accepted, and refuse further connections.

        Closing a listening socket resets the connections that wait, and their clients may have sent calls.
        """
        self._is_busy = lambda: False
        for listener in self._sockets:
            self._loop.remove_reader(listener)
            self._accept(listener)
            path = listener.getsockname()
            listener.close()
            if listener.family == socket.AF_UNIX:
                with suppress(OSError):
                    Path(path).unlink()
        for timer in self._paused.values():
            timer.cancel()
        self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            if self._is_busy():
                self._pause(listener, _BUSY_PAUSE_S)
                return
            try:
                connection, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                self._failed(listener, exc)
                return
            connection.setblocking(False)
            self._accepted(connection, address)

    def _failed(self, listener: socket.socket, exc: OSError) -> None:
        name = errno.errorcode.get(exc.errno or 0, "unknown")
        self._failures[name] += 1
        left_out = self._limiter.take(self._loop.time())
        if left_out is not None:
            log.warning("accept_failed", extra={"error": exc.strerror or name, "left_out": left_out})
        if exc.errno not in _OF_ONE_CONNECTION:
            self._pause(listener, _PAUSE_S)

    def _pause(self, listener: socket.socket, pause_s: float) -> None:
        # Still readable: without a pause the loop would come here again and again.
        self._loop.remove_reader(listener)
        self._paused[listener] = self._loop.call_later(pause_s, self._go_on, listener)

    def _go_on(self, listener: socket.socket) -> None:
        del self._paused[listener]
        self._loop.add_reader(listener, self._accept, listener)


async def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Listen on the addresses of a host name, all with one port; or on `unix:` and a path.

    Port 0 is any free port. A name may have addresses that this host lacks, such as `::1` on a host without
    IPv6. They are left out if there is another one.

    Raises:
        OSError: an address is in use, or none is this host's.
    """
    if host.startswith(UNIX_PREFIX):
        return [_unix_socket(host.removeprefix(UNIX_PREFIX))]
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    lacking: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(found):
        if port == 0 and sockets:
            address = (address[0], sockets[0].getsockname()[1], *address[2:])  # noqa: PLW2901  # its port
        try:
            sockets.append(_tcp_socket(family, address))
        except OSError as exc:
            if exc.errno in _NOT_OURS:
                lacking = exc
                continue
            for opened in sockets:
                opened.close()
            raise
    if lacking is not None and not sockets:
        raise lacking
    return sockets


def _tcp_socket(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    # The address `::` means all addresses, of IPv4 too.
    is_dual = family is socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=is_dual)
    listener.setblocking(False)
    return listener


def _unix_socket(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        remove_left_socket(path)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def remove_left_socket(path: str) -> None:
    """Remove the socket that a dead process has left; leave anything else, so that binding fails."""
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
