from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry, Counter
from stores import TTL_US

from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.listing import Listing
from mnemosyned.sessions.model import MAX_PAGE_BYTES, Criteria, NewSession, Session, Touch
from mnemosyned.sessions.page_token import PageToken, Shown
from mnemosyned.sessions.store import KeyedPage
from mnemosyned.sessions.touches import TouchWriter
from mnemosyned.storage.memory import MemoryStore

EVERYTHING = Criteria()


async def _nothing() -> None:
    """What a walk waits for, unless a test has it wait for more."""


class Store(MemoryStore):
    """A memory store that starts a session a second, tells what it has written, and can refuse to."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[str] = []
        self.is_read_only = False
        self.may_touch = asyncio.Event()
        self.may_touch.set()
        self.on_walk = _nothing

    async def walk(
        self, criteria: Criteria, *, start: bytes, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> KeyedPage:
        page = await super().walk(criteria, start=start, limit=limit, max_bytes=max_bytes)
        await self.on_walk()
        return page

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        if self.is_read_only:
            raise StorageUnavailable("read-only")
        self.touched += [touch.access_token for touch in touches]
        await self.may_touch.wait()
        return await super().touch(touches)


class Setup:
    """A hundred sessions, t000 to t099, each to expire a second after the one before it."""

    def __init__(self) -> None:
        self.store = Store()
        lost = Counter("lost", "Lost.", registry=CollectorRegistry())
        self.touches = TouchWriter(self.store, max_waiting=1000, lost=lost, on_gone=lambda _: None)
        self.listing = Listing(self.store, self.touches, touch_interval_us=1_000_000)
        self.encoded: dict[str, EncodedSession] = {}

    async def start(self) -> None:
        for number in range(100):
            token, ttl_us = f"t{number:03}", TTL_US + number * 1_000_000
            new = NewSession(access_token=token, subject_id="s", ttl_us=ttl_us)
            (session,) = await self.store.start([new])
            assert isinstance(session, Session)
            self.encoded[token] = EncodedSession(session)

    def expires_us(self, number: int) -> int:
        return self.encoded[f"t{number:03}"].expires_at_us

    def use(self, *numbers: int) -> None:
        """Extend sessions beyond all others; the first stays the first."""
        for number in numbers:
            encoded = self.encoded[f"t{number:03}"]
            encoded.expires_at_us += 1_000_000_000
            self.touches.mark(f"t{number:03}", encoded)

    async def listed(self, criteria: Criteria = EVERYTHING, *, offset: int = 0, limit: int = 3) -> list[str]:
        page = await self.listing.page(criteria, offset=offset, limit=limit, max_bytes=MAX_PAGE_BYTES)
        assert not page.is_cut
        return [one.access_token for one in page.sessions]

    async def walked(self, criteria: Criteria = EVERYTHING, *, shown: Sequence[str] = ()) -> list[str]:
        token = PageToken(shown=Shown.of([one.encode() for one in shown], salt=b"8 bytes."))
        page = await self.listing.walk(criteria, token=token, limit=100, max_bytes=MAX_PAGE_BYTES)
        tokens = [one.access_token for one in page.sessions]
        assert [key.decode() for key in page.keys] == tokens
        return tokens


@pytest.fixture
async def setup() -> Setup:
    setup = Setup()
    await setup.start()
    return setup


async def test_a_session_that_waits_to_be_written_has_its_latest_place(setup: Setup) -> None:
    setup.use(0, 2)

    assert await setup.listed() == ["t001", "t003", "t004"]
    assert await setup.listed(offset=3) == ["t005", "t006", "t007"]
    assert await setup.listed(offset=96, limit=10) == ["t098", "t099", "t000", "t002"]


async def test_a_page_shows_the_latest_expiry(setup: Setup) -> None:
    setup.use(*range(100))
    page = await setup.listing.page(EVERYTHING, offset=0, limit=100, max_bytes=MAX_PAGE_BYTES)

    assert [one.expires_at_us for one in page.sessions if isinstance(one, Session)] == [
        setup.expires_us(number) for number in range(100)
    ]


async def test_a_page_writes_only_what_waits_for_its_sessions(setup: Setup) -> None:
    setup.use(1, *range(60, 100))
    await setup.listed()

    assert setup.store.touched == ["t001"]


async def test_a_page_of_which_all_wait_is_read_until_it_is_right(setup: Setup) -> None:
    setup.use(*range(20))

    assert await setup.listed() == ["t020", "t021", "t022"]


async def test_a_page_waits_for_no_writing_that_is_under_way(setup: Setup) -> None:
    setup.use(1, 60)
    setup.store.may_touch.clear()
    flushing = asyncio.create_task(setup.touches.flush())
    while not setup.store.touched:
        await asyncio.sleep(0)

    # The storage may not have it yet.
    assert await setup.listed() == ["t000", "t002", "t003"]
    flushing.cancel()


async def test_ranges_go_by_the_latest_expiry(setup: Setup) -> None:
    end_us = setup.expires_us(99)
    setup.use(0, 1)

    assert await setup.listed(Criteria(expires_after_us=end_us)) == ["t000", "t001"]
    setup.use(2, 3)
    assert await setup.listed(Criteria(expires_before_us=end_us)) == ["t004", "t005", "t006"]
    assert await setup.listed(Criteria(expires_before_us=setup.expires_us(3)), offset=96) == [
        "t000",
        "t001",
        "t002",
    ]


async def test_a_storage_that_takes_no_write_is_listed_with_the_expiries_from_memory(setup: Setup) -> None:
    setup.use(0, 1)
    setup.store.is_read_only = True

    assert await setup.listed() == ["t002", "t003", "t004"]
    assert len(setup.touches) == 2


async def test_a_walk_has_the_latest_expiries_in_the_sequence_of_keys_and_writes_nothing(
    setup: Setup,
) -> None:
    setup.use(*range(50))
    page = await setup.listing.walk(EVERYTHING, token=PageToken(), limit=100, max_bytes=MAX_PAGE_BYTES)

    assert [one.expires_at_us for one in page.sessions if isinstance(one, Session)] == [
        setup.expires_us(number) for number in range(100)
    ]
    assert setup.store.touched == []


async def test_ranges_of_a_walk_go_by_the_latest_expiry(setup: Setup) -> None:
    start_us, end_us = setup.expires_us(0), setup.expires_us(99)
    setup.encoded["t097"].expires_at_us += 2_500_000
    setup.touches.mark("t097", setup.encoded["t097"])
    setup.use(1)

    # The storage has t097 two seconds before the range.
    assert await setup.walked(Criteria(expires_after_us=end_us)) == ["t097"]
    assert await setup.walked(Criteria(expires_before_us=start_us + 2_500_000)) == ["t000", "t002"]
    assert await setup.walked(Criteria(expires_after_us=end_us - 1_500_000, expires_before_us=end_us)) == [
        "t098"
    ]


async def test_a_walk_leaves_out_what_was_shown_before_it(setup: Setup) -> None:
    setup.use(4)

    assert await setup.walked(shown=[f"t{number:03}" for number in range(2, 100)]) == ["t000", "t001"]


async def test_only_a_page_that_nothing_follows_is_the_last(setup: Setup) -> None:
    async def is_last(limit: int, criteria: Criteria = EVERYTHING) -> bool:
        page = await setup.listing.page(criteria, offset=0, limit=limit, max_bytes=MAX_PAGE_BYTES)
        return page.is_last

    assert [await is_last(limit) for limit in (3, 99, 101)] == [False, False, True]
    # More than the rounds of a page write wait, and are beyond the range now.
    end_us = setup.expires_us(99)
    setup.use(*range(95))
    page = await setup.listing.page(
        Criteria(expires_before_us=end_us), offset=0, limit=3, max_bytes=MAX_PAGE_BYTES
    )
    assert (len(page.sessions), page.is_last) == (0, False)


async def test_a_walk_keeps_to_its_range_when_what_waited_was_written_meanwhile(setup: Setup) -> None:
    end_us = setup.expires_us(99)
    setup.use(1)
    setup.store.on_walk = setup.touches.flush

    assert await setup.walked(Criteria(expires_after_us=end_us)) == []
