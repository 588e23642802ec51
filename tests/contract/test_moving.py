"""Sessions are exported from each engine, and imported into each, as they are: the same suite for all."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
import stores
from stores import TTL_US, Engine, lookups, new

from mnemosyned.sessions import bag, token_hash
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.export_file import Header, Reader, Summary
from mnemosyned.sessions.exporter import export_all
from mnemosyned.sessions.importer import Counts, Existing, Importer, KeySet
from mnemosyned.sessions.model import Criteria, Session, ValueChange
from mnemosyned.sessions.running_nodes import running_nodes
from mnemosyned.sessions.store import FullStore
from mnemosyned.sessions.token_hash import TokenHasher
from mnemosyned.storage.hashed import HashedStore
from mnemosyned.storage.memory import MemoryStore

HEADER = Header(engine="e", version="v", exported_at_us=0, hmac_key_ids=())
GOB = bytes.fromhex("127f0401010342616701ff8000010c010c0000") + bytes.fromhex("08ff800001016b0176")
HASHER = TokenHasher([b"a key that only these tests know"], is_hashing=True)
# In the sequence of their bytes, with everything that a session may have.
NEW = [
    new("Z" * 2000, subject_id="", bag=b""),
    new("a", subject_id="s", subject_client="web \n", refresh_token='r"'),
    new("a\x01b", bag=GOB),
    new("aa", bag=bag.encode({str(number): secrets.token_hex(9) for number in range(999)})),
    new("é", subject_id="ю" * 100, bag=bag.encode({"": "", "\x7f": "\0"})),
    new("\U0001f600", ttl_us=7 * TTL_US),
]


@pytest.fixture(params=stores.CHECKABLE)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    async with stores.opened(request.param, request) as opened:
        yield opened


async def started(store: FullStore, *tokens: str) -> list[Session]:
    """Start these sessions, or those of NEW."""
    found = [
        one for one in await store.start([new(token) for token in tokens] or NEW) if isinstance(one, Session)
    ]
    assert len(found) == len(tokens or NEW)
    return found


async def exported(store: FullStore) -> tuple[list[Session], Summary]:
    lines: list[str] = []
    told: list[str] = []
    summary = await export_all(store, HEADER, BagLimits(), write=lines.append, complain=told.append)
    assert len(told) == summary.damaged
    reader = Reader(limits=BagLimits())
    sessions = list(reader.sessions(line.encode() for line in lines))
    assert reader.summary == summary
    return sessions, summary


async def imported(
    sessions: Sequence[Session],
    store: FullStore,
    by_token: FullStore | None = None,
    existing: Existing = Existing.REFUSE,
) -> Counts:
    importer = Importer(store, by_token or store, existing=existing)
    await importer.add(sessions)
    return importer.counts


async def empty(store: FullStore) -> None:
    while not (await store.delete(Criteria(expires_after_us=1), limit=1000)).is_all:
        pass


async def test_everything_of_a_session_is_exported(engine: Engine) -> None:
    sessions = await started(engine.store)

    assert await exported(engine.store) == (sessions, Summary(sessions=len(NEW)))


async def test_everything_of_a_session_is_imported(engine: Engine) -> None:
    memory = MemoryStore()
    sessions = await started(memory)

    assert await imported(sessions, engine.store) == Counts(imported=len(NEW))
    assert (await exported(engine.store))[0] == sessions
    assert await imported(sessions, engine.store) == Counts(there=len(NEW))
    assert (await exported(engine.store))[0] == sessions


async def test_a_storage_gets_its_own_sessions_back(engine: Engine) -> None:
    await started(engine.store)
    sessions, _ = await exported(engine.store)
    await empty(engine.store)
    assert await exported(engine.store) == ([], Summary(sessions=0))

    assert await imported(sessions, engine.store) == Counts(imported=len(NEW))

    assert (await exported(engine.store))[0] == sessions
    found = await engine.store.load(lookups(*(one.access_token for one in sessions)))
    assert [one.bag for one in found if isinstance(one, Session)] == [one.bag for one in sessions]


async def test_batches_that_run_at_the_same_time_are_counted_once_each(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnemosyned.sessions.importer.BATCH", 10)
    sessions = await started(MemoryStore(), *(f"{number:03}" for number in range(100)))

    assert await imported(sessions, engine.store) == Counts(imported=100)
    assert await imported(sessions, engine.store) == Counts(there=100)
    others = [replace(one, subject_id="x") for one in sessions]
    assert await imported(others, engine.store, existing=Existing.SKIP) == Counts(different=100)
    assert await imported(others, engine.store, existing=Existing.REPLACE) == Counts(replaced=100)
    assert (await exported(engine.store))[0] == others


async def test_expired_sessions_are_left_out(engine: Engine) -> None:
    first, _, last = await started(engine.store, "a", "b", "c")
    await engine.shift("b", -2 * TTL_US / 1e6)

    assert await exported(engine.store) == ([first, last], Summary(sessions=2, expired=1))


async def test_damaged_sessions_are_left_out(engine: Engine) -> None:
    first, last = await started(engine.store, "a", "c")
    await engine.store.start([new("b", bag=b"?"), new("bb", bag=bytes(4_000_001))])

    assert await exported(engine.store) == ([first, last], Summary(sessions=2, damaged=2))


async def test_pages_go_on_where_the_one_before_ended(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnemosyned.sessions.exporter.PAGE", 2)
    sessions = await started(engine.store, *(f"{number:02}" for number in range(7)))

    assert (await exported(engine.store))[0] == sessions


async def test_hashed_tokens_stay_hashed(engine: Engine) -> None:
    hashed = HashedStore(engine.store, HASHER)
    await started(hashed)
    sessions, _ = await exported(engine.store)
    assert all(token_hash.is_hashed(one.access_token) for one in sessions)
    await empty(engine.store)

    assert await imported(sessions, engine.store, hashed) == Counts(imported=len(NEW))

    assert (await exported(engine.store))[0] == sessions
    assert await hashed.exist([one.access_token for one in NEW]) == [True] * len(NEW)
    assert await imported(sessions, engine.store, hashed) == Counts(there=len(NEW))


async def test_tokens_are_hashed_where_the_target_hashes(engine: Engine) -> None:
    sessions = await started(MemoryStore())
    hashed = HashedStore(engine.store, HASHER)

    assert await imported(sessions, engine.store, hashed) == Counts(imported=len(NEW))

    stored, _ = await exported(engine.store)
    assert {one.access_token for one in stored} == {HASHER.stored_key(one.access_token) for one in NEW}
    found = await hashed.load(lookups(*(one.access_token for one in sessions)))
    assert [one.bag for one in found if isinstance(one, Session)] == [one.bag for one in sessions]
    assert await imported(sessions, engine.store, hashed) == Counts(there=len(NEW))


async def test_a_session_that_was_imported_as_it_is_gets_its_hash_by_the_next_import(engine: Engine) -> None:
    sessions = await started(MemoryStore(), "a", "b")
    await imported(sessions, engine.store)

    assert await imported(sessions, engine.store, HashedStore(engine.store, HASHER)) == Counts(there=2)

    stored = [one.access_token for one in (await exported(engine.store))[0]]
    assert sorted(stored) == sorted(map(HASHER.stored_key, "ab"))


async def test_a_target_becomes_what_the_second_export_says(engine: Engine) -> None:
    source = MemoryStore()
    await started(source, "a", "b", "c")
    await imported((await exported(source))[0], engine.store)
    # Users go on for a while.
    await source.set_values([ValueChange(access_token="a", key="k", value="v")])
    await source.delete(Criteria(access_token="b"), limit=1)
    await started(source, "d")
    sessions, _ = await exported(source)
    keys = KeySet()
    for one in sessions:
        keys.add(one.access_token)
    moving = Importer(engine.store, engine.store, existing=Existing.REPLACE)

    assert await moving.different(sessions) == 1
    await moving.add(sessions)
    await moving.prune(keys, _nothing)

    assert moving.counts == Counts(imported=1, there=1, replaced=1, pruned=1)
    assert (await exported(engine.store))[0] == sessions


async def test_other_sessions_stay_unless_they_are_to_be_replaced(engine: Engine) -> None:
    (theirs,) = [
        one for one in await engine.store.start([new("a", subject_id="x")]) if isinstance(one, Session)
    ]
    ours = await started(MemoryStore(), "a")

    assert await imported(ours, engine.store, existing=Existing.SKIP) == Counts(different=1)
    assert (await exported(engine.store))[0] == [theirs]
    assert await imported(ours, engine.store, existing=Existing.REPLACE) == Counts(replaced=1)
    assert (await exported(engine.store))[0] == ours


async def test_nodes_that_run_are_seen_and_the_dead_are_not(engine: Engine) -> None:
    async with running_nodes(engine.store, "one") as nodes:
        assert await nodes.look() == []
        async with running_nodes(engine.store, "other") as others:
            (name,) = await nodes.look()
            assert name.startswith("other ")
            assert [one.partition(" ")[0] for one in await others.look()] == ["one"]
        assert await nodes.look() == []


async def _nothing() -> None:
    pass
