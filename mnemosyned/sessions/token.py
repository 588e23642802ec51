"""Access tokens: how they are made, and what may be one. Pure."""

from __future__ import annotations

import hashlib
from typing import Final

from mnemosyned.errors import InvalidArgument

MAX_TOKEN_BYTES: Final = 4096
TOKEN_ENTROPY_BYTES: Final = 128
_TOKEN_DIGEST_BYTES: Final = 64


def generate_token(entropy: bytes) -> str:
    """Return an access token made of TOKEN_ENTROPY_BYTES random bytes.

    128 hexadecimal digits: SHAKE256 to 64 bytes, as the Go daemon makes them.
    """
    return hashlib.shake_256(entropy).hexdigest(_TOKEN_DIGEST_BYTES)


def check_token(token: str) -> str:
    """Return the token if it can name a session.

    Raises:
        InvalidArgument: it is empty, over MAX_TOKEN_BYTES or contains a NUL character.
    """
    if not token:
        raise InvalidArgument("mnemosyned: missing access token")
    if "\0" in token:
        raise InvalidArgument("mnemosyned: access token contains a NUL character")
    # A character takes four bytes at most, so short tokens, all real ones, need no encoding.
    if len(token) * 4 > MAX_TOKEN_BYTES and len(token.encode()) > MAX_TOKEN_BYTES:
        raise InvalidArgument(f"mnemosyned: access token is longer than {MAX_TOKEN_BYTES} bytes")
    return token
