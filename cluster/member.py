"""What nodes know of one another, and the packets in which they say so: values only. Pure.

A claim about a member has a version, `(generation, incarnation, state)`, compared from left to right. Of two
claims about a member the greater version holds. Only the member itself raises its generation (its boot time
in milliseconds) and its incarnation. Other nodes can only claim a worse state for the same two. Why this
makes all nodes agree is in swim.py.

Two hashes let nodes compare what they know in 16 bytes, without sending it:

- `members_hash`, over every live member: if it is equal, a sync need not send a table.
- `ring_hash`, over the names of the members that own tokens: if it is equal, two nodes route alike.

Both are the XOR of one digest for each member. The XOR does not depend on the sequence of members, and one
changed member costs two operations, however many members there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import Enum, IntEnum
from functools import reduce
from operator import xor
from typing import Final, NamedTuple

DIGEST_BYTES: Final = 8


class State(IntEnum):
    """What other nodes hold of a member; the greater state wins within one incarnation."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class Phase(IntEnum):
    """What a member says of itself; only ACTIVE members own tokens."""

    JOINING = 0
    ACTIVE = 1
    LEAVING = 2


class Member(NamedTuple):
    """One claim about one node."""

    name: str
    address: str
    generation: int  # boot time, milliseconds since the epoch
    incarnation: int
    state: State
    phase: Phase
    instance: int  # random 63 bits of one process: tells two of the same name apart
    public: str = (
        ""  # host:port, as clients dial it; empty: not told. No part of the version: it never changes
    )

    @property
    def version(self) -> tuple[int, int, int]:
        """What makes one claim newer than another."""
        return (self.generation, self.incarnation, self.state)

    @property
    def is_routable(self) -> bool:
        """Whether it owns tokens: a suspect still does.

        A suspicion is often wrong. If the ring changed with it, the caches of two nodes would be lost for one
        slow answer. Meanwhile the breaker (breaker.py) keeps calls from waiting for the suspect.
        """
        return self.phase == Phase.ACTIVE and self.state <= State.SUSPECT

    @property
    def is_gone(self) -> bool:
        """Whether it is dead or has left."""
        return self.state >= State.DEAD

    @property
    def status(self) -> str:
        """One word for people: joining, active, leaving, suspect, dead or left."""
        return self.phase.name.lower() if self.state == State.ALIVE else self.state.name.lower()


class Update(NamedTuple):
    """A claim under way, with the member that accuses."""

    member: Member
    accuser: str = ""  # of a suspect: the first node that said so, never one that passed it on
    is_refused: bool = False  # the accuser's dial was refused: the host is up, and the process is not


class Kind(IntEnum):
    """What a packet asks or answers."""

    PING = 1
    ACK = 2
    PING_REQUEST = 3  # "ping this one for me"
    NACK = 4  # "I could not reach it either", so that the asker knows that it is not itself at fault
    GOSSIP = 5  # carries updates, asks nothing
    SYNC = 6  # "this is my hash; send me your table if yours differs"
    SYNC_REPLY = 7
    SYNC_PUSH = 8  # the asker's table, after the reply showed that it knew more


class Packet(NamedTuple):
    """One message between members; a ping, a sync and a ping request have answers."""

    kind: Kind
    sender: Member
    target: str = ""  # the member it is for; "" for any node that listens at the address
    sequence: int = 0
    subject: str = ""  # of a ping request: the member to ping
    members_hash: int = 0
    ring_hash: int = 0
    updates: tuple[Update, ...] = ()
    table: tuple[Update, ...] = ()


class Send(NamedTuple):
    """An order to the shell: put this on the wire; an answer goes to `receive`."""

    address: str
    packet: Packet


class EventKind(Enum):
    """What may happen to a member, as logs and metrics name it."""

    JOINED = "member_joined"
    ACTIVE = "member_active"
    SUSPECT = "member_suspect"
    REFUTED = "member_refuted"
    DEAD = "member_dead"
    LEAVING = "member_leaving"
    LEFT = "member_left"
    MOVED = "member_moved"
    CONFLICT = "member_conflict"


class Event(NamedTuple):
    """Something that happened to a member, and how this node knows."""

    kind: EventKind
    member: Member
    evidence: str = ""
    accuser: str = ""
    confirmations: int = 0
    seconds: float = 0.0  # of a death or a refutation: since the suspicion began


def name_digest(name: str) -> int:
    """Return 64 bits of a name, the same on every node."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=DIGEST_BYTES).digest(), "big")


def claim_digest(member: Member) -> int:
    """Return 64 bits of what all nodes must agree on about a live member; a suspect counts as alive."""
    # Without the state: while a suspicion spreads, all tables differ, and every sync would send them.
    text = f"{member.name}\n{member.address}\n{member.generation}\n{member.incarnation}\n{int(member.phase)}"
    return name_digest(text)


def names_digest(names: Iterable[str]) -> int:
    """Return 64 bits of a set of names; sets are equal if, and but for chance only if, these are."""
    return reduce(xor, map(name_digest, names), 0)
