"""How one view follows another: the ring of the members, and the rings that other nodes may still use. Pure.

    members change --> next_view(): new ring, and the last one joins `former`
    SETTLE_S later --> settled():   all nodes use the new ring, so `former` is empty again

In between, both the old and the new owner of a token may be asked for it. `former` lets this node find both:
to tell them of a write (routing.py, `peers_with_copies`), and to keep no copy of a token that has just become
its own (view.py, `has_settled`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from cluster.member import Member, Phase
from cluster.ring import Ring
from cluster.view import View

# With more changes at once than that, copies of sessions are rarely where a former ring says.
_MAX_FORMER: Final = 4


def next_view(old: View, me: Member, members: Iterable[Member]) -> View:
    """Return the view that follows `old`; `members` are all that are known, `me` and the gone among them.

    The returned view must be replaced by `settled` of itself after SETTLE_S if its ring is another one.
    """
    members = list(members)
    # A node that owns nothing and knows no owner answers by itself.
    ring = Ring([member.name for member in members if member.is_routable] or [me.name])
    return View(
        me=me.name,
        ring=ring,
        address_by_name={
            member.name: member.address for member in members if not member.is_gone and member.name != me.name
        },
        is_active=me.phase != Phase.JOINING,
        former=_former(old, ring),
    )


def settled(view: View) -> View:
    """Return the view for when all nodes route by its ring."""
    return replace(view, former=())


def _former(old: View, ring: Ring) -> tuple[Ring, ...]:
    """Return the rings that other nodes may still route by when this one is the newest."""
    if ring.nodes == old.ring.nodes:
        return old.former
    peers = [name for name in ring.nodes if name != old.me]
    if not old.is_active and not peers:
        # It joined and found no other node, so no other node has a ring.
        return ()
    # Before this node joined it owned nothing, although its own view had only itself. Its peers then routed
    # by a ring of themselves.
    last = Ring(peers) if old.is_alone and not old.is_active else old.ring
    return (*old.former, last)[-_MAX_FORMER:]
