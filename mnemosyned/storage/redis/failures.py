"""What becomes of an error of Redis or of the network: counted, logged, and the store's own error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mnemosyned.errors import StorageUnavailable
from mnemosyned.storage.fault_log import FaultLog
from mnemosyned.storage.redis import faults
from mnemosyned.storage.redis.faults import NotReplicated, hint_of, is_login_refused

if TYPE_CHECKING:
    from mnemosyned.observe.metrics import QueryMetrics


class Failures:
    """Makes StorageUnavailable of errors, for one address."""

    def __init__(self, metrics: QueryMetrics) -> None:
        self._metrics = metrics
        self._faults = FaultLog(faults)
        # What reads the file of the address again.
        self.on_auth_failure: Callable[[], None] = _do_nothing

    def take(self, where: dict[str, str]) -> None:
        """Take what the log says of the address."""
        self._faults.where = where

    def unavailable(self, doing: str, exc: BaseException) -> StorageUnavailable:
        """Count and log a fault; return what to raise for it."""
        self._metrics.count_error(doing)
        self._faults.failed(doing, exc)
        if is_login_refused(exc):
            self.on_auth_failure()
        is_late = isinstance(exc, TimeoutError | NotReplicated)
        error = StorageUnavailable(
            "mnemosyned: storage: " + ("no answer in time" if is_late else "unavailable")
        )
        # Without a connection nothing was sent.
        error.is_under_way = doing not in {"acquire", "connect"}
        error.detail, error.hint = self._faults.described(doing, exc), hint_of(exc)
        error.__cause__ = exc
        return error


def _do_nothing() -> None:
    pass
