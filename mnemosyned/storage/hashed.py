"""A store in front of a store: tokens on this side, stored keys on the other (`sessions/token_hash.py`).

A session that is not found under its token's stored key may still have a former one, from before hashing
was turned on or its HMAC key was changed. The session is then renamed and looked for once more.

- Two nodes whose stored keys differ, as during a rolling restart, may rename a session against each
  other. The renaming is therefore tried a few times.
- Meanwhile a token that a caller chose may start two sessions, one under each stored key, which the
  table's primary key cannot prevent. The next operation on the token ends one of them.

Sessions that a Delete or a cleanup has ended are reported by stored key, since this node cannot know their
tokens.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from aio.units import NEVER_US
from mnemosyned.errors import InvalidArgument, MnemosyneError, SessionNotFound, StorageUnavailable
from mnemosyned.sessions import token_hash
from mnemosyned.sessions.columns import Found, SessionColumns
from mnemosyned.sessions.model import (
    MAX_PAGE_BYTES,
    Abandonment,
    ChangedBag,
    Criteria,
    Lookup,
    NewSession,
    Session,
    Touch,
    ValueChange,
)
from mnemosyned.sessions.store import Deletion, FullStore, KeyedPage, Page, Renaming
from mnemosyned.sessions.token_hash import TokenHasher

Item = TypeVar("Item")
Tokened = TypeVar("Tokened", Abandonment, Lookup, NewSession, Touch, ValueChange)
Result = TypeVar("Result")

_RENAMINGS: Final = 3


class HashedStore:
    """A store on another one, in which sessions have these stored keys."""

    def __init__(self, store: FullStore, token_hasher: TokenHasher) -> None:
        self._store = store
        self.token_hasher = token_hasher
        self._stored_key = token_hasher.stored_key
        # What concerns no token.
        self.open, self.close = store.open, store.close
        self.now_us, self.identity, self.check = store.now_us, store.identity, store.check
        self.estimated_sessions = store.estimated_sessions
        self.rename, self.stored_keys_after = store.rename, store.stored_keys_after
        self.renew, self.bar, self.resign = store.renew, store.bar, store.resign
        self.clean_up = store.clean_up
        self.stored_from, self.remove_unchanged = store.stored_from, store.remove_unchanged

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        """See SessionStore. One more failure of an item: InvalidArgument, the token is a session id."""
        startable = [new for new in sessions if not token_hash.is_session_id(new.access_token)]
        # A session that has the token under a former stored key must be met.
        await self._rename([new.access_token for new in startable])
        started = iter(await self._store.start([self._keyed(new) for new in startable]))
        return [
            InvalidArgument("mnemosyned: access token is a session id of List")
            if token_hash.is_session_id(new.access_token)
            else _with_token(next(started), new.access_token)
            for new in sessions
        ]

    async def load(self, lookups: Sequence[Lookup]) -> list[Session | MnemosyneError]:
        """See SessionStore."""
        results = await self._found_for(lookups, self._store.load)
        return [
            _with_token(result, lookup.access_token) for lookup, result in zip(lookups, results, strict=True)
        ]

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return await self._found(tokens, tokens, self._stored_key, self._store.exist)

    async def set_values(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError]:
        """See SessionStore."""
        results = await self._found_for(changes, self._store.set_values)
        return [
            ChangedBag(result.values, replace(result.session, access_token=change.access_token))
            if isinstance(result, ChangedBag) and result.session is not None
            else result
            for change, result in zip(changes, results, strict=True)
        ]

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        # First, in case a token got two sessions, under two stored keys, while nodes were restarted.
        await self._rename([ending.access_token for ending in endings])
        return await self._found_for(endings, self._store.abandon)

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return await self._found_for(touches, self._store.touch)

    async def find(
        self, criteria: Criteria, *, offset: int, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> Page:
        """See SessionStore; a session with a hashed key has its session id in place of the token."""
        found = await self._store.find(
            await self._by_stored_key(criteria), offset=offset, limit=limit, max_bytes=max_bytes
        )
        return replace(found, sessions=_all_shown(found.sessions))

    async def walk(
        self, criteria: Criteria, *, start: bytes, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> KeyedPage:
        """See SessionStore, and `find`. A session that is renamed meanwhile may be missed, or come twice."""
        found = await self._store.walk(
            await self._by_stored_key(criteria), start=start, limit=limit, max_bytes=max_bytes
        )
        return replace(found, sessions=_all_shown(found.sessions))

    async def delete(self, criteria: Criteria, *, limit: int, not_after_us: int = NEVER_US) -> Deletion:
        """See SessionStore; takes a session id in place of the token too."""
        delete = partial(self._store.delete, limit=limit, not_after_us=not_after_us)
        token = criteria.access_token
        if token is None or token_hash.is_session_id(token):
            return await delete(await self._by_stored_key(criteria))
        for _ in range(_RENAMINGS):
            (is_there,) = await self._rename([token])
            if isinstance(is_there, MnemosyneError):
                raise is_there
            by_key = await self._by_stored_key(criteria)
            deletion = await delete(by_key)
            if deletion.stored_keys or not is_there or await self._fails_to_meet(by_key):
                return deletion
        raise _in_between()

    async def _fails_to_meet(self, by_key: Criteria) -> bool:
        """Tell whether the session with a stored key is there, and does not meet the other criteria."""
        page = await self._store.find(Criteria(access_token=by_key.access_token), offset=0, limit=1)
        return any(not (isinstance(one, Session) and by_key.meets(one)) for one in page.sessions)

    async def _by_stored_key(self, criteria: Criteria) -> Criteria:
        token = criteria.access_token
        if token is None:
            return criteria
        stored_key = (
            token_hash.from_session_id(token) if token_hash.is_session_id(token) else self._stored_key(token)
        )
        return replace(criteria, access_token=stored_key)

    async def _found_for(
        self,
        items: Sequence[Tokened],
        run: Callable[[Sequence[Tokened]], Awaitable[list[Result | MnemosyneError]]],
    ) -> list[Result | MnemosyneError]:
        tokens = [item.access_token for item in items]
        return await self._found(tokens, items, self._keyed, run)

    async def _found(
        self,
        tokens: Sequence[str],
        items: Sequence[Item],
        keyed: Callable[[Item], Item],
        run: Callable[[Sequence[Item]], Awaitable[list[Result | MnemosyneError]]],
    ) -> list[Result | MnemosyneError]:
        """Run a batch of items, and once more those items whose session had a former stored key."""
        results = await run([keyed(item) for item in items])

        async def look_again(missing: list[int]) -> list[int]:
            """Rename the sessions of these items; return the items that exist and are still not found."""
            are_there = await self._rename([tokens[at] for at in missing])
            retried = [at for at, is_there in zip(missing, are_there, strict=True) if is_there is True]
            found = await run([keyed(items[at]) for at in retried]) if retried else []
            for at, is_there in zip(missing, are_there, strict=True):
                results[at] = is_there if isinstance(is_there, MnemosyneError) else results[at]
            for at, result in zip(retried, found, strict=True):
                results[at] = result
            return [at for at in retried if _is_missing(results[at])]

        missing = [at for at, result in enumerate(results) if _is_missing(result)]
        for _ in range(_RENAMINGS - 1):
            missing = await look_again(missing)
        # Now one by one: the store waits for a session that is renamed alone.
        for at in missing:
            for _ in range(_RENAMINGS):
                if not await look_again([at]):
                    break
            else:
                # The answer "not found" would log a user out.
                results[at] = _in_between()
        return results

    async def _rename(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """Give the tokens' sessions their stored keys; tell which tokens have a session under any key."""
        found: dict[str, bool | MnemosyneError] = dict.fromkeys(tokens, False)
        # One former key after the other, so that of several sessions of a token one is left.
        layers = list(zip(*(self._renamings(token) for token in found), strict=True))
        for layer in layers:
            for token, outcome in zip(found, await self._store.rename(layer), strict=True):
                found[token] = outcome or found[token]
        if len(layers) > 1:
            # Between two looks, another node may have renamed it to the key that was looked at first.
            for token in await self._with_any_key([token for token in found if not found[token]]):
                found[token] = True
        return [found[token] for token in tokens]

    async def _with_any_key(self, tokens: Sequence[str]) -> set[str]:
        """Return the tokens that have a session under any of their keys, in one look at all keys."""
        pairs = [(key, token) for token in tokens for key in self.token_hasher.all_keys(token)]
        are_there = await self._store.exist([key for key, _ in pairs]) if pairs else []
        return {token for (_, token), is_there in zip(pairs, are_there, strict=True) if is_there is True}

    def _renamings(self, token: str) -> list[Renaming]:
        return [
            Renaming(old=key, new=self._stored_key(token)) for key in self.token_hasher.former_keys(token)
        ]

    def _keyed(self, item: Tokened) -> Tokened:
        return replace(item, access_token=self._stored_key(item.access_token))


def _all_shown(found: Sequence[Found]) -> Sequence[Found]:
    if isinstance(found, SessionColumns):
        return replace(found, tokens=[_shown(key.decode()).encode() for key in found.tokens])
    return [replace(one, access_token=_shown(one.access_token)) for one in found]


def _shown(stored_key: str) -> str:
    session_id = token_hash.session_id(stored_key)
    # A damaged row may have a key that begins like a hash and is none.
    return session_id if token_hash.is_session_id(session_id) else stored_key


def _in_between() -> StorageUnavailable:
    return StorageUnavailable("mnemosyned: storage: the session is being renamed by another node")


def _is_missing(result: object) -> bool:
    return result is False or isinstance(result, SessionNotFound)


def _with_token(result: Session | MnemosyneError, token: str) -> Session | MnemosyneError:
    return replace(result, access_token=token) if isinstance(result, Session) else result
