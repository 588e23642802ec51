"""The life of a process around its work: signals and log first, and at the end the exit code."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

from mnemosyned import signals
from mnemosyned.settings import SECRET_FLAGS, RunConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemosyned.config.config import Config

log = logging.getLogger("mnemosyned")


def run(config: Config, body: Callable[[], None], *, worker: int | None = None) -> int:
    """Run `body`, which imports what it needs, and return the exit code; see __main__.py.

    `worker` is the number of this process, if it is one of several of a daemon.
    """
    signals.take_early()
    # The imports make no garbage; the daemon turns the collector on again.
    gc.disable()
    from mnemosyned.daemon import StartFailed
    from mnemosyned.observe import logs
    from mnemosyned.observe.config import ObserveConfig
    from mnemosyned.security import core_dumps

    observe = config[ObserveConfig]
    logs.configure(observe.log_environment, observe.log_level, secret_flags=SECRET_FLAGS, worker=worker)
    if not config[RunConfig].has_core_dumps:
        core_dumps.forbid()
    try:
        body()
    except StartFailed as exc:
        return _end("start_failed", str(exc), 1)
    except KeyboardInterrupt:
        return _end("stopped_early", "stopped before everything was written and closed cleanly", 130)
    except Exception as exc:  # a bug: its traceback belongs into the log, in the form of the log
        log.critical("crashed", exc_info=exc)
        return 1
    finally:
        logs.close()
    return 0


def _end(event: str, text: str, exit_code: int) -> int:
    """Say why the daemon ends, in the last line of the log, whatever its level leaves out."""
    log.setLevel(logging.ERROR)
    log.error(event, extra={"error": text})
    return exit_code
