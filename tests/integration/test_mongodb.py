"""What only MongoDB's engine does: its faults, its documents, what it makes and mends. On SecantusDB."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import dns.asyncresolver
import pytest
from bson import Int64
from certificates import Authority
from mongodb_servers import MongoServer, needs_mongodb
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import AutoReconnect, ServerSelectionTimeoutError
from secrecy import CANARY
from stores import BAG, TTL_US, bags, lookups, new, new_mongodb_store

from cluster.node_row import Renewal
from mnemosyned.errors import DeadlineExceeded, StorageUnavailable
from mnemosyned.sessions.model import (
    Abandonment,
    ChangedBag,
    Criteria,
    DamagedSession,
    Session,
    Touch,
    ValueChange,
)
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.mongodb import store as store_module
from mnemosyned.storage.mongodb.client import Database
from mnemosyned.storage.mongodb.store import MongoStore

# PyMongo leaves a socket to the garbage collector if a connection ends while it is made.
pytestmark = [
    needs_mongodb,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_names = (f"sessions-{number}" for number in itertools.count())
DAY_MS = 86_400_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoServer]:
    directory = tmp_path_factory.mktemp("mongodb") / "server"
    with MongoServer(directory, ("--enable-test-commands",)) as found:
        yield found


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Have such sockets found here, and not in a later test."""
    yield
    gc.collect()


@asynccontextmanager
async def opened(url: str, collection: str = "", *, timeout_s: float = 20) -> AsyncIterator[MongoStore]:
    store = new_mongodb_store(url, collection or next(_names), timeout_s=timeout_s)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(server: MongoServer) -> AsyncIterator[MongoStore]:
    async with opened(server.url) as found:
        yield found


def database_of(store: MongoStore) -> Database:
    """The database past the store, as another program sees it."""
    assert store._pool._client is not None
    return store._pool._client.database


def collection_of(store: MongoStore) -> AsyncCollection[dict[str, Any]]:
    return database_of(store)[store._names.sessions]


async def documents(store: MongoStore) -> dict[Any, dict[str, Any]]:
    return {one["_id"]: one async for one in collection_of(store).find()}


async def started(store: MongoStore, *tokens: str, **fields: object) -> None:
    sessions = await store.start([new(token, **fields) for token in tokens])
    assert all(isinstance(session, Session) for session in sessions), sessions


async def are_there(store: MongoStore, *tokens: str) -> list[bool]:
    return [isinstance(one, Session) for one in await store.load(lookups(*tokens))]


# Documents.


async def test_texts_of_callers_are_no_expressions(store: MongoStore) -> None:
    texts = {"subject_id": "$e", "subject_client": "$$NOW", "refresh_token": "$$REMOVE"}
    await started(store, "$_id", **texts)
    (loaded,) = await store.load(lookups("$_id"))
    await store.renew(Renewal("$rows", 1, 1, "$$ROOT", 0))
    renewed = await store.renew(Renewal("$rows", 1, 2, "$$ROOT", 0))

    assert isinstance(loaded, Session)
    assert {name: getattr(loaded, name) for name in texts} == texts
    assert [(row.name, row.number, row.ring) for row in renewed.rows] == [("$rows", 2, "$$ROOT")]
    assert (await store.delete(Criteria(subject_id="$e"), limit=9)).stored_keys == ["$_id"]


