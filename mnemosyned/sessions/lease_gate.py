"""What calls and writes ask of this node's lease."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from aio.units import NS_PER_US
from mnemosyned.sessions import token_hash
from mnemosyned.sessions.clock import uptime_ns

if TYPE_CHECKING:
    from mnemosyned.sessions.lease_keeper import LeaseKeeper


class LeaseGate:
    """Tells whether this node may serve copies: its lease, and the clock; on the path of every call."""

    __slots__ = ("_keeper", "_lease")

    def __init__(self, keeper: LeaseKeeper) -> None:
        self._keeper = keeper
        self._lease = keeper.lease

    def is_open(self) -> bool:
        """Tell it of a call that arrives now; count why not."""
        now_us = uptime_ns() // NS_PER_US
        if now_us < self._lease.until_us:
            return True
        self._keeper.counters.refused[self._lease.reason(now_us)] += 1
        return False

    def refuse_ring(self) -> None:
        """Count a call whose token has just come to this node, or is another node's by this node's ring."""
        self._keeper.counters.refused["ring"] += 1


class LeaseSettler:
    """Settles writes by a lease: the Settler of a daemon whose storage may have other nodes."""

    def __init__(self, keeper: LeaseKeeper, owns: Callable[[str], bool]) -> None:
        """`owns` tells whether this node owns a token, by all rings that count."""
        self._keeper = keeper
        self._owns = owns

    def settle(self, tokens: Sequence[str]) -> Coroutine[Any, Any, None] | None:
        """See Settler."""
        return self._keeper.settle(tokens, owns=self._owns)

    def settle_stored(self, stored_keys: Sequence[str]) -> Coroutine[Any, Any, None] | None:
        """See Settler; a hash names its owner to no node."""
        owns = None if any(map(token_hash.is_hashed, stored_keys)) else self._owns
        return self._keeper.settle(stored_keys, owns=owns)

    def settle_everything(self) -> Coroutine[Any, Any, None] | None:
        """See Settler."""
        return self._keeper.settle_everything()

    async def others_have_settled(self) -> bool:
        """See Settler."""
        return await self._keeper.others_have_settled()
