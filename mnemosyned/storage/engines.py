"""The registry of storage engines: the only place that knows their names.

An engine is an entry in `ENGINES`: its name, its section of flags, what it is capable of, and how its store
is built. `-storage` offers exactly these names, so an unknown name can reach no engine. CONTRIBUTING.md
walks through adding one.

An engine's own modules are imported when it is chosen, so that `mnemosyned -version` need not import them
all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

from mnemosyned.config.flags import ConfigError, Section, setting
from mnemosyned.config.parsers import one_of
from mnemosyned.security.config import AuthConfig
from mnemosyned.storage.mongodb.config import MongoConfig
from mnemosyned.storage.postgres.config import PostgresConfig
from mnemosyned.storage.redis.config import RedisConfig

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from mnemosyned.config.config import Config
    from mnemosyned.security.file_reloader import FileReloader
    from mnemosyned.sessions.store import EngineStore, FullStore
    from mnemosyned.sessions.token_hash import TokenHasher
    from mnemosyned.storage.address_flags import AddressSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an engine can do besides the port's first two parts."""

    is_shared: bool  # several nodes may use the same sessions, so it can serve a cluster
    is_durable: bool  # sessions survive the end of the daemon
    can_rename: bool  # it is a FullStore, so tokens can be hashed at rest
    can_check: bool = False  # it implements CheckableStore, for `mnemosyned check`


class PrivateServer(Protocol):
    """A database server that runs as a child of this process, or that another process shares with it."""

    @property
    def is_owner(self) -> bool:
        """Whether the server is this process's child."""
        ...

    @property
    def directory(self) -> Path:
        """Where its data is."""
        ...

    @property
    def dsn(self) -> str:
        """Its address, with the password."""
        ...

    def exited(self) -> bool:
        """Tell whether the child has ended, though it was not stopped."""
        ...

    def restart(self) -> None:
        """Start the child again; call it from a thread that lives until `stop`. Raises StorageRefused."""
        ...

    def stop(self) -> None:
        """Stop the server if it is this process's child."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a store is built with besides the configuration."""

    registry: CollectorRegistry
    server: PrivateServer | None = None  # what the engine's `start_server` returned
    address: FileReloader[str] | None = None  # what the engine's `follow_address` returned


def _no_server(_: Config) -> PrivateServer | None:
    return None


def _no_file(_: Config) -> FileReloader[str] | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One storage engine."""

    name: str
    meaning: str  # a few words for -help
    capabilities: Capabilities
    build: Callable[[Config, Surroundings], EngineStore]  # the store is not yet opened
    section: type[Section] | None = None  # its own flags
    # Starts a private server if the configuration asks for one. Raises StorageRefused. It is called before
    # any thread or event loop exists, since the server ends with the thread that started it.
    start_server: Callable[[Config], PrivateServer | None] = _no_server
    # Follows the file that holds the address. Raises FilesUnusable. The store becomes a follower of it.
    follow_address: Callable[[Config], FileReloader[str] | None] = _no_file


def _build_postgres(config: Config, surroundings: Surroundings) -> EngineStore:
    from mnemosyned.storage.postgres.build import build

    server = surroundings.server
    return build(
        config[PostgresConfig],
        dsn=config[PostgresConfig].address if server is None else server.dsn,
        registry=surroundings.registry,
        environ=os.environ if server is None else {},
        address=surroundings.address,
    )


def _following(section: type[AddressSection]) -> Callable[[Config], FileReloader[str] | None]:
    def follow_address(config: Config) -> FileReloader[str] | None:
        from mnemosyned.storage.address_file import reloader_of

        return reloader_of(config[section])

    return follow_address


def _start_private_postgres(config: Config) -> PrivateServer | None:
    from mnemosyned.storage.postgres.private_server import start

    return start(config[PostgresConfig])


def _build_redis(config: Config, surroundings: Surroundings) -> EngineStore:
    from mnemosyned.storage.redis.build import build

    section, server = config[RedisConfig], surroundings.server
    return build(
        section,
        dsn=section.address if server is None else server.dsn,
        registry=surroundings.registry,
        address=surroundings.address,
    )


def _start_private_redis(config: Config) -> PrivateServer | None:
    from mnemosyned.storage.redis.private_server import start

    return start(config[RedisConfig])


def _build_mongodb(config: Config, surroundings: Surroundings) -> EngineStore:
    from mnemosyned.storage.mongodb.build import build

    return build(config[MongoConfig], registry=surroundings.registry, address=surroundings.address)


def _build_memory(_: Config, __: Surroundings) -> EngineStore:
    from mnemosyned.storage.memory import MemoryStore

    return MemoryStore()


ENGINES: Final = {
    engine.name: engine
    for engine in (
        Engine(
            name="postgres",
            meaning="PostgreSQL",
            capabilities=Capabilities(is_shared=True, is_durable=True, can_rename=True, can_check=True),
            build=_build_postgres,
            section=PostgresConfig,
            start_server=_start_private_postgres,
            follow_address=_following(PostgresConfig),
        ),
        Engine(
            name="redis",
            meaning="Redis or Valkey",
            capabilities=Capabilities(is_shared=True, is_durable=True, can_rename=True, can_check=True),
            build=_build_redis,
            section=RedisConfig,
            start_server=_start_private_redis,
            follow_address=_following(RedisConfig),
        ),
        Engine(
            name="mongodb",
            meaning="MongoDB",
            capabilities=Capabilities(is_shared=True, is_durable=True, can_rename=True, can_check=True),
            build=_build_mongodb,
            section=MongoConfig,
            follow_address=_following(MongoConfig),
        ),
        Engine(
            name="memory",
            meaning="one node, forgets everything at exit",
            capabilities=Capabilities(is_shared=False, is_durable=False, can_rename=True, can_check=True),
            build=_build_memory,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageConfig(Section):
    """Which engine stores the sessions."""

    TITLE = "Storage"
    EXAMPLE = "mnemosyned -storage=memory"

    name: str = setting(
        "storage",
        "postgres",
        one_of(*ENGINES),
        "storage engine: " + ", ".join(f"{engine.name} ({engine.meaning})" for engine in ENGINES.values()),
    )

    @property
    def engine(self) -> Engine:
        """The engine that was chosen."""
        return ENGINES[self.name]

    def check(self, config: Config) -> None:
        """See Section."""
        if config[AuthConfig].token_keys and not self.engine.capabilities.can_rename:
            raise ConfigError(f"flag -token.key.file: -storage={self.name} cannot hash tokens at rest")


def sections() -> list[type[Section]]:
    """Return the sections of all engines, the choice first."""
    return [StorageConfig, *(engine.section for engine in ENGINES.values() if engine.section is not None)]


def token_hasher(config: Config) -> TokenHasher | None:
    """Return how tokens are stored; None: as they are, and no HMAC key is known."""
    from mnemosyned.sessions.token_hash import TokenHasher

    auth = config[AuthConfig]
    keys = [key.encode() for key in auth.token_keys]
    is_hashing = auth.token_protection == "hmac"  # noqa: S105  # a mode
    return TokenHasher(keys, is_hashing=is_hashing) if keys else None


def new_store(config: Config, surroundings: Surroundings, hasher: TokenHasher | None) -> EngineStore:
    """Return the chosen engine's store, not yet opened; behind a HashedStore where an HMAC key is known."""
    store = config[StorageConfig].engine.build(config, surroundings)
    if hasher is None:
        return store
    from mnemosyned.storage.hashed import HashedStore

    # StorageConfig has checked that the engine can rename.
    return HashedStore(cast("FullStore", store), hasher)
