"""Where the process of a worker begins: a whole daemon with a place among others.

Its exit code tells the supervisor how it ended: 0 after a drain, 1 if it could not start or has crashed. What
keeps it from starting is told to the supervisor, which says it once, and not logged by each worker.
"""

from __future__ import annotations

import os
import pickle
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mnemosyned import running, settings
from mnemosyned.observe import stdio
from mnemosyned.place import Supervised
from mnemosyned.security import process_title

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.workers.process import Task


def main(end: socket.socket, task: bytes) -> int:
    """Run the worker that the supervisor at the other end of this socket has started."""
    stdio.secure()
    # From the process that has started this one.
    return _run(end, pickle.loads(task))  # noqa: S301 # nosec B301


def _run(end: socket.socket, task: Task) -> int:
    place = task.place
    process_title.show(f"{process_title.PROGRAM}: worker {place.number}")
    supervised = Supervised(end, place)

    def parse() -> Config:
        return place.applied_to(settings.parse(task.arguments, os.environ))

    def body() -> None:
        from mnemosyned.daemon import StartFailed, run  # late, as in __main__.py

        try:
            run(place.applied_to(task.config), parse, supervised)
        except StartFailed as exc:
            supervised.tell("failed", error=str(exc))
            raise SystemExit(1) from exc

    try:
        return running.run(task.config, body, worker=place.number)
    finally:
        if os.getppid() != task.supervisor:
            # It is dead, and cannot remove the directory. The last of the workers finds it empty.
            with suppress(OSError):
                Path(place.directory).rmdir()