async def test_a_day_after_its_end_a_session_is_the_servers_to_remove(store: MongoStore) -> None:
    await started(store, "a", "b", "c")
    await collection_of(store).update_one({"_id": "b"}, {"$inc": {"e": -TTL_US // 2}})
    await store.load(lookups("b"))
    later_us = await store.now_us() + 5 * TTL_US
    await store.touch([Touch(access_token="c", expires_at_us=later_us)])

    for one in (await documents(store)).values():
        assert int(one["purge_at"]) == one["e"] // 1000 + DAY_MS
    indexes = await collection_of(store).index_information()
    assert indexes["purge"]["expireAfterSeconds"] == 0
    assert indexes["purge"]["key"] == [("purge_at", 1)]


async def test_a_start_that_comes_too_late_leaves_nothing_behind(store: MongoStore) -> None:
    (late,) = await store.start([new("late", not_after_us=1)])

    assert isinstance(late, DeadlineExceeded)
    assert await documents(store) == {}


async def test_what_a_start_that_came_too_late_has_left_is_no_session(store: MongoStore) -> None:
    # As if the daemon had ended between the two commands.
    await store._pool.run(
        "start",
        lambda database: database[store._names.sessions].insert_one(
            {"_id": "t", "s": "", "c": "", "r": "", "b": b"", "e": Int64(0), "v": b"v", "w": b"w"}
        ),
    )

    assert await store.exist(["t"]) == [False]
    assert (await store.find(Criteria(), offset=0, limit=9)).sessions == []
    await started(store, "t")
    assert await are_there(store, "t") == [True]


DAMAGED: dict[str, dict[str, Any]] = {
    "no subject": {"s": None},
    "a subject of another type": {"s": 5},
    "no bag": {"b": None},
    "a text for a bag": {"b": "text"},
    "a bag of 15 MB": {"b": bytes(15_000_000)},
    "a fraction for an expiry": {"e": 1e18},
    "a text for an expiry": {"e": "never"},
    "a list for a version": {"v": ["v"]},
}


async def test_what_others_have_written_harms_no_other_session(store: MongoStore) -> None:
    await started(store, "a", "b", *DAMAGED)
    for token, fields in DAMAGED.items():
        ((name, value),) = fields.items()
        change = {"$unset": {name: ""}} if value is None else {"$set": {name: value}}
        await collection_of(store).update_one({"_id": token}, change)
    for key in (7, b"bytes", {"a": "document"}):
        await collection_of(store).insert_one({"_id": key, "s": "s", "e": Int64(2**60)})
    tokens = ["a", *DAMAGED, "b"]
    loaded = await store.load(lookups(*tokens))
    page = await store.find(Criteria(), offset=0, limit=20)
    walked = await store.walk(Criteria(), start=b"", limit=20)
    stored = await store.stored_from("", limit=20)
    damaged = [one for one in stored if isinstance(one.found, DamagedSession)]
    # Nothing but a write needs the version, which is compared as it is.
    assert [isinstance(one, Session) for one in loaded] == [
        token in {"a", "b", "a list for a version"} for token in tokens
    ]
    assert {type(one).__name__ for one in loaded} == {"Session", "CorruptSession"}
    for found in (page.sessions, walked.sessions):
        assert {one.access_token for one in found} <= set(tokens)
        assert {"a", "b"} <= {one.access_token for one in found if isinstance(one, Session)}
    assert len(page.sessions) == len(tokens) - 2  # the two whose expiry is none
    assert {one.stored_key for one in stored} == set(tokens)
    changed = await store.set_values(
        [ValueChange(access_token=token, key="k", value="v") for token in tokens]
    )
    assert [isinstance(one, ChangedBag) for one in changed] == [isinstance(one, Session) for one in loaded]
    assert sorted(await store.remove_unchanged(damaged)) == sorted(set(DAMAGED) - {"a list for a version"})
    assert await are_there(store, "a", "b") == [True, True]


async def test_a_damaged_document_that_has_changed_since_is_not_removed(store: MongoStore) -> None:
    await collection_of(store).insert_one({"_id": "x", "s": 5})
    found = await store.stored_from("", limit=9)
    await collection_of(store).update_one({"_id": "x"}, {"$set": {"s": "repaired"}})

    assert await store.remove_unchanged(found) == []
    assert len(await documents(store)) == 1


# What several nodes do at once.


async def test_many_writers_of_one_bag_lose_nothing_though_they_are_on_many_nodes(
    server: MongoServer,
) -> None:
    name = next(_names)
    async with (
        opened(server.url, name) as one,
        opened(server.url, name) as two,
        opened(server.url, name) as three,
    ):
        await started(one, "a", bag=b"")

        async def write(store: MongoStore, node: int) -> None:
            for number in range(8):
                change = ValueChange(access_token="a", key=f"{node}/{number}", value="v")
                (values,) = bags(await store.set_values([change]))
                assert isinstance(values, dict)
                assert values[change.key] == "v"

        await asyncio.gather(*(write(store, node) for node, store in enumerate((one, two, three))))
        (values,) = bags(await one.set_values([ValueChange(access_token="a", key="last", value="v")]))

    assert isinstance(values, dict)
    assert len(values) == 3 * 8 + 1


async def test_a_bag_that_another_has_claimed_is_written_when_the_claim_ends(store: MongoStore) -> None:
    await started(store, "a", bag=b"")
    until_us = await store.now_us() + 300_000
    claim = {"o": b"stalled", "l": Int64(until_us)}
    await collection_of(store).update_one({"_id": "a"}, {"$set": claim})

    change = ValueChange(access_token="a", key="k", value="v")
    assert bags(await store.set_values([change])) == [{"k": "v"}]
    assert await store.now_us() >= until_us
    assert {"o", "l"}.isdisjoint((await documents(store))["a"])


async def test_a_node_leaves_the_cleanup_to_another_that_has_begun_it(server: MongoServer) -> None:
    name = next(_names)
    async with opened(server.url, name) as one, opened(server.url, name) as other:
        await started(one, "a", "b")
        await collection_of(one).update_many({}, {"$inc": {"e": -2 * TTL_US}})

        assert len(await one.clean_up(limit=1)) == 1
        assert await other.clean_up(limit=9) == []
        assert len(await one.clean_up(limit=9)) == 1


async def test_of_starts_at_the_same_time_one_has_the_token(server: MongoServer) -> None:
    name = next(_names)
    async with opened(server.url, name) as one, opened(server.url, name) as other:
        for number in range(10):
            starts = [
                store.start([new(f"t{number}", subject_id=str(at))])
                for at, store in enumerate((one, other) * 2)
            ]
            outcomes = [outcome for (outcome,) in await asyncio.gather(*starts)]
            (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Session)]
            (loaded,) = await one.load(lookups(f"t{number}"))

            assert loaded == winner


# What the engine makes and mends.


async def test_a_collection_that_was_dropped_is_made_again_and_is_another_one(
    store: MongoStore, caplog: pytest.LogCaptureFixture
) -> None:
    await started(store, "a")
    before, identity = await store.check(), await store.identity()
    await collection_of(store).drop()

    assert await store.check() != before
    assert await store.identity() == identity
    assert len(await collection_of(store).index_information()) == 5
    assert "collection_made_again" in caplog.text


async def test_a_lost_row_of_nodes_is_another_store_of_the_same_name(store: MongoStore) -> None:
    before, identity = await store.renew(Renewal("a", 1, 1, "", 0)), await store.identity()
    await database_of(store)[store._names.nodes].delete_many({})
    after = await store.renew(Renewal("a", 1, 2, "", 0))

    assert before.identity != after.identity
    assert await store.identity() == identity


async def test_a_damaged_row_of_a_node_is_unavailable_until_it_is_deleted(store: MongoStore) -> None:
    nodes = database_of(store)[store._names.nodes]
    await store.renew(Renewal("a", 1, 1, "", 0))
    for rows in ([{"name": "b"}], "no list"):
        await nodes.update_one({"_id": "nodes"}, {"$set": {"rows": rows}})
        with pytest.raises(StorageUnavailable):
            await store.renew(Renewal("a", 1, 2, "", 0))
    await nodes.delete_one({"_id": "nodes"})

    assert len((await store.renew(Renewal("a", 1, 3, "", 0))).rows) == 1


async def test_the_command_that_makes_a_lost_index_is_in_the_log_once(
    store: MongoStore, caplog: pytest.LogCaptureFixture
) -> None:
    await collection_of(store).drop_index("by_refresh_token")
    before = await store.check()

    assert await store.check() == before
    (record,) = [one for one in caplog.records if one.message == "index_missing"]
    assert record.mend == (  # type: ignore[attr-defined]  # a field of the line
        f'db.getCollection("{store._names.sessions}").createIndex({{"r": 1, "_id": 1}}, '
        '{"name": "by_refresh_token", "partialFilterExpression": {"r": {"$gt": ""}}})'
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"collation": {"locale": "de"}}, "has a collation: its keys must compare by their bytes"),
        ({"capped": True, "size": 100_000}, "is not an ordinary collection"),
        ({"viewOn": "other", "pipeline": []}, "is not an ordinary collection"),
    ],
    ids=["collation", "capped", "view"],
)
async def test_a_collection_that_will_never_do_ends_the_start(
    server: MongoServer, options: dict[str, Any], complaint: str
) -> None:
    name = next(_names)
    server.command({"create": name, **options})
    with pytest.raises(StorageRefused, match=complaint):
        await new_mongodb_store(server.url, name).open()


