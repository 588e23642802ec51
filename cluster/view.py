"""What one node routes by: an immutable picture of the members.

A view never changes. When the members change, gossip.py makes another view (view_change.py) and replaces one
reference. A call that holds a view therefore sees one ring from its first step to its last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.ring import Ring


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """The ring, and where its nodes are dialled.

    `former` are the rings by which other nodes may take this one for an owner still: until its present ring
    has been published long enough (`lease.py`, rule 4). None stands for the time in which it owned nothing.
    `address_by_name` has every live member besides this node, also those that own nothing yet or any more.
    `public_by_name` has where clients dial a member, this node too, if the member says so.
    """

    me: str
    ring: Ring
    address_by_name: Mapping[str, str]
    is_active: bool = True  # whether this node may own tokens: not while it joins
    former: tuple[Ring | None, ...] = ()  # the oldest first
    public_by_name: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_alone(self) -> bool:
        """Whether this node owns every token, so that no token need be looked up."""
        return self.ring.nodes == (self.me,)

    @property
    def routed(self) -> str:
        """The fingerprint of the ring by which this node owns tokens; empty: it owns nothing."""
        return self.ring.fingerprint if self.is_active and self.me in self.ring.nodes else ""

    def owns(self, token: str) -> bool:
        """Tell whether this node owns a token by its ring, and by all former ones."""
        if not self.is_active or not (self.is_alone or self.ring.owner(token) == self.me):
            return False
        return all(ring is not None and ring.owner(token) == self.me for ring in self.former)

    def may_mirror(self, token: str, owner: str) -> bool:
        """Tell whether this node may have a mirror of a token from its owner, by all rings that count.

        This node owns tokens by each of them: by one without it, nobody would tell it of writes.
        """
        return bool(self.routed) and all(
            ring is not None and self.me in ring.nodes and ring.owner(token) == owner for ring in self.former
        )


def alone(me: str, *, is_active: bool) -> View:
    """Return the view of a node that knows no other member."""
    return View(me=me, ring=Ring([me]), address_by_name={}, is_active=is_active)
