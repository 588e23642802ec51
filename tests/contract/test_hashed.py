"""Tokens at rest: whichever name a session has in the storage, its token finds it, and nobody else does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from random import Random

import asyncpg
import grpc
import pytest
import stores
from mnemosynerpc.session_pb2 import AbandonRequest, DeleteRequest, GetRequest, ListRequest, StartRequest
from mnemosynerpc.session_pb2 import Session as WireSession
from peering import peering, until_they_serve_copies
from serving import kept, serving
from stores import Engine, bags, lookups, new, postgres_engine

from mnemosyned.commands.migrate import hash_all
from mnemosyned.errors import InvalidArgument, SessionAlreadyExists, SessionNotFound, StorageUnavailable
from mnemosyned.sessions import bag, token_hash
from mnemosyned.sessions.model import Abandonment, Criteria, Session, Touch, ValueChange
from mnemosyned.sessions.store import Renaming, SessionStore
from mnemosyned.sessions.token_hash import TokenHasher
from mnemosyned.storage.hash_keys import key_ids_in
from mnemosyned.storage.hashed import HashedStore
from mnemosyned.storage.postgres.queries import Query
from mnemosyned.storage.postgres.store import PostgresStore

KEY, FORMER_KEY = b"the key that is in use, for tests", b"the key that was in use, for tests"
KNOWN = TokenHasher([KEY, FORMER_KEY], is_hashing=True)
FORMER = TokenHasher([FORMER_KEY], is_hashing=True)
FORMER_FIRST = TokenHasher([FORMER_KEY, KEY], is_hashing=True)
READY = TokenHasher([KEY, FORMER_KEY], is_hashing=False)
Named = Callable[[str], str]


@pytest.fixture(params=[*stores.RENAMABLE, *stores.flavours("plain postgres")])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    async with stores.opened(request.param, request) as plain:
        yield plain


@pytest.fixture(params=["by its token", "by the former key", "by the key"])
def named(request: pytest.FixtureRequest) -> Named:
    """The name that a session has when it is looked for."""
    by_param: dict[str, Named] = {
        "by its token": str,
        "by the former key": FORMER.stored_key,
        "by the key": KNOWN.stored_key,
    }
    return by_param[request.param]


def skip_where_it_is_slow(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["engine"] in stores.SLOW:
        pytest.skip("its server here takes long")


async def all_names(engine: Engine) -> list[str]:
    return await engine.store.stored_keys_after("", limit=1000)


async def stored(engine: Engine, *stored_names: str) -> None:
    results = await engine.store.start([new(name, bag=bag.encode({"k": "v"})) for name in stored_names])
    assert all(isinstance(result, Session) for result in results)


async def test_a_load_finds_the_session_and_gives_it_its_name(engine: Engine, named: Named) -> None:
    await stored(engine, named("t"))
    store = HashedStore(engine.store, KNOWN)
    found, unknown = await store.load(lookups("t", "u"))

    assert isinstance(found, Session)
    assert found.access_token == "t"
    assert isinstance(unknown, SessionNotFound)
    assert await all_names(engine) == [KNOWN.stored_key("t")]


async def test_the_other_operations_find_it_too(engine: Engine, named: Named) -> None:
    await stored(engine, *(named(token) for token in "abcdef"))
    store = HashedStore(engine.store, KNOWN)
    later_us = (await store.now_us()) + 600_000_000

    assert await store.exist(["a", "u"]) == [True, False]
    changes = [ValueChange(access_token="b", key=key, value="2") for key in "xy"]
    assert bags(await store.set_values(changes)) == [{"k": "v", "x": "2"}, {"k": "v", "x": "2", "y": "2"}]
    assert await store.touch([Touch(access_token="c", expires_at_us=later_us)]) == [True]
    assert await store.abandon([Abandonment(access_token=token) for token in "dud"]) == [True, False, False]
    deleted = await store.delete(Criteria(access_token="e"), limit=5)
    assert (deleted.stored_keys, deleted.is_all) == ([KNOWN.stored_key("e")], True)
    assert isinstance((await store.start([new("f")]))[0], SessionAlreadyExists)
    assert sorted(await all_names(engine)) == sorted(map(KNOWN.stored_key, "abcf"))


async def test_a_delete_ends_no_session_that_meets_only_some_of_the_criteria(
    engine: Engine, named: Named
) -> None:
    await stored(engine, named("t"))
    store = HashedStore(engine.store, KNOWN)
    now_us = await store.now_us()

    for criteria in (
        Criteria(access_token="t", subject_id="another"),
        Criteria(access_token="t", refresh_token="another"),
        Criteria(access_token="t", expires_before_us=now_us),
        Criteria(access_token="t", subject_id="s", expires_after_us=now_us + 3_600_000_000),
    ):
        deleted = await store.delete(criteria, limit=5)
        assert (deleted.stored_keys, deleted.is_all) == ([], True)
    assert await store.exist(["t"]) == [True]


async def test_an_expired_session_does_not_exist_by_any_name(engine: Engine, named: Named) -> None:
    await stored(engine, named("t"))
    await engine.shift(named("t"), -61)
    store = HashedStore(engine.store, KNOWN)

    assert await store.exist(["t"]) == [False]
    assert await store.abandon([Abandonment(access_token="t")]) == [False]
    assert isinstance((await store.start([new("t")]))[0], Session)
    assert await store.exist(["t"]) == [True]


async def test_of_two_sessions_by_two_names_none_outlives_an_abandon(engine: Engine) -> None:
    await stored(engine, "t", KNOWN.stored_key("t"), FORMER.stored_key("t"))
    store = HashedStore(engine.store, KNOWN)

    assert await store.abandon([Abandonment(access_token="t")]) == [True]
    assert await all_names(engine) == []


async def test_an_expired_session_gives_its_name_to_one_that_lives(engine: Engine) -> None:
    await stored(engine, "t", KNOWN.stored_key("t"))
    await engine.shift(KNOWN.stored_key("t"), -61)
    store = HashedStore(engine.store, KNOWN)

    assert await store.exist(["t"]) == [True]
    assert isinstance((await store.start([new("t")]))[0], SessionAlreadyExists)
    assert await all_names(engine) == [KNOWN.stored_key("t")]


async def test_of_two_sessions_by_two_old_names_one_is_found(engine: Engine) -> None:
    await stored(engine, "t", FORMER.stored_key("t"), "u")
    store = HashedStore(engine.store, KNOWN)

    assert await store.exist(["t", "u"]) == [True, True]
    assert await store.abandon([Abandonment(access_token="t")]) == [True]
    assert await all_names(engine) == [KNOWN.stored_key("u")]


async def test_what_list_shows_ends_the_session_and_opens_nothing(engine: Engine) -> None:
    store = HashedStore(engine.store, KNOWN)
    await store.start([new("t")])
    (shown,) = (await store.find(Criteria(), offset=0, limit=10)).sessions
    handle = shown.access_token

    assert token_hash.is_session_id(handle)
    assert await store.exist([handle]) == [False]
    assert isinstance((await store.start([new(handle)]))[0], InvalidArgument)
    assert (await store.delete(Criteria(access_token=handle), limit=5)).stored_keys == [KNOWN.stored_key("t")]
    assert await store.exist(["t"]) == [False]


async def test_protection_can_be_turned_off_while_the_key_is_known(engine: Engine) -> None:
    await HashedStore(engine.store, TokenHasher([KEY], is_hashing=True)).start([new("t")])
    store = HashedStore(engine.store, READY)

    assert await store.exist(["t"]) == [True]
    assert await all_names(engine) == ["t"]


async def test_nodes_that_name_sessions_differently_lose_none(
    engine: Engine, request: pytest.FixtureRequest
) -> None:
    skip_where_it_is_slow(request)
    ways = [HashedStore(engine.store, one) for one in (KNOWN, TokenHasher([KEY], is_hashing=False))]
    tokens = [f"t{number}" for number in range(20)]
    await ways[0].start([new(token) for token in tokens])

    async def read(store: SessionStore) -> bool:
        return all([all(await store.exist(tokens)) for _ in range(20)])

    assert await asyncio.gather(*(read(store) for store in ways * 2)) == [True] * 4
    endings = [Abandonment(access_token=token) for token in tokens]
    results = await asyncio.gather(ways[0].abandon(endings), ways[1].exist(tokens))
    assert results[0] == [True] * 20
    assert await all_names(engine) == []


async def test_renaming_tells_where_there_is_a_session(engine: Engine) -> None:
    await stored(engine, "a", "b", "c", "d", "both", "taken")
    await engine.shift("c", -61)
    await engine.shift("taken", -61)
    pairs = [("a", "A"), ("none", "A2"), ("c", "C"), ("b", "B"), ("gone", "d"), ("both", "taken")]
    renamings = [Renaming(old=old, new=new_name) for old, new_name in pairs]

    assert await engine.store.rename(renamings) == [True, False, False, True, True, True]
    assert sorted(await all_names(engine)) == ["A", "B", "c", "d", "taken"]


async def test_names_come_in_the_order_of_their_bytes(engine: Engine) -> None:
    await stored(engine, "b", "\0a", "ż", "a", "\uffff", "\U00010000")

    assert await engine.store.stored_keys_after("", limit=3) == ["\0a", "a", "b"]
    assert await engine.store.stored_keys_after("b", limit=9) == ["ż", "\uffff", "\U00010000"]


async def test_a_migration_protects_every_token_and_tells_how_many(
    engine: Engine, request: pytest.FixtureRequest
) -> None:
    skip_where_it_is_slow(request)
    plain = [f"plain-{number}" for number in range(2500)]
    await stored(engine, *plain, "expired", KNOWN.stored_key("already"), FORMER.stored_key("former"))
    await engine.shift("expired", -61)

    assert await hash_all(engine.store, KNOWN) == 2500
    assert await hash_all(engine.store, KNOWN) == 0
    assert not set(plain) & set(await engine.store.stored_keys_after("", limit=5000))
    assert await HashedStore(engine.store, KNOWN).exist([*plain, "former"]) == [True] * 2501


async def test_the_keys_that_sessions_are_named_by_are_found(engine: Engine) -> None:
    third = TokenHasher([b"a key that nobody here knows"], is_hashing=True)
    assert await key_ids_in(engine.store) == set()
    await stored(
        engine, "plain", *(one.stored_key(token) for one in (KNOWN, FORMER, third) for token in "abc")
    )

    assert await key_ids_in(engine.store) == KNOWN.key_ids | third.key_ids


async def gets(stub: object, token: str) -> bool:
    try:
        await stub.Get(GetRequest(access_token=token))  # type: ignore[attr-defined]  # a stub has no type
    except grpc.aio.AioRpcError as exc:
        assert exc.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017  # the answer is looked at
        return False
    return True


def login(token: str = "") -> StartRequest:
    return StartRequest(session=WireSession(access_token=token, subject_id="s", refresh_token="r"))


@pytest.mark.parametrize("known", [KNOWN, READY], ids=["protected", "with a key only"])
async def test_a_delete_by_subject_ends_cached_sessions_whatever_their_names(
    engine: Engine, known: TokenHasher
) -> None:
    async with serving(HashedStore(engine.store, known)) as node:
        tokens = [(await node.stub.Start(login())).session.access_token for _ in range(3)]
        assert [await gets(node.stub, token) for token in tokens] == [True] * 3
        # As another node may have done meanwhile, while they are restarted one by one.
        renaming = Renaming(old=known.stored_key(tokens[0]), new=FORMER.stored_key(tokens[0]))
        assert await engine.store.rename([renaming]) == [True]

        assert (await node.stub.Delete(DeleteRequest(subject_id="s"))).value == 3
        assert [await gets(node.stub, token) for token in tokens] == [False] * 3
        assert not len(node.cache.lru)


async def test_a_delete_reaches_the_copies_of_other_nodes(engine: Engine) -> None:
    store = HashedStore(engine.store, KNOWN)
    async with (
        peering(store) as one,
        peering(store, seeds=(one.address,)) as other,
    ):
        await until_they_serve_copies(one, other)
        tokens = [(await one.stub.Start(login())).session.access_token for _ in range(16)]
        assert [await gets(other.stub, token) for token in tokens] == [True] * 16
        assert set(kept(one.cache)) | set(kept(other.cache)) == set(tokens)
        (shown, *_) = (await one.stub.List(ListRequest(limit=16))).sessions
        assert (await one.stub.Delete(DeleteRequest(access_token=shown.access_token))).value == 1
        assert sum([await gets(other.stub, token) for token in tokens]) == 15

        assert (await other.stub.Delete(DeleteRequest(refresh_token="r"))).value == 15
        assert [await gets(one.stub, token) for token in tokens] == [False] * 16


async def test_a_delete_fences_a_load_under_way(engine: Engine) -> None:
    store = HashedStore(engine.store, KNOWN)
    async with serving(store) as node:
        await node.stub.Start(login("t"))
        node.cache.drop("t")
        with node.cache.begin_fill("t") as fill:
            before = await store.load(lookups("t"))
            await node.stub.Delete(DeleteRequest(subject_id="s"))
            fill.put(node.service._slot(before[0], 0))  # type: ignore[arg-type]  # it is there

        assert not await gets(node.stub, "t")


async def test_a_name_is_no_token(engine: Engine) -> None:
    async with serving(HashedStore(engine.store, KNOWN)) as node:
        await node.stub.Start(login("t"))
        for call in (node.stub.Get, node.stub.Abandon):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(AbandonRequest(access_token=KNOWN.stored_key("t")))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


class Slow:
    """A store whose answers take their time, so that those of two nodes come in between one another."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._rng = Random(1)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[object]]:
        method = getattr(self._store, name)

        async def slowly(*args: object, **kwargs: object) -> object:
            await asyncio.sleep(self._rng.random() / 1000)
            answer = await method(*args, **kwargs)
            await asyncio.sleep(self._rng.random() / 1000)
            return answer

        return slowly