# Faults.


@contextmanager
def failing(server: MongoServer, *commands: str, times: int, **how: Any) -> Iterator[None]:  # noqa: ANN401  # of the server
    """Have the server fail these commands."""
    point = {"configureFailPoint": "failCommand"}
    how = {"failCommands": list(commands), **how}
    with server.connected() as database:
        admin = database.client.admin
        admin.command({**point, "mode": {"times": times}, "data": how})
        try:
            yield
        finally:
            admin.command({**point, "mode": "off"})


@pytest.mark.parametrize(
    "how",
    [{"closeConnection": True}, {"errorCode": 10107}, {"errorCode": 91}],
    ids=["connection", "not primary", "shutdown"],
)
async def test_a_command_that_was_interrupted_is_repeated(
    server: MongoServer, store: MongoStore, how: dict[str, Any]
) -> None:
    with failing(server, "update", times=1, **how):
        await started(store, "a")
    with failing(server, "aggregate", times=1, **how):
        assert await are_there(store, "a") == [True]


async def test_writes_that_were_interrupted_are_repeated(server: MongoServer, store: MongoStore) -> None:
    await started(store, "a")
    with failing(server, "delete", times=1, closeConnection=True):
        assert await store.abandon([Abandonment(access_token="a")]) == [True]
    with failing(server, "findAndModify", times=1, closeConnection=True):
        assert len((await store.renew(Renewal("a", 1, 1, "", 0))).rows) == 1


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (50, "the server did not finish in time"),
        (13, "the user lacks a right"),
        (14031, "the disk of the server is full"),
    ],
)
async def test_a_fault_is_unavailable_and_named(
    server: MongoServer, store: MongoStore, code: int, name: str
) -> None:
    commands = ("update", "aggregate", "delete", "findAndModify")
    with failing(server, *commands, times=10_000, errorCode=code):
        for call in (
            store.start([new("a")]),
            store.load(lookups("a")),
            store.abandon([Abandonment(access_token="a")]),
            store.renew(Renewal("a", 1, 1, "", 0)),
            store.check(),
        ):
            with pytest.raises(StorageUnavailable) as failed:
                await call
            assert name in failed.value.detail
            assert failed.value.is_under_way


