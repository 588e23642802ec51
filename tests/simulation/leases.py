"""Leases in virtual time: the real `cluster.lease.Lease` of some nodes, a model of the store, and a seed.

A schedule is a life of a few virtual seconds: nodes read, write, choose rings that disagree, stand still,
crash, come back, and meet a second process of their name. Messages and statements come late, in another
order, or not at all. The store stands still, restarts, or is replaced by a copy that lacks the last
renewals. What a shell does about the decisions of `Lease` is in `Node`, as plainly as possible.

The check is in `World.served`: a read that arrived after the acknowledgement of a version returns this
version or a later one. Absence of a session is a version too. A read may also join a load that is under way.

`without` names what is left out: each rule that is left out must let a stale read through. Dictionaries and
lists only, no sets of names: a seed must mean the same in each process.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

from cluster.lease import (
    ACTIVATION_US,
    BAR_US,
    LOOK_US,
    PERIOD_US,
    TELL_US,
    Answer,
    Lease,
    MayHave,
    Wait,
)
from cluster.mirrors import Grants
from cluster.node_row import Barred, NodeRow, Renewal, Renewed

_S: Final = 1_000_000
_MS: Final = 1000
STORE: Final = "store"
ANSWER_TIMEOUT_US: Final = 1 * _S
SETTLE_TIMEOUT_US: Final = 6 * _S
LOAD_TIMEOUT_US: Final = 3 * _S
LATEST_US: Final = 2500 * _MS  # of a message
FORWARD_TIMEOUT_US: Final = 250 * _MS
KEEP_US: Final = 10 * _S  # of a mirror, at most
MAX_GRANTS: Final = [1, 8]  # tokens
NO_RING: Final = ""

Steps = Generator[Any, Any, None]
Part = Generator[Any, Any, bool]

# What a world counts.
COUNTED: Final = (
    "events",
    "reads",
    "copies_served",
    "mirrors_served",
    "writes_kept",
    "acknowledgements",
    "quick",
    "recalls",
    "bars",
    "unknown",
)

# What can be left out: of the rules of cluster/lease.py, of what a shell does, and of what a store does.
RULES: Final = {
    "telling": "8: a write tells nobody, and waits for nobody",
    "waiting": "10: a write does not wait after a bar",
    "waiting for others' bars": "10: a write does not wait for nodes that others have barred",
    "lease check": "2: a lease that was given once is valid for ever",
    "flush at a new epoch": "3: a barred node keeps its copies",
    "flush after a lapse": "3: a node whose lease has run out keeps its copies",
    "activation of a node": "4: a node that registers serves at once",
    "activation of a ring": "4: a token that a ring has given to a node is served at once",
    "renewing first": "6: a write decides by old rows",
    "number": "1: the store takes a renewal that is older than its row",
    "instance": "1: the store takes a renewal of another process at once",
    "rival": "9: another process of the writer's name is not barred",
    "bar": "11: a barred node serves again as soon as it has seen the new epoch",
    "end of a bar": "11: a writer counts a bar twice as long as the barred node does",
    "whole lapse": "16: a row that did not change for a third of a lease has lapsed",
    "complete rows": "14: a write does not wait for rows that a promoted copy lacks",
    "generations": "5: a copy from before a ring that gave its token away is used again",
    "number of publication": "4: any answer with the name of the ring counts as its publication",
    "closed fills": "8: a node that is told drops its copy, and goes on loading",
    "confirming instance": "8: another process of the holder's name may confirm",
    "recording first": "17: an owner records a grant after its answer",
    "memory of grants": "17: an owner whose lease has run out forgets what it granted",
    "bound of grants": "17: an owner that can record no more grants goes on granting",
    "activation of a mirror": "18: a mirror is served by the present ring alone",
    "rings without a node": "18: a node has mirrors by a ring by which it owns nothing",
    "granting process": "18: a mirror is kept when another process has the owner's name",
    "end of a mirror": "18: a mirror is served for longer than it was granted",
    "lease of a mirror": "18: a mirror is served without a lease",
    "generations of mirrors": "18: a mirror from before another owner is served again",
    "fills of mirrors": "19: a node that is told drops its mirror, and takes one that is on its way",
    "recall": "20: a write by 7 tells nobody",
    "second round": "21: a write by 8 tells all nodes once",
    "fill of a write": "22: a writer keeps what it has written, though another write has ended since",
    "right of a write": "22: a writer keeps what it has written, though it may serve no copy",
    "lease of a write": "22: a write that has waited asks for its store without a lease, and is kept",
    "generation of a write": "22: a write that has waited is kept by the ring of then, not that of its call",
    "missing row": "9: a node without a row has resigned, also if the store is another one",
}


class Broken(Lease):
    """A lease that leaves rules out."""

    __slots__ = ("without",)

    def __init__(self, name: str, instance: int, without: tuple[str, ...]) -> None:
        super().__init__(name, instance)
        self.without = without

    def is_valid(self, now_us: int) -> bool:
        if "lease check" in self.without:
            return self.until_us != 0
        return super().is_valid(now_us)

    def answered(self, renewal: Renewal, answer: Renewed, *, sent_us: int, received_us: int) -> Answer:
        answered = super().answered(renewal, answer, sent_us=sent_us, received_us=received_us)
        if (answered.why == "barred" and "flush at a new epoch" in self.without) or (
            answered.why == "lapsed" and "flush after a lapse" in self.without
        ):
            return answered._replace(must_drop=False)
        return answered

    def _renewed(self, own: NodeRow, received_us: int, *, is_replaced: bool) -> str:
        before_us = self.barred_until_us
        why = super()._renewed(own, received_us, is_replaced=is_replaced)
        if "end of a bar" in self.without and self.barred_until_us != before_us:
            self.barred_until_us -= BAR_US // 2
        if "activation of a node" in self.without:
            self._active_from_us = 0
        if "bar" in self.without:
            self.barred_until_us = 0
        return why

    def knows_others(self, now_us: int) -> bool:
        if "renewing first" in self.without:
            return self._rows_sent_us is not None
        return super().knows_others(now_us)

    def complete_from_us(self) -> int:
        if "complete rows" in self.without:
            return 0
        return super().complete_from_us()

    def waits(self, now_us: int, may_have: MayHave) -> list[Wait]:  # type: ignore[override]
        return [] if "waiting for others' bars" in self.without else super().waits(now_us, may_have)

    def barred(self, name: str, bar: Barred | None, *, sent_us: int, received_us: int) -> Wait:
        wait = super().barred(name, bar, sent_us=sent_us, received_us=received_us)
        return wait._replace(until_us=0) if bar is None and "missing row" in self.without else wait

    def rival(self) -> str:
        return "" if "rival" in self.without else super().rival()

    def _look(self, rows: Iterable[NodeRow], sent_us: int, received_us: int) -> NodeRow | None:
        if "whole lapse" in self.without:
            sent_us += 1000 * _MS
        own = super()._look(rows, sent_us, received_us)
        if "whole lapse" in self.without:
            self._rows_sent_us = sent_us - 1000 * _MS
        return own


def token_name(token: int) -> str:
    return f"token{token}"


class Store:
    """Single statements on single rows, each at one moment; `undo` has what a promoted copy may lack."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[str, NodeRow] = {}
        self.versions: dict[int, int] = {}
        self.identity = "1"
        self.stands_still_until_us = 0
        self._undo: list[tuple[int, str, NodeRow | None]] = []

    def renew(self, renewal: Renewal) -> Renewed:
        row = self.rows.get(renewal.name)
        new = None
        if row is None:
            epoch = renewal.seen + 1
            new = NodeRow(*renewal[:4], epoch, epoch, renewal.seen)
        elif self._may_replace(row, renewal):
            epoch = row.epoch if renewal.seen <= row.epoch else renewal.seen + 1
            new = NodeRow(*renewal[:4], epoch, row.base, renewal.seen)
        if new is not None:
            self._put(renewal.name, new)
        return Renewed(tuple(self.rows.values()), self.identity, 0)

    def _may_replace(self, row: NodeRow, renewal: Renewal) -> bool:
        without = self.world.without
        if row.instance != renewal.instance:
            return row.version == renewal.replaces or "instance" in without
        return renewal.number > row.number or "number" in without

    def bar(self, name: str) -> Barred | None:
        row = self.rows.get(name)
        if row is None:
            return None
        self._put(name, row._replace(epoch=row.epoch + 1))
        self._undo.clear()
        return Barred(row.epoch + 1, row.instance, row.number, self.identity)

    def resign(self, name: str, instance: int) -> None:
        row = self.rows.get(name)
        if row is not None and row.instance == instance:
            self._put(name, None)

    def write(self, token: int) -> int:
        self.world.versions += 1
        self.versions[token] = self.world.versions
        return self.read(token)

    def read(self, token: int) -> int:
        return self.versions.get(token, 0)

    def end_again(self, token: int) -> int:
        """End a session that has ended: nothing changes, but the caller learns that it is gone."""
        return self.read(token)

    def promote_copy(self, lag_us: int) -> None:
        """Go on with a copy that lacks the renewals of the last `lag_us`, but no write and no bar."""
        since_us = self.world.now_us - lag_us
        while self._undo and self._undo[-1][0] >= since_us:
            _, name, row = self._undo.pop()
            self._set(name, row)
        self._undo.clear()
        self.identity = str(int(self.identity) + 1)

    def _put(self, name: str, row: NodeRow | None) -> None:
        self._undo.append((self.world.now_us, name, self.rows.get(name)))
        self._set(name, row)

    def _set(self, name: str, row: NodeRow | None) -> None:
        if row is None:
            self.rows.pop(name, None)
        else:
            self.rows[name] = row


