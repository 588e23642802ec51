"""Another key for a session of MongoDB: another document, since `_id` never changes.

Both documents change in one transaction, so no reader finds the session twice or not at all. A transaction
that meets another writer of one of them is repeated, by the driver or here. A reader is never in its way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from pymongo import WriteConcern
from pymongo.errors import DuplicateKeyError
from pymongo.read_concern import ReadConcern

from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions.store import Renaming
from mnemosyned.storage.mongodb import documents

if TYPE_CHECKING:
    from pymongo.asynchronous.client_session import AsyncClientSession

    from mnemosyned.storage.mongodb.client import Database
    from mnemosyned.storage.mongodb.pool import MongoPool
    from mnemosyned.storage.mongodb.schema import Names
    from mnemosyned.storage.mongodb.walks import Walks

_TRIES: Final = 4


async def rename(
    pool: MongoPool, names: Names, walks: Walks, renamings: Sequence[Renaming]
) -> list[bool | MnemosyneError]:
    """Rename sessions; see RenamableStore."""
    keys = [key for one in renamings for key in (one.old, one.new)]
    live = await walks.live_of(keys, "rename")
    works = [_renaming(names, one) for one in renamings if one.old in live and one.old != one.new]
    if works:
        await pool.run_each("rename", works, is_begun=False)
        # By either key: another node may have renamed it back.
        live = await walks.live_of(keys, "rename", is_begun=True)
    return [one.old in live or one.new in live for one in renamings]


def _renaming(names: Names, one: Renaming) -> Callable[[Database], Awaitable[None]]:
    async def rename(database: Database) -> None:
        for tries_left in reversed(range(_TRIES)):
            try:
                async with database.client.start_session() as session:
                    await session.with_transaction(
                        lambda session: _move(names, database, one, session),
                        read_concern=ReadConcern("snapshot"),
                        write_concern=WriteConcern("majority", j=True),
                    )
            except UnicodeEncodeError:
                # A damaged session, which cannot be sent again, keeps its key.
                return
            except DuplicateKeyError:
                # A Start has stored the new key meanwhile.
                if not tries_left:
                    raise
            else:
                return

    return rename


async def _move(names: Names, database: Database, one: Renaming, session: AsyncClientSession) -> None:
    """Move a session within a transaction; of two live ones, that with the new key stays."""
    collection = names.written(database)

    async def found(key: str) -> dict[str, Any] | None:
        stages = [{"$match": {"_id": key, **documents.live()}}]
        async with await collection.aggregate(stages, session=session) as cursor:
            async for document in cursor:
                return document
        return None

    held = await found(one.old)
    if held is None:
        return
    await collection.delete_one({"_id": one.old}, session=session)
    if await found(one.new) is None:
        await collection.replace_one({"_id": one.new}, {**held, "_id": one.new}, upsert=True, session=session)