class Rival:
    """A store whose sessions another node renames back, so many times."""

    def __init__(self, store: SessionStore, times: int) -> None:
        self._store = store
        self._times = times

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    async def rename(self, renamings: Sequence[Renaming]) -> object:
        answer = await self._store.rename(renamings)  # type: ignore[attr-defined]  # it is renamable
        if self._times:
            self._times -= 1
            back = [Renaming(old=one.new, new=one.old) for one in renamings]
            await self._store.rename(back)  # type: ignore[attr-defined]
        return answer


async def test_a_session_that_is_renamed_back_four_times_is_found(engine: Engine) -> None:
    await stored(engine, "t")
    # From the token and from the former key, each time.
    store = HashedStore(Rival(engine.store, 2 * 4), KNOWN)  # type: ignore[arg-type]  # it passes all on

    (found,) = await store.load(lookups("t"))

    assert isinstance(found, Session)


async def test_a_session_that_two_nodes_rename_against_each_other_is_never_missing(engine: Engine) -> None:
    await stored(engine, "t")
    ways = [HashedStore(Slow(engine.store), one) for one in (KNOWN, FORMER_FIRST, READY)]  # type: ignore[arg-type]  # it passes all on

    async def read(store: SessionStore) -> bool:
        results = [(await store.load(lookups("t", "u"))) for _ in range(60)]
        assert all(isinstance(unknown, SessionNotFound) for _, unknown in results)
        return not any(isinstance(found, SessionNotFound) for found, _ in results)

    assert await asyncio.gather(*(read(store) for store in ways * 2)) == [True] * 6


