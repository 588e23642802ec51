"""Which HMAC keys have hashed the stored sessions, and a warning where one of them is not known here."""

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
# Two HMAC keys are in use at most; a table with many more is not ours to walk through.
_MAX_LOOKS: Final = 100


async def warn_of_unknown_keys(store: RenamableStore, hasher: TokenHasher | None) -> None:
    """Log it when sessions are hashed with an unknown HMAC key: their users would be logged out."""
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
    """Return which HMAC keys have hashed sessions; one short look for each. Raises StorageUnavailable."""
    found: set[str] = set()
    after = ""
    for _ in range(_MAX_LOOKS):
        (stored_key, *_) = await store.stored_keys_after(after, limit=1) or [""]
        if not token_hash.is_hashed(stored_key):
            break
        after = stored_key
        if token_hash.is_session_id(token_hash.session_id(stored_key)):
            found.add(token_hash.key_id_in(stored_key))
            after = token_hash.after_key(token_hash.key_id_in(stored_key))
    return found
