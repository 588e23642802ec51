"""What `mnemosyned check` and List need of an engine that can be checked: one suite, run on each."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import stores
from stores import TTL_US, Engine, new

from mnemosyned.sessions.model import Criteria, DamagedSession, Session, ValueChange
from mnemosyned.sessions.token_hash import TokenHasher
from mnemosyned.storage.hashed import HashedStore


@pytest.fixture(
    params=[
        *stores.CHECKABLE,
        *stores.flavours("plain postgres"),
        *(f"hashed {name}" for name in stores.CHECKABLE),
    ]
)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    async with stores.opened(request.param.removeprefix("hashed "), request) as plain:
        if request.param.startswith("hashed"):
            known = TokenHasher([b"a key that only these tests know"], is_hashing=True)
            yield Engine(HashedStore(plain.store, known), plain.shift, known.stored_key)
        else:
            yield plain


async def started(engine: Engine, token: str, **fields: object) -> Session:
    (session,) = await engine.store.start([new(token, **fields)])
    assert isinstance(session, Session)
    return session


async def test_all_sessions_are_walked_through_and_removed_if_they_are_unchanged(engine: Engine) -> None:
    tokens = [(await started(engine, token)).access_token for token in ("a", "b", "c", "d")]
    await engine.shift_expiry("d", -2 * TTL_US / 1e6)

    first = await engine.store.stored_from("", limit=3)
    rest = await engine.store.stored_from(first[-1].stored_key + "\0", limit=3)
    await engine.store.set_values([ValueChange(access_token="b", key="k", value="v")])
    removed = await engine.store.remove_unchanged([*first, *rest])

    assert sorted(one.stored_key for one in [*first, *rest]) == sorted(map(engine.named, tokens))
    assert set(removed) == {engine.named(token) for token in ("a", "c", "d")}
    assert [one.stored_key for one in await engine.store.stored_from("", limit=9)] == [engine.named("b")]
    assert await engine.store.remove_unchanged([]) == []


async def test_a_bag_over_the_limit_is_damage_and_does_not_make_a_page_too_large(engine: Engine) -> None:
    await started(engine, "healthy")
    for number in range(5):
        await started(engine, f"large {number}", bag=bytes(4_000_001))

    found = (await engine.store.find(Criteria(), offset=0, limit=9)).sessions
    damaged = [one for one in found if isinstance(one, DamagedSession)]

    assert (len(found), len(damaged)) == (6, 5)
    assert {one.access_token for one in damaged} == set(engine.shown(*(f"large {n}" for n in range(5))))
