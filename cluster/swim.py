"""Who is alive: SWIM with Lifeguard, as a state machine without I/O.

What this module decides
------------------------
Every node keeps a table of all members. This module decides what a node believes of each member, what the
node sends to find out, and when a silent member is declared dead. The shell (gossip.py) owns the clock, the
sockets and the log. Chance comes from the generator that is passed in, so that one seed decides a whole
simulated cluster.

    shell -> core   receive(packet)   a packet came in; the return value is the answer to it
                    learn(updates)    a part of a packet's table, before the packet itself
                    answer_stranger(packet)   the same for a sender that is not known to be where it says
                    tick()            a deadline of `next_deadline` has passed
                    join(addresses)   ask seeds for their tables
                    refused(name)     a dial was refused: nothing listens at that address
                    dropped(name)     a connection ended, or a call got no answer
                    stalled(lag_s)    this node's own event loop did nothing for that long
                    activate(), leave(), left()    the phases of this node itself
    core -> shell   take()            packets to send, and events to log; after each of the calls above
                    wants_seeds       look the seeds up again

States and phases
-----------------
Other nodes hold a *state* of a member; the member itself announces its *phase*.

    ALIVE   --> SUSPECT   a probe failed, or a dial was refused; or another node says so
    SUSPECT --> ALIVE     the member refuted, in a newer incarnation
    SUSPECT --> DEAD      the suspicion expired here, or at another node
    ALIVE, SUSPECT --> LEFT          the member itself says that it ends
    DEAD, LEFT --> ALIVE             a newer incarnation refutes, or the process was started again

    JOINING   the member owns no tokens yet, or none while its storage does not answer
    ACTIVE    the member is on the ring and owns tokens, also while it is SUSPECT
    LEAVING   the member owns nothing any more, and finishes its calls

Versions
--------
A claim about a member has the version (generation, incarnation, state), compared from left to right. The
generation is the boot time of the process. Of two claims about one member, a node keeps the greater version.
The maximum is associative, commutative and idempotent, so claims form a join-semilattice. Therefore loss,
repetition and reordering of packets cannot make two nodes disagree once both have seen the same claims.
Only the member itself raises its generation and incarnation. Other nodes can only claim a worse state for a
version that the member announced. A member refutes such a claim with the next incarnation.

A probe
-------
    prober              member              helper (3 at random)
      |------ PING ------->|                    |     every probe_interval_s
      |<------ ACK --------|                    |     alive: the probe ends
      |                                         |
      |----------- PING_REQUEST --------------->|     no ACK within probe_timeout_s
      |                    |<------ PING -------|
      |                    |------- ACK ------->|
      |<---------------- ACK -------------------|     alive: only the direct path is bad
      |<---------------- NACK ------------------|     the helper got no ACK either
      |
      no ACK after probe_interval_s: the member is SUSPECT

A NACK proves that the prober's own network works. Each helper that sends neither ACK nor NACK is therefore
evidence against the prober, which then worsens its own health score.

Suspicion and local health (Lifeguard)
--------------------------------------
- A suspicion starts with the longest time and gets shorter with each independent accuser (suspicion.py). A
  node whose own network is bad is alone with its accusation, so its suspicions take longest.
- The buddy rule: a PING to a suspect carries the suspicion, so that the suspect can refute it at once.
- The health score goes from 0 (healthy) to 8. It multiplies the interval and the time-outs of the node's own
  probes. It rises with missing NACKs, with suspicions of this node and with stalls of its loop. A quick ACK
  halves it, a slow one lowers it by one.

Dissemination, sync and heal
----------------------------
- Dissemination: each packet carries up to 16 updates, those that were sent least often first. An update is
  sent retransmit_factor * ceil(log10(n + 1)) times, and reaches all members with high probability.
- Sync: an exchange of whole tables, for updates that did not arrive. SYNC carries a hash. The answer
  SYNC_REPLY carries the table if the hashes differ. SYNC_PUSH brings the asker's own table if its hash
  still differs then. A sync is due on join, each sync_interval_s, and when two nodes that have nothing more
  to tell one another compute different rings.
- Heal: members of two halves of a partition hold one another DEAD, and the dead are not probed. Therefore
  some node now and then syncs with a dead member, and looks up the seeds.

Beyond the papers, and why
--------------------------
- Generations. A restarted node begins with incarnation 0, and its peers may hold its former process DEAD at
  a higher one. The greater generation wins at once, without a refutation.
- Refused connections as evidence. A host that answers a dial with a reset runs no such process. That is
  stronger evidence than silence, so refused_suspicion_s (0.5 s) replaces a suspicion of many seconds.
- Deadlines shifted by this node's own stall. A loop that did not run for two seconds has not read the answers
  that arrived meanwhile. Without the shift a stalled node would suspect every member that it had probed.
- Quick recovery of the health score. Lifeguard takes 45 s from 8 to 0, after a cause that is over.
- A death learned by sync becomes a suspicion first, so that members of a healed partition can refute it.

Invariants
----------
- The version that is held of a member never gets smaller until the member is forgotten.
- `me` is in the table, and what the table holds of this node is `me`.
- A member has a Suspicion if and only if its state in the table is SUSPECT. A state that came with the shared
  base of the table (table.py) is the exception.
- Every member that went DEAD or LEFT has an entry in `_gone_since_s` until it is forgotten.
- Every collection has a bound: a `_MAX_*` below, `max_gone`, or the bounds of Table and Dissemination.

Papers
------
- Das, Gupta, Motivala: SWIM: Scalable Weakly-consistent Infection-style Process Group Membership Protocol.
  DSN 2002.
- Dadgar, Phillips, Currey: Lifeguard: Local Health Awareness for More Accurate Failure Detection. DSN 2018.
- Shapiro, Preguiça, Baquero, Zawirski: Conflict-free Replicated Data Types. SSS 2011, for the semilattice.

Rules for editing
-----------------
- What the network sent never raises. It is a claim, and newer than what is held or not (`_consider`).
- Only `_store` writes claims into the table, and only `_forget` removes from it; `_complete` adds a public
  address to what is held. `_store` has four callers:
  `__init__`, `_believe` for claims, `_end_suspicions` for time, `_bump_incarnation` for this node.
- A claim about this node is never believed: it goes to `_refute`.
- Only `_bump_incarnation` assigns `me` after `__init__`, and thereby raises the incarnation.
- Only `_spread` puts an update into dissemination, because an update without a gossip deadline may wait long.
- Only `_emit` makes events.
- Iterate dictionaries and lists, never sets: the order of a set differs between processes, and a seed would
  no longer decide a simulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, assert_never

from cluster.dissemination import Dissemination
from cluster.member import Event, EventKind, Kind, Member, Packet, Phase, Send, State, Update
from cluster.suspicion import Suspicion
from cluster.table import MAX_MEMBERS, Base, ProbeOrder, Table
from cluster.timing import (
    GOSSIP_INTERVAL_S,
    NACK_SHARE,
    PROBE_INTERVAL_S,
    PROBE_TIMEOUT_S,
    REFUSED_SUSPICION_S,
)

if TYPE_CHECKING:
    from random import Random

# Updates in one packet: they ride along with a probe, and must not make it slow.
MAX_UPDATES: Final = 16
# Beyond these bounds a probe is not begun, and a ping request is not served: the next round comes soon.
_MAX_PROBES: Final = 64
_MAX_RELAYS: Final = 256
_MAX_RIVALS: Final = 8
# A member whose connection dropped is not probed twice within this.
_DROP_PAUSE_S: Final = 0.25
# A probe out of turn waits up to this, so that not all peers of a node that died probe it at once.
_DROP_JITTER_S: Final = 0.02
# A first gossip round waits up to this, so that one packet carries all updates of one burst.
_FIRST_GOSSIP_S: Final = 0.02
# A stall of this length counts as much against this node's own health as one missing NACK.
_LAG_PER_POINT_S: Final = 0.25
# Up to this many members, a node that leaves tells each one itself.
_DIRECT_LEAVE: Final = 32
# No member's incarnation rises by so much between two packets, and no clock is so many milliseconds off. One
# packet with a greater number would leave its member none to refute with (`wire.MAX_NUMBER`).
_MAX_JUMP: Final = 2**32
_MAX_CLOCK_JUMP_MS: Final = 2**42


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Times in seconds; the defaults are memberlist's for a LAN where it has them.

    Simulations switch single ideas off to compare: see the comments of the fields.
    """

    probe_interval_s: float = PROBE_INTERVAL_S
    probe_timeout_s: float = PROBE_TIMEOUT_S
    indirect_probes: int = 3  # helpers that are asked to ping a silent member
    suspicion_factor: float = 4.0  # times log10 of the members, at least 1, times the probe interval
    suspicion_max_factor: float = 6.0  # 1: a fixed suspicion, as in SWIM without Lifeguard
    confirmations: int = 2  # independent accusers, besides the first, that bring a suspicion to its minimum
    refused_suspicion_s: float = REFUSED_SUSPICION_S
    max_health_score: int = 8  # 0: no local health, as in plain SWIM
    has_buddy_rule: bool = True
    early_probes: float = 6.0  # how many members probe a suspect they hear of, on average
    gossip_interval_s: float = GOSSIP_INTERVAL_S
    gossip_fanout: int = 3  # members that one gossip round goes to
    retransmit_factor: int = 4
    gossip_to_dead_s: float = 30.0  # a member that was declared dead by mistake hears of it for this long
    sync_interval_s: float = 10.0  # inf: never, as in SWIM
    mismatch_pause_s: float = 1.0  # between two syncs that differing rings cause
    heal_interval_s: float = 15.0
    forget_dead_s: float = 24 * 3600.0  # a partition that lasts longer heals by the seeds alone
    forget_left_s: float = 3600.0  # by then no old claim about it is under way
    max_members: int = MAX_MEMBERS  # joins beyond this are not believed
    max_gone: int = 1024  # members that went, the oldest forgotten first
    stabilise_s: float = 0.3  # from the first answer of a member until this node owns tokens


