"""The lease of a node and what its writes wait for, on a store in memory and a clock that the test sets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.lease import (
    ACTIVATION_US,
    BAR_US,
    FORGET_US,
    LEASE_US,
    PERIOD_US,
    Lease,
)
from cluster.mirrors import Grants
from cluster.node_row import Barred, Renewal, Renewed
from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions import lease_gate, lease_keeper
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.lease_gate import LeaseGate, LeaseSettler
from mnemosyned.sessions.lease_keeper import LeaseKeeper
from mnemosyned.sessions.token_hash import TokenHasher
from mnemosyned.storage.memory import MemoryStore

STEP_US = 10_000


class Store(MemoryStore):
    """Fails, or keeps back its answers, as a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.failing: set[str] = set()
        self.bars = self.renewals = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def renew(self, renewal: Renewal) -> Renewed:
        self.renewals += 1
        answer = await super().renew(renewal)
        await self._answered("renew")
        return answer

    async def bar(self, name: str) -> Barred | None:
        self.bars += 1
        answer = await super().bar(name)
        await self._answered("bar")
        return answer

    async def resign(self, row: tuple[str, int, int | None]) -> None:
        if "resign" in self.failing:
            raise StorageUnavailable("away")
        await super().resign(row)

    async def _answered(self, method: str) -> None:
        await self.may_answer.wait()
        if method in self.failing:
            raise StorageUnavailable("away")

    def names(self) -> set[str]:
        return set(self._row_by_node)