class Reply:
    """What somebody waits for: the first value counts; None: no answer in time."""

    __slots__ = ("is_set", "node", "steps", "value")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.steps: Steps | None = None
        self.is_set = False
        self.value: Any = None

    def set(self, value: object) -> None:
        if self.is_set:
            return
        self.is_set, self.value = True, value
        if self.steps is not None:
            self.node.go_on(self.steps, value)


# Gets what was read.
Reader = Callable[[int], None]


@dataclass(slots=True, eq=False)
class Load:
    token: int
    generation: int
    readers: list[Reader]
    is_open: bool = True


@dataclass(slots=True, eq=False)
class WriteFill:
    generation: int
    is_open: bool


@dataclass(frozen=True, slots=True)
class Granted:
    """What comes with the owner's answer, or is kept of it."""

    version: int
    owner: str
    instance: int  # 0: nothing was granted
    until_us: int  # how long it may be kept; once it is, until when
    generation: int = 0


@dataclass(slots=True, eq=False)
class MirrorFill:
    asked_us: int
    generation: int
    is_open: bool


class Node:
    """One process: its cache, its rings, and what it does about the decisions of its lease."""

    def __init__(self, world: World, name: str, instance: int) -> None:
        self.world = world
        self.name = name
        rng = world.rng
        self.rate = rng.choice([0.98, 1.0, 1.02, 0.98 + 0.04 * rng.random()])
        self.offset_us = rng.randrange(10**6, 10**12)
        self.lease = Broken(name, instance, world.without) if world.without else Lease(name, instance)
        self.is_running = True
        self.is_leaving = False
        self.stands_still_until_us = 0
        self.copies: dict[int, tuple[int, int]] = {}  # version and generation by token
        self.loads: dict[int, Load] = {}
        self.write_fills: dict[int, list[WriteFill]] = {}
        self.rings = [NO_RING]  # the last one is routed by; from the last that was published for ACTIVATION
        self.ring_active_us: int | None = None
        self.generation = 0
        self.given_away: dict[int, int] = {}  # by token: the last generation by which another one owned it
        self.rebarred: dict[str, int] = {}
        self.mirrors: dict[int, Granted] = {}  # by token
        self.mirror_fills: dict[int, list[MirrorFill]] = {}
        self.owned_since: dict[int, int] = {}  # by token: the generation in which its owner became that
        self.grants = self._no_grants()

    def __str__(self) -> str:
        return f"{self.name}.{self.lease.instance}"

    def _no_grants(self) -> Grants:
        return Grants(max_tokens=self.world.max_grants, keep_us=KEEP_US)

    # Time.

    def now_us(self) -> int:
        return self.offset_us + int(self.world.now_us * self.rate)

    def later(self, delay_us: int, call: Callable[..., object], *arguments: object) -> None:
        late_us = self.world.rng.randrange(2 * _MS)
        self.world.at(self.world.now_us + int(delay_us / self.rate) + late_us, self.enter, call, *arguments)

    def enter(self, call: Callable[..., object], *arguments: object) -> None:
        """Run it, or let it wait until the process goes on; what has waited comes in any order."""
        if not self.is_running:
            return
        if self.world.now_us < self.stands_still_until_us:
            at_us = self.stands_still_until_us + self.world.rng.randrange(20 * _MS)
            self.world.at(at_us, self.enter, call, *arguments)
            return
        call(*arguments)

    def go_on(self, steps: Steps, value: object = None) -> None:
        """Run a piece of work up to its next wait: for microseconds, or for a reply."""
        while True:
            try:
                wait = steps.send(value)
            except StopIteration:
                return
            if isinstance(wait, int):
                self.later(wait, self.go_on, steps)
                return
            if not wait.is_set:
                wait.steps = steps
                self.world.waiting.append(wait)
                return
            value = wait.value

    def ask(self, call: Callable[..., object], *arguments: object) -> Reply:
        """Have the store run a statement; the reply is a tuple with its result."""
        reply = Reply(self)
        self.world.ask_store(self, lambda: call(*arguments), lambda result: reply.set((result,)))
        self.later(ANSWER_TIMEOUT_US, reply.set, None)
        return reply

    # The lease.

    def live(self) -> Steps:
        while not self.is_leaving:
            self.renew()
            yield PERIOD_US

    def renew(self) -> Reply:
        renewal, sent_us, generation = self.lease.renewal(), self.now_us(), self.generation
        reply = Reply(self)

        def received(answer: Renewed) -> None:
            received_us = self.now_us()
            if self.world.rng.random() < self.world.stop_chance:
                # It stands still between the reading of its clock and what follows.
                self.stand_still(self.world.rng.randrange(3 * _S))
            self.enter(self._renewed, renewal, answer, (sent_us, received_us, generation), reply)

        self.world.ask_store(self, lambda: self.world.store.renew(renewal), received, is_renewal=True)
        self.later(ANSWER_TIMEOUT_US, reply.set, None)
        return reply

    def _renewed(self, renewal: Renewal, answer: Renewed, times: tuple[int, int, int], reply: Reply) -> None:
        sent_us, received_us, generation = times
        meaning = self.lease.answered(renewal, answer, sent_us=sent_us, received_us=received_us)
        self.world.tell("%s renewed %s %s", self, renewal, meaning)
        if meaning.must_drop:
            self.drop_all()
            if "memory of grants" in self.world.without:
                self.grants = self._no_grants()
        if meaning.is_renewed and self.ring_active_us is None:
            is_of_ring = generation == self.generation
            if "number of publication" in self.world.without:
                is_of_ring = renewal.ring == self.lease.ring
            if is_of_ring:
                self.ring_active_us = received_us + ACTIVATION_US
        if meaning.must_drop and not self.is_leaving:
            self.renew()
        reply.set(meaning)

    def route_by(self, ring: str) -> None:
        before = self.rings[-1]
        if ring == before or self.is_leaving:
            return
        self.world.tell("%s routes by %r", self, ring)
        self._forget_rings(self.now_us())
        self.generation += 1
        self.rings.append(ring)
        self.ring_active_us = None
        for token in self.world.tokens:
            if self.world.owner(ring, token) != self.name:
                self.given_away[token] = self.generation
            if self._granter(ring, token) != self._granter(before, token):
                self.owned_since[token] = self.generation
        # Who owns nothing by a ring shows none.
        self.lease.route_by(ring if self.name in self.world.members(ring) else NO_RING)
        self.renew()

    def _forget_rings(self, now_us: int) -> None:
        is_active = self.ring_active_us is not None and now_us >= self.ring_active_us
        if is_active or "activation of a ring" in self.world.without:
            del self.rings[:-1]

    def leave(self) -> None:
        self.world.tell("%s leaves", self)
        self.route_by(NO_RING)
        self.is_leaving = True
        self.lease.resign()
        self.drop_all()
        self.ask(self.world.store.resign, self.name, self.lease.instance)
        self.later(self.world.rng.randrange(1 * _S), self.end)

    def end(self) -> None:
        self.is_running = False
        self.world.nodes.remove(self)

    def stand_still(self, duration_us: int) -> None:
        self.world.tell("%s stands still for %d", self, duration_us)
        self.stands_still_until_us = max(self.stands_still_until_us, self.world.now_us + duration_us)

    # Copies and reads.

    def may_serve(self, token: int, now_us: int) -> bool:
        if not self.lease.is_valid(now_us):
            return False
        if len(self.rings) > 1:
            self._forget_rings(now_us)
        return all(self.world.owner(ring, token) == self.name for ring in self.rings)

    def _granter(self, ring: str, token: int) -> str:
        """Return the node that may have granted a mirror by a ring."""
        owns = self.name in self.world.members(ring) or "rings without a node" in self.world.without
        return self.world.owner(ring, token) if owns else ""

    def may_mirror(self, token: int, owner: str, now_us: int) -> bool:
        if not self.lease.is_valid(now_us) and "lease of a mirror" not in self.world.without:
            return False
        if len(self.rings) > 1:
            self._forget_rings(now_us)
        rings = self.rings[-1:] if "activation of a mirror" in self.world.without else self.rings
        return all(self._granter(ring, token) == owner for ring in rings)

    def _may_serve_mirror(self, token: int, mirror: Granted, now_us: int) -> bool:
        without = self.world.without
        return (
            (now_us < mirror.until_us or "end of a mirror" in without)
            and (mirror.generation >= self.owned_since.get(token, 0) or "generations of mirrors" in without)
            and (mirror.instance == self.lease.instance_of(mirror.owner) or "granting process" in without)
        )

    def _is_usable(self, token: int, generation: int) -> bool:
        return generation > self.given_away.get(token, -1) or "generations" in self.world.without

    def drop(self, token: int) -> None:
        self.copies.pop(token, None)
        self.drop_mirror(token)
        if "fill of a write" not in self.world.without:
            for fill in self.write_fills.get(token, ()):
                fill.is_open = False
        if "closed fills" not in self.world.without:
            load = self.loads.pop(token, None)
            if load is not None:
                load.is_open = False

    def drop_mirror(self, token: int) -> None:
        self.mirrors.pop(token, None)
        if "fills of mirrors" not in self.world.without:
            for fill in self.mirror_fills.get(token, ()):
                fill.is_open = False

    def drop_all(self) -> None:
        self.copies.clear()
        self.mirrors.clear()
        for fills in self.mirror_fills.values():
            for fill in fills:
                fill.is_open = False
        for writes in self.write_fills.values():
            for write in writes:
                write.is_open = False
        for load in self.loads.values():
            load.is_open = False
        self.loads.clear()

    def read(self, token: int) -> None:
        """Answer a client's call."""
        floor = (self.world.acknowledged.get(token, 0), self.world.now_us)
        owner = self.world.owner(self.rings[-1], token)

        def answer(version: int) -> None:
            self.world.served(self, token, version, floor)

        if owner not in ("", self.name):
            self._read_elsewhere(token, owner, answer)
            return
        copy = self._answer(token, answer)
        if copy is not None:
            self.world.copies_served += 1
            answer(copy)

    def _answer(self, token: int, reader: Reader) -> int | None:
        """Return the copy that may be served; None: it is loaded, and the reader gets it."""
        if not self.may_serve(token, self.now_us()):
            self._load(Load(token, self.generation, [reader], is_open=False))
            return None
        copy = self.copies.get(token)
        if copy is not None and self._is_usable(token, copy[1]):
            return copy[0]
        load = self.loads.get(token)
        if load is not None and self._is_usable(token, load.generation):
            load.readers.append(reader)
            return None
        load = Load(token, self.generation, [reader])
        self.loads[token] = load
        self._load(load)
        self.later(LOAD_TIMEOUT_US, self._give_up, load)
        return None

    def _load(self, load: Load) -> None:
        self.world.ask_store(
            self, lambda: self.world.store.read(load.token), lambda version: self._loaded(load, version)
        )

    def _loaded(self, load: Load, version: int) -> None:
        if load.is_open:
            load.is_open = False
            self.loads.pop(load.token, None)
            self.copies[load.token] = (version, load.generation)
        for reader in load.readers:
            reader(version)
        load.readers.clear()

    def _give_up(self, load: Load) -> None:
        if load.is_open:
            load.is_open = False
            self.loads.pop(load.token, None)
        load.readers.clear()

    # Mirrors.

    def _read_elsewhere(self, token: int, owner: str, reader: Reader) -> None:
        """Answer from the mirror; without one ask the owner, and in the end the store."""
        now_us = self.now_us()
        may_mirror = self.may_mirror(token, owner, now_us)
        mirror = self.mirrors.get(token)
        if may_mirror and mirror is not None and self._may_serve_mirror(token, mirror, now_us):
            self.world.mirrors_served += 1
            reader(mirror.version)
            return
        fill = MirrorFill(now_us, self.generation, may_mirror)
        self.mirror_fills.setdefault(token, []).append(fill)
        self.go_on(self._forwarded(token, owner, fill, reader))

    def _forwarded(self, token: int, owner: str, fill: MirrorFill, reader: Reader) -> Steps:
        reply = Reply(self)
        self.later(FORWARD_TIMEOUT_US, reply.set, None)
        targets = [node for node in self.world.nodes if node.name == owner]
        if targets:
            target = self.world.rng.choice(targets)
            self.world.send(self.name, owner, target.enter, target.asked, token, self, fill.is_open, reply)
        answer: Granted | None = yield reply
        self.mirror_fills[token].remove(fill)
        if answer is None:
            self._load(Load(token, self.generation, [reader], is_open=False))
            return
        if fill.is_open and answer.instance and self._is_of(answer):
            until_us = fill.asked_us + answer.until_us
            self.mirrors[token] = replace(answer, until_us=until_us, generation=fill.generation)
        reader(answer.version)

    def _is_of(self, answer: Granted) -> bool:
        is_known = answer.instance == self.lease.instance_of(answer.owner)
        return is_known or "granting process" in self.world.without

    def asked(self, token: int, node: Node, wants_grant: bool, reply: Reply) -> None:  # noqa: FBT001
        """Answer a call that another node has forwarded, with a grant if it is of a copy."""

        def answer(version: int, keep_us: int = 0) -> None:
            instance = self.lease.instance if keep_us else 0
            granted = Granted(version, self.name, instance, keep_us)
            self.world.send(self.name, node.name, node.enter, reply.set, granted)

        copy = self._answer(token, answer)
        if copy is None:
            return
        keep_us = self.world.rng.randrange(KEEP_US) if wants_grant else 0
        if keep_us and "recording first" in self.world.without:
            self.later(
                20 * _MS, lambda: self.grants.grant(token_name(token), node.name, now_us=self.now_us())
            )
        elif keep_us and not self.grants.grant(token_name(token), node.name, now_us=self.now_us()):
            keep_us = keep_us if "bound of grants" in self.world.without else 0
        answer(copy, keep_us)

    # Writes.

    def write(
        self, token: int, statement: Callable[[int], int], *, keeps: bool = False, wait_us: int = 0
    ) -> Steps:
        """Run a statement, after a wait for those before it, and settle it; keep a copy, or none."""
        has_right = self.may_serve(token, self.now_us()) or "right of a write" in self.world.without
        generation = self.generation
        if wait_us:
            yield wait_us
        fill = self._write_fill(generation, may_keep=keeps and has_right)
        self.write_fills.setdefault(token, []).append(fill)
        result = yield self.ask(statement, token)
        self.world.tell("%s wrote %d: %s", self, token, result)
        self.write_fills[token].remove(fill)
        self.drop(token)
        if result is not None and fill.is_open:
            self.world.writes_kept += 1
            self.copies[token] = (result[0], fill.generation)
        is_settled = yield from self.settle(token)
        if result is None or not is_settled:
            self.world.unknown += 1
            return
        self.world.acknowledge(self, token, result[0])

    def _write_fill(self, generation: int, *, may_keep: bool) -> WriteFill:
        without = self.world.without
        has_lease = self.lease.is_valid(self.now_us())
        if "lease of a write" in without:
            has_lease = True
        if "generation of a write" in without:
            generation = self.generation
        return WriteFill(generation, may_keep and has_lease)

    def settle(self, token: int) -> Part:
        """See that no node serves what was before; False: that cannot be said."""
        is_known = yield from self._known_others()
        if not is_known:
            return False
        now_us = self.now_us()
        if "telling" in self.world.without:
            return True
        if self.lease.agrees and self.may_serve(token, now_us):
            return (yield from self._recalled(token))
        if not (yield from self._cleared(token, lambda _name: True)):
            return False
        if "second round" in self.world.without:
            return True
        is_known = yield from self._known_others()
        self.drop_mirror(token)
        return is_known and (yield from self._cleared(token, lambda _name: True))

    def _recalled(self, token: int) -> Part:
        granted = set() if "recall" in self.world.without else self.grants.holders([token_name(token)])
        if not granted:
            self.world.quick += 1
            return True
        self.world.recalls += 1
        return (yield from self._cleared(token, granted.__contains__, is_recall=True))

    def _known_others(self) -> Part:
        for _ in range(3):
            if self.lease.knows_others(self.now_us()):
                return True
            yield self.renew()
        return self.lease.knows_others(self.now_us())

    def _cleared(self, token: int, may_have: MayHave, *, is_recall: bool = False) -> Part:
        """See that no node that may have an older copy has it; False: that cannot be said."""
        now_us, count = self.now_us(), self.grants.count
        waits, rival = self.lease.waits(now_us, may_have), self.lease.rival()
        names = sorted(self.lease.holders(now_us, may_have))
        unsure = yield from self._told(token, names)
        if is_recall:
            told = [name for name in names if name not in unsure]
            self.grants.dropped([token_name(token)], told, count=count)
        if rival:
            unsure.append(rival)
        for name in unsure:
            wait = yield from self._bar(name, token)
            if wait is None:
                return False
            waits += wait
        return "waiting" in self.world.without or (yield from self._waited(waits))

    def _told(self, token: int, names: list[str]) -> Generator[Any, Any, list[str]]:
        """Tell nodes; return those that have not confirmed."""
        instance_by_name = {row.name: row.instance for row in self.lease.rows}
        replies = [(name, self._told_one(token, name, instance_by_name[name])) for name in names]
        unsure = []
        for name, reply in replies:
            if (yield reply) is None:
                unsure.append(name)
        return unsure

    def _told_one(self, token: int, name: str, instance: int) -> Reply:
        reply = Reply(self)
        self.later(TELL_US, reply.set, None)
        targets = [node for node in self.world.nodes if node.name == name]
        if not targets:
            return reply
        target = self.world.rng.choice(targets)
        if target.lease.instance != instance and "confirming instance" not in self.world.without:
            return reply

        def be_told() -> None:
            target.drop(token)
            self.world.send(target.name, self.name, self.enter, reply.set, True)

        self.world.send(self.name, target.name, target.enter, be_told)
        return reply

    def _bar(self, name: str, token: int) -> Generator[Any, Any, list[Wait] | None]:
        """Bar a node; return for what to wait, None if it is not known whether it was barred."""
        for _ in range(2):
            sent_us = self.now_us()
            answer = yield self.ask(self.world.store.bar, name)
            if answer is None:
                continue
            self.world.bars += 1
            wait = self.lease.barred(name, answer[0], sent_us=sent_us, received_us=self.now_us())
            self.world.tell("%s barred %s: %s", self, name, wait)
            if answer[0] is not None and name != self.name and name not in self.rebarred:
                self.rebarred[name] = token
                self.go_on(self._keep_barred(name))
            return [wait]
        return None

    def _waited(self, waits: list[Wait]) -> Part:
        give_up_us = self.now_us() + SETTLE_TIMEOUT_US
        while True:
            now_us = self.now_us()
            waits = [wait for wait in waits if not self.lease.is_over(wait, now_us)]
            if not waits and now_us >= self.lease.complete_from_us():
                return True
            if now_us >= give_up_us:
                return False
            self.renew()
            yield LOOK_US

    def _keep_barred(self, name: str) -> Steps:
        """Bar a node again before its bar is over, as long as it cannot be told (rule 12)."""
        while (ends_us := self.lease.bar_ends_us(name)) > self.now_us():
            if not (yield from self._told(self.rebarred[name], self._known(name))):
                break
            if ends_us - self.now_us() < BAR_US // 2:
                yield from self._bar(name, self.rebarred[name])
            yield 5 * LOOK_US
        del self.rebarred[name]

    def _known(self, name: str) -> list[str]:
        return [row.name for row in self.lease.rows if row.name == name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stale:
    """A read that returned what it should not."""

    at_us: int
    arrived_us: int
    node: str
    token: int
    version: int
    wanted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What a schedule is like: chances from 0 to 1, times between two events in microseconds."""

    slow: float
    loss: float
    nodes: int
    read_every_us: int
    write_every_us: int
    ring_every_us: int
    ring_together: float  # how many changes of the ring are of all nodes
    owner: float  # how many calls come to a node that owns their token by its own ring
    fault_every_us: int
    faults: list[Callable[[World], None]]


def _weather(rng: Random) -> Weather:
    weather = Weather(
        slow=rng.choice([0.0, 0.0, 0.02, 0.1]),
        loss=rng.choice([0.0, 0.0, 0.005, 0.03]),
        nodes=rng.choice([2, 2, 3, 3, 4, 5]),
        read_every_us=rng.choice([30, 100]) * _MS,
        write_every_us=rng.choice([200, 1000, 3000]) * _MS,
        ring_every_us=rng.choice([700, 2500, 10_000]) * _MS,
        ring_together=0.5,
        owner=rng.choice([0.2, 0.7]),
        fault_every_us=rng.choice([500, 1500, 4000]) * _MS,
        faults=rng.sample(FAULTS, rng.randint(1, 4)),
    )
    # Some holes need several rare things at once: a third of the schedules has few kinds of faults.
    return replace(weather, **rng.choice(SCENES)) if rng.random() < 0.35 else weather


@dataclass(eq=False)
class World:
    """All nodes and the store of one schedule; the seed decides everything."""

    seed: int
    without: tuple[str, ...] = ()
    length_us: int = 16 * _S
    log: list[str] | None = None  # filled if there is one
    is_quiet: bool = False  # nothing happens by itself, and no message is late: for one history
    now_us: int = 0
    versions: int = 0
    events: int = 0
    reads: int = 0
    copies_served: int = 0
    acknowledgements: int = 0
    mirrors_served: int = 0
    writes_kept: int = 0  # copies of what their node has written
    quick: int = 0  # settled without telling anybody
    recalls: int = 0  # settled by telling those that have a grant
    bars: int = 0
    unknown: int = 0
    stale: Stale | None = None
    nodes: list[Node] = field(default_factory=list)
    waiting: list[Reply] = field(default_factory=list)
    acknowledged: dict[int, int] = field(default_factory=dict)  # the newest version by token

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.weather = _weather(self.rng)
        self.stop_chance = self.rng.choice([0.0, 0.01])
        self.max_grants = self.rng.choice(MAX_GRANTS)
        self.store = Store(self)
        self.tokens = range(self.rng.randrange(1, 3))
        self._queue: list[tuple[int, int, Callable[..., object], tuple[object, ...]]] = []
        self._pushed = 0
        self._instances = 0
        self._cuts: dict[tuple[str, str], int] = {}
        self._held: dict[str, int] = {}
        self.lacking_until_us = 0
        self.names = list("abcde"[: self.weather.nodes])
        self.victim = self.rng.choice(self.names)  # most faults hit the same node
        self._owners = self._made_rings()
        self._members = {**self._made_members(), NO_RING: []}
        if self.is_quiet:
            self.weather, self.stop_chance = replace(self.weather, slow=0.0, loss=0.0), 0.0
            self.names, self.tokens, self.max_grants = ["a", "b", "c"], range(1), max(MAX_GRANTS)
            self._owners = {NO_RING: [""], **{f"of {name}": [name] for name in self.names}}
            self._members = {ring: self.names if ring else [] for ring in self._owners}
            return
        for name in self.names:
            self.start(name)
        for call, every_us in (
            (self._read, self.weather.read_every_us),
            (self._write, self.weather.write_every_us),
            (self._change_ring, self.weather.ring_every_us),
            (self._fail, self.weather.fault_every_us),
        ):
            self._repeat(call, every_us)

    def _made_rings(self) -> dict[str, list[str]]:
        owners = {NO_RING: ["" for _ in self.tokens]}
        for number in range(self.rng.randrange(2, 5)):
            members = self.names if number == 0 else self.rng.sample(self.names, self.rng.randint(1, 2))
            owners[f"ring{number}"] = [self.rng.choice(members) for _ in self.tokens]
        return owners

    def _made_members(self) -> dict[str, list[str]]:
        """Return who is on each ring: the owners of its tokens, and most of the others."""
        return {
            ring: [name for name in self.names if name in owners or self.rng.random() < 0.8]
            for ring, owners in self._owners.items()
        }

    def owner(self, ring: str, token: int) -> str:
        return self._owners[ring][token]

    def members(self, ring: str) -> list[str]:
        return self._members[ring]

    def run_until(self, until_us: int) -> None:
        queue = self._queue
        while queue and self.stale is None and queue[0][0] < until_us:
            self.now_us, _, call, arguments = heapq.heappop(queue)
            self.events += 1
            call(*arguments)
        if self.stale is None:
            self.now_us = until_us

    def run(self) -> Stale | None:
        """Let the schedule pass; return the first stale read."""
        self.run_until(self.length_us)
        # The work that still waits ends here: what waits and what it waits for hold one another.
        self._queue.clear()
        for reply in self.waiting:
            reply.steps = None
        return self.stale

    def at(self, time_us: int, call: Callable[..., object], *arguments: object) -> None:
        self._pushed += 1
        heapq.heappush(self._queue, (time_us, self._pushed, call, arguments))

    def tell(self, text: str, *arguments: object) -> None:
        if self.log is not None:
            self.log.append(f"{self.now_us / 1e6:9.6f} {text % arguments}")

    # What is checked.

    def served(self, node: Node, token: int, version: int, floor: tuple[int, int]) -> None:
        self.reads += 1
        if version < floor[0] and self.stale is None:
            self.stale = Stale(
                at_us=self.now_us,
                arrived_us=floor[1],
                node=str(node),
                token=token,
                version=version,
                wanted=floor[0],
            )
            self.tell("%s", self.stale)

    def acknowledge(self, node: Node, token: int, version: int) -> None:
        self.tell("%s acknowledges %d of %d", node, version, token)
        self.acknowledgements += 1
        self.acknowledged[token] = max(version, self.acknowledged.get(token, 0))
        # Stale copies show only to those who read them.
        for reader in self.nodes:
            self.at(self.now_us + 1, reader.enter, reader.read, token)
            self.at(self.now_us + self.rng.randrange(2 * _S), reader.enter, reader.read, token)

    # Messages.

    def send(self, source: str, target: str, call: Callable[..., object], *arguments: object) -> None:
        rng, weather = self.rng, self.weather
        if self._cuts.get((source, target), 0) > self.now_us or rng.random() < weather.loss:
            return
        delay_us = rng.randrange(LATEST_US) if rng.random() < weather.slow else rng.randrange(300, 15 * _MS)
        self.at(self.now_us + delay_us, call, *arguments)

    def ask_store(
        self, node: Node, call: Callable[[], Any], receive: Callable[[Any], None], *, is_renewal: bool = False
    ) -> None:
        if is_renewal and self._held.get(node.name, 0) > self.now_us:
            if self.rng.random() < 0.5:
                self.at(self.now_us + self.rng.randrange(LATEST_US), self._apply, node, call, receive)
            return
        self.send(node.name, STORE, self._apply, node, call, receive)

    def _apply(self, node: Node, call: Callable[[], Any], receive: Callable[[Any], None]) -> None:
        if self.now_us < self.store.stands_still_until_us:
            # Those that wait for locks come in any order.
            at_us = self.store.stands_still_until_us + self.rng.randrange(20 * _MS)
            self.at(at_us, self._apply, node, call, receive)
            return
        self.send(STORE, node.name, node.enter, receive, call())

    # What happens.

    def _repeat(self, call: Callable[[], None], every_us: int) -> None:
        def again() -> None:
            call()
            self.at(self.now_us + 1 + self.rng.randrange(2 * every_us), again)

        self.at(1 + self.rng.randrange(2 * every_us), again)

    def start(self, name: str, ring: str | None = None) -> Node:
        self._instances += 1
        node = Node(self, name, self._instances)
        self.nodes.append(node)
        self.tell("%s starts", node)
        node.go_on(node.live())
        node.route_by(self._some_ring() if ring is None else ring)
        return node

    def restart(self, name: str) -> None:
        """Start a process, but not while the store may lack the row of a node with a lease (rule 14)."""
        if self.now_us < self.lacking_until_us:
            self.at(self.lacking_until_us, self.start, name)
        else:
            self.start(name)

    def _some_ring(self) -> str:
        rings = list(self._owners)
        return self.rng.choice(rings if self.rng.random() < 0.3 else rings[1:])

    def _any_node(self) -> Iterator[Node]:
        if self.nodes:
            yield self.rng.choice(self.nodes)

    def _node_for(self, token: int) -> Iterator[Node]:
        owners = [node for node in self.nodes if self.owner(node.lease.ring, token) == node.name]
        if owners and self.rng.random() < self.weather.owner:
            yield self.rng.choice(owners)
        else:
            yield from self._any_node()

    def _read(self) -> None:
        token = self.rng.choice(self.tokens)
        for node in self._node_for(token):
            node.enter(node.read, token)

    def _write(self) -> None:
        statement = self.store.write if self.rng.random() < 0.8 else self.store.end_again
        token = self.rng.choice(self.tokens)
        # Who may have a copy has one.
        for node in self.nodes:
            node.enter(node.read, token)
        keeps = statement == self.store.write and self.rng.random() < 0.5
        # A batch before it may be slow.
        wait_us = self.rng.randrange(self.rng.choice([5 * _MS, 5 * _MS, 5 * _MS, 4 * _S])) if keeps else 0
        for node in self._node_for(token):
            writing = node.write(token, statement, keeps=keeps, wait_us=wait_us)
            node.later(self.rng.randrange(50 * _MS), node.go_on, writing)

    def _change_ring(self) -> None:
        ring = self._some_ring()
        if self.rng.random() >= self.weather.ring_together:
            for node in self._any_node():
                before = node.rings[-1]
                node.enter(node.route_by, ring)
                if self.rng.random() < 0.3:
                    node.later(self.rng.randrange(500 * _MS), node.route_by, before)
            return
        # A change of the members, of which each hears at another time.
        latest_us = self.rng.choice([50 * _MS, 1 * _S, 4 * _S])
        for node in self.nodes:
            if self.rng.random() < 0.8:
                node.later(self.rng.randrange(latest_us), node.route_by, ring)

    def _fail(self) -> None:
        for _ in range(self.rng.choice([1, 1, 2, 3])):
            delay_us = self.rng.choice([0, self.rng.randrange(1 * _S)])
            self.at(self.now_us + delay_us, self.rng.choice(self.weather.faults), self)

    def _unlucky_name(self) -> str:
        return self.victim if self.rng.random() < 0.6 else self.rng.choice(self.names)

    def _unlucky_node(self) -> Iterator[Node]:
        victims = [node for node in self.nodes if node.name == self.victim]
        if victims and self.rng.random() < 0.6:
            yield self.rng.choice(victims)
        else:
            yield from self._any_node()

    def cut(self, source: str, target: str, duration_us: int | None = None) -> None:
        self.tell("cut from %s to %s", source, target)
        self._cuts[source, target] = self.now_us + (duration_us or self.rng.randrange(300 * _MS, 6 * _S))

    def cut_from_store(self) -> None:
        name, way = self._unlucky_name(), self.rng.randrange(3)
        if way != 0:
            self.cut(name, STORE)
        if way != 1:
            self.cut(STORE, name)

    def hold_renewals(self) -> None:
        names = self.names if self.rng.random() < 0.3 else [self._unlucky_name()]
        self.tell("renewals of %s are late or lost", names)
        for name in names:
            self.hold(name, self.rng.randrange(500 * _MS, 5 * _S))

    def hold(self, name: str, duration_us: int) -> None:
        self._held[name] = self.now_us + duration_us

    def cut_nodes(self) -> None:
        source, target = self.rng.sample(self.names, 2)
        self.cut(source, target)

    def isolate(self) -> None:
        name = self._unlucky_name()
        for other in self.names:
            if other != name:
                self.cut(other, name)

    def stop_node(self) -> None:
        for node in self._unlucky_node():
            node.stand_still(self.rng.randrange(300 * _MS, self.rng.choice([2 * _S, 15 * _S])))

    def crash(self) -> None:
        for node in self._unlucky_node():
            self.tell("%s crashes", node)
            node.end()
            latest_us = self.rng.choice([100 * _MS, 3 * _S])
            self.at(self.now_us + self.rng.randrange(latest_us), self.restart, node.name)

    def start_twin(self) -> None:
        if len(self.nodes) < len(self.names) + 2:
            self.restart(self._unlucky_name())

    def leave(self) -> None:
        for node in self._unlucky_node():
            if not node.is_leaving:
                node.enter(node.leave)
                self.at(self.now_us + self.rng.randrange(4 * _S), self.restart, node.name)

    def stop_store(self) -> None:
        self.tell("the store stands still")
        self.store.stands_still_until_us = self.now_us + self.rng.randrange(100 * _MS, 3 * _S)

    def promote_copy(self) -> None:
        names, lag_us = set(self.store.rows), self.rng.randrange(self.rng.choice([300 * _MS, 6 * _S]))
        if any(not node.lease._identity for node in self.nodes):
            # One has started and not met any store yet.
            lag_us = 0
        self.store.promote_copy(lag_us)
        if names - self.store.rows.keys():
            self.lacking_until_us = self.now_us + 2 * _S
        self.tell("a copy of the store is promoted: %s", self.store.rows)
        if self.rng.random() < 0.3:
            self.crash()
        if self.rng.random() < 0.3:
            self.stop_store()


FAULTS: Final = (
    World.cut_from_store,
    World.hold_renewals,
    World.cut_nodes,
    World.isolate,
    World.stop_node,
    World.crash,
    World.start_twin,
    World.leave,
    World.stop_store,
    World.promote_copy,
)
SCENES: Final[list[dict[str, Any]]] = [
    {
        "slow": 0.0,
        "loss": 0.0,
        "nodes": 2,
        "write_every_us": 200 * _MS,
        "ring_every_us": 1500 * _MS,
        "ring_together": 0.1,
        "owner": 1.0,
        "fault_every_us": 2 * _S,
        "faults": [World.hold_renewals],
    },
    {
        "slow": 0.0,
        "nodes": 2,
        "write_every_us": 300 * _MS,
        "ring_every_us": 10 * _S,
        "fault_every_us": 1 * _S,
        "faults": [World.promote_copy, World.isolate, World.cut_nodes, World.cut_from_store],
    },
    {
        "slow": 0.0,
        "loss": 0.0,
        "nodes": 2,
        "write_every_us": 200 * _MS,
        "ring_every_us": 3 * _S,
        "fault_every_us": 1 * _S,
        "faults": [World.promote_copy, World.crash, World.leave],
    },
]