@dataclass(slots=True)
class _Probe:
    """One ping under way, by its sequence number in `_probes`."""

    target: str
    began_s: float
    indirect_s: float  # when helpers are asked
    ends_s: float  # when the target is suspected
    is_indirect: bool = False  # helpers were asked
    nacks_due: int = 0  # helpers that were asked and have sent no NACK


@dataclass(slots=True)
class _Relay:
    """One ping on behalf of another member, by this node's own sequence number in `_relays`."""

    asker: Member
    sequence: int  # the asker's
    nack_s: float  # when the asker gets a NACK
    ends_s: float  # after this an ACK comes too late for the asker


@dataclass(slots=True)
class Counters:
    """What has happened so far; the shell shows it."""

    probes_acked: int = 0
    probes_failed: int = 0
    suspicions: int = 0
    false_suspicions: int = 0  # refuted by the suspect
    deaths: int = 0
    syncs: int = 0
    stalls: int = 0


class Swim:
    """One node's part in the membership protocol. All times are seconds on one monotonic clock.

    The public methods come first, in the order of a node's life. Then follow packets (`_packet` to
    `_compare_rings`), claims (`_consider` to `_bump_incarnation`), probes (`_probe_next` to
    `_end_suspicions`), local health, and what is sent at intervals (`_gossip` to `_forget`).
    """

    def __init__(
        self, me: Member, *, settings: Settings, rng: Random, now: float, base: Base | None = None
    ) -> None:
        self.me = me
        self.settings = settings
        self.health_score = 0
        self.counters = Counters()
        self.table = Table(base or Base(), max_members=settings.max_members)
        self.wants_seeds = False  # the shell looks the seeds up again, and resets this
        self._rng = rng
        self._updates = Dissemination(self._is_current)
        self._suspicions: dict[str, Suspicion] = {}  # by the suspect's name
        self._probes: dict[int, _Probe] = {}  # by sequence number
        self._relays: dict[int, _Relay] = {}  # by sequence number
        self._gone_since_s: dict[str, float] = {}  # by name, in the order in which they went
        self._drops_s: dict[str, float] = {}  # by name: until when a drop causes no other probe
        self._early_s: dict[str, float] = {}  # by name: when to probe out of turn
        self._rivals: dict[int, int] = {}  # by instance: how often a process of this node's name was met
        self._order = ProbeOrder(rng)
        self._sequence = 0  # of probes and relays together, so that an ACK belongs to one of them
        self._outputs: list[Send] = []
        self._events: list[Event] = []
        # Deadlines; inf: not due. The first ones are random, so that nodes that start together spread out.
        self._probe_s = now + rng.random() * settings.probe_interval_s
        self._gossip_s = math.inf
        self._sync_s = now + rng.random() * settings.sync_interval_s
        self._heal_s = now + rng.random() * settings.heal_interval_s
        self._mismatch_sync_s = -math.inf  # until when differing rings cause no other sync
        self._active_s = math.inf
        self._is_away = False  # it has withdrawn, and a member that it meets is no reason to come back
        self._store(me, now)

    def take(self) -> tuple[list[Send], list[Event]]:
        """Return what has to be sent and what has happened since the last call."""
        outputs, self._outputs = self._outputs, []
        events, self._events = self._events, []
        return outputs, events

    def next_deadline(self) -> float:
        """Return when `tick` is due."""
        due = min(self._probe_s, self._gossip_s, self._sync_s, self._heal_s, self._active_s)
        for probe in self._probes.values():
            due = min(due, probe.ends_s if probe.is_indirect else probe.indirect_s)
        for relay in self._relays.values():
            due = min(due, relay.nack_s)
        for suspicion in self._suspicions.values():
            due = min(due, suspicion.deadline_s)
        for early_s in self._early_s.values():
            due = min(due, early_s)
        return due

    def join(self, addresses: Sequence[str]) -> None:
        """Ask the nodes at these addresses for their tables; their names are not known yet."""
        for address in addresses:
            self._send(address, Kind.SYNC, target="")

    def sync_with(self, address: str, name: str) -> Send:
        """Return a question for the table of the process of this name, which need not be a member yet."""
        return Send(address, self._packet(Kind.SYNC, name))

    def activate(self, *, now: float) -> None:
        """Own tokens from now on.

        The shell calls this when no seed answers. Otherwise `tick` does, `stabilise_s` after the first
        contact with a member: by then this node knows the members, and they know this node.
        """
        self._active_s = math.inf
        self._is_away = False
        if self.me.phase == Phase.JOINING:
            self._bump_incarnation(self.me._replace(phase=Phase.ACTIVE), now)

    def withdraw(self, *, now: float) -> None:
        """Own nothing until `activate`, as while it joined; say so to the members at once."""
        self._active_s = math.inf
        self._is_away = True
        if self.me.phase == Phase.ACTIVE:
            self._bump_incarnation(self.me._replace(phase=Phase.JOINING), now)
            self._send_directly()

    def leave(self, *, now: float) -> None:
        """Own nothing from now on but go on answering; say so to the members at once."""
        # A node that is told to stop while it joins must not own tokens afterwards.
        self._active_s = math.inf
        if self.me.phase != Phase.LEAVING:
            self._bump_incarnation(self.me._replace(phase=Phase.LEAVING), now)
            self._send_directly()

    def left(self, *, now: float) -> None:
        """Say that this node is gone for good: the process is about to end."""
        if self.me.state != State.LEFT:
            self._bump_incarnation(self.me._replace(state=State.LEFT), now)
            self._send_directly()

    def receive(self, packet: Packet, *, now: float) -> Packet | None:
        """Take a packet in; return the answer to it, if it asks for one.

        Claims are considered before the answer is made, so that the answer already says what they changed: a
        suspect that is pinged with its own suspicion refutes it in the ACK.
        """
        sender = packet.sender
        if sender.name == self.me.name:
            # This node asked itself, by a seed that leads back here; or a second process has its name.
            if sender.instance != self.me.instance:
                self._refute(Update(sender), now)
            return None
        if packet.target not in ("", self.me.name):
            # Another node had this address before. An answer would keep that node alive.
            return None
        self._consider(Update(sender), now)
        for update in packet.updates[:MAX_UPDATES]:
            self._consider(update, now)
        for update in packet.table:
            self._consider(update, now, is_sync=True)
        answer = self._answer(packet, now)
        self._compare_rings(packet, now)
        return answer

    def learn(self, updates: Sequence[Update], *, now: float) -> None:
        """Consider a part of the table that the next packet to `receive` comes with, for it may be long."""
        for update in updates:
            self._consider(update, now, is_sync=True)

    def answer_stranger(self, packet: Packet, *, now: float) -> Packet | None:
        """Answer a sender that has not proved where it is, and believe nothing of the packet.

        A node that joins needs the table to find the members, and these must be able to find it.
        """
        if packet.sender.name == self.me.name or packet.target not in ("", self.me.name):
            return None
        match packet.kind:
            case Kind.PING:
                return self._packet(Kind.ACK, packet.sender.name, sequence=packet.sequence)
            case Kind.SYNC:
                self._prepare_to_own(now)
                is_same = packet.members_hash == self.table.members_hash
                table = () if is_same else self._whole_table()
                return self._packet(Kind.SYNC_REPLY, packet.sender.name, table=table)
            case _:
                return None

    def refused(self, name: str, *, now: float) -> None:
        """Take note that the member's host refused a connection: nothing listens there.

        A leaving member closes its port before it says that it has left; that is no failure.
        """
        held = self.table.get(name)
        if held is None or held.is_gone or held.phase == Phase.LEAVING or name == self.me.name:
            return
        suspect = held._replace(state=State.SUSPECT)
        self._consider(Update(suspect, accuser=self.me.name, is_refused=True), now)

    def dropped(self, name: str, *, now: float) -> None:
        """Take note that a connection to the member ended or a call timed out: it is probed soon.

        That alone accuses no one. A connection ends for many reasons, and a probe finds out.
        """
        held = self.table.get(name)
        if held is None or held.is_gone or now < self._drops_s.get(name, -math.inf):
            return
        if len(self._drops_s) >= _MAX_RELAYS:
            # Forgetting a pause costs at most one more probe.
            self._drops_s.clear()
        self._drops_s[name] = now + _DROP_PAUSE_S
        # Every peer of a node that dies sees its connection end at the same moment.
        self._early_s[name] = now + self._rng.random() * _DROP_JITTER_S

    def stalled(self, lag_s: float) -> None:
        """Move every open deadline by the time in which this node's own loop did not run.

        The answers may wait unread in the socket. A node cannot use its own stall as evidence against its
        members. The stall does count against the node itself.
        """
        self.counters.stalls += 1
        self._worsen(math.ceil(lag_s / _LAG_PER_POINT_S))
        for probe in self._probes.values():
            probe.indirect_s += lag_s
            probe.ends_s += lag_s
        for relay in self._relays.values():
            relay.nack_s += lag_s
            relay.ends_s += lag_s
        for suspicion in self._suspicions.values():
            suspicion.shift(lag_s)

    def tick(self, *, now: float) -> None:
        """Do what is due.

        What ends comes before what begins: a probe that has failed makes room for the next one.
        """
        self._end_probes(now)
        self._end_relays(now)
        self._end_suspicions(now)
        self._probe_early(now)
        if now >= self._active_s:
            self.activate(now=now)
        if now >= self._probe_s:
            # From now, not from the deadline: a node that is late does not catch up with a burst.
            self._probe_s = now + self.settings.probe_interval_s * (self.health_score + 1)
            self._probe_next(now)
        if now >= self._gossip_s:
            self._gossip(now)
        if now >= self._sync_s:
            self._sync_s = now + self.settings.sync_interval_s
            self._sync_with_one()
        if now >= self._heal_s:
            self._heal_s = now + self.settings.heal_interval_s
            self._heal(now)

    def _packet(  # a packet's parts
        self,
        kind: Kind,
        target: str,
        *,
        sequence: int = 0,
        subject: str = "",
        table: tuple[Update, ...] = (),
    ) -> Packet:
        """Make a packet with as many updates as fit. Each call counts those updates as sent."""
        first = self._about_target(target)
        updates = self._updates.take(MAX_UPDATES - len(first), max_sends=self._max_sends())
        return Packet(
            kind=kind,
            sender=self.me,
            target=target,
            sequence=sequence,
            subject=subject,
            members_hash=self.table.members_hash,
            ring_hash=self.table.ring_hash,
            updates=(*first, *updates),
            table=table,
        )

    def _send(self, address: str, kind: Kind, *, target: str, sequence: int = 0, subject: str = "") -> None:
        packet = self._packet(kind, target, sequence=sequence, subject=subject)
        self._outputs.append(Send(address, packet))

    def _about_target(self, target: str) -> tuple[Update, ...]:
        """Return what the target must hear first: that it is suspected or held dead.

        This is Lifeguard's buddy rule. Without it a suspect hears of its suspicion by chance, in a packet of
        some third member, perhaps too late to refute it.
        """
        held = self.table.get(target)
        if held is None or held.state == State.ALIVE:
            return ()
        if held.state == State.SUSPECT and not self.settings.has_buddy_rule:
            return ()
        return (Update(held, accuser=self.me.name if held.state == State.SUSPECT else ""),)

    def _max_sends(self) -> int:
        """Return how often one update is sent: λ·log n, from SWIM, section 4.1."""
        return self.settings.retransmit_factor * math.ceil(math.log10(self.table.live + 1))

    def _is_current(self, update: Update) -> bool:
        """Tell whether an update still says what this node believes; dissemination drops the rest."""
        held = self.table.get(update.member.name)
        return held is not None and held.version == update.member.version

    def _answer(self, packet: Packet, now: float) -> Packet | None:
        """Do what the packet's kind asks for, after its claims were considered."""
        sender = packet.sender
        match packet.kind:
            case Kind.PING:
                return self._packet(Kind.ACK, sender.name, sequence=packet.sequence)
            case Kind.ACK:
                self._acked(packet, now)
            case Kind.NACK:
                self._nacked(packet)
            case Kind.PING_REQUEST:
                self._relay(packet, now)
            case Kind.SYNC:
                # To be asked is contact, too: two nodes that start together may each be the other's seed.
                self._prepare_to_own(now)
                is_same = packet.members_hash == self.table.members_hash
                table = () if is_same else self._whole_table()
                return self._packet(Kind.SYNC_REPLY, sender.name, table=table)
            case Kind.SYNC_REPLY:
                self._synced(packet, now)
            case Kind.GOSSIP | Kind.SYNC_PUSH:
                # Their updates and their table were all that they had to say.
                pass
            case never:
                assert_never(never)
        return None

    def _whole_table(self) -> tuple[Update, ...]:
        # Without accusers, because a table proves nothing: it must not confirm a suspicion.
        return tuple(Update(member) for member in self.table)

    def _synced(self, packet: Packet, now: float) -> None:
        """End a sync that this node began; the reply's table has been considered already."""
        self.counters.syncs += 1
        self._prepare_to_own(now)
        if packet.members_hash != self.table.members_hash:
            # This node now knows all that the sender knows, so the rest of the difference is news to the
            # sender.
            sender = packet.sender
            push = self._packet(Kind.SYNC_PUSH, sender.name, table=self._whole_table())
            self._outputs.append(Send(sender.address, push))

    def _prepare_to_own(self, now: float) -> None:
        """Own tokens soon: a member has been found, or has found this node.

        Not at once, because a node that owns tokens before it knows all members would route by another ring
        than they do.
        """
        if self.me.phase == Phase.JOINING and self._active_s == math.inf and not self._is_away:
            self._active_s = now + self.settings.stabilise_s

    def _compare_rings(self, packet: Packet, now: float) -> None:
        """Sync with a member that routes by another ring than this node, though neither has news to tell.

        While updates are under way rings differ as a matter of course. If they differ when updates have run
        out on both sides, an update was lost. Calls for some tokens then go to the wrong node, so this does
        not wait for the next periodic sync.
        """
        if (
            packet.ring_hash == self.table.ring_hash
            or self._updates
            or packet.updates
            or now < self._mismatch_sync_s
            or self.settings.sync_interval_s == math.inf
        ):
            return
        self._mismatch_sync_s = now + self.settings.mismatch_pause_s
        self._send(packet.sender.address, Kind.SYNC, target=packet.sender.name)

    def _consider(self, update: Update, now: float, *, is_sync: bool = False) -> None:
        """Believe a claim that is newer than what is held.

        Every claim from the network comes through here: the sender of a packet, its updates, its table.

        - About this node itself: `_refute`.
        - Older than what is held, or the same: ignored, but an accusation of a suspect may confirm it.
        - A death of a member that lives by this node's table, learned by sync: a suspicion instead.
        - Newer: `_believe`.
        """
        claim = update.member
        if claim.name == self.me.name:
            self._refute(update, now)
            return
        held = self.table.get(claim.name)
        if held is not None and _is_out_of_bounds(claim, held):
            return
        if held is not None and held.public != claim.public and held.instance == claim.instance:
            update, held = self._complete(update, held)
            claim = update.member
        if held is not None and claim.version <= held.version:
            if held.state == State.SUSPECT and claim.version == held.version and update.accuser:
                self._confirm(update, now)
            return
        if is_sync and claim.state == State.DEAD and held is not None and not held.is_gone:
            # A partition has healed, perhaps. Each half holds the other half dead. If the tables were
            # believed as they are, every node would declare half of a healthy cluster dead.
            update = Update(claim._replace(state=State.SUSPECT), accuser=self.me.name)
            if update.member.version <= held.version:
                # It is a suspect here already.
                return
        self._believe(update, held, now)

    def _complete(self, update: Update, held: Member) -> tuple[Update, Member]:
        """Return a claim and what is held of the same process, both with the process's public address.

        A node of a release before the field passes claims on without it. The process itself says it in every
        packet that it sends, so each member hears it when it probes the process or is probed.
        """
        if held.public:
            return update._replace(member=update.member._replace(public=held.public)), held
        held = held._replace(public=update.member.public)
        self.table.put(held)
        return update, held

    def _believe(self, update: Update, held: Member | None, now: float) -> None:
        """Replace what was held of a member by a newer claim, pass the claim on, and make its event."""
        claim = update.member
        # Before `_store`, which ends it: the event says how long the suspicion took.
        suspicion = self._suspicions.get(claim.name)
        if not self._store(claim, now):
            # The table is full.
            return
        if held is None and claim.is_gone:
            # Remembered, so that older claims cannot revive it. It was gone before this node came, so it is
            # neither an event nor news: an update about each former member would travel for each newcomer.
            return
        self._spread(update, now)
        if claim.state == State.SUSPECT:
            self._suspect(update, now)
        self._emit_change(claim, held, suspicion, now)

    def _store(self, claim: Member, now: float) -> bool:
        """Write a claim into the table, and end what belonged to the former state.

        Returns False when the table has no room for another member.
        """
        if len(self.table) >= self.settings.max_members and self.table.get(claim.name) is None:
            # A member that lives is worth more than the memory of one that went.
            for name in list(self._gone_since_s)[:1]:
                self._forget(name)
        if not self.table.put(claim):
            return False
        if claim.state != State.SUSPECT:
            self._suspicions.pop(claim.name, None)
            self._early_s.pop(claim.name, None)
        if claim.is_gone:
            # Keep the first instant: DEAD and then LEFT is one departure, and is forgotten as one.
            self._gone_since_s.setdefault(claim.name, now)
            self._drops_s.pop(claim.name, None)
        else:
            self._gone_since_s.pop(claim.name, None)
        return True

    def _emit_change(
        self, claim: Member, held: Member | None, suspicion: Suspicion | None, now: float
    ) -> None:
        """Make the event of a claim that was believed; `held` and `suspicion` are from before it.

        A suspicion makes its event in `_suspect`, because the event names the accuser.
        """
        seconds = now - suspicion.began_s if suspicion is not None else 0.0
        match claim.state:
            case State.DEAD:
                self.counters.deaths += 1
                self._emit(EventKind.DEAD, claim, "heard", seconds=seconds)
            case State.LEFT:
                self._emit(EventKind.LEFT, claim)
            case State.ALIVE:
                self._emit_life_change(claim, held, seconds)
            case State.SUSPECT:
                pass
            case never:
                assert_never(never)

    def _emit_life_change(self, claim: Member, held: Member | None, seconds: float) -> None:
        """Make the events of a member that is ALIVE: it joined, refuted, moved or changed its phase.

        Several may be true at once: a node that restarts with a new address joins, moves and is active.
        """
        # A new process has begun with JOINING, even if this node hears of it only when it is ACTIVE.
        phase = Phase.JOINING
        if held is None or held.is_gone or held.generation < claim.generation:
            self._emit(EventKind.JOINED, claim)
        else:
            phase = held.phase
            if held.state == State.SUSPECT:
                self.counters.false_suspicions += 1
                self._emit(EventKind.REFUTED, claim, seconds=seconds)
        if held is not None and held.address != claim.address:
            self._emit(EventKind.MOVED, claim)
        if claim.phase != phase:
            self._emit(EventKind.ACTIVE if claim.phase == Phase.ACTIVE else EventKind.LEAVING, claim)

    def _emit(
        self,
        kind: EventKind,
        member: Member,
        evidence: str = "",
        *,
        accuser: str = "",
        confirmations: int = 0,
        seconds: float = 0.0,
    ) -> None:
        self._events.append(Event(kind, member, evidence, accuser, confirmations, seconds))

    def _spread(self, update: Update, now: float) -> None:
        """Tell the members about an update, beginning with a gossip round that is due soon."""
        self._updates.put(update)
        if self._gossip_s == math.inf:
            self._gossip_s = now + self._rng.random() * _FIRST_GOSSIP_S

    def _suspect(self, update: Update, now: float) -> None:
        """Open the suspicion of a member that was not suspected in this version."""
        member = update.member
        # Besides this node and the suspect. Where too few can confirm, a suspicion has one fixed time.
        witnesses = self.table.live - 2
        settings = self.settings
        confirmations = settings.confirmations if witnesses >= settings.confirmations else 0
        min_s = settings.suspicion_factor * max(1.0, math.log10(self.table.live)) * settings.probe_interval_s
        suspicion = Suspicion(
            now=now,
            min_s=min_s,
            max_s=min_s * settings.suspicion_max_factor,
            confirmations=confirmations,
            refused_s=settings.refused_suspicion_s,
            # One refused dial may be a fault of this node's own network, so a second node must confirm it.
            # With up to three members there is at most one witness, and one dial must do.
            refusals_needed=1 if self.table.live <= 3 else 2,  # noqa: PLR2004  # at most one witness
        )
        self._suspicions[member.name] = suspicion
        accuser = update.accuser or self.me.name
        suspicion.accuse(accuser, is_refused=update.is_refused, now=now)
        self.counters.suspicions += 1
        evidence = "refused" if update.is_refused else "silent"
        self._emit(EventKind.SUSPECT, member, evidence, accuser=accuser)
        if accuser != self.me.name and self._rng.random() * self.table.live < settings.early_probes:
            # A second opinion now, not when the suspect's turn comes. All members hear of the suspicion, and
            # only early_probes of them, on average, probe it: more would be a flood of pings.
            self._early_s[member.name] = now + self._rng.random() * _DROP_JITTER_S

    def _confirm(self, update: Update, now: float) -> None:
        """Count another accuser of a suspect; pass the accusation on if it shortens the suspicion."""
        suspicion = self._suspicions.get(update.member.name)
        if suspicion is not None and suspicion.accuse(update.accuser, is_refused=update.is_refused, now=now):
            self._spread(update, now)

    def _refute(self, update: Update, now: float) -> None:
        """Answer a claim about this node itself, by a version above it where that is needed.

        - Of another process with this node's name, and not older than this one: `_meet_rival`.
        - Of an older process: this node's generation is greater, and wins without a word.
        - SUSPECT, DEAD or LEFT at this node's incarnation or above: raise the incarnation.
        - ALIVE at an incarnation above this node's: raise the incarnation. This process said so and no longer
          knows it, for example because its machine went back to a snapshot.
        """
        claim, me = update.member, self.me
        if me.state == State.LEFT:
            # The process ends. A refutation would bring it back into the tables.
            return
        if _is_out_of_bounds(claim, me):
            return
        if claim.instance != me.instance and claim.generation >= me.generation:
            self._meet_rival(claim, now)
        elif claim.generation == me.generation and claim.state != State.ALIVE:
            if claim.incarnation >= me.incarnation:
                self._worsen(1)
                # A node that still receives packets may be healthy again. Its next probe, which tells, is not
                # put off by the worse score.
                self._probe_s = min(self._probe_s, now + self.settings.probe_interval_s)
                self._bump_incarnation(me, now, above=claim.incarnation)
        elif claim.generation == me.generation and claim.incarnation > me.incarnation:
            self._bump_incarnation(me, now, above=claim.incarnation)

    def _meet_rival(self, claim: Member, now: float) -> None:
        """Get above a claim about another process of this node's name.

        - As a rule that is this node's former process, and the clock went back in between. A generation above
          it ends the matter, because a process that is gone does not answer.
        - If the same instance is met again, and ALIVE, then two live processes have one name. Each would
          raise its generation above the other without end. The greater instance keeps the name, and the other
          process leaves.
        """
        if len(self._rivals) >= _MAX_RIVALS:
            # At worst a live rival is taken for a former process once more.
            self._rivals.clear()
        met = self._rivals.get(claim.instance, 0)
        self._rivals[claim.instance] = met + 1
        if met and claim.state == State.ALIVE and claim.instance > self.me.instance:
            self._emit(EventKind.CONFLICT, claim, "another live node has this node's name")
            self.leave(now=now)
            return
        self._bump_incarnation(self.me._replace(generation=claim.generation + 1), now)

    def _bump_incarnation(self, me: Member, now: float, *, above: int = 0) -> None:
        """Announce `me` as this node's state, in an incarnation above its own and above `above`."""
        self.me = me._replace(incarnation=max(me.incarnation, above) + 1)
        self._store(self.me, now)
        if self.me.state != State.LEFT:
            # A node that has left says so as the sender of its last packets. It does not live to see a round
            # of gossip.
            self._spread(Update(self.me), now)

    def _probe_next(self, now: float) -> None:
        """Probe the next member in this round's order; the gone are passed over."""
        for _ in range(len(self.table) + 1):
            member = self.table.at(self._order.advance(len(self.table)))
            if not member.is_gone and member.name != self.me.name:
                self._probe(member, now)
                return

    def _probe(self, member: Member, now: float) -> None:
        """Begin to probe a member, unless a probe of it is under way."""
        if len(self._probes) >= _MAX_PROBES or any(
            probe.target == member.name for probe in self._probes.values()
        ):
            return
        # A node that doubts itself waits longer before it accuses a member.
        scale = self.health_score + 1
        settings = self.settings
        self._sequence += 1
        self._probes[self._sequence] = _Probe(
            member.name,
            now,
            now + settings.probe_timeout_s * scale,
            now + settings.probe_interval_s * scale,
        )
        self._send(member.address, Kind.PING, target=member.name, sequence=self._sequence)

    def _probe_early(self, now: float) -> None:
        """Probe, out of turn, the members of which there was a sign: a dropped connection, an accusation."""
        for name in [name for name, due_s in self._early_s.items() if now >= due_s]:
            del self._early_s[name]
            member = self.table.get(name)
            if member is not None and not member.is_gone:
                self._probe(member, now)

    def _acked(self, packet: Packet, now: float) -> None:
        """Take an ACK in; one that comes too late finds neither a relay nor a probe.

        The ACK need not come from the target itself: a helper passes on the ACK that it got.
        """
        relay = self._relays.pop(packet.sequence, None)
        if relay is not None:
            if now < relay.ends_s:
                self._send(relay.asker.address, Kind.ACK, target=relay.asker.name, sequence=relay.sequence)
            return
        probe = self._probes.pop(packet.sequence, None)
        if probe is not None:
            self.counters.probes_acked += 1
            self._recover(now - probe.began_s, now)

    def _nacked(self, packet: Packet) -> None:
        """Take note that a helper answers: the silence is not this node's own fault."""
        probe = self._probes.get(packet.sequence)
        if probe is not None:
            probe.nacks_due = max(0, probe.nacks_due - 1)

    def _end_probes(self, now: float) -> None:
        """Move each probe on whose time is over: from direct to indirect, or to its failure."""
        for sequence, probe in list(self._probes.items()):
            if now >= probe.ends_s:
                del self._probes[sequence]
                self._probe_failed(probe, now)
            elif now >= probe.indirect_s and not probe.is_indirect:
                probe.is_indirect = True
                self._ask_helpers(sequence, probe)

    def _ask_helpers(self, sequence: int, probe: _Probe) -> None:
        """Have some members ping the target: perhaps only the network between it and this node fails."""
        helpers = self.table.pick(
            self.settings.indirect_probes, self._rng, excluding=(self.me.name, probe.target)
        )
        for helper in helpers:
            self._send(
                helper.address,
                Kind.PING_REQUEST,
                target=helper.name,
                sequence=sequence,
                subject=probe.target,
            )
        probe.nacks_due = len(helpers)

    def _probe_failed(self, probe: _Probe, now: float) -> None:
        """Accuse the target; an accusation of a suspect confirms the suspicion."""
        self.counters.probes_failed += 1
        # Helpers that could not reach it sent a NACK. Helpers that sent nothing make this node doubt itself.
        self._worsen(probe.nacks_due)
        member = self.table.get(probe.target)
        if member is None or member.is_gone:
            return
        update = Update(member._replace(state=State.SUSPECT), accuser=self.me.name)
        self._consider(update, now)

    def _relay(self, packet: Packet, now: float) -> None:
        """Ping a member on behalf of the sender.

        A subject that this node does not know gets no ping, and the sender gets no NACK. The sender then
        doubts itself, and rightly: it knows a member that this node has not heard of.
        """
        subject = self.table.get(packet.subject)
        if subject is None or len(self._relays) >= _MAX_RELAYS:
            return
        self._sequence += 1
        timeout_s = self.settings.probe_timeout_s
        self._relays[self._sequence] = _Relay(
            packet.sender, packet.sequence, now + timeout_s * NACK_SHARE, now + timeout_s
        )
        self._send(subject.address, Kind.PING, target=subject.name, sequence=self._sequence)

    def _end_relays(self, now: float) -> None:
        """Send a NACK to each asker whose subject has not answered in time."""
        for sequence, relay in list(self._relays.items()):
            if now >= relay.nack_s:
                del self._relays[sequence]
                if self.settings.max_health_score:
                    # Plain SWIM, without local health, has no NACK.
                    self._send(
                        relay.asker.address, Kind.NACK, target=relay.asker.name, sequence=relay.sequence
                    )

    def _end_suspicions(self, now: float) -> None:
        """Declare each suspect dead that has not refuted in time.

        Every node decides for itself. A node whose deadline comes first passes its decision on, and the rest
        believe it.
        """
        for name, suspicion in list(self._suspicions.items()):
            if now < suspicion.deadline_s:
                continue
            member = self.table.get(name)
            # `_store` ends the suspicion of a member that is no suspect, and only the gone are forgotten.
            assert member is not None
            dead = member._replace(state=State.DEAD)
            self._store(dead, now)
            self._spread(Update(dead), now)
            self.counters.deaths += 1
            self._emit(
                EventKind.DEAD,
                dead,
                "refused" if suspicion.is_refused else "silent",
                confirmations=suspicion.confirmations,
                seconds=now - suspicion.began_s,
            )

    def _recover(self, took_s: float, now: float) -> None:
        """Better this node's health score after an ACK, and bring the next probe forward to match."""
        if took_s < self.settings.probe_timeout_s:
            # As quick as a healthy node's: what was wrong is over. Lifeguard lowers the score by one for each
            # ACK, at intervals of 9, 8, 7 … s: 45 s from 8 to 0.
            self.health_score //= 2
        else:
            self.health_score -= self.health_score > 0
        self._probe_s = min(self._probe_s, now + self.settings.probe_interval_s * (self.health_score + 1))

    def _worsen(self, points: int) -> None:
        """Take evidence against this node itself: its loop or its network is slow."""
        self.health_score = min(self.settings.max_health_score, self.health_score + points)

    def _gossip(self, now: float) -> None:
        """Send updates to some members at random, and to one that went lately.

        A member that was declared dead by mistake gets no probes, so it would never learn that it has to
        refute. With nothing to tell there is no round, and an idle cluster sends probes only.
        """
        receivers = self.table.pick(self.settings.gossip_fanout, self._rng, excluding=(self.me.name,))
        recent = [
            name
            for name, since_s in self._gone_since_s.items()
            if now - since_s < self.settings.gossip_to_dead_s
        ]
        if recent:
            gone = self._dead(self._rng.choice(recent))
            if gone is not None:
                receivers.append(gone)
        for member in receivers:
            # A packet may have taken the last update.
            if self._updates:
                self._send(member.address, Kind.GOSSIP, target=member.name)
        self._gossip_s = now + self.settings.gossip_interval_s if self._updates and receivers else math.inf

    def _send_directly(self) -> None:
        """Send this node's own state to every member where that is cheap, else to some.

        A node that leaves may end before a gossip round. In a large cluster the receivers pass it on.
        """
        members = self.table.live - (not self.me.is_gone)
        count = members if members <= _DIRECT_LEAVE else self.settings.gossip_fanout
        for member in self.table.pick(count, self._rng, excluding=(self.me.name,)):
            self._send(member.address, Kind.GOSSIP, target=member.name)

    def _sync_with_one(self) -> None:
        """Compare tables with a random member: this mends what dissemination lost."""
        for member in self.table.pick(1, self._rng, excluding=(self.me.name,)):
            self._send(member.address, Kind.SYNC, target=member.name)

    def _heal(self, now: float) -> None:
        """Look for members that a partition took away, and have the shell ask the seeds.

        A SYNC to a dead member that answers begins a sync of both halves. Its target is empty because another
        process may have that address now.
        """
        self._forget_old(now)
        # Three members of the cluster, on average, do so in one interval, however large the cluster is.
        if self._rng.random() * self.table.live >= 3:  # noqa: PLR2004  # as ringpop does
            return
        self.wants_seeds = True
        dead = [member for name in self._gone_since_s if (member := self._dead(name)) is not None]
        if dead:
            self._send(self._rng.choice(dead).address, Kind.SYNC, target="")

    def _dead(self, name: str) -> Member | None:
        """Return what is held of a dead member; None of a live one, and of one that left on its own."""
        held = self.table.get(name)
        return held if held is not None and held.state == State.DEAD else None

    def _forget_old(self, now: float) -> None:
        """Remove members that went long ago from the table, the oldest first.

        After that an old claim could bring such a member back. Hence the long times: the claim would have to
        be under way for as long.
        """
        # The dictionary is in the order of departure, so the first `excess` are the oldest.
        excess = len(self._gone_since_s) - self.settings.max_gone
        for index, (name, since_s) in enumerate(list(self._gone_since_s.items())):
            keep_s = self.settings.forget_left_s if self._dead(name) is None else self.settings.forget_dead_s
            if index < excess or now - since_s >= keep_s:
                self._forget(name)

    def _forget(self, name: str) -> None:
        self._gone_since_s.pop(name)
        self.table.forget(name)


def _is_out_of_bounds(claim: Member, held: Member) -> bool:
    return (
        claim.generation > held.generation + _MAX_CLOCK_JUMP_MS
        or claim.incarnation > held.incarnation + _MAX_JUMP
    )
