"""The rules one by one, by sequences that are written out; tests/simulation runs random ones."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from cluster.lease import (
    ACTIVATION_US,
    BAR_US,
    FORGET_US,
    LEASE_US,
    PERIOD_US,
    Answer,
    Lease,
    Wait,
    stretched,
)
from cluster.node_row import NodeRow, Renewal, Renewed
from mnemosyned.storage.memory import MemoryStore

MS = 1000
TRIP_US = 2 * MS  # from the sending of a statement to its answer
Result = TypeVar("Result")


def done(work: Coroutine[Any, Any, Result]) -> Result:
    """What a store in memory answers: it never waits."""
    try:
        work.send(None)
    except StopIteration as answered:
        result: Result = answered.value
        return result
    raise AssertionError("it waits")


class Node:
    """A node whose clock the test sets; each statement takes TRIP_US."""

    def __init__(self, store: MemoryStore, name: str = "a", *, ring: str = "r", instance: int = 1) -> None:
        self.store = store
        self.lease = Lease(name, instance)
        self.lease.route_by(ring)

    def renew(self, at_us: int, *, took_us: int = TRIP_US) -> Answer:
        renewal = self.lease.renewal()
        answer = done(self.store.renew(renewal))
        return self.lease.answered(renewal, answer, sent_us=at_us, received_us=at_us + took_us)

    def renew_until(self, from_us: int, until_us: int) -> int:
        """Renew each PERIOD; return when the last renewal was sent."""
        at_us = from_us
        while at_us <= until_us:
            self.renew(at_us)
            at_us += PERIOD_US
        return at_us - PERIOD_US

    def begin(self, at_us: int = 0) -> int:
        """Register, and renew until the lease is valid; return when the last renewal was sent."""
        return self.renew_until(at_us, at_us + ACTIVATION_US + PERIOD_US)

    def bar(self, name: str, at_us: int) -> Wait:
        barred = done(self.store.bar(name))
        return self.lease.barred(name, barred, sent_us=at_us, received_us=at_us + TRIP_US)

    def holders(self, at_us: int) -> set[str]:
        return set(self.lease.holders(at_us))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def node(store: MemoryStore) -> Node:
    return Node(store)


# The own lease.


def test_a_node_that_registers_serves_copies_from_its_first_renewal_after_the_activation(node: Node) -> None:
    assert node.lease.reason(0) == "lapsed"
    assert node.lease.age_us(0) is None
    assert node.renew(0) == Answer(is_renewed=True, must_drop=True, why="lapsed")
    last_us = node.renew_until(PERIOD_US, ACTIVATION_US - 1)

    assert not node.lease.is_valid(last_us + TRIP_US)
    assert node.lease.reason(last_us + TRIP_US) == "registering"
    active_us = ACTIVATION_US + TRIP_US
    assert node.renew(active_us) == Answer(is_renewed=True)
    assert node.lease.is_valid(active_us + TRIP_US)
    assert node.lease.reason(active_us + TRIP_US) == ""
    assert node.lease.age_us(active_us + 5) == 5


def test_a_lease_counts_from_when_its_renewal_was_sent(node: Node) -> None:
    sent_us = node.begin() + PERIOD_US
    node.renew(sent_us, took_us=600 * MS)

    assert node.lease.is_valid(sent_us + LEASE_US - 1)
    assert not node.lease.is_valid(sent_us + LEASE_US)


def test_a_renewal_without_an_answer_changes_nothing_and_three_may_fail(node: Node) -> None:
    sent_us = node.begin()
    for _ in range(3):
        done(node.store.renew(node.lease.renewal()))
    assert node.lease.is_valid(sent_us + 3 * PERIOD_US)

    assert node.renew(sent_us + 3 * PERIOD_US) == Answer(is_renewed=True)


def test_a_lease_that_lapsed_has_every_copy_dropped_and_is_not_valid_before_the_activation(
    node: Node,
) -> None:
    back_us = node.begin() + LEASE_US
    assert node.lease.reason(back_us) == "lapsed"
    assert node.renew(back_us) == Answer(is_renewed=True, must_drop=True, why="lapsed")
    last_us = node.renew_until(back_us + PERIOD_US, back_us + ACTIVATION_US - 1)
    assert not node.lease.is_valid(last_us + TRIP_US)

    node.renew(last_us + PERIOD_US)
    assert node.lease.is_valid(last_us + PERIOD_US + TRIP_US)


def test_an_answer_after_the_lease_had_run_out_counts_as_a_lapse(node: Node) -> None:
    sent_us = node.begin() + LEASE_US - 10 * MS

    assert node.renew(sent_us, took_us=20 * MS).why == "lapsed"


def test_an_answer_that_arrives_after_a_later_one_means_nothing(node: Node) -> None:
    at_us = node.begin() + PERIOD_US
    held_up = node.lease.renewal()
    answer = done(node.store.renew(held_up))
    node.lease.route_by("s")
    node.renew(at_us)
    received = node.lease.answered(held_up, answer, sent_us=at_us - MS, received_us=at_us + 9 * MS)

    assert received == Answer(is_renewed=False)
    assert (node.lease.published, node.lease.until_us) == ("s", at_us + LEASE_US)


def test_a_renewal_that_arrives_after_a_later_one_is_refused_and_is_no_conflict(node: Node) -> None:
    at_us = node.begin() + PERIOD_US
    held_up = node.lease.renewal()
    done(node.store.renew(node.lease.renewal()))
    answer = done(node.store.renew(held_up))
    received = node.lease.answered(held_up, answer, sent_us=at_us, received_us=at_us + TRIP_US)

    assert received == Answer(is_renewed=False)
    assert node.lease.conflict is None
    assert node.lease.until_us == at_us - PERIOD_US + LEASE_US
    assert node.renew(at_us + PERIOD_US).is_renewed


def test_a_ring_is_published_by_the_answer_to_a_renewal_that_has_it(node: Node) -> None:
    at_us = node.begin()
    held_up = node.lease.renewal()
    node.lease.route_by("s")
    answer = done(node.store.renew(held_up))
    node.lease.answered(held_up, answer, sent_us=at_us + 1, received_us=at_us + 2)
    assert node.lease.published != "s"
    assert not node.lease.agrees

    node.renew(at_us + PERIOD_US)
    assert node.lease.published == "s"
    assert node.lease.agrees


def test_a_node_that_resigned_serves_nothing_and_registers_again_as_a_new_one(node: Node) -> None:
    at_us = node.begin()
    node.lease.resign()
    assert not node.lease.is_valid(at_us)
    assert (node.lease.ring, node.lease.agrees) == ("", False)
    done(node.store.resign(("a", 1, None)))

    assert node.renew(at_us + PERIOD_US).why == "lapsed"
    assert not node.lease.is_valid(at_us + PERIOD_US + TRIP_US)


# A bar, where it is met.


def test_a_barred_node_drops_every_copy_and_serves_none_for_a_while(node: Node) -> None:
    at_us = node.begin() + PERIOD_US
    done(node.store.bar("a"))
    assert node.renew(at_us) == Answer(is_renewed=True, must_drop=True, why="barred")
    assert node.lease.reason(at_us + TRIP_US) == "barred"
    assert node.lease.renewal().seen == 2
    ends_us = at_us + TRIP_US + stretched(BAR_US)
    last_us = node.renew_until(at_us + PERIOD_US, ends_us - 1)
    assert not node.lease.is_valid(last_us + TRIP_US)

    assert node.renew(ends_us) == Answer(is_renewed=True)
    assert node.lease.is_valid(ends_us + TRIP_US)


def test_a_bar_that_is_met_while_another_lasts_prolongs_it(node: Node) -> None:
    at_us = node.begin() + PERIOD_US
    done(node.store.bar("a"))
    node.renew(at_us)
    again_us = at_us + 3 * PERIOD_US
    done(node.store.bar("a"))

    assert node.renew(again_us).why == "barred"
    assert node.lease.barred_until_us == again_us + TRIP_US + stretched(BAR_US)


def test_a_bar_counts_though_it_came_before_the_first_answer(node: Node) -> None:
    done(node.store.renew(node.lease.renewal()))
    done(node.store.bar("a"))
    assert node.renew(0).must_drop
    last_us = node.renew_until(PERIOD_US, BAR_US)

    assert node.lease.reason(last_us) == "barred"


def test_a_renewal_that_was_sent_during_a_bar_begins_no_lease_though_it_is_answered_after_it(
    store: MemoryStore,
) -> None:
    writer, node = Node(store, "w"), Node(store, "h")
    at_us = max(writer.begin(), node.begin()) + PERIOD_US
    writer.renew(at_us)
    writer.bar("h", at_us)
    node.renew(at_us + TRIP_US)
    for renewed_us in range(at_us + 2 * TRIP_US, at_us + 3700 * MS, PERIOD_US):
        node.renew(renewed_us)
        writer.renew(renewed_us + MS)
    # The store takes this renewal before the second bar, and its answer takes long.
    late = node.lease.renewal()
    late_us, answer = at_us + 3900 * MS, done(store.renew(late))
    wait = writer.bar("h", late_us + 10 * MS)
    node.lease.answered(late, answer, sent_us=late_us, received_us=late_us + 400 * MS)
    now_us = late_us + 400 * MS

    # The writer takes it for barred all the time.
    assert writer.holders(now_us) == set()
    assert writer.lease.waits(now_us) == []
    assert now_us < wait.until_us
    assert not node.lease.is_valid(now_us)


# Two processes of one name.


def test_of_two_processes_with_one_name_only_the_first_gets_a_lease(store: MemoryStore) -> None:
    first, second = Node(store), Node(store, instance=2)
    begun_us = first.begin()
    for at_us in range(begun_us + PERIOD_US, begun_us + 20 * PERIOD_US, PERIOD_US):
        assert first.renew(at_us).is_renewed
        assert second.renew(at_us + MS) == Answer(is_renewed=False)

    assert first.lease.is_valid(at_us + TRIP_US)
    assert second.lease.reason(at_us) == "conflict"
    assert second.lease.conflict is not None
    assert second.lease.conflict.instance == 1
    assert second.lease.rival() == "a"


def test_a_process_takes_the_name_of_another_that_has_lapsed(store: MemoryStore) -> None:
    former, new = Node(store), Node(store, instance=2)
    ended_us = former.begin()
    first_us = ended_us + MS
    assert not new.renew(first_us).is_renewed
    lapsed_us = first_us + TRIP_US + stretched(LEASE_US)
    assert not new.renew(lapsed_us - MS).is_renewed
    assert new.lease.rival() == "a"
    # It sees that the row has lapsed, and replaces it by the next renewal.
    assert not new.renew(lapsed_us).is_renewed
    assert new.lease.rival() == ""
    assert new.renew(lapsed_us + MS).is_renewed

    assert not former.lease.is_valid(lapsed_us)
    assert new.lease.conflict is None
    last_us = new.renew_until(lapsed_us + PERIOD_US, lapsed_us + ACTIVATION_US + PERIOD_US)
    assert new.lease.is_valid(last_us)
    assert not former.renew(last_us).is_renewed


def test_a_row_that_changes_before_it_is_replaced_stays(store: MemoryStore) -> None:
    former, new = Node(store), Node(store, instance=2)
    at_us = former.begin()
    new.renew(at_us)
    lapsed_us = at_us + TRIP_US + stretched(LEASE_US)
    new.renew(lapsed_us)
    # It had only stood still.
    former.renew(lapsed_us + MS)

    assert not new.renew(lapsed_us + 2 * MS).is_renewed
    assert new.lease.rival() == "a"
    assert not new.renew(lapsed_us + PERIOD_US).is_renewed


def test_a_rival_without_a_ring_serves_nothing_and_one_with_a_ring_can_be_barred(store: MemoryStore) -> None:
    rival, node = Node(store, ring=""), Node(store, instance=2)
    rival.renew(0)
    node.renew(MS)
    assert node.lease.rival() == ""
    rival.lease.route_by("r")
    rival.renew(2 * MS)
    node.renew(3 * MS)
    assert node.lease.rival() == "a"
    wait = node.bar("a", 4 * MS)
    assert not node.lease.is_over(wait, 5 * MS)
    for at_us in (6 * MS, 8 * MS):
        rival.renew(at_us)
    node.renew(10 * MS)

    assert node.lease.is_over(wait, 12 * MS)


# Other nodes.


@pytest.fixture
def writer(store: MemoryStore) -> Node:
    return Node(store, "w")


@pytest.fixture
def other(store: MemoryStore) -> Node:
    return Node(store, "h")


def test_rings_agree_while_all_that_have_one_show_the_same(writer: Node, other: Node) -> None:
    Node(writer.store, "joining", ring="").renew(0)
    other.renew(0)
    assert not writer.lease.agrees
    writer.renew(0)
    assert writer.lease.agrees
    other.lease.route_by("s")
    other.renew(PERIOD_US)
    writer.renew(PERIOD_US)
    assert not writer.lease.agrees
    writer.lease.route_by("s")
    assert not writer.lease.agrees
    writer.renew(2 * PERIOD_US)
    assert writer.lease.agrees
    writer.lease.route_by("")

    assert not writer.lease.agrees


def test_rings_do_not_agree_with_a_process_of_the_same_name(store: MemoryStore) -> None:
    Node(store).renew(0)
    node = Node(store, instance=2)
    node.renew(MS)

    assert not node.lease.agrees


def test_nodes_with_a_ring_must_be_told(writer: Node, other: Node) -> None:
    Node(writer.store, "joining", ring="").renew(0)
    other.renew(0)
    writer.renew(0)

    assert writer.holders(TRIP_US) == {"h"}
    assert set(writer.lease.serving()) == {"h"}
    assert {row.name for row in writer.lease.rows} == {"h", "joining"}


def test_a_row_that_did_not_change_for_a_whole_lease_has_lapsed(writer: Node, other: Node) -> None:
    other.lease.route_by("s")
    other.renew(0)
    writer.renew(MS)
    lapsed_us = MS + TRIP_US + stretched(LEASE_US)
    writer.renew(lapsed_us - 1, took_us=PERIOD_US)
    assert writer.holders(lapsed_us) == {"h"}
    assert not writer.lease.agrees
    writer.renew(lapsed_us)
    assert writer.holders(lapsed_us + TRIP_US) == set()
    assert writer.lease.agrees
    assert writer.lease.shown(lapsed_us)["h"] == "lapsed"
    assert writer.lease.losses == 1
    # It had stood still, and is back.
    other.renew(lapsed_us + PERIOD_US)
    writer.renew(lapsed_us + PERIOD_US + MS)

    assert writer.holders(lapsed_us + 2 * PERIOD_US) == {"h"}


def test_one_answer_says_nothing_of_when_a_row_was_renewed(writer: Node, other: Node) -> None:
    other.renew(0)

    writer.renew(100 * LEASE_US)
    assert writer.holders(100 * LEASE_US + TRIP_US) == {"h"}
    assert writer.lease.forgotten(100 * LEASE_US + TRIP_US) == []


def test_a_row_that_lapsed_long_ago_is_forgotten(writer: Node, other: Node) -> None:
    other.renew(0)
    writer.renew(0)
    writer.renew(FORGET_US)
    assert writer.lease.forgotten(FORGET_US + TRIP_US) == []
    (row,) = writer.lease.forgotten(FORGET_US + TRIP_US + 1)

    assert row[:3] == ("h", 1, 1)


def test_rows_serve_a_write_for_one_lease_also_those_of_a_refused_renewal(store: MemoryStore) -> None:
    Node(store).renew(0)
    node = Node(store, instance=2)
    assert not node.lease.knows_others(0)
    node.renew(MS)

    assert node.lease.knows_others(MS + LEASE_US - 1)
    assert not node.lease.knows_others(MS + LEASE_US)


# A bar, where it is given.


def begun(writer: Node, other: Node) -> int:
    """Give both a lease; return a moment after the last renewals, which the writer has seen."""
    at_us = max(writer.begin(), other.begin()) + PERIOD_US
    other.renew(at_us)
    writer.renew(at_us + MS)
    return at_us + 2 * PERIOD_US


def test_a_write_waits_until_the_barred_node_has_dropped_its_copies(writer: Node, other: Node) -> None:
    at_us = begun(writer, other)
    wait = writer.bar("h", at_us)
    now_us = at_us + TRIP_US
    assert writer.holders(now_us) == set()
    assert writer.lease.waits(now_us) == [wait]
    assert writer.lease.shown(now_us)["h"] == "barred"
    other.renew(at_us + 3 * MS)
    writer.renew(at_us + 6 * MS)
    # It has met the bar, and has not said so yet.
    assert not writer.lease.is_over(wait, at_us + 9 * MS)
    other.renew(at_us + 9 * MS)
    writer.renew(at_us + 12 * MS)

    assert writer.lease.is_over(wait, at_us + 15 * MS)
    assert writer.lease.waits(at_us + 15 * MS) == []


def test_a_write_waits_no_longer_than_leases_from_before_the_bar_may_last(writer: Node, other: Node) -> None:
    at_us = begun(writer, other)
    seen_us = at_us - 2 * PERIOD_US + MS + TRIP_US
    wait = writer.bar("h", at_us)
    assert wait.until_us == seen_us + stretched(LEASE_US)
    writer.renew_until(at_us + PERIOD_US, wait.until_us - 1)
    assert not writer.lease.is_over(wait, wait.until_us - 1)

    assert writer.lease.is_over(wait, wait.until_us)
    # Later writes need neither tell it nor wait.
    assert writer.holders(wait.until_us) == set()
    assert writer.lease.waits(wait.until_us) == []


def test_a_renewal_that_the_writer_has_not_seen_may_have_begun_a_lease_just_before_the_bar(
    writer: Node, other: Node
) -> None:
    at_us = begun(writer, other)
    other.renew(at_us - MS)

    assert writer.bar("h", at_us).until_us == at_us + TRIP_US + stretched(LEASE_US)


def test_a_bar_counts_from_before_it_was_sent_and_then_the_node_is_told_again(
    writer: Node, other: Node
) -> None:
    at_us = begun(writer, other)
    writer.bar("h", at_us)
    assert writer.lease.bar_ends_us("h") == at_us + BAR_US
    for renewed_us in range(at_us + PERIOD_US, at_us + BAR_US, PERIOD_US):
        other.renew(renewed_us)
        writer.renew(renewed_us + MS)
    assert writer.holders(at_us + BAR_US - 1) == set()

    assert writer.holders(at_us + BAR_US) == {"h"}


def test_a_node_that_is_barred_again_in_time_is_not_waited_for(writer: Node, other: Node) -> None:
    at_us = begun(writer, other)
    first = writer.bar("h", at_us)
    writer.renew_until(at_us + PERIOD_US, first.until_us)
    again_us = first.until_us + PERIOD_US
    writer.bar("h", again_us)

    assert writer.lease.bar_ends_us("h") == again_us + BAR_US
    assert writer.lease.waits(again_us + TRIP_US) == []
    assert writer.holders(at_us + BAR_US + MS) == set()


def test_a_bar_by_another_node_shows_in_the_rows_and_counts_from_the_rows_before(
    writer: Node, other: Node
) -> None:
    at_us = begun(writer, other)
    writer.renew(at_us)
    done(writer.store.bar("h"))
    writer.renew(at_us + PERIOD_US)
    now_us = at_us + PERIOD_US + TRIP_US
    (wait,) = writer.lease.waits(now_us)
    assert (wait.name, wait.epoch, wait.until_us) == ("h", 2, now_us + stretched(LEASE_US))
    assert writer.holders(now_us) == set()
    assert writer.lease.bar_ends_us("h") == at_us + BAR_US
    for renewed_us in (now_us + MS, now_us + 2 * MS):
        other.renew(renewed_us)
    writer.renew(now_us + 3 * MS)

    assert writer.lease.is_over(wait, now_us + 6 * MS)


def test_a_node_that_resigned_is_not_waited_for_if_the_rows_are_recent(writer: Node, other: Node) -> None:
    at_us = begun(writer, other)
    wait = writer.bar("h", at_us)
    done(writer.store.resign(("h", 1, None)))
    assert not writer.lease.is_over(wait, at_us + TRIP_US)
    writer.renew(at_us + PERIOD_US)

    assert writer.lease.is_over(wait, at_us + PERIOD_US + TRIP_US)


def test_a_node_without_a_row_is_waited_for_until_later_rows_are_there(writer: Node, other: Node) -> None:
    at_us = begun(writer, other)
    done(writer.store.resign(("h", 1, None)))
    wait = writer.bar("h", at_us)
    assert not writer.lease.is_over(wait, at_us + TRIP_US)
    writer.renew(at_us + 1)
    assert not writer.lease.is_over(wait, at_us + PERIOD_US)
    writer.renew(at_us + PERIOD_US)

    assert writer.lease.is_over(wait, at_us + PERIOD_US + TRIP_US)
    assert writer.holders(at_us + PERIOD_US + TRIP_US) == set()


def test_another_process_that_took_the_place_of_a_barred_one_has_no_old_copies(
    writer: Node, other: Node
) -> None:
    at_us = begun(writer, other)
    wait = writer.bar("h", at_us)
    row = next(row for row in writer.lease.rows if row.name == "h")
    done(writer.store.renew(Renewal("h", 2, 1, "r", 0, row.version)))
    writer.renew(at_us + PERIOD_US)

    assert writer.lease.is_over(wait, at_us + PERIOD_US + TRIP_US)
    # What the former one confirmed or met, this one has not.
    assert writer.holders(at_us + PERIOD_US + TRIP_US) == {"h"}


def test_a_row_that_its_node_has_made_again_is_not_taken_for_a_barred_one(writer: Node, other: Node) -> None:
    at_us = begun(writer, other)
    done(writer.store.resign(("h", 1, None)))
    other.renew(at_us)
    writer.renew(at_us + MS)

    assert writer.holders(at_us + PERIOD_US) == {"h"}
    assert writer.lease.bar_ends_us("h") == 0


# A store that was replaced by a copy, or has lost rows.


def test_another_store_counts_as_a_lapse_and_writes_wait_until_its_rows_are_complete(writer: Node) -> None:
    at_us = writer.begin() + PERIOD_US
    assert writer.lease.complete_from_us() <= at_us
    writer.store = MemoryStore()
    assert writer.renew(at_us) == Answer(is_renewed=True, must_drop=True, why="replaced")
    assert not writer.lease.is_valid(at_us + TRIP_US)
    assert writer.lease.complete_from_us() == at_us + TRIP_US + stretched(LEASE_US)
    last_us = writer.renew_until(at_us + PERIOD_US, at_us + ACTIVATION_US + PERIOD_US)

    assert writer.lease.is_valid(last_us + TRIP_US)


def test_an_own_row_that_somebody_has_removed_counts_as_a_lapse(writer: Node, other: Node) -> None:
    at_us = begun(writer, other)
    done(writer.store.bar("h"))
    done(writer.store.resign(("h", 1, None)))

    assert other.renew(at_us) == Answer(is_renewed=True, must_drop=True, why="replaced")
    assert not other.lease.is_valid(at_us + TRIP_US)
    assert other.lease.complete_from_us() > at_us
    assert other.renew(at_us + PERIOD_US) == Answer(is_renewed=True)


def test_a_copy_of_the_store_that_lacks_a_bar_bars_the_node_that_has_met_it(
    writer: Node, other: Node
) -> None:
    at_us = begun(writer, other)
    older = done(writer.store.renew(writer.lease.renewal()))
    writer.bar("h", at_us)
    other.renew(at_us + MS)
    copy = MemoryStore()
    copy._row_by_node = {row.name: row._replace(age_us=0) for row in older.rows}
    copy._renewed_us = dict.fromkeys(copy._row_by_node, 0)
    other.store = copy
    other.renew(at_us + 5 * MS)

    assert copy._row_by_node["h"].epoch > copy._row_by_node["h"].seen
    assert other.lease.reason(at_us + 10 * MS) == "barred"


def test_a_bar_in_another_store_lets_nothing_be_concluded_from_the_rows(writer: Node, other: Node) -> None:
    at_us = begun(writer, other)
    former = writer.store
    writer.store = MemoryStore()
    done(writer.store.renew(Renewal("h", 1, 99, "r", 0)))
    wait = writer.bar("h", at_us)
    writer.store = former

    assert wait.until_us == at_us + TRIP_US + stretched(LEASE_US)
    assert writer.lease.bar_ends_us("h") == 0
    assert writer.holders(at_us + TRIP_US) == {"h"}


def test_a_bar_of_a_node_that_the_rows_do_not_show_is_waited_for(writer: Node, other: Node) -> None:
    at_us = writer.begin()
    other.renew(at_us)
    wait = writer.bar("h", at_us)
    writer.renew(at_us + PERIOD_US)
    assert not writer.lease.is_over(wait, at_us + PERIOD_US + TRIP_US)

    assert writer.lease.is_over(wait, at_us + TRIP_US + stretched(LEASE_US))


def test_without_an_own_row_in_the_answer_a_renewal_has_failed(node: Node) -> None:
    at_us = node.begin() + PERIOD_US
    renewal = node.lease.renewal()
    rows = (NodeRow("other", 5, 1, "r", 1, 1, 0),)
    identity = done(node.store.renew(renewal)).identity
    received = node.lease.answered(
        renewal, Renewed(rows, identity, 0), sent_us=at_us, received_us=at_us + TRIP_US
    )

    assert received == Answer(is_renewed=False)
    assert node.lease.conflict is None
    assert node.lease.until_us == at_us - PERIOD_US + LEASE_US
    assert node.holders(at_us + TRIP_US) == {"other"}


def test_what_people_are_shown_of_leases_is_one_word_a_node(writer: Node, other: Node) -> None:
    Node(writer.store, "joining", ring="").renew(0)
    at_us = begun(writer, other)

    assert writer.lease.shown(at_us) == {"w": "valid", "h": "valid", "joining": "lapsed"}
    writer.lease.route_by("")
    writer.lease.resign()
    assert writer.lease.shown(at_us)["w"] == "none"
