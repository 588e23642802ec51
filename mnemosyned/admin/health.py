"""What the probes of an orchestrator are told: is this process alive, and is the node ready?

Both ask the gRPC port itself, by a call (grpc_probe.py). The admin port has a thread of its own, and would
answer for an event loop that is stalled.

    question   | yes, if
    -----------+----------------------------------------------------------------------------------------------
    alive?     | the call is answered, or the event loop was silent for less than `-health.stall`, and so was
               | the port. Neither the storage nor a peer matters: a restart would only lose the cache
    ready?     | the call is answered, the storage answers, and the node serves

- A port that takes a connection and closes it at once is full. It is alive, and takes no further clients.
- So is a port without an answer while the process has no file left. The question itself may have the last
  one, and grpcio lets a connection wait for a file, without a word.
- In a drain the port is closed, and the node is still alive.
- After a pause of the whole process (a stopped virtual machine), the first question finds the loop silent for
  long. It makes the call all the same, and the answer decides. Time in which the admin thread was not awake
  either does not count as silence of the loop.
- A port that refuses our certificate has answered, if the loop is not silent: grpcio refuses without it.

Questions that arrive together share one call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, NoReturn, Protocol

from aio.periodic import run_periodically
from mnemosyned.admin.grpc_probe import NotAnswered, Refused, Untrusted
from mnemosyned.admin.pulse import Pulse
from mnemosyned.transport.spare_files import need_files

log = logging.getLogger(__name__)

# Orchestrators give up after a second or two, and their probe is to get an answer before.
PROBE_TIMEOUT_S: Final = 0.9
_WATCH_PERIOD_S: Final = 1.0
# A loop that is silent for so long is logged, with where it stands.
_LOGGED_SILENCE_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether calls should be sent to this node, and why."""

    is_ready: bool
    probes: Mapping[str, object]  # result by probe, as JSON


class Health(Protocol):
    """What the admin server answers probes from; asked on its loop."""

    async def complaint(self) -> str:
        """Return why this process is not alive; empty: it is."""
        ...

    async def readiness(self) -> Readiness:
        """Return whether calls should be sent here."""
        ...

    async def watch(self) -> NoReturn:
        """Look after it while the server runs; until cancelled."""
        ...


class NodeHealth:
    """Answers both questions, on the loop of the admin thread.

    - `readiness` is what the node says of itself.
    - `call` makes a call through the gRPC port; it raises NotAnswered.
    - `is_draining` says that the port may be closed.
    """

    def __init__(
        self,
        readiness: Callable[[], Readiness],
        *,
        call: Callable[[], Awaitable[None]],
        pulse: Pulse,
        stall_s: float,
        is_draining: Callable[[], bool],
    ) -> None:
        self._readiness = readiness
        self._call = call
        self._pulse = pulse
        self._stall_s = stall_s
        self._is_draining = is_draining
        self._asking: asyncio.Task[NotAnswered | None] | None = None
        self._unanswered_since_s: float | None = None
        self._stalled_since_s: float | None = None
        self._awake_s = time.monotonic()  # when this thread was last seen awake

    async def complaint(self) -> str:
        """Return why this process is not alive; empty: it is."""
        failure = await self._ask()
        if failure is None:
            return ""
        self._forgive_pause()
        # Before the kind of failure: grpcio closes connections, and does handshakes, without the event loop.
        silence_s = self._pulse.silence_s()
        if silence_s > self._stall_s:
            return f"the event loop has not answered for {silence_s:.0f} s"
        if isinstance(failure, Refused):
            return ""
        assert self._unanswered_since_s is not None
        unanswered_s = time.monotonic() - self._unanswered_since_s
        if unanswered_s > self._stall_s and not self._is_draining():
            return f"the gRPC port has not answered for {unanswered_s:.0f} s: {failure}"
        return ""

    async def readiness(self) -> Readiness:
        """Return the node's readiness, with the probe `grpc` if the call was not answered."""
        failure = await self._ask()
        found = self._readiness()
        self._forgive_pause()
        if failure is None or (
            isinstance(failure, Untrusted) and self._pulse.silence_s() < _LOGGED_SILENCE_S
        ):
            return found
        return replace(found, is_ready=False, probes=dict(found.probes) | {"grpc": f"NOT_SERVING: {failure}"})

    async def watch(self) -> NoReturn:
        """Log when the event loop is stalled, where, and for how long it was; until cancelled."""
        await run_periodically("health_watch", self._look, period_s=lambda: _WATCH_PERIOD_S)

    def _forgive_pause(self) -> None:
        """Have a pause of the whole process not count as silence of its event loop."""
        now_s = time.monotonic()
        late_s = now_s - self._awake_s - _WATCH_PERIOD_S
        self._awake_s = now_s
        if late_s > _WATCH_PERIOD_S:
            self._pulse.forgive(late_s)

    async def _look(self) -> None:
        self._forgive_pause()
        silence_s, since_s = self._pulse.silence_s(), self._stalled_since_s
        if silence_s > _LOGGED_SILENCE_S and since_s is None:
            self._stalled_since_s = time.monotonic() - silence_s
            fields = {"silent_s": round(silence_s, 1), "stack": self._pulse.stack()}
            log.error("event_loop_stalled", extra=fields)
        elif silence_s < _LOGGED_SILENCE_S and since_s is not None:
            self._stalled_since_s = None
            log.warning("event_loop_goes_on", extra={"stalled_s": round(time.monotonic() - since_s, 1)})

    async def _ask(self) -> NotAnswered | None:
        if self._asking is None:
            self._asking = asyncio.create_task(self._asked())
            self._asking.add_done_callback(self._forget)
        return await asyncio.shield(self._asking)

    async def _asked(self) -> NotAnswered | None:
        try:
            await self._call()
        except NotAnswered as exc:
            failure = _explained(exc)
            if isinstance(failure, Refused):
                self._unanswered_since_s = None
            elif self._unanswered_since_s is None:
                self._unanswered_since_s = time.monotonic()
            return failure
        self._unanswered_since_s = None
        return None

    def _forget(self, _: object) -> None:
        self._asking = None


def _explained(failure: NotAnswered) -> NotAnswered:
    """Return the failure, or that the process has no file left for the connection."""
    if isinstance(failure, Refused):
        return failure
    try:
        need_files()
    except OSError as exc:
        return Refused(f"{failure}: {exc.strerror}")
    return failure
