"""The PostgreSQL engine's private server, for `-postgres.address=embedded:`.

Apart from the store, because the registry starts the server first: it must be a child of the main thread,
which exists before the event loop, and the store needs its address.
"""

from __future__ import annotations

import os

from mnemosyned.embedded.address import data_directory
from mnemosyned.embedded.programs import EmbeddedError
from mnemosyned.embedded.server import EmbeddedPostgres
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.address_flags import is_private
from mnemosyned.storage.postgres.config import PostgresConfig


def start(config: PostgresConfig) -> EmbeddedPostgres | None:
    """Start the private server, or share the one that another process runs; None: another address.

    It blocks until the server accepts connections, at most for some minutes if initdb must run first.

    Raises:
        StorageRefused: the server cannot be run; the text says why in one line.
    """
    if not is_private(config.address):
        return None
    try:
        directory = data_directory(config.address, os.environ)
        return EmbeddedPostgres.start(directory, binaries=config.binaries)
    except EmbeddedError as exc:
        raise StorageRefused(f"embedded PostgreSQL: {exc}") from exc
