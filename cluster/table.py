"""The members that a node knows, with what must be quick about them: counts, hashes, random picks.

Thousands of nodes in one simulation would not fit in memory with a table each, so a table may stand
on a base that many share and hold only what differs from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from cluster.member import Member, claim_digest, name_digest

if TYPE_CHECKING:
    from random import Random

# Joins beyond this are not believed: more than any cluster, less than any memory.
MAX_MEMBERS: Final = 65_536
_TRIES: Final = 8


class Base:
    """A table that never changes, with its sums, for many to stand on."""

    def __init__(self, members: Sequence[Member] = ()) -> None:
        self.member_by_name: Mapping[str, Member] = {member.name: member for member in members}
        self.names = tuple(self.member_by_name)
        self.gone = tuple(member.name for member in members if member.is_gone)
        self.live = 0
        self.members_hash = 0
        self.ring_hash = 0
        for member in members:
            self.live += not member.is_gone
            self.members_hash ^= _live_digest(member)
            self.ring_hash ^= _ring_digest(member)


class Table:
    """Members by name, this node itself among them."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._overlay: dict[str, Member] = {}
        # In the order of arrival: what a random index falls on must not depend on the process.
        self._added: list[str] = []
        self._gone = dict.fromkeys(base.gone)
        self.live = base.live  # neither dead nor left, this node among them
        self.members_hash = base.members_hash  # of the live ones
        self.ring_hash = base.ring_hash  # of the names of those that own tokens
        self.changes = 0  # of what a view is made of: who is there, where, and who owns tokens

    def __len__(self) -> int:
        return len(self._base.names) + len(self._added)

    def __iter__(self) -> Iterator[Member]:
        # A copy, made in one step: another thread may look while this one changes.
        overlay = self._overlay.copy()
        for name in self._base.names:
            yield overlay.pop(name) if name in overlay else self._base.member_by_name[name]
        yield from overlay.values()

    def get(self, name: str) -> Member | None:
        """Return what is held of a member."""
        return self._overlay.get(name) or self._base.member_by_name.get(name)

    def at(self, index: int) -> Member:
        """Return a member by its place, 0 to len - 1, which it keeps until one is forgotten."""
        base_names = self._base.names
        name = base_names[index] if index < len(base_names) else self._added[index - len(base_names)]
        return self._overlay.get(name) or self._base.member_by_name[name]

    @property
    def gone(self) -> list[str]:
        """Names of the dead and the left, in the order in which they went."""
        return list(self._gone)

    def put(self, member: Member) -> bool:
        """Hold this of a member from now on; False when there is no room for one more."""
        held = self.get(member.name)
        if held is None:
            if len(self) >= MAX_MEMBERS:
                return False
            self._added.append(member.name)
        else:
            self._take_out(held)
        self._overlay[member.name] = member
        self.live += not member.is_gone
        self.members_hash ^= _live_digest(member)
        self._count_change(member, held)
        if member.is_gone:
            self._gone[member.name] = None
        return True

    def forget(self, name: str) -> None:
        """Know a gone member no more. One of the shared base stays."""
        member = self._overlay.get(name)
        if member is None or not member.is_gone or name in self._base.member_by_name:
            return
        del self._overlay[name]
        self._added.remove(name)
        self._gone.pop(name)

    def pick(self, count: int, rng: Random, *, excluding: Sequence[str]) -> list[Member]:
        """Return up to `count` different live members at random."""
        picked: dict[str, Member] = {}
        for _ in range(count * _TRIES):
            if len(picked) == count or not len(self):
                break
            member = self.at(rng.randrange(len(self)))
            if not member.is_gone and member.name not in excluding:
                picked[member.name] = member
        if len(picked) < count and self.live <= count * _TRIES:
            # Few live among many gone: chance alone may miss them.
            rest = [
                member
                for member in self
                if not member.is_gone and member.name not in excluding and member.name not in picked
            ]
            rng.shuffle(rest)
            picked.update((member.name, member) for member in rest[: count - len(picked)])
        return list(picked.values())

    def _take_out(self, held: Member) -> None:
        self.live -= not held.is_gone
        self.members_hash ^= _live_digest(held)
        self._gone.pop(held.name, None)

    def _count_change(self, member: Member, held: Member | None) -> None:
        was_routable = held is not None and held.is_routable
        if was_routable != member.is_routable:
            self.ring_hash ^= name_digest(member.name)
        if held is None or _visible(held) != _visible(member):
            self.changes += 1


class ProbeOrder:
    """Every index below n once a round, each round in another order, in constant memory.

    An affine map modulo a prime visits each residue once; the shuffled list that SWIM asks for
    would take n numbers a node. Source of the bound: SWIM, section 4.3: a member is probed
    within 2n - 1 periods.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._size = self._prime = self._step = self._next = self._left = 0

    def advance(self, size: int) -> int:
        """Return the next index below `size`; a new round begins when the last one is over."""
        if not size:
            raise ValueError("there is nothing to probe")
        while True:
            if not self._left:
                self._begin_round(size)
            self._left -= 1
            index = self._next
            self._next = (self._next + self._step) % self._prime
            if index < min(size, self._size):
                return index

    def _begin_round(self, size: int) -> None:
        if size != self._size:
            self._size = size
            self._prime = _prime_from(size)
        self._step = self._rng.randrange(1, self._prime)
        self._next = self._rng.randrange(self._prime)
        self._left = self._prime


def _prime_from(number: int) -> int:
    number = max(2, number)
    while any(number % factor == 0 for factor in range(2, int(number**0.5) + 1)):
        number += 1
    return number


def _visible(member: Member) -> tuple[bool, bool, str, int]:
    return (member.is_gone, member.is_routable, member.address, member.instance)


def _live_digest(member: Member) -> int:
    return 0 if member.is_gone else claim_digest(member)


def _ring_digest(member: Member) -> int:
    return name_digest(member.name) if member.is_routable else 0
