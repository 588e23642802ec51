"""Copies by the names that other nodes have for their sessions: tokens, or hashes where tokens are hashed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemosyned.sessions import token_hash

if TYPE_CHECKING:
    from cache.read_through import Fill, ReadThrough
    from mnemosyned.sessions.encoded import EncodedSession
    from mnemosyned.sessions.token_hash import TokenHasher


class TokenIndex:
    """The tokens of cached sessions by stored key, for invalidations that name a hash. A KeyObserver."""

    def __init__(self, hasher: TokenHasher) -> None:
        self._hasher = hasher
        self._token_by_stored_key: dict[str, str] = {}

    def added(self, token: str) -> None:
        """See KeyObserver."""
        self._token_by_stored_key[self._hasher.stored_key(token)] = token

    def removed(self, token: str) -> None:
        """See KeyObserver."""
        self._token_by_stored_key.pop(self._hasher.stored_key(token), None)

    def cleared(self) -> None:
        """See KeyObserver."""
        self._token_by_stored_key.clear()

    def find(self, stored_key: str) -> str | None:
        """Return the cached token that this is the hash of."""
        return self._token_by_stored_key.get(stored_key)

    def token_shown_as(self, shown: str) -> str:
        """Return the cached token that List shows so, or what it shows."""
        return self._token_by_stored_key.get(token_hash.from_session_id(shown), shown)

    def knows(self, stored_key: str) -> bool:
        """Tell whether `find` can find this hash: one made with another key may stand for any token."""
        return self._hasher.makes(stored_key)


def drop(
    cache: ReadThrough[EncodedSession],
    index: TokenIndex | None,
    key: str,
    *,
    but: Fill[EncodedSession] | None = None,
) -> None:
    """Drop a cache's copies of one session, named by its token or its stored key; `index` is of the cache.

    A hash that this node cannot find the token of may be of any token, so it drops everything. The fill `but`
    stays open where the token itself is given.
    """
    if not token_hash.is_hashed(key):
        cache.drop(key, but=but)
    elif index is None or not index.knows(key):
        cache.drop_everything()
    elif (token := index.find(key)) is not None:
        cache.drop(token)
