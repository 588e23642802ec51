"""The parts of a Redis Cluster's store that need no server: slots, topology, clocks, and who is admitted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest

from cluster.lease import LEASE_US, stretched
from mnemosyned.errors import StorageUnavailable
from mnemosyned.storage.redis.cluster import slots, topology
from mnemosyned.storage.redis.cluster.admission import Admission, now_us
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


LEFT_US = stretched(LEASE_US)


@pytest.mark.parametrize(
    ("since_us", "nodes", "has_renewed", "wait_us"),
    [
        (0, 0, True, 0),  # no node has a lease
        (LEFT_US * 2, 5, False, 0),  # others have waited
        (LEFT_US - 50_000, 1, False, 50_000),
        (LEFT_US * 2, 1, True, LEFT_US),  # by the own clock alone
    ],
)
async def test_a_server_is_admitted_when_all_leases_from_before_it_was_met_have_run_out(
    since_us: int, nodes: int, *, has_renewed: bool, wait_us: int
) -> None:
    home = Home(since_us=since_us, nodes=nodes)
    admission = Admission(home.meet)
    admission.has_renewed = has_renewed
    begun_us = now_us()
    admitting = asyncio.create_task(admission.admit("a"))
    await asyncio.sleep(0.01)
    assert admission.has_admitted("a") == (wait_us == 0)
    await admitting

    assert wait_us <= now_us() - begun_us < wait_us + 300_000
    assert admission.has_admitted("a")
    await admission.admit("a")
    assert home.met == ["a"]


async def test_an_admission_that_was_given_up_goes_on() -> None:
    home = Home(since_us=LEFT_US - 200_000)
    admission = Admission(home.meet)
    begun_us = now_us()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.03):
                await admission.admit("a")
    await admission.admit("a")

    assert home.met == ["a"]
    assert now_us() - begun_us < 500_000


async def test_a_server_that_cannot_be_met_is_not_admitted() -> None:
    home = Home(nodes=0)
    admission = Admission(home.meet)
    home.fails = True
    with pytest.raises(StorageUnavailable):
        await admission.admit("a")
    assert not admission.has_admitted("a")
    home.fails = False
    await admission.admit("a")

    assert admission.has_admitted("a")
    admission.forget()
    assert not admission.has_admitted("a")
