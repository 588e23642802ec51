"""List, with the expiries that the storage does not know yet (`touches.py`).

Sessions are listed by expiry. That of a session in use is in memory first, so the storage shows it too soon:

    stored:    a  b  C  d | e f        C waits to be written; a page of four asks for some sessions more
    true:      a  b  d  e | f C        C is written, alone, and goes to its place

A page therefore writes what waits for its own sessions, and for no others. What it has read beside them fills
the gaps. A session moves back only, so what follows is right up to the last expiry that was read. If that is
not enough, the page is read again.

Expiries that wait on other nodes are theirs: they are in the storage within a touch interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import compress
from typing import Final

from aio.slices import in_slices
from aio.steps import STEP_ITEMS, Steps, cut
from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions.columns import Found, those, tokens_of
from mnemosyned.sessions.model import Criteria, Session
from mnemosyned.sessions.page_token import PageToken, Shown
from mnemosyned.sessions.store import KeyedPage, Page, SessionStore
from mnemosyned.sessions.touches import TouchWriter

# After them, a page shows what it has: each round has written what the one before it met.
_ROUNDS: Final = 4
# How far the storage may be behind: a load leaves it one interval behind, a touch waits for another, and the
# writing takes time.
_LAG_INTERVALS: Final = 3
_SPARE: Final = 8


class Listing:
    """Reads pages of live sessions."""

    def __init__(self, store: SessionStore, touches: TouchWriter, *, touch_interval_us: int) -> None:
        self._store = store
        self._touches = touches
        self._lag_us = _LAG_INTERVALS * touch_interval_us

    async def page(self, criteria: Criteria, *, offset: int, limit: int, max_bytes: int) -> Page:
        """Return live sessions by their latest expiry, then by the key's bytes; see SessionStore.find."""
        if criteria.expires_after_us is not None:
            # The storage may still have them before the range.
            in_range = self._touches.soonest(criteria.expires_after_us, limit)
            await self._write(await in_slices(in_range))
        number = 0
        while True:
            number += 1
            spare = _SPARE + limit // 4 if self._touches.is_anything_waiting() else 0
            page = await self._store.find(criteria, offset=offset, limit=limit + spare, max_bytes=max_bytes)
            asked = limit + spare
            waiting = self._waiting(page.sessions)
            if not any(waiting):
                return _first(page.sessions, limit, page, asked)
            found = await in_slices(_listed(page.sessions))
            latest = [_later(one, us) for one, us in zip(found, waiting, strict=True)]
            if not any(latest):
                return _first(page.sessions, limit, page, asked)
            await self._write([one.access_token for one in found])
            merged = _merged(found, latest, criteria)
            if len(found) == asked or page.is_cut:
                known_until_us = max(_expiries(found), default=0)
                sure = [one for us, one in merged if us <= known_until_us]
                is_enough = len(sure) >= limit or (page.is_cut and sure)
                if not is_enough and number < _ROUNDS:
                    continue
                if is_enough:
                    return _first(sure, limit, page, asked)
            return _first([one for _, one in merged], limit, page, asked)

    async def walk(self, criteria: Criteria, *, token: PageToken, limit: int, max_bytes: int) -> KeyedPage:
        """Return live sessions by stored key, with their latest expiries; see SessionStore.walk.

        Nothing is written for it: an expiry in memory changes no session's place.
        """
        asked = criteria
        if criteria.expires_after_us is not None and self._touches.is_anything_waiting():
            # The storage may still have them before the range.
            asked = replace(criteria, expires_after_us=max(0, criteria.expires_after_us - self._lag_us))
        page = await self._store.walk(asked, start=token.start, limit=limit, max_bytes=max_bytes)
        waiting = self._waiting(page.sessions)
        if token.shown.digests:
            are_new = await in_slices(_are_new(page.sessions, token.shown))
            keys = list(compress(page.keys, are_new))
            page = replace(page, sessions=those(page.sessions, are_new), keys=keys)
            waiting = list(compress(waiting, are_new))
        if asked is criteria and not any(waiting):
            return page
        return await in_slices(_up_to_date(page, waiting, criteria))

    def _waiting(self, found: Sequence[Found]) -> list[int]:
        """Return the expiry of each session, if the storage may lack it; or 0.

        It is asked for all at once, and not in slices: what is written meanwhile waits no more, and is not in
        what was read before.
        """
        if not self._touches.is_anything_waiting():
            return [0] * len(found)
        waiting_us = self._touches.waiting_us
        return [waiting_us(one.decode(errors="surrogateescape")) for one in tokens_of(found)]

    async def _write(self, tokens: Sequence[str]) -> None:
        # A storage that takes no write now can still be read: the page has the expiries from memory.
        with suppress(MnemosyneError):
            await self._touches.write(tokens)


def _are_new(found: Sequence[Found], shown: Shown) -> Steps[list[bool]]:
    """Return for each session whether it was not shown before."""
    is_shown = shown.finder()
    are_new: list[bool] = []
    for part in cut(tokens_of(found)):
        if are_new:
            yield
        are_new += [not is_shown(one) for one in part]
    return are_new


def _later(found: Found, waiting_us: int) -> int:
    """Return the expiry that waits to be written; 0: the stored one is the latest."""
    is_later = isinstance(found, Session) and waiting_us > found.expires_at_us
    return waiting_us if is_later else 0


def _up_to_date(page: KeyedPage, waiting: Sequence[int], criteria: Criteria) -> Steps[KeyedPage]:
    """Return the sessions of a page that meet the criteria with their latest expiries."""
    sessions: list[Found] = []
    keys: list[bytes] = []
    for number, (one, key, waiting_us) in enumerate(zip(page.sessions, page.keys, waiting, strict=True), 1):
        found = one
        if isinstance(one, Session):
            latest_us = _later(one, waiting_us)
            found = replace(one, expires_at_us=latest_us) if latest_us else one
            if not criteria.allows(found.expires_at_us):
                continue
        sessions.append(found)
        keys.append(key)
        if number % STEP_ITEMS == 0:
            yield
    return replace(page, sessions=sessions, keys=keys)


def _listed(found: Sequence[Found]) -> Steps[list[Found]]:
    listed: list[Found] = []
    for part in cut(found):
        if listed:
            yield
        listed += part
    return listed


def _first(found: Sequence[Found], limit: int, page: Page, asked: int) -> Page:
    """Return the first of what was found in a page of the storage, of which so many were asked for."""
    is_last = len(page.sessions) < asked and not page.is_cut and len(found) <= limit
    return Page(sessions=found[:limit], is_cut=page.is_cut and len(found) < limit, is_last=is_last)


def _expiries(found: Sequence[Found]) -> Iterator[int]:
    """Return the expiries in their sequence; a damaged session has that of the one before it."""
    expires_at_us = 0
    for one in found:
        expires_at_us = one.expires_at_us if isinstance(one, Session) else expires_at_us
        yield expires_at_us


def _merged(found: Sequence[Found], latest: Sequence[int], criteria: Criteria) -> list[tuple[int, Found]]:
    merged: list[tuple[int, Found]] = []
    for one, stored_us, latest_us in zip(found, _expiries(found), latest, strict=True):
        if not latest_us:
            merged.append((stored_us, one))
        elif criteria.expires_before_us is None or latest_us < criteria.expires_before_us:
            assert isinstance(one, Session)
            merged.append((latest_us, replace(one, expires_at_us=latest_us)))
    # Keys that are no text have surrogates.
    merged.sort(key=lambda pair: (pair[0], pair[1].access_token.encode(errors="surrogateescape")))
    return merged
