from __future__ import annotations

import asyncio

import pytest

from mnemosyned.transport import h2_backlog
from mnemosyned.transport.h2_backlog import Backlog

LARGE = bytes(100_000)


class Taker:
    """A connection that notes what it does, in a journal of all."""

    def __init__(self, name: str, journal: list[str], backlog: Backlog) -> None:
        self.name, self.taken, self.is_held, self.sends = name, b"", False, 0
        self._journal, self._backlog = journal, backlog

    def take_input(self, data: bytes) -> None:
        self.taken += data
        self._journal.append(self.name)

    def hold_input(self, is_held: bool) -> None:  # noqa: FBT001  # as declared
        self.is_held = is_held

    def send_held(self) -> None:
        self._journal.append(f"{self.name} sends")
        self.sends -= 1
        if self.sends:
            self._backlog.put_sender(self)


async def until_idle(backlog: Backlog) -> None:
    async with asyncio.timeout(5):
        while backlog._is_due:
            await asyncio.sleep(0)


async def test_input_is_taken_whole_and_in_its_sequence() -> None:
    backlog = Backlog()
    taker = Taker("a", [], backlog)
    data = bytes(range(256)) * 400

    backlog.put(taker, data)
    assert taker.is_held
    backlog.put(taker, b"more")
    await until_idle(backlog)

    assert taker.taken == data + b"more"
    assert not taker.is_held


async def test_connections_take_turns() -> None:
    backlog, journal = Backlog(), list[str]()
    first, second = Taker("a", journal, backlog), Taker("b", journal, backlog)

    backlog.put(first, LARGE)
    backlog.put(second, LARGE)
    await until_idle(backlog)

    assert journal[:4] == ["a", "b", "a", "b"]
    assert (first.taken, second.taken) == (LARGE, LARGE)


async def test_senders_and_takers_take_turns() -> None:
    backlog, journal = Backlog(), list[str]()
    reader, writer = Taker("r", journal, backlog), Taker("w", journal, backlog)
    reader.sends = 3

    backlog.put_sender(reader)
    backlog.put(writer, LARGE)
    await until_idle(backlog)

    assert journal[:4] == ["w", "r sends", "w", "r sends"]
    assert reader.sends == 0


async def test_what_is_drained_is_taken_at_once() -> None:
    backlog = Backlog()
    taker = Taker("a", [], backlog)
    backlog.put(taker, LARGE)

    backlog.drain(taker)

    assert taker.taken == LARGE
    assert not taker.is_held


async def test_a_connection_that_is_gone_takes_nothing_more() -> None:
    backlog, journal = Backlog(), list[str]()
    taker = Taker("a", journal, backlog)
    backlog.put(taker, LARGE)
    backlog.put_sender(taker)

    backlog.drop(taker)
    await until_idle(backlog)

    assert journal == []


async def test_what_waits_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2_backlog, "_MANY_BYTES", len(LARGE))
    monkeypatch.setattr(h2_backlog, "_MAX_BYTES", 2 * len(LARGE))
    backlog, journal = Backlog(), list[str]()
    takers = [Taker(name, journal, backlog) for name in "abc"]
    for taker in takers:
        assert backlog.is_busy == (taker is not takers[0])
        backlog.put(taker, LARGE)
    assert takers[2].taken == LARGE
    assert [taker.is_held for taker in takers] == [True, True, False]
    backlog.put(takers[0], b"more")
    backlog.drop(takers[1])
    await until_idle(backlog)

    assert takers[0].taken == LARGE + b"more"
    assert backlog._size_bytes == 0
    assert not backlog.is_busy
