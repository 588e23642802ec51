"""Sees to it that grpcio goes on listening, whatever its `accept` fails with.

grpcio's core accepts connections itself, and tells nothing of errors. It waits after EMFILE. After
ECONNABORTED it waits for the next connection. After any other error it ends the listening for good: the
socket stays open, clients connect to it, and get no answer. So the queue of connections is watched from here:

    queue empty ───────────────────────────────────────────────> nothing
    not empty at two looks ── a connection of our own is ── accepted ──> counted: that has woken the core
                                       |
                                       ├── not to be had, as without files ──> counted, tried again
                                       └── not accepted in time ──> the queue is closed, `reopen`

`reopen` has another server of grpcio listen at the same address. Connections that are open stay with the
former server. Those in the queue are reset, since nothing can take them out of it: their clients dial again.

The sockets are duplicates of the core's own, found among the files of this process: the core lends none.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final

from aio.periodic import run_periodically
from http2.frames import CLIENT_PREFACE
from mnemosyned.transport.accept_failures import AcceptFailures
from mnemosyned.transport.spare_files import need_files

log = logging.getLogger(__name__)

# Two looks and a probe: new connections are served again after half a second.
_LOOK_S: Final = 0.05
# Twice: the first time may have passed while this process was stopped.
_PROBE_S: Final = (0.15, 0.15)
_QUIET_S: Final = 0.2  # after a probe that could not be made
_BETWEEN_S: Final = 0.3  # from one reopening to the next
_FILES: Final = "/dev/fd"


def listening_files() -> set[int]:
    """Return which files of this process are listening sockets.

    Raises:
        OSError: the process is out of files, or the system does not list them.
    """
    return {number for number in map(int, os.listdir(_FILES)) if _listens(number)}  # noqa: PTH208  # numbers


def _listens(number: int) -> bool:
    try:
        one = socket.socket(fileno=number)
    except OSError:
        return False
    try:
        return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False
    finally:
        one.detach()


def duplicates(numbers: set[int]) -> list[socket.socket]:
    """Return sockets of one's own for these files."""
    return [socket.socket(fileno=os.dup(number)) for number in sorted(numbers)]


class ListenerWatch:
    """Watches the listening sockets of one address."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        failures: Counter[str],
        reopen: Callable[[], Coroutine[Any, Any, Sequence[socket.socket]]],
    ) -> None:
        """Own the sockets. `reopen` listens once more and returns the new ones; it may raise an OSError."""
        self._sockets = list(sockets)
        self._failures = AcceptFailures(failures)
        self._reopen = reopen
        self._waited: set[socket.socket] = set()  # with a connection in the queue at the last look
        self._is_closed = False  # by this watch, and not yet reopened
        self._reopened_s = 0.0
        self._quiet_until_s = 0.0
        self._watching = asyncio.create_task(
            run_periodically("grpcio_listener", self._look, period_s=lambda: _LOOK_S)
        )

    async def close(self) -> None:
        """Let go of the sockets, so that the core's own are the last ones."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        self._let_go()

    async def _look(self) -> None:
        if _now_s() < self._quiet_until_s:
            return
        waiting = {one for one in self._sockets if _has_waiting(one)}
        stuck, self._waited = waiting & self._waited, waiting
        for listener in stuck:
            if not await self._is_accepting(listener):
                self._close_queues()
                break
        if self._is_closed and _now_s() - self._reopened_s >= _BETWEEN_S:
            self._reopened_s = _now_s()
            try:
                self._sockets = list(await self._reopen())
            except OSError as exc:
                self._failures.add(*_told(exc), _now_s())
                return
            self._is_closed = False
            log.warning("listening_again")

    async def _is_accepting(self, listener: socket.socket) -> bool:
        """Tell whether the core takes connections out of the queue, or must be waited for."""
        probe = asyncio.create_task(_be_accepted(listener))
        try:
            for timeout_s in _PROBE_S:
                await asyncio.wait([probe], timeout=timeout_s)
        finally:
            probe.cancel()
        try:
            if probe.done():
                probe.result()
                self._failures.add("late", "a connection waited to be accepted", _now_s())
                return True
            # The probe may have taken the last file.
            need_files()
        except OSError as exc:
            self._failures.add(*_told(exc), _now_s())
            self._quiet_until_s = _now_s() + _QUIET_S
            return True
        self._failures.add("ended", "grpcio has ceased to accept connections", _now_s())
        return False

    def _close_queues(self) -> None:
        """Have the addresses free for `reopen`: two sockets cannot listen at one of them."""
        for listener in self._sockets:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        self._let_go()
        self._is_closed = True

    def _let_go(self) -> None:
        for listener in self._sockets:
            listener.close()
        self._sockets.clear()
        self._waited.clear()


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _told(exc: OSError) -> tuple[str, str]:
    """Return the name and the text of an error."""
    return errno.errorcode.get(exc.errno or 0, "unknown"), exc.strerror or str(exc)


def _has_waiting(listener: socket.socket) -> bool:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


async def _be_accepted(listener: socket.socket) -> None:
    """Connect to the socket, and return once the other side has sent anything, or has closed.

    Raises:
        OSError: there can be no such connection now.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(listener.family, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        await loop.sock_connect(probe, listener.getsockname())
        # With TLS, the server has nothing to say before its client; then this is refused.
        with suppress(ConnectionError):
            await loop.sock_sendall(probe, CLIENT_PREFACE)
            await loop.sock_recv(probe, 1)
