"""The shell around swim.py: the packets on the wire, the seeds, and the view that calls route by.

    timer (core_timer.py), packets, seeds, signs of failure (failure_signs.py)
                    |
                    v
          Swim (pure: decides)  --- take() --->  _perform: log events, send packets, set the timer,
                    ^                                      and, if members changed, make a new View
                    |                                                     |
                    +---------- answers to packets                        v
                                                                on_view(view) -> router, forwarder

From `start` to `leave` and `announce_left`, or to `close`:

- `start` joins. Without seeds this node is a cluster of its own at once.
- `answer` handles packets of other nodes. A sender that has not proved where it is gets an answer, is
  believed nothing, and is asked itself (introductions.py).
- `probe` handles signs that a member may be dead. Such signs are
  a lost connection, a packet that was not delivered, and a forwarded call that failed (forward.py).
- `leave` gives up this node's tokens, `announce_left` says that the process ends.

Rules for editing:

- Touch the core only between awaits, with the current time, and call `_perform` after each touch.
- Nothing that the network does raises into the daemon. It becomes a log record, an event or a new view. Only
  `answer` raises, for bytes that are no packet, because its caller has a status for that.
- Each task belongs to `_tasks`, so that `close` ends it and a bug in it is logged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from aio.tasks import Tasks
from cluster import wire
from cluster.addresses import AddressRules
from cluster.core_timer import CoreTimer
from cluster.discovery import Seeds
from cluster.errors import ClusterError, MalformedPacket, PeerRefused, PeerUnproven, PeerUnreachable
from cluster.event_log import RefusalLog, log_event
from cluster.failure_signs import MAX_CONNECTED, FailureSigns
from cluster.identity import Identity
from cluster.introductions import Candidate, Introductions
from cluster.member import Event, EventKind, Kind, Member, Packet, Phase, Send, Update
from cluster.peerpb import peer_pb2 as pb
from cluster.peers import ChannelKind, Peers
from cluster.swim import Settings, Swim
from cluster.timing import GOSSIP_CALL_S, TRY_S
from cluster.view import View, alone
from cluster.view_change import next_view, settled

log = logging.getLogger(__name__)

# A new view is made this long after a change, so that one burst of changes makes one ring.
_RING_DEBOUNCE_S: Final = 0.05
_JOIN_TIMEOUT_S: Final = 1.0
_JOIN_RETRY_S: Final = (0.3, 15.0)  # the first pause between two rounds of asking, and the longest
_LEAVE_TIMEOUT_S: Final = 1.0
# Packets and dials under way. Beyond the bound a packet is dropped, as a network would: the protocol copes.
_MAX_UNDER_WAY: Final = 512
_MAX_EVENTS: Final = 512
# Claims of a table between two turns of the event loop, about 1 ms; and tables that wait for one another.
_SLICE: Final = 64
_MAX_TABLES_WAITING: Final = 8


@dataclass(slots=True)
class GossipCounters:
    """What this node's gossip has done."""

    packets: Counter[tuple[str, str]] = field(default_factory=Counter)  # by direction and kind
    payload_bytes: Counter[str] = field(default_factory=Counter)  # by direction
    ring_changes: int = 0
    detections: int = 0  # deaths that this node found out itself
    detection_s_sum: float = 0.0


@dataclass(frozen=True, slots=True)
class TimedEvent:
    """An event and when it was seen, seconds since the epoch."""

    at_s: float
    event: Event


