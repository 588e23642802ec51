"""Tokens at rest: the stored keys under which a storage keeps sessions. Pure.

A session's stored key is its token. With `-token.protection=hmac` it is a hash instead: NUL, eight digits
that name the HMAC key, and the HMAC-SHA256 of the token under that key, in hexadecimal. No token begins
with NUL (`token.py`). Therefore a reader of the table learns no token, and no caller can pass a hash off as
a token.

List cannot show the token of such a session. It shows a session id instead: `hmac:` and the hash's 72
digits. Delete takes it in place of the token; it opens no session.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from typing import Final

_MARK: Final = "\0"
_SESSION_ID_MARK: Final = "hmac:"
_KEY_ID_LENGTH: Final = 8
_SESSION_ID: Final = re.compile(_SESSION_ID_MARK + r"[0-9a-f]{72}")
# Greater than every hash and less than every token, in the order of bytes.
AFTER_HASHES: Final = "\0g"


class TokenHasher:
    """The stored keys that a token's session may have, by these HMAC keys; the first HMAC key is in use.

    `is_hashing` tells whether sessions get the hash by the first key from now on. Otherwise they get their
    tokens.
    """

    def __init__(self, hmac_keys: Sequence[bytes], *, is_hashing: bool) -> None:
        self._keys = [(_id_of(hmac_key), hmac_key) for hmac_key in hmac_keys]
        self._is_hashing = is_hashing

    @property
    def key_ids(self) -> frozenset[str]:
        """The ids of all HMAC keys; an id tells keys apart and reveals nothing else of them."""
        return frozenset(key_id for key_id, _ in self._keys)

    @property
    def key_id(self) -> str:
        """The id of the first HMAC key."""
        return self._keys[0][0]

    def stored_key(self, token: str) -> str:
        """Return the stored key that the token's session is to have."""
        return _hashed(*self._keys[0], token) if self._is_hashing else token

    def former_keys(self, token: str) -> list[str]:
        """Return the stored keys that the session may still have, from before a change of flags or keys."""
        keys = self._keys[1:] if self._is_hashing else self._keys
        found = [_hashed(key_id, hmac_key, token) for key_id, hmac_key in keys]
        return [*found, token] if self._is_hashing else found

    def all_keys(self, token: str) -> list[str]:
        """Return every stored key that the session may have."""
        return [self.stored_key(token), *self.former_keys(token)]

    def makes(self, stored_key: str) -> bool:
        """Tell whether `stored_key` can have made this hash."""
        return self._is_hashing and key_id_in(stored_key) == self.key_id


def _hashed(key_id: str, hmac_key: bytes, token: str) -> str:
    return _MARK + key_id + hmac.digest(hmac_key, token.encode(), "sha256").hex()


def _id_of(hmac_key: bytes) -> str:
    return hashlib.sha256(b"mnemosyned token key\n" + hmac_key).hexdigest()[:_KEY_ID_LENGTH]


def is_hashed(stored_key: str) -> bool:
    """Tell whether a stored key is a hash, and not a token."""
    return stored_key.startswith(_MARK)


def key_id_in(stored_key: str) -> str:
    """Return the id of the HMAC key that made a hash."""
    return stored_key[len(_MARK) : len(_MARK) + _KEY_ID_LENGTH]


def after_key(key_id: str) -> str:
    """Return what is greater than every hash by that HMAC key, and less than all greater hashes."""
    return f"{_MARK}{key_id}g"


def is_session_id(text: str) -> bool:
    """Tell whether a text is a session id, as List shows it for a hash."""
    return _SESSION_ID.fullmatch(text) is not None


def session_id(stored_key: str) -> str:
    """Return what List shows as the token: a session id for a hash, or the token itself."""
    return _SESSION_ID_MARK + stored_key.removeprefix(_MARK) if is_hashed(stored_key) else stored_key


def from_session_id(shown: str) -> str:
    """Return the stored key that `session_id` showed so."""
    return _MARK + shown.removeprefix(_SESSION_ID_MARK)
