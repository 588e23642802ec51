"""The shell around swim.py: one timer, the peers' channels, seeds, and the view that calls route by.

Rules for editing: the core is touched only between awaits, and `_do` follows each touch; nothing that
the network does reaches the daemon but as a log line, an event or a new view.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

from cluster import discovery, wire
from cluster.errors import ClusterError, PeerRefused, PeerUnreachable
from cluster.member import Event, EventKind, Kind, Member, Packet, Phase, Send
from cluster.peerpb import peer_pb2 as pb
from cluster.peers import ChannelKind, Peers, is_refused
from cluster.ring import Ring
from cluster.swim import Settings, Swim
from cluster.view import View, alone

log = logging.getLogger(__name__)

PROTOCOL: Final = 1
_LAG_NOTICED_S: Final = 0.1
# After a stall, what waits in the sockets is read before any time-out fires.
_DRAIN_INBOX_S: Final = 0.02
_RING_DEBOUNCE_S: Final = 0.05
# All nodes route alike again by then, as a rule.
_SETTLE_S: Final = 2.0
# With more changes at once than that, nobody's copies are worth much.
_MAX_FORMER: Final = 4
_JOIN_TIMEOUT_S: Final = 1.0
_JOIN_RETRY_S: Final = (0.3, 15.0)
_LEAVE_TIMEOUT_S: Final = 1.0
_CALL_TIMEOUT_S: Final = 1.0
_LOOK_PAUSE_S: Final = 0.25
_MAX_CALLS: Final = 512
_MAX_WATCHED: Final = 64
_MAX_EVENTS: Final = 512
_LOG_PAUSE_S: Final = 10.0
_WARNINGS: Final = frozenset({EventKind.SUSPECT, EventKind.DEAD, EventKind.CONFLICT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What two nodes must have in common to be of one cluster."""

    label: str
    storage_fingerprint: bytes

    def message(self, callee: str = "") -> pb.Origin:
        """Return it as it goes over the wire to the node of this name, or to any."""
        return pb.Origin(
            cluster_label=self.label,
            storage_fingerprint=self.storage_fingerprint,
            protocol=PROTOCOL,
            callee=callee,
        )

    def objection(self, origin: pb.Origin) -> str:
        """Return why a node with this origin is none of ours; empty if it is."""
        if origin.cluster_label != self.label:
            theirs = origin.cluster_label[:100]
            return f"the cluster's label is {self.label!r} on one side and {theirs!r} on the other"
        if origin.storage_fingerprint != self.storage_fingerprint:
            return "the two nodes store sessions in different tables or databases"
        return ""


@dataclass(slots=True)
class GossipCounters:
    """Traffic and time of this node's gossip."""

    packets: Counter[tuple[str, str]] = field(default_factory=Counter)  # by direction and kind
    payload_bytes: Counter[str] = field(default_factory=Counter)  # by direction
    ring_changes: int = 0
    loop_lag_s: float = 0.0  # of the last tick
    max_loop_lag_s: float = 0.0
    detections: int = 0
    detection_s_sum: float = 0.0


@dataclass(frozen=True, slots=True)
class TimedEvent:
    """An event and when it was seen, seconds since the epoch."""

    at_s: float
    event: Event


