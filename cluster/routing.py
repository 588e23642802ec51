"""Where a call is answered: a decision on an immutable view. Pure.

    token owned by       | and the call came from a client | and was forwarded
    ---------------------+---------------------------------+--------------------
    this node            | CACHED                          | CACHED
    this node, not long  | UNCACHED                        | UNCACHED
    another node         | Forward(owner)                  | UNCACHED

CACHED answers through the cache, if this node's lease is valid (lease.py). UNCACHED answers from the storage
and leaves nothing in the cache, because a write at the real owner would not reach that copy. Two nodes may
disagree on the ring for a moment. A forwarded call is never forwarded again, so a disagreement costs one hop
and cannot become a loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cluster.view import View


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


@lru_cache(maxsize=1024)
def _forward(owner: str) -> Forward:
    # Making one takes half of the time that it takes to find the owner.
    return Forward(owner)


def route(view: View, token: str, *, hops_left: int) -> Route:
    """Return where a call for the token is answered; one that was forwarded has no hops left."""
    if not view.is_alone and (owner := view.ring.owner(token)) != view.me:
        return _forward(owner) if hops_left > 0 else UNCACHED
    if view.former or not view.is_active:
        return CACHED if view.owns(token) else UNCACHED
    return CACHED