class World:
    """A clock and a store, and the nodes that share them."""

    def __init__(self) -> None:
        self.now_us = 10**12
        self.store = Store()
        self.nodes: dict[str, Node] = {}
        self.silent: set[str] = set()  # nodes that confirm nothing

    def node(self, name: str, *, ring: str = "r", instance: int = 1, store: Store | None = None) -> Node:
        node = Node(self, name, ring, instance, store or self.store)
        self.nodes[name] = node
        return node

    async def pass_by(self, duration_us: int, *nodes: Node) -> None:
        """Let time pass, in which these nodes renew as often as they should."""
        ends_us = self.now_us + duration_us
        while self.now_us < ends_us:
            for node in nodes:
                await node.keeper.refresh()
            self.now_us = min(ends_us, self.now_us + PERIOD_US)
        for node in nodes:
            await node.keeper.refresh()

    async def pass_until(self, is_met: Callable[[], object], *nodes: Node) -> None:
        """Let time pass so slowly that the keepers that run see all of it, until a condition is met."""
        async with asyncio.timeout(10):
            while not is_met():
                await self.pass_by(PERIOD_US // 2, *nodes)
                await asyncio.sleep(0.006)

    async def begin(self, *nodes: Node) -> None:
        """Wait until these nodes have a lease, and know one another's."""
        await self.pass_by(ACTIVATION_US + PERIOD_US, *nodes)
        assert not any(node.keeper.reason() for node in nodes)

    async def finish(self, work: Coroutine[Any, Any, None] | None, *renewing: Node) -> int:
        """Wait for a settling, while these nodes renew; return how long it took, in microseconds."""
        assert work is not None
        began_us = self.now_us
        settling = asyncio.create_task(work)
        async with asyncio.timeout(10):
            while not settling.done():
                await asyncio.sleep(0.002)
                for node in renewing:
                    await node.keeper.refresh()
                self.now_us += STEP_US
        await settling
        return self.now_us - began_us


class Node:
    """One keeper, and what it has others and itself do."""

    def __init__(self, world: World, name: str, ring: str, instance: int, store: Store) -> None:
        self._world = world
        self.drops = 0
        self.told: list[list[str]] = []  # what others have told it
        self.keeper = LeaseKeeper(
            store,
            Lease(name, instance),
            StorageClock(lambda: world.now_us * 1000, wall_us=0),
            grants=Grants(max_tokens=100, keep_us=60_000_000),
            drop_everything=self._drop_everything,
            teller=self,
        )
        self.keeper.route_by(ring)

    def _drop_everything(self) -> None:
        self.drops += 1

    async def tell(self, nodes: Mapping[str, int], keys: Sequence[str], *, timeout_s: float) -> list[str]:
        assert timeout_s > 0
        untold = []
        for name, instance in nodes.items():
            other = self._world.nodes[name]
            if name in self._world.silent or other.keeper.lease.instance != instance:
                untold.append(name)
            else:
                other.told.append(list(keys))
        return untold

    def knows(self, name: str) -> bool:
        return name in self._world.nodes

    async def have_ends_settled(self, nodes: Sequence[str], *, timeout_s: float) -> bool:
        assert timeout_s > 0
        return not self._world.silent.intersection(nodes)

    def settle(self, *keys: str, owns: bool | None = False) -> Coroutine[Any, Any, None] | None:
        return self.keeper.settle(keys or ["t"], owns=None if owns is None else lambda _: bool(owns))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    # The pauses are of the real clock.
    monkeypatch.setattr(lease_keeper, "LOOK_US", 1000)
    monkeypatch.setattr(lease_keeper, "PERIOD_US", 5000)
    return World()


@asynccontextmanager
async def running(node: Node) -> AsyncIterator[None]:
    node.keeper.begin()
    try:
        yield
    finally:
        await node.keeper.resign()
        await node.keeper.close()


async def until(is_met: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not is_met():
            await asyncio.sleep(0.001)


def logged(caplog: pytest.LogCaptureFixture, *events: str) -> list[str]:
    return [record.msg for record in caplog.records if record.msg in events]


# A write.


async def test_when_all_is_well_the_owner_sends_nothing_and_waits_for_nothing(world: World) -> None:
    owner, other = world.node("a"), world.node("b")
    await world.begin(owner, other)
    statements = world.store.renewals

    assert owner.settle("t", "u", owns=True) is None
    assert (other.told, world.store.bars, world.store.renewals) == ([], 0, statements)


async def test_who_does_not_own_a_session_tells_the_others(world: World) -> None:
    writer, other, joining = world.node("a"), world.node("b"), world.node("c", ring="")
    await world.pass_by(0, joining)
    await world.begin(writer, other)
    statements = world.store.renewals
    await world.finish(writer.settle("t", "u"))
    await world.finish(writer.settle("v", owns=None))

    # Once more when no owner has a copy any more, of which it could grant a mirror.
    assert other.told == [["t", "u"], ["t", "u"], ["v"], ["v"]]
    assert joining.told == []
    assert (world.store.bars, world.store.renewals) == (0, statements)


async def test_an_owner_tells_the_others_while_rings_differ(world: World) -> None:
    owner, other = world.node("a"), world.node("b")
    await world.begin(owner, other)
    owner.keeper.route_by("s")
    await world.finish(owner.settle(owns=True))
    assert other.told == [["t"], ["t"]]
    for node in (owner, other):
        node.keeper.route_by("s")
    await world.pass_by(0, other, owner)

    assert owner.settle(owns=True) is None


async def test_an_owner_tells_those_that_have_a_mirror_and_no_others(world: World) -> None:
    owner, reader, other = world.node("a"), world.node("b"), world.node("c")
    await world.begin(owner, reader, other)
    owner.keeper.grants.grant("t", "b", now_us=world.now_us)

    assert owner.settle("u", owns=True) is None
    await world.finish(owner.settle("t", owns=True))
    assert (reader.told, other.told) == ([["t"]], [])
    assert owner.keeper.counters.recalls == 1
    # It has none any more.
    assert owner.settle("t", owns=True) is None


async def test_a_node_that_does_not_confirm_a_recall_is_barred_and_has_its_grant_still(world: World) -> None:
    owner, reader = world.node("a"), world.node("b")
    await world.begin(owner, reader)
    owner.keeper.grants.grant("t", "b", now_us=world.now_us)
    world.silent.add("b")
    await world.finish(owner.settle("t", owns=True), reader)

    assert world.store.bars == 1
    assert owner.keeper.grants.holders(["t"]) == {"b"}


async def test_a_mirror_that_is_granted_during_a_recall_is_recalled_by_the_next_write(world: World) -> None:
    owner, reader = world.node("a"), world.node("b")
    await world.begin(owner, reader)
    grants = owner.keeper.grants
    grants.grant("t", "b", now_us=world.now_us)
    recall = owner.settle("t", owns=True)
    assert recall is not None
    recalling = asyncio.create_task(recall)
    await until(lambda: reader.told)
    grants.grant("t", "b", now_us=world.now_us)
    await recalling

    assert grants.holders(["t"]) == {"b"}


async def test_mirrors_of_a_node_are_dropped_once_no_owner_has_an_older_copy(world: World) -> None:
    writer, owner, reader = world.node("a"), world.node("b"), world.node("c")
    await world.begin(writer, owner, reader)
    seen: list[tuple[int, int]] = []
    writer.keeper.drop_mirrors = lambda _: seen.append((len(owner.told), len(reader.told)))
    await world.finish(writer.settle())

    assert seen == [(1, 1)]
    assert (owner.told, reader.told) == ([["t"], ["t"]], [["t"], ["t"]])


async def test_where_nobody_else_may_have_copies_there_is_nothing_to_wait_for(world: World) -> None:
    alone, joining = world.node("a"), world.node("b", ring="")
    await world.pass_by(0, joining, alone)

    # Its own lease is not valid yet.
    assert alone.keeper.reason() == "registering"
    assert alone.settle() is None
    assert alone.settle(owns=None) is None


async def test_a_node_that_confirms_nothing_is_barred_and_waited_for(world: World) -> None:
    writer, other = world.node("a"), world.node("b")
    await world.begin(writer, other)
    world.silent.add("b")
    drops = other.drops
    took_us = await world.finish(writer.settle(), other)

    # It has met the bar and said so, long before its lease had run out.
    assert took_us < LEASE_US
    assert world.store.bars == 1
    assert other.drops == drops + 1
    assert other.keeper.reason() == "barred"
    assert other.keeper.counters.bars_received == 1
    assert writer.keeper.counters.bars_given == 1
    # Others need not wait.
    assert writer.settle("u") is None


async def test_a_node_that_has_died_is_waited_for_until_its_lease_has_run_out(world: World) -> None:
    writer, dead = world.node("a"), world.node("b")
    await world.begin(writer, dead)
    world.silent.add("b")
    took_us = await world.finish(writer.settle())
    counted = writer.keeper.counters

    assert LEASE_US - PERIOD_US < took_us < LEASE_US + PERIOD_US
    assert not dead.keeper.lease.is_valid(world.now_us)
    assert sum(counted.settle_buckets) == 1
    assert counted.settle_s == pytest.approx(took_us / 1e6, abs=0.1)
    assert writer.settle() is None


async def test_a_process_that_took_the_place_of_another_confirms_nothing_for_it(world: World) -> None:
    writer, former = world.node("a"), world.node("b")
    await world.begin(writer, former)
    new = world.node("b", instance=2)
    await world.finish(writer.settle())

    assert new.told == []
    assert world.store.bars == 1


async def test_a_write_waits_for_the_bar_of_another_node(world: World) -> None:
    writer, other, third = world.node("a"), world.node("b"), world.node("c")
    await world.begin(writer, other, third)
    world.silent.add("b")
    async with asyncio.TaskGroup() as both:
        both.create_task(world.finish(third.settle("t"), writer))
        await until(lambda: writer.keeper.lease.waits(world.now_us))
        work = writer.settle("u")
        assert work is not None
        settling = both.create_task(work)
        await asyncio.sleep(0.01)
        assert not settling.done()
    assert world.store.bars == 1


async def test_a_write_waits_on_if_the_store_is_replaced_by_a_copy_without_the_node(world: World) -> None:
    writer, dead = world.node("a"), world.node("b")
    await world.begin(writer, dead)
    world.silent.add("b")
    settling = asyncio.create_task(world.finish(writer.settle()))
    await until(lambda: writer.keeper.lease.waits(world.now_us))
    replaced_us = world.now_us
    writer.keeper._store = Store()
    await settling

    assert world.now_us - replaced_us >= LEASE_US


async def test_what_a_delete_did_not_find_may_be_a_copy_until_a_replaced_store_has_no_older_lease(
    world: World,
) -> None:
    deleter, other = world.node("a"), world.node("b")
    await world.begin(deleter, other)
    assert await deleter.keeper.others_have_settled()

    deleter.keeper._store = other.keeper._store = Store()
    assert not await deleter.keeper.others_have_settled()
    await world.pass_by(LEASE_US + PERIOD_US, deleter, other)
    assert await deleter.keeper.others_have_settled()


async def test_whether_the_store_was_replaced_is_asked_after_the_delete(world: World) -> None:
    deleter, other = world.node("a"), world.node("b")
    await world.begin(deleter, other)
    world.store.may_answer.clear()
    renewals = world.store.renewals
    before = asyncio.create_task(deleter.keeper.refresh())
    await until(lambda: world.store.renewals == renewals + 1)
    world.now_us += 1
    asked = asyncio.create_task(deleter.keeper.others_have_settled())
    await asyncio.sleep(0)
    world.store.may_answer.set()

    assert await asked
    await before
    assert world.store.renewals == renewals + 2


async def test_without_an_answer_of_the_store_no_end_is_known_to_be_settled(world: World) -> None:
    deleter, other = world.node("a"), world.node("b")
    await world.begin(deleter, other)
    world.now_us += 1
    world.store.failing.add("renew")

    assert not await deleter.keeper.others_have_settled()


async def test_rows_that_are_too_old_are_read_again_first(world: World) -> None:
    writer, other = world.node("a"), world.node("b")
    await world.begin(writer)
    world.now_us += LEASE_US
    await world.pass_by(0, other)
    await world.finish(writer.settle())

    assert other.told == [["t"], ["t"]]


async def test_rows_that_are_read_again_may_show_that_there_is_nothing_to_do(world: World) -> None:
    writer = world.node("a")
    await world.begin(writer)
    world.now_us += LEASE_US
    await world.finish(writer.settle())

    assert sum(writer.keeper.counters.settle_buckets) == 0


async def test_if_nothing_proves_that_old_copies_are_gone_the_outcome_is_unknown(world: World) -> None:
    writer, other = world.node("a"), world.node("b")
    await world.begin(writer, other)
    world.silent.add("b")
    world.store.failing = {"bar"}
    with pytest.raises(StorageUnavailable):
        await world.finish(writer.settle())
    world.store.failing = {"renew"}
    world.now_us += LEASE_US

    with pytest.raises(StorageUnavailable, match="may have been made"):
        await world.finish(writer.settle())


async def test_a_bar_whose_answer_came_too_late_proves_nothing(world: World) -> None:
    writer, other = world.node("a"), world.node("b")
    await world.begin(writer, other)
    world.silent.add("b")
    world.store.may_answer.clear()
    work = writer.settle()
    assert work is not None
    settling = asyncio.create_task(work)
    await until(lambda: world.store.bars)
    # The barred node may have copies again.
    world.now_us += BAR_US
    world.store.may_answer.set()

    with pytest.raises(StorageUnavailable):
        await settling


async def test_settlings_share_a_bar_that_is_under_way(world: World) -> None:
    writer, other = world.node("a"), world.node("b")
    await world.begin(writer, other)
    world.silent.add("b")
    world.store.may_answer.clear()
    works = [writer.settle(name) for name in "tuv"]
    settlings = [asyncio.create_task(work) for work in works if work is not None]
    await until(lambda: world.store.bars)
    await asyncio.sleep(0.01)
    # One caller that leaves ends it for nobody.
    settlings[0].cancel()
    world.store.may_answer.set()
    await world.finish(asyncio.wait_for(settlings[1], 10), other)
    await settlings[2]

    assert world.store.bars == 1


async def test_a_node_that_cannot_be_told_is_barred_again_until_it_can(world: World) -> None:
    writer, other = world.node("a"), world.node("b")
    await world.begin(writer, other)
    async with running(writer):
        world.silent.add("b")
        await world.finish(writer.settle(), other)
        await world.pass_until(lambda: world.store.bars >= 3, other, writer)
        assert other.keeper.reason() == "barred"
        # No write waits for it.
        assert writer.settle() is None
        world.silent.clear()
        await world.pass_until(lambda: other.told, other, writer)
        bars = world.store.bars
        # Its bar ends.
        for _ in range(30):
            world.now_us += PERIOD_US // 2
            await other.keeper.refresh()
            await asyncio.sleep(0.006)

        assert world.store.bars == bars
        assert other.keeper.reason() == ""
        await world.finish(writer.settle("u"))
    assert other.told[-1] == ["u"]


async def test_a_node_that_lapsed_is_not_barred_again(world: World) -> None:
    writer, dead = world.node("a"), world.node("b")
    await world.begin(writer, dead)
    world.silent.add("b")
    async with running(writer):
        await world.finish(writer.settle())
        for _ in range(30):
            world.now_us += PERIOD_US // 2
            await asyncio.sleep(0.006)

    assert world.store.bars == 1


async def test_without_a_teller_others_are_barred(world: World) -> None:
    other = world.node("b")
    clock = StorageClock(lambda: world.now_us * 1000, wall_us=0)
    keeper = LeaseKeeper(
        world.store,
        Lease("a", 1),
        clock,
        grants=Grants(max_tokens=100, keep_us=60_000_000),
        drop_everything=lambda: None,
    )
    keeper.route_by("of its own")
    await world.pass_by(0, other)
    await keeper.refresh()
    await world.finish(keeper.settle(["t"], owns=lambda _: True), other)

    assert world.store.bars == 1


# The settler and the gate of a daemon.


async def test_a_settler_owns_by_tokens_and_hashes_name_no_owner(world: World) -> None:
    owner, other = world.node("a"), world.node("b")
    await world.begin(owner, other)
    settler = LeaseSettler(owner.keeper, lambda token: token == "mine")
    hashed = TokenHasher([b"a key that only these tests know"], is_hashing=True).stored_key("mine")

    assert settler.settle(["mine"]) is None
    assert settler.settle_stored(["mine"]) is None
    await world.finish(settler.settle(["mine", "theirs"]))
    await world.finish(settler.settle_stored([hashed]))
    assert other.told == [["mine", "theirs"]] * 2 + [[hashed]] * 2


async def test_a_gate_is_open_while_the_lease_is_valid_and_counts_why_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_gate, "uptime_ns", lambda: world.now_us * 1000)
    node = world.node("a")
    gate = LeaseGate(node.keeper)
    assert not gate.is_open()
    await world.pass_by(0, node)
    assert not gate.is_open()
    await world.begin(node)
    assert gate.is_open()
    world.now_us += LEASE_US
    assert not gate.is_open()
    gate.refuse_ring()

    assert node.keeper.counters.refused == {"lapsed": 2, "registering": 1, "ring": 1}


# The lease.


async def test_renewals_that_fail_let_the_lease_lapse_and_the_next_one_drops_every_copy(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    node = world.node("a")
    await world.begin(node)
    assert (node.drops, node.keeper.counters.drops) == (1, {"lapsed": 1})
    world.store.failing = {"renew"}
    await world.pass_by(LEASE_US, node)
    assert node.keeper.reason() == "lapsed"
    assert node.keeper.is_in_doubt
    assert node.drops == 1
    world.store.failing = set()
    await world.pass_by(0, node)

    assert node.drops == 2
    assert not node.keeper.is_in_doubt
    assert node.keeper.counters.renewals["failed"] >= LEASE_US // PERIOD_US
    assert logged(caplog, "lease_valid", "lease_lost") == ["lease_valid", "lease_lost"]


async def test_a_renewal_without_an_answer_raises_a_doubt_before_the_lease_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_keeper, "_DOUBT_S", 0.01)
    node = world.node("a")
    await world.begin(node)
    doubts: list[bool] = []
    node.keeper.on_doubt.append(doubts.append)
    world.store.may_answer.clear()
    renewing = asyncio.create_task(node.keeper.refresh())
    await until(lambda: doubts)
    world.store.may_answer.set()
    await renewing

    assert doubts == [True, False]


async def test_a_ring_is_published_at_once_and_whoever_asks_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_keeper, "PERIOD_US", 60_000_000)
    node = world.node("a")
    published: list[str] = []
    node.keeper.on_published = published.append
    async with running(node):
        await until(lambda: published)
        node.keeper.route_by("s")
        await until(lambda: published[-1] == "s")

    assert node.keeper.has_registered.is_set()


