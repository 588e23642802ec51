from __future__ import annotations

import asyncio
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mnemosyned.transport.acceptor import Acceptor, inherited
from mnemosyned.transport.turns import Rows, Turns, table_bytes

Clock = list[float]


@contextmanager
def new_table(count: int, directory: Path) -> Iterator[int]:
    with tempfile.TemporaryFile(dir=directory) as table:
        table.truncate(table_bytes(count))
        yield table.fileno()


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Rows]:
    with new_table(3, tmp_path) as table:
        one = Rows(table, 3)
        yield one
        one.close()


@pytest.fixture
def clock() -> Clock:
    return [0.0]


def turns(rows: Rows, worker: int, clock: Clock, *, connections: int = 0) -> Turns:
    """A worker that serves."""
    one = Turns(rows, worker, now_s=lambda: clock[0])
    one.serve()
    one.show(connections)
    return one


def test_the_worker_with_the_fewest_connections_accepts(rows: Rows, clock: Clock) -> None:
    few, many = turns(rows, 1, clock, connections=2), turns(rows, 2, clock, connections=3)

    assert few.may_accept(2)
    assert not many.may_accept(3)


def test_with_equal_counts_each_may_accept(rows: Rows, clock: Clock) -> None:
    both = [turns(rows, worker, clock, connections=2) for worker in (1, 2)]

    assert [one.may_accept(2) for one in both] == [True, True]


def test_a_stalled_sibling_is_not_waited_for_again_until_it_accepts(rows: Rows, clock: Clock) -> None:
    turns(rows, 1, clock)
    busy = turns(rows, 2, clock, connections=5)

    waits = []
    for clock[0] in (0.0, 0.01, 0.03, 0.031):
        waits.append(busy.may_accept(5))
    rows.put(1, 2, 1)

    assert waits == [False, False, True, True]
    assert not busy.may_accept(5)


def test_a_worker_that_is_dead_or_just_starts_is_left_nothing(rows: Rows, clock: Clock) -> None:
    turns(rows, 1, clock)
    Turns(rows, 2)
    other = turns(rows, 3, clock, connections=5)
    rows.clear(1)

    assert other.may_accept(5)


def test_a_worker_that_starts_accepts_only_if_none_serves(rows: Rows, clock: Clock) -> None:
    starting = Turns(rows, 1)
    before = starting.may_accept(0)

    turns(rows, 2, clock)

    assert before
    assert not starting.may_accept(0)


def test_the_last_that_gives_up_takes_what_waits(rows: Rows, clock: Clock) -> None:
    workers = [turns(rows, worker, clock) for worker in (1, 2, 3)]
    rows.clear(2)

    assert [workers[0].give_up(), workers[2].give_up()] == [False, True]


def test_a_table_of_another_process_is_the_same_one(tmp_path: Path) -> None:
    with new_table(2, tmp_path) as table:
        one, other = Rows(table, 2), Rows(table, 2)
        one.put(2, 1, 7)

        assert other.get(2, 1) == 7
        one.close()
        other.close()


async def test_a_burst_of_connections_is_spread_over_those_that_share_the_socket(
    rows: Rows, clock: Clock
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.setblocking(False)
        counts: Counter[int] = Counter()
        accepted: list[socket.socket] = []
        acceptors = []
        for worker in (1, 2):
            own = turns(rows, worker, clock)

            def take(one: socket.socket, _: object, worker: int = worker, own: Turns = own) -> None:
                counts[worker] += 1
                own.show(counts[worker])
                accepted.append(one)

            def is_busy(worker: int = worker, own: Turns = own) -> bool:
                return not own.may_accept(counts[worker])

            sockets = inherited([listener.dup().detach()])
            acceptors.append(Acceptor(sockets, take, Counter(), is_busy=is_busy, give_up=own.give_up))
        clients = [socket.create_connection(listener.getsockname()) for _ in range(20)]
        for one in acceptors:
            one.begin()

        async with asyncio.timeout(5):
            while len(accepted) < 20:
                await asyncio.sleep(0.001)

        assert counts == {1: 10, 2: 10}
        for one in acceptors:
            one.close()
        for connection in (*clients, *accepted):
            connection.close()


async def test_what_waits_at_the_end_is_left_to_a_sibling_or_taken(rows: Rows, clock: Clock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        taken: list[tuple[int, socket.socket]] = []
        acceptors = {}
        for worker in (1, 2):
            own = turns(rows, worker, clock)

            def take(one: socket.socket, _: object, worker: int = worker) -> None:
                taken.append((worker, one))

            sockets = inherited([listener.dup().detach()])
            acceptors[worker] = Acceptor(sockets, take, Counter(), give_up=own.give_up)
        with socket.create_connection(listener.getsockname()):
            acceptors[1].close()
            before = list(taken)
            acceptors[2].close()

            assert before == []
            assert [worker for worker, _ in taken] == [2]
        for _, one in taken:
            one.close()
