"""One key space of a cluster, in the place of a single server."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from mnemosyned.errors import StorageUnavailable

if TYPE_CHECKING:
    from mnemosyned.storage.redis.cluster.pool import ClusterPool
    from mnemosyned.storage.redis.cluster.slots import Space
    from mnemosyned.storage.redis.scripts import Script


class SpacePool:
    """Runs scripts on the keys of one space, as RedisPool does on those of its server."""

    def __init__(self, pool: ClusterPool, space: Space) -> None:
        self._pool = pool
        self._space = space

    async def run(
        self,
        script: Script,
        *arguments: str | bytes | int,
        is_write: bool = False,
        is_urgent: bool = False,
        timeout_s: float | None = None,
        part: str = "",
    ) -> Any:  # noqa: ANN401  # as the script returns it
        """See RedisPool."""
        (reply,) = await self._pool.run_all(
            script,
            [(self._space.within(part), arguments)],
            is_write=is_write,
            is_urgent=is_urgent,
            timeout_s=timeout_s,
        )
        if isinstance(reply, StorageUnavailable):
            raise reply
        return reply

    async def each(
        self,
        script: Script,
        head: Sequence[str | bytes | int],
        items: Sequence[tuple[str | bytes | int, ...]],
        *,
        is_write: bool = False,
        part: str = "",
    ) -> list[Any]:
        """See RedisPool."""
        arguments = [*head, *chain.from_iterable(items)]
        replies: list[Any] = await self.run(script, *arguments, is_write=is_write, part=part)
        return replies
