"""What one node routes by: an immutable picture of the members, swapped in one reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.ring import Ring


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """The ring, and where its nodes are dialled.

    For some time after a change others may still route by `former` rings and have copies by them.
    """

    me: str
    ring: Ring
    address_by_name: Mapping[str, str]
    is_active: bool = True  # whether this node may own tokens: not while it joins
    former: tuple[Ring, ...] = ()

    @property
    def is_alone(self) -> bool:
        """Whether this node owns every token, so that nothing need be looked up."""
        return self.ring.nodes == (self.me,)

    def has_settled(self, token: str) -> bool:
        """Whether a token that this node owns was its own by all former rings as well."""
        return all(ring.owner(token) == self.me for ring in self.former)


def alone(me: str, *, is_active: bool) -> View:
    """Return the view of a node that knows no others, or none yet."""
    return View(me=me, ring=Ring([me]), address_by_name={}, is_active=is_active)
