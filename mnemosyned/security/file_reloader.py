"""Files that take effect when they are replaced, without a restart."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from aio.periodic import run_periodically

log = logging.getLogger(__name__)

Content = TypeVar("Content")
_PERIOD_S: Final = 1.0


class FilesUnusable(Exception):
    """Files are missing or invalid; the text names the file and the reason, and quotes nothing of it."""


class FileReloader(Generic[Content]):
    """What some files hold, as of the last time that they were valid.

    `followers` are told when that changes. They may raise FilesUnusable too: then the change is tried again.
    """

    def __init__(self, name: str, paths: Sequence[str], read: Callable[[], Content]) -> None:
        """Read the files now; `name` begins the log's events. Raises FilesUnusable, as `read` does."""
        self.followers: list[Callable[[Content], Awaitable[None]]] = []
        self._name = name
        self._paths = [path for path in paths if path]
        self._read = read
        self._seen = self._stamps()
        self._complaint = ""
        self.content = read()

    async def run(self) -> None:
        """Look for changes once a second, until cancelled."""
        await run_periodically("reload", self.look, period_s=lambda: _PERIOD_S)

    async def look(self) -> None:
        """Have new files take effect if they are there and valid; otherwise keep the old content."""
        stamps = self._stamps()
        if stamps == self._seen:
            return
        try:
            content = await asyncio.to_thread(self._read)
            for follow in self.followers:
                await follow(content)
        except FilesUnusable as exc:
            # Perhaps only one of them is there yet.
            if str(exc) != self._complaint:
                self._complaint = str(exc)
                log.error("%s_reload_failed", self._name, extra={"error": str(exc)})
            return
        self._seen, self._complaint, self.content = stamps, "", content
        log.info("%s_reloaded", self._name, extra={"files": len(self._paths)})

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  # follows links, which a Kubernetes secret is made of
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