async def test_renewals_that_are_asked_for_at_once_are_one(world: World) -> None:
    node = world.node("a")
    await asyncio.gather(*(node.keeper.refresh() for _ in range(5)))

    assert world.store.renewals == 1


async def test_who_resigns_serves_nothing_and_has_no_row(world: World) -> None:
    node, other = world.node("a"), world.node("b")
    await world.begin(node, other)
    async with running(node):
        await until(lambda: world.store.names() == {"a", "b"})
        drops = node.drops
        await node.keeper.resign()
        assert world.store.names() == {"b"}
        assert node.keeper.reason() == "lapsed"
        assert node.drops == drops + 1
        await node.keeper.refresh()
        assert world.store.names() == {"b"}


async def test_a_renewal_that_is_under_way_puts_no_row_back(world: World) -> None:
    node = world.node("a")
    async with running(node):
        await until(lambda: not node.keeper.has_registered.is_set() or world.store.names())
        await until(node.keeper.has_registered.is_set)
        world.store.may_answer.clear()
        statements = world.store.renewals
        await until(lambda: world.store.renewals > statements)
        resigning = asyncio.create_task(node.keeper.resign())
        await asyncio.sleep(0.01)
        assert not resigning.done()
        assert node.keeper.reason() == "lapsed"
        world.store.may_answer.set()
        await resigning

    assert world.store.names() == set()
    assert node.keeper.reason() == "lapsed"