@pytest.fixture
async def held(contract_dsn: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection in a transaction."""
    connection = await asyncpg.connect(contract_dsn)
    await connection.execute("BEGIN")
    yield connection
    await connection.close()


@pytest.fixture
async def postgres(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    async with stores.opened("postgres", request) as plain:
        yield plain


async def test_a_delete_by_subject_ends_what_is_renamed_meanwhile(
    postgres: Engine, held: asyncpg.Connection[asyncpg.Record]
) -> None:
    await stored(postgres, "t")
    async with serving(HashedStore(postgres.store, KNOWN)) as node:
        assert isinstance(postgres.store, PostgresStore)
        await held.fetch(postgres.store._queries.rename.sql, [b"t"], [KNOWN.stored_key("t").encode()])
        delete = asyncio.ensure_future(node.stub.Delete(DeleteRequest(subject_id="s")))
        await until_one_waits(held)
        await held.execute("COMMIT")

        assert (await delete).value == 1
        assert not await gets(node.stub, "t")


async def until_one_waits(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Wait until another connection waits for what this one has locked."""
    async with asyncio.timeout(5):
        while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.01)


async def test_a_session_that_a_writer_holds_harms_no_other(
    postgres: Engine, held: asyncpg.Connection[asyncpg.Record]
) -> None:
    await stored(postgres, "held", "free")
    assert isinstance(postgres.store, PostgresStore)
    table = postgres.store._table.sql
    await held.execute(f"SELECT 1 FROM {table} WHERE access_token = 'held' FOR NO KEY UPDATE")  # noqa: S608  # a table of ours
    locked, free, unknown = await HashedStore(postgres.store, KNOWN).load(lookups("held", "free", "unknown"))

    assert isinstance(locked, StorageUnavailable)
    assert isinstance(free, Session)
    assert isinstance(unknown, SessionNotFound)


