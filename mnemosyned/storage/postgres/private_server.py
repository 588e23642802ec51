"""A private PostgreSQL, for `-postgres.address=embedded:`."""

from __future__ import annotations

import os

from mnemosyned.embedded.server import EmbeddedError, EmbeddedPostgres, data_directory
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres.config import PostgresConfig


def start(config: PostgresConfig) -> EmbeddedPostgres | None:
    """Start the private server if the address asks for one. Raises StorageRefused."""
    if not config.address.startswith("embedded:"):
        return None
    try:
        directory = data_directory(config.address, os.environ)
        return EmbeddedPostgres.start(directory, binaries=config.binaries)
    except EmbeddedError as exc:
        raise StorageRefused(f"embedded PostgreSQL: {exc}") from exc