@pytest.mark.parametrize("how", [{"closeConnection": True}, {"errorCode": 10107}], ids=str)
async def test_an_interruption_that_lasts_is_unavailable_when_the_time_is_up(
    server: MongoServer, how: dict[str, Any]
) -> None:
    async with opened(server.url, timeout_s=0.5) as store:
        with failing(server, "update", "aggregate", times=10_000, **how):
            async with asyncio.timeout(5):
                for call in (store.start([new("a")]), store.load(lookups("a"))):
                    with pytest.raises(StorageUnavailable):
                        await call


async def test_a_write_without_a_majority_is_unavailable_and_may_have_been_done(
    server: MongoServer, store: MongoStore
) -> None:
    await started(store, "b")
    error = {"code": 64, "errmsg": "waiting for replication timed out"}
    for command, call in (
        ("update", store.start([new("a")])),
        ("update", store.set_values([ValueChange(access_token="b", key="k", value="v")])),
        ("delete", store.abandon([Abandonment(access_token="b")])),
        ("findAndModify", store.renew(Renewal("a", 1, 1, "", 0))),
    ):
        with (
            failing(server, command, times=1, writeConcernError=error),
            pytest.raises(StorageUnavailable) as failed,
        ):
            await call
        assert "no majority of the members has confirmed a write" in failed.value.detail
        assert failed.value.is_under_way


async def test_a_stalled_server_is_unavailable_within_the_time_out_and_then_used_again(
    tmp_path: Path,
) -> None:
    with MongoServer(tmp_path / "server") as server:
        async with opened(server.url, timeout_s=1) as store:
            await started(store, "a")
            server.signal(signal.SIGSTOP)
            try:
                async with asyncio.timeout(15):
                    for _ in range(3):
                        with pytest.raises(StorageUnavailable):
                            await store.load(lookups("a"))
            finally:
                server.signal(signal.SIGCONT)
            async with asyncio.timeout(15):
                while True:
                    try:
                        assert await are_there(store, "a") == [True]
                    except StorageUnavailable:
                        continue
                    break


async def test_a_stalled_server_costs_a_batch_one_time_out_and_not_one_for_each_command(
    tmp_path: Path,
) -> None:
    name, tokens = next(_names), [f"t{number}" for number in range(60)]
    with MongoServer(tmp_path / "server") as server:
        # The stand-in may take longer for so many than the time-out of the test.
        async with opened(server.url, name) as patient:
            await started(patient, *tokens)
        async with opened(server.url, name, timeout_s=1) as store:
            server.signal(signal.SIGSTOP)
            try:
                async with asyncio.timeout(8):
                    with pytest.raises(StorageUnavailable) as failed:
                        await store.abandon([Abandonment(access_token=token) for token in tokens])
            finally:
                server.signal(signal.SIGCONT)

    assert failed.value.is_under_way


