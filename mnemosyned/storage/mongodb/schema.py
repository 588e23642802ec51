"""The collections: which there are, their indexes, and whether they are as they should be.

    NAME         the sessions (documents.py)
    NAME_nodes   two documents: the rows of nodes and the store's identity; who cleans up (node_rows.py)
    NAME_trial   sessions that a start has tried and removed (trial.py)

Each index is made at the start, which does nothing if it is there. Later checks only look: a new index on
many sessions is a decision of the operator.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any, Final

from pymongo import IndexModel

from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.mongodb.client import LINEARIZABLE, Collection, Database

log = logging.getLogger(__name__)

_INDEXES: Final[dict[str, tuple[dict[str, int], dict[str, Any]]]] = {
    "by_expiry": ({"e": 1, "_id": 1}, {}),
    "by_subject": ({"s": 1, "_id": 1}, {}),
    "by_refresh_token": ({"r": 1, "_id": 1}, {"partialFilterExpression": {"r": {"$gt": ""}}}),
    "purge": ({"purge_at": 1}, {"expireAfterSeconds": 0}),
}


@dataclass(frozen=True, slots=True)
class Names:
    """The names of the collections."""

    sessions: str

    @property
    def nodes(self) -> str:
        """That of the nodes."""
        return f"{self.sessions}_nodes"

    @property
    def trial(self) -> Names:
        """Those of collections that no daemon uses but for trials."""
        return Names(f"{self.sessions}_trial")

    def written(self, database: Database) -> Collection:
        """Return the sessions for writing."""
        return database[self.sessions]

    def read(self, database: Database) -> Collection:
        """Return the sessions for reading what was written before."""
        return database[self.sessions].with_options(read_concern=LINEARIZABLE)


async def make(database: Database, names: Names) -> None:
    """Make what is missing. Raises PyMongo's errors; StorageRefused: the collection will never do."""
    await _found(database, names)
    models = [IndexModel(list(keys.items()), name=name, **more) for name, (keys, more) in _INDEXES.items()]
    await database[names.sessions].create_indexes(models)


async def look(database: Database, names: Names) -> bytes:
    """Return what is another one once the collection was dropped; make it if it is missing."""
    found = await _found(database, names)
    if found is None:
        await make(database, names)
        log.warning("collection_made_again", extra={"collection": names.sessions})
        found = await _found(database, names)
    uuid = (found or {}).get("info", {}).get("uuid", b"")
    return bytes(uuid)


async def missing_indexes(database: Database, names: Names) -> list[str]:
    """Return the commands that make the indexes which are gone."""
    there = await database[names.sessions].index_information()
    return [
        f"db.getCollection({json.dumps(names.sessions)}).createIndex({json.dumps(keys)}, "
        f"{json.dumps({'name': name, **more})})"
        for name, (keys, more) in _INDEXES.items()
        if name not in there
    ]


async def _found(database: Database, names: Names) -> dict[str, Any] | None:
    cursor = await database.list_collections(filter={"name": names.sessions})
    async for found in cursor:
        options = found.get("options", {})
        if found.get("type", "collection") != "collection" or options.get("capped"):
            raise StorageRefused(f"MongoDB: {names.sessions} is not an ordinary collection")
        if options.get("collation", {}).get("locale", "simple") != "simple":
            raise StorageRefused(
                f"MongoDB: {names.sessions} has a collation: its keys must compare by their bytes"
            )
        return dict(found)
    return None
