"""`mnemosyned migrate`: hash the tokens of all stored sessions now, instead of when each is next read.

Daemons with `-token.protection=hmac` rename a session when it is next used (`storage/hashed.py`). A session
that is rarely used keeps its token in the table until then. This command renames all of them.

It walks through the stored keys in the order of bytes. Hashes begin with NUL and come first, so it starts
behind them. Each page is renamed as one batch:

    page of stored keys ──> tokens among them ──> rename as a batch, which skips sessions that others hold
                      └──> the same page again ──> rename what is left one by one, which waits

- It may run while daemons do, if all of them hash. Two renamings of one session are harmless: the second
  finds the session under its new key. A daemon that does not hash would rename sessions back.
- It may be ended and run again: each batch is committed, and a second run does what is left.
- A renamed session moves out of the walk's way, since its new key lies before the start. New sessions get
  hashes and never enter the walk. The walk therefore ends.
- Sessions that another HMAC key has hashed are not touched: their tokens are unknown. A daemon renames them
  when a caller next sends the token, so the former key must be kept until then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from mnemosyned import settings
from mnemosyned.commands import on_storage
from mnemosyned.config.flags import ConfigError
from mnemosyned.errors import MnemosyneError
from mnemosyned.security.config import AuthConfig
from mnemosyned.sessions.store import Renaming
from mnemosyned.sessions.token_hash import AFTER_HASHES, is_hashed
from mnemosyned.storage.engines import token_hasher
from mnemosyned.storage.hash_keys import key_ids_in

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.sessions.store import FullStore, RenamableStore
    from mnemosyned.sessions.token_hash import TokenHasher

# Stored keys per statement: their rows stay locked until it ends, some tens of milliseconds.
_PAGE: Final = 1000

_HELP: Final = """usage: mnemosyned migrate [flags]

Hash the tokens of all sessions that were stored before -token.protection=hmac, without waiting until each
is read. Takes the daemon's flags, environment and file, and uses those of the storage: -postgres.…,
-token.protection=hmac, -token.key.file. No user is logged out, and daemons may run meanwhile.

example: mnemosyned migrate -token.protection=hmac -token.key.file=token.key -postgres.address.file=address
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code: 0 done, 1 failed, 2 wrong flags."""
    return on_storage.command(argv, _HELP, _parsed, _body)


def _body(config: Config) -> int:
    hasher = token_hasher(config)
    assert hasher is not None
    return on_storage.run(config, partial(_migrate, hasher=hasher))


def _parsed(argv: Sequence[str]) -> Config:
    config = settings.parse(argv, os.environ)
    if config[AuthConfig].token_protection == "none":  # noqa: S105  # a mode
        raise ConfigError("migrate needs -token.protection=hmac")
    # The configuration allows HMAC keys only for an engine that can rename.
    on_storage.check_durable(config, "migrate")
    return config


async def _migrate(store: FullStore, *, hasher: TokenHasher) -> int:
    count = await hash_all(store, hasher)
    others = await key_ids_in(store) - {hasher.key_id}
    sys.stdout.write(f"{count} sessions were stored under their tokens, and are hashed now\n")
    if others:
        sys.stdout.write(
            "some sessions are hashed with another key: they get the new hash when they are read; "
            "keep both keys until then\n"
        )
    return 0


async def hash_all(store: RenamableStore, hasher: TokenHasher) -> int:
    """Rename the live sessions that are stored under their tokens; return how many were there.

    Raises:
        StorageUnavailable: no answer, or a session that another writer held for too long.
    """
    count, after = 0, AFTER_HASHES
    while page := await store.stored_keys_after(after, limit=_PAGE):
        count += await _renamed(store, hasher, [stored_key for stored_key in page if _is_token(stored_key)])
        # What is still there was held by another writer, or has expired. A session that is renamed alone is
        # waited for. Not counted: the batch has counted it as there.
        for stored_key in await store.stored_keys_after(after, limit=len(page)):
            if stored_key in page and _is_token(stored_key):
                await _renamed(store, hasher, [stored_key])
        after = page[-1]
    return count


async def _renamed(store: RenamableStore, hasher: TokenHasher, tokens: Sequence[str]) -> int:
    """Rename these sessions in one batch; return how many of these tokens have a session."""
    if not tokens:
        return 0
    outcomes = await store.rename([Renaming(old=token, new=hasher.stored_key(token)) for token in tokens])
    for outcome in outcomes:
        if isinstance(outcome, MnemosyneError):
            raise outcome
    return sum(map(bool, outcomes))


def _is_token(stored_key: str) -> bool:
    # Rows of the Go daemon may begin with NUL or be no UTF-8, since it checks neither. No call can name such
    # a session, so it has no token to hash.
    if is_hashed(stored_key):
        return False
    try:
        stored_key.encode()
    except UnicodeEncodeError:
        return False
    return True
