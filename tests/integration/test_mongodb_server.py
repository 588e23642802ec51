"""What only a real MongoDB shows, on the replica set that MONGODB_URL names, as one who may administer it.

Its database gets collections of random names, which are left there. The suites of the contract run on it too:

    MONGODB_URL='mongodb://127.0.0.1:27017/test?replicaSet=rs0' make test ARGS='-k mongodb'
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
from mongodb_servers import URL, needs_real_mongodb
from pymongo.errors import PyMongoError
from stores import TTL_US, lookups, new, new_mongodb_store

from cluster.node_row import Renewal
from mnemosyned.sessions.model import Criteria, Session
from mnemosyned.storage.mongodb import documents, filters
from mnemosyned.storage.mongodb.client import Database
from mnemosyned.storage.mongodb.store import MongoStore

pytestmark = [needs_real_mongodb, pytest.mark.mongodb_server]


@pytest.fixture
async def store() -> AsyncIterator[MongoStore]:
    store = new_mongodb_store(URL, f"test-{secrets.token_hex(4)}")
    await store.open()
    yield store
    await store.close()


def database_of(store: MongoStore) -> Database:
    assert store._pool._client is not None
    return store._pool._client.database


async def started(store: MongoStore, *tokens: str, **fields: object) -> None:
    sessions = await store.start([new(token, **fields) for token in tokens])
    assert all(isinstance(session, Session) for session in sessions), sessions


def stages_of(plan: Any) -> set[tuple[str, str]]:  # noqa: ANN401  # of the server
    """The stages of a plan, each with its index."""
    if isinstance(plan, list):
        return set().union(*map(stages_of, plan))
    if not isinstance(plan, dict):
        return set()
    own = {(plan["stage"], plan.get("indexName", ""))} if "stage" in plan else set()
    return own.union(*(stages_of(part) for name, part in plan.items() if name != "rejectedPlans"))


@pytest.mark.parametrize(
    ("wanted", "sort", "index"),
    [
        (filters.matching(Criteria(subject_id="s7")), {}, "by_subject"),
        (filters.matching(Criteria(refresh_token="r7")), {}, "by_refresh_token"),
        (filters.both(filters.EVERYTHING, documents.live()), {"e": 1, "_id": 1}, "by_expiry"),
        (filters.both({"_id": {"$gte": "t5"}}, documents.live()), {"_id": 1}, "_id_"),
        ({**filters.EVERYTHING, "e": {"$lte": 1}}, {"e": 1, "_id": 1}, "by_expiry"),
    ],
    ids=["subject", "refresh token", "List", "walk", "cleanup"],
)
async def test_every_walk_has_an_index_and_sorts_nothing(
    store: MongoStore, wanted: dict[str, Any], sort: dict[str, int], index: str
) -> None:
    await started(store, *(f"t{number}" for number in range(10)), subject_id="s7", refresh_token="r7")
    for number in range(20):
        await started(store, *(f"{number}-{at}" for at in range(50)), subject_id=f"x{number}")
    pipeline = [{"$match": wanted}, *([{"$sort": sort}] if sort else []), {"$limit": 10}]
    explained = await database_of(store).command(
        "explain", {"aggregate": store._names.sessions, "pipeline": pipeline, "cursor": {}}
    )
    stages = stages_of(explained)

    assert index in {name for _, name in stages}, explained
    assert {"COLLSCAN", "SORT"}.isdisjoint({stage for stage, _ in stages}), explained


async def test_a_step_down_of_the_primary_fails_no_call_that_has_time(store: MongoStore) -> None:
    """With one member alone it takes as long as it may not be elected."""
    await started(store, "a")
    before = await store.renew(Renewal("a", 1, 1, "", 0))
    admin = database_of(store).client.admin
    stepping = asyncio.create_task(
        admin.command("replSetStepDown", 5, secondaryCatchUpPeriodSecs=1, force=True)
    )
    acknowledged: list[str] = []
    async with asyncio.timeout(30):
        while len(acknowledged) < 300 or not stepping.done():
            token = secrets.token_hex(8)
            await started(store, token)
            acknowledged.append(token)
    await asyncio.wait([stepping])
    assert isinstance(stepping.exception(), PyMongoError | None), stepping
    found = await store.load(lookups("a", *acknowledged))
    after = await store.renew(Renewal("a", 1, 2, "", 0))

    assert all(isinstance(session, Session) for session in found)
    # Another term of office is another store for the leases.
    assert before.identity != after.identity


@pytest.mark.timeout(180)
async def test_a_session_whose_time_to_purge_has_come_is_removed_by_the_server(store: MongoStore) -> None:
    """The server looks once a minute."""
    await started(store, "a", "b")
    collection = database_of(store)[store._names.sessions]
    await collection.update_one({"_id": "a"}, [{"$set": {"purge_at": "$$NOW"}}])
    async with asyncio.timeout(150):
        while await collection.count_documents({}) > 1:
            await asyncio.sleep(1)

    assert await store.exist(["a", "b"]) == [False, True]


async def test_sessions_by_the_thousand_are_started_listed_and_ended_in_time(store: MongoStore) -> None:
    tokens = [f"t{number:04}" for number in range(5000)]
    for at in range(0, len(tokens), 250):
        await started(store, *tokens[at : at + 250], subject_id="many", ttl_us=60 * TTL_US)
    page = await store.walk(Criteria(subject_id="many"), start=b"t2500", limit=1000)
    ended: list[str] = []
    while True:
        step = await store.delete(Criteria(subject_id="many"), limit=1000)
        ended += step.stored_keys
        if step.is_all:
            break

    assert [key.decode() for key in page.keys] == tokens[2500:3500]
    assert sorted(ended) == tokens
