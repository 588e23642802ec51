"""Tokens at rest: the names under which a storage keeps sessions.

A session's name is its token, or in its place a protected name: NUL, eight digits that tell the key, and the
HMAC-SHA256 of the token under that key, in hexadecimal. No token begins with NUL (session.py), so that
whoever has read the table knows no token, and cannot pass a name off as one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from typing import Final

_MARK: Final = "\0"
# What List shows of a session whose token it cannot know; Delete takes it.
_HANDLE_MARK: Final = "hmac:"
_KEY_ID_LENGTH: Final = 8
_HANDLE: Final = re.compile(_HANDLE_MARK + r"[0-9a-f]{72}")
# Greater than every protected name, and less than every token, in the order of bytes.
AFTER_HASHED: Final = "\0g"


class TokenHasher:
    """The names that a token's session may have, by these keys; the first of them is in use.

    `are_protected` tells whether sessions are named by the first key from now on, or else by their tokens.
    """

    def __init__(self, keys: Sequence[bytes], *, are_protected: bool) -> None:
        self._keys = [(_id_of(key), key) for key in keys]
        self._are_protected = are_protected

    @property
    def key_ids(self) -> frozenset[str]:
        """What tells the keys apart, and tells nothing else of them."""
        return frozenset(key_id for key_id, _ in self._keys)

    @property
    def key_id(self) -> str:
        """What tells the first key."""
        return self._keys[0][0]

    def alias(self, token: str) -> str:
        """Return the name that the token's session is to have."""
        return _named(*self._keys[0], token) if self._are_protected else token

    def others(self, token: str) -> list[str]:
        """Return the names that it may still have."""
        keys = self._keys[1:] if self._are_protected else self._keys
        found = [_named(key_id, key, token) for key_id, key in keys]
        return [*found, token] if self._are_protected else found

    def all(self, token: str) -> list[str]:
        """Return every name that it may have."""
        return [self.alias(token), *self.others(token)]

    def is_stored_key(self, text: str) -> bool:
        """Tell whether this is a protected name."""
        return is_hashed(text)

    def knows(self, name: str) -> bool:
        """Tell whether `alias` can have made this protected name."""
        return self._are_protected and key_id_in(name) == self.key_id


def _named(key_id: str, key: bytes, token: str) -> str:
    return _MARK + key_id + hmac.digest(key, token.encode(), "sha256").hex()


def _id_of(key: bytes) -> str:
    return hashlib.sha256(b"mnemosyned token key\n" + key).hexdigest()[:_KEY_ID_LENGTH]


def is_hashed(name: str) -> bool:
    """Tell whether a name is a protected one."""
    return name.startswith(_MARK)


def key_id_in(name: str) -> str:
    """Return which key has made a protected name."""
    return name[len(_MARK) : len(_MARK) + _KEY_ID_LENGTH]


def after_key(key_id: str) -> str:
    """Return what is greater than every name by that key, and less than all others that are greater."""
    return f"{_MARK}{key_id}g"


def is_session_id(text: str) -> bool:
    """Tell whether a text is a protected name as callers may see it."""
    return _HANDLE.fullmatch(text) is not None


def shown(name: str) -> str:
    """Return a name as callers may see it: a handle, or the token."""
    return _HANDLE_MARK + name.removeprefix(_MARK) if is_hashed(name) else name


def from_session_id(handle: str) -> str:
    """Return the name that was shown so."""
    return _MARK + handle.removeprefix(_HANDLE_MARK)