async def test_a_storage_that_is_away_keeps_nobody_from_resigning(world: World) -> None:
    node = world.node("a")
    async with running(node):
        await until(node.keeper.has_registered.is_set)
        world.store.failing = {"renew", "resign"}
        await node.keeper.resign()

    assert node.keeper.reason() == "lapsed"


async def test_another_daemon_of_the_same_name_is_told_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = world.node("a"), world.node("a", instance=2)
    await world.begin(first)
    await world.pass_by(5 * PERIOD_US, first, second)

    assert second.keeper.reason() == "conflict"
    assert not second.keeper.has_registered.is_set()
    assert second.keeper.counters.renewals.keys() == {"refused"}
    assert logged(caplog, "node_name_taken") == ["node_name_taken"]


async def test_the_row_of_a_process_that_crashed_is_no_other_daemon(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    former, new = world.node("a"), world.node("a", instance=2)
    await world.pass_by(PERIOD_US, former)
    await world.pass_by(ACTIVATION_US + 2 * PERIOD_US, new)
    assert new.keeper.has_registered.is_set()

    await world.begin(new)
    assert logged(caplog, "node_name_taken") == []


async def test_a_daemon_that_shares_the_table_and_is_no_member_is_told_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    node, stranger = world.node("a"), world.node("b")
    del world.nodes["b"]
    await world.pass_by(9_000_000, stranger, node)
    assert node.keeper.rows.strangers() == []
    assert logged(caplog, "table_shared_with_a_stranger") == []
    await world.pass_by(9_000_000, stranger, node)
    assert node.keeper.rows.strangers() == ["b"]
    assert logged(caplog, "table_shared_with_a_stranger") == ["table_shared_with_a_stranger"]
    world.nodes["b"] = stranger
    await world.pass_by(0, node)

    assert node.keeper.rows.strangers() == []


async def test_a_daemon_that_joins_soon_is_no_stranger(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    node, joining = world.node("a"), world.node("b")
    del world.nodes["b"]
    await world.pass_by(5_000_000, joining, node)
    world.nodes["b"] = joining
    await world.pass_by(20_000_000, joining, node)

    assert logged(caplog, "table_shared_with_a_stranger") == []


async def test_a_row_of_long_ago_is_removed_and_one_that_is_back_stays(world: World) -> None:
    node, gone, back = world.node("a"), world.node("b"), world.node("c")
    await world.pass_by(0, gone, back, node)
    world.now_us += FORGET_US + 1_000_000
    # It renews after the last rows were read.
    await world.pass_by(0, back)
    await world.pass_by(0, node)
    await until(lambda: "b" not in world.store.names())

    assert world.store.names() == {"a", "c"}
    await node.keeper.close()


async def test_what_people_see_of_a_lease(world: World) -> None:
    node = world.node("a")
    assert node.keeper.age_s() is None
    await world.begin(node)
    world.now_us += 1_000_000

    assert node.keeper.age_s() == 1.0
    assert node.keeper.shown() == {"a": "valid"}
