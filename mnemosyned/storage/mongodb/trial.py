"""Do the commands do what they should on this server? Tried at each start, in a collection of their own.

A right that the user lacks ends the start in this way, and not a call some hours later. So does a server that
only resembles MongoDB.
"""

from __future__ import annotations

import secrets
from typing import Final

from cluster.node_row import Renewal
from mnemosyned.errors import DeadlineExceeded
from mnemosyned.sessions import bag
from mnemosyned.sessions.model import (
    Abandonment,
    ChangedBag,
    Criteria,
    Lookup,
    NewSession,
    Session,
    Touch,
    ValueChange,
)
from mnemosyned.sessions.store import FullStore, Renaming, StorageRefused

_TTL_US: Final = 10_000_000


async def run(store: FullStore) -> None:
    """Start, read, change, name and end sessions of keys that no other trial has.

    Raises:
        StorageUnavailable: a command fails.
        StorageRefused: a command does something else.
    """
    subject = secrets.token_hex(8)
    one, two, late = (f"{subject} {name}" for name in ("$one", "two", "late"))
    new = NewSession(access_token=one, subject_id=subject, refresh_token=subject, ttl_us=_TTL_US)
    refused = NewSession(access_token=late, subject_id=subject, ttl_us=_TTL_US, not_after_us=1)
    started, too_late = await store.start([new, refused])
    (loaded,) = await store.load([Lookup(access_token=one, ttl_us=2 * _TTL_US, touch_interval_us=0)])
    (changed,) = await store.set_values([ValueChange(access_token=one, key="k", value="v")])
    moved = await store.touch([Touch(access_token=one, expires_at_us=0)])
    renamed = await store.rename([Renaming(old=one, new=two)])
    page = await store.find(Criteria(subject_id=subject), offset=0, limit=2)
    walked = await store.walk(Criteria(subject_id=subject), start=b"", limit=2)
    stored = await store.stored_from(two, limit=1)
    await store.start([new])
    ended = await store.abandon([Abandonment(access_token=one)])
    await store.renew(Renewal(subject, 1, 1, "", 0))
    await store.bar(subject)
    await store.resign((subject, 1, None))
    deletion = await store.delete(Criteria(refresh_token=subject), limit=2)
    removed = await store.remove_unchanged(stored)
    await store.clean_up(limit=1)
    is_as_it_should = (
        isinstance(started, Session)
        and isinstance(too_late, DeadlineExceeded)
        and isinstance(loaded, Session)
        and loaded.expires_at_us > started.expires_at_us
        and isinstance(changed, ChangedBag)
        and changed.values == {"k": "v"}
        and moved == renamed == ended == [True]
        and [found.access_token for found in page.sessions] == deletion.stored_keys == [two]
        and walked.keys == [two.encode()]
        and [one.stored_key for one in stored] == [two]
        and isinstance(page.sessions[0], Session)
        and page.sessions[0].bag == bag.encode({"k": "v"})
        and removed == []
    )
    if not is_as_it_should:
        raise StorageRefused("MongoDB: its commands do not do what they should: is it MongoDB 7.0 or later?")
