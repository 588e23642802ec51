"""Who is alive: SWIM with Lifeguard, as a state machine without I/O.

The shell calls `receive`, `tick`, `join`, `leave`, `refused`, `dropped` and `stalled` with its clock,
then takes what `take` returns and does it; `next_deadline` says when `tick` is due. Nothing here owns
a clock, a socket, a task or a log, and chance comes from the generator that is passed in, so that one
seed decides a whole simulated cluster.

Sources: SWIM (Das, Gupta, Motivala 2002); Lifeguard (Dadgar, Phillips, Currey 2018): local health,
suspicion with confirmations, the buddy rule. Beyond them: generations, so that a restarted node
replaces its former self at once; refused connections as evidence; a hash-checked sync; contact with
the dead, so that partitions heal; deadlines that move by what this node's own loop lost.

Rules for editing:
- What the network sent never raises: it is a claim, newer or not (`_consider`).
- Every change of the table goes through `_store`, every word about this node itself through `_refute`.
- Only `_bump_incarnation` raises this node's incarnation.
- Iterate dictionaries and lists, never sets: their order would differ between processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, assert_never

from cluster.dissemination import Dissemination
from cluster.member import Event, EventKind, Kind, Member, Packet, Phase, Send, State, Update
from cluster.suspicion import Suspicion
from cluster.table import Base, ProbeOrder, Table

if TYPE_CHECKING:
    from random import Random

MAX_UPDATES: Final = 16
_MAX_PROBES: Final = 64
_MAX_RELAYS: Final = 256
_MAX_RIVALS: Final = 8
# A ping request is answered with a NACK in time for the asker's own deadline.
_NACK_SHARE: Final = 0.8
# A closed connection is looked into after up to this, so that peers do not do so in step.
_DROP_JITTER_S: Final = 0.02
_DROP_PAUSE_S: Final = 0.25
_FIRST_GOSSIP_S: Final = 0.02
_LAG_PER_POINT_S: Final = 0.25
_DIRECT_LEAVE: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Times in seconds; the defaults are memberlist's for a LAN where it has them."""

    probe_interval_s: float = 1.0
    probe_timeout_s: float = 0.5
    indirect_probes: int = 3
    suspicion_factor: float = 4.0  # times log10 of the members, at least 1, times the probe interval
    suspicion_max_factor: float = 6.0  # 1: a fixed suspicion, as in SWIM without Lifeguard
    confirmations: int = 2
    refused_suspicion_s: float = 0.5
    max_health_score: int = 8  # 0: no local health, as in plain SWIM
    has_buddy_rule: bool = True
    early_probes: float = 6.0  # how many members probe a suspect they hear of, on average
    gossip_interval_s: float = 0.2
    gossip_fanout: int = 3
    retransmit_factor: int = 4
    gossip_to_dead_s: float = 30.0
    sync_interval_s: float = 10.0  # inf: never, as in SWIM
    mismatch_pause_s: float = 1.0
    heal_interval_s: float = 15.0
    forget_dead_s: float = 24 * 3600.0
    forget_left_s: float = 3600.0
    max_gone: int = 1024
    stabilise_s: float = 0.3  # from the first answer of a member until this node owns tokens


@dataclass(slots=True)
class _Probe:
    target: str
    began_s: float
    indirect_s: float
    ends_s: float
    is_indirect: bool = False
    nacks_due: int = 0


