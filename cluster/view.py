"""What one node routes by: an immutable picture of the members.

A view never changes. When the members change, gossip.py makes another view (view_change.py) and replaces one
reference. A call that holds a view therefore sees one ring from its first step to its last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.ring import Ring


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """The ring, and where its nodes are dialled.

    Nodes learn of a change at different times. For a while after it, other nodes may still route by one of
    the `former` rings, and hold copies of sessions by them. `address_by_name` has every live member besides
    this node, also those that own nothing yet or any more: they may still hold copies.
    """

    me: str
    ring: Ring
    address_by_name: Mapping[str, str]
    is_active: bool = True  # whether this node may own tokens: not while it joins
    former: tuple[Ring, ...] = ()  # the oldest first

    @property
    def is_alone(self) -> bool:
        """Whether this node owns every token, so that no token need be looked up."""
        return self.ring.nodes == (self.me,)

    def has_settled(self, token: str) -> bool:
        """Whether a token that this node owns was its own by all former rings as well.

        If it was not, a former owner may still change the session without telling this node. A copy here
        would then be stale.
        """
        return all(ring.owner(token) == self.me for ring in self.former)


def alone(me: str, *, is_active: bool) -> View:
    """Return the view of a node that knows no other member."""
    return View(me=me, ring=Ring([me]), address_by_name={}, is_active=is_active)
