"""When an owner grants a mirror, and which a node keeps."""

from __future__ import annotations

import time

import pytest

from cache.lru import Lru, Slot
from cache.read_through import ReadThrough
from cluster.lease import Lease
from cluster.mirrors import Grants
from cluster.ring import Ring
from cluster.view import View
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.encoded import EncodedSession, ExpiryField, joined
from mnemosyned.sessions.mirrors import Grant, Mirrors
from mnemosyned.sessions.model import Session
from mnemosyned.sessions.token_hash import TokenHasher
from mnemosyned.sessions.token_index import TokenIndex

KEEP_US = 60_000_000
HASHER = TokenHasher([b"a key that only these tests know"], is_hashing=True)
VIEW = View(me="me", ring=Ring(["me", "other"]), address_by_name={})
THEIRS = next(token for token in map(str, range(99)) if VIEW.ring.owner(token) == "other")


def encoded(token: str = THEIRS, expires_at_us: int = 10**15, bag: bytes = b"") -> EncodedSession:
    return EncodedSession(
        Session(
            access_token=token,
            subject_id="s",
            subject_client="",
            refresh_token="",
            bag=bag,
            expires_at_us=expires_at_us,
        )
    )


def response_of(session: EncodedSession) -> bytes:
    return joined(session.response(ExpiryField().encode(session.expires_at_us)))


class Node:
    """One node's caches; its lease is valid, and its rows show a process of the other one."""

    def __init__(self, *, is_wanted: bool = True, max_grants: int = 10) -> None:
        self.index = TokenIndex(HASHER)
        self.own: ReadThrough[EncodedSession] = ReadThrough(Lru(max_entries=9, max_bytes=10**9))
        self.lease = Lease("me", 7)
        self.lease.until_us = 2**62
        self.clock = StorageClock()
        self.mirrors = Mirrors(
            self.own,
            ReadThrough(Lru(max_entries=9, max_bytes=10**9), observer=self.index),
            index=self.index,
            grants=Grants(max_tokens=max_grants, keep_us=KEEP_US),
            lease=self.lease,
            clock=self.clock,
            is_wanted=is_wanted,
        )
        self.mirrors.follow(VIEW)
        self.mirrors.met({"other": 3})

    def has_copy(self, *, for_us: int = KEEP_US, expires_at_us: int = 10**15) -> None:
        with self.own.begin_fill("t") as fill:
            slot = Slot(encoded("t", expires_at_us), 1, self.clock.now_us() + for_us)
            fill.put(slot)

    def gets(self, grant: Grant, *, response: bytes | None = None, during: str = "") -> EncodedSession | None:
        """Let an answer of the other node come, and return the mirror that this node has then."""
        asked_us = self.mirrors.open_at(VIEW, THEIRS, "other")
        with self.mirrors.cache.begin_fill(THEIRS) as fill:
            if during:
                self.mirrors.drop([during])
            answered = response_of(encoded()) if response is None else response
            self.mirrors.keep(fill, "other", answered, grant, asked_us=asked_us)
        return self.peek()

    def peek(self) -> EncodedSession | None:
        now_us = self.mirrors.open_at(VIEW, THEIRS, "other")
        return self.mirrors.cache.peek(THEIRS, now_us=now_us) if now_us else None


GRANT = Grant(keep_us=KEEP_US, instance=3, expires_at_us=10**15)


# The owner.


def test_the_second_read_that_finds_the_copy_gets_a_grant() -> None:
    node = Node()
    node.has_copy(expires_at_us=5 * 10**15)
    first, second = (node.mirrors.grant("t", "b") for _ in range(2))

    assert first is None
    assert second is not None
    assert (second.instance, second.expires_at_us) == (7, 5 * 10**15)
    assert KEEP_US - 10**6 < second.keep_us <= KEEP_US
    assert node.mirrors._grants.holders(["t"]) == {"b"}
    assert node.mirrors.counters.grants == 1


