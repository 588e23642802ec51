"""Naming a token in logs without revealing it.

Two lines about one session can be recognised as such, and that is all:

- The key is random and this process's own. A plain hash of a guessed or stolen token could be compared with
  old logs. The price: two nodes, or one node before and after a restart, name a token differently.
- 6 bytes are enough to tell the sessions of one log from each other, and short enough for a line.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

_DIGEST_BYTES: Final = 6
_KEY: Final = os.urandom(32)


def fingerprint(token: str) -> str:
    """Return 12 hexadecimal digits, the same for a token for as long as this process runs."""
    # A damaged session's token need not be UTF-8; the storage engines make surrogates of such bytes.
    stored = token.encode(errors="surrogateescape")
    return hashlib.blake2b(stored, digest_size=_DIGEST_BYTES, key=_KEY).hexdigest()