async def test_nodes_with_one_key_and_a_migration_never_get_in_each_others_way(
    postgres: Engine, contract_dsn: str
) -> None:
    migrating = await postgres_engine(contract_dsn)
    await migrating.store.open()
    tokens = [f"t{number}" for number in range(3000)]
    for start in range(0, len(tokens), 500):
        await stored(postgres, *tokens[start : start + 500])
    store, rng = HashedStore(postgres.store, KNOWN), Random(1)
    later_us = await store.now_us() + 600_000_000
    is_over = False

    async def use() -> list[object]:
        odd: list[object] = []
        while not is_over:
            some = rng.sample(tokens, 200)
            touches = [Touch(access_token=token, expires_at_us=later_us) for token in some]
            results = await asyncio.gather(store.load(lookups(*some)), store.touch(touches))
            odd += [one for one in results[0] if not isinstance(one, Session)]
            odd += [one for one in results[1] if one is not True]
        return odd

    users = [asyncio.create_task(use()) for _ in range(3)]
    count = await hash_all(migrating.store, KNOWN)
    is_over = True

    assert await asyncio.gather(*users) == [[]] * 3
    assert 0 < count <= 3000
    assert not set(tokens) & set(await all_names(postgres))
    await migrating.store.close()


async def test_rows_that_are_not_ours_end_neither_a_migration_nor_the_look_for_keys(
    postgres: Engine, held: asyncpg.Connection[asyncpg.Record]
) -> None:
    await stored(postgres, "a", "b", FORMER.stored_key("c"))
    assert isinstance(postgres.store, PostgresStore)
    table = postgres.store._table.sql
    for name in (b"\xff\xfe\x01", b"\0strange\xff", b"\0" + b"z" * 80):
        await held.execute(f"INSERT INTO {table} VALUES ($1, '', 's', '', '', now() + interval '1 h')", name)  # noqa: S608  # likewise
    await held.execute("COMMIT")

    assert await hash_all(postgres.store, KNOWN) == 2
    assert await key_ids_in(postgres.store) == KNOWN.key_ids


async def test_no_statement_goes_through_a_table_that_was_small_when_it_was_planned(
    postgres: Engine,
) -> None:
    assert isinstance(postgres.store, PostgresStore)
    await stored(postgres, "a", "b")
    queries, names_, instant = postgres.store._queries, [b"a", b"b"], datetime.now(UTC)
    calls: list[tuple[Query, list[object]]] = [
        (queries.load, [names_, timedelta(1), timedelta(1)]),
        (queries.exist, [names_]),
        (queries.touch, [names_, [instant] * 2]),
        (queries.abandon, [names_, [instant] * 2]),
        (queries.rename, [names_, names_]),
        (queries.rename_one, [names_, names_]),
        (queries.stored_keys_after, [b"", 5]),
    ]
    async with postgres.store._pool.connection() as connection:
        await connection.execute(f"VACUUM ANALYZE {postgres.store._table.sql}")
        await connection.reset_type_codec("timestamptz", schema="pg_catalog")
        for query, values in calls:
            statement = await connection.prepare(query.sql)
            assert "Seq Scan" not in str(await statement.explain(*values)), query.name
