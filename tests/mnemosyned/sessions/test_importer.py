"""Putting sessions into a storage: what is there already, what another has, and what goes wrong between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest
from stores import new

from mnemosyned.errors import (
    CorruptSession,
    DeadlineExceeded,
    InvalidArgument,
    MnemosyneError,
    StorageUnavailable,
)
from mnemosyned.sessions.export_file import BadExport
from mnemosyned.sessions.importer import BATCH, SLACK_US, Counts, Existing, Importer, KeySet, batches
from mnemosyned.sessions.model import Abandonment, Lookup, NewSession, Session, Touch
from mnemosyned.storage.memory import MemoryStore

NOW_US = 1_700_000_000_000_000
HOUR_US = 3600 * 1_000_000


class Store(MemoryStore):
    """A store with a clock that stands, and faults that a test asks for."""

    def __init__(self) -> None:
        self.now = NOW_US
        self.failing_touches = 0
        self.late_starts = 0
        self.refused: set[str] = set()
        self.damaged: set[str] = set()
        self.takes_us = 0  # from the question for the clock until the start
        super().__init__(wall_us=lambda: self.now)

    async def now_us(self) -> int:
        now_us = self.now
        self.now += self.takes_us
        return now_us

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        if self.late_starts:
            self.late_starts -= 1
            return [DeadlineExceeded() for _ in sessions]
        return [
            InvalidArgument("mnemosyned: no") if one.access_token in self.refused else self._start(one)
            for one in sessions
        ]

    async def load(self, lookups: Sequence[Lookup]) -> list[Session | MnemosyneError]:
        found = await super().load(lookups)
        return [
            CorruptSession("mnemosyned: storage: no") if lookup.access_token in self.damaged else one
            for lookup, one in zip(lookups, found, strict=True)
        ]

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        self.damaged -= {ending.access_token for ending in endings}
        return await super().abandon(endings)

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        if self.failing_touches:
            self.failing_touches -= 1
            raise StorageUnavailable("away")
        return await super().touch(touches)

    def sessions(self) -> dict[str, Session]:
        return self._session_by_token


def session(token: str, *, left_us: int = HOUR_US, **fields: object) -> Session:
    return new(token, **fields).stored(NOW_US + left_us)


def importer(store: Store, existing: Existing = Existing.REFUSE) -> Importer:
    return Importer(store, store, existing=existing)


@pytest.mark.parametrize("left_us", [2, 1000, SLACK_US, 2 * SLACK_US + 1, HOUR_US, 10**17])
@pytest.mark.parametrize("takes_us", [0, 1, 900_000])
async def test_a_session_gets_exactly_its_expiry(left_us: int, takes_us: int) -> None:
    store = Store()
    store.takes_us = takes_us
    one = session("a", left_us=left_us, refresh_token="r", subject_client="c")
    moving = importer(store)

    await moving.add([one])

    # A session may end while it is imported, and never lives longer.
    ended = left_us <= 2 * takes_us
    assert store.sessions().get("a") in ([one] if not ended else [None, one])
    assert moving.counts in ([Counts(imported=1)] if not ended else [Counts(expired=1), Counts(imported=1)])


async def test_expired_sessions_are_left_out() -> None:
    store = Store()
    moving = importer(store)

    await moving.add([session("a", left_us=0), session("b", left_us=-1), session("c")])

    assert moving.counts == Counts(imported=1, expired=2)
    assert set(store.sessions()) == {"c"}


async def test_an_import_that_broke_off_between_its_steps_is_completed_by_the_next() -> None:
    store = Store()
    store.failing_touches = 1
    sessions = [session("a"), session("b")]

    with pytest.raises(StorageUnavailable):
        await importer(store).add(sessions)
    assert all(one.expires_at_us == NOW_US + HOUR_US - SLACK_US for one in store.sessions().values())
    moving = importer(store)
    await moving.add(sessions)

    assert list(store.sessions().values()) == sessions
    assert moving.counts == Counts(there=2)


async def test_a_session_that_lives_longer_in_the_target_keeps_its_life() -> None:
    store = Store()
    longer = session("a", left_us=2 * HOUR_US)
    await importer(store).add([longer])

    moving = importer(store)
    await moving.add([session("a")])

    assert store.sessions()["a"] == longer
    assert moving.counts == Counts(there=1)


@pytest.mark.parametrize(
    "fields", [{"subject_id": "x"}, {"subject_client": "x"}, {"refresh_token": "x"}, {"bag": b""}]
)
async def test_other_sessions_with_the_same_token_stay_or_are_replaced(fields: dict[str, object]) -> None:
    theirs, ours, both = session("a", **fields), session("a"), session("b")

    async def moved(existing: Existing) -> tuple[Store, Counts, int]:
        store = Store()
        await importer(store).add([theirs, both])
        moving = importer(store, existing)
        different = await moving.different([ours, both])
        await moving.add([ours, both])
        return store, moving.counts, different

    for existing in (Existing.SKIP, Existing.REFUSE):
        store, counts, different = await moved(existing)
        assert store.sessions()["a"] == theirs
        assert (counts, different) == (Counts(there=1, different=1), 1)
    store, counts, different = await moved(Existing.REPLACE)
    assert store.sessions()["a"] == ours
    assert (counts, different) == (Counts(there=1, replaced=1), 1)


async def test_what_has_expired_in_the_target_is_in_no_ones_way() -> None:
    store = Store()
    await importer(store).add([session("a", left_us=1000, subject_id="x")])
    store.now += 1000
    moving = importer(store)

    assert await moving.different([session("a")]) == 0
    await moving.add([session("a")])

    assert moving.counts == Counts(imported=1)


async def test_a_damaged_session_of_the_target_is_another_one() -> None:
    store = Store()
    store.damaged = {"a"}
    await importer(store).add([session("a"), session("b")])
    moving = importer(store, Existing.REPLACE)

    assert await moving.different([session("a"), session("b")]) == 1
    await moving.add([session("a"), session("b")])

    assert moving.counts == Counts(replaced=1, there=1)


async def test_what_the_engine_refuses_is_counted_and_told() -> None:
    store, told = Store(), []
    store.refused = {"b"}
    moving = Importer(
        store, store, existing=Existing.REFUSE, complain=lambda one, why: told.append((one, why))
    )

    await moving.add([session("a"), session("b"), session("c")])

    assert told == [(session("b"), "no")]
    assert moving.counts == Counts(imported=2, refused=1)


async def test_a_start_that_was_too_late_is_repeated() -> None:
    store = Store()
    store.late_starts = 2
    moving = importer(store)

    await moving.add([session("a")])

    assert store.sessions()["a"] == session("a")
    assert moving.counts == Counts(imported=1)


async def test_a_storage_that_is_always_too_late_fails() -> None:
    store = Store()
    store.late_starts = 99

    with pytest.raises(StorageUnavailable, match="too slow"):
        await importer(store).add([session("a")])


async def test_a_batch_that_fails_leaves_none_of_the_others_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mnemosyned.sessions.importer.BATCH", 1)
    store = Store()
    store.failing_touches = 1

    with pytest.raises(StorageUnavailable):
        await importer(store).add([session("a"), session("b"), session("c")])

    assert len(asyncio.all_tasks()) == 1


async def test_a_file_that_fails_in_the_middle_fails_the_import_as_itself() -> None:
    def sessions() -> Iterator[Session]:
        yield from (session(f"{number:04}") for number in range(BATCH + 1))
        raise BadExport("line 7: no")

    store = Store()

    with pytest.raises(BadExport, match="line 7: no"):
        await importer(store).add(sessions())
    assert len(asyncio.all_tasks()) == 1


async def test_an_import_that_is_ended_completes_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnemosyned.sessions.importer.BATCH", 1)
    store, asked = Store(), []
    moving = importer(store)

    def goes_on(batch: Sequence[Session]) -> bool:
        asked.extend(batch)
        return len(asked) < 3

    sessions = [session(token) for token in "abcd"]
    await moving.add(sessions, goes_on=goes_on)

    assert asked == sessions[:3]
    assert list(store.sessions().values()) == sessions[:2]
    assert moving.counts == Counts(imported=2)


async def test_pruning_removes_what_is_not_in_the_file() -> None:
    store = Store()
    await importer(store).add([session(token) for token in "abcd"])
    keys = KeySet()
    for token in "bd":
        keys.add(token)
    moving = importer(store)
    pages = 0

    async def before_page() -> None:
        nonlocal pages
        pages += 1

    await moving.prune(keys, before_page)
    await moving.prune(keys, before_page)

    assert set(store.sessions()) == {"b", "d"}
    assert moving.counts == Counts(pruned=2)
    assert pages == 1


async def test_what_changes_while_it_is_pruned_stays() -> None:
    store = Store()
    await importer(store).add([session("a"), session("b")])

    async def change() -> None:
        await store.touch([Touch(access_token="a", expires_at_us=NOW_US + 2 * HOUR_US)])

    moving = importer(store)
    await moving.prune(KeySet(), change)

    assert set(store.sessions()) == {"a"}
    assert moving.counts == Counts(pruned=1, kept=1)


def test_batches_are_bounded_in_number_and_bytes() -> None:
    many = [session(f"{number:05}", bag=b"") for number in range(2 * BATCH + 1)]
    large = [session(f"{number:05}", bag=bytes(3_000_000)) for number in range(3)]

    assert [len(batch) for batch in batches(many)] == [BATCH, BATCH, 1]
    assert [len(batch) for batch in batches(large)] == [1, 1, 1]
    assert [one for batch in batches(many) for one in batch] == many
    assert list(batches([])) == []


def test_a_set_of_keys_knows_its_own() -> None:
    keys = KeySet()
    for number in range(1000):
        keys.add(f"key {number}\udcff")

    assert all(f"key {number}\udcff" in keys for number in range(1000))
    assert not any(f"key {number}\udcff" in keys for number in range(1000, 2000))
    assert "" not in KeySet()
