"""Start in MongoDB: an upsert for each session, all in one command, and a read of what became of them.

An upsert stores a session where none is live, or leaves the live one. It does not say which. So each has a
random mark, and the read shows whose mark a session has, and its expiry, which the server has decided.

    the session has        result
    the own mark           started; too late, if it never lived
    another mark           the key is in use; too late, if the time is up by now
    (there is none)        it was ended before the read, by another call; whether it was ours is not known

A majority has what this call has stored, so any read may show the own marks. The other results are what a
former primary could be wrong about: they are those of a second read, which is linearizable (`store.py`).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from pymongo import UpdateOne
from pymongo.errors import BulkWriteError

from mnemosyned.errors import DeadlineExceeded, MnemosyneError, SessionAlreadyExists, StorageUnavailable
from mnemosyned.sessions.model import NewSession, Session
from mnemosyned.storage.mongodb import documents
from mnemosyned.storage.mongodb.faults import DUPLICATE_KEY

if TYPE_CHECKING:
    from mnemosyned.storage.mongodb.client import Database, Document
    from mnemosyned.storage.mongodb.pool import MongoPool
    from mnemosyned.storage.mongodb.schema import Names
    from mnemosyned.storage.mongodb.walks import Walks

# Two upserts of one key at the same moment: one fails, and finds the other's document when it is repeated.
_TRIES: Final = 4


async def start(
    pool: MongoPool, names: Names, walks: Walks, sessions: Sequence[NewSession]
) -> list[Session | MnemosyneError]:
    """Start sessions; see SessionStore."""
    results: list[Session | MnemosyneError] = []
    left = list(sessions)
    while left:
        # A key that comes once more is for the next command, which meets the session of this one.
        by_key: dict[str, NewSession] = {}
        while left and left[0].access_token not in by_key:
            new = left.pop(0)
            by_key[new.access_token] = new
        results += await _started(pool, names, walks, list(by_key.values()), is_begun=bool(results))
    return results


async def _started(
    pool: MongoPool, names: Names, walks: Walks, sessions: Sequence[NewSession], *, is_begun: bool
) -> list[Session | MnemosyneError]:
    """Start sessions of different keys."""
    marks = {new.access_token: secrets.token_bytes(documents.MARK_BYTES) for new in sessions}
    updates = [
        UpdateOne({"_id": new.access_token}, documents.start(new, marks[new.access_token]), upsert=True)
        for new in sessions
    ]

    for tries in range(_TRIES):
        updates = await pool.run(
            "start", partial(_written, names, updates, is_last=tries + 1 == _TRIES), is_begun=is_begun
        )
        is_begun = True
        if not updates:
            break
    expiries = await pool.run("start", partial(_expiries, names, marks), is_begun=True)
    others = [key for key in marks if key not in expiries]
    shown = await walks.those_of(others, "start", is_begun=True) if others else {}
    results = [_result(new, marks[new.access_token], expiries, shown) for new in sessions]
    late = [new.access_token for new, result in zip(sessions, results, strict=True) if _is_late(result)]
    if late:
        own = {"_id": {"$in": late}, "w": {"$in": [marks[key] for key in late]}}
        await pool.run("start", lambda database: names.written(database).delete_many(own), is_begun=True)
    return results


async def _expiries(names: Names, marks: Mapping[str, bytes], database: Database) -> dict[str, int]:
    """Return the expiries of the sessions that have these marks, by key."""
    wanted = {"_id": {"$in": list(marks)}, "w": {"$in": list(marks.values())}}
    found = names.written(database).find(wanted, {"w": 1, "e": 1})
    return {one["_id"]: int(one["e"]) async for one in found if one["w"] == marks[one["_id"]]}


async def _written(
    names: Names, updates: list[UpdateOne], database: Database, *, is_last: bool
) -> list[UpdateOne]:
    """Write; return the updates that must be repeated, since they have met another upsert."""
    try:
        await names.written(database).bulk_write(updates, ordered=False)
    except BulkWriteError as exc:
        repeated = _duplicates(exc)
        if not repeated or is_last:
            raise
        return [updates[at] for at in repeated]
    return []


def _duplicates(exc: BulkWriteError) -> list[int]:
    """Return the places of updates that met another upsert; none if there is another failure."""
    failures = exc.details.get("writeErrors", [])
    if exc.details.get("writeConcernErrors") or any(one.get("code") != DUPLICATE_KEY for one in failures):
        return []
    return [one["index"] for one in failures]


def _is_late(result: Session | MnemosyneError) -> bool:
    return isinstance(result, DeadlineExceeded)


def _result(
    new: NewSession, mark: bytes, expiries: Mapping[str, int], shown: Mapping[str, Document]
) -> Session | MnemosyneError:
    other = shown.get(new.access_token)
    stored = {} if other is None else other["d"] or {}
    expiry_us = stored.get("e") if stored.get("w") == mark else expiries.get(new.access_token)
    if expiry_us is not None:
        return DeadlineExceeded() if expiry_us == documents.NEVER_LIVED_US else new.stored(int(expiry_us))
    if other is None:
        return StorageUnavailable("mnemosyned: storage: the session was ended while it was started")
    is_late = documents.is_late(documents.now_us(other), new.not_after_us)
    return DeadlineExceeded() if is_late else SessionAlreadyExists()