class Gossip:
    """This node's membership, from `start` to `leave` and `announce_left`."""

    def __init__(
        self,
        me: Member,
        identity: Identity,
        peers: Peers,
        *,
        seeds: Sequence[str],
        on_view: Callable[[View], None],
        may_vouch: bool,
        settings: Settings | None = None,
    ) -> None:
        """Join nothing yet; `may_vouch` tells whether packets between nodes carry a proof."""
        settings = settings or Settings()
        rules = self._address_rules = AddressRules(seeds, own=me.address)
        self.counters = GossipCounters()
        self.events: deque[TimedEvent] = deque(maxlen=_MAX_EVENTS)
        self.view = alone(me.name, is_active=False)
        rng = Random()  # noqa: S311  # spreads load, guards nothing
        self.swim = Swim(me, settings=settings, rng=rng, now=time.monotonic())
        self.introductions = Introductions(
            me.name,
            may_vouch=may_vouch,
            may_dial=rules.may_be_node,
            max_candidates=settings.max_members,
        )
        self._one_table = asyncio.Semaphore(1)
        self._tables_waiting = 0
        self._identity = identity
        self._origin = identity.message()
        self._peers = peers
        self._seeds = Seeds(seeds, own=(me.address, me.name))
        self._on_view = on_view
        self.on_answering: Callable[[str], None] = lambda _: None  # gets who answers again
        self._silent: set[str] = set()  # members that did not answer the last packet
        self._rng = rng
        self._refusals = RefusalLog()
        self.timer = CoreTimer(self.swim, perform=self._perform)
        self._ring_timer: asyncio.TimerHandle | None = None
        self._seen_changes = -1  # of the table, when `view` was last made or ordered
        self._tasks = Tasks("gossip", max_tasks=_MAX_UNDER_WAY + MAX_CONNECTED)
        self._signs = FailureSigns(self.swim, peers, self._tasks, perform=self._perform)
        self.is_away = self._is_joining = self._is_closed = False  # away: it has withdrawn

    def start(self) -> None:
        """Join: without seeds as a cluster of its own at once, else as soon as a seed answers."""
        if self._seeds.foreign():
            self._tasks.spawn(self._join())
        else:
            self.swim.activate(now=time.monotonic())
            self._perform()

    def answer(self, body: bytes) -> bytes | Coroutine[Any, Any, bytes]:
        """Return the answer to a GossipRequest; later, if it has a long table. Raises MalformedPacket."""
        origin, packet, table = wire.parse_request(body)
        self.counters.packets["in", packet.kind.name.lower()] += 1
        self.counters.payload_bytes["in"] += len(body)
        # Before the core sees it: a claim from another cluster would add that cluster's members.
        objection = self._identity.objection(origin)
        if objection:
            self._log_refusal("peer_refused", packet.sender.name, objection)
            return wire.response(None, objection)
        if len(table) > self.swim.settings.max_members:
            raise MalformedPacket(f"a table of more than {self.swim.settings.max_members} members")
        if len(table) <= _SLICE:
            return self._response(self._receive(packet, wire.updates(table, 0, _SLICE)))
        return self._answer_in_slices(packet, table)

    async def _answer_in_slices(self, packet: Packet, table: wire.RawTable) -> bytes:
        return self._response(await self._receive_in_slices(packet, table))

    def _response(self, answer: Packet | None) -> bytes:
        response = wire.response(answer)
        if answer is not None:
            self.counters.packets["out", answer.kind.name.lower()] += 1
            self.counters.payload_bytes["out"] += len(response)
        return response

    async def _receive_in_slices(
        self, packet: Packet, table: wire.RawTable, *, dialled: str | None = None
    ) -> Packet | None:
        """Take in a packet with a long table, with turns of the event loop in between.

        One table at a time: many of them together would fill each turn as one long table would.

        Raises:
            MalformedPacket: too many tables wait already.
        """
        if self._tables_waiting >= _MAX_TABLES_WAITING:
            raise MalformedPacket("too many tables at once")
        self._tables_waiting += 1
        try:
            async with self._one_table:
                if self.is_proven(packet.sender, dialled):
                    for start in range(0, len(table), _SLICE):
                        part = wire.updates(table, start, start + _SLICE)
                        now = time.monotonic()
                        self.swim.learn(self.introductions.believed(part, self.swim.table, now=now), now=now)
                        self._perform()
                        await asyncio.sleep(0)
                return self._receive(packet, (), dialled=dialled)
        finally:
            self._tables_waiting -= 1

    def is_proven(self, sender: Member, dialled: str | None = None) -> bool:
        """Tell whether a process has proved where it is, now or before."""
        return sender.address == dialled or self.introductions.is_proven(self.swim.table, sender)

    def _receive(
        self, packet: Packet, table: Sequence[Update], *, dialled: str | None = None
    ) -> Packet | None:
        """Have the core take in what may be believed of a packet; return the answer to it.

        `dialled` is the address of which the packet is the answer, if it is one.
        """
        now = time.monotonic()
        sifted = self.introductions.sift(packet, self.swim.table, now=now, dialled=dialled)
        if sifted is None:
            answer = self.swim.answer_stranger(packet, now=now)
        else:
            self.swim.learn(self.introductions.believed(table, self.swim.table, now=now), now=now)
            answer = self.swim.receive(sifted, now=now)
        self._perform()
        return answer

    def objection(self, origin: pb.Origin) -> str:
        """Return why a call with this origin must not be answered here; empty if it may be."""
        return self._identity.objection_to_call(origin, self.swim.me.name)

    def host_at(self, address: str) -> str:
        """Return the host name of the node at an address: of a member, or of a seed that is no member yet."""
        for member in self._live_peers():
            if member.address == address:
                return member.name.rpartition(":")[0]
        return self._seeds.at(address).rpartition(":")[0]

    def probe(self, name: str) -> None:
        """Find out soon whether a member is alive: its host may refuse a dial, else the member is probed."""
        self._signs.probe(name)

    def withdraw(self) -> None:
        """Own nothing until `come_back`; this node goes on forwarding calls."""
        self.is_away = True
        self.swim.withdraw(now=time.monotonic())
        self._perform()

    def come_back(self) -> None:
        """Own tokens again."""
        self.is_away = False
        self.swim.activate(now=time.monotonic())
        self._perform()

    async def leave(self) -> None:
        """Own nothing from now on; return when the members route by that, or after about a second."""
        self.swim.leave(now=time.monotonic())
        await self._announce()
        if self.swim.table.live > 1:
            # They have the packet; their new rings follow after the debounce.
            await asyncio.sleep(2 * _RING_DEBOUNCE_S)

    async def announce_left(self) -> None:
        """Tell the members that this node is gone for good, then stop."""
        self.swim.left(now=time.monotonic())
        await self._announce()
        await self.close()

    async def close(self) -> None:
        """Stop without telling any member: as if the process had been killed."""
        self._is_closed = True
        self.timer.stop()
        if self._ring_timer is not None:
            self._ring_timer.cancel()
        await self._tasks.close()

    async def _announce(self) -> None:
        """Perform, and wait until the packets that this sends are answered."""
        before = self._tasks.running()
        self._perform()
        sending = self._tasks.running() - before
        if sending:
            # A member that does not answer hears of it by the gossip of another.
            await asyncio.wait(sending, timeout=_LEAVE_TIMEOUT_S)

    def _perform(self) -> None:
        """Do what the core has ordered since it was last touched."""
        sends, events = self.swim.take()
        for event in events:
            self._record(event)
        for send in sends:
            self._tasks.spawn(self._deliver(send))
        for candidate in () if self._is_closed else self.introductions.next():
            if self._tasks.spawn(self._ask(candidate)) is None:
                self.introductions.done(candidate, is_proven=False, now=time.monotonic())
        changes = self.swim.table.changes
        if changes != self._seen_changes and self._ring_timer is None and not self._is_closed:
            # A node that joins brings a table of many members: one ring for all of them, not one for each.
            self._seen_changes = changes
            self._ring_timer = asyncio.get_running_loop().call_later(_RING_DEBOUNCE_S, self._swap_view)
        if self.swim.wants_seeds:
            # After a partition all members of the other half may be forgotten. A seed's name may lead to one.
            self.swim.wants_seeds = False
            if self._seeds.foreign() and not self._is_joining:
                self._tasks.spawn(self._rejoin())
        self._set_timer()

    def _record(self, event: Event) -> None:
        self.events.append(TimedEvent(time.time(), event))
        if event.kind is EventKind.DEAD and event.evidence != "heard":
            self.counters.detections += 1
            self.counters.detection_s_sum += event.seconds
        log_event(event)
        if event.kind is EventKind.REFUTED:
            self.on_answering(event.member.name)

    def _live_peers(self) -> list[Member]:
        """Return the other members that are neither dead nor left."""
        me = self.swim.me.name
        return [member for member in self.swim.table if not member.is_gone and member.name != me]

    def _set_timer(self) -> None:
        # Alone and without seeds there is no node to talk to, and no timer: an idle process sleeps.
        if not self._is_closed and (len(self.swim.table) > 1 or self._seeds.names):
            self.timer.set()

    def _swap_view(self) -> None:
        """Route by the members as they are now.

        Connections are renewed before the view is handed out, so that no call uses the channel of a process
        that had the same address before.
        """
        self._ring_timer = None
        old = self.view
        self.view = next_view(old, self.swim.me, self.swim.table)
        self._signs.keep_connected(self._live_peers())
        self._silent &= self.view.address_by_name.keys()
        ring = self.view.ring
        if ring.nodes != old.ring.nodes:
            self.counters.ring_changes += 1
            log.info("ring_changed", extra={"nodes": list(ring.nodes), "fingerprint": ring.fingerprint})
        self._on_view(self.view)

    def settle(self, view: View) -> None:
        """Take note that a view's ring has been published long enough; a former view means nothing."""
        if view is self.view and view.former:
            self.view = settled(view)
            self._on_view(self.view)

    async def _ask(self, candidate: Candidate) -> None:
        """Ask a candidate for its table: its answer proves where it is, and makes it a member."""
        is_proven = False
        # A process that has just been started was dialled in vain a moment ago.
        self._peers.dial_soon(candidate.address)
        try:
            await self._deliver(self.swim.sync_with(candidate.address, candidate.name))
            # Its answer has been taken in by then, if there was one.
            held = self.swim.table.get(candidate.name)
            is_proven = held is not None and not held.is_gone and held.address == candidate.address
        finally:
            self.introductions.done(candidate, is_proven=is_proven, now=time.monotonic())
            if not is_proven:
                self._forget_stranger(candidate)
            if not self._is_closed:
                self._perform()

    def _forget_stranger(self, candidate: Candidate) -> None:
        # Another member may be at that address.
        if all(member.address != candidate.address for member in self._live_peers()):
            self._peers.forget(candidate.address)
        self._log_refusal("member_unproven", "", f"no proof of {candidate.name} at {candidate.address}")

    async def _deliver(self, send: Send) -> None:
        """Send a packet; hand its answer to the core. A packet that is lost is not sent again."""
        name, sent_s = send.packet.target, time.monotonic()
        try:
            await self._exchange(send)
            # A late answer is one of a process or network that stood still.
            if name in self._silent or time.monotonic() - sent_s > TRY_S:
                self._silent.discard(name)
                self.on_answering(name)
        except PeerUnreachable:
            # A sign of failure, unlike a time-out: the host may refuse.
            if name:
                self._silent.add(name)
                self.probe(name)
        except PeerRefused as exc:
            self._log_refusal("peer_refuses_us", send.address, str(exc))
        except PeerUnproven as exc:
            self._log_refusal("peer_unproven", send.address, str(exc))
        except ClusterError as exc:
            if name:
                self._silent.add(name)
            log.debug("packet_lost", extra={"address": send.address, "error": str(exc)})

    async def _exchange(self, send: Send) -> None:
        """Send a packet, and take its answer in; a node that doubts its own health waits longer for it.

        Raises:
            PeerRefused: the receiver takes this node for one of another cluster.
            ClusterError: the packet or its answer was lost.
        """
        body = wire.request(send.packet, self._origin)
        self.counters.packets["out", send.packet.kind.name.lower()] += 1
        self.counters.payload_bytes["out"] += len(body)
        timeout_s = GOSSIP_CALL_S * (self.swim.health_score + 1)
        response = await self._peers.call(
            send.address, "Gossip", body, timeout_s=timeout_s, channel_kind=ChannelKind.GOSSIP
        )
        self.counters.payload_bytes["in"] += len(response)
        answer, table, refusal = wire.parse_response(response)
        if refusal:
            raise PeerRefused(refusal)
        if answer is None:
            if send.packet.kind == Kind.SYNC and not send.packet.target:
                # Only this node itself gives no answer to its own sync: the seed leads back here.
                self._seeds.leads_back(send.address)
            return
        self.counters.packets["in", answer.kind.name.lower()] += 1
        if len(table) > self.swim.settings.max_members:
            raise MalformedPacket(f"a table of more than {self.swim.settings.max_members} members")
        if len(table) <= _SLICE:
            self._receive(answer, wire.updates(table, 0, _SLICE), dialled=send.address)
        else:
            await self._receive_in_slices(answer, table, dialled=send.address)

    async def _join(self) -> None:
        """Ask the seeds until each is a member; serve alone while none is.

        To stop at the first answer would not do. Of nodes that start together, some might find one another
        and not the rest.
        """
        self._is_joining = True
        wait_s, longest_s = _JOIN_RETRY_S
        while await self._ask_seeds():
            is_alone = self.swim.table.live == 1 and not self.introductions
            if is_alone and not self.is_away and self.swim.me.phase == Phase.JOINING:
                # Others of this daemon start together with this node: their silence is no news.
                seeds = [seed for seed in self._seeds.names if not self._peers.socket_at(seed)]
                level = logging.WARNING if seeds else logging.DEBUG
                log.log(level, "no_seed_answers", extra={"seeds": seeds})
                self.swim.activate(now=time.monotonic())
                self._perform()
            await asyncio.sleep(wait_s * (0.5 + self._rng.random()))
            wait_s = min(2 * wait_s, longest_s)
        self._is_joining = False

    async def _rejoin(self) -> None:
        """Ask the seeds once, after a partition perhaps; `_heal` of the core comes back to it."""
        await self._ask_seeds()

    async def _ask_seeds(self) -> bool:
        """Ask every seed that is no member; tell whether one is missing still."""
        found = await self._seeds.find()
        self._address_rules.know(found)
        before = self._tasks.running()
        self.swim.join(self._unknown(found))
        self._perform()
        asking = self._tasks.running() - before
        if asking:
            await asyncio.wait(asking, timeout=_JOIN_TIMEOUT_S)
        return not found or bool(self._unknown(found))

    def _unknown(self, addresses: Sequence[str]) -> list[str]:
        """Return the addresses that belong neither to a member nor to this node."""
        known = {member.address for member in self._live_peers()}
        return [one for one in addresses if one not in known and not self._seeds.is_own(one)]

    def _log_refusal(self, event: str, peer: str, text: str) -> None:
        self._refusals.write(event, peer, text, now=time.monotonic())
