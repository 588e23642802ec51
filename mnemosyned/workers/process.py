"""One process of a worker: started with all it needs, watched until its end.

    supervisor                                     worker.py
      |── fork, exec: python -c ENTRY ──────────────>|      sockets for clients, socket pair
      |── where to import from, Task ───────────────>|      through the socket pair, not the command line:
      |                                              |      `ps` shows no secret, not for a moment
      |<── listening, serving ───────────────────────|
      |<── leaving: a peer has asked it to ──────────|
      |<── failed: the one line that says why ───────|      it ends with exit code 1

A worker has a session of its own, so that Ctrl-C in a terminal reaches the supervisor alone.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemosyned.config.config import Config
    from mnemosyned.place import Place

Link = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_LENGTH: Final = struct.Struct("!I")
# The path first: what follows needs our modules, from where this process has them. If the supervisor ends
# before it has sent all, nothing has begun.
_ENTRY: Final = """
import json, socket, sys
end = socket.socket(fileno=int(sys.argv[1]))
def read(size):
    part = end.recv(size, socket.MSG_WAITALL)
    return part if len(part) == size else sys.exit(1)
def received():
    return read(int.from_bytes(read(4), "big"))
sys.path[:] = json.loads(received())
from mnemosyned.workers.worker import main
sys.exit(main(end, received()))
"""


class Phase(Enum):
    """How far a process of a worker is."""

    STARTING = "STARTING"
    LISTENING = "LISTENING"  # it answers probes, and waits for the storage or the cluster
    SERVING = "SERVING"
    ENDED = "ENDED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker is to do: all of it, so that each has the same configuration, whenever it is started."""

    config: Config  # the daemon's
    arguments: list[str]  # of the command line, to read the configuration again
    place: Place
    supervisor: int  # its process: it may end before the worker can look who has started it


class WorkerProcess:
    """A running process; constructed by `start`."""

    def __init__(
        self, process: asyncio.subprocess.Process, link: Link, number: int, changed: Callable[[], None]
    ) -> None:
        self.number = number
        self.pid = process.pid
        self.phase = Phase.STARTING
        self.refusal = ""  # why it could not start, in one line
        self.is_leaving = False  # a peer has asked it to
        self.has_served = False
        self.missed_reload = False  # it was starting, and a signal would have ended it
        self._process = process
        self._link = link
        self._changed = changed
        self._begun_s = time.monotonic()

    @classmethod
    async def start(cls, task: Task, *, changed: Callable[[], None]) -> WorkerProcess:
        """Start the process; `changed` is called at each new phase. Raises OSError."""
        ours, theirs = socket.socketpair()
        place = task.place
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-P", "-c", _ENTRY, str(theirs.fileno())),
                pass_fds=(theirs.fileno(), place.rows, *place.listeners),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        link = await asyncio.open_connection(sock=ours)
        for part in (json.dumps(sys.path).encode(), pickle.dumps(task)):
            link[1].write(_LENGTH.pack(len(part)) + part)
        return cls(process, link, place.number, changed)

    @property
    def age_s(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._begun_s

    async def until_end(self) -> int:
        """Return the exit code, negative for a signal; kill the process if this is cancelled."""
        reader, writer = self._link
        try:
            # A process may end, and its last words be read later.
            async for line in reader:
                self._take(json.loads(line))
            return await self._process.wait()
        except ConnectionError:
            return await self._process.wait()
        finally:
            if self._process.returncode is None:
                self.send(signal.SIGKILL)
            self.phase = Phase.ENDED
            writer.close()

    def _take(self, said: dict[str, str]) -> None:
        event = said["event"]
        if event == "failed":
            self.refusal = said["error"]
        elif event == "leaving":
            self.is_leaving = True
        elif event in {"listening", "serving"}:
            self.phase = Phase[event.upper()]
            if self.missed_reload:
                self.reload()
            self.has_served = self.has_served or self.phase is Phase.SERVING
        self._changed()

    def reload(self) -> None:
        """Have it read its files again, now or as soon as it can."""
        self.missed_reload = self.phase is Phase.STARTING
        if not self.missed_reload:
            self.send(signal.SIGHUP)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process is still there."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)
