"""Is a Redis Cluster as it was: its primaries, their settings and clocks, and what its buckets hold?"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.redis import scripts
from mnemosyned.storage.redis.cluster.clocks import MOST_APART_US

if TYPE_CHECKING:
    from mnemosyned.storage.redis.cluster.pool import ClusterPool
    from mnemosyned.storage.redis.cluster.primary import Primary
    from mnemosyned.storage.redis.cluster.space_pool import SpacePool

log = logging.getLogger(__name__)


class ClusterState:
    """What the storage port asks of a cluster as a whole."""

    def __init__(self, pool: ClusterPool, home: SpacePool) -> None:
        self._pool = pool
        self._home = home
        self._identity = secrets.token_bytes(16)
        self._epochs: dict[int, bytes] = {}  # of buckets; another one if a bucket has lost what it held
        self._losses = 0
        self._failed = 0  # buckets that did not answer
        self._are_clocks_apart = False

    async def check(self) -> object:
        """See Storage: fails if the home does not answer, or no bucket does.

        A primary that does not answer is logged. The sessions on others can be used, and its own calls fail.
        """
        await self._pool.look()
        primaries = {self._pool.primary_of(space) for space in (self._pool.home, *self._pool.buckets)}
        await asyncio.gather(*(_looked_at(one) for one in primaries if one is not None))
        self._tell_clocks()
        identity, state, *_ = await self._home_state()
        self._identity = identity
        count = await self._home.run(scripts.BUCKETS, len(self._pool.buckets), is_write=True)
        if int(count) != len(self._pool.buckets):
            error = StorageUnavailable("mnemosyned: storage: unavailable")
            error.detail = f"the cluster has {int(count)} buckets by now: restart the daemon"
            raise error
        self._compare(await self._bucket_states())
        return identity, state, self._losses

    def _compare(self, states: Sequence[Any]) -> None:
        """Take note of buckets that have lost what they held, and of those that do not answer."""
        failures = [state for state in states if isinstance(state, StorageUnavailable)]
        if len(failures) == len(states):
            raise failures[0]
        for bucket, reply in enumerate(states):
            if isinstance(reply, StorageUnavailable):
                continue
            # Not the server: a slot may move.
            epoch = reply[1].rpartition(b"/")[2]
            if self._epochs.setdefault(bucket, epoch) != epoch:
                self._epochs[bucket] = epoch
                self._losses += 1
        if failures and not self._failed:
            log.warning(
                "redis_cluster_incomplete",
                extra={"buckets": len(failures), "of": len(states), "error": failures[0].detail},
            )
        elif self._failed and not failures:
            log.info("redis_cluster_complete", extra={"buckets": len(states)})
        self._failed = len(failures)

    async def identity(self) -> bytes:
        """See Storage. If the home has lost it, the nodes that know it put it back."""
        identity: bytes = (await self._home_state())[0]
        return identity

    async def sessions(self) -> int:
        """See Storage; exact, but for buckets that do not answer."""
        states = await self._bucket_states()
        return sum(int(state[3]) for state in states if not isinstance(state, StorageUnavailable))

    async def now_us(self) -> int:
        """Return the clock of the primary that is furthest behind."""
        return int((await self._home_state())[2]) - self.behind_us()

    def behind_us(self) -> int:
        """Return by how much a primary may be behind the home."""
        home = self._pool.primary_of(self._pool.home)
        return 0 if home is None else self._pool.clocks.behind_us(home.host)

    def refuse_clocks(self) -> None:
        """Raise StorageRefused if the clocks of the primaries differ too much."""
        if (apart := self._apart()) is not None:
            raise StorageRefused(f"Redis: {apart}")

    def _tell_clocks(self) -> None:
        apart = self._apart()
        if (apart is not None) != self._are_clocks_apart:
            self._are_clocks_apart = apart is not None
            if apart is not None:
                log.error("redis_clocks_differ", extra={"reason": apart})
            else:
                log.info("redis_clocks_agree")

    def _apart(self) -> str | None:
        apart_us = self._pool.clocks.apart_us()
        if apart_us <= MOST_APART_US:
            return None
        return (
            f"the clocks of its primaries differ by {apart_us / 1e6:.3g} s, and may by "
            f"{MOST_APART_US / 1e6:.3g} s at most: see NTP on their machines"
        )

    async def _home_state(self) -> Any:  # noqa: ANN401  # as the script returns it
        return await self._home.run(scripts.CHECK, self._identity, secrets.token_hex(8), is_write=True)

    async def _bucket_states(self) -> list[Any]:
        given = (self._identity, secrets.token_hex(8))
        return await self._pool.run_all(
            scripts.CHECK, [(space, given) for space in self._pool.buckets], is_write=True
        )


async def _looked_at(primary: Primary) -> None:
    # One that is suspect is asked by the pool already.
    if not primary.is_suspect:
        with suppress(StorageUnavailable):
            await primary.look()
