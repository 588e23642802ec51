"""What every storage engine does: one suite, run on each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import product

import pytest
import stores
from stores import TTL_US, Engine, bags, lookups, new

from mnemosyned.errors import (
    DeadlineExceeded,
    InvalidArgument,
    SessionAlreadyExists,
    SessionNotFound,
)
from mnemosyned.sessions import bag, token_hash
from mnemosyned.sessions.model import (
    Abandonment,
    ChangedBag,
    Criteria,
    NewSession,
    Session,
    Touch,
    ValueChange,
)
from mnemosyned.sessions.token_hash import TokenHasher
from mnemosyned.storage import engines
from mnemosyned.storage.hashed import HashedStore

HASHED = [f"hashed {name}" for name in stores.RENAMABLE if name not in stores.SLOW]


@pytest.fixture(params=[*stores.ENGINES, *stores.LAYOUTS, *stores.flavours(), *HASHED])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    async with stores.opened(request.param.removeprefix("hashed "), request) as plain:
        if request.param.startswith("hashed"):
            known = TokenHasher([b"a key that only these tests know"], is_hashing=True)
            yield Engine(HashedStore(plain.store, known), plain.shift, known.stored_key)
        else:
            yield plain


def test_the_suite_runs_on_every_engine_that_storage_offers() -> None:
    assert set(stores.ENGINES) == set(engines.ENGINES)


async def started(engine: Engine, token: str = "", **fields: object) -> Session:
    (session,) = await engine.store.start([new(token, **fields)])
    assert isinstance(session, Session)
    return session


async def test_a_started_session_is_loaded_as_it_was(engine: Engine) -> None:
    session = await started(
        engine, subject_client="web", refresh_token="r", bag=bag.encode({"k": "v", "ż": "日"})
    )

    assert await engine.store.load(lookups(session.access_token)) == [session]


async def test_an_estimate_of_the_sessions_is_not_far_above_what_was_stored(engine: Engine) -> None:
    before = await engine.store.estimated_sessions()
    await engine.store.start([new(f"t{number}") for number in range(100)])

    assert 0 <= await engine.store.estimated_sessions() <= before + 200


def endings(*tokens: str) -> list[Abandonment]:
    return [Abandonment(access_token=token) for token in tokens]


async def test_a_session_expires_a_ttl_after_its_start_on_the_storages_clock(engine: Engine) -> None:
    before_us = await engine.store.now_us()
    session = await started(engine)
    after_us = await engine.store.now_us()

    assert before_us + TTL_US <= session.expires_at_us <= after_us + TTL_US


async def test_a_token_in_use_is_refused_and_its_session_unharmed(engine: Engine) -> None:
    session = await started(engine, "taken")
    results = await engine.store.start([new("taken", subject_id="thief"), new("free")])

    assert isinstance(results[0], SessionAlreadyExists)
    assert isinstance(results[1], Session)
    assert await engine.store.load(lookups("taken")) == [session]


async def test_of_two_equal_tokens_in_a_batch_the_first_wins(engine: Engine) -> None:
    first, second = await engine.store.start([new("t", subject_id="one"), new("t", subject_id="two")])

    assert isinstance(first, Session)
    assert isinstance(second, SessionAlreadyExists)
    (loaded,) = await engine.store.load(lookups("t"))
    assert isinstance(loaded, Session)
    assert loaded.subject_id == "one"


async def test_an_expired_session_does_not_exist(engine: Engine) -> None:
    token = (await started(engine)).access_token
    await engine.shift_expiry(token, -61)
    store = engine.store

    assert isinstance((await store.load(lookups(token)))[0], SessionNotFound)
    assert await store.exist([token]) == [False]
    change = ValueChange(access_token=token, key="k", value="v")
    assert isinstance((await store.set_values([change]))[0], SessionNotFound)
    assert await store.touch([Touch(access_token=token, expires_at_us=2**50)]) == [False]
    assert (await store.find(Criteria(), offset=0, limit=10)).sessions == []
    assert await store.abandon(endings(token)) == [False]


async def test_the_token_of_an_expired_session_is_free(engine: Engine) -> None:
    await started(engine, "t", subject_id="old")
    await engine.shift_expiry("t", -61)

    assert (await started(engine, "t", subject_id="new")).subject_id == "new"


async def test_a_load_moves_an_expiry_that_has_fallen_behind(engine: Engine) -> None:
    session = await started(engine)
    await engine.shift_expiry(session.access_token, -30)
    (loaded,) = await engine.store.load(lookups(session.access_token))
    (again,) = await engine.store.load(lookups(session.access_token))

    assert isinstance(loaded, Session)
    assert loaded.expires_at_us >= session.expires_at_us
    assert again == loaded


async def test_a_load_leaves_an_expiry_that_is_fresh(engine: Engine) -> None:
    session = await started(engine)
    await engine.shift_expiry(session.access_token, -2)
    (loaded,) = await engine.store.load(lookups(session.access_token))

    assert isinstance(loaded, Session)
    assert loaded.expires_at_us == session.expires_at_us - 2_000_000


async def test_loads_answer_in_order_and_each_token_for_itself(engine: Engine) -> None:
    one, two = await started(engine), await started(engine)
    tokens = [two.access_token, "absent", one.access_token, two.access_token]
    loaded = await engine.store.load(lookups(*tokens))

    assert [loaded[0], loaded[2], loaded[3]] == [two, one, two]
    assert isinstance(loaded[1], SessionNotFound)


async def test_existence_is_told_and_changes_nothing(engine: Engine) -> None:
    session = await started(engine)
    await engine.shift_expiry(session.access_token, -30)

    assert await engine.store.exist([session.access_token, "absent"]) == [True, False]
    (found,) = (await engine.store.find(Criteria(), offset=0, limit=1)).sessions
    assert found.expires_at_us == session.expires_at_us - 30_000_000


async def test_values_are_set_in_order_within_a_batch(engine: Engine) -> None:
    token = (await started(engine, bag=bag.encode({"a": "1"}))).access_token
    changes = [
        ValueChange(access_token=token, key="b", value="2"),
        ValueChange(access_token="absent", key="b", value="2"),
        ValueChange(access_token=token, key="a", value="3"),
    ]
    results = bags(await engine.store.set_values(changes))

    assert results[0] == {"a": "1", "b": "2"}
    assert isinstance(results[1], SessionNotFound)
    assert results[2] == {"a": "3", "b": "2"}
    (loaded,) = await engine.store.load(lookups(token))
    assert isinstance(loaded, Session)
    assert bag.decode(loaded.bag) == {"a": "3", "b": "2"}


async def test_concurrent_writers_of_different_keys_lose_nothing(engine: Engine) -> None:
    token = (await started(engine, bag=b"")).access_token
    changes = [ValueChange(access_token=token, key=str(n), value="v") for n in range(40)]
    await asyncio.gather(*(engine.store.set_values([change]) for change in changes))

    (loaded,) = await engine.store.load(lookups(token))
    assert isinstance(loaded, Session)
    assert set(bag.decode(loaded.bag)) == {str(n) for n in range(40)}


async def test_a_bag_that_grows_too_large_is_refused_and_the_others_are_set(engine: Engine) -> None:
    token = (await started(engine, bag=b"")).access_token
    changes = [
        ValueChange(access_token=token, key="large", value="x" * 4_000_000),
        ValueChange(access_token=token, key="small", value="x"),
    ]
    large, small = bags(await engine.store.set_values(changes))

    assert isinstance(large, InvalidArgument)
    assert small == {"small": "x"}


async def test_a_change_tells_the_session_as_it_is_loaded_then(engine: Engine) -> None:
    given = NewSession(
        access_token="t",
        subject_id="ż",
        subject_client="client",
        refresh_token="r",
        bag=bag.encode({"a": "1"}),
        ttl_us=TTL_US,
    )
    started_one, _ = await engine.store.start([given, new("bare", bag=b"")])
    assert isinstance(started_one, Session)
    # The bag is read in the first round, and known in the second.
    for value in ("2", "3"):
        await engine.shift_expiry("t", -1)
        tokens = ("t", "bare", "t", "bare")
        changes = [
            ValueChange(access_token=token, key=key, value=value)
            for token, key in zip(tokens, "bbcc", strict=True)
        ]
        results = await engine.store.set_values(changes)
        loaded = await engine.store.load(lookups("t", "bare"))

        told = [result.session for result in results if isinstance(result, ChangedBag)]
        if not engine.tells_changes:
            assert told == [None] * 4
            continue
        assert told == loaded * 2
        assert isinstance(told[0], Session)
        assert bag.decode(told[0].bag) == {"a": "1", "b": value, "c": value}
        assert told[0].subject_id == "ż"
        assert told[0].expires_at_us < started_one.expires_at_us


async def test_a_change_tells_the_session_that_has_the_token_now(engine: Engine) -> None:
    token = (await started(engine, bag=b"")).access_token
    change = ValueChange(access_token=token, key="k", value="v")
    await engine.store.set_values([change])
    await engine.store.abandon(endings(token))
    # With the bag that the engine may remember of the former session.
    await engine.store.start([new(token, subject_id="another", bag=bag.encode({"k": "v"}))])
    (result,) = await engine.store.set_values([change])

    assert isinstance(result, ChangedBag)
    if engine.tells_changes:
        assert isinstance(result.session, Session)
        assert result.session.subject_id == "another"


async def test_setting_a_value_does_not_extend(engine: Engine) -> None:
    session = await started(engine)
    await engine.shift_expiry(session.access_token, -30)
    await engine.store.set_values([ValueChange(access_token=session.access_token, key="k", value="v")])

    (found,) = (await engine.store.find(Criteria(), offset=0, limit=1)).sessions
    assert found.expires_at_us == session.expires_at_us - 30_000_000


async def test_an_abandoned_session_is_gone_and_only_one_caller_ended_it(engine: Engine) -> None:
    token = (await started(engine)).access_token

    assert await engine.store.abandon(endings(token, token, "absent")) == [True, False, False]
    assert await engine.store.exist([token]) == [False]


async def test_a_touch_moves_an_expiry_forward_and_never_back(engine: Engine) -> None:
    session = await started(engine)
    later_us = session.expires_at_us + 5_000_000
    touches = [
        Touch(access_token=session.access_token, expires_at_us=later_us),
        Touch(access_token="absent", expires_at_us=later_us),
        Touch(access_token=session.access_token, expires_at_us=later_us - 1_000_000),
    ]

    assert await engine.store.touch(touches) == [True, False, True]
    (found,) = (await engine.store.find(Criteria(), offset=0, limit=1)).sessions
    assert found.expires_at_us == later_us


async def test_sessions_are_found_by_expiry_then_token_and_page_by_page(engine: Engine) -> None:
    sessions = [await started(engine, token) for token in ("c", "a", "b")]
    await engine.shift_expiry("b", 5)
    await engine.shift_expiry("c", -5)
    level_us = sessions[1].expires_at_us
    await engine.store.start([new("d")])
    await engine.store.touch([Touch(access_token="a", expires_at_us=level_us + 10_000_000)])
    await engine.store.touch([Touch(access_token="d", expires_at_us=level_us + 10_000_000)])

    pages = [(await engine.store.find(Criteria(), offset=at, limit=2)).sessions for at in (0, 2, 4)]
    assert [[session.access_token for session in page] for page in pages] == [
        engine.shown("c", "b"),
        sorted(engine.shown("a", "d")),
        [],
    ]


async def test_a_page_far_behind_the_last_session_is_empty(engine: Engine) -> None:
    await started(engine)
    every = (Criteria(), Criteria(subject_id="s"), Criteria(subject_id="s", refresh_token=""))

    for criteria, offset in product(every, (2**31, 2**53 + 1, 2**63 - 1)):
        page = await engine.store.find(criteria, offset=offset, limit=1000)
        assert (page.sessions, page.is_cut) == ([], False)


async def test_a_page_that_would_not_fit_into_memory_is_refused(engine: Engine) -> None:
    large = bag.encode({"k": "x" * 3_900_000})
    for n in range(5):
        await started(engine, f"t{n}", bag=large)

    whole = await engine.store.find(Criteria(), offset=0, limit=5)
    rest = await engine.store.find(Criteria(), offset=len(whole.sessions), limit=5)
    least = await engine.store.find(Criteria(), offset=0, limit=5, max_bytes=1)

    assert (len(whole.sessions), whole.is_cut) == (4, True)
    assert (len(rest.sessions), rest.is_cut) == (1, False)
    assert (len(least.sessions), least.is_cut) == (1, True)


async def walked(engine: Engine, criteria: Criteria, limit: int) -> list[str]:
    """The tokens that all pages of a walk show."""
    shown: list[str] = []
    start: bytes | None = b""
    while start is not None:
        page = await engine.store.walk(criteria, start=start, limit=limit)
        assert len(page.keys) == len(page.sessions) <= limit
        assert page.next_key is None or max([start, *page.keys]) < page.next_key or not page.keys
        shown += [session.access_token for session in page.sessions]
        start = page.next_key
    return shown


async def test_a_walk_has_each_session_once_in_the_sequence_of_keys(engine: Engine) -> None:
    tokens = ["a", "ab", "ab!", "b", "é", "日本", "z" * 200, *(f"{number:02}" for number in range(13))]
    for token in tokens:
        await started(engine, token)
    await engine.shift_expiry("ab", 5)
    await started(engine, "expired")
    await engine.shift_expiry("expired", -61)
    keys = sorted(engine.named(token).encode() for token in tokens)

    for limit in (1, 2, 3, 7, 40):
        shown = await walked(engine, Criteria(), limit)
        assert shown == [token_hash.session_id(key.decode()) for key in keys]


async def test_a_walk_meets_all_criteria(engine: Engine) -> None:
    one = await started(engine, "1", subject_id="a", refresh_token="r")
    await started(engine, "2", subject_id="a", refresh_token="q")
    await started(engine, "3", subject_id="b", refresh_token="r")
    at_us = one.expires_at_us

    for limit in (1, 2, 10):

        async def found(criteria: Criteria, limit: int = limit) -> set[str]:
            shown = await walked(engine, criteria, limit)
            assert len(set(shown)) == len(shown)
            return {token for token in "123" if engine.shown(token)[0] in shown}

        assert await found(Criteria(subject_id="a")) == {"1", "2"}
        assert await found(Criteria(refresh_token="r")) == {"1", "3"}
        assert await found(Criteria(subject_id="a", refresh_token="r")) == {"1"}
        assert await found(Criteria(access_token="1", subject_id="b")) == set()
        assert await found(Criteria(expires_before_us=at_us)) == set()
        assert await found(Criteria(expires_before_us=at_us + 1)) == {"1"}
        assert await found(Criteria(expires_after_us=at_us)) == {"2", "3"}
        assert await found(Criteria(expires_after_us=at_us - 1, expires_before_us=at_us + 1)) == {"1"}


async def test_a_walk_goes_on_where_a_page_ended_for_its_size(engine: Engine) -> None:
    large = bag.encode({"k": "x" * 1_500_000})
    tokens = [(await started(engine, f"t{n}", bag=large)).access_token for n in range(5)]
    first = await engine.store.walk(Criteria(), start=b"", limit=5, max_bytes=4_000_000)
    least = await engine.store.walk(Criteria(), start=b"", limit=5, max_bytes=1)
    assert first.next_key is not None
    rest = await engine.store.walk(Criteria(), start=first.next_key, limit=5)

    assert (len(first.sessions), first.is_cut) == (2, True)
    assert (len(least.sessions), least.is_cut) == (1, True)
    assert (len(rest.sessions), rest.is_cut, rest.next_key) == (3, False, None)
    shown = [session.access_token for session in (*first.sessions, *rest.sessions)]
    assert sorted(shown) == sorted(engine.shown(*tokens))


async def test_what_ends_and_begins_during_a_walk_disturbs_no_other_session(engine: Engine) -> None:
    tokens = [f"{number:02}" for number in range(20)]
    await engine.store.start([new(token) for token in tokens])
    shown: list[str] = []
    start: bytes | None = b""
    number = 0
    while start is not None:
        page = await engine.store.walk(Criteria(), start=start, limit=3)
        shown += [session.access_token for session in page.sessions]
        start, number = page.next_key, number + 1
        later_us = await engine.store.now_us() + number * TTL_US
        await engine.store.touch([Touch(access_token=token, expires_at_us=later_us) for token in tokens])
        await engine.store.start([new(f"{number:02}x")])
        await engine.store.abandon(endings(tokens.pop(number * 7 % len(tokens))))

    assert len(set(shown)) == len(shown)
    assert set(engine.shown(*tokens)) <= set(shown)


async def test_all_given_criteria_must_hold(engine: Engine) -> None:
    one = await started(engine, "1", subject_id="a", refresh_token="r")
    await started(engine, "2", subject_id="a", refresh_token="q")
    await started(engine, "3", subject_id="b", refresh_token="r")

    async def found(criteria: Criteria) -> set[str]:
        page = await engine.store.find(criteria, offset=0, limit=10)
        shown = {session.access_token for session in page.sessions}
        return {token for token in "123" if engine.shown(token)[0] in shown}

    at_us = one.expires_at_us
    assert await found(Criteria(subject_id="a")) == {"1", "2"}
    assert await found(Criteria(refresh_token="r")) == {"1", "3"}
    assert await found(Criteria(subject_id="a", refresh_token="r")) == {"1"}
    assert await found(Criteria(access_token="1", subject_id="b")) == set()
    assert await found(Criteria(expires_before_us=at_us)) == set()
    assert await found(Criteria(expires_before_us=at_us + 1)) == {"1"}
    assert await found(Criteria(expires_after_us=at_us)) == {"2", "3"}
    assert await found(Criteria(expires_after_us=at_us - 1, expires_before_us=at_us + 1)) == {"1"}


async def test_deleting_returns_the_tokens_and_stops_at_the_limit(engine: Engine) -> None:
    for token in ("1", "2", "3"):
        await started(engine, token, subject_id="a")
    await started(engine, "4", subject_id="b")

    first = await engine.store.delete(Criteria(subject_id="a"), limit=2)
    second = await engine.store.delete(Criteria(subject_id="a"), limit=2)

    assert len(first.stored_keys) == 2
    assert sorted(first.stored_keys + second.stored_keys) == sorted(map(engine.named, "123"))
    assert (first.is_all, second.is_all) == (False, True)
    assert await engine.store.exist(["1", "2", "3", "4"]) == [False, False, False, True]


async def test_deletes_at_the_same_time_share_the_work_and_none_claims_all_too_early(engine: Engine) -> None:
    await engine.store.start([new(f"t{n}", subject_id="a") for n in range(40)])

    async def delete() -> list[str]:
        tokens: list[str] = []
        while True:
            step = await engine.store.delete(Criteria(subject_id="a"), limit=5)
            tokens += step.stored_keys
            if step.is_all:
                # Whoever is told so may rely on it, though another does the rest of the work.
                assert (await engine.store.find(Criteria(subject_id="a"), offset=0, limit=1)).sessions == []
                return tokens

    shares = await asyncio.gather(*(delete() for _ in range(4)))

    assert sorted(token for share in shares for token in share) == sorted(
        engine.named(f"t{n}") for n in range(40)
    )


async def test_cleaning_up_removes_what_has_expired_and_nothing_else(engine: Engine) -> None:
    for token in ("1", "2", "3", "4"):
        await started(engine, token)
    for token in ("1", "2", "3"):
        await engine.shift_expiry(token, -61)

    first = await engine.store.clean_up(limit=2)
    second = await engine.store.clean_up(limit=2)

    assert len(first) == 2
    assert sorted(first + second) == sorted(map(engine.named, "123"))
    assert await engine.store.exist(["4"]) == [True]


async def test_batches_of_any_order_do_not_deadlock(engine: Engine) -> None:
    tokens = [f"t{n}" for n in range(30)]
    await engine.store.start([new(token) for token in tokens])

    async def write(n: int) -> None:
        order = tokens if n % 2 else tokens[::-1]
        await engine.store.set_values([ValueChange(access_token=t, key=str(n), value="v") for t in order])
        await engine.store.touch([Touch(access_token=t, expires_at_us=2**50) for t in order])
        await engine.store.load(lookups(*order))

    await asyncio.gather(*(write(n) for n in range(12)))
    await asyncio.gather(engine.store.abandon(endings(*tokens)), engine.store.abandon(endings(*tokens[::-1])))

    assert await engine.store.exist(tokens) == [False] * 30


async def test_tokens_of_the_full_length_are_stored(engine: Engine) -> None:
    token = "ż" * 1300  # 2,600 bytes, about what PostgreSQL can index whatever it holds

    assert (await started(engine, token)).access_token == token
    assert await engine.store.exist([token]) == [True]


async def test_a_write_past_its_time_is_not_done(engine: Engine) -> None:
    token, store = (await started(engine)).access_token, engine.store
    late_us = await store.now_us()
    results = [
        *await store.start([replace(new("late"), not_after_us=late_us)]),
        *await store.set_values([ValueChange(access_token=token, key="k", value="v", not_after_us=late_us)]),
        *await store.abandon([Abandonment(access_token=token, not_after_us=late_us)]),
    ]

    assert [type(result) for result in results] == [DeadlineExceeded] * 3
    assert await store.exist([token, "late"]) == [True, False]
    (loaded,) = await store.load(lookups(token))
    assert isinstance(loaded, Session)
    assert "k" not in bag.decode(loaded.bag)


async def test_a_delete_past_its_time_ends_nothing(engine: Engine) -> None:
    token, store = (await started(engine, subject_id="a")).access_token, engine.store
    late_us = await store.now_us()
    for criteria in (
        Criteria(subject_id="a"),
        Criteria(access_token=token),
        Criteria(expires_after_us=0),
    ):
        with pytest.raises(DeadlineExceeded):
            await store.delete(criteria, limit=5, not_after_us=late_us)
    assert await store.exist([token]) == [True]

    in_time = await store.delete(Criteria(subject_id="a"), limit=5, not_after_us=late_us + 60_000_000)

    assert in_time.stored_keys == [engine.named(token)]
    assert await store.exist([token]) == [False]


async def test_a_late_item_of_a_batch_harms_no_other(engine: Engine) -> None:
    token, store = (await started(engine)).access_token, engine.store
    late_us = await store.now_us()
    soon_us = late_us + 60_000_000
    starts = await store.start(
        [replace(new("late"), not_after_us=late_us), replace(new("x"), not_after_us=soon_us)]
    )
    changes = [
        ValueChange(access_token=token, key="a", value="1", not_after_us=soon_us),
        ValueChange(access_token=token, key="b", value="2", not_after_us=late_us),
        ValueChange(access_token=token, key="c", value="3"),
    ]
    values = bags(await store.set_values(changes))
    ends = await store.abandon([Abandonment(access_token="x", not_after_us=soon_us), *endings("absent")])

    assert [type(result) for result in starts] == [DeadlineExceeded, Session]
    assert isinstance(values[1], DeadlineExceeded)
    assert isinstance(values[2], dict)
    assert {"a": "1", "c": "3"}.items() <= values[2].items()
    assert "b" not in values[2]
    assert ends == [True, False]


async def test_a_token_in_use_is_refused_in_time_and_called_late_or_refused_after_it(engine: Engine) -> None:
    await started(engine, "taken")
    soon_us = await engine.store.now_us() + 60_000_000
    (in_time,) = await engine.store.start([replace(new("taken"), not_after_us=soon_us)])
    (late,) = await engine.store.start([replace(new("taken"), not_after_us=1)])

    assert isinstance(in_time, SessionAlreadyExists)
    assert isinstance(late, DeadlineExceeded)
