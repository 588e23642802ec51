"""Where a call is answered, and which peers may hold copies: decisions on an immutable view. Pure.

    token owned by       | and the call came from a client | and was forwarded
    ---------------------+---------------------------------+--------------------
    this node, settled   | CACHED                          | CACHED
    this node, not yet   | UNCACHED                        | UNCACHED
    another node         | Forward(owner)                  | UNCACHED

CACHED answers through the cache. UNCACHED answers from the storage and leaves nothing in the cache, because a
write at the real owner would not reach that copy. Two nodes may disagree on the ring for a moment. A
forwarded call is never forwarded again, so a disagreement costs one hop and cannot become a loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cluster.view import View

# A key that begins so stands for a session whose token this node does not know. Any node may hold a copy of
# such a session, and finds it by that key.
_UNOWNED: Final = "\0"


@dataclass(frozen=True, slots=True)
class Local:
    """Answer here; a copy may stay in the cache only where the token is owned."""

    fill_cache: bool


@dataclass(frozen=True, slots=True)
class Forward:
    """Ask the owner."""

    owner: str


Route = Local | Forward
CACHED = Local(fill_cache=True)
UNCACHED = Local(fill_cache=False)


def route(view: View, token: str, *, hops_left: int) -> Route:
    """Return where a call for the token is answered; one that was forwarded has no hops left."""
    if not view.is_alone and (owner := view.ring.owner(token)) != view.me:
        return Forward(owner) if hops_left > 0 else UNCACHED
    if not view.is_active:
        # While it joins, this node does not know yet which nodes hold copies.
        return UNCACHED
    return CACHED if not view.former or view.has_settled(token) else UNCACHED


def peers_with_copies(view: View, tokens: Iterable[str]) -> dict[str, list[str]]:
    """Return, by peer, the tokens of which it may hold a copy: as owner by the ring, or by a former one."""
    tokens_by_peer: dict[str, list[str]] = {}
    for token in tokens:
        # A dictionary for its order: the present owner is told first.
        owners = {ring.owner(token): None for ring in (view.ring, *view.former)}
        for name in view.address_by_name if token.startswith(_UNOWNED) else owners:
            if name in view.address_by_name:
                tokens_by_peer.setdefault(name, []).append(token)
    return tokens_by_peer
