"""Do the scripts do what they should on this server? Tried at each start, on keys that no daemon uses.

A right that the user lacks ends the start in this way, and not a call some hours later.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from cluster.node_row import Renewal
from mnemosyned.sessions import bag
from mnemosyned.sessions.model import (
    Abandonment,
    ChangedBag,
    Criteria,
    Lookup,
    NewSession,
    Session,
    Touch,
    ValueChange,
)
from mnemosyned.sessions.store import FullStore, Renaming, StorageRefused

if TYPE_CHECKING:
    from mnemosyned.storage.redis.cluster.space_pool import SpacePool
    from mnemosyned.storage.redis.pool import RedisPool
    from mnemosyned.storage.redis.scripts import Script

_TTL_US: Final = 10_000_000
_SUBJECT: Final = "trial"


class OwnKeys:
    """Stands in for the pool: its scripts see keys of their own."""

    def __init__(self, pool: RedisPool | SpacePool) -> None:
        self._pool = pool
        self._part = f"trial:{secrets.token_hex(8)}:"

    async def run(self, script: Script, *arguments: str | bytes | int, **options: Any) -> Any:  # noqa: ANN401  # as it comes
        """See RedisPool."""
        return await self._pool.run(script, *arguments, part=self._part, **options)

    async def each(self, script: Script, head: Any, items: Any, **options: Any) -> list[Any]:  # noqa: ANN401  # likewise
        """See RedisPool."""
        return await self._pool.each(script, head, items, part=self._part, **options)


async def run(pool: RedisPool | SpacePool, store_on: Callable[[RedisPool], FullStore]) -> None:
    """Start, read, change, name and end sessions.

    Raises:
        StorageUnavailable: a script fails.
        StorageRefused: a script does something else.
    """
    store = store_on(cast("RedisPool", OwnKeys(pool)))
    new = NewSession(access_token="one", subject_id=_SUBJECT, refresh_token=_SUBJECT, ttl_us=_TTL_US)  # noqa: S106  # no secret
    (started,) = await store.start([new])
    (loaded,) = await store.load([Lookup(access_token="one", ttl_us=2 * _TTL_US, touch_interval_us=0)])  # noqa: S106  # likewise
    (changed,) = await store.set_values([ValueChange(access_token="one", key="k", value="v")])  # noqa: S106  # likewise
    moved = await store.touch([Touch(access_token="one", expires_at_us=0)])  # noqa: S106  # likewise
    renamed = await store.rename([Renaming(old="one", new="two")])
    page = await store.find(Criteria(subject_id=_SUBJECT), offset=0, limit=2)
    walked = await store.stored_from("", limit=2)
    await store.start([new])
    ended = await store.abandon([Abandonment(access_token="one")])  # noqa: S106  # likewise
    await store.renew(Renewal("one", 1, 1, "", 0))
    await store.bar("one")
    await store.resign(("one", 1, None))
    deletion = await store.delete(Criteria(refresh_token=_SUBJECT), limit=2)
    await store.remove_unchanged(walked)
    cleaned = await store.clean_up(limit=1)
    is_as_it_should = (
        isinstance(started, Session)
        and isinstance(loaded, Session)
        and loaded.expires_at_us > started.expires_at_us
        and isinstance(changed, ChangedBag)
        and changed.values == {"k": "v"}
        and moved == renamed == ended == [True]
        and [found.access_token for found in page.sessions] == deletion.stored_keys == ["two"]
        and isinstance(page.sessions[0], Session)
        and page.sessions[0].bag == bag.encode({"k": "v"})
        and cleaned == []
    )
    if not is_as_it_should:
        raise unexpected()


def unexpected() -> StorageRefused:
    """Return that the server does something else than Redis does."""
    return StorageRefused(
        "Redis: its scripts do not do what they should: is it Redis 7.0 or later, or Valkey?"
    )