class Gossip:
    """This node's membership, from `run` to `leave` and `announce_left`."""

    def __init__(
        self,
        me: Member,
        identity: Identity,
        peers: Peers,
        *,
        seeds: Sequence[str],
        on_view: Callable[[View], None],
        settings: Settings | None = None,
    ) -> None:
        self.counters = GossipCounters()
        self.events: deque[TimedEvent] = deque(maxlen=_MAX_EVENTS)
        self.view = alone(me.name, is_active=False)
        self._identity = identity
        self._origin = identity.message()
        self._peers = peers
        self._seeds = seeds
        self._on_view = on_view
        self._rng = Random()  # noqa: S311  # spreads load, guards nothing
        self.swim = Swim(me, settings=settings or Settings(), rng=self._rng, now=time.monotonic())
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0
        self._ring_timer: asyncio.TimerHandle | None = None
        self._settle_timer: asyncio.TimerHandle | None = None
        self._seen_changes = -1
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: dict[str, tuple[Member, asyncio.Task[None]]] = {}
        self._looks: dict[str, bool] = {}  # under way, and whether there is a reason for another
        self._logged_s: dict[str, float] = {}
        self._seed_by_address: dict[str, str] = {}
        self._own_addresses: set[str] = {me.address, me.name}
        self._is_joining = False
        self._is_closed = False

    def start(self) -> None:
        """Join: at once a node of its own, and one of the cluster as soon as a seed answers."""
        if self._foreign_seeds():
            self._spawn(self._join())
        else:
            self.swim.activate(now=time.monotonic())
            self._do()

    def answer(self, body: bytes) -> bytes:
        """Return the answer to a GossipRequest. Raises MalformedPacket."""
        origin, packet = wire.parse_request(body)
        self.counters.packets["in", packet.kind.name.lower()] += 1
        self.counters.payload_bytes["in"] += len(body)
        objection = self._identity.objection(origin)
        if objection:
            self._log_once("peer_refused", packet.sender.name, objection)
            return wire.response(None, objection)
        answer = self.swim.receive(packet, now=time.monotonic())
        self._do()
        response = wire.response(answer)
        if answer is not None:
            self.counters.packets["out", answer.kind.name.lower()] += 1
            self.counters.payload_bytes["out"] += len(response)
        return response

    def objection(self, origin: pb.Origin) -> str:
        """Return why a call is none of ours, or not for this node; empty if it is."""
        name = self.swim.me.name
        if origin.callee != name:
            return f"this node is {name}, and the call is for {origin.callee[:100] or 'nobody'}"
        return self._identity.objection(origin)

    def host_at(self, address: str) -> str:
        """Return the host name of whoever is at an address: a member, or a seed that is none yet."""
        for member in self._others():
            if member.address == address:
                return member.name.rpartition(":")[0]
        return self._seed_by_address.get(address, address).rpartition(":")[0]

    def probe(self, name: str) -> None:
        """Find out soon whether a member is alive: its host may refuse, or it is probed."""
        if name in self._looks:
            # A process that ends closes its connections before its port, or the other way round.
            self._looks[name] = True
        elif self._spawn(self._look(name)):
            self._looks[name] = False

    async def leave(self) -> None:
        """Own nothing from now on, and return when the others route by that or a second has passed."""
        self.swim.leave(now=time.monotonic())
        await self._announce()
        if self.swim.table.live > 1:
            # They know; their rings follow.
            await asyncio.sleep(2 * _RING_DEBOUNCE_S)

    async def announce_left(self) -> None:
        """Tell the others that this node is gone for good, then stop."""
        self.swim.left(now=time.monotonic())
        await self._announce()
        await self.close()

    async def close(self) -> None:
        """Stop without a word."""
        self._is_closed = True
        for timer in (self._timer, self._ring_timer, self._settle_timer):
            if timer is not None:
                timer.cancel()
        tasks = [*self._tasks, *(task for _, task in self._watchers.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _announce(self) -> None:
        before = set(self._tasks)
        self._do()
        told = self._tasks - before
        if told:
            await asyncio.wait(told, timeout=_LEAVE_TIMEOUT_S)

    def _do(self) -> None:
        """Do what the core ordered since it was last touched."""
        sends, events = self.swim.take()
        for event in events:
            self._emit(event)
        for send in sends:
            self._spawn(self._deliver(send))
        changes = self.swim.table.changes
        if changes != self._seen_changes and self._ring_timer is None and not self._is_closed:
            self._seen_changes = changes
            self._ring_timer = asyncio.get_running_loop().call_later(_RING_DEBOUNCE_S, self._swap_view)
        if self.swim.wants_seeds:
            self.swim.wants_seeds = False
            if self._foreign_seeds() and not self._is_joining:
                self._spawn(self._rejoin())
        self._set_timer()

    def _others(self) -> list[Member]:
        me = self.swim.me.name
        return [member for member in self.swim.table if not member.is_gone and member.name != me]

    def _set_timer(self) -> None:
        # Alone and without seeds there is nobody to talk to, and no timer.
        if self._is_closed or (len(self.swim.table) == 1 and not self._seeds):
            return
        # What was due while there was no timer, alone, is due now and not late.
        due_s = max(self.swim.next_deadline(), time.monotonic())
        if self._timer is not None:
            if due_s >= self._due_s:
                return
            self._timer.cancel()
        self._due_s = due_s
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(due_s - time.monotonic(), self._on_timer)

    def _on_timer(self) -> None:
        now = time.monotonic()
        lag_s = now - self._due_s
        self.counters.loop_lag_s = lag_s
        self.counters.max_loop_lag_s = max(self.counters.max_loop_lag_s, lag_s)
        if lag_s > _LAG_NOTICED_S:
            log.warning("loop_stalled", extra={"seconds": round(lag_s, 3)})
            self.swim.stalled(lag_s)
            self._timer = asyncio.get_running_loop().call_later(_DRAIN_INBOX_S, self._tick)
            # What arrives meanwhile must not set it anew.
            self._due_s = 0.0
            return
        self._tick()

    def _tick(self) -> None:
        self._timer = None
        self.swim.tick(now=time.monotonic())
        self._do()

    def _swap_view(self) -> None:
        self._ring_timer = None
        members = self._others()
        routable = [member.name for member in self.swim.table if member.is_routable]
        ring = Ring(routable or [self.swim.me.name])
        view = View(
            me=self.swim.me.name,
            ring=ring,
            address_by_name={member.name: member.address for member in members},
            is_active=self.swim.me.phase != Phase.JOINING,
            former=self._former(ring),
        )
        self._watch(members)
        if ring.nodes != self.view.ring.nodes:
            self.counters.ring_changes += 1
            log.info("ring_changed", extra={"nodes": list(ring.nodes), "fingerprint": ring.fingerprint})
        self.view = view
        self._on_view(view)

    def _former(self, ring: Ring) -> tuple[Ring, ...]:
        """Return the rings that others may still route by when this one is the newest."""
        old = self.view
        if ring.nodes == old.ring.nodes:
            return old.former
        others = [name for name in ring.nodes if name != self.swim.me.name]
        if not old.is_active and not others:
            return ()
        if self._settle_timer is not None:
            self._settle_timer.cancel()
        self._settle_timer = asyncio.get_running_loop().call_later(_SETTLE_S, self._settle)
        # Before it joined, a node owned nothing, though it knew of nobody else.
        last = Ring(others) if old.is_alone and not old.is_active else old.ring
        return (*old.former, last)[-_MAX_FORMER:]

    def _settle(self) -> None:
        self._settle_timer = None
        self.view = replace(self.view, former=())
        self._on_view(self.view)

    def _watch(self, members: Sequence[Member]) -> None:
        """Hold a connection to each member, and look into each loss of one."""
        wanted = {member.name: member for member in members[:_MAX_WATCHED]}
        for name, (watched, task) in list(self._watchers.items()):
            member = wanted.get(name)
            if member is None or member.instance != watched.instance or member.address != watched.address:
                del self._watchers[name]
                task.cancel()
                # Another process listens there now, perhaps on another host of that name.
                self._peers.forget(watched.address)
        for name, member in wanted.items():
            if name not in self._watchers:
                self._watchers[name] = (member, self._new_watcher(member))

    def _new_watcher(self, member: Member) -> asyncio.Task[None]:
        # Owned by `_watchers` until `_watch` or `close` cancels it.
        return asyncio.create_task(
            self._peers.watch(member.address, lambda: self.probe(member.name)),
            name=f"watch {member.name}",
        )

    async def _look(self, name: str) -> None:
        """Look, and once more after a pause if there was another sign meanwhile."""
        try:
            while (member := self.swim.table.get(name)) is not None and not member.is_gone:
                self._looks[name] = False
                refused = await is_refused(member.address)
                now = time.monotonic()
                if refused:
                    self.swim.refused(name, now=now)
                else:
                    self.swim.dropped(name, now=now)
                self._do()
                await asyncio.sleep(_LOOK_PAUSE_S)
                if not self._looks[name]:
                    return
        finally:
            del self._looks[name]

    async def _deliver(self, send: Send) -> None:
        """Send a packet; its answer goes back to the core, a failure is looked into."""
        try:
            answer = await self._exchange(send)
        except PeerUnreachable:
            if send.packet.target:
                self.probe(send.packet.target)
        except PeerRefused as exc:
            self._log_once("peer_refuses_us", send.address, str(exc))
        except ClusterError as exc:
            log.debug("packet_lost", extra={"address": send.address, "error": str(exc)})
        else:
            self._take_answer(send, answer)

    def _take_answer(self, send: Send, answer: Packet | None) -> None:
        if answer is not None:
            self.swim.receive(answer, now=time.monotonic())
            self._do()
        elif send.packet.kind == Kind.SYNC and not send.packet.target:
            # Only this node itself does not answer its own sync.
            self._own_addresses.add(send.address)

    async def _exchange(self, send: Send) -> Packet | None:
        body = wire.request(send.packet, self._origin)
        self.counters.packets["out", send.packet.kind.name.lower()] += 1
        self.counters.payload_bytes["out"] += len(body)
        timeout_s = _CALL_TIMEOUT_S * (self.swim.health_score + 1)
        response = await self._peers.call(
            send.address, "Gossip", body, timeout_s=timeout_s, lane=ChannelKind.GOSSIP
        )
        self.counters.payload_bytes["in"] += len(response)
        answer, refusal = wire.parse_response(response)
        if refusal:
            raise PeerRefused(refusal)
        if answer is not None:
            self.counters.packets["in", answer.kind.name.lower()] += 1
        return answer

    async def _join(self) -> None:
        """Ask the seeds until each is a member; serve alone while none is.

        One answer would not do: of nodes that start together, some might find one another and not the rest.
        """
        self._is_joining = True
        wait_s, longest_s = _JOIN_RETRY_S
        while await self._ask_seeds():
            if self.swim.table.live == 1 and self.swim.me.phase == Phase.JOINING:
                log.warning("no_seed_answers", extra={"seeds": list(self._seeds)})
                self.swim.activate(now=time.monotonic())
                self._do()
            await asyncio.sleep(wait_s * (0.5 + self._rng.random()))
            wait_s = min(2 * wait_s, longest_s)
        self._is_joining = False

    async def _rejoin(self) -> None:
        await self._ask_seeds()

    async def _ask_seeds(self) -> bool:
        """Ask every seed that is no member; tell whether one is missing still."""
        self._seed_by_address = await discovery.addresses(self._foreign_seeds())
        found = list(self._seed_by_address)
        before = set(self._tasks)
        self.swim.join(self._strangers(found))
        self._do()
        asked = self._tasks - before
        if asked:
            await asyncio.wait(asked, timeout=_JOIN_TIMEOUT_S)
        return not found or bool(self._strangers(found))

    def _strangers(self, addresses: Sequence[str]) -> list[str]:
        known = {member.address for member in self._others()} | self._own_addresses
        return [address for address in addresses if address not in known]

    def _foreign_seeds(self) -> list[str]:
        return [seed for seed in self._seeds if seed not in self._own_addresses]

    def _emit(self, event: Event) -> None:
        self.events.append(TimedEvent(time.time(), event))
        if event.kind is EventKind.DEAD and event.evidence != "heard":
            self.counters.detections += 1
            self.counters.detection_s_sum += event.seconds
        member = event.member
        fields: dict[str, object] = {
            "node": member.name,
            "address": member.address,
            "generation": member.generation,
            "incarnation": member.incarnation,
        }
        if event.evidence:
            fields["evidence"] = event.evidence
        if event.accuser:
            fields["accuser"] = event.accuser
        if event.confirmations:
            fields["confirmations"] = event.confirmations
        if event.seconds:
            fields["seconds"] = round(event.seconds, 3)
        level = logging.WARNING if event.kind in _WARNINGS else logging.INFO
        log.log(level, event.kind.value, extra=fields)

    def _log_once(self, event: str, peer: str, text: str) -> None:
        """Warn of what may repeat with every packet, now and then."""
        now = time.monotonic()
        if now - self._logged_s.get(event + peer, -_LOG_PAUSE_S) < _LOG_PAUSE_S:
            return
        if len(self._logged_s) >= _MAX_EVENTS:
            self._logged_s.clear()
        self._logged_s[event + peer] = now
        log.error(event, extra={"peer_node": peer[:300], "error": text[:300]})

    def _spawn(self, work: Coroutine[Any, Any, None]) -> bool:
        """Own a task until it ends or `close`; beyond the bound the work is dropped, as by a network."""
        if self._is_closed or len(self._tasks) >= _MAX_CALLS:
            work.close()
            return False
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("gossip_failed", exc_info=exc)