def test_a_new_copy_is_counted_from_the_beginning() -> None:
    node = Node()
    node.has_copy()
    node.mirrors.grant("t", "b")
    node.own.drop("t")
    node.has_copy()

    assert node.mirrors.grant("t", "b") is None


@pytest.mark.parametrize(
    ("for_us", "max_grants", "peer"), [(900_000, 10, "b"), (KEEP_US, 0, "b"), (KEEP_US, 10, "")]
)
def test_nothing_is_granted(for_us: int, max_grants: int, peer: str) -> None:
    """For a copy that ends soon, without room to remember, or if the node wants none."""
    node = Node(max_grants=max_grants)
    node.has_copy(for_us=for_us)

    assert [node.mirrors.grant("t", peer) for _ in range(3)] == [None] * 3
    assert node.mirrors.counters.grants == 0


def test_nothing_is_granted_without_a_copy() -> None:
    assert Node().mirrors.grant("t", "b") is None


# The entry node.


def test_what_is_granted_is_kept_as_the_owner_has_answered_it() -> None:
    mirror = Node().gets(GRANT)

    assert mirror is not None
    assert response_of(mirror) == response_of(encoded())


@pytest.mark.parametrize(
    "grant",
    [GRANT._replace(instance=4), GRANT._replace(keep_us=0), GRANT._replace(expires_at_us=10**15 + 1)],
    ids=["of another process", "for no time", "with another expiry"],
)
def test_what_is_granted_otherwise_is_not_kept(grant: Grant) -> None:
    assert Node().gets(grant) is None


@pytest.mark.parametrize("response", [b"", b"\x0a", b"\x0a\xff\xff", b"\x12\x00", b"\x0a\x05abc"])
def test_a_response_of_another_form_is_not_kept(response: bytes) -> None:
    assert Node().gets(GRANT, response=response) is None


def test_a_large_session_is_kept_too() -> None:
    large = encoded(bag=b"\x22\x80\x80\x06" + bytes(98_304))
    mirror = Node().gets(GRANT, response=response_of(large))

    assert mirror is not None
    assert response_of(mirror) == response_of(large)


@pytest.mark.parametrize("name", [THEIRS, HASHER.stored_key(THEIRS)], ids=["token", "hash"])
def test_a_recall_drops_the_mirror_and_keeps_out_one_that_is_on_its_way(name: str) -> None:
    node = Node()
    assert node.gets(GRANT) is not None
    node.mirrors.recall(lambda: node.mirrors.drop([name]))

    assert node.peek() is None
    assert node.mirrors.counters.recalled == 1
    assert node.gets(GRANT, during=name) is None


def test_a_mirror_ends_with_the_time_of_its_grant() -> None:
    node = Node()
    assert node.gets(GRANT._replace(keep_us=30_000)) is not None
    time.sleep(0.03)

    assert node.peek() is None


def test_there_are_no_mirrors_without_a_lease_or_off_the_ring_or_unwanted() -> None:
    node, unwanting = Node(), Node(is_wanted=False)
    assert unwanting.mirrors.open_at(VIEW, THEIRS, "other") == 0
    assert node.mirrors.open_at(VIEW, THEIRS, "other")
    joining = View(me="me", ring=VIEW.ring, address_by_name={}, former=(None,))
    assert node.mirrors.open_at(joining, THEIRS, "other") == 0
    node.lease.until_us = 0
    assert node.mirrors.open_at(VIEW, THEIRS, "other") == 0
    node.lease.until_us = 2**62
    node.mirrors.follow(View(me="me", ring=Ring(["other"]), address_by_name={}))

    assert node.mirrors.open_at(VIEW, THEIRS, "other") == 0


def test_another_process_of_the_owner_ends_its_mirrors() -> None:
    node = Node()
    assert node.gets(GRANT) is not None
    generation = node.mirrors.cache.generation
    node.mirrors.met({"other": 3})
    assert node.mirrors.cache.generation == generation
    node.mirrors.met({"other": 5})

    assert node.peek() is None
