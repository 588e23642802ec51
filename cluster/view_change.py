"""How one view follows another: the ring of the members, and those that others may still use. Pure.

    members change ------------------> next_view(): new ring, and the last one joins `former`
    published, and ACTIVATION later -> settled():   `former` is empty again

In between, both the old and the new owner of a token may be asked for it. This node keeps copies only of
those that it owned all the time (view.py, `owns`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from cluster.member import Member, Phase
from cluster.ring import Ring
from cluster.view import View

# More changes at once are rare; each costs a look-up a call.
_MAX_FORMER: Final = 4


def next_view(old: View, me: Member, members: Iterable[Member]) -> View:
    """Return the view that follows `old`; `members` are all that are known, `me` and the gone among them.

    The returned view must be replaced by `settled` of itself when its ring has been published long enough.
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
        former=_former(old, ring, is_active=me.phase != Phase.JOINING),
        public_by_name={member.name: member.public for member in members if member.public},
    )


def settled(view: View) -> View:
    """Return the view for when the present ring has been published long enough."""
    return replace(view, former=())


def _former(old: View, ring: Ring, *, is_active: bool) -> tuple[Ring | None, ...]:
    """Return the rings by which this node may be taken for an owner still, or was none."""
    if ring.nodes == old.ring.nodes and is_active == old.is_active:
        return old.former
    if len(old.former) >= _MAX_FORMER:
        # As if it had owned nothing: then it keeps no copies until this has settled.
        return (None,)
    return (*old.former, old.ring if old.is_active else None)
