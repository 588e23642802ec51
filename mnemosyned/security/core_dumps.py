"""No core dump: one has every cached session, every token and all secrets of the process.

    what is set              | what it stops
    -------------------------+----------------------------------------------------------------------------
    RLIMIT_CORE = 0          | the kernel writes no file, also for children of this process
    PR_SET_DUMPABLE = 0      | on Linux, also a program that collects core dumps (`core_pattern` with a pipe),
                             | for which the limit does not count; and debuggers of the same user

Both are needed: the second one ends with `exec`, so that the private PostgreSQL has only the first.

Without "dumpable", the files of this process in /proc belong to root. Only root then reads its environment
and its memory. The process itself still reads what it needs: counts of memory, of files and of CPU. A
profiler such as py-spy needs root, or `-core-dumps`.
"""

from __future__ import annotations

import ctypes
import logging
import resource
import sys
from typing import Final

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE: Final = 4


def forbid() -> None:
    """Have this process leave no core dump. A failure is logged: the daemon serves nevertheless."""
    try:
        # The hard limit too, so that no later code raises it.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as exc:
        log.warning("core_dumps_possible", extra={"error": str(exc)})
    if sys.platform == "linux" and not _clear_dumpable():
        log.warning("core_dumps_possible", extra={"error": "prctl failed"})


def _clear_dumpable() -> bool:
    return bool(ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)
