"""What signals do to the daemon.

    signal                    | effect
    --------------------------+--------------------------------------------------------------------
    SIGTERM, SIGINT, SIGQUIT  | the drain begins
    SIGTERM once more         | nothing: supervisors, groups of processes and people send it twice
    SIGINT, SIGQUIT once more | the process ends at once: a drain that takes too long is ended by hand
    SIGHUP                    | files are read again (reload.py); if the terminal was closed, the drain begins
    SIGUSR1, SIGUSR2, SIGALRM | a warning: by default they would end the process without a drain

SIGHUP has two senders. A person or systemd means the files. The kernel and shells mean that the terminal is
gone. The terminal tells them apart: a closed one can be opened no more. So a daemon reads its files again if
it

- was started without a terminal, as by systemd, in a container, or with `setsid`;
- has a terminal that is still there;
- has lost its terminal earlier and was sent nothing then, as a job in the background is.

`nohup` has SIGHUP ignored from the start. Then it stays ignored.

Until the event loop runs, SIGTERM ends the process with code 0, since there is nothing to drain. Without a
handler the kernel would discard it if the process is the first one of its container. SIGHUP has no effect
then, since the files are about to be read.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Final, NoReturn

from aio.periodic import run_periodically

log = logging.getLogger(__name__)

_STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_BY_HAND: Final = (signal.SIGINT, signal.SIGQUIT)
_MEANINGLESS: Final = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
# The kernel may send SIGHUP before it takes the terminal away.
_TERMINAL_GOES_S: Final = 0.2
_LOOK_S: Final = 1.0
_TERMINAL: Final = "/dev/tty"
_NO_TERMINAL: Final = frozenset(
    {errno.ENXIO, errno.EIO, errno.ENOENT, errno.ENODEV, errno.EACCES, errno.EPERM}
)


def take_early() -> None:
    """Handle signals until `Signals` does; from the main thread."""
    signal.signal(signal.SIGTERM, _end)
    if not _is_ignored(signal.SIGHUP) and not _has_terminal():
        signal.signal(signal.SIGHUP, lambda _number, _frame: None)


def _end(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


class Signals:
    """The signals of a daemon on its event loop."""

    def __init__(self, *, stop: Callable[[], None], reload: Callable[[], None]) -> None:
        """Take all signals of the table above from now on; `stop` may be called more than once."""
        self._stop = stop
        self._reload = reload
        self._loop = loop = asyncio.get_running_loop()
        self._had_terminal = _has_terminal()
        for number in _STOPPING:
            loop.add_signal_handler(number, self._begin_stop)
        for number in _MEANINGLESS:
            loop.add_signal_handler(number, _warn, number)
        if not _is_ignored(signal.SIGHUP):
            loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    async def run(self) -> None:
        """Take note if the terminal goes without a signal; until cancelled."""
        if not self._had_terminal:
            return

        async def look() -> None:
            if self._had_terminal and not _has_terminal():
                # SIGHUP would have come by now.
                await asyncio.sleep(_TERMINAL_GOES_S)
                self._had_terminal = False

        await run_periodically("terminal", look, period_s=lambda: _LOOK_S)

    def _begin_stop(self) -> None:
        self._stop()
        for number in _BY_HAND:
            self._loop.remove_signal_handler(number)

    def _hang_up(self) -> None:
        if self._had_terminal:
            self._loop.call_later(_TERMINAL_GOES_S, self._reload_or_stop)
        else:
            self._reload()

    def _reload_or_stop(self) -> None:
        if _has_terminal():
            self._reload()
        else:
            log.info("terminal_closed")
            self._stop()


def _warn(number: signal.Signals) -> None:
    log.warning("signal_ignored", extra={"signal": number.name})


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


def _has_terminal() -> bool:
    try:
        os.close(os.open(_TERMINAL, os.O_RDONLY | os.O_NOCTTY))
    except OSError as exc:
        # Without files, for example, nothing is known of the terminal.
        return exc.errno not in _NO_TERMINAL
    return True