async def test_a_failed_command_of_several_leaves_open_what_the_others_have_done(store: MongoStore) -> None:
    for outcome, is_under_way in (
        (ServerSelectionTimeoutError(), False),
        (AutoReconnect(), True),
        (None, True),
    ):
        both_begun = asyncio.Barrier(2)

        async def end(error: Exception | None, both_begun: asyncio.Barrier = both_begun) -> None:
            await both_begun.wait()
            if error is not None:
                raise error

        works = [lambda _, error=error: end(error) for error in (ServerSelectionTimeoutError(), outcome)]
        with pytest.raises(StorageUnavailable) as failed:
            await store._pool.run_each("abandon", works)
        assert failed.value.is_under_way is is_under_way


async def test_closing_does_not_wait_for_a_stalled_server(tmp_path: Path) -> None:
    with MongoServer(tmp_path / "server") as server:
        async with opened(server.url, timeout_s=1) as store:
            await started(store, "a")
            server.signal(signal.SIGSTOP)
            try:
                async with asyncio.timeout(4):
                    await store.close()
            finally:
                server.signal(signal.SIGCONT)


async def test_closing_does_not_wait_for_a_server_that_is_gone(tmp_path: Path) -> None:
    with MongoServer(tmp_path / "server") as server:
        async with opened(server.url, timeout_s=1) as store:
            await started(store, "a")
            server.kill()
            assert store._pool._client is not None
            async with asyncio.timeout(10):
                while store._pool._client.roles() != ["Unknown"]:
                    await asyncio.sleep(0.01)
            async with asyncio.timeout(4):
                await store.close()


async def test_without_a_server_nothing_is_under_way_and_the_reason_is_told(tmp_path: Path) -> None:
    with MongoServer(tmp_path / "server") as server:
        async with opened(server.url, timeout_s=1) as store:
            await started(store, "a")
            server.kill()
            # The first call may still find a connection.
            for _ in range(2):
                with pytest.raises(StorageUnavailable) as failed:
                    await store.load(lookups("a"))
            server.start()

    assert "no server can be written to" in failed.value.detail
    assert not failed.value.is_under_way


async def test_a_delete_that_loses_the_server_after_its_first_step_may_have_ended_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MongoServer(tmp_path / "server") as server:
        async with opened(server.url, timeout_s=1) as store:
            await started(store, *"abcde")
            monkeypatch.setattr(store_module, "_STEP", 2)
            run_each = store._pool.run_each

            async def run_each_and_lose_the_server(*arguments: Any, **options: Any) -> list[Any]:  # noqa: ANN401  # as it comes
                done = await run_each(*arguments, **options)
                server.kill()
                # The first call after that may still find a connection.
                with pytest.raises(StorageUnavailable):
                    await store.exist(["a"])
                return done

            monkeypatch.setattr(store._pool, "run_each", run_each_and_lose_the_server)
            with pytest.raises(StorageUnavailable) as failed:
                await store.delete(Criteria(subject_id="s"), limit=1000)

    assert "no server can be written to" in failed.value.detail
    assert failed.value.is_under_way


async def test_a_call_that_was_cancelled_disturbs_no_other(store: MongoStore) -> None:
    await started(store, "a")
    for wait_s in (0, 0.0005, 0.001, 0.002) * 5:
        call = asyncio.create_task(store.load(lookups("a")))
        await asyncio.sleep(wait_s)
        call.cancel()
        await asyncio.wait([call])

    assert await are_there(store, "a") == [True]
    assert store._pool._client is not None
    assert store._pool._client.in_use == 0


async def test_renewals_do_not_wait_for_other_calls(server: MongoServer) -> None:
    async with opened(server.url, timeout_s=5) as store:
        assert store._pool._options.pool_size == 8
        for _ in range(8):
            await store._pool._free.acquire()

        assert len((await store.renew(Renewal("a", 1, 1, "", 0))).rows) == 1
        for _ in range(8):
            store._pool._free.release()


async def test_a_look_up_in_the_dns_that_has_no_answer_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(dns.asyncresolver, "resolve", never)
    store = new_mongodb_store("mongodb+srv://c.example.net/", "x", timeout_s=0.5)
    async with asyncio.timeout(5):
        with pytest.raises(StorageUnavailable) as failed:
            await store.open()

    assert "no answer in time (server c.example.net (SRV)" in failed.value.detail


