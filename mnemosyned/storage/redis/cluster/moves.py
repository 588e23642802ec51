"""Renaming in a Redis Cluster: a session moves to another bucket, and no two slots change in one step.

    bucket of the old name                bucket of the new name
      |-- depart: the session is kept aside, under its old name; nothing else sees it
      |                                     |-- arrive: it is there, unless a live session has the name
      |                                     |   that it has arrived is kept too
      |-- forget: what was kept aside       |
      |                                     |-- arrived: that may be forgotten in a minute

Each step may be done by any node, and any number of times:

- The session is gone from its old name in one step, so no two names are live together.
- A node that ends in between leaves a session that is kept aside. The next one that wants to rename it goes
  on, and so does each Delete and each cleanup, for all that they find kept aside (`finish`).
- An arrival is not repeated: a session that has arrived may have been ended since. The new bucket knows the
  move as long as the old one keeps the session aside, and for a minute after that. An arrival is refused
  when it is later than five seconds after the look at the old bucket.

Nodes that name sessions differently, as during a rolling restart, move one to and fro. Two buckets are not
looked at in one instant, and a session may be missing in both. Such a look is therefore done twice
(`are_there`). If nothing has departed from any of the names in between, there was no session by any of
them: one that was on its way would have been seen at its old bucket in one of the looks.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from aio.units import US_PER_S
from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.storage.redis import scripts
from mnemosyned.storage.redis.items import ItemPool

# The records that one look at the old names brings, at least one of each.
_PORTION_BYTES: Final = 1024**2
_LIMIT_US: Final = 5 * US_PER_S
_KEPT_MS: Final = 60_000
# As the scripts have it.
_NOT_LOOKED_AT: Final = 0
_THERE: Final = 1
_LEFT: Final = b"l"

Found = bool | MnemosyneError


class _Departed(NamedTuple):
    """A session that is kept aside."""

    old: str | bytes
    now_us: int  # on the clock of its old bucket
    new: bytes
    move: bytes  # what it is known by: random
    record: bytes


class Moves:
    """Moves sessions between buckets."""

    def __init__(self, pool: ItemPool) -> None:
        self._pool = pool
        self.has_moved = False  # set when this node renames sessions at all

    async def move(self, names: Sequence[tuple[bytes, bytes]]) -> list[Found]:
        """Give sessions the second of two names; tell of each whether there is a live one by either."""
        found: dict[int, Found] = {}
        left = list(range(len(names)))
        while left:
            departed = await self._depart([names[at] for at in left])
            looked = {at: one for at, one in zip(left, departed, strict=True) if one != _NOT_LOOKED_AT}
            moving = {at: one for at, one in looked.items() if isinstance(one, _Departed)}
            flags = dict(zip(moving, await self._arrive(list(moving.values())), strict=True))
            for at, one in looked.items():
                if isinstance(one, MnemosyneError):
                    found[at] = one
                # It may have been under way to another name.
                elif isinstance(one, _Departed) and (one.new == names[at][1] or flags[at] is not True):
                    found[at] = flags[at]
            left = [at for at in left if at not in looked]
        others = [at for at in range(len(names)) if at not in found]
        either = await self.are_there([name for at in others for name in names[at]])
        for at, by_old, by_new in zip(others, either[::2], either[1::2], strict=True):
            found[at] = by_new or by_old
        return [found[at] for at in range(len(names))]

    async def are_there(self, names: Sequence[str | bytes]) -> list[Found]:
        """Tell of each name whether it has, or during this call had, a live session."""
        found: list[Found] = [False] * len(names)
        first = await self._whereabouts(names)
        absent = [at for at, one in enumerate(first) if one != _THERE]
        second = await self._whereabouts([names[at] for at in absent])
        for at, one in enumerate(first):
            found[at] = one if isinstance(one, MnemosyneError) else one == _THERE
        for at, one in zip(absent, second, strict=True):
            if found[at] is False:
                found[at] = one if isinstance(one, MnemosyneError) else one != first[at] or one[:1] == _LEFT
        aside = [
            names[at]
            for at, one in zip(absent, second, strict=True)
            if isinstance(one, bytes) and one[:1] == _LEFT
        ]
        if aside:
            await self.finish(aside)
        return found

    async def _whereabouts(self, names: Sequence[str | bytes]) -> list[Any]:
        return await self._pool.each(scripts.WHEREABOUTS, (), [(name,) for name in names]) if names else []

    async def finish(self, names: Sequence[str | bytes]) -> None:
        """End the moves of sessions that are kept aside under these names. Raises StorageUnavailable."""
        left = list(names)
        while left:
            departed = await self._depart([(name, b"") for name in left])
            flags = await self._arrive([one for one in departed if isinstance(one, _Departed)])
            for one in (*departed, *flags):
                if isinstance(one, MnemosyneError):
                    raise one
            left = [name for name, one in zip(left, departed, strict=True) if one == _NOT_LOOKED_AT]

    async def _depart(
        self, names: Sequence[tuple[str | bytes, bytes]]
    ) -> list[_Departed | MnemosyneError | int | None]:
        items = [(old, new, secrets.token_hex(8)) for old, new in names]
        replies = await self._pool.each(scripts.DEPART, (_PORTION_BYTES,), items, is_write=True)
        return [
            _Departed(old, *reply) if isinstance(reply, list) else reply
            for (old, _), reply in zip(names, replies, strict=True)
        ]

    async def _arrive(self, moving: Sequence[_Departed]) -> list[Found]:
        """Have sessions arrive; tell of each whether there is a live one by its new name."""
        if not moving:
            return []
        items = [(one.new, one.now_us + _LIMIT_US, one.move, one.record) for one in moving]
        flags = await self._pool.each(scripts.ARRIVE, (), items, is_write=True)
        await self._forget([one for one, flag in zip(moving, flags, strict=True) if flag in {0, 1}])
        return [
            flag
            if isinstance(flag, MnemosyneError)
            else bool(flag)
            if flag >= 0
            else StorageUnavailable("mnemosyned: storage: no answer in time")
            for flag in flags
        ]

    async def _forget(self, moved: Sequence[_Departed]) -> None:
        """Forget moves that have ended; one that cannot be forgotten is ended once more, to no effect."""
        items = [(one.old, one.move) for one in moved]
        flags = await self._pool.each(scripts.FORGET, (), items, is_write=True) if items else []
        gone = [
            (one.new, one.move)
            for one, flag in zip(moved, flags, strict=True)
            if not isinstance(flag, MnemosyneError)
        ]
        if gone:
            await self._pool.each(scripts.ARRIVED, (_KEPT_MS,), gone)
