"""The rows of the nodes, by which leases are given (`cluster/lease.py`), and what else all nodes share.

    {_id: "nodes", identity, epoch, clock, mark, rows: [{name, instance, number, …, at}, …]}
    {_id: "cleanup", by, until}

All rows are in one document, so a renewal is one command: it changes the own row, and returns all of them
as they were at that moment. The server makes one change of a document after the other, and answers when a
majority has it.

- The mark is random, so each command changes something. Only a change proves that the server is the primary.
- `identity` names the sessions that nodes share. If the document is lost, the nodes that know it put it back.
- `epoch` is another one when the document is another one. The identity of the store has the primary's term of
  office besides. A failover loses no acknowledged write; a set that was restored, or was forced to have
  another primary, may.
- A command that the driver has repeated is done once, and answered as it was the first time.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from bson import Int64
from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from cluster.node_row import Barred, NodeRow, Renewal, Renewed
from mnemosyned.errors import StorageUnavailable
from mnemosyned.storage.mongodb.documents import NOW_US

if TYPE_CHECKING:
    from mnemosyned.storage.mongodb.client import Database, Document
    from mnemosyned.storage.mongodb.pool import MongoPool
    from mnemosyned.storage.mongodb.schema import Names

# A lease must not depend on an answer that does not come: a later one may.
_TIMEOUT_S: Final = 1.0
# How long others leave the cleanup to a node that has begun one.
_CLEANUP_US: Final = 5_000_000
_TRIES: Final = 3
_US_PER_MS: Final = 1000
_ROWS: Final[dict[str, Any]] = {"$ifNull": ["$rows", []]}


class NodeRows:
    """The rows of nodes (LeaseStore), the identity, the clock, and the turn to clean up."""

    def __init__(self, pool: MongoPool, names: Names) -> None:
        self._pool = pool
        self._names = names
        self._identity = secrets.token_bytes(16)
        self._node = secrets.token_bytes(8)

    async def renew(self, renewal: Renewal) -> Renewed:
        """See LeaseStore."""
        found = await self._changed("renew", _renewed(renewal), is_urgent=True)
        now_ms = int(found["clock"])
        try:
            rows = tuple(_row(row, now_ms) for row in found["rows"])
        except (KeyError, TypeError, ValueError) as exc:
            error = StorageUnavailable("mnemosyned: storage: the rows of the nodes are damaged")
            error.detail = f"renew: the document nodes in {self._names.nodes} has a damaged row"
            error.hint = "delete the document: the nodes make it again"
            raise error from exc
        return Renewed(rows, self._store_identity(found), now_ms * _US_PER_MS)

    async def bar(self, name: str) -> Barred | None:
        """See LeaseStore."""
        raised = {"$mergeObjects": ["$$row", {"epoch": {"$add": ["$$row.epoch", 1]}}]}
        rows = _mapped({"$cond": [_is_named(name), raised, "$$row"]})
        found = await self._changed("bar", rows, is_urgent=True)
        for row in found["rows"]:
            if row["name"] == name:
                identity = self._store_identity(found)
                return Barred(int(row["epoch"]), int(row["instance"]), int(row["number"]), identity)
        return None

    async def resign(self, row: tuple[str, int, int | None]) -> None:
        """See LeaseStore."""
        name, instance, number = row
        is_it = [_is_named(name), {"$eq": ["$$row.instance", Int64(instance)]}]
        if number is not None:
            is_it.append({"$eq": ["$$row.number", Int64(number)]})
        rows = {"$filter": {"input": _ROWS, "as": "row", "cond": {"$not": [{"$and": is_it}]}}}
        await self._changed("resign", rows, is_urgent=True)

    async def state(self) -> tuple[bytes, str, int]:
        """Return the identity of the sessions, what changes with them, and the clock in microseconds."""
        found = await self._changed("check", _ROWS)
        self._identity = bytes(found["identity"])
        return self._identity, found["epoch"], int(found["clock"]) * _US_PER_MS

    async def begin_cleanup(self) -> int:
        """Take the turn to clean up; return the clock, or 0 if another node has the turn."""
        is_over = {"$lte": [{"$ifNull": ["$until", Int64(0)]}, NOW_US]}
        is_free = {"$or": [is_over, {"$eq": ["$by", {"$literal": self._node}]}]}
        # The condition is in the update: the filter of an upsert may have no expression.
        fields = {
            "by": {"$cond": [is_free, {"$literal": self._node}, "$by"]},
            "until": {"$cond": [is_free, {"$add": [NOW_US, _CLEANUP_US]}, "$until"]},
        }
        found = await self._upsert("clean_up", "cleanup", fields)
        return int(found["until"]) - _CLEANUP_US if found["by"] == self._node else 0

    async def _changed(self, doing: str, rows: dict[str, Any], *, is_urgent: bool = False) -> Document:
        """Change the document of the rows; return it as it is then."""
        fields = {
            "identity": {"$ifNull": ["$identity", {"$literal": self._identity}]},
            "epoch": {"$ifNull": ["$epoch", {"$literal": secrets.token_hex(8)}]},
            "clock": "$$NOW",
            "mark": {"$literal": secrets.token_bytes(8)},
            "rows": rows,
        }
        return await self._upsert(doing, "nodes", fields, is_urgent=is_urgent)

    async def _upsert(
        self, doing: str, key: str, fields: dict[str, Any], *, is_urgent: bool = False
    ) -> Document:
        async def change(database: Database) -> Document | None:
            for _ in range(_TRIES):
                # Another node may make it at the same moment.
                with suppress(DuplicateKeyError):
                    found: Document | None = await database[self._names.nodes].find_one_and_update(
                        {"_id": key}, [{"$set": fields}], upsert=True, return_document=ReturnDocument.AFTER
                    )
                    if found is not None:
                        return found
            return None

        timeout_s = _TIMEOUT_S if is_urgent else None
        found = await self._pool.run(doing, change, is_urgent=is_urgent, timeout_s=timeout_s)
        if found is None:
            raise StorageUnavailable("mnemosyned: storage: the document of the nodes cannot be made")
        return found

    def _store_identity(self, found: Document) -> str:
        return f"{found['epoch']}/{self._pool.election}"


def _row(row: Document, now_ms: int) -> NodeRow:
    return NodeRow(
        str(row["name"]),
        int(row["instance"]),
        int(row["number"]),
        str(row["ring"]),
        int(row["epoch"]),
        int(row["base"]),
        int(row["seen"]),
        age_us=(now_ms - int(row["at"])) * _US_PER_MS,
    )


def _is_named(name: str) -> dict[str, Any]:
    return {"$eq": ["$$row.name", {"$literal": name}]}


def _mapped(row: dict[str, Any]) -> dict[str, Any]:
    return {"$map": {"input": _ROWS, "as": "row", "in": row}}


def _renewed(renewal: Renewal) -> dict[str, Any]:
    """Return the rows with that of the renewal, if it is newer, as an expression."""
    name, instance, number, ring, seen, (replaced_instance, replaced_number) = renewal
    fields = {
        "name": {"$literal": name},
        "instance": Int64(instance),
        "number": Int64(number),
        "ring": {"$literal": ring},
        "seen": Int64(seen),
        "at": "$$NOW",
    }
    its_instance, its_number = "$$row.instance", "$$row.number"
    may_replace = {
        "$or": [
            {"$and": [{"$eq": [its_instance, Int64(instance)]}, {"$lt": [its_number, Int64(number)]}]},
            {
                "$and": [
                    {"$eq": [its_instance, Int64(replaced_instance)]},
                    {"$eq": [its_number, Int64(replaced_number)]},
                ]
            },
        ]
    }
    epoch = {"$cond": [{"$gt": [Int64(seen), "$$row.epoch"]}, Int64(seen + 1), "$$row.epoch"]}
    replaced = {**fields, "epoch": epoch, "base": "$$row.base"}
    made = {**fields, "epoch": Int64(seen + 1), "base": Int64(seen + 1)}
    own = {"$filter": {"input": _ROWS, "as": "row", "cond": _is_named(name)}}
    is_mine = {"$and": [_is_named(name), may_replace]}
    kept = _mapped({"$cond": [is_mine, replaced, "$$row"]})
    return {"$cond": [{"$eq": [{"$size": own}, 0]}, {"$concatArrays": [_ROWS, [made]]}, kept]}
