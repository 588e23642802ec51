"""A simulated cluster: virtual time, a network with faults, and one seed that decides everything.

A link may delay, lose, duplicate and reorder packets and may be cut in one direction; hosts may be
partitioned. A node may crash (its host refuses connections), vanish with its host (silence), leave,
restart under its name at a new address, pause, lose its input and output while its timers run, and
have a clock that is off and drifts. Invariants are checked at every step. What the nodes do about
their seeds and about leaving is what the shell, cluster/gossip.py, does.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from cluster.dissemination import MAX_QUEUED
from cluster.member import Event, EventKind, Member, Packet, Phase, Send, State
from cluster.swim import MAX_UPDATES, Settings, Swim
from cluster.table import Base

LAG_NOTICED_S = 0.1
JOIN_TIMEOUT_S = 1.0
JOIN_RETRY_S = (0.3, 15.0)
LAST_WORDS_S = 0.05
# A timer is late rather than early: one that rounding made early would find nothing due, without end.
TIMER_LATENESS_S = 1e-6


@dataclass
class Link:
    """How a packet fares between two hosts; times in seconds, chances from 0 to 1."""

    min_delay_s: float = 0.0002
    max_delay_s: float = 0.001
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0  # chance of ten times the longest delay


@dataclass(eq=False)
class Node:
    swim: Swim
    address: str
    offset_s: float = 0.0
    rate: float = 1.0
    is_running: bool = True
    paused_until_s: float = 0.0
    is_blocked: bool = False
    is_joining: bool = False
    seeds: list[str] = field(default_factory=list)
    inbox: list[Packet] = field(default_factory=list)
    outbox: list[Send] = field(default_factory=list)
    tick_s: float = float("inf")
    last_seen: dict[str, Member] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.swim.me.name


class World:
    def __init__(self, seed: int, *, settings: Settings | None = None, link: Link | None = None) -> None:
        self.rng = Random(seed)
        self.seed = seed
        self.settings = settings or Settings()
        self.link = link or Link()
        self.now_s = 1000.0
        self.nodes: dict[str, Node] = {}
        self.log: list[tuple[float, str, str, str, int]] = []
        self.watchers: list[Callable[[Node, Event], None]] = []
        self.checks_invariants = True
        self.packets = 0
        self.steps = 0
        self._node_by_address: dict[str, Node] = {}
        self._spoken: dict[str, tuple[int, int]] = {}  # the greatest version that a name gave itself
        self._dark: set[str] = set()
        self._cuts: set[tuple[str, str]] = set()
        self._group_by_address: dict[str, int] = {}
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._numbers = 0

    # -- building

    def add(
        self,
        name: str,
        *,
        address: str = "",
        seeds: Iterable[str] = (),
        offset_s: float = 0.0,
        rate: float = 1.0,
    ) -> Node:
        me = Member(
            name=name,
            address=address or name,
            generation=int((self.now_s + offset_s) * rate * 1000),
            incarnation=0,
            state=State.ALIVE,
            phase=Phase.JOINING,
            instance=self.rng.getrandbits(63),
        )
        node = self._place(me, None, offset_s, rate)
        node.seeds = [seed for seed in seeds if seed != me.address]
        if node.seeds:
            self._join(node, JOIN_RETRY_S[0])
        else:
            node.swim.activate(now=self._clock(node))
            self._settle(node)
        return node

    def add_settled(self, count: int) -> None:
        """Add a cluster that has known itself for long, on one shared base."""
        members = [
            Member(f"n{number}", f"n{number}", 1, 0, State.ALIVE, Phase.ACTIVE, number)
            for number in range(count)
        ]
        base = Base(members)
        for member in members:
            self._settle(self._place(member, base, 0.0, 1.0))

    def _place(self, me: Member, base: Base | None, offset_s: float, rate: float) -> Node:
        now = (self.now_s + offset_s) * rate
        swim = Swim(me, settings=self.settings, rng=Random(self.rng.getrandbits(64)), now=now, base=base)
        node = Node(swim, me.address, offset_s, rate)
        self.nodes[me.name] = node
        self._node_by_address[me.address] = node
        self._dark.discard(me.address)
        return node

    def _join(self, node: Node, wait_s: float) -> None:
        if not node.is_running:
            return
        node.is_joining = True
        node.swim.join(self._unknown(node))
        self._settle(node)
        self.at(self.now_s + JOIN_TIMEOUT_S, self._judge_join, node, wait_s)

    def _judge_join(self, node: Node, wait_s: float) -> None:
        """Serve alone when no seed answered, and go on trying."""
        if node.paused_until_s > self.now_s:
            self.at(node.paused_until_s, self._judge_join, node, wait_s)
            return
        node.is_joining = bool(self._unknown(node))
        if not node.is_running or not node.is_joining:
            return
        if node.swim.table.live == 1:
            node.swim.activate(now=self._clock(node))
            self._settle(node)
        pause_s = wait_s * (0.5 + self.rng.random())
        self.at(self.now_s + pause_s, self._join, node, min(2 * wait_s, JOIN_RETRY_S[1]))

    def _unknown(self, node: Node) -> list[str]:
        members = {member.address for member in node.swim.table if not member.is_gone}
        return [seed for seed in node.seeds if seed not in members]

    # -- faults

    def crash(self, name: str) -> None:
        """The process ends; its host refuses, and every peer sees its connection close."""
        node = self.nodes[name]
        node.is_running = False
        for peer in list(self.nodes.values()):
            if peer.is_running and peer is not node and not self._is_cut(peer.address, node.address):
                self.at(self.now_s + self.rng.random() * 0.005, self._see_refusal, peer, name, node)

    def vanish(self, name: str) -> None:
        """The host is gone: silence."""
        node = self.nodes[name]
        node.is_running = False
        self._dark.add(node.address)

    def leave(self, name: str, *, drain_s: float = 1.0) -> None:
        """The process is told to end: it hands over, answers on for a while, and says announce_left."""
        node = self.nodes[name]
        node.swim.leave(now=self._clock(node))
        self._settle(node)
        self.at(self.now_s + drain_s, self._say_farewell, node)

    def _say_farewell(self, node: Node) -> None:
        if node.is_running:
            node.swim.left(now=self._clock(node))
            self._settle(node)
            self.at(self.now_s + LAST_WORDS_S, self._end, node)

    def _end(self, node: Node) -> None:
        if node.is_running and self.nodes[node.name] is node:
            self.crash(node.name)

    def pause(self, name: str, seconds: float) -> None:
        """The process does nothing, timers and all, as after SIGSTOP or in a stalled loop."""
        node = self.nodes[name]
        node.paused_until_s = self.now_s + seconds
        self.at(node.paused_until_s, self._resume, node)

    def block(self, name: str) -> None:
        """Packets wait, in and out, while timers run: Lifeguard's slow member."""
        self.nodes[name].is_blocked = True

    def unblock(self, name: str) -> None:
        node = self.nodes[name]
        node.is_blocked = False
        outbox, node.outbox = node.outbox, []
        for send in outbox:
            self._transmit(node, send)
        inbox, node.inbox = node.inbox, []
        for packet in inbox:
            self._receive(node, packet)

    def partition(self, *groups: Iterable[str]) -> None:
        self._group_by_address = {
            self.nodes[name].address: number for number, group in enumerate(groups) for name in group
        }

    def cut(self, source: str, target: str) -> None:
        """Lose what goes from one node to another, in this direction only."""
        self._cuts.add((self.nodes[source].address, self.nodes[target].address))

    def heal(self) -> None:
        self._group_by_address = {}
        self._cuts.clear()

    # -- running

    def at(self, time_s: float, act: Callable[..., None], *arguments: object) -> None:
        self._numbers += 1
        heapq.heappush(self._heap, (time_s, self._numbers, act, arguments))

    def run(self, seconds: float) -> None:
        """Let the time pass."""
        self.run_until(lambda: False, seconds)

    def run_until(self, is_met: Callable[[], bool], seconds: float) -> bool:
        """Let the time pass until a condition is met; tell whether it was, within the seconds."""
        end_s = self.now_s + seconds
        while self._heap and self._heap[0][0] <= end_s:
            if is_met():
                return True
            self.step()
        self.now_s = end_s
        return is_met()

    def seconds_to_converge(self, limit_s: float) -> float:
        """Let the time pass; return how much of it went by until all agreed, for good. Fails if never."""
        began_s = apart_s = self.now_s
        end_s = began_s + limit_s
        while self._heap and self._heap[0][0] <= end_s:
            self.step()
            if not self.is_converged():
                apart_s = self.now_s
        self.now_s = end_s
        assert self.is_converged(), self.story()
        return apart_s - began_s

    def step(self) -> None:
        """Let the next thing happen."""
        self.now_s, _, act, arguments = heapq.heappop(self._heap)
        self.steps += 1
        act(*arguments)

    @property
    def running(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.is_running]

    def is_converged(self) -> bool:
        """Whether all running nodes own tokens and hold the same members: those that run, no others."""
        running = self.running
        first = running[0].swim.table
        return all(
            node.swim.table.members_hash == first.members_hash
            and node.swim.table.ring_hash == first.ring_hash
            and node.swim.table.live == len(running)
            and node.swim.me.is_routable
            for node in running
        )

    def log_hash(self) -> str:
        return hashlib.blake2b(repr(self.log).encode(), digest_size=16).hexdigest()

    def story(self, length: int = 60) -> str:
        """Return the seed, the last events and what each running node holds, to find a bug by."""
        lines = [f"seed {self.seed}, {self.now_s:.3f} s"]
        lines += [
            f"{at_s:.3f} {who}: {what} {whom} {inc}" for at_s, who, what, whom, inc in self.log[-length:]
        ]
        for node in self.running:
            held = ", ".join(f"{member.name} {member.status}" for member in node.swim.table)
            lines.append(f"{node.name} holds {held}")
        return "\n".join(lines)

    # -- inside

    def _clock(self, node: Node) -> float:
        return (self.now_s + node.offset_s) * node.rate

    def _settle(self, node: Node) -> None:
        """Do what the core ordered, and see to its next tick."""
        if node.swim.wants_seeds:
            node.swim.wants_seeds = False
            if node.seeds and not node.is_joining:
                node.swim.join(self._unknown(node))
        if self.checks_invariants:
            self._check(node)
        sends, events = node.swim.take()
        for event in events:
            self._note(node, event)
        for send in sends:
            if node.is_blocked:
                node.outbox.append(send)
            else:
                self._transmit(node, send)
        due_s = node.swim.next_deadline() / node.rate - node.offset_s + TIMER_LATENESS_S
        due_s = max(self.now_s, due_s)
        if due_s < node.tick_s or node.tick_s <= self.now_s:
            node.tick_s = due_s
            self.at(due_s, self._tick, node, due_s)

    def _note(self, node: Node, event: Event) -> None:
        self.log.append(
            (self.now_s, node.name, event.kind.value, event.member.name, event.member.incarnation)
        )
        for watcher in self.watchers:
            watcher(node, event)

    def _tick(self, node: Node, due_s: float) -> None:
        if not node.is_running or due_s != node.tick_s:
            return
        if node.paused_until_s > self.now_s:
            return
        node.tick_s = float("inf")
        node.swim.tick(now=self._clock(node))
        self._settle(node)

    def _resume(self, node: Node) -> None:
        if not node.is_running or node.paused_until_s > self.now_s:
            return
        lag_s = self.now_s - min(node.tick_s, self.now_s)
        if lag_s > LAG_NOTICED_S:
            node.swim.stalled(lag_s * node.rate)
        inbox, node.inbox = node.inbox, []
        for packet in inbox:
            self._receive(node, packet)
        node.tick_s = self.now_s
        self._tick(node, self.now_s)

    def _transmit(self, node: Node, send: Send) -> None:
        self.packets += 1
        link, rng = self.link, self.rng
        copies = 1 + (link.duplication > 0 and rng.random() < link.duplication)
        for _ in range(copies):
            if link.loss and rng.random() < link.loss:
                continue
            delay_s = link.min_delay_s + rng.random() * (link.max_delay_s - link.min_delay_s)
            if link.reordering and rng.random() < link.reordering:
                delay_s += 10 * link.max_delay_s
            self.at(self.now_s + delay_s, self._arrive, node, send)

    def _arrive(self, source: Node, send: Send) -> None:
        if self._is_cut(source.address, send.address) or send.address in self._dark:
            return
        target = self._node_by_address.get(send.address)
        if target is None or not target.is_running:
            if target is not None and source.is_running and send.packet.target:
                self._see_refusal(source, send.packet.target, target)
            return
        self._receive(target, send.packet)

    def _receive(self, node: Node, packet: Packet) -> None:
        if not node.is_running:
            return
        if node.is_blocked or node.paused_until_s > self.now_s:
            node.inbox.append(packet)
            return
        answer = node.swim.receive(packet, now=self._clock(node))
        if answer is not None:
            reply = Send(packet.sender.address, answer)
            if node.is_blocked:
                node.outbox.append(reply)
            else:
                self._transmit(node, reply)
        self._settle(node)

    def _see_refusal(self, node: Node, name: str, dead: Node) -> None:
        if node.is_running and not dead.is_running and node.paused_until_s <= self.now_s:
            node.swim.refused(name, now=self._clock(node))
            self._settle(node)

    def _is_cut(self, source: str, target: str) -> bool:
        groups = self._group_by_address
        if groups and groups.get(source, -1) != groups.get(target, -1):
            return True
        return (source, target) in self._cuts

    def _check(self, node: Node) -> None:
        swim = node.swim
        assert len(swim._updates) <= MAX_QUEUED
        assert len(swim._probes) <= 64
        assert max(len(swim._relays), len(swim._drops_s)) <= 256
        assert len(swim._rivals) <= 8
        assert max(len(swim._early_s), len(swim._gone_since_s)) <= len(swim.table)
        assert all(len(send.packet.updates) <= MAX_UPDATES for send in swim._outputs)
        assert all(send.address != node.address for send in swim._outputs), f"seed {self.seed}: to itself"
        me = swim.me
        assert swim.table.get(me.name) is me
        self._spoken[me.name] = max(self._spoken.get(me.name, (0, 0)), me.version[:2])
        for member in swim.table:
            self._check_claim(node, member)

    def _check_claim(self, node: Node, member: Member) -> None:
        seen = node.last_seen.get(member.name)
        if seen is member:
            return
        node.last_seen[member.name] = member
        about = f"seed {self.seed}, {self.now_s:.3f} s: {node.name} on {member.name}"
        assert seen is None or member.version > seen.version, f"{about}: a version fell"
        is_suspected = member.name in node.swim._suspicions
        assert is_suspected == (member.state == State.SUSPECT), f"{about}: a suspect without a deadline"
        if member.name in self._spoken:
            assert member.version[:2] <= self._spoken[member.name], f"{about}: another raised its incarnation"


def false_deaths(world: World, healthy: Callable[[str], bool]) -> list[tuple[float, str, str]]:
    """Collect the deaths of healthy members that any node declares from now on."""
    found: list[tuple[float, str, str]] = []

    def watch(node: Node, event: Event) -> None:
        # Where it is declared, not where it is heard.
        if event.kind is EventKind.DEAD and event.evidence != "heard" and healthy(event.member.name):
            found.append((world.now_s, node.name, event.member.name))

    world.watchers.append(watch)
    return found
