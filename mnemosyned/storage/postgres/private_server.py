"""The PostgreSQL engine's private server, for `-postgres.address=embedded:`.

A module of its own, because the registry calls it before the store is built, and a daemon with a server of
its own elsewhere need not import `embedded/`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mnemosyned.embedded.server import EmbeddedError, EmbeddedPostgres
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres.config import PostgresConfig


def start(config: PostgresConfig) -> EmbeddedPostgres | None:
    """Start the private server, or share the one that another process runs; None: another address.

    It blocks until the server accepts connections, at most for some minutes if initdb must run first.

    Raises:
        StorageRefused: the server cannot be run; the text says why in one line.
    """
    if not config.address.startswith("embedded:"):
        return None
    try:
        directory = data_directory(config.address, os.environ)
        return EmbeddedPostgres.start(directory, binaries=config.binaries)
    except EmbeddedError as exc:
        raise StorageRefused(f"embedded PostgreSQL: {exc}") from exc


def data_directory(address: str, environ: Mapping[str, str]) -> Path:
    """Return the directory that an `embedded:` address names.

    `embedded:` alone is `mnemosyned/postgres` under `$XDG_DATA_HOME` or `~/.local/share`;
    `embedded:///abs/dir` and `embedded:rel/dir` are what they say.

    Raises:
        EmbeddedError: there is no home directory.
    """
    path = address.removeprefix("embedded:").removeprefix("//")
    if path:
        return Path(path).absolute()
    base = Path(environ.get("XDG_DATA_HOME", ""))
    if not base.is_absolute():  # the XDG specification: ignore a relative one
        try:
            base = Path.home() / ".local" / "share"
        except RuntimeError:
            raise EmbeddedError("no home directory: set XDG_DATA_HOME or use embedded:///dir") from None
    return base / "mnemosyned" / "postgres"
