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
import socket
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

from mnemosyned.transport.accept_failures import AcceptFailures
from mnemosyned.transport.engine import UNIX_PREFIX

_BACKLOG: Final = 1024
_AT_ONCE: Final = 64  # then other things of the event loop have their turn
_PORT_TRIES: Final = 10
_ALL_ADDRESSES: Final = "::"
_PAUSE_S: Final = 0.1
_BUSY_PAUSE_S: Final = 0.01
# The connection that was to be accepted is at fault, and is gone; the next one may be there already.
_OF_ONE_CONNECTION: Final = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EINTR})
_OUT_OF_FILES: Final = frozenset({errno.EMFILE, errno.ENFILE})
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
        make_room: Callable[[], bool] = lambda: False,
        give_up: Callable[[], bool] | None = None,
    ) -> None:
        """Own sockets that listen; nothing is accepted before `begin`.

        - `failures` counts those of `accept`, by the name of the error.
        - While `is_busy` says so, new connections wait in the kernel.
        - Without a file for a connection, `make_room` is called: whether it has given up one.
        - `give_up`, where other processes have these sockets too, is called by `close`: whether none of them
          accepts what waits.
        """
        self._give_up = give_up
        self._make_room = make_room
        self._is_busy = is_busy
        self._failures = AcceptFailures(failures)
        self._sockets = list(sockets)
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._paused: dict[socket.socket, asyncio.TimerHandle] = {}

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

        Closing a listening socket resets the connections that wait, and their clients may have sent calls. If
        other processes have the socket too, its queue stays, and is theirs as long as one of them accepts.
        """
        is_ours_to_take = self._give_up is None or self._give_up()
        self._is_busy = lambda: False
        for listener in self._sockets:
            self._loop.remove_reader(listener)
            if is_ours_to_take:
                self._accept(listener)
            path = listener.getsockname()
            listener.close()
            if listener.family == socket.AF_UNIX and self._give_up is None:
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
                if exc.errno in _OUT_OF_FILES and self._make_room():
                    continue
                self._failed(listener, exc)
                return
            connection.setblocking(False)
            self._accepted(connection, address)

    def _failed(self, listener: socket.socket, exc: OSError) -> None:
        name = errno.errorcode.get(exc.errno or 0, "unknown")
        self._failures.add(name, exc.strerror or name, self._loop.time())
        if exc.errno not in _OF_ONE_CONNECTION:
            self._pause(listener, _PAUSE_S)

    def _pause(self, listener: socket.socket, pause_s: float) -> None:
        # Still readable: without a pause the loop would come here again and again.
        self._loop.remove_reader(listener)
        self._paused[listener] = self._loop.call_later(pause_s, self._go_on, listener)

    def _go_on(self, listener: socket.socket) -> None:
        del self._paused[listener]
        self._loop.add_reader(listener, self._accept, listener)


def inherited(files: Sequence[int]) -> list[socket.socket]:
    """Return the listening sockets that the process which started this one has opened for it."""
    return [socket.socket(fileno=number) for number in files]


def reached_at(host: str) -> str:
    """Return where this host itself reaches what listens on a host; that for all addresses is no address."""
    if host == "0.0.0.0":  # noqa: S104 # nosec B104
        return "127.0.0.1"
    if host != _ALL_ADDRESSES:
        return host
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return "127.0.0.1"
    return "::1"


async def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Listen on the addresses of a host name, all with one port; or on `unix:` and a path.

    Port 0 is any free port, the same for all. A name may have addresses that this host lacks, as `::1` is on
    a host without IPv6. They are left out if there is another one. The address `::` stands for those of IPv4
    too, also on a host without IPv6.

    Raises:
        OSError: an address is in use, or none is this host's.
    """
    if host.startswith(UNIX_PREFIX):
        return [_unix_socket(host.removeprefix(UNIX_PREFIX))]
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    # With port 0, another process may have the port on another of the addresses.
    for is_last in (*[port != 0] * (_PORT_TRIES - 1), True):
        try:
            return _sockets_on(addresses)
        except OSError as exc:
            if exc.errno in _NOT_OURS and host == _ALL_ADDRESSES:
                return [_tcp_socket(socket.AF_INET, ("", port))]
            if is_last or exc.errno != errno.EADDRINUSE:
                raise
    raise AssertionError("the last try returns or raises")


def _sockets_on(addresses: Sequence[tuple[socket.AddressFamily, Any]]) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    lacking: OSError | None = None
    for family, address in addresses:
        port = sockets[0].getsockname()[1] if sockets else address[1]
        try:
            sockets.append(_tcp_socket(family, (address[0], port, *address[2:])))
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
    is_dual = family is socket.AF_INET6 and address[0] == _ALL_ADDRESSES and socket.has_dualstack_ipv6()
    # All four parts of an address of IPv6: one of a link has the number of its interface.
    listener = socket.create_server(
        cast("tuple[str, int]", address), family=family, backlog=_BACKLOG, dualstack_ipv6=is_dual
    )
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
