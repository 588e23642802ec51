"""Which HMAC keys have hashed the stored sessions, and a warning if this node lacks one of them.

A node that lacks a key finds no session that was hashed with it: its users are logged out one by one, and
no call fails otherwise. The usual cause is a key that was removed from `-token.key.file` too early, or
another file on one node. The check runs once, at the start.

The stored keys of all hashes begin with NUL and the id of their HMAC key, so they lie together in the order
of bytes, before all tokens. The check therefore skips from one HMAC key to the next: it reads one stored key
for each, however many sessions there are.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions import token_hash
from mnemosyned.sessions.store import RenamableStore
from mnemosyned.sessions.token_hash import TokenHasher

log = logging.getLogger(__name__)

_RETRY_S: Final = 1.0
# At most two HMAC keys are in use. Rows of another application could have any number of prefixes.
_MAX_LOOKS: Final = 100


async def warn_of_unknown_keys(store: RenamableStore, hasher: TokenHasher | None) -> None:
    """Log `tokens_by_unknown_keys` if sessions are hashed with an HMAC key that `hasher` lacks.

    `hasher` is None if no HMAC key is configured: then every key is unknown. Retries once a second while the
    storage is unavailable. Never raises, since it is not worth the end of the daemon.
    """
    while True:
        try:
            unknown = await key_ids_in(store) - (frozenset() if hasher is None else hasher.key_ids)
            break
        except MnemosyneError as exc:
            log.debug("token_keys_wait", extra={"error": str(exc)})
            await asyncio.sleep(_RETRY_S)
        except Exception as exc:  # the root of a call: becomes its status
            log.error("token_keys_not_looked_for", exc_info=exc)
            return
    if unknown:
        log.error("tokens_by_unknown_keys", extra={"key_ids": sorted(unknown), "flags": "-token.key.file"})


async def key_ids_in(store: RenamableStore) -> set[str]:
    """Return the ids of the HMAC keys that have hashed sessions, expired ones included.

    One statement for each key, at most 100.

    Raises:
        StorageUnavailable: no answer within the engine's own time-out.
    """
    found: set[str] = set()
    after = ""
    for _ in range(_MAX_LOOKS):
        (stored_key, *_) = await store.stored_keys_after(after, limit=1) or [""]
        if not token_hash.is_hashed(stored_key):
            break
        # A key with NUL that is no hash of ours, from another application: step over it alone.
        after = stored_key
        if token_hash.is_session_id(token_hash.session_id(stored_key)):
            found.add(token_hash.key_id_in(stored_key))
            after = token_hash.after_key(token_hash.key_id_in(stored_key))
    return found