@dataclass(slots=True)
class _Relay:
    asker: Member
    sequence: int
    nack_s: float
    ends_s: float


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
    """One node's part in the membership protocol. All times are seconds on one monotonic clock."""

    def __init__(
        self, me: Member, *, settings: Settings, rng: Random, now: float, base: Base | None = None
    ) -> None:
        self.me = me
        self.settings = settings
        self.health_score = 0
        self.counters = Counters()
        self._rng = rng
        self.table = Table(base or Base())
        self._updates = Dissemination(self._is_current)
        self._suspicions: dict[str, Suspicion] = {}
        self._probes: dict[int, _Probe] = {}
        self._relays: dict[int, _Relay] = {}
        self._gone_since_s: dict[str, float] = {}
        self._drops_s: dict[str, float] = {}
        self._early_s: dict[str, float] = {}
        self._rivals: dict[int, int] = {}
        self._order = ProbeOrder(rng)
        self._sequence = 0
        self._outputs: list[Send] = []
        self._events: list[Event] = []
        self._probe_s = now + rng.random() * settings.probe_interval_s
        self._gossip_s = math.inf
        self._sync_s = now + rng.random() * settings.sync_interval_s
        self._heal_s = now + rng.random() * settings.heal_interval_s
        self._mismatch_sync_s = -math.inf
        self._active_s = math.inf
        self.wants_seeds = False
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
        """Ask whoever listens at these addresses for their table."""
        for address in addresses:
            self._send(address, Kind.SYNC, target="")

    def activate(self, *, now: float) -> None:
        """Own tokens from now on; called when nobody answered, or some time after somebody did."""
        self._active_s = math.inf
        if self.me.phase == Phase.JOINING:
            self._bump_incarnation(self.me.incarnation + 1, now, phase=Phase.ACTIVE)

    def leave(self, *, now: float) -> None:
        """Own nothing from now on but go on answering; tell the others at once."""
        self._active_s = math.inf
        if self.me.phase != Phase.LEAVING:
            self._bump_incarnation(self.me.incarnation + 1, now, phase=Phase.LEAVING)
            self._send_directly()

    def left(self, *, now: float) -> None:
        """Say announce_left: the process is about to end."""
        if self.me.state != State.LEFT:
            self.me = self.me._replace(state=State.LEFT, incarnation=self.me.incarnation + 1)
            self._store(self.me, now)
            self._send_directly()

    def receive(self, packet: Packet, *, now: float) -> Packet | None:
        """Take a packet in; return the answer to it, if it asks for one."""
        sender = packet.sender
        if sender.name == self.me.name:
            if sender.instance != self.me.instance:
                self._refute(Update(sender), now)
            return None
        if packet.target not in ("", self.me.name):
            # The address was another node's; its silence is the answer.
            return None
        self._consider(Update(sender), now)
        for update in packet.updates[:MAX_UPDATES]:
            self._consider(update, now)
        for update in packet.table:
            self._consider(update, now, is_sync=True)
        answer = self._answer(packet, now)
        self._compare_rings(packet, now)
        return answer

    def refused(self, name: str, *, now: float) -> None:
        """Take note that the member's host refused a connection: nothing listens there."""
        held = self.table.get(name)
        if held is None or held.is_gone or held.phase == Phase.LEAVING or name == self.me.name:
            return
        suspect = held._replace(state=State.SUSPECT)
        self._consider(Update(suspect, accuser=self.me.name, is_refused=True), now)

    def dropped(self, name: str, *, now: float) -> None:
        """Take note that a connection to the member ended or a call timed out: it is probed soon."""
        held = self.table.get(name)
        if held is None or held.is_gone or now < self._drops_s.get(name, -math.inf):
            return
        if len(self._drops_s) >= _MAX_RELAYS:
            self._drops_s.clear()
        self._drops_s[name] = now + _DROP_PAUSE_S
        self._early_s[name] = now + self._rng.random() * _DROP_JITTER_S

    def stalled(self, lag_s: float) -> None:
        """Move every open deadline by the time that this node's own loop stood still."""
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
        """Do what is due."""
        self._end_probes(now)
        self._end_relays(now)
        self._end_suspicions(now)
        self._probe_early(now)
        if now >= self._active_s:
            self.activate(now=now)
        if now >= self._probe_s:
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
        """Return what the target must hear first: that it is suspected or held dead."""
        held = self.table.get(target)
        if held is None or held.state == State.ALIVE:
            return ()
        if held.state == State.SUSPECT and not self.settings.has_buddy_rule:
            return ()
        return (Update(held, accuser=self.me.name if held.state == State.SUSPECT else ""),)

    def _max_sends(self) -> int:
        return self.settings.retransmit_factor * math.ceil(math.log10(self.table.live + 1))

    def _is_current(self, update: Update) -> bool:
        held = self.table.get(update.member.name)
        return held is not None and held.version == update.member.version

    def _answer(self, packet: Packet, now: float) -> Packet | None:
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
                self._prepare_to_own(now)
                is_same = packet.members_hash == self.table.members_hash
                table = () if is_same else self._whole_table()
                return self._packet(Kind.SYNC_REPLY, sender.name, table=table)
            case Kind.SYNC_REPLY:
                self._synced(packet, now)
            case Kind.GOSSIP | Kind.SYNC_PUSH:
                pass
            case never:
                assert_never(never)
        return None

    def _whole_table(self) -> tuple[Update, ...]:
        return tuple(Update(member) for member in self.table)

    def _synced(self, packet: Packet, now: float) -> None:
        self.counters.syncs += 1
        self._prepare_to_own(now)
        if packet.members_hash != self.table.members_hash:
            sender = packet.sender
            push = self._packet(Kind.SYNC_PUSH, sender.name, table=self._whole_table())
            self._outputs.append(Send(sender.address, push))

    def _prepare_to_own(self, now: float) -> None:
        """Own tokens soon: a member has been found, by this node or the other way round."""
        if self.me.phase == Phase.JOINING and self._active_s == math.inf:
            self._active_s = now + self.settings.stabilise_s

    def _compare_rings(self, packet: Packet, now: float) -> None:
        # While updates are under way rings differ as a matter of course; a sync is for when they
        # have run out and one was lost.
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
        """Believe a claim that is newer than what is held."""
        claim = update.member
        if claim.name == self.me.name:
            self._refute(update, now)
            return
        held = self.table.get(claim.name)
        if held is not None and claim.version <= held.version:
            if held.state == State.SUSPECT and claim.version == held.version and update.accuser:
                self._confirm(update, now)
            return
        if is_sync and claim.state == State.DEAD and held is not None and not held.is_gone:
            # A partition that has just healed: let it speak for itself first.
            update = Update(claim._replace(state=State.SUSPECT), accuser=self.me.name)
            if update.member.version <= held.version:
                return
        self._believe(update, held, now)

    def _believe(self, update: Update, held: Member | None, now: float) -> None:
        claim = update.member
        suspicion = self._suspicions.get(claim.name)
        if not self._store(claim, now):
            return
        if held is None and claim.is_gone:
            # Remembered, so that older claims cannot revive it; nobody has to hear of it again.
            return
        self._updates.put(update)
        self._schedule_gossip(now)
        if claim.state == State.SUSPECT:
            self._suspect(update, now)
        self._emit_change(claim, held, suspicion, now)

    def _store(self, claim: Member, now: float) -> bool:
        if not self.table.put(claim):
            return False
        if claim.state != State.SUSPECT:
            self._suspicions.pop(claim.name, None)
            self._early_s.pop(claim.name, None)
        if claim.is_gone:
            self._gone_since_s.setdefault(claim.name, now)
            self._drops_s.pop(claim.name, None)
        else:
            self._gone_since_s.pop(claim.name, None)
        return True

    def _emit_change(
        self, claim: Member, held: Member | None, suspicion: Suspicion | None, now: float
    ) -> None:
        """Make the event of a change."""
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

    def _emit(self, kind: EventKind, member: Member, evidence: str = "", *, seconds: float = 0.0) -> None:
        self._events.append(Event(kind, member, evidence, seconds=seconds))

    def _suspect(self, update: Update, now: float) -> None:
        member = update.member
        others = self.table.live - 2
        settings = self.settings
        confirmations = settings.confirmations if others >= settings.confirmations else 0
        min_s = settings.suspicion_factor * max(1.0, math.log10(self.table.live)) * settings.probe_interval_s
        suspicion = Suspicion(
            now=now,
            min_s=min_s,
            max_s=min_s * settings.suspicion_max_factor,
            confirmations=confirmations,
            refused_s=settings.refused_suspicion_s,
            refusals_needed=1 if self.table.live <= 3 else 2,  # noqa: PLR2004  # two others at most
        )
        self._suspicions[member.name] = suspicion
        accuser = update.accuser or self.me.name
        suspicion.accuse(accuser, is_refused=update.is_refused, now=now)
        self.counters.suspicions += 1
        evidence = "refused" if update.is_refused else "silent"
        self._events.append(Event(EventKind.SUSPECT, member, evidence, accuser))
        if accuser != self.me.name and self._rng.random() * self.table.live < settings.early_probes:
            # A second opinion now, not when its turn comes.
            self._early_s[member.name] = now + self._rng.random() * _DROP_JITTER_S

    def _confirm(self, update: Update, now: float) -> None:
        suspicion = self._suspicions.get(update.member.name)
        if suspicion is not None and suspicion.accuse(update.accuser, is_refused=update.is_refused, now=now):
            self._updates.put(update)
            self._schedule_gossip(now)

    def _refute(self, update: Update, now: float) -> None:
        claim, me = update.member, self.me
        if me.state == State.LEFT:
            return
        if claim.instance != me.instance and claim.generation >= me.generation:
            self._meet_rival(claim, now)
        elif claim.generation == me.generation and claim.state != State.ALIVE:
            if claim.incarnation >= me.incarnation:
                self._worsen(1)
                # Whoever can be told so is perhaps well again: find out.
                self._probe_s = min(self._probe_s, now + self.settings.probe_interval_s)
                self._bump_incarnation(claim.incarnation + 1, now)
        elif claim.generation == me.generation and claim.incarnation > me.incarnation:
            self._bump_incarnation(claim.incarnation + 1, now)

    def _meet_rival(self, claim: Member, now: float) -> None:
        """Stand above another process of this node's name.

        As a rule it is this node's former self, met because a clock went back; one that stands up
        again is alive, and then the greater instance keeps the name.
        """
        if len(self._rivals) >= _MAX_RIVALS:
            self._rivals.clear()
        met = self._rivals.get(claim.instance, 0)
        self._rivals[claim.instance] = met + 1
        if met and claim.state == State.ALIVE and claim.instance > self.me.instance:
            self._emit(EventKind.CONFLICT, claim, "another live node has this node's name")
            self.leave(now=now)
            return
        self.me = self.me._replace(generation=claim.generation + 1)
        self._bump_incarnation(self.me.incarnation + 1, now)

    def _bump_incarnation(self, incarnation: int, now: float, *, phase: Phase | None = None) -> None:
        self.me = self.me._replace(incarnation=incarnation, phase=self.me.phase if phase is None else phase)
        self._store(self.me, now)
        self._updates.put(Update(self.me))
        self._schedule_gossip(now)

    def _probe_next(self, now: float) -> None:
        for _ in range(len(self.table) + 1):
            member = self.table.at(self._order.advance(len(self.table)))
            if not member.is_gone and member.name != self.me.name:
                self._probe(member, now)
                return

    def _probe(self, member: Member, now: float) -> None:
        if len(self._probes) >= _MAX_PROBES or any(
            probe.target == member.name for probe in self._probes.values()
        ):
            return
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
        for name in [name for name, due_s in self._early_s.items() if now >= due_s]:
            del self._early_s[name]
            member = self.table.get(name)
            if member is not None and not member.is_gone:
                self._probe(member, now)

    def _acked(self, packet: Packet, now: float) -> None:
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
        probe = self._probes.get(packet.sequence)
        if probe is not None:
            probe.nacks_due = max(0, probe.nacks_due - 1)

    def _end_probes(self, now: float) -> None:
        for sequence, probe in list(self._probes.items()):
            if now >= probe.ends_s:
                del self._probes[sequence]
                self._probe_failed(probe, now)
            elif now >= probe.indirect_s and not probe.is_indirect:
                probe.is_indirect = True
                self._ask_others(sequence, probe)

    def _ask_others(self, sequence: int, probe: _Probe) -> None:
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
        self.counters.probes_failed += 1
        # Helpers that could not reach it either said so; those that said nothing make this node doubt itself.
        self._worsen(probe.nacks_due)
        member = self.table.get(probe.target)
        if member is None or member.is_gone:
            return
        update = Update(member._replace(state=State.SUSPECT), accuser=self.me.name)
        self._consider(update, now)

    def _relay(self, packet: Packet, now: float) -> None:
        subject = self.table.get(packet.subject)
        if subject is None or len(self._relays) >= _MAX_RELAYS:
            return
        self._sequence += 1
        timeout_s = self.settings.probe_timeout_s
        self._relays[self._sequence] = _Relay(
            packet.sender, packet.sequence, now + timeout_s * _NACK_SHARE, now + timeout_s
        )
        self._send(subject.address, Kind.PING, target=subject.name, sequence=self._sequence)

    def _end_relays(self, now: float) -> None:
        for sequence, relay in list(self._relays.items()):
            if now >= relay.nack_s:
                del self._relays[sequence]
                if self.settings.max_health_score:
                    self._send(
                        relay.asker.address, Kind.NACK, target=relay.asker.name, sequence=relay.sequence
                    )

    def _end_suspicions(self, now: float) -> None:
        for name, suspicion in list(self._suspicions.items()):
            if now < suspicion.deadline_s:
                continue
            member = self.table.get(name)
            assert member is not None
            dead = member._replace(state=State.DEAD)
            self._store(dead, now)
            self._updates.put(Update(dead))
            self._schedule_gossip(now)
            self.counters.deaths += 1
            evidence = "refused" if suspicion.is_refused else "silent"
            self._events.append(
                Event(
                    EventKind.DEAD,
                    dead,
                    evidence,
                    confirmations=suspicion.confirmations,
                    seconds=now - suspicion.began_s,
                )
            )

    def _recover(self, took_s: float, now: float) -> None:
        if took_s < self.settings.probe_timeout_s:
            # As quick as a healthy node's: what was wrong is over. Lifeguard would take 45 s from 8 to 0.
            self.health_score //= 2
        else:
            self.health_score -= self.health_score > 0
        self._probe_s = min(self._probe_s, now + self.settings.probe_interval_s * (self.health_score + 1))

    def _worsen(self, points: int) -> None:
        self.health_score = min(self.settings.max_health_score, self.health_score + points)

    def _schedule_gossip(self, now: float) -> None:
        if self._gossip_s == math.inf:
            self._gossip_s = now + self._rng.random() * _FIRST_GOSSIP_S

    def _gossip(self, now: float) -> None:
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
            if self._updates:
                self._send(member.address, Kind.GOSSIP, target=member.name)
        self._gossip_s = now + self.settings.gossip_interval_s if self._updates and receivers else math.inf

    def _send_directly(self) -> None:
        """Send this node's own state to everybody where that is cheap, else to some."""
        everybody = self.table.live - (not self.me.is_gone)
        count = everybody if everybody <= _DIRECT_LEAVE else self.settings.gossip_fanout
        for member in self.table.pick(count, self._rng, excluding=(self.me.name,)):
            self._send(member.address, Kind.GOSSIP, target=member.name)

    def _sync_with_one(self) -> None:
        for member in self.table.pick(1, self._rng, excluding=(self.me.name,)):
            self._send(member.address, Kind.SYNC, target=member.name)

    def _heal(self, now: float) -> None:
        self._forget(now)
        # Three members of the cluster, on average, look for what was lost in one interval.
        if self._rng.random() * self.table.live >= 3:  # noqa: PLR2004  # as ringpop does
            return
        self.wants_seeds = True
        dead = [member for name in self._gone_since_s if (member := self._dead(name)) is not None]
        if dead:
            self._send(self._rng.choice(dead).address, Kind.SYNC, target="")

    def _dead(self, name: str) -> Member | None:
        held = self.table.get(name)
        return held if held is not None and held.state == State.DEAD else None

    def _forget(self, now: float) -> None:
        excess = len(self._gone_since_s) - self.settings.max_gone
        for index, (name, since_s) in enumerate(list(self._gone_since_s.items())):
            keep_s = self.settings.forget_left_s if self._dead(name) is None else self.settings.forget_dead_s
            if index < excess or now - since_s >= keep_s:
                self._gone_since_s.pop(name)
                self.table.forget(name)
