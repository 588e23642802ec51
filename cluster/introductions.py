"""Which claims about nodes are believed: those about processes that have proved where they are. Pure.

A claim from the network names a process: a name, an address, a generation and an instance. The table
(table.py) has proven processes only. A process is proven in one of two ways:

- It has answered this node at its own address. Over a connection with a proof (peer_auth.py) it therefore
  knows the secret, and is where it says.
- A proven member vouches for it: the process is in a packet that the member has signed. Without a secret
  nothing is signed, so no member vouches there, and this node asks each process itself.

    packet --> sift() --> what the core may take in --> Swim
                 |
                 +--> candidates --> next(): who is asked now --> SYNC --> an answer: proven, and taken in
                                                                      --> none: forgotten

A candidate owns no tokens, is sent nothing of a client's, is never waited for, and no other member hears of
it. Candidates are bounded in number, and few are asked at once: a packet with a thousand made-up members
costs this node a thousand dials, a few at a time, and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from cluster.member import State, Update

if TYPE_CHECKING:
    from cluster.member import Member, Packet
    from cluster.table import Table

MAX_ASKED: Final = 8  # candidates that are asked at once
# A candidate that did not answer is not asked again within this because some other node names it.
_PAUSE_S: Final = 5.0


class Candidate(NamedTuple):
    """Where a process is said to be that has not proved it."""

    name: str
    address: str


class Introductions:
    """The candidates of one node, and what its core may take in."""

    def __init__(
        self, me: str, *, may_vouch: bool, may_dial: Callable[[str], bool], max_candidates: int
    ) -> None:
        """Know no candidate yet.

        - `may_vouch`: packets are signed, so that what a member says of others is believed.
        - `may_dial` tells whether an address may be a node's.
        """
        self.failed = 0  # candidates that did not prove themselves
        self._me = me
        self._may_vouch = may_vouch
        self._may_dial = may_dial
        self._max_candidates = max_candidates
        self._waiting: OrderedDict[str, Candidate] = OrderedDict()  # by name, the next one first
        self._asked: dict[str, Candidate] = {}  # by name
        self._paused_s: dict[str, float] = {}  # by name: until when it is not asked for others' word

    def __len__(self) -> int:
        return len(self._waiting) + len(self._asked)

    def is_proven(self, table: Table, claim: Member) -> bool:
        """Tell whether a claim is about a process that is a live member, at the address it is held at."""
        held = table.get(claim.name)
        return (
            held is not None
            and not held.is_gone
            and (held.instance, held.generation, held.address)
            == (claim.instance, claim.generation, claim.address)
        )

    def sift(self, packet: Packet, table: Table, *, now: float, dialled: str | None = None) -> Packet | None:
        """Return a packet without a table, with the claims that may be believed; None: an unproven sender.

        `dialled` is the address of which the packet is the answer, if it is one. What is not believed becomes
        a candidate.
        """
        sender = packet.sender
        if sender.name == self._me:
            (sender,) = (update.member for update in self.believed((Update(sender),), table, now=now))
        elif sender.address != dialled and not self.is_proven(table, sender):
            self._offer(sender, now, is_own_word=True)
            return None
        return packet._replace(sender=sender, updates=self.believed(packet.updates, table, now=now))

    def believed(self, updates: Sequence[Update], table: Table, *, now: float) -> tuple[Update, ...]:
        """Return the claims of a proven sender that may be believed; the rest become candidates."""
        if self._may_vouch:
            return tuple(
                update
                for update in updates
                if self._may_dial(update.member.address) or update.member.name == self._me
            )
        me = table.get(self._me)
        return tuple(
            # Another process of this name would have this address, so it cannot be alive: without a proof no
            # packet may make this node give its name up (swim.py, _meet_rival).
            update._replace(member=update.member._replace(state=State.DEAD))
            if me is not None and update.member.name == self._me and update.member.instance != me.instance
            else update
            for update in updates
            if self._is_believed(update.member, table, now)
        )

    def next(self) -> list[Candidate]:
        """Return the candidates to ask now; each is asked until `done` is called with it."""
        found = []
        while self._waiting and len(self._asked) < MAX_ASKED:
            name, candidate = self._waiting.popitem(last=False)
            self._asked[name] = candidate
            found.append(candidate)
        return found

    def done(self, candidate: Candidate, *, is_proven: bool, now: float) -> None:
        """Take note of how it ended; a candidate that failed is forgotten."""
        self._asked.pop(candidate.name, None)
        if is_proven:
            return
        self.failed += 1
        if len(self._paused_s) >= self._max_candidates:
            self._paused_s.clear()
        self._paused_s[candidate.name] = now + _PAUSE_S

    def _is_believed(self, claim: Member, table: Table, now: float) -> bool:
        if claim.name == self._me or self.is_proven(table, claim):
            return True
        if not claim.is_gone:
            held = table.get(claim.name)
            # An old claim about a member is no news, and no reason to dial.
            if held is None or held.version < claim.version:
                self._offer(claim, now, is_own_word=False)
        return False

    def _offer(self, claim: Member, now: float, *, is_own_word: bool) -> None:
        """Have a process asked, unless it is or may not be; one that has called itself comes first."""
        name = claim.name
        if name in self._asked or claim.is_gone or not self._may_dial(claim.address):
            return
        if not is_own_word and (name in self._waiting or now < self._paused_s.get(name, now)):
            return
        if len(self._waiting) >= self._max_candidates:
            if not is_own_word:
                return
            self._waiting.popitem()
        self._waiting[name] = Candidate(name, claim.address)
        if is_own_word:
            self._waiting.move_to_end(name, last=False)
