"""How a call to a peer looks in HTTP/2: its path, and the signature in its metadata.

peer_auth.py says what a signature proves. Here it gets what that pure module cannot have: time and a nonce.
"""

from __future__ import annotations

import os
import time
from typing import Final

from cluster.peer_auth import METADATA_KEY, NONCE_BYTES, PeerKey
from http2.outbox import Headers

SERVICE_NAME: Final = "mnemosynepeer.Peer"


def path(method: str) -> bytes:
    """Return the path of a method of the Peer service."""
    return f"/{SERVICE_NAME}/{method}".encode()


def now_ms() -> int:
    """Return the time of a signature, in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def sign(key: PeerKey, method: str, body: bytes) -> str:
    """Return the signature of a call; empty if calls with this key need none."""
    return key.sign(method, body, now_ms=now_ms(), nonce=os.urandom(NONCE_BYTES))


def metadata(signature: str) -> Headers:
    """Return the metadata of a call with this signature."""
    return [(METADATA_KEY.encode(), signature.encode())] if signature else []