async def test_nothing_is_logged_of_a_session(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "mnemosyned")
    with MongoServer(tmp_path / "server") as server:
        async with opened(server.url, timeout_s=2) as store:
            await started(store, CANARY, bag=BAG)
            server.kill()
            with pytest.raises(StorageUnavailable):
                await store.start([new(CANARY, bag=BAG)])

    assert "storage_failed" in json.dumps([str(record.__dict__) for record in caplog.records])
    assert CANARY not in caplog.text


# Users and TLS.

USER, PASSWORD = "mnemosyned", f"{CANARY}-of-the-user"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "mongodb.md").read_text()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoServer]:
    """A server with the user of docs/mongodb.md, and one who may only read."""
    role = re.search(r'roles: \[\{role: "(\w+)", db: "mnemosyne"\}\]', DOCUMENT)
    assert role is not None
    server = MongoServer(tmp_path_factory.mktemp("guarded") / "server")
    with server:
        for user, its in ((USER, role[1]), ("reader", "read")):
            roles = [{"role": its, "db": "test"}]
            server.command({"createUser": user, "pwd": PASSWORD, "roles": roles})
        server.stop()
    with MongoServer(server.directory, ("--auth",), port=server.port) as found:
        yield found


def url_of(server: MongoServer, user: str, password: str) -> str:
    return server.url.replace("://", f"://{user}:{password}@")


async def test_the_documented_user_can_do_all(guarded: MongoServer) -> None:
    async with opened(url_of(guarded, USER, PASSWORD)) as store:
        await started(store, "a")
        assert await are_there(store, "a") == [True]


@pytest.mark.parametrize(
    ("user", "password", "complaint"),
    [
        (USER, "hunter2", "wrong user or password"),
        ("unknown", "hunter2", "wrong user or password"),
        ("reader", PASSWORD, "Unauthorized: the user lacks a right"),
    ],
    ids=["password", "user", "right"],
)
async def test_a_user_who_may_not_ends_the_start_in_one_line(
    guarded: MongoServer, user: str, password: str, complaint: str
) -> None:
    with pytest.raises(StorageRefused) as refused:
        await new_mongodb_store(url_of(guarded, user, password), "x").open()

    assert str(refused.value).startswith(
        f"MongoDB at server 127.0.0.1:{guarded.port}, database test, user {user}: "
    )
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)
    assert password not in str(refused.value)


async def test_with_tls_both_sides_show_their_certificates(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "authority"), Authority(tmp_path / "stranger")
    its, ours = authority.issue("localhost", at="server"), authority.issue("daemon", at="client")
    foreign = stranger.issue("daemon", at="foreign")
    for directory in (ours, foreign):
        both = (directory / "crt.pem").read_text() + (directory / "key.pem").read_text()
        (directory / "both.pem").write_text(both)
    options = (
        "--tls-cert-file",
        its / "crt.pem",
        "--tls-key-file",
        its / "key.pem",
        "--tls-ca-file",
        authority.path,
    )
    known, own = f"tlsCAFile={authority.path}", f"tlsCertificateKeyFile={ours / 'both.pem'}"
    # The server tells the driver an address of its own that no certificate names.
    tls = "tls=true&directConnection=true"
    server = MongoServer(
        tmp_path / "server", (*map(str, options), "--tls-require-client-cert"), tls=f"{tls}&{known}&{own}"
    )
    with server:
        async with opened(server.url) as store:
            await started(store, "a")
        for host, options_of_url, complaint in (
            # The certificate names localhost.
            ("127.0.0.1", f"{known}&{own}", "TLS: the server's certificate"),
            ("localhost", own, "TLS: the server's certificate"),
            ("localhost", known, ""),
            ("localhost", f"{known}&tlsCertificateKeyFile={foreign / 'both.pem'}", ""),
        ):
            url = f"mongodb://{host}:{server.port}/test?{tls}&{options_of_url}"
            assert complaint in await why_unavailable(url)
            # A socket that PyMongo has left would keep this server from the next handshake.
            gc.collect()


async def why_unavailable(url: str) -> str:
    try:
        await new_mongodb_store(url, "x", timeout_s=1).open()
    except StorageUnavailable as exc:
        return exc.detail
    raise AssertionError("it is available")
