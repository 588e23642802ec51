"""`mnemosyned migrate`: hash the tokens of all stored sessions now, instead of when each is next read.

It may run while daemons do, all with `-token.protection=hmac`. Run again, it does what is left.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, cast

from mnemosyned import settings
from mnemosyned.config.flags import ConfigError
from mnemosyned.errors import MnemosyneError
from mnemosyned.observe import logs
from mnemosyned.observe.config import ObserveConfig
from mnemosyned.observe.metrics import new_registry
from mnemosyned.security.config import AuthConfig
from mnemosyned.sessions.store import Renaming, StorageRefused
from mnemosyned.sessions.token_hash import AFTER_HASHES, is_hashed
from mnemosyned.storage.engines import StorageConfig, Surroundings, new_store, token_hasher
from mnemosyned.storage.hash_keys import key_ids_in

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.sessions.store import FullStore, RenamableStore
    from mnemosyned.sessions.token_hash import TokenHasher
    from mnemosyned.storage.engines import PrivateServer

_PAGE: Final = 1000

_HELP: Final = """usage: mnemosyned migrate [flags]

Hash the tokens of all sessions that were stored before -token.protection=hmac, without waiting until each
is read. Takes the daemon's flags, environment and file, and uses those of the storage: -postgres.…,
-token.protection=hmac, -token.key.file. No user is logged out, and daemons may run meanwhile.

example: mnemosyned migrate -token.protection=hmac -token.key.file=token.key -postgres.address.file=address
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code: 0 done, 1 failed, 2 wrong flags."""
    if {"-h", "-help", "--help"} & set(argv):
        sys.stdout.write(_HELP)
        return 0
    try:
        config = _parsed(argv)
    except ConfigError as exc:
        sys.stderr.write(f"mnemosyned: {exc}\n")
        return 2
    if config[settings.RunConfig].only_checks:
        sys.stdout.write("the configuration is valid\n")
        return 0
    observe = config[ObserveConfig]
    logs.configure(observe.log_environment, observe.log_level, secret_flags=settings.SECRET_FLAGS)
    try:
        server = config[StorageConfig].engine.start_server(config)
        try:
            text = asyncio.run(_migrated(config, server))
        finally:
            if server is not None:
                server.stop()
    except (MnemosyneError, StorageRefused) as exc:
        sys.stderr.write(f"mnemosyned: {str(exc).removeprefix('mnemosyned: ')}\n")
        return 1
    sys.stdout.write(text)
    return 0


def _parsed(argv: Sequence[str]) -> Config:
    config = settings.parse(argv, os.environ)
    storage = config[StorageConfig]
    if config[AuthConfig].token_protection == "none":  # noqa: S105  # a mode
        raise ConfigError("migrate needs -token.protection=hmac")
    if not storage.engine.capabilities.is_durable:
        raise ConfigError(
            f"migrate needs a storage that keeps sessions, and -storage={storage.name} does not"
        )
    return config


async def _migrated(config: Config, server: PrivateServer | None) -> str:
    hasher = token_hasher(config)
    assert hasher is not None
    # The configuration allows HMAC keys only for an engine that can rename.
    store = cast("FullStore", new_store(config, Surroundings(registry=new_registry(), server=server), hasher))
    await store.open()
    try:
        count = await hash_all(store, hasher)
        others = await key_ids_in(store) - {hasher.key_id}
    finally:
        await store.close()
    text = f"{count} sessions were stored under their tokens, and are hashed now\n"
    if others:
        text += (
            "some sessions are hashed with another key: they get the new hash when they are read; "
            "keep both keys until then\n"
        )
    return text


async def hash_all(store: RenamableStore, hasher: TokenHasher) -> int:
    """Rename the live sessions that are stored under their tokens; return how many. Raises MnemosyneError."""
    count, after = 0, AFTER_HASHES
    while page := await store.stored_keys_after(after, limit=_PAGE):
        count += await _renamed(store, hasher, [stored_key for stored_key in page if _is_token(stored_key)])
        # A session that another writer held: renamed alone, it is waited for.
        for stored_key in await store.stored_keys_after(after, limit=len(page)):
            if stored_key in page and _is_token(stored_key):
                await _renamed(store, hasher, [stored_key])
        after = page[-1]
    return count


async def _renamed(store: RenamableStore, hasher: TokenHasher, tokens: Sequence[str]) -> int:
    """Return how many of these tokens have sessions."""
    if not tokens:
        return 0
    outcomes = await store.rename([Renaming(old=token, new=hasher.stored_key(token)) for token in tokens])
    for outcome in outcomes:
        if isinstance(outcome, MnemosyneError):
            raise outcome
    return sum(map(bool, outcomes))


def _is_token(stored_key: str) -> bool:
    # The Go daemon checks neither; no caller of ours can stored_key such a session.
    if is_hashed(stored_key):
        return False
    try:
        stored_key.encode()
    except UnicodeEncodeError:
        return False
    return True
