"""The members that a node knows, with what must be quick about them: counts, hashes, random picks. Pure.

Each packet carries two hashes over the table and the count of live members decides about many times. None of
that may take a walk through all members, so `put` keeps it up to date: it takes the former claim out of the
sums, and adds the new one.

Thousands of nodes in one simulation would not fit into memory with a table each. Therefore a table may stand
on a base that many tables share, and hold only what differs from it. In a daemon the base is empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from cluster.member import Member, claim_digest, name_digest

if TYPE_CHECKING:
    from random import Random

# The greatest bound that may be set: more than any cluster, less than any memory.
MAX_MEMBERS: Final = 65_536
# Random indices that `pick` tries for each member that it wants, before it looks through the whole table.
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

    def __init__(self, base: Base, *, max_members: int = MAX_MEMBERS) -> None:
        self._base = base
        self._max_members = max_members
        self._overlay: dict[str, Member] = {}
        # In the sequence of arrival, because the member at a random index must not depend on the process.
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
        """Names of the members that are dead or left, those that went first at the beginning."""
        return list(self._gone)

    def put(self, member: Member) -> bool:
        """Hold this of a member from now on; False when there is no room for one more.

        The caller has compared versions: whatever is put replaces what was held.
        """
        held = self.get(member.name)
        if held is None:
            if len(self) >= self._max_members:
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
        """Know a gone member no more. A member of the shared base stays, since other tables stand on it."""
        member = self._overlay.get(name)
        if member is None or not member.is_gone or name in self._base.member_by_name:
            return
        del self._overlay[name]
        self._added.remove(name)
        self._gone.pop(name)

    def pick(self, count: int, rng: Random, *, excluding: Sequence[str]) -> list[Member]:
        """Return up to `count` different live members at random.

        Random indices cost the same in a table of any size. A walk through the table is needed only where few
        members live among many that went.
        """
        picked: dict[str, Member] = {}
        for _ in range(count * _TRIES):
            if len(picked) == count or not len(self):
                break
            member = self.at(rng.randrange(len(self)))
            if not member.is_gone and member.name not in excluding:
                picked[member.name] = member
        if len(picked) < count and self.live <= count * _TRIES:
            # Chance alone has missed some of them.
            rest = [
                member
                for member in self
                if not member.is_gone and member.name not in excluding and member.name not in picked
            ]
            rng.shuffle(rest)
            picked.update((member.name, member) for member in rest[: count - len(picked)])
        return list(picked.values())

    def _take_out(self, held: Member) -> None:
        """Subtract a claim that is about to be replaced; `ring_hash` is left to `_count_change`."""
        self.live -= not held.is_gone
        self.members_hash ^= _live_digest(held)
        self._gone.pop(held.name, None)

    def _count_change(self, member: Member, held: Member | None) -> None:
        """Keep `ring_hash` and `changes` right, which depend on both claims.

        A suspicion, or a new incarnation alone, is no change: no new view is made for it.
        """
        was_routable = held is not None and held.is_routable
        if was_routable != member.is_routable:
            self.ring_hash ^= name_digest(member.name)
        if held is None or _visible(held) != _visible(member):
            self.changes += 1


class ProbeOrder:
    """Every index below n once a round, each round in another sequence, in constant memory.

    SWIM (section 4.3) asks for a shuffled list, so that a member is probed within 2n - 1 periods and not only
    on average. A list would take n numbers in each node. Instead, `next = (next + step) mod p` with a prime p
    >= n visits each number below p once, whatever the step. Numbers from n on are passed over; there are few.
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
            # The table may have grown or shrunk since the round began.
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


def _visible(member: Member) -> tuple[bool, bool, str, int, str]:
    # What a view is made of, and the process to which connections lead.
    return (member.is_gone, member.is_routable, member.address, member.instance, member.public)


def _live_digest(member: Member) -> int:
    return 0 if member.is_gone else claim_digest(member)


def _ring_digest(member: Member) -> int:
    return name_digest(member.name) if member.is_routable else 0
