"""The parts of a Redis Cluster's store that need no server: slots, topology, clocks, and who is admitted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest

from cluster.lease import LEASE_US
from mnemosyned.errors import StorageUnavailable
from mnemosyned.storage.redis.cluster import slots, topology
from mnemosyned.storage.redis.cluster.admission import Admission, Renewals, now_us
from mnemosyned.storage.redis.cluster.clocks import Clocks
from mnemosyned.storage.redis.cluster.topology import Topology


@pytest.mark.parametrize(
    ("tag", "slot"), [("123456789", 12739), ("", 0), ("foo", 12182), ("user1000", 3443), ("hello", 866)]
)
def test_a_slot_is_that_of_the_server(tag: str, slot: int) -> None:
    assert slots.slot_of(tag) == slot


@pytest.mark.parametrize("count", [1, 3, 16, 128, 1000])
def test_the_slots_of_buckets_are_at_equal_distances(count: int) -> None:
    spaces = slots.buckets("p:", count)
    found = [space.slot for space in spaces]

    assert [slot * count // slots.SLOTS for slot in found] == list(range(count))
    for space in spaces:
        assert slots.slot_of(space.prefix.removeprefix("p:{").removesuffix("}:")) == space.slot
    # Of three primaries with a third of the slots each.
    shares = Counter(slot * 3 // slots.SLOTS for slot in found).values()
    assert max(shares) - min(shares) <= 2


def test_names_are_spread_evenly_over_buckets() -> None:
    counts = Counter(slots.bucket_of(f"token {number}".encode(), 16) for number in range(16_000))

    assert set(counts) == set(range(16))
    assert 800 < min(counts.values()) <= max(counts.values()) < 1200


def test_keys_beside_those_of_a_bucket_are_in_its_slot_and_one_declared_key_never_exists() -> None:
    space = slots.buckets("p:", 4)[1]
    beside = space.within("trial:1:")

    assert beside.slot == space.slot
    assert beside.keys[1] == f"{space.prefix}trial:1:x"
    assert beside.keys[0] == len(beside.keys) - 1
    assert space.within("") is space


ASKED = ("asked", 7000)


def node(host: bytes | None, port: int) -> list[object]:
    return [host, port, b"id", []]


def test_the_slots_are_read_as_a_node_tells_them() -> None:
    found = topology.parse(
        [
            [5461, 10922, node(b"10.0.0.2", 6379), node(b"10.0.0.5", 6379)],
            [0, 5460, node(b"", 6379)],
            [10923, 10999, node(None, 1)],
            [11001, 16383, node(b"?", 2), node(b"h.example", 3)],
        ],
        ASKED,
    )

    assert [found.primary(slot) for slot in (0, 5460, 5461, 10922, 10999, 11000, 16383)] == [
        ("asked", 6379),
        ("asked", 6379),
        ("10.0.0.2", 6379),
        ("10.0.0.2", 6379),
        ("asked", 1),
        None,
        ("asked", 2),
    ]
    assert found.replicas == {("10.0.0.5", 6379), ("h.example", 3)}


def test_what_a_node_says_of_one_slot_is_believed_until_the_slots_are_told_again() -> None:
    found = Topology([(0, 16383, ("a", 1))])
    found.moved(7, ("b", 2))

    assert [found.primary(slot) for slot in (6, 7, 8)] == [("a", 1), ("b", 2), ("a", 1)]
    assert found.primaries == {("a", 1), ("b", 2)}
    assert Topology().primary(7) is None


def test_clocks_differ_by_what_is_certain() -> None:
    clocks = Clocks()
    assert clocks.apart_us() == 0
    clocks.observe("a", 1_000_000, sent_us=500_000, received_us=501_000)
    clocks.observe("b", 1_000_400, sent_us=500_000, received_us=500_500)

    assert (clocks.apart_us(), clocks.behind_us("a"), clocks.behind_us("b")) == (0, 0, 0)

    # Of at least 99.5 ms, whenever it was looked at within the round trip.
    clocks.observe("b", 900_000, sent_us=500_000, received_us=500_500)

    assert clocks.apart_us() == 99_000
    assert (clocks.behind_us("a"), clocks.behind_us("b")) == (99_000, 0)
    assert clocks.behind_us("another") == 0
    clocks.keep(frozenset({"a"}))
    assert clocks.apart_us() == 0


def test_a_clock_that_is_hours_behind_does_not_stop_the_others() -> None:
    clocks = Clocks()
    clocks.observe("a", 10**12, sent_us=0, received_us=1)
    clocks.observe("b", 10**12 - 3_600_000_000, sent_us=0, received_us=1)

    assert clocks.apart_us() > 3_599_000_000
    assert clocks.behind_us("a") == 1_000_000


class Home:
    """Stands for the primary that has the rows of nodes."""

    def __init__(self, *, since_us: int = 0, nodes: int = 1) -> None:
        self.answer = (since_us, nodes)
        self.met: list[str] = []
        self.fails = False

    async def meet(self, servers: Sequence[str]) -> tuple[int, int]:
        if self.fails:
            raise StorageUnavailable
        self.met += servers
        return self.answer


async def test_a_server_is_admitted_once_a_renewal_was_sent_after_it_was_met() -> None:
    home, renewals = Home(), Renewals()
    admission = Admission(home.meet, renewals)
    before_us = now_us()
    renewals.answered(before_us)
    admitting = asyncio.create_task(admission.admit(["a"]))
    for _ in range(5):
        await asyncio.sleep(0)
    assert (home.met, admission.has_met("a")) == (["a"], False)

    # One that was sent before it was met says nothing.
    renewals.answered(before_us + 1)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not admission.has_met("a")
    renewals.answered(now_us())
    await admitting

    assert admission.has_met("a")
    await admission.admit(["a"])
    assert home.met == ["a"]


async def test_without_a_lease_a_server_is_admitted_when_all_leases_of_others_have_run_out() -> None:
    renewals = Renewals()
    for since_us, nodes, least_s, most_s in (
        (0, 0, 0, 0.1),
        (LEASE_US * 2, 5, 0, 0.1),
        (LEASE_US - 50_000, 1, 0.05, 0.3),
    ):
        begun_us = now_us()
        await Admission(Home(since_us=since_us, nodes=nodes).meet, renewals).admit(["a"])
        assert least_s * 1e6 <= now_us() - begun_us < most_s * 1e6


async def test_a_lease_that_has_run_out_is_not_waited_for() -> None:
    renewals = Renewals()
    renewals.answered(now_us() - LEASE_US - 1)
    admission = Admission(Home().meet, renewals)
    begun_us = now_us()
    await admission.admit(["a"])

    assert now_us() - begun_us < 200_000


async def test_a_server_that_cannot_be_met_is_not_admitted() -> None:
    home = Home(nodes=0)
    admission = Admission(home.meet, Renewals())
    home.fails = True
    with pytest.raises(StorageUnavailable):
        await admission.admit(["a"])
    assert not admission.has_met("a")
    home.fails = False
    await admission.admit(["a", "b"])

    assert admission.has_met("a")
    admission.forget()
    assert not admission.has_met("b")
