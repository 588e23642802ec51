"""Do the scripts that only a cluster needs do what they should on a primary? Tried at each start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mnemosyned.sessions.model import Abandonment, Criteria, NewSession
from mnemosyned.storage.redis import scripts, trial
from mnemosyned.storage.redis.cluster.moves import Moves
from mnemosyned.storage.redis.criteria import texts_of
from mnemosyned.storage.redis.items import Items
from mnemosyned.storage.redis.store import RedisStore
from mnemosyned.storage.redis.trial import OwnKeys

if TYPE_CHECKING:
    from mnemosyned.storage.redis.cluster.space_pool import SpacePool

_TTL_US: Final = 10_000_000
_TIMEOUT_S: Final = 5.0


async def run(pool: SpacePool) -> None:
    """Try all scripts on keys of one bucket that no daemon uses. Raises as `redis/trial.py` does."""
    await trial.run(pool, lambda own: RedisStore(own, timeout_s=_TIMEOUT_S))
    own = OwnKeys(pool)
    items, moves = Items(own, timeout_s=_TIMEOUT_S), Moves(own)
    await items.start([NewSession(access_token="one", subject_id="s", ttl_us=_TTL_US)])  # noqa: S106  # no secret
    counted = await own.run(scripts.COUNT, *texts_of(Criteria(subject_id="s", expires_after_us=0)), "live")
    moved = await moves.move([(b"one", b"two")])
    (record,) = await own.each(scripts.RECORDS, (0, ""), [("two",)])
    departed = await own.run(scripts.DEPARTED, 1)
    await own.run(scripts.MEET, "", "server", is_urgent=True)
    count = await own.run(scripts.BUCKETS, 1)
    ended = await items.abandon([Abandonment(access_token="two")])  # noqa: S106  # no secret
    is_as_it_should = (
        counted == [1, 0]
        and moved == ended == [True]
        and isinstance(record, bytes)
        and len(departed) == 1
        and int(count) == 1
    )
    if not is_as_it_should:
        raise trial.unexpected()
    await own.run(scripts.CLEAR, "primaries", "epoch", "buckets")
