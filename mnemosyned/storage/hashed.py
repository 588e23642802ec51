"""A store in front of a store: tokens on this side, names on the other (names.py).

A session that is not found under its token's primary name may have another one still, from before the
protection was turned on or its key was changed. It is then renamed, and looked for again. Two nodes
whose primary names differ, as while they are restarted one by one, may rename it against each other,
so that is tried a few times. Meanwhile a token that a caller chose may start two sessions at once, one by
each name, which the table's key cannot tell: the next that is done with it ends one.

What a Delete or a cleanup has ended is told by name, since nobody here knows the token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from mnemosyned.errors import InvalidArgument, MnemosyneError, SessionNotFound, StorageUnavailable
from mnemosyned.sessions import token_hash as names
from mnemosyned.sessions.model import Abandonment, Criteria, NewSession, Session, Touch, ValueChange
from mnemosyned.sessions.store import Deletion, Renaming, SessionStore
from mnemosyned.sessions.token_hash import TokenHasher

Item = TypeVar("Item")
Tokened = TypeVar("Tokened", Abandonment, NewSession, Touch, ValueChange)
Result = TypeVar("Result")

_RENAMINGS: Final = 3


class HashedStore:
    """SessionStore on another one, in which sessions have these names."""

    def __init__(self, store: SessionStore, token_hasher: TokenHasher) -> None:
        self._store = store
        self.token_hasher = token_hasher
        self._primary = token_hasher.alias
        # What concerns no token.
        self.open, self.close = store.open, store.close
        self.now_us, self.fingerprint = store.now_us, store.fingerprint
        self.rename, self.stored_keys_after = store.rename, store.stored_keys_after
        self.clean_up = store.clean_up

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        """See SessionStore. An item's failure besides: InvalidArgument, the token is a handle."""
        startable = [new for new in sessions if not names.is_session_id(new.access_token)]
        # A session that has the token by another name must be met.
        await self._rename([new.access_token for new in startable])
        started = iter(await self._store.start([self._named(new) for new in startable]))
        return [
            InvalidArgument("mnemosyned: access token is a handle of List")
            if names.is_session_id(new.access_token)
            else _with_token(next(started), new.access_token)
            for new in sessions
        ]

    async def load(self, tokens: Sequence[str]) -> list[Session | MnemosyneError]:
        """See SessionStore."""
        results = await self._found(tokens, tokens, self._primary, self._store.load)
        return [_with_token(result, token) for token, result in zip(tokens, results, strict=True)]

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return await self._found(tokens, tokens, self._primary, self._store.exist)

    async def set_values(self, changes: Sequence[ValueChange]) -> list[dict[str, str] | MnemosyneError]:
        """See SessionStore."""
        return await self._found_for(changes, self._store.set_values)

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        # First, in case that a token has got two sessions, by two names, while nodes were restarted.
        await self._rename([ending.access_token for ending in endings])
        return await self._found_for(endings, self._store.abandon)

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return await self._found_for(touches, self._store.touch)

    async def find(self, criteria: Criteria, *, offset: int, limit: int) -> list[Session]:
        """See SessionStore; a session with a protected name has its handle for a token."""
        found = await self._store.find(await self._by_name(criteria), offset=offset, limit=limit)
        return [replace(session, access_token=names.shown(session.access_token)) for session in found]

    async def delete(self, criteria: Criteria, *, limit: int) -> Deletion:
        """See SessionStore; a handle will do for the token."""
        token = criteria.access_token
        if token is None or names.is_session_id(token):
            return await self._store.delete(await self._by_name(criteria), limit=limit)
        for _ in range(_RENAMINGS):
            (is_there,) = await self._rename([token])
            if isinstance(is_there, MnemosyneError):
                raise is_there
            deletion = await self._store.delete(await self._by_name(criteria), limit=limit)
            if deletion.names or not is_there:
                return deletion
        raise _in_between()

    async def _by_name(self, criteria: Criteria) -> Criteria:
        token = criteria.access_token
        if token is None:
            return criteria
        name = names.from_session_id(token) if names.is_session_id(token) else self._primary(token)
        return replace(criteria, access_token=name)

    async def _found_for(
        self,
        items: Sequence[Tokened],
        run: Callable[[Sequence[Tokened]], Awaitable[list[Result | MnemosyneError]]],
    ) -> list[Result | MnemosyneError]:
        tokens = [item.access_token for item in items]
        return await self._found(tokens, items, self._named, run)

    async def _found(
        self,
        tokens: Sequence[str],
        items: Sequence[Item],
        named: Callable[[Item], Item],
        run: Callable[[Sequence[Item]], Awaitable[list[Result | MnemosyneError]]],
    ) -> list[Result | MnemosyneError]:
        """Run a batch of items, those again whose session had another name."""
        results = await run([named(item) for item in items])

        async def look_again(missing: list[int]) -> list[int]:
            """Rename the sessions of these items; return those that are there, and not found even so."""
            are_there = await self._rename([tokens[at] for at in missing])
            again = [at for at, is_there in zip(missing, are_there, strict=True) if is_there is True]
            found = await run([named(items[at]) for at in again]) if again else []
            for at, is_there in zip(missing, are_there, strict=True):
                results[at] = is_there if isinstance(is_there, MnemosyneError) else results[at]
            for at, result in zip(again, found, strict=True):
                results[at] = result
            return [at for at in again if _is_missing(results[at])]

        missing = [at for at, result in enumerate(results) if _is_missing(result)]
        for _ in range(_RENAMINGS - 1):
            missing = await look_again(missing)
        # Now one by one, since then each is waited for.
        for at in missing:
            if await look_again([at]):
                # Whoever was told that it is not there would log somebody out.
                results[at] = _in_between()
        return results

    async def _rename(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """Give the tokens' sessions their primary names; tell which have one, by whatever name."""
        found: dict[str, bool | MnemosyneError] = dict.fromkeys(tokens, False)
        # By one former name after the other, so that of several sessions of a token one is left.
        layers = list(zip(*(self._others(token) for token in found), strict=True))
        for layer in layers:
            for token, outcome in zip(found, await self._store.rename(layer), strict=True):
                found[token] = outcome or found[token]
        if len(layers) > 1:
            # Between two looks it may have been renamed to where the first one was.
            for token in await self._named_somehow([token for token in found if not found[token]]):
                found[token] = True
        return [found[token] for token in tokens]

    async def _named_somehow(self, tokens: Sequence[str]) -> set[str]:
        """Return the tokens that have a session by any of their names, all looked for at once."""
        pairs = [(name, token) for token in tokens for name in self.token_hasher.all(token)]
        are_there = await self._store.exist([name for name, _ in pairs]) if pairs else []
        return {token for (_, token), is_there in zip(pairs, are_there, strict=True) if is_there is True}

    def _others(self, token: str) -> list[Renaming]:
        return [Renaming(old=name, new=self._primary(token)) for name in self.token_hasher.others(token)]

    def _named(self, item: Tokened) -> Tokened:
        return replace(item, access_token=self._primary(item.access_token))


def _in_between() -> StorageUnavailable:
    return StorageUnavailable("mnemosyned: storage: the session is being renamed by another node")


def _is_missing(result: object) -> bool:
    return result is False or isinstance(result, SessionNotFound)


def _with_token(result: Session | MnemosyneError, token: str) -> Session | MnemosyneError:
    return replace(result, access_token=token) if isinstance(result, Session) else result
