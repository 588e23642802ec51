"""List: from what is asked to the bytes of a page.

    criteria, limits ── check ── Listing (the storage, and expiries in memory) ── PageResponse ── bytes

A page may be megabytes, so few are in work at once, and each is checked and encoded in slices.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from typing import Final

from aio.slices import in_slices
from aio.steps import STEP_ITEMS, Steps, cut
from mnemosyned.errors import InvalidArgument
from mnemosyned.sessions import damage, page_token
from mnemosyned.sessions.columns import SessionColumns
from mnemosyned.sessions.damage_log import Checked, Found
from mnemosyned.sessions.listing import Listing
from mnemosyned.sessions.model import (
    DEFAULT_LIST_LIMIT,
    DEFAULT_PAGE_BYTES,
    MAX_LIST_LIMIT,
    MAX_PAGE_BYTES,
    Criteria,
    check_criteria,
)
from mnemosyned.sessions.page_response import PageResponse
from mnemosyned.sessions.store import KeyedPage, Page

_MAX_OFFSET: Final = 2**63 - 1
# Pages that are read or encoded at once. Others wait: a page takes a connection of the storage, and other
# calls need some.
_PAGES_AT_ONCE: Final = 4


class Pages:
    """Answers List."""

    def __init__(
        self, listing: Listing, checking: Callable[[Iterable[tuple[str, Found]]], Steps[Checked]]
    ) -> None:
        """`checking` checks what was found, each with its token or what else may name it."""
        self._listing = listing
        self._checking = checking
        self._free = asyncio.Semaphore(_PAGES_AT_ONCE)

    async def page(
        self,
        criteria: Criteria,
        *,
        offset: int,
        limit: int,
        max_bytes: int = 0,
        token: str | None = None,
    ) -> bytes:
        """Return live sessions as a response message; a limit or `max_bytes` of 0 means the default.

        Damaged sessions are left out, counted in the response, and logged. The page ends early, and says so,
        if it would be larger than `max_bytes`. With a page token, also an empty one, sessions are in the
        sequence of their stored keys (`page_token.py`); otherwise in that of their expiries.

        Raises:
            InvalidArgument: offset, limit or `max_bytes` out of bounds; a page token of another query.
        """
        check_criteria(criteria)
        if not 0 <= offset <= _MAX_OFFSET:
            raise InvalidArgument("mnemosyned: offset is negative")
        if not 0 <= limit <= MAX_LIST_LIMIT:
            raise InvalidArgument(f"mnemosyned: limit is not between 0 and {MAX_LIST_LIMIT}")
        if not 0 <= max_bytes <= MAX_PAGE_BYTES:
            raise InvalidArgument(f"mnemosyned: max_bytes is not between 0 and {MAX_PAGE_BYTES}")
        if token is not None and offset:
            raise InvalidArgument("mnemosyned: offset and page_token exclude each other")
        place = None if token is None else page_token.PageToken.parse(token, criteria)
        limit, max_bytes = limit or DEFAULT_LIST_LIMIT, max_bytes or DEFAULT_PAGE_BYTES
        async with self._free:
            if place is not None:
                keyed = await self._listing.walk(criteria, token=place, limit=limit, max_bytes=max_bytes)
                following = page_token.after_keyed(criteria, place, keyed)
                return await in_slices(self._response(keyed, max_bytes, following))
            page = await self._listing.page(criteria, offset=offset, limit=limit, max_bytes=max_bytes)
            following = page_token.NOTHING
            if not offset:
                following = page_token.after_first(criteria, page, salt=os.urandom(page_token.SALT_BYTES))
            return await in_slices(self._response(page, max_bytes, following))

    def _response(
        self, page: Page | KeyedPage, max_bytes: int, following: page_token.Following
    ) -> Steps[bytes]:
        response = PageResponse(max_bytes=max_bytes - following.most_bytes)
        for part in cut(page.sessions):
            if response.count:
                yield
            columns = SessionColumns.of(part)
            if columns is not None and damage.are_ordinary(columns) and response.add_ordinary(columns):
                continue
            checked = yield from self._checking((one.access_token, damage.nameable(one)) for one in part)
            yield from response.add(checked)
            if response.is_full:
                break
        if response.count > STEP_ITEMS:
            # The token has a digest of each session.
            yield
        return response.finished(is_cut=page.is_cut, next_token=following.token)
