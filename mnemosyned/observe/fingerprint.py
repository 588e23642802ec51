"""Naming a token in logs without revealing it."""

from __future__ import annotations

import hashlib
import os
from typing import Final

_DIGEST_BYTES: Final = 6
# Of this process alone: a plain hash of a guessed token could be compared with old logs.
_KEY: Final = os.urandom(32)


def fingerprint(token: str) -> str:
    """Return 12 hexadecimal digits that stay the same for a token while this process runs."""
    return hashlib.blake2b(token.encode(), digest_size=_DIGEST_BYTES, key=_KEY).hexdigest()
