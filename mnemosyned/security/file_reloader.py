"""Files that take effect when they are replaced, without a restart: TLS files and the file of callers.

Every second the stamps of the files are compared: time of change, size, inode, mode and owner. If one has
changed, all files are read and checked together, and the followers take the new content. The checks are those
of the start, also of who may read and write a file (config/files.py).

    stamps as before ────────────────────────────────> nothing
    stamps differ ── read, check ── valid ── followers take it ──> new content, new stamps
                          |                       |
                        invalid              FilesUnusable
                          └───────────┬───────────┘
                                      └──────────────> old content, old stamps: tried once more in a second

What happens when files are half replaced. A certificate and its key are two files, and no file system
replaces both at once:

- Read between the two replacements, the key does not fit the certificate. The check fails, and the old
  content stays. The stamps of before stay too, so the next look reads again, and finds both.
- A file that is read while it is written is cut short: it fails the check in the same way. If it passes, as a
  list of callers without its last lines would, its size or time has changed by the next look.
- The stamps are taken before the files are read. A file that is replaced between the two is read once more in
  the next second; in the other sequence that replacement could be missed.
- Kubernetes replaces one link, through which all files are found. `stat` follows links, so a new inode shows.
- A file is deleted: its stamp is None, reading it fails, and the old content stays.

An invalid file is logged once for each reason, not once a second. Nothing here ends the daemon: a mistake in
a file costs the change, never the service.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

from aio.periodic import run_periodically
from mnemosyned.config.files import exposure_of

log = logging.getLogger(__name__)

Content = TypeVar("Content")
_PERIOD_S: Final = 1.0


class FilesUnusable(Exception):
    """Files are missing or invalid; the text names the file and the reason, and quotes no content."""


class FileReloader(Generic[Content]):
    """The content of some files, as of the last time that they were valid.

    `followers` are called with new content, one after the other, before it becomes `content`. A follower may
    raise FilesUnusable too, because some read the files themselves. Then `content` stays, and in a second all
    followers are called once more, also those that have taken the change: taking it twice must do no harm.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        read: Callable[[], Content],
        *,
        secret_paths: Sequence[str] = (),
    ) -> None:
        """Read the files now; `name` begins the log's events. Empty paths are left out.

        A new file of `secret_paths` that other users may read is taken, with a warning.

        Raises:
            FilesUnusable: by `read`. The caller ends the start: there is no older content to keep.
        """
        self.followers: list[Callable[[Content], Awaitable[None]]] = []
        self._name = name
        self._paths = [path for path in paths if path]
        self._read = read
        self._secret_paths = secret_paths
        self._seen = self._stamps()
        self._complaint = ""
        self._is_asked = False
        self._looking = asyncio.Lock()
        self.content = read()

    def ask(self) -> None:
        """Read the files at the next look, whatever their stamps say."""
        self._is_asked = True

    @property
    def name(self) -> str:
        """What the files are for, in one word."""
        return self._name

    async def run(self) -> None:
        """Look for changes once a second, until cancelled.

        Stamps are compared, because inotify misses changes behind links and on network file systems.
        """
        await run_periodically("reload", self.look, period_s=lambda: _PERIOD_S)

    async def reload(self) -> str:
        """Read the files now, whatever their stamps say; return why the old content stays, if it does."""
        self._complaint = ""
        self.ask()
        await self.look()
        return self._complaint

    async def look(self) -> None:
        """Have new files take effect if they are complete and valid; otherwise keep the old content.

        One look at a time: a second one waits, and looks again.
        """
        async with self._looking:
            await self._look()

    async def _look(self) -> None:
        is_asked, self._is_asked = self._is_asked, False
        # On a thread, all that looks at files: a network file system may take its time.
        stamps = await asyncio.to_thread(self._stamps)
        if stamps == self._seen and not is_asked:
            # Also after a change that was taken back: the same mistake once more is logged once more.
            self._complaint = ""
            return
        try:
            content = await asyncio.to_thread(self._read)
            if stamps == self._seen and content == self.content:
                return
            for follow in self.followers:
                await follow(content)
        except FilesUnusable as exc:
            # Perhaps only one of the files is replaced yet. The old stamps stay, so the next look reads them.
            if str(exc) != self._complaint:
                self._complaint = str(exc)
                log.error("%s_reload_failed", self._name, extra={"error": str(exc)})
            return
        self._seen, self._complaint, self.content = stamps, "", content
        log.info("%s_reloaded", self._name, extra={"files": len(self._paths)})
        await asyncio.to_thread(log_exposures, dict.fromkeys(self._secret_paths, self._name))

    def _stamps(self) -> list[tuple[int, ...] | None]:
        return [stamp_of(path) for path in self._paths]


def log_exposures(names_by_path: Mapping[str, str]) -> None:
    """Warn of each file with a secret that other users may read or replace; the name says what it is for."""
    for path, name in names_by_path.items():
        exposure = exposure_of(path)
        if exposure is not None:
            log.warning(exposure.event, extra={"file": path, "used_for": name, "advice": exposure.advice})


def stamp_of(path: str) -> tuple[int, ...] | None:
    """Return what changes when a file does; None: it cannot be looked at."""
    try:
        found = os.stat(path)  # noqa: PTH116  # follows links, which a Kubernetes secret is made of
    except OSError:
        return None
    # Mode and owner, since `chmod` changes nothing else that is compared here.
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode, found.st_uid
