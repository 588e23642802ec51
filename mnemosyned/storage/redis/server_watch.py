"""Looks at servers of Redis: when the daemon starts, with each new connection, and every few seconds.

A server that will not do ends the start. One that is changed while the daemon runs, such as by `CONFIG SET
maxmemory-policy`, or that takes the place of another one in a failover, goes on being used, since an outage
would be worse than what may be lost. The log says so once for each change.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.redis.server_check import Verdict, fields_of, judge

if TYPE_CHECKING:
    from mnemosyned.storage.redis.link import Command, Link

log = logging.getLogger(__name__)

_QUESTIONS: Final[list[Command]] = [
    ("INFO",),
    ("CONFIG", "GET", "appendfsync"),
    ("CONFIG", "GET", "save"),
]


class ServerWatch:
    """Knows what the log has said of each server."""

    def __init__(self, *, is_cluster: bool = False) -> None:
        self._is_cluster = is_cluster
        self._told: dict[str, tuple[str, ...]] = {}

    async def admit(self, link: Link) -> dict[str, str]:
        """Judge a server at the start of the daemon; return what it says of itself.

        Raises StorageRefused, StorageUnavailable, and redis-py's errors.
        """
        info, verdict = await self._judged(link)
        if verdict.refusal:
            raise StorageRefused(f"Redis at {link.target}: {verdict.refusal}")
        if verdict.unavailable:
            error = StorageUnavailable("mnemosyned: storage: unavailable")
            error.detail = verdict.unavailable
            raise error
        self._tell(link.target, verdict.warnings, logging.WARNING)
        return info

    async def look(self, link: Link) -> dict[str, str]:
        """Judge a server while the daemon runs; return what it says of itself. Raises redis-py's errors."""
        info, verdict = await self._judged(link)
        if verdict.refusal:
            self._tell(link.target, (verdict.refusal,), logging.ERROR)
        else:
            self._tell(link.target, verdict.warnings, logging.WARNING)
        return info

    async def _judged(self, link: Link) -> tuple[dict[str, str], Verdict]:
        replies: list[Any] = await link.call(_QUESTIONS)
        if isinstance(replies[0], Exception):
            raise replies[0]
        settings = {one[0].decode(): one[1].decode() for one in replies[1:] if isinstance(one, list) and one}
        info = fields_of(replies[0])
        return info, judge(info, settings, is_cluster=self._is_cluster)

    def _tell(self, server: str, reasons: tuple[str, ...], level: int) -> None:
        if reasons == self._told.get(server, ()):
            return
        self._told[server] = reasons
        for reason in reasons:
            log.log(level, "redis_may_lose_sessions", extra={"server": server, "reason": reason})
