"""Where a call is answered: the one decision, on an immutable view."""

from __future__ import annotations

from dataclasses import dataclass

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
OWNED = Local(fill_cache=True)
# Out of hops, or owner since a moment ago: answer from the storage, but leave the copy to who has it.
PASSING = Local(fill_cache=False)


def route(view: View, token: str, *, hops_left: int) -> Route:
    """Return where a call for the token is answered; one that was forwarded has no hops left."""
    if not view.is_alone and (owner := view.ring.owner(token)) != view.me:
        return Forward(owner) if hops_left > 0 else PASSING
    if not view.is_active:
        # Joining, it does not know yet who holds copies.
        return PASSING
    return OWNED if not view.former or view.has_settled(token) else PASSING
