"""The rows of the nodes, by which leases are given (`cluster/lease.py`), in one hash: `scripts/renew.lua`.

The identity of the store has the process of the server, its replication id and a random text beside the
sessions. A replica that was promoted is therefore another store, and so is a server that was restarted,
emptied, or restored: that costs a second and a half without copies. With `-redis.wait`, a renewal counts only
if replicas have it, so a primary that is cut off from them gives no lease.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from cluster.node_row import Barred, NodeRow, Renewal, Renewed
from mnemosyned.storage.redis import scripts

if TYPE_CHECKING:
    from mnemosyned.storage.redis.cluster.space_pool import SpacePool
    from mnemosyned.storage.redis.pool import RedisPool

# A lease must not depend on an answer that does not come: a later one may.
_TIMEOUT_S: Final = 1.0


class NodeRows:
    """The rows of nodes (LeaseStore)."""

    def __init__(self, pool: RedisPool | SpacePool) -> None:
        self._pool = pool

    async def renew(self, renewal: Renewal) -> Renewed:
        """See LeaseStore."""
        name, instance, number, ring, seen, replaces = renewal
        reply = await self._run(scripts.RENEW, name, instance, number, ring, seen, *replaces)
        identity, now_us = reply[0].decode(), reply[1]
        rows = [
            _row(name.decode(), row.decode(), now_us)
            for name, row in zip(reply[2::2], reply[3::2], strict=True)
        ]
        return Renewed(tuple(rows), identity, now_us)

    async def bar(self, name: str) -> Barred | None:
        """See LeaseStore."""
        reply = await self._run(scripts.BAR, name)
        if not reply:
            return None
        identity, epoch, instance, number = reply
        return Barred(int(epoch), int(instance), int(number), identity.decode())

    async def resign(self, row: tuple[str, int, int | None]) -> None:
        """See LeaseStore."""
        name, instance, number = row
        await self._run(scripts.RESIGN, name, instance, "" if number is None else number)

    async def _run(self, script: scripts.Script, *arguments: str | bytes | int) -> Any:  # noqa: ANN401  # as it comes
        return await self._pool.run(script, *arguments, is_write=True, is_urgent=True, timeout_s=_TIMEOUT_S)


def _row(name: str, text: str, now_us: int) -> NodeRow:
    instance, number, epoch, base, seen, renewed_us, ring = text.split(" ", 6)
    return NodeRow(
        name,
        int(instance),
        int(number),
        ring,
        int(epoch),
        int(base),
        int(seen),
        age_us=now_us - int(renewed_us),
    )
