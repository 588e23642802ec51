"""Opening the storage, and knowing from then on whether it answers.

    opening ── answer ──> serving ── no answer ──> lost ── answer ──> serving …
       │
       └── StorageRefused: the daemon ends

Each second it asks for the storage's clock (`sessions/clock.py`) and whether calls could be answered. If the
stored sessions are others than before, no copy of an earlier one may be served. A storage that is lost
is not opened again. The engine connects on its own, and sessions in caches remain usable meanwhile.

Where a lease is renewed (`sessions/lease_keeper.py`), the renewals prove twice a second that the storage
answers and takes writes, and bring its clock. While they do, the rest is asked every five seconds: whether
the table is as it was. A renewal that fails, or has no answer for half a second, has it asked at once.

The answer takes as long as the engine's time-outs permit, so `is_serving` may be some seconds old. Nothing
is decided by it for a single call: calls go to the storage anyway and fail by themselves. It is for the
health service, readiness and operators.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from aio.periodic import run_periodically
from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.store import Storage

log = logging.getLogger(__name__)

_PROBE_PERIOD_S: Final = 1.0
# The same while the renewals of a lease succeed.
_LEASED_PERIOD_S: Final = 5.0
# How often the log says that an outage goes on.
_REPEAT_S: Final = 60.0
# Short at first, since database and daemon are often started together; the last one repeats.
_OPEN_RETRY_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0)


class _Outage:
    """The log of one outage: a line at its beginning, if its cause changes, and once a minute."""

    def __init__(self, event: str, level: int) -> None:
        self._event = event
        self._level = level
        self._begun_s = time.monotonic()
        self._since = datetime.now(tz=UTC).isoformat(timespec="seconds")
        self._logged_s = 0.0
        self._error = ""
        self._times = 0

    def goes_on(self, exc: StorageUnavailable) -> None:
        """Take note of one more question without an answer."""
        self._times += 1
        error, now_s = exc.detail or str(exc), time.monotonic()
        if error == self._error and now_s - self._logged_s < _REPEAT_S:
            return
        self._error, self._logged_s = error, now_s
        log.log(
            self._level,
            self._event,
            extra={"error": error, "hint": exc.hint, "since": self._since, "times": self._times},
        )

    def lasted(self) -> dict[str, object]:
        """Return the fields of the line about its end."""
        return {
            "since": self._since,
            "after_s": round(time.monotonic() - self._begun_s, 1),
            "times": self._times,
        }


class StorageHealth:
    """Asks the storage again and again whether calls could be answered, and for its time."""

    def __init__(
        self,
        storage: Storage,
        clock: StorageClock,
        *,
        on_replaced: Callable[[], None] = lambda: None,
        on_not_ready: Callable[[], None] = lambda: None,
        has_lease: bool = False,
    ) -> None:
        """`has_lease`: once it is open, renewals of a lease bring its clock, and `doubt` tells of them."""
        self._storage = storage
        self._clock = clock
        self._has_lease = has_lease
        self._on_replaced = on_replaced  # the stored sessions are others than before
        self._on_not_ready = on_not_ready  # a try to open it has failed
        self._sessions: object = None
        self._is_serving = False
        self._reason = "the storage has not answered yet"
        self._outage: _Outage | None = None
        self._is_in_doubt = False
        self._wake = asyncio.Event()

    @property
    def is_serving(self) -> bool:
        """Whether the last question was answered."""
        return self._is_serving

    @property
    def reason(self) -> str:
        """Why it is not serving, for operators; empty: it is."""
        return self._reason

    async def open(self) -> None:
        """Open the storage, and synchronise the clock; retry as long as that takes.

        Raises:
            StorageRefused: a retry cannot succeed with this configuration.
        """
        tries, begun_s, outage = 0, time.monotonic(), _Outage("storage_not_ready", logging.WARNING)
        while True:
            try:
                await self._storage.open()
                await self._read_clock()
                await self._probe()
            except StorageUnavailable as exc:
                self._on_not_ready()
                outage.goes_on(exc)
                self._reason = exc.detail or str(exc)
                await asyncio.sleep(_OPEN_RETRY_S[min(tries, len(_OPEN_RETRY_S) - 1)])
                tries += 1
            else:
                log.info("storage_ready", extra={"after_s": round(time.monotonic() - begun_s, 1)})
                return

    async def run(self) -> None:
        """Ask each period, until cancelled. Logs changes, and once a minute that an outage goes on."""
        await run_periodically("storage_health", self._look_when_due, period_s=lambda: 0.0)

    def doubt(self, is_in_doubt: bool) -> None:  # noqa: FBT001  # a callback with one argument
        """Take note that renewals fail or succeed again, and ask at once."""
        self._is_in_doubt = is_in_doubt
        self._wake.set()

    async def _look_when_due(self) -> None:
        is_proven = self._has_lease and self._is_serving and not self._is_in_doubt
        try:
            async with asyncio.timeout(_LEASED_PERIOD_S if is_proven else _PROBE_PERIOD_S):
                await self._wake.wait()
        except TimeoutError:
            pass
        # Before the question, so that what is doubted meanwhile is asked for once more.
        self._wake.clear()
        await self._look()

    async def _look(self) -> None:
        try:
            if not self._has_lease:
                await self._read_clock()
            await self._probe()
        except StorageUnavailable as exc:
            self._is_serving, self._reason = False, exc.detail or str(exc)
            if self._outage is None:
                self._outage = _Outage("storage_lost", logging.ERROR)
            self._outage.goes_on(exc)
        else:
            if self._outage is not None:
                log.info("storage_regained", extra=self._outage.lasted())
            self._outage = None

    async def _read_clock(self) -> None:
        # The clock needs both instants: the storage looked at its own clock somewhere between them.
        sent_us = self._clock.uptime_us()
        storage_us = await self._storage.now_us()
        self._clock.observe(storage_us, sent_us=sent_us, received_us=self._clock.uptime_us())

    async def _probe(self) -> None:
        sessions = await self._storage.check()
        if self._sessions not in {None, sessions}:
            log.warning("stored_sessions_replaced")
            self._on_replaced()
        self._sessions = sessions
        self._is_serving, self._reason = True, ""
