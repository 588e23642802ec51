"""`mnemosyned migrate`: rename all sessions at once that are still named by their tokens.

Without it each is renamed when it is next read. It may run while daemons do, all with
`-token.protection=hmac`; run again it does what is left.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from mnemosyned.config import config as configuration
from mnemosyned.daemon import StartFailed, start_embedded
from mnemosyned.errors import MnemosyneError
from mnemosyned.observe import logs
from mnemosyned.observe.metrics import new_registry
from mnemosyned.sessions.store import Renaming, StorageRefused
from mnemosyned.sessions.token_hash import AFTER_HASHED, is_hashed
from mnemosyned.storage.engines import key_ids_in, new_store, token_hasher

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.sessions.store import SessionStore
    from mnemosyned.sessions.token_hash import TokenHasher

_PAGE: Final = 1000

_HELP: Final = """usage: mnemosyned migrate [flags]

Protect the tokens of all sessions that were stored before -token.protection=hmac, without waiting for them
to be read. Takes the daemon's flags, environment and file, and reads of them what concerns the storage:
-postgres.…, -token.protection=hmac, -token.key.file. Nobody is logged out, and daemons may run meanwhile.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code: 0 done, 1 not, 2 wrong flags."""
    if {"-h", "-help", "--help"} & set(argv):
        sys.stdout.write(_HELP)
        return 0
    try:
        config = _parsed(argv)
    except configuration.ConfigError as exc:
        sys.stderr.write(f"mnemosyned: {exc}\n")
        return 2
    if config.check_config:
        sys.stdout.write("the configuration is valid\n")
        return 0
    logs.configure(config.log_environment, config.log_level)
    try:
        embedded = start_embedded(config)
        try:
            text = asyncio.run(_migrated(config, None if embedded is None else embedded.dsn))
        finally:
            if embedded is not None:
                embedded.stop()
    except (MnemosyneError, StorageRefused, StartFailed) as exc:
        sys.stderr.write(f"mnemosyned: {str(exc).removeprefix('mnemosyned: ')}\n")
        return 1
    sys.stdout.write(text)
    return 0


def _parsed(argv: Sequence[str]) -> Config:
    config = configuration.parse(argv, os.environ)
    if config.token_protection == "none" or config.storage == "memory":  # noqa: S105  # a mode
        raise configuration.ConfigError("migrate needs -token.protection=hmac, and -storage=postgres")
    return config


async def _migrated(config: Config, embedded_dsn: str | None) -> str:
    store, known = new_store(config, embedded_dsn, new_registry()), token_hasher(config)
    assert known is not None
    await store.open()
    try:
        count = await protect_all(store, known)
        others = await key_ids_in(store) - {known.key_id}
    finally:
        await store.close()
    text = f"{count} sessions were named by their tokens, and are protected now\n"
    if others:
        text += (
            "some are named by another key: they get the new one when they are read; keep both until then\n"
        )
    return text


async def protect_all(store: SessionStore, known: TokenHasher) -> int:
    """Rename the live sessions named by their tokens; return how many. Raises MnemosyneError."""
    count, after = 0, AFTER_HASHED
    while page := await store.stored_keys_after(after, limit=_PAGE):
        count += await _renamed(store, known, [name for name in page if _is_token(name)])
        # What another writer held: one by one, each is waited for.
        for name in await store.stored_keys_after(after, limit=len(page)):
            if name in page and _is_token(name):
                await _renamed(store, known, [name])
        after = page[-1]
    return count


async def _renamed(store: SessionStore, known: TokenHasher, tokens: Sequence[str]) -> int:
    """Return how many of these tokens have sessions."""
    if not tokens:
        return 0
    outcomes = await store.rename([Renaming(old=token, new=known.alias(token)) for token in tokens])
    for outcome in outcomes:
        if isinstance(outcome, MnemosyneError):
            raise outcome
    return sum(map(bool, outcomes))


def _is_token(name: str) -> bool:
    # The Go daemon checks neither; no caller of ours can name such a session.
    if is_hashed(name):
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
